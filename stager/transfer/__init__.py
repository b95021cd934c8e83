"""How an image's bytes reach this node: copied from shared storage, verified on the way."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import threading
from queue import SimpleQueue
from typing import Callable

from stager import fsutil
from stager.errors import JOB, NODE, IntegrityError, NotFoundError
from stager.manifest import Image

_PIECE = 4 << 20
_IN_FLIGHT = 4


def copy(
    source: str, image: Image, target: str, *, advance: Callable[[int], None] | None = None
) -> None:
    """Copy an image, hashing while copying.

    Args:
        source: path on shared storage, or a FIFO-free local path.
        image: its expected size and digest.
        target: where the copy goes; it is removed again where it turns out wrong.
        advance: called with the bytes copied, every few megabytes.

    Raises:
        IntegrityError: the bytes are not those of the digest.
        NoSpaceError: the target's disk is full.
        NotFoundError: the image is gone.
    """
    try:
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
        reader = os.open(source, flags)
    except FileNotFoundError as error:
        raise NotFoundError(
            f"the image {source} is missing", hint="pack the environment again"
        ) from error
    except OSError as error:
        raise fsutil.explain(error, f"read the image {source}", blame=JOB) from error
    try:
        size = os.fstat(reader).st_size
        if size != image.size:
            raise IntegrityError(
                f"the image {source} has {size} bytes instead of {image.size}",
                hint="it is truncated or damaged; pack the environment again",
            )
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            writer = os.open(target, flags, 0o600)
        except OSError as error:
            raise fsutil.explain(error, f"write {target}", blame=NODE) from error
        try:
            found = _pump(reader, writer, source, target, advance)
        finally:
            os.close(writer)
        if found != image.digest:
            raise _damaged(source, found, image.digest)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(target)
        raise
    finally:
        os.close(reader)


def _pump(
    reader: int, writer: int, source: str, target: str, advance: Callable[[int], None] | None
) -> str:
    """Copy everything; hash in a second thread, so that the slower of the two sets the pace."""
    digest = hashlib.sha256()
    full: SimpleQueue[memoryview | None] = SimpleQueue()
    empty: SimpleQueue[bytearray] = SimpleQueue()
    for _ in range(_IN_FLIGHT):
        empty.put(bytearray(_PIECE))

    def hash_pieces() -> None:
        while True:
            piece = full.get()
            if piece is None:
                return
            digest.update(piece)
            whole = piece.obj
            piece.release()
            empty.put(whole)  # type: ignore[arg-type]

    hasher = threading.Thread(target=hash_pieces, daemon=True)
    hasher.start()
    try:
        while True:
            buffer = empty.get()
            try:
                count = os.readv(reader, [buffer])
            except OSError as error:
                raise fsutil.explain(error, f"read {source}", blame=JOB) from error
            if not count:
                break
            piece = memoryview(buffer)[:count]
            rest = piece
            while rest:
                try:
                    rest = rest[os.write(writer, rest) :]
                except OSError as error:
                    blame = None if error.errno in (errno.ENOSPC, errno.EDQUOT) else NODE
                    raise fsutil.explain(error, f"write {target}", blame=blame) from error
            if advance is not None:
                advance(count)
            full.put(piece)
    finally:
        full.put(None)
        hasher.join()
    return digest.hexdigest()


def verify(path: str, image: Image) -> bool:
    """Tell whether a file is the image, byte for byte."""
    try:
        if os.path.getsize(path) != image.size:
            return False
        return hash_file(path) == image.digest
    except OSError:
        return False


def hash_file(path: str) -> str:
    """The hex sha256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        buffer = bytearray(1 << 20)
        view = memoryview(buffer)
        while True:
            count = file.readinto(buffer)
            if not count:
                return digest.hexdigest()
            digest.update(view[:count])


def _damaged(source: str, found: str, expected: str) -> IntegrityError:
    return IntegrityError(
        f"the image {source} is damaged: its sha256 is {found[:12]}..., not {expected[:12]}...",
        hint="pack the environment again",
    )
