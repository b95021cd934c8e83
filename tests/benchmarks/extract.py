"""How fast an image becomes a tree: stager's extraction against the plain tools and the peers'.

    make bench-extract                      a new environment with numpy, scipy, pandas, matplotlib
    make bench-extract ENV=/path/to/env     one of yours; nothing is written into it
    make bench-extract OPTIONS=--conda      a new conda environment with the same; as root

In each directory of --at (the disk's, and memory's), in turn, round after round:

- `stager stage --how extract` of a tar.zst image, whole: the program's start, finding the
  environment, the checksum of the image, trying the Python in the tree
- the same on one processor (taskset)
- `zstd -dc IMAGE | tar -x`: the same bytes
- `stager stage --how extract` of a squashfs image (unsquashfs), and `unsquashfs` alone
- what venv-pack2 writes (tar.gz), by `tar -xzf` and a first activation, which is all its manual
  asks for; for a conda environment what conda-pack writes, by `tar -xzf` and its conda-unpack

Each run makes a new tree. In memory it is removed at once. On a disk none is removed before the
last round: ext4 does not use the inodes of files that were removed in the last minutes, and looks
at each of them for every file that it creates, which made extraction five times slower here.
"""

from __future__ import annotations

import argparse
import glob
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Callable

TESTS = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(TESTS)

from benchmarks import measuring  # noqa: E402
from benchmarks.measuring import Run  # noqa: E402

PACKAGES = ["numpy", "scipy", "pandas", "matplotlib"]
ARCHIVE = "stager, tar.zst"
ONE = "stager, tar.zst, one processor"
SQUASHFS = "stager, squashfs"
PIPE = "zstd -dc | tar -x"
UNSQUASHFS = "unsquashfs"
PEERS = {
    "venv-pack": 'tar -xzf "$1" -C "$2" && . "$2/bin/activate"',
    "conda-pack": 'tar -xzf "$1" -C "$2" && "$2/bin/python" "$2/bin/conda-unpack"',
}
"""Programs that pack, and what their manuals say of unpacking."""


def file_system(directory: str) -> str:
    said = subprocess.run(
        ["df", "--output=fstype", directory], capture_output=True, text=True, check=True
    )
    return said.stdout.split()[-1]


def room(directory: str, size: int, trees: int) -> str:
    """Why there is no room for what will be made; empty where there is."""
    free = shutil.disk_usage(directory).free
    if file_system(directory) == "tmpfs":
        trees = 1  # each is removed at once
        with open("/proc/meminfo", encoding="utf-8") as text:
            known = dict(line.split(":") for line in text)
        # A full tmpfs is no error but the end of somebody's process: half of the memory stays free.
        free = min(free, int(known["MemAvailable"].split()[0]) * 1024 // 2)
    need = size * (trees + 1)  # the images as well
    if need > free:
        return f"{need / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB may be used: fewer --runs?"
    return ""


class Place:
    """Extraction into directories below one."""

    def __init__(self, scratch: str, env: str, peer: str, archive: str | None) -> None:
        self.scratch, self.peer, self.peers = scratch, peer, archive
        self.bin = os.path.dirname(sys.executable)
        self.tree = os.path.join(scratch, "t")
        self.store = os.path.join(scratch, "s")
        self.environ = {
            **os.environ,
            "STAGER_STORE": self.store,
            "STAGER_REPOSITORY": os.path.join(scratch, "repository"),
        }
        images = os.path.join(scratch, "repository", "images")
        for name in ("tar.zst", "squashfs"):
            # Packed for this store: another one has its trees rewritten, which is another work.
            measuring.command(
                [*self.stager("pack"), env, "--name", name.replace(".", "-"), "--format", name],
                self.environ,
            )
        self.archive = max(glob.glob(f"{images}/*.tar.zst"), key=os.path.getsize)
        self.squashfs = max(glob.glob(f"{images}/*.squashfs"), key=os.path.getsize)
        self.kept = 0
        self.kind = file_system(scratch)

    def stager(self, verb: str) -> list[str]:
        return [os.path.join(self.bin, "stager"), verb]

    def works(self) -> dict[str, Callable[[], None]]:
        works = {
            ARCHIVE: lambda: self.stage("tar-zst"),
            PIPE: lambda: self.shell(
                'zstd -dc "$1" | tar -x -p --delay-directory-restore -C "$2"', self.archive
            ),
            ONE: lambda: self.stage("tar-zst", "taskset", "-c", self.processor()),
            SQUASHFS: lambda: self.stage("squashfs"),
            UNSQUASHFS: lambda: self.shell(
                'unsquashfs -quiet -no-progress -no-xattrs -f -d "$2" "$1"', self.squashfs
            ),
        }
        if self.peers:
            archive = self.peers
            works[self.peer] = lambda: self.shell(PEERS[self.peer], archive)
        return works

    @staticmethod
    def processor() -> str:
        return str(min(os.sched_getaffinity(0)))

    def stage(self, ref: str, *prefix: str) -> None:
        argv = [*prefix, *self.stager("stage"), "--how", "extract", ref]
        measuring.command(argv, self.environ)

    def shell(self, script: str, image: str) -> None:
        os.mkdir(self.tree)
        measuring.command(["sh", "-c", script, "sh", image, self.tree])

    def run(self, work: Callable[[], None]) -> Run:
        for image in (self.archive, self.squashfs, *([self.peers] if self.peers else [])):
            measuring.command(["cat", image])
        measuring.command(["sync", "-f", self.scratch])
        run = measuring.measure(work)
        for made in (self.tree, self.store):
            if os.path.exists(made):
                self.kept += 1
                aside = os.path.join(self.scratch, f"kept{self.kept}")
                os.rename(made, aside)
                if self.kind == "tmpfs":
                    shutil.rmtree(aside)
        return run


def at(
    directory: str, env: str, peer: str, archive: str | None, rounds: int
) -> tuple[str, dict[str, list[Run]]]:
    """All ways, in turn, in one directory."""
    # A short path: a store's is limited.
    scratch = tempfile.mkdtemp(prefix="stager-bench-", dir=directory)
    try:
        place = Place(scratch, env, peer, archive)
        runs: dict[str, list[Run]] = {name: [] for name in place.works()}
        for _ in range(rounds):
            for name, work in place.works().items():
                runs[name].append(place.run(work))
        return place.kind, runs
    finally:
        shutil.rmtree(scratch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("env", nargs="?")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--at", action="append", metavar="DIR")
    parser.add_argument("--conda", action="store_true", help="make a conda environment")
    parser.add_argument("--peer", metavar="FILE", help="a tar.gz that the peer made of ENV")
    parser.add_argument("--no-peer", action="store_true", help="packing for it takes minutes")
    parser.add_argument("--json", metavar="FILE")
    measuring.clean_up_when_told_to_end()
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="stager-bench-", dir="/var/tmp") as scratch:
        env = arguments.env
        if not env:
            make = measuring.new_conda if arguments.conda else measuring.new_environment
            env = make(os.path.join(scratch, "env"), PACKAGES)
        peer = "conda-pack" if os.path.isdir(os.path.join(env, "conda-meta")) else "venv-pack"
        archive = arguments.peer
        if not archive and not arguments.no_peer:
            archive = os.path.join(scratch, "peer.tar.gz")
            pack = os.path.join(os.path.dirname(sys.executable), peer)
            measuring.command([pack, "-q", "-f", "-p", env, "-o", archive])
        files, size = measuring.count(env)
        result: dict[str, Any] = {
            "machine": measuring.machine(),
            "environment": {"files": files, "bytes": size},
            "versions": {
                "zstd": measuring.version("zstd", "--version"),
                "tar": measuring.version("tar", "--version"),
                "unsquashfs": measuring.version("unsquashfs", "-version"),
            },
            "places": {},
        }
        where = result["machine"]
        print(f"{where['processor']}, {where['processors']} processors, load {where['load']:.1f};")
        print(f"{files} files, {size / 1e6:.0f} MB")
        last = []
        for directory in arguments.at or ["/var/tmp", "/dev/shm"]:
            problem = room(directory, size, 6 * arguments.runs)
            if problem:
                print(f"\n{directory}: left out: {problem}")
                continue
            kind, runs = at(directory, env, peer, archive, arguments.runs)
            print(f"\n{directory} ({kind})\n{measuring.HEAD}")
            for name, taken in runs.items():
                print(measuring.row(name, taken))
            ours = runs[ARCHIVE]
            ratios = {
                name: measuring.ratio(taken, ours)
                for name, taken in runs.items()
                if name != ARCHIVE
            }
            result["places"][directory] = {
                "file_system": kind,
                "runs": {name: measuring.figures(taken) for name, taken in runs.items()},
                "times_as_long_as_ours": ratios,
            }
            said = f"{kind}: {statistics.median(run.wall for run in ours):.2f} s,"
            said += f" zstd|tar {ratios[PIPE]:.2f} x"
            if archive:
                said += f", {peer} {ratios[peer]:.2f} x"
            said += f", one processor {ratios[ONE]:.2f} x, unsquashfs {ratios[UNSQUASHFS]:.2f} x"
            last.append(said)
        measuring.save(arguments.json, result)
        print(f"\nextract: {'; '.join(last)}")


if __name__ == "__main__":
    main()
