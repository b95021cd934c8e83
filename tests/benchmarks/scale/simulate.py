"""Starts of up to 9,408 nodes, event by event, from what one node's start was measured to ask for.

One metadata service answers one request after the other; one network of the file system carries
one piece after the other; each node waits for every answer before it asks again, as an import does.
Nodes do not differ and nothing fails.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, Callable

import simpy

from benchmarks.settings import Settings

from . import closed
from .work import Work

_EVENTS = 60_000
"""About as many events as one simulation has: more nodes ask in larger bursts."""
_PIECES = 16
"""Pieces in which a node reads an image."""

Steps = Generator[Any, Any, None]


class Shared:
    """The file system: a queue for metadata and a queue for data; and who copies from whom."""

    def __init__(self, world: simpy.Environment, setting: Settings, nodes: int) -> None:
        self.world, self.setting, self.nodes = world, setting, nodes
        self.metadata = simpy.Resource(world)
        self.data = simpy.Resource(world)
        self.nobody_has_it = True
        self.sender: simpy.Process | None = None
        self.sources = simpy.Container(world)
        self.copies = simpy.Resource(world, closed.COPIES)

    def ask(self, serial: int, operations: int = 0) -> Steps:
        """One node's operations.

        Args:
            serial: how many the node waits for, one after the other.
            operations: how many it asks in all, others at the same time as these.
        """
        if not serial:
            return
        burst = max(1, self.nodes * serial * 2 // _EVENTS)
        busy = max(serial, operations) / serial / self.setting.rate
        while serial > 0:
            count = min(burst, serial)
            with self.metadata.request() as turn:
                yield turn
                yield self.world.timeout(count * busy)
            # The service worked on this node's requests while they were on their way.
            yield self.world.timeout(count * max(0.0, self.setting.latency - busy))
            serial -= count

    def send(self, operations: int, size: float) -> Generator[Any, Any, bool]:
        """A broadcast: one node asks and sends, all wait for it; tells whether this one sent."""
        sends = self.sender is None
        if self.sender is None:
            self.sender = self.world.process(self._sent(operations, size))
        yield self.sender
        return sends

    def _sent(self, operations: int, size: float) -> Steps:
        yield from self.ask(operations)
        yield self.world.timeout(closed.sbcast(size, self.nodes))

    def read(self, size: float, *, kept: bool = False) -> Steps:
        """One node's bytes, at its link's speed where the file system is faster.

        Args:
            size: bytes.
            kept: they are written to the node's own disk, which may be slower.
        """
        one = self.setting.node_bandwidth
        if kept:
            one = min(one, closed.DISK)
        piece = size / _PIECES
        for _ in range(_PIECES):
            started = self.world.now
            with self.data.request() as turn:
                yield turn
                yield self.world.timeout(piece / self.setting.bandwidth)
            yield self.world.timeout(max(0.0, piece / one - (self.world.now - started)))


def direct(shared: Shared, work: Work) -> Steps:
    """Import from the shared file system."""
    reading = shared.world.process(shared.read(work.touched))
    yield from shared.ask(work.serial, work.operations)
    yield reading
    yield shared.world.timeout(work.empty + work.imported)


def copied(shared: Shared, work: Work) -> Steps:
    """Copy the environment, file by file."""
    reading = shared.world.process(shared.read(work.size))
    yield from shared.ask(work.everything)
    yield shared.world.timeout(work.files * shared.setting.data_latency)
    yield reading
    yield shared.world.timeout(work.empty + work.imported)


def fanned(shared: Shared, work: Work) -> Steps:
    """One node unpacks the archive, the others copy from those that have it, as soon as they do."""
    if shared.nobody_has_it:
        shared.nobody_has_it = False
        yield shared.world.timeout(work.unpacked)
    else:
        yield shared.sources.get(1)
        with shared.copies.request() as turn:
            yield turn
            yield shared.world.timeout(work.rsynced)
        yield shared.sources.put(1)
    yield shared.sources.put(closed.PER_SOURCE)
    yield shared.world.timeout(work.empty + work.imported)


def recipe(shared: Shared, work: Work) -> Steps:
    """A tar.gz by sbcast, unpacked and repaired."""
    yield from shared.send(work.asked_recipe, work.archive)
    yield shared.world.timeout(work.empty + work.untarred + work.imported)


def ours(shared: Shared, work: Work) -> Steps:
    """Read the image, mount it, import."""
    yield from shared.ask(work.asked)
    yield from shared.read(work.image, kept=True)
    yield shared.world.timeout(work.staged + work.through_mount + work.imported)


def broadcast(shared: Shared, work: Work) -> Steps:
    """The image by sbcast; then every node looks at what there is of it, the sender knows most."""
    sent = yield from shared.send(work.asked, work.image)
    yield from shared.ask(work.asked_sending - work.asked if sent else work.asked_receiving)
    yield shared.world.timeout(work.staged + work.through_mount + work.imported)


def warm(shared: Shared, work: Work) -> Steps:
    """Staged already."""
    yield from shared.ask(work.asked_hit)
    yield shared.world.timeout(work.hit + work.imported)


STRATEGIES: dict[str, Callable[[Shared, Work], Steps]] = {
    "direct": direct, "cp -r": copied, "rsync": fanned, "recipe": recipe,
    "ours": ours, "ours, sbcast": broadcast, "ours, warm": warm,
}  # fmt: skip


def start(strategy: str, work: Work, setting: Settings, nodes: int) -> float:
    """Seconds until the last of so many nodes has imported."""
    world = simpy.Environment()
    shared = Shared(world, setting, nodes)
    for _ in range(nodes):
        world.process(STRATEGIES[strategy](shared, work))
    world.run()
    return float(world.now)
