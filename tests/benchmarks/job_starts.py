"""How long it takes until the last rank of a job has imported: ours and what else sites recommend.

    make bench-quick        numpy, two nodes of eight ranks, cold Lustre
    make bench              three settings, one to eight nodes, numpy and torch

`make performance` simulates more nodes from what was measured, see ``benchmarks/report.py``.

Every strategy does the same work in the same run, each time with nothing known on any node. What is
measured on this machine's processors is dilated, see ``benchmarks/scale/rig.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the tests' own packages

from benchmarks.measuring import clean_up_when_told_to_end, forget
from benchmarks.scale.rig import Rig, Start, pip_download, summary
from benchmarks.scale.strategies import RANKS, strategies
from benchmarks.settings import ALL
from conda import channel
from slurm.site import BIN
from stager import timings


class Workload(NamedTuple):
    """What an environment is made of, and what each rank imports of it.

    Attributes:
        packages: what pip installs.
        modules: as in ``torch,scipy``.
        conda: a conda environment, which has a Python of its own; else a venv of the nodes'.
    """

    packages: tuple[str, ...]
    modules: str
    conda: bool = False


RIG = 2
"""Counts how often the rig was mended so that starts before and after are not alike.

2: all nodes' Prologs belong to the job, peers unpack where no inode was just freed, and what is
mounted in place is mounted by the same program as ours.
"""

TORCH = ("torch==2.13.0", "numpy")
LARGE = (*TORCH, "scipy", "pandas", "scikit-learn", "matplotlib", "jax")
WORKLOADS = {
    "numpy": Workload(("numpy",), "numpy"),
    "numpy-conda": Workload(("numpy",), "numpy", conda=True),
    "torch": Workload(TORCH, "torch"),
    "torch-conda": Workload(TORCH, "torch", conda=True),
    # What pip brings where GPUs are: three times the files' bytes for the same import, and more.
    "torch-cuda": Workload(("torch==2.15.0", "numpy"), "torch"),
    # A job seldom imports all that its environment has.
    "torch-large": Workload(LARGE, "torch", conda=True),
    "all": Workload(LARGE, "torch,scipy,pandas,sklearn,matplotlib.pyplot,jax"),
}


def calibrated(directory: str) -> dict[str, float]:
    """What this machine does in the same run: bytes a second, and seconds of one Python."""
    started = time.perf_counter()
    subprocess.run(["/usr/bin/python3", "-I", "-S", "-c", "pass"], check=True)
    python = time.perf_counter() - started
    path = Path(directory) / "calibration"
    write = timings.writing(directory)
    path.write_bytes(os.urandom(64 << 20))
    forget(str(path))
    read = timings.reading([str(path)])
    squeezed = subprocess.run(["zstd", "-q", "-3", "-c", path], check=True, capture_output=True)
    started = time.perf_counter()
    subprocess.run(["zstd", "-dc"], input=squeezed.stdout, check=True, capture_output=True)
    zstd = (64 << 20) / (time.perf_counter() - started)
    path.unlink()
    return {"write": write, "read": read, "zstd": zstd, "python": python}


def conclusion(workload: str, ranks: int, measured: dict[str, list[Start]]) -> str:
    """What came out for ours and the others, in one line."""
    told = []
    measured = {name: starts for name, starts in measured.items() if starts}  # not those of --once
    if not measured:
        return f"{workload}: nothing was started with the last number of nodes"
    ours = statistics.median(one.whole for one in measured["ours"]) if "ours" in measured else 0
    for name in ("ours", "direct", "recipe", "squashfs in place"):
        if name in measured:
            starts = measured[name]
            whole = statistics.median(one.whole for one in starts)
            ratio = f" ({whole / ours:.1f} x)" if ours else ""
            told.append(f"{name} {whole:.2f} s{ratio}, {starts[0].operations:,} requests a node")
    first = next(iter(measured.values()))[0]
    return (
        f"{workload}, {first.nodes} nodes of {ranks} ranks, {first.setting} [{first.tag}]: "
        + "; ".join(told)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workload", choices=WORKLOADS, default="numpy")
    parser.add_argument("--nodes", default="2", help="numbers of nodes, as in 1,2,4,8")
    parser.add_argument("--ranks", type=int, choices=range(1, RANKS + 1), default=RANKS,
                        help="of each node")  # fmt: skip
    parser.add_argument("--settings", default="cold-lustre", help=", ".join(ALL))
    parser.add_argument("--strategies", default="", help="names, parted by |; default: all")
    parser.add_argument("--skip", default="", help="names, parted by |")
    parser.add_argument("--once", default="", help="names: one start, on the first number of nodes")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--ledgers", type=Path, default=Path(".build/ledgers"),
                        help="where every operation of each start is kept")  # fmt: skip
    parser.add_argument("--json", type=Path, help="file for every start, one object a line")
    arguments = parser.parse_args()
    counts = [int(one) for one in arguments.nodes.split(",")]
    workload = WORKLOADS[arguments.workload]
    offered = strategies(workload.modules, BIN, ranks=arguments.ranks, conda=workload.conda)
    known = {one.name: one for one in offered}
    wanted = arguments.strategies.split("|") if arguments.strategies else [*known]
    skip = set(filter(None, arguments.skip.split("|")))
    once = set(filter(None, arguments.once.split("|")))
    for name in {*wanted, *skip, *once} - {*known}:
        parser.error(f"no strategy {name!r}; there are: {' | '.join(known)}")
    for name in {*arguments.settings.split(",")} - {*ALL}:
        parser.error(f"no setting {name!r}; there are: {', '.join(ALL)}")
    chosen = [known[name] for name in wanted if name not in skip]
    machine = (
        f"{platform.machine()}, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f},"
        f" Linux {platform.release().partition('-')[0]}, {time.strftime('%Y-%m-%d')}"
    )
    print(f"{arguments.workload}, {arguments.ranks} ranks a node; {machine}")

    ledgers: Path = arguments.ledgers / arguments.workload
    ledgers.mkdir(parents=True, exist_ok=True)

    def keep(row: dict[str, object]) -> None:
        if arguments.json:
            with arguments.json.open("a") as file:
                file.write(json.dumps({"workload": arguments.workload, **row}) + "\n")

    clean_up_when_told_to_end()
    with tempfile.TemporaryDirectory(prefix="stager-bench-", dir="/var/tmp") as scratch:
        wheels = Path(scratch) / "wheels"
        Path(scratch).chmod(0o755)
        pip_download(workload.packages, wheels)
        packages = channel.build(channel.WORK / "channel") if workload.conda else None
        rig = Rig(Path(scratch) / "cluster", max(counts), binds=scratch)
        with rig.up():
            made = rig.make(wheels, workload.modules, packages)
            calibration = {**calibrated(scratch), "link": rig.link()}
            print(", ".join(f"{name} {value:.3g}" for name, value in calibration.items()))
            keep({"rig": RIG, "environment": made, "machine": machine, "calibration": calibration})
            results = []
            for setting in arguments.settings.split(","):
                print(f"\n{setting}")
                print(
                    f"{'strategy, seconds':<20} {'N':>3} {'min':>8} {'median':>8} {'max':>8}"
                    f" {'n':>2} {'ops/node':>9} {'ops':>10} {'MB read':>9}  phases"
                )
                for count in counts:
                    measured: dict[str, list[Start]] = {one.name: [] for one in chosen}
                    for run in range(arguments.runs):
                        for strategy in chosen:
                            if strategy.name in once and (run or count != counts[0]):
                                continue
                            one, ledger = rig.start(strategy, ALL[setting], count)
                            measured[strategy.name].append(one)
                            keep({"tag": one.tag, **asdict(one)})
                            name = f"{setting} {count}x{arguments.ranks} {strategy.name} {run}"
                            ledger.write(ledgers / f"{name}.jsonl.gz")
                    for starts in filter(None, measured.values()):
                        print(summary(starts), flush=True)
                    results.append(measured)
    print(f"\nledgers of all starts: {ledgers}")
    print(conclusion(arguments.workload, arguments.ranks, results[len(counts) - 1]))


if __name__ == "__main__":
    main()
