"""What the benchmarks share: runs in turn, their figures, and where those were taken."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Callable, NamedTuple


def clean_up_when_told_to_end() -> None:
    """Have SIGTERM, from a time limit say, raise: what was made for the benchmark goes with it."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


class Run(NamedTuple):
    """Wall and processor seconds of one run."""

    wall: float
    cpu: float


def measure(work: Callable[[], object]) -> Run:
    """Time something whose processes have ended when it returns."""
    before, started = _cpu(), time.monotonic()
    work()
    return Run(time.monotonic() - started, _cpu() - before)


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def command(argv: Sequence[str], environ: dict[str, str] | None = None) -> None:
    """Run a program whose output nobody reads; what it complained of is told if it fails."""
    done = subprocess.run(
        argv, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(argv)}: {done.stderr.decode(errors='replace')[-2000:]}")


def new_environment(path: str, packages: Iterable[str], base: str = "") -> str:
    """A virtual environment with these packages, of this Python's or a conda environment's."""
    if base:
        command([f"{base}/bin/python", "-m", "venv", "--without-pip", path])
        pip = [f"{base}/bin/pip", "--python", f"{path}/bin/python"]
    else:
        command([sys.executable, "-m", "venv", path])
        pip = [f"{path}/bin/pip"]
    command([*pip, "install", "-q", *packages])
    return path


def new_conda(path: str, packages: Iterable[str] = ()) -> str:
    """A conda environment from a channel that the tests make, with these packages by its pip."""
    from conda import channel  # the tests', which not every benchmark has in its path

    made = channel.build(channel.WORK / "channel")
    cache = Path(path).parent / "pkgs"
    channel.environment(Path(path), channel=made, cache=cache, pyc=True)
    if packages:
        command([f"{path}/bin/pip", "install", "-q", *packages])
    return path


def touch_memory(size: int) -> None:
    """Have that many bytes of free memory be at hand, or all but 2 GiB of what is free.

    The free memory of a virtual machine may go back to its host, and is slow when it is touched
    again: whoever writes first would pay for all who come after. A node's own memory stays.
    """
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") - (2 << 30)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    mmap.mmap(-1, max(mmap.PAGESIZE, min(size, free)), flags=flags).close()


def read_all(tree: Path) -> None:
    """Have all files of a tree in the page cache: this machine's disk stands for no server's."""
    argv = ["find", str(tree), "-type", "f", "-exec", "cat", "{}", "+"]
    subprocess.run(argv, stdout=subprocess.DEVNULL, check=True)


def forget(path: str) -> None:
    """Put a file, or all files of a tree, out of the page cache."""
    paths = [path]
    if os.path.isdir(path):
        paths = [os.path.join(top, name) for top, _, names in os.walk(path) for name in names]
    for one in paths:
        with contextlib.suppress(OSError):  # a link that leads nowhere
            fd = os.open(one, os.O_RDONLY)
            os.fdatasync(fd)  # a page that is not yet on the disk would stay
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def count(tree: str) -> tuple[int, int]:
    """Files of a tree, and bytes in them."""
    sizes = [
        os.lstat(os.path.join(top, name)).st_size
        for top, _, names in os.walk(tree)
        for name in names
    ]
    return len(sizes), sum(sizes)


def machine() -> dict[str, Any]:
    """Where the figures were taken."""
    model = platform.machine()
    with open("/proc/cpuinfo", encoding="utf-8") as text:
        for line in text:
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return {
        "processor": model,
        "processors": len(os.sched_getaffinity(0)),
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": platform.release(),
        "load": os.getloadavg()[0],
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def version(*argv: str) -> str:
    """The first line in which a program tells its version."""
    said = subprocess.run(argv, capture_output=True, text=True, check=False)
    return next((line for line in (said.stderr + said.stdout).splitlines() if line), "unknown")


def figures(runs: Sequence[Run]) -> dict[str, Any]:
    """What is kept of some runs: all of them, and their middle."""
    walls = [run.wall for run in runs]
    return {
        "n": len(runs),
        "min": min(walls),
        "median": statistics.median(walls),
        "max": max(walls),
        "cpu": statistics.median(run.cpu for run in runs),
        "walls": [round(wall, 4) for wall in walls],
    }


def ratio(above: Sequence[Run], below: Sequence[Run]) -> float:
    """How many times as long one took as the other, in the same round: the middle of all rounds."""
    return statistics.median(one.wall / other.wall for one, other in zip(above, below))


HEAD = f"{'':<46} {'min s':>8} {'median':>8} {'max':>8} {'cpu s':>8}"


def row(name: str, runs: Sequence[Run]) -> str:
    """A line below :data:`HEAD`."""
    of = figures(runs)
    return (
        f"{name:<46} {of['min']:8.3f} {of['median']:8.3f} {of['max']:8.3f} {of['cpu']:8.3f}"
        f"  n={of['n']}"
    )


def save(path: str | None, result: dict[str, Any]) -> None:
    """Write everything as JSON, if a file was named."""
    if path:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1, sort_keys=True)
            file.write("\n")
