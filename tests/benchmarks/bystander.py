"""What somebody else on the machine notices: a node that has nothing to do with a job asks the same
metadata service, again and again, while the job's ranks start.

    make bench-bystander                                   weak NFS, three nodes of eight ranks
    make bench-bystander OPTIONS='--setting cold-lustre'   and others, see --help

As root; it brings up the test cluster. The bystander asks for names that its client does not know,
one after the other, at most four hundred each (dilated) second. Times are those of ``stat`` on
metafs, divided by the dilation: ``waited`` is what metafs had them wait for their turn and for the
answer, ``measured`` what the program saw, which here waits for processors too: the ranks and metafs
have the same two or four. The operations are exact.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.jobs import HOME, make_environment, mounted, start
from benchmarks.measuring import clean_up_when_told_to_end
from benchmarks.metafs import Metafs
from benchmarks.settings import ALL
from cluster.client import Cluster
from slurm.conftest import SETTINGS
from slurm.site import Site

NODE = "n4"
IDLE = 1.0
"""Seconds, before dilation, for which it is measured without a job."""

PAUSE = 0.0025
"""Seconds between an answer and the next question."""

# Until standard input ends; prints when each began and how long it took.
_ASKING = """
import os, select, sys, time
directory, pause = sys.argv[1], float(sys.argv[2])
os.listdir(directory)  # the way there is known from here on
print("begins", flush=True)
number = 0
while not select.select([0], [], [], pause)[0]:
    number += 1
    before = time.monotonic()
    os.path.exists(f"{directory}/nothing-{os.getpid()}-{number}")
    print(before, time.monotonic() - before, flush=True)
"""


class Bystander:
    """Somebody on :data:`NODE`."""

    def __init__(self, site: Site, shared: Metafs) -> None:
        self.dilation = shared.dilation
        # A directory of its own: what it asks is not what the job asks.
        argv = ["nsenter", "-t", str(site.cluster.pid(NODE)), "-m", sys.executable, "-c", _ASKING]
        self.process = subprocess.Popen(
            [*argv, f"{HOME}/other", str(PAUSE * self.dilation)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        if self.process.stdout.readline() != "begins\n":
            raise RuntimeError("the bystander cannot ask")

    def stop(self) -> list[tuple[float, float]]:
        """When each ``stat`` began, and the seconds it took, without the dilation."""
        out, _ = self.process.communicate()
        pairs = (line.split() for line in out.splitlines())
        return [(float(at), float(took) / self.dilation) for at, took in pairs]


@contextlib.contextmanager
def watching(site: Site, shared: Metafs) -> Iterator[list[tuple[float, float]]]:
    """What it notices is in the list afterwards."""
    noticed: list[tuple[float, float]] = []
    bystander = Bystander(site, shared)
    try:
        yield noticed
    finally:
        noticed += bystander.stop()


def measure(
    site: Site, case: str, nodes: tuple[str, ...], options: argparse.Namespace
) -> dict[str, Any]:
    """One row of the table, over some jobs; their clients know nothing, each time."""
    dilation: float = options.dilation
    waited: list[float] = []
    measured: list[float] = []
    operations, seconds = [], []
    for _ in range(options.repeat):
        if case == "hook, cold":
            site.clear_stores()
        with contextlib.ExitStack() as stack:
            shared = stack.enter_context(mounted(site, *nodes, NODE, settings=ALL[options.setting]))
            shared.dilate(dilation)
            noticed = stack.enter_context(watching(site, shared))
            if case == "idle":
                begin, took = shared.mark(), IDLE
                time.sleep(IDLE * dilation)
                ledger = shared.ledger(begin)
            else:
                way, _, _ = case.partition(",")
                started = start(site, shared, way, nodes=nodes, ranks=options.ranks)
                begin, took, ledger = started.submitted, started.seconds, started.ledger
        end = begin + took * dilation
        measured += (one for at, one in noticed if begin <= at <= end)
        waited += (one.took / dilation for one in ledger.of(NODE) if one.kind == "lookup")
        operations.append(sum(ledger.of(node).requests() for node in nodes))
        seconds.append(took)
    return {
        "case": case,
        "waited": _shown(waited),
        "measured": _shown(measured),
        "operations": operations,
        "seconds": seconds,
    }


def _shown(times: list[float]) -> dict[str, float]:
    """In milliseconds."""
    times = sorted(one * 1e3 for one in times)
    return {
        "n": len(times),
        "min": times[0],
        "median": statistics.median(times),
        "p99": times[int(len(times) * 0.99)],
        "max": times[-1],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="What a job's start costs others.")
    parser.add_argument("--setting", choices=ALL, default="weak-nfs")
    parser.add_argument("--dilation", type=float, default=10.0)
    parser.add_argument("--nodes", type=int, choices=(1, 2, 3), default=3, help="of the job")
    parser.add_argument("--ranks", type=int, default=8, help="on each node")
    parser.add_argument("--repeat", type=int, default=3, help="jobs in each row")
    parser.add_argument("--json", action="store_true", help="one object instead of the table")
    options = parser.parse_args()
    clean_up_when_told_to_end()
    nodes = tuple(f"n{number + 1}" for number in range(options.nodes))
    rows = []
    with tempfile.TemporaryDirectory(prefix="bystander-") as directory:
        cluster = Cluster(Path(directory) / "state")
        try:
            cluster.up(**SETTINGS)
            site = Site(cluster)
            site.install()
            site.shell("alice", "mkdir other")
            make_environment(site, "numpy")
            for case in ("idle", "direct", "hook, cold", "hook, hit"):
                rows.append(measure(site, case, nodes, options))
        finally:
            cluster.down()
    if options.json:
        print(json.dumps({"setting": options.setting, "dilation": options.dilation, "rows": rows}))
        return 0
    print(
        f"{options.setting}, time dilated {options.dilation:g} times [dilated]; a job of"
        f" {options.nodes} nodes x {options.ranks} ranks imports numpy; stat on {NODE}, in ms"
    )
    print(f"{'':22}{'n':>6}{'min':>9}{'median':>9}{'p99':>9}{'max':>9}")
    for row in rows:
        for what in ("waited", "measured"):
            one = row[what]
            print(
                f"{row['case']:12}{what:10}{one['n']:6}{one['min']:9.2f}{one['median']:9.2f}"
                f"{one['p99']:9.2f}{one['max']:9.2f}"
            )
        print(f"{row['case']:12}requests of each job: {row['operations']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
