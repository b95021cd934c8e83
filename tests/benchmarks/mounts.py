"""Imports from a mounted image against a local directory, by program, format and options.

    make bench-mounts                      a new environment with numpy, scipy, pandas, matplotlib
    make bench-mounts ENV=/path/to/venv    one of yours; nothing is written into it
    make bench-mounts OPTIONS="--images --import 'import torch'" ENV=...

By default: the ways to mount an image that is packed as stager packs it. Every one of them is
mounted, then all import in turn, round after round, one process and then --many at once.

- warm: after an import that is not counted
- cold: mounted anew, the image out of the page cache (posix_fadvise); the mount is part of it. For
  the directory, its files are put out of the page cache, while the kernel still knows their names:
  that flatters the directory.

With --images: images of other block sizes, levels and compressors, mounted as stager does: time to
write, size, cold, warm.

Kernel mounts need root and are left out without. --squashfuse PROGRAM compares a further one.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any, Callable, NamedTuple, Optional

import measuring
from measuring import Run

from stager.formats import squashfs

PACKAGES = ["numpy", "scipy", "pandas", "matplotlib"]
IMPORT = "import numpy, scipy.stats, pandas, matplotlib.pyplot"
DIRECTORY = "directory"
DEFAULT = "squashfuse, as stager mounts"
KEPT = "squashfuse, all kept in the kernel"
FOREVER = 1 << 30
CACHED = (
    f"ro,nosuid,nodev,kernel_cache,entry_timeout={FOREVER},attr_timeout={FOREVER},"
    f"negative_timeout={FOREVER}"
)


class Way(NamedTuple):
    """An image and how it is mounted."""

    image: str
    mount: Callable[[str, str], None]


Ways = dict[str, Optional[Way]]


def by_program(*argv: str) -> Callable[[str, str], None]:
    return lambda image, point: measuring.command([*argv, image, point])


def by_kernel(kind: str) -> Callable[[str, str], None]:
    return by_program("mount", "-t", kind, "-o", "loop,ro,nosuid,nodev")


def unmount(point: str) -> None:
    deadline = time.monotonic() + 30
    while os.path.ismount(point):
        if time.monotonic() > deadline:  # nobody may remove what is below
            raise RuntimeError(f"{point} cannot be unmounted")
        done = subprocess.run(["umount", point], capture_output=True, check=False)
        if done.returncode and not squashfs.unmount(point):
            time.sleep(0.05)  # something that just ended still uses it


class Bench:
    """One tree in several forms."""

    def __init__(self, scratch: str, tree: str, statement: str) -> None:
        self.scratch, self.tree, self.statement = scratch, tree, statement
        self.point = os.path.join(scratch, "mounts")
        os.mkdir(self.point)
        self.built: dict[str, dict[str, Any]] = {}

    def squashfs(self, name: str, *options: str) -> str:
        """Write an image as :class:`stager.formats.squashfs.Writer` has it written."""
        path = os.path.join(self.scratch, f"{name}.squashfs")
        common = "-noappend -quiet -no-progress -no-xattrs -all-root -no-exports -mem 512M"
        return self.build(name, path, ["mksquashfs", self.tree, path, *common.split(), *options])

    def erofs(self, name: str, *options: str) -> str:
        path = os.path.join(self.scratch, f"{name}.erofs")
        argv = ["mkfs.erofs", "-x-1", "--all-root", *options, path, self.tree]
        return self.build(name, path, argv)

    def build(self, name: str, path: str, argv: list[str]) -> str:
        run = measuring.measure(lambda: measuring.command(argv))
        size = os.path.getsize(path)
        self.built[name] = {"size": size, "wall": run.wall, "cpu": run.cpu}
        print(f"{name:<46} {run.wall:8.1f} s {run.cpu:8.1f} s of processor {size / 1e6:8.1f} MB")
        return path

    def start(self, root: str) -> subprocess.Popen[bytes]:
        # -I: neither the user's packages nor the directory this runs in belong to the measure.
        argv = [os.path.join(root, "bin", "python"), "-I", "-c", self.statement]
        return subprocess.Popen(argv, stdout=subprocess.DEVNULL)

    def run(self, root: str, processes: int) -> None:
        started = [self.start(root) for _ in range(processes)]
        if any([process.wait() for process in started]):  # noqa: C419 - wait for all
            sys.exit(f"`{self.statement}` failed in {root}")

    def mounted(self, name: str, way: Way | None) -> str:
        if way is None:
            return self.tree
        point = os.path.join(self.point, name.replace("/", "-").replace(" ", "-"))
        os.makedirs(point, exist_ok=True)
        way.mount(way.image, point)
        return point

    def warm(self, ways: Ways, processes: int, rounds: int) -> dict[str, list[Run]]:
        runs: dict[str, list[Run]] = {name: [] for name in ways}
        roots: dict[str, str] = {}
        try:
            for name, way in ways.items():
                roots[name] = self.mounted(name, way)
                self.run(roots[name], processes)
            for number in range(rounds):
                # Backwards every other time: a speed that drifts drifts for all.
                for name in list(ways)[:: -1 if number % 2 else 1]:
                    runs[name].append(measuring.measure(lambda: self.run(roots[name], processes)))  # noqa: B023
        finally:
            self.unmount_all()
        return runs

    def cold(self, ways: Ways, rounds: int) -> dict[str, list[Run]]:
        runs: dict[str, list[Run]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, way in ways.items():
                measuring.forget(way.image if way else self.tree)
                try:
                    runs[name].append(
                        measuring.measure(lambda: self.run(self.mounted(name, way), 1))  # noqa: B023
                    )
                finally:
                    self.unmount_all()
        return runs

    def unmount_all(self) -> None:
        for name in os.listdir(self.point):
            unmount(os.path.join(self.point, name))


def extracted(scratch: str, env: str) -> str:
    """The tree that stager makes of an environment on a node, as a directory."""
    environ = {
        **os.environ,
        "STAGER_STORE": os.path.join(scratch, "s"),
        "STAGER_REPOSITORY": os.path.join(scratch, "repository"),
    }
    stager = os.path.join(os.path.dirname(sys.executable), "stager")
    measuring.command([stager, "pack", env, "--name", "bench"], environ)
    done = subprocess.run(
        [stager, "stage", "--how", "extract", "bench"],
        env=environ, check=True, capture_output=True, text=True,
    )  # fmt: skip
    shutil.rmtree(os.path.join(scratch, "repository"))
    return done.stdout.strip()


ZSTD = ("-comp", "zstd", "-Xcompression-level")
ZSTD3 = (*ZSTD, "3", "-b", "128K")
IMAGES = {
    "zstd 3, 128K": ZSTD3,
    "zstd 3, 128K, plain metadata": (*ZSTD3, "-noI"),
    **{f"zstd 3, {size}": (*ZSTD, "3", "-b", size) for size in ("64K", "256K", "1M")},
    **{
        f"zstd {level}, 128K": (*ZSTD, level, "-b", "128K") for level in ("1", "6", "9", "15", "19")
    },
    "lz4, 128K": ("-comp", "lz4", "-b", "128K"),
    "lz4hc, 128K": ("-comp", "lz4", "-Xhc", "-b", "128K"),
    "not compressed, 128K": ("-noI", "-noD", "-noF", "-b", "128K"),
}
EROFS = {"kernel EROFS, lz4hc": ("-zlz4hc,9", "-C65536"), "kernel EROFS, plain": ()}


def programs(bench: Bench, wanted: Callable[[str], bool], further: list[str]) -> Ways:
    """The ways to mount one image, and EROFS images of the same tree."""
    image = bench.squashfs("zstd 3, 128K", *ZSTD3)
    plain = "ro,nosuid,nodev"
    ways: Ways = {DIRECTORY: None, DEFAULT: Way(image, squashfs.mount)}
    for program in ("squashfuse_ll", *further):
        if shutil.which(program):
            name = os.path.basename(program)
            if program in further:
                name = measuring.version(program).partition(" (")[0]
                ways[name] = Way(image, by_program(program, "-o", plain))
            ways[f"{name} -s"] = Way(image, by_program(program, "-s", "-o", plain))
    if shutil.which("squashfuse"):
        ways["squashfuse"] = Way(image, by_program("squashfuse", "-o", plain))
        ways[KEPT] = Way(image, by_program("squashfuse", "-o", CACHED))
    if os.geteuid() == 0:
        ways["kernel squashfs"] = Way(image, by_kernel("squashfs"))
        for name, options in EROFS.items():
            if wanted(name) and shutil.which("mkfs.erofs"):
                ways[name] = Way(bench.erofs(name, *options), by_kernel("erofs"))
    return {name: way for name, way in ways.items() if wanted(name)}


def images(bench: Bench, wanted: Callable[[str], bool]) -> Ways:
    """Other images, all mounted as stager does."""
    ways: Ways = {DIRECTORY: None}
    for name, options in IMAGES.items():
        if wanted(name):
            ways[name] = Way(bench.squashfs(name, *options), squashfs.mount)
    return ways


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("env", nargs="?")
    parser.add_argument("--import", dest="statement", default=IMPORT, metavar="STATEMENT")
    parser.add_argument("--images", action="store_true", help="compare images, not programs")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--cold-runs", type=int, default=3)
    parser.add_argument("--many", type=int, default=32, help="processes at once; 0: leave it out")
    parser.add_argument("--many-runs", type=int, default=3)
    parser.add_argument("--only", metavar="TEXT[;TEXT]", help="ways whose names contain one")
    parser.add_argument("--squashfuse", action="append", default=[], metavar="PROGRAM")
    parser.add_argument("--json", metavar="FILE")
    measuring.clean_up_when_told_to_end()
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="stager-bench-", dir="/var/tmp") as scratch:
        env = arguments.env or measuring.new_environment(os.path.join(scratch, "env"), PACKAGES)
        bench = Bench(scratch, extracted(scratch, env), arguments.statement)
        files, size = measuring.count(bench.tree)
        where = measuring.machine()
        print(f"{where['processor']}, {where['processors']} processors, load {where['load']:.1f};")
        print(f"{files} files, {size / 1e6:.0f} MB; python -I -c {shlex.quote(bench.statement)}\n")
        names = arguments.only.split(";") if arguments.only else []

        def wanted(name: str) -> bool:
            return name == DIRECTORY or not names or any(one in name for one in names)

        if arguments.images:
            ways = images(bench, wanted)
        else:
            ways = programs(bench, wanted, arguments.squashfuse)
        kinds = {
            "cold": lambda: bench.cold(ways, arguments.cold_runs),
            "warm": lambda: bench.warm(ways, 1, arguments.runs),
            f"warm, {arguments.many} processes": lambda: bench.warm(
                ways, arguments.many, arguments.many_runs
            ),
        }
        left_out = {"cold": not arguments.cold_runs, "warm": not arguments.runs}
        kinds = {
            kind: work for kind, work in kinds.items() if not left_out.get(kind, not arguments.many)
        }
        result: dict[str, Any] = {
            "machine": where,
            "environment": {"files": files, "bytes": size},
            "statement": bench.statement,
            "images": bench.built,
            "runs": {},
        }
        last = []
        for kind, work in kinds.items():
            runs = work()
            print(f"\n{kind}\n{measuring.HEAD}   of the directory's")
            result["runs"][kind] = {}
            for name, taken in runs.items():
                times = measuring.ratio(taken, runs[DIRECTORY])
                print(f"{measuring.row(name, taken)}  {times:5.2f} x")
                result["runs"][kind][name] = {**measuring.figures(taken), "times_directory": times}
            ours = DEFAULT if DEFAULT in runs else "zstd 3, 128K"
            if ours in runs:
                middle = statistics.median(run.wall for run in runs[ours])
                times = measuring.ratio(runs[ours], runs[DIRECTORY])
                last.append(f"{kind} {middle:.2f} s, {times:.2f} x the directory")
        measuring.save(arguments.json, result)
        print(f"\nmounts: {'; '.join(last)}")


if __name__ == "__main__":
    main()
