"""The simulator against what others have published: how far it can be believed beyond eight nodes.

What the simulation is fed with comes from elsewhere (another machine's log, a part of the same
page); where it does not, that is said.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from benchmarks.settings import COLD_LUSTRE, Settings

from . import simulate
from .work import Work

_NOTHING = Work(
    name="", operations=1, serial=1, touched=0, files=0, everything=0, size=0, image=0, archive=0,
    imported=0.0, untarred=0.0, staged=0.0, hit=0.0, through_mount=0.0, asked=0, asked_hit=0,
    asked_sending=0, asked_receiving=0, asked_recipe=2,
)  # fmt: skip


@dataclass(frozen=True)
class Series:
    """What one source has measured.

    Attributes:
        what: what was started, and who published it where.
        strategy: its name in the simulator.
        fed: what the simulation is fed with, and where that comes from.
        work: the same for the simulator.
        seconds: by number of nodes.
    """

    what: str
    strategy: str
    fed: str
    work: Work
    seconds: dict[int, float]
    setting: Settings = COLD_LUSTRE

    def compared(self) -> Iterator[tuple[int, float, float]]:
        """Numbers of nodes, what was measured, what is simulated."""
        for nodes, measured in self.seconds.items():
            yield nodes, measured, simulate.start(self.strategy, self.work, self.setting, nodes)


SERIES = (
    Series(
        "An environment of 8 GB by rsync from node to node: `ezpz yeet` on Aurora"
        " (saforem2/ezpz, docs/cli/yeet.md, 2026)",
        "rsync",
        "the log of another machine, Sunspot: 50 s until the first node has it, 20 s for eight"
        " copies from there; the program's own limits: 8 copies from a node, 128 in all",
        replace(_NOTHING, unpacked=50.0, rsynced=20.0),
        {8: 69.7, 16: 89.7, 32: 89.2, 64: 91.2, 128: 110.4, 256: 132.9, 512: 174.5, 1024: 255.4,
         2048: 421.4, 4096: 750.6},
    ),
    Series(
        "`import torch` from Lustre, 12 ranks a node, one run each: a figure of Copper's"
        " (argonne-lcf/copper; read off a plot, give or take 2 s)",
        "direct",
        "5,000 requests of a node (two for each of the 1,404 to 1,982 files that Copper counted,"
        " and what is missing), 1.1 GB touched, 2.3 s of import; cold-lustre as it is",
        replace(_NOTHING, operations=5000, serial=5000, touched=1_100_000_000, imported=2.3),
        {64: 108.0, 128: 79.0, 256: 78.0, 512: 116.0, 1024: 120.0, 2048: 120.0},
    ),
    Series(
        "The recipe, ROCm torch, 8 ranks a node: OLCF (olcf-user-docs, sbcast_conda.rst, 2026)",
        "recipe",
        "the page's own 39 s of tar and 3 s of conda-unpack, 2 s of import, 6 s of a job that does"
        " nothing; the archive's 5.8 GB are inferred from the 39 s, so it tests sbcast alone",
        replace(_NOTHING, archive=5_800_000_000, untarred=42.0, imported=8.0),
        {8: 77.0},
    ),
    Series(
        "Direct from Orion, the same page",
        "direct",
        "5,000 requests of a node, 6 s of a job that does nothing; the setting's 10 ms were derived"
        " from this figure among others, so it can only come out right",
        replace(_NOTHING, operations=5000, serial=5000, touched=1_100_000_000, imported=8.0),
        {8: 57.0},
    ),
)  # fmt: skip


def tables() -> list[str]:
    """Markdown: what was measured, what is simulated, and how far apart they are."""
    lines = []
    for one in SERIES:
        found = [*one.compared()]
        cells = {
            "nodes": (f"{nodes:,}" for nodes, _, _ in found),
            "measured, s": (f"{measured:.0f}" for _, measured, _ in found),
            "simulated, s": (f"{simulated:.0f}" for _, _, simulated in found),
            "off by": (
                f"{100 * (simulated / measured - 1):+.0f} %" for _, measured, simulated in found
            ),
        }
        rows = [f"| {name} | {' | '.join(row)} |" for name, row in cells.items()]
        rows.insert(1, "|---" * (len(found) + 1) + "|")
        lines += [f"{one.what}. Fed with {one.fed}.", "", *rows, ""]
    return lines
