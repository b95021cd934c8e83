"""Collection: evict trees that nobody claims, the least recently used first."""

from __future__ import annotations

import contextlib
import os
from typing import Callable, NamedTuple

from stager import fsutil
from stager.errors import BusyError, StagerError
from stager.staging import lease
from stager.staging.store import SENT, Held, Store


class Collected(NamedTuple):
    """What a collection did.

    Attributes:
        trees: evicted.
        size: bytes freed.
        leases: claims of dead holders dropped.
        failed: trees whose removal failed midway, with what happened; they are no trees any more.
    """

    trees: tuple[str, ...]
    size: int
    leases: int
    failed: tuple[str, ...] = ()


def collect(
    node: Store,
    *,
    max_size: int,
    min_free: int,
    min_inodes: int = 0,
    everything: bool = False,
    exists: Callable[[str, str], bool | None] | None = None,
) -> Collected:
    """Evict trees until the store keeps its bounds. A claimed tree is never touched.

    Args:
        node: the store.
        max_size: bytes all trees and images may take.
        min_free: bytes to leave free on the file system.
        min_inodes: inodes to leave free there.
        everything: evict every unclaimed tree.
        exists: asks the scheduler about jobs, see :func:`stager.staging.lease.is_alive`.
    """
    for place in (node.root, os.path.dirname(node.root)):  # where keeper.py has sbcast put them
        with contextlib.suppress(OSError):  # not everybody may look beside the store
            fsutil.sweep(place, beginning=f"{SENT}{os.geteuid()}-")  # images that nobody took in
    fsutil.sweep(os.path.join(node.root, "ready"))  # halves of stamps
    dropped = _drop_dead(node, exists)
    before = node.free()
    evicted: list[str] = []
    failed: list[str] = []
    found = [(held, node.size_of(held)) for held in node.held()]
    used = sum(size for _, size in found)
    for held, size in sorted(found, key=lambda one: one[0].used):
        abandoned = held.stamp is None  # what a killed stage has left
        enough = used <= max_size and node.free() >= min_free and node.free_inodes() >= min_inodes
        if held.leases or (enough and not everything and not abandoned):
            continue
        try:
            if evict(node, held.id):
                evicted.append(held.id)
                used -= size
        except OSError as error:
            failed.append(f"{held.id}: {error}")
    return Collected(tuple(evicted), max(0, node.free() - before), dropped, tuple(failed))


def _drop_dead(node: Store, exists: Callable[[str, str], bool | None] | None) -> int:
    dropped = 0
    for held in node.held():
        for holder in held.leases:
            if not lease.is_alive(holder, exists):
                dropped += node.release(holder, held.id)
    return dropped


def idle(node: Store) -> list[Held]:
    """The trees that nobody claims, in no order."""
    return [held for held in node.held() if not held.leases]


def evict(node: Store, layer_id: str) -> bool:
    """Remove one tree unless somebody claims it now.

    A stage writes its lease first and looks at the stamp then; we take the stamp away first and
    look at the leases then: one of the two sees the other.

    Raises:
        OSError: what is left is no tree any more.
    """
    try:
        with node.lock(layer_id, timeout=0.0):
            stamp = node.stamp(layer_id)
            node.withdraw(layer_id)
            if node.leases(layer_id):
                if stamp is not None:
                    node.set_ready(layer_id, stamp)
                return False
            try:
                node.forget(layer_id)
            except StagerError:
                if stamp is not None:
                    node.set_ready(layer_id, stamp)  # still in use, by somebody without a lease
                return False
    except BusyError:
        return False
    return True
