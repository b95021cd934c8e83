"""How long it takes until the last rank of a job has imported: ours and what else sites recommend.

    make bench-quick        numpy, two nodes of eight ranks, cold Lustre
    make bench              all settings, one to eight nodes, torch, and simulated to 9,408 nodes

Every strategy does the same work in the same run, each time with nothing known on any node. What is
measured on this machine's processors is dilated, see ``benchmarks/scale/rig.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the tests' own packages

from benchmarks.scale.rig import BIN, Rig, Start, pip_download, summary
from benchmarks.scale.strategies import strategies
from benchmarks.settings import ALL
from stager import timings

WORKLOADS = {
    "numpy": (["numpy"], "numpy"),
    "torch": (["torch==2.13.0", "numpy"], "torch"),
    "all": (
        ["torch==2.13.0", "numpy", "scipy", "pandas", "scikit-learn", "matplotlib", "jax"],
        "torch,scipy,pandas,sklearn,matplotlib.pyplot,jax",
    ),
}


def tag(one: Start) -> str:
    """Whether any of its phases was dilated."""
    return "dilated" if max(one.dilation.values()) > 1 else "real"


def calibrated(directory: str) -> dict[str, float]:
    """What this machine does in the same run: bytes a second, and seconds of one Python."""
    started = time.perf_counter()
    subprocess.run(["/usr/bin/python3", "-I", "-S", "-c", "pass"], check=True)
    python = time.perf_counter() - started
    path = Path(directory) / "calibration"
    write = timings.writing(directory)
    path.write_bytes(os.urandom(64 << 20))
    read = timings.reading([str(path)])
    squeezed = subprocess.run(["zstd", "-q", "-3", "-c", path], check=True, capture_output=True)
    started = time.perf_counter()
    subprocess.run(["zstd", "-dc"], input=squeezed.stdout, check=True, capture_output=True)
    zstd = (64 << 20) / (time.perf_counter() - started)
    path.unlink()
    return {"write": write, "read": read, "zstd": zstd, "python": python}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workload", choices=WORKLOADS, default="numpy")
    parser.add_argument("--nodes", default="2", help="numbers of nodes, as in 1,2,4,8")
    parser.add_argument("--settings", default="cold-lustre", help=", ".join(ALL))
    parser.add_argument("--strategies", default="", help="names, parted by |; default: all")
    parser.add_argument("--skip", default="", help="names, parted by |")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--ledgers", type=Path, help="directory for every operation of each start")
    parser.add_argument("--json", type=Path, help="file for every start, one object a line")
    arguments = parser.parse_args()
    counts = [int(one) for one in arguments.nodes.split(",")]
    names, modules = WORKLOADS[arguments.workload]
    known = {one.name: one for one in strategies(modules, BIN)}
    wanted = arguments.strategies.split("|") if arguments.strategies else [*known]
    for name in {*wanted, *filter(None, arguments.skip.split("|"))} - {*known}:
        parser.error(f"no strategy {name!r}; there are: {' | '.join(known)}")
    chosen = [known[name] for name in wanted if name not in arguments.skip.split("|")]
    machine = (
        f"{platform.machine()}, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f},"
        f" Linux {platform.release().partition('-')[0]}, {time.strftime('%Y-%m-%d')}"
    )
    print(f"{arguments.workload}, 8 ranks a node; {machine}")

    def keep(row: dict[str, object]) -> None:
        if arguments.json:
            with arguments.json.open("a") as file:
                file.write(json.dumps({"workload": arguments.workload, **row}) + "\n")

    with tempfile.TemporaryDirectory(prefix="stager-bench-", dir="/var/tmp") as scratch:
        wheels = Path(scratch) / "wheels"
        Path(scratch).chmod(0o755)
        pip_download(names, wheels)
        rig = Rig(Path(scratch) / "cluster", max(counts), binds=scratch, ledgers=arguments.ledgers)
        with rig.up():
            rig.make(wheels)
            keep(
                {"environment": rig.made(), "machine": machine, "calibration": calibrated(scratch)}
            )
            for setting in arguments.settings.split(","):
                print(f"\n{setting} (dilated seconds)")
                print(
                    f"{'strategy':<20} {'N':>3} {'min':>8} {'median':>8} {'max':>8} {'n':>2}"
                    f" {'ops/node':>9} {'ops':>10} {'MB read':>9}  phases"
                )
                for count in counts:
                    measured: dict[str, list[Start]] = {one.name: [] for one in chosen}
                    for _ in range(arguments.runs):
                        for strategy in chosen:
                            one = rig.start(strategy, ALL[setting], count)
                            measured[strategy.name].append(one)
                            keep({"tag": tag(one), **asdict(one)})
                    for starts in measured.values():
                        print(summary(starts), flush=True)


if __name__ == "__main__":
    main()
