"""How an image's bytes reach this node: copied from shared storage, verified on the way."""

from __future__ import annotations

import contextlib
import os
import threading
from queue import SimpleQueue
from typing import Callable

from stager import fsutil
from stager.checksum import crc32
from stager.errors import JOB, LIMITS, NODE, IntegrityError, NotFoundError, StagerError
from stager.manifest import Image

_PIECE = 1 << 20
_AHEAD = 4
"""Pieces that are read while one is written."""
_PATIENCE = 1.0
"""Seconds to wait for a read whose bytes nobody wants any more: shared storage may hang."""


def copy(
    source: str, image: Image, target: str, *, advance: Callable[[int], None] | None = None
) -> None:
    """Copy an image, summing up while copying.

    Args:
        source: path on shared storage, or a FIFO-free local path.
        image: its expected size and checksum.
        target: where the copy goes; it is removed again where it turns out wrong.
        advance: called with the bytes copied, every few megabytes.

    Raises:
        IntegrityError: the bytes are not the image's.
        NoSpaceError: the target's disk is full.
        NotFoundError: the image is gone.
        StagerError: it cannot be read or written, or no thread may be started.
    """
    reader = open_image(source)
    try:
        require_size(source, os.fstat(reader).st_size, image)
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            writer = os.open(target, flags, 0o600)
        except OSError as error:
            raise fsutil.explain(error, f"write {target}", blame=NODE) from error
        try:
            found = _pump(reader, writer, source, target, image.size, advance)
        finally:
            os.close(writer)
        if found != image.crc32:
            raise _damaged(source, found, image.crc32)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(target)
        raise
    finally:
        fsutil.close_aside(reader)


def open_image(path: str) -> int:
    """Open an image to read it; a named pipe in its place does not make us wait for its writer.

    Raises:
        NotFoundError: the image is gone.
        StagerError: it cannot be opened.
    """
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise NotFoundError(
            f"the image {path} is missing", hint="pack the environment again"
        ) from error
    except OSError as error:
        raise fsutil.explain(error, f"read the image {path}", blame=JOB) from error


def require_size(source: str, size: int, image: Image) -> None:
    """Refuse a file that cannot be the image.

    Args:
        source: its path.
        size: the bytes it has.
        image: what it should be.

    Raises:
        IntegrityError: it has another size.
    """
    if size != image.size:
        raise IntegrityError(
            f"the image {source} has {size} bytes instead of {image.size}",
            hint="it is truncated or damaged; pack the environment again",
        )


def _pump(
    reader: int,
    writer: int,
    source: str,
    target: str,
    size: int,
    advance: Callable[[int], None] | None,
) -> int:
    """Copy everything, read ahead by a second thread; returns the sum over what was written.

    In pieces of 1 MiB, as a Lustre client asks for them, and that stay in a processor's cache.
    """
    free: SimpleQueue[bytearray | None] = SimpleQueue()
    filled: SimpleQueue[tuple[bytearray, int] | BaseException] = SimpleQueue()
    for _ in range(_AHEAD):
        free.put(bytearray(_PIECE))
    over = False

    def read() -> None:
        while (buffer := free.get()) is not None and not over:
            try:
                count = os.readv(reader, [buffer])
            except BaseException as error:  # whatever it is: the copy waits for a word of us
                filled.put(error)
                return
            filled.put((buffer, count))
            if not count:
                return

    reading = threading.Thread(target=read, daemon=True)
    try:
        reading.start()
    except RuntimeError as error:
        raise StagerError(
            f"cannot copy {source}: {error}",
            hint=LIMITS,
            blame=JOB,
        ) from error
    total, left = 0, size
    try:
        while True:
            found = filled.get()
            if isinstance(found, OSError):
                raise fsutil.explain(found, f"read the image {source}", blame=JOB) from found
            if isinstance(found, BaseException):
                raise found
            buffer, count = found
            if not count:
                return total
            left -= count
            if left < 0:  # before it fills the disk
                raise IntegrityError(
                    f"the image {source} has more than its {size} bytes",
                    hint="it was written to while it was read; pack the environment again",
                )
            piece = memoryview(buffer)[:count]
            total = crc32(piece, total)
            _write(writer, piece, target)
            free.put(buffer)
            if advance is not None:
                advance(count)
    finally:
        over = True  # the file is closed after this: nothing more may be read from its number
        free.put(None)
        reading.join(_PATIENCE)


def _write(writer: int, piece: memoryview, target: str) -> None:
    while piece:
        try:
            piece = piece[os.write(writer, piece) :]
        except OSError as error:
            raise fsutil.explain(error, f"write {target}", blame=NODE) from error


def identify(path: str, image_format: str) -> Image:
    """Read a new image once and tell what it is; meanwhile it goes to disk.

    Args:
        path: the file.
        image_format: ``squashfs`` or ``tar.zst``.

    Raises:
        OSError: it could not be written to disk.
    """
    from concurrent.futures import ThreadPoolExecutor  # nodes do without

    with ThreadPoolExecutor(1) as pool:
        synced = pool.submit(fsutil.sync, path)
        size, total = _summed(path)
        synced.result()
    return Image(image_format, size, total)


def is_image(path: str, image: Image) -> bool:
    """Tell whether a file has the bytes of an image."""
    try:
        return os.path.getsize(path) == image.size and _summed(path) == (image.size, image.crc32)
    except OSError:
        return False


def _summed(path: str) -> tuple[int, int]:
    """The size and the checksum of a file."""
    size = total = 0
    buffer = bytearray(_PIECE)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            size += count
            total = crc32(memoryview(buffer)[:count], total)
    return size, total


def _damaged(source: str, found: int, expected: int) -> IntegrityError:
    return IntegrityError(
        f"the image {source} is damaged: its checksum is {found:08x}, not {expected:08x}",
        hint="pack the environment again",
    )
