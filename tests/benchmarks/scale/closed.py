"""The closed forms that simulated starts are printed beside: each the slowest of its bottlenecks.

They leave out all queueing: where simulation and form differ, queues are what differs.
"""

from __future__ import annotations

import math

from benchmarks.settings import Settings

from .work import Work

_BLOCK, _FANOUT, _HOP = 8e6, 8, 0.001
"""sbcast(1): 8 MB blocks, each acknowledged by the whole tree of fan-out 8; seconds of a hop."""
_LINK = 2.5e9
"""Bytes a second from node to node: one TCP stream, 22.5 Gb/s in EESSI's tutorial."""
PER_SOURCE, COPIES = 8, 128
"""rsyncs that `ezpz yeet` runs at a time, from one node and in all."""
DISK = 2.0e9
"""Bytes a second to a node's own disk: NVMe of the sites that published it."""


def direct(work: Work, setting: Settings, nodes: int) -> float:
    """Every node imports from the shared file system."""
    return (
        work.empty
        + work.imported
        + max(
            work.serial * setting.latency,
            nodes * work.operations / setting.rate,
            work.touched / setting.node_bandwidth,
            nodes * work.touched / setting.bandwidth,
        )
    )


def copied(work: Work, setting: Settings, nodes: int) -> float:
    """Every node copies the environment, file by file."""
    return (
        work.empty
        + work.imported
        + max(
            work.everything * setting.latency + work.files * setting.data_latency,
            nodes * work.everything / setting.rate,
            nodes * work.size / setting.bandwidth,
        )
    )


def sbcast(size: float, nodes: int) -> float:
    """Seconds of Slurm's broadcast: one block on its way at a time."""
    depth, reached = 0, 0
    while reached < nodes:
        depth += 1
        reached += _FANOUT**depth
    block = depth * (min(_FANOUT, nodes) * _BLOCK / _LINK + _HOP) + _BLOCK / DISK
    return math.ceil(size / _BLOCK) * block


def fanned(work: Work, setting: Settings, nodes: int) -> float:
    """One node unpacks the archive, the others copy from those that have it."""
    have, waves = 1, 0
    while have < nodes:
        have += min(PER_SOURCE * have, COPIES)
        waves += 1
    return work.empty + work.unpacked + waves * work.rsynced + work.imported


def recipe(work: Work, setting: Settings, nodes: int) -> float:
    """A tar.gz by sbcast, unpacked and repaired on every node."""
    asked = _asked(work.asked_recipe, setting, 1)  # by who sends
    return work.empty + asked + sbcast(work.archive, nodes) + work.untarred + work.imported


def shared(work: Work, setting: Settings, nodes: int) -> float:
    """Ours: every node reads the image."""
    read = max(transfer(work.image, setting), nodes * work.image / setting.bandwidth)
    return _asked(work.asked, setting, nodes) + read + _mounted(work)


def broadcast(work: Work, setting: Settings, nodes: int) -> float:
    """Ours: the image by sbcast."""
    asked = _asked(work.asked, setting, 1)
    last = _asked(work.asked_sending - work.asked, setting, nodes)
    if nodes > 1:
        last = _asked(work.asked_receiving, setting, nodes)
    return asked + sbcast(work.image, nodes) + last + _mounted(work)


def warm(work: Work, setting: Settings, nodes: int) -> float:
    """Ours: staged already."""
    return _asked(work.asked_hit, setting, nodes) + work.hit + work.imported


def transfer(size: float, setting: Settings) -> float:
    """Seconds in which one node, alone, has read an image onto its own disk."""
    return size / min(setting.node_bandwidth, DISK)


def _mounted(work: Work) -> float:
    return work.staged + work.through_mount + work.imported


def _asked(operations: int, setting: Settings, nodes: int) -> float:
    """One after the other by each node, and by all of them together."""
    return operations * max(setting.latency, nodes / setting.rate)


FORMS = {
    "direct": direct, "cp -r": copied, "rsync": fanned, "recipe": recipe,
    "ours": shared, "ours, sbcast": broadcast, "ours, warm": warm,
}  # fmt: skip
