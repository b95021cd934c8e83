"""Staging: make a published environment's layers present and usable on this node. Read this first.

::

    published --stage(store, holder)--> Staged --activate--> environment variables
    end of the holder: release          now and then: collect

A tree that is ready costs no lock and nothing on shared storage. One that is not is made by
whoever gets its lock first; the others wait, and take over should the maker die.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from stager import fitness, store, trees
from stager.config import Config
from stager.errors import StagerError
from stager.manifest import Manifest
from stager.repository import Published
from stager.store import EXTRACTED, MOUNTED, Store
from stager.trees import Progress

HIT = "hit"


class Staged(NamedTuple):
    """An environment that can be used on this node.

    Attributes:
        prefix: its path here.
        how: ``hit``, ``mounted`` or ``extracted``: the slowest thing that was done.
        layers: for each layer its id and how it came to be.
        seconds: how long each step took.
    """

    prefix: str
    how: str
    manifest: Manifest
    layers: dict[str, str]
    seconds: Mapping[str, float] = MappingProxyType({})


def stage(
    published: Published,
    node: Store,
    config: Config,
    *,
    holder: str,
    progress: Progress | None = None,
) -> Staged:
    """Stage every layer of an environment, claiming each for ``holder``.

    Args:
        published: the environment.
        node: the store on this node.
        config: see :mod:`stager.config`; ``stage.how`` and ``stage.timeout`` are used.
        holder: who claims it, see :mod:`stager.lease`.
        progress: told how far it is.

    Raises:
        StagerError: it cannot be staged; nothing half-made is left, and nothing is claimed.
    """
    started = time.monotonic()
    manifest = published.manifest
    made: dict[str, str] = {}
    claimed: list[str] = []
    try:
        for layer in manifest.layers:
            if node.lease(layer.id, holder):
                claimed.append(layer.id)
            if node.ready(layer.id) is not None:
                made[layer.id] = HIT
                continue
            fitness.require(manifest)
            remaining = config["stage.timeout"] - (time.monotonic() - started)
            waiting = progress.waiting if progress is not None else None
            with (
                store.blame_node("stage into the store"),
                node.lock(layer.id, timeout=max(0.0, remaining), waiting=waiting),
            ):
                # Somebody may have made it while we waited.
                if node.ready(layer.id) is not None:
                    made[layer.id] = HIT
                else:
                    made[layer.id] = trees.make(published, layer, node, config, progress)
        new = [layer_id for layer_id, how in made.items() if how != HIT]
        if new:
            try:
                fitness.try_out(manifest, node)
            except StagerError:
                for layer_id in new:  # or the next one would find them ready
                    with contextlib.suppress(StagerError), node.lock(layer_id, timeout=1):
                        node.withdraw(layer_id)
                raise
    except BaseException:
        for layer_id in claimed:  # what the holder had before may be in use
            node.release(holder, layer_id)
        raise
    prefix, how = node.tree(manifest.top.id), slowest(made.values())
    return Staged(prefix, how, manifest, made, {"total": time.monotonic() - started})


def slowest(made: Iterable[str]) -> str:
    """Which of these ways to come to a tree takes longest."""
    return min(made, key=(EXTRACTED, MOUNTED, HIT).index)


def release(node: Store, holder: str, layers: Iterable[str] | None = None) -> int:
    """Drop a holder's claims; returns how many trees it had."""
    if layers is None:
        return node.release(holder)
    return sum(node.release(holder, layer) for layer in layers)
