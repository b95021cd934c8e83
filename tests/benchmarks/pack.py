"""Pack against the compressor alone, its memory, and what it makes of a slow file system.

    make bench-pack                      new environments: one with much in it, of a conda
                                         environment's Python (a base layer), one with little
    make bench-pack ENV=/path/to/venv    one of yours for the first part; it is only read

1. ``stager pack`` against ``mksquashfs`` with the same options, and against ``tar | zstd`` for
   tar.zst, in turn (A B A B ...), after one run of each that does not count: of the environment
   alone, and of what is in each layer that the pack makes, unpacked before, one after the other.
2. The most memory that all processes of a pack held at one moment: the sum of their PSS (what is
   theirs alone, and their part of what they share), sampled every 20 ms in runs of their own.
   The page cache is no part of it.
3. Where every metadata operation takes 5 ms (metafs, each time newly mounted): a pack against a
   loop that looks at every entry and reads every file, one after the other. As root.
4. venv-pack2, once, for it takes minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

TESTS = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(TESTS)

from benchmarks.measuring import (  # noqa: E402
    HEAD,
    Run,
    clean_up_when_told_to_end,
    command,
    machine,
    measure,
    new_conda,
    new_environment,
    ratio,
    row,
)  # fmt: skip

BIN = os.path.dirname(sys.executable)
LARGE = ["numpy", "scipy", "pandas", "matplotlib", "requests"]
SMALL = ["numpy", "requests"]
LATENCY = 0.005
SAMPLE = 0.02

SERIAL = """
import os, sys
for parent, directories, names in os.walk(sys.argv[1]):
    for name in (*directories, *names):
        path = os.path.join(parent, name)
        os.lstat(path)
        if name in names and not os.path.islink(path):
            with open(path, "rb") as file:
                file.read()
"""


class Bench:
    """What packs one environment, each time anew.

    Args:
        env: the environment; it is only read.
        scratch: a directory for what is made.
    """

    def __init__(self, env: str, scratch: str) -> None:
        self.env, self.scratch = env, scratch
        self.repository = os.path.join(scratch, "repository")
        self.environ = {
            **{key: value for key, value in os.environ.items() if not key.startswith("STAGER_")},
            "STAGER_STORE": os.path.join(scratch, "store"),
            "STAGER_REPOSITORY": self.repository,
        }

    def packing(self, image_format: str, env: str | None = None) -> list[str]:
        """The command; nothing is published when it is asked for."""
        shutil.rmtree(self.repository, ignore_errors=True)
        argv = [os.path.join(BIN, "stager"), "pack", env or self.env]
        return [*argv, "--name", "bench", "--format", image_format]

    def run(self, argv: list[str]) -> Run:
        return measure(lambda: command(argv, self.environ))

    def squashfs(self) -> Run:
        return self.run(self.packing("squashfs"))

    def tar_zst(self) -> Run:
        return self.run(self.packing("tar.zst"))

    def mksquashfs(self) -> Run:
        return self._compress(self._mksquashfs, [self.env])

    def mksquashfs_of_all_layers(self) -> Run:
        return self._compress(self._mksquashfs, self._trees())

    def tar(self) -> Run:
        return self._compress(self._tar, [self.env])

    def tar_of_all_layers(self) -> Run:
        return self._compress(self._tar, self._trees())

    def _compress(self, compressor: Callable[[str], list[str]], trees: list[str]) -> Run:
        return measure(lambda: [command(compressor(one), self.environ) for one in trees])

    def _mksquashfs(self, tree: str) -> list[str]:
        image = os.path.join(self.scratch, "plain.squashfs")
        options = "-noappend -quiet -no-progress -comp zstd -Xcompression-level 3 -b 128K"
        options += " -no-xattrs -all-root -no-exports"
        return ["mksquashfs", tree, image, *options.split()]

    def _tar(self, tree: str) -> list[str]:
        line = 'tar -C "$1" -c . | zstd -q -f -T0 -3 -o "$2"'
        output = os.path.join(self.scratch, "plain.tar.zst")
        return ["sh", "-c", line, "sh", tree, output]

    def unpack_layers(self) -> None:
        """Unpack what a pack has packed: of a base, it leaves out what no environment uses."""
        command(self.packing("squashfs"), self.environ)
        os.mkdir(os.path.join(self.scratch, "layers"))
        for image in Path(self.repository, "images").iterdir():
            tree = os.path.join(self.scratch, "layers", image.name)
            command(["unsquashfs", "-no-progress", "-no-xattrs", "-d", tree, str(image)])

    def _trees(self) -> list[str]:
        layers = os.path.join(self.scratch, "layers")
        return [os.path.join(layers, name) for name in sorted(os.listdir(layers))]

    def venv_pack(self) -> Run:
        output = os.path.join(self.scratch, "venv-pack.tar.gz")
        return self.run([os.path.join(BIN, "venv-pack"), "-q", "-f", "-p", self.env, "-o", output])

    def peak(self, argv: list[str]) -> int:
        """The most bytes that a program and its children held at one moment."""
        most = 0
        with subprocess.Popen(
            argv, env=self.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            while process.poll() is None:
                most = max(most, sum(map(pss, family(process.pid))))
                time.sleep(SAMPLE)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, argv)
        return most


def family(pid: int) -> Iterator[int]:
    yield pid
    with contextlib.suppress(OSError):  # it ended meanwhile
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in children.read_text().split():
                yield from family(int(child))


def pss(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def slowly(bench: Bench, env: str, argv: Callable[[str], list[str]]) -> tuple[Run, int]:
    """Run a program on a copy of an environment that is served slowly; and how much it asked."""
    from benchmarks.metafs import Metafs
    from benchmarks.settings import Settings

    backing, target = (os.path.join(bench.scratch, name) for name in ("backing", "slow"))
    if not os.path.exists(backing):
        subprocess.run(["cp", "-a", env, backing], check=True)
        os.mkdir(target)
    with Metafs(backing, target, {"here": None}, Settings("slow", latency=LATENCY)) as shared:
        start = shared.mark()
        run = bench.run(argv(target))
        return run, shared.ledger(start).requests()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("env", nargs="?", help="the environment of parts 1 and 2")
    parser.add_argument("--slow", metavar="ENV", help="the environment of part 3")
    parser.add_argument("--parts", default="1234", help="which parts; all without it")
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    clean_up_when_told_to_end()
    said = []
    # A short path: a store's is limited.
    with tempfile.TemporaryDirectory(prefix="stager-bench-", dir="/var/tmp") as scratch:
        env = arguments.env
        if not env and set(arguments.parts) & set("124"):
            base = new_conda(os.path.join(scratch, "conda"))
            env = new_environment(os.path.join(scratch, "env"), LARGE, base)
        bench = Bench(env or "", scratch)
        print(", ".join(f"{name} {value}" for name, value in machine().items()))
        print(HEAD)
        if "1" in arguments.parts:
            bench.unpack_layers()
            for ways in (
                (bench.squashfs, bench.mksquashfs, bench.mksquashfs_of_all_layers),
                (bench.tar_zst, bench.tar, bench.tar_of_all_layers),
            ):
                runs = [[way() for way in ways] for _ in range(arguments.runs + 1)][1:]
                names = (way.__name__.replace("_", " ") for way in ways)
                each = dict(zip(names, zip(*runs)))
                for name, those in each.items():
                    print(row(name, those))
                ours, *others = each
                for name in others:
                    said.append(f"{ours} {ratio(each[ours], each[name]):.2f} x {name}")
        if "4" in arguments.parts:
            print(row("venv-pack2", [bench.venv_pack()]))
        if "2" in arguments.parts:
            for image_format in ("squashfs", "tar.zst"):
                most = bench.peak(bench.packing(image_format)) / 1e6
                print(f"most memory, {image_format}: {most:.0f} MB")
                said.append(f"{most:.0f} MB")
        if "3" in arguments.parts:
            small = arguments.slow or new_environment(os.path.join(scratch, "small"), SMALL)
            packs, serial = [], []
            for _ in range(max(1, arguments.runs - 1)):
                for runs, argv in (
                    (packs, lambda target: bench.packing("squashfs", target)),
                    (serial, lambda target: [sys.executable, "-c", SERIAL, target]),
                ):
                    run, asked = slowly(bench, small, argv)
                    runs.append(run)
                    what = "stager pack" if runs is packs else "one by one"
                    print(f"{what}, {LATENCY * 1000:.0f} ms each: {run.wall:.1f} s, {asked} asked")
            said.append(f"{ratio(serial, packs):.1f} x faster")
            said[-1] += f" than one by one at {LATENCY * 1000:.0f} ms"
    print("pack: " + ", ".join(said))


if __name__ == "__main__":
    main()
