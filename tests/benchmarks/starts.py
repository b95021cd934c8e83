"""What a start costs, and how fast an image is staged: ratios of one run, never seconds alone.

    make bench-starts                 starts, and images of 512 MiB, squashfs and tar.zst
    make bench-starts MIB=1024        larger ones

*Starts*: CPU of one process, what it waits for left out: a Python that does nothing, an empty
script of this .venv, and stager. Each round runs all of them in turn: a machine whose speed drifts
drifts for all.

*Staging*: bytes of the image a second, in turn with what this machine can do right then: reading
the image (dropped from the page cache before each), writing as much, and ``cp`` and ``dd`` for both
together. Data that do not compress, for the bytes to be many and the decompressor's work small;
half of them do for tar.zst, where the decompressor alone (``zstd -dc``) is run too, and what is
written is the tree, twice the image: its rate, too, is told in bytes of the image.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measuring import (
    Run,
    clean_up_when_told_to_end,
    command,
    forget,
    machine,
    measure,
)

BIN = os.path.dirname(sys.executable)
STAGER = os.path.join(BIN, "stager")
FLOOR, HIT = "an empty script", "stager stage NAME, a hit"


class Bench:
    def __init__(self, scratch: Path, mib: int) -> None:
        self.scratch, self.mib = scratch, mib
        self.environ = {
            **{key: value for key, value in os.environ.items() if not key.startswith("STAGER_")},
            "STAGER_STORE": str(scratch / "store"),
            "STAGER_REPOSITORY": str(scratch / "repository"),
        }

    def stager(self, *words: str) -> None:
        command([STAGER, *words], self.environ)

    def run(self, argv: list[str]) -> Run:
        return measure(lambda: command(argv, self.environ))

    def pack(self, format: str, *, compressible: bool) -> Path:
        import tiny

        prefix = self.scratch / format
        tiny.environment(prefix)
        for number in range(self.mib >> 4):
            block = os.urandom((8 if compressible else 16) << 20)
            pad = b"0123456789abcdef" * (8 << 16) if compressible else b""
            (prefix / tiny.SITE / f"data{number}").write_bytes(block + pad)
        self.stager("pack", str(prefix), "--name", format, "--format", format)
        shutil.rmtree(prefix / tiny.SITE)  # as the other nodes have it: not in the page cache
        images = (self.scratch / "repository" / "images").iterdir()
        return max((one for one in images if one.name.endswith(format)), key=os.path.getsize)

    def evict(self) -> None:
        self.stager("release")
        self.stager("collect", "--all")

    # -- starts ------------------------------------------------------------------------------

    def starts(self, runs: int) -> None:
        script = self.scratch / "nothing"
        script.write_text(f"#!{sys.executable}\nimport sys\n")
        script.chmod(0o755)
        commands = {
            "python -I -S -c pass": [sys.executable, "-I", "-S", "-c", "pass"],
            FLOOR: [str(script)],
            HIT: [STAGER, "stage", "small"],
            "stager stage NAME --how auto": [STAGER, "stage", "small", "--how", "auto"],
            "stager --help": [STAGER, "--help"],
            "stager list": [STAGER, "list"],
        }
        import tiny

        tiny.environment(self.scratch / "small")
        self.stager("pack", str(self.scratch / "small"), "--name", "small")
        self.stager("stage", "small")
        found: dict[str, list[Run]] = {name: [] for name in commands}
        for turn in range(runs + 1):
            for name, argv in commands.items():
                run = self.run(argv)
                if turn:
                    found[name].append(run)
        print(f"\n{'CPU of a start, ms':<34} {'min':>8} {'median':>8} {'max':>8}   wall")
        for name, each in found.items():
            cpu = [1000 * one.cpu for one in each]
            wall = 1000 * statistics.median(one.wall for one in each)
            print(f"{name:<34} {summary(cpu)} {wall:6.1f}  n={len(cpu)}")
        above = [1000 * (hit.cpu - empty.cpu) for hit, empty in zip(found[HIT], found[FLOOR])]
        print(f"{'a hit above an empty script':<34} {summary(above)}")
        for name in (FLOOR, HIT):
            print(f"{'system calls: ' + name:<34} {self.calls(commands[name]):8d}")

    def calls(self, argv: list[str]) -> int:
        trace = self.scratch / "trace"
        command(["strace", "-f", "-qqq", "-o", str(trace), *argv], self.environ)
        return len(trace.read_text().splitlines())

    # -- staging -----------------------------------------------------------------------------

    def staging(self, format: str, runs: int) -> None:
        image = self.pack(format, compressible=format == "tar.zst")
        size, copy = image.stat().st_size, self.scratch / "copy"
        written = self.mib << 20 if format == "tar.zst" else size

        def told(*argv: object) -> Callable[[], float]:
            return lambda: self.run(list(map(str, argv))).wall

        stage = [STAGER, "stage", format]
        steps: dict[str, Callable[[], float]] = {
            "read": told("dd", f"if={image}", "of=/dev/null", "bs=4M", "status=none"),
            "write": told("dd", "if=/dev/zero", f"of={copy}", "bs=4M", f"count={written >> 22}"),
            "cp": told("cp", "--reflink=never", image, copy),
            "dd": told("dd", f"if={image}", f"of={copy}", "bs=4M", "status=none"),
            "its copy, checked": lambda: self.copy(image, format, copy),
            "stager stage, all of it": told(*stage),
        }
        if format == "tar.zst":
            steps["zstd -dc"] = told("sh", "-c", 'exec zstd -dc "$0" >/dev/null', image)
            del steps["its copy, checked"]  # it is extracted while it is read
        found: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(runs + 1):
            for name, step in steps.items():
                self.evict()
                copy.unlink(missing_ok=True)
                os.sync()
                forget(str(image))
                wall = step()
                if turn:
                    found[name].append(size / wall / 1e6)
        print(f"\n{f'{format}, {size >> 20} MiB: MB/s':<34} {'min':>8} {'median':>8} {'max':>8}")
        for name, rates in found.items():
            print(f"{name:<34} {summary(rates)}  n={len(rates)}")
        bounds = [name for name in ("read", "write", "zstd -dc") if name in found]
        for name in ("its copy, checked", "stager stage, all of it"):
            if name in found:
                ratios = [
                    found[name][turn] / min(found[bound][turn] for bound in bounds)
                    for turn in range(runs)
                ]
                print(f"{name + ' / min(' + ', '.join(bounds) + ')':<62} {summary(ratios, 2)}")

    def copy(self, image: Path, format: str, target: Path) -> float:
        """The part of staging that moves bytes, in a process of its own; the start left out."""
        code = (
            "import sys, time; from stager import fsutil, transfer;"
            "from stager.manifest import Image;"
            "source, target, format, crc = sys.argv[1:]; import os;"
            "image = Image(format, os.path.getsize(source), int(crc, 16));"
            "started = time.monotonic(); transfer.copy(source, image, target);"
            "print(time.monotonic() - started);"
            "fsutil.settle()"  # a Python that ends beside a thread may crash; stager's own does not
        )
        crc = image.name.partition("-")[2].partition(".")[0]
        argv = [sys.executable, "-c", code, str(image), str(target), format, crc]
        done = subprocess.run(argv, env=self.environ, check=True, capture_output=True, text=True)
        return float(done.stdout)


def summary(values: Sequence[float], digits: int = 1) -> str:
    each = (min(values), statistics.median(values), max(values))
    return " ".join(f"{one:8.{digits}f}" for one in each)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--starts", type=int, default=20)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    # A short path: a store's is limited.
    scratch = Path(tempfile.mkdtemp(prefix="stager-bench-", dir="/var/tmp"))
    clean_up_when_told_to_end()
    bench = Bench(scratch, arguments.mib)
    try:
        bench.starts(arguments.starts)
        for format in ("squashfs", "tar.zst"):
            bench.staging(format, arguments.runs)
    finally:
        bench.evict()
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
