"""Pack and stage against the plain tools, on one machine: ratios of one run, never seconds alone.

    make bench-main                      a new environment with numpy, scipy, pandas, matplotlib
    make bench-main ENV=/path/to/venv    one of yours; nothing is written into it

Each pair is run in turn (A B A B ...), so that a machine whose speed drifts drifts for both.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Callable, NamedTuple

PACKAGES = ["numpy", "scipy", "pandas", "matplotlib", "requests"]


class Run(NamedTuple):
    """Wall and processor seconds of one run."""

    wall: float
    cpu: float


def measure(argv: list[str], environ: dict[str, str]) -> Run:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.monotonic()
    subprocess.run(
        argv, env=environ, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wall = time.monotonic() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Run(wall, cpu)


class Bench:
    def __init__(self, env: str, scratch: str, runs: int) -> None:
        self.env, self.scratch, self.runs = env, scratch, runs
        self.bin = os.path.dirname(sys.executable)
        self.stager = os.path.join(self.bin, "stager")
        store = os.path.join(scratch, "store")
        self.repository = os.path.join(scratch, "repository")
        self.environ = {**os.environ, "STAGER_STORE": store, "STAGER_REPOSITORY": self.repository}
        self.image = os.path.join(scratch, "plain.squashfs")

    def pack(self) -> Run:
        shutil.rmtree(self.repository, ignore_errors=True)
        return measure([self.stager, "pack", self.env, "--name", "bench"], self.environ)

    def mksquashfs(self) -> Run:
        if os.path.exists(self.image):
            os.unlink(self.image)
        options = "-noappend -quiet -no-progress -comp zstd -Xcompression-level 3 -b 128K"
        options += " -no-xattrs -all-root -no-exports"
        return measure(["mksquashfs", self.env, self.image, *options.split()], self.environ)

    def venv_pack(self) -> Run:
        output = os.path.join(self.scratch, "venv-pack.tar.gz")
        argv = [os.path.join(self.bin, "venv-pack"), "-q", "-f", "-p", self.env, "-o", output]
        return measure(argv, self.environ)

    def evict(self) -> None:
        for verb in (["release"], ["collect", "--all"]):  # the claim is of the caller: of us
            command = [self.stager, *verb]
            subprocess.run(command, env=self.environ, check=True, capture_output=True)
        assert not os.listdir(os.path.join(self.environ["STAGER_STORE"], "envs"))

    def stage(self) -> Run:
        self.evict()
        return measure([self.stager, "stage", "bench"], self.environ)

    def hit(self) -> Run:
        return measure([self.stager, "stage", "bench"], self.environ)

    def copy(self) -> Run:
        images = os.path.join(self.repository, "images")
        largest = max(os.listdir(images), key=lambda name: os.path.getsize(f"{images}/{name}"))
        target = os.path.join(self.scratch, "copy")
        if os.path.exists(target):
            os.unlink(target)
        return measure(["cp", os.path.join(images, largest), target], self.environ)

    def pair(
        self, first: Callable[[], Run], second: Callable[[], Run]
    ) -> tuple[list[Run], list[Run]]:
        first(), second()
        pairs = [(first(), second()) for _ in range(self.runs)]
        return [one for one, _ in pairs], [other for _, other in pairs]


def row(name: str, runs: list[Run]) -> None:
    walls = [run.wall for run in runs]
    cpu = statistics.median(run.cpu for run in runs)
    print(
        f"{name:<34} {min(walls):8.2f} {statistics.median(walls):8.2f} {max(walls):8.2f} {cpu:8.2f}"
        f"  n={len(runs)}"
    )


def ratio(first: list[Run], second: list[Run]) -> float:
    return statistics.median(one.wall / other.wall for one, other in zip(first, second))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("env", nargs="?")
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    # A short path: a store's is limited.
    with tempfile.TemporaryDirectory(prefix="stager-bench-", dir="/var/tmp") as scratch:
        env = arguments.env
        if not env:
            env = os.path.join(scratch, "env")
            subprocess.run([sys.executable, "-m", "venv", env], check=True)
            subprocess.run([f"{env}/bin/pip", "install", "-q", *PACKAGES], check=True)
        files = sum(len(names) for _, _, names in os.walk(env))
        load = os.getloadavg()[0]
        print(f"{platform.machine()}, {os.cpu_count()} processors, load {load:.1f}; {files} files")
        print(f"{'':<34} {'min s':>8} {'median':>8} {'max':>8} {'cpu s':>8}")
        bench = Bench(env, scratch, arguments.runs)
        packs, plain = bench.pair(bench.pack, bench.mksquashfs)
        peer = [bench.venv_pack() for _ in range(max(1, arguments.runs - 2))]
        stages, copies = bench.pair(bench.stage, bench.copy)
        hits = [bench.hit() for _ in range(5)]
        bench.evict()
        row("stager pack", packs)
        row("mksquashfs alone, same options", plain)
        row("venv-pack2, tar.gz", peer)
        row("stager stage, cold", stages)
        row("cp of the image", copies)
        row("stager stage, again (a hit)", hits)
        packing = ratio(packs, plain)
        peers = statistics.median(r.wall for r in packs) / statistics.median(r.wall for r in peer)
        over = statistics.median(
            stage.wall - 1.25 * copy.wall for stage, copy in zip(stages, copies)
        )
        warm = statistics.median(run.cpu for run in hits)
        print(
            f"pack {packing:.2f} x mksquashfs, {peers:.2f} x venv-pack2;"
            f" stage 1.25 x cp {over:+.2f} s; hit {warm * 1000:.0f} ms of processor"
        )


if __name__ == "__main__":
    main()
