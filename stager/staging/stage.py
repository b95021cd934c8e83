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

from stager import warm
from stager.config import Config
from stager.manifest import Manifest
from stager.repository import Published
from stager.staging import fitness, store, trees
from stager.staging.store import EXTRACTED, MOUNTED, Stamp, Store
from stager.staging.trees import Progress

HIT = "hit"
_TRIES = 3
"""A claim that another stage of the same holder gives up when it fails is made again."""


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
        holder: who claims it, see :mod:`stager.staging.lease`.
        progress: told how far it is.

    Raises:
        StagerError: it cannot be staged; nothing half-made is left, and nothing is claimed but by
            a job, until it ends.
    """
    started = time.monotonic()
    manifest = published.manifest
    made = {layer.id: HIT for layer in manifest.layers}
    claimed: list[str] = []
    try:
        for _ in range(_TRIES):
            for layer_id in made:
                if node.lease(layer_id, holder):
                    claimed.append(layer_id)
            if all(node.ready(layer_id) is not None for layer_id in made):
                break
            made |= _make(published, node, config, progress)
    except BaseException:
        for layer_id in claimed if not warm.is_job(holder) else ():
            node.release(holder, layer_id)  # and not what it had before, which may be in use
        raise
    prefix, how = node.tree(manifest.top.id), slowest(made.values())
    return Staged(prefix, how, manifest, made, {"total": time.monotonic() - started})


def _make(
    published: Published, node: Store, config: Config, progress: Progress | None
) -> dict[str, str]:
    """Make the trees that are missing, from the bottom up, and try them; how each was made.

    The locks are kept until then. Who waits for one finds the tree ready afterwards; were we killed
    before, there is no stamp, and the next one begins anew.
    """
    deadline = time.monotonic() + config["stage.timeout"]
    waiting = progress.waiting if progress is not None else None
    fitness.require(published.manifest)
    untried: dict[str, Stamp] = {}
    with contextlib.ExitStack() as locks, store.blame_node("stage into the store"):
        try:
            for layer in published.manifest.layers:
                if node.ready(layer.id) is not None:
                    continue
                left = max(0.0, deadline - time.monotonic())
                locks.enter_context(node.lock(layer.id, timeout=left, waiting=waiting))
                if node.ready(layer.id) is None:  # nobody made it while we waited
                    untried[layer.id] = trees.make(published, layer, node, config, progress)
            if untried:
                fitness.try_out(published.manifest, node)
            made = {layer_id: stamp.how for layer_id, stamp in untried.items()}
            for layer_id in made:
                node.set_ready(layer_id, untried[layer_id])
                del untried[layer_id]
        except BaseException:
            for layer_id in untried:
                node.clear(layer_id)
            raise
    return made


def slowest(made: Iterable[str]) -> str:
    """Which of these ways to come to a tree takes longest."""
    return min(made, key=(EXTRACTED, MOUNTED, HIT).index)
