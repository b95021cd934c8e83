"""Reading the files of a walked tree: each once, and as it was when the tree was walked."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from stager.errors import DeniedError, IntegrityError
from stager.fsutil import explain
from stager.walk import Entry

_PIECE = 256 << 10


def _open(entry: Entry) -> int:
    """Open an entry's file; one that changed since the walk is an error."""
    try:
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        return os.open(entry.source, flags)
    except PermissionError as error:
        raise DeniedError(
            f"cannot read {entry.source}: {error.strerror}",
            hint="make it readable (chmod u+r), or leave it out with --exclude",
        ) from error
    except FileNotFoundError as error:
        raise _changed(entry) from error
    except OSError as error:
        raise explain(error, f"read {entry.source}") from error


@contextlib.contextmanager
def opened(entry: Entry) -> Iterator[int]:
    """Open a file that is to be read in pieces; raises what :func:`read` raises."""
    fd = _open(entry)
    try:
        _check(entry, os.fstat(fd))
        yield fd
    finally:
        os.close(fd)


def read(entry: Entry) -> bytes:
    """Read a file whole, making sure that it is what was found when the tree was walked.

    Raises:
        IntegrityError: it changed.
        DeniedError: it cannot be read.
    """
    fd = _open(entry)
    try:
        data = os.read(fd, entry.size + 1)
        if len(data) != entry.size:
            data += _read_all(fd)
        _check(entry, os.fstat(fd))
    finally:
        os.close(fd)
    if len(data) != entry.size:
        raise _changed(entry)
    return data


def pieces(entry: Entry) -> Iterator[memoryview]:
    """Read a large file piece by piece, into the same buffer."""
    # One buffer that stays in the processor's cache, instead of fresh memory for each piece.
    buffer = bytearray(min(_PIECE, entry.size))
    with opened(entry) as fd:
        remaining = entry.size
        while remaining:
            count = os.readv(fd, [memoryview(buffer)[: min(len(buffer), remaining)]])
            if not count:
                raise _changed(entry)
            remaining -= count
            yield memoryview(buffer)[:count]
        _check(entry, os.fstat(fd))


def _read_all(fd: int) -> bytes:
    found: list[bytes] = []
    while True:
        piece = os.read(fd, 1 << 24)
        if not piece:
            return b"".join(found)
        found.append(piece)


def _check(entry: Entry, info: os.stat_result) -> None:
    if (info.st_size, info.st_mtime_ns, info.st_ino) != (entry.size, entry.mtime_ns, entry.inode):
        raise _changed(entry)


def _changed(entry: Entry) -> IntegrityError:
    return IntegrityError(
        f"{entry.source} changed while it was being packed",
        hint="something is still installing into it; pack again when it has finished",
    )
