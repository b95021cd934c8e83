"""A few timed operations: what the shared file system and this node's disk do right now."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import statistics
import tempfile
import time
from collections.abc import Sequence

from stager import fsutil

_SAMPLES = 24
_BLOCK = 4 << 20
_LONGEST = 1.0
"""Seconds that one of these may take."""


def latency(directory: str, *, seed: int | None = None) -> tuple[float, int]:
    """Time how long the file system takes to answer one question.

    Names are looked for that are not there, all over the tree: what is there this node may know,
    and NFS tells of it with the directory's listing. Most questions of an import are such, too.

    Args:
        directory: a tree with many files.
        seed: makes the choice of the files repeatable.

    Returns:
        The median in seconds, and how many names it is of; 0 where there are no files.
    """
    choose = random.Random(seed)  # noqa: S311 - a sample, no secret
    seconds: list[float] = []
    until = time.monotonic() + _LONGEST
    for _ in range(10 * _SAMPLES):
        place = _somewhere(directory, choose)
        if place:
            missing = os.path.join(place, f".{choose.getrandbits(64):x}")
            started = time.perf_counter()
            with contextlib.suppress(OSError):
                os.lstat(missing)
            seconds.append(time.perf_counter() - started)
        if len(seconds) == _SAMPLES or time.monotonic() > until:
            break
    return (statistics.median(seconds), len(seconds)) if seconds else (0.0, 0)


def _somewhere(directory: str, choose: random.Random) -> str:
    """The directory of a file somewhere below; listings tell which are files."""
    while True:
        try:
            with os.scandir(directory) as found:
                entries = list(found)
        except OSError:
            return ""
        if not entries:
            return ""
        entry = choose.choice(entries)
        if not entry.is_dir(follow_symlinks=False):
            return directory
        directory = entry.path


def reading(paths: Sequence[str]) -> float:
    """Bytes a second of reading files, what this node has cached of them put aside.

    Raises:
        OSError: they cannot be read, or are no files.
    """
    done, taken = 0, 0.0
    for path in paths:
        with open(path, "rb", buffering=0, opener=fsutil.regular) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            started = time.perf_counter()
            while taken + time.perf_counter() - started < _LONGEST:
                got = len(file.read(_BLOCK))
                if not got:
                    break
                done += got
            taken += time.perf_counter() - started
    return done / taken if done else 0.0


def writing(directory: str) -> float:
    """Bytes a second of writing to a new file in a directory, which mostly go to memory.

    Nothing is synced, because staging does not sync an image's copy either: this is what it waits
    for, until so much is on its way to the disk that the kernel has it wait. Nor is it more than
    half of what is free: others may need the rest right now.

    Raises:
        OSError: nothing can be written there.
    """
    block = os.urandom(_BLOCK)
    with tempfile.TemporaryFile(dir=directory, prefix="timing.", buffering=0) as file:
        free = os.statvfs(file.fileno())
        most = min(16 * _BLOCK, free.f_bavail * free.f_frsize // 2)
        if not most:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), directory)
        started = time.perf_counter()
        done = 0
        while done < most and time.perf_counter() - started < _LONGEST:
            done += file.write(block[: most - done])
        return done / (time.perf_counter() - started)
