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
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the tests' own packages

from benchmarks.scale.rig import BIN, Rig, Start, pip_download, summary
from benchmarks.scale.settings import SETTINGS
from benchmarks.scale.strategies import strategies

WORKLOADS = {
    "numpy": (["numpy"], "numpy"),
    "torch": (["torch==2.13.0", "numpy"], "torch"),
    "all": (
        ["torch==2.13.0", "numpy", "scipy", "pandas", "scikit-learn", "matplotlib", "jax"],
        "torch,scipy,pandas,sklearn,matplotlib.pyplot,jax",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workload", choices=WORKLOADS, default="numpy")
    parser.add_argument("--nodes", default="2", help="numbers of nodes, as in 1,2,4,8")
    parser.add_argument("--settings", default="cold-lustre", help=", ".join(SETTINGS))
    parser.add_argument("--strategies", default="", help="names, parted by |; default: all")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for every start, one object a line")
    arguments = parser.parse_args()
    counts = [int(one) for one in arguments.nodes.split(",")]
    names, modules = WORKLOADS[arguments.workload]
    chosen = [
        one
        for one in strategies(modules, BIN)
        if not arguments.strategies or one.name in arguments.strategies.split("|")
    ]
    print(
        f"{arguments.workload}, 8 ranks a node; {platform.machine()}, {os.cpu_count()} processors,"
        f" load {os.getloadavg()[0]:.1f}, Linux {platform.release()}, {time.strftime('%Y-%m-%d')}"
    )
    with tempfile.TemporaryDirectory(prefix="stager-bench-", dir="/var/tmp") as scratch:
        wheels = Path(scratch) / "wheels"
        Path(scratch).chmod(0o755)
        pip_download(names, wheels)
        rig = Rig(Path(scratch) / "cluster", max(counts), binds=scratch)
        with rig.up():
            rig.make(wheels)
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
                            one = rig.start(strategy, SETTINGS[setting], count)
                            measured[strategy.name].append(one)
                            if arguments.json:
                                with arguments.json.open("a") as file:
                                    row = {"workload": arguments.workload, **asdict(one)}
                                    file.write(json.dumps(row) + "\n")
                    for starts in measured.values():
                        print(summary(starts), flush=True)


if __name__ == "__main__":
    main()
