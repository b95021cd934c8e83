"""Writing an image: frames are compressed by threads, in an order that does not depend on them."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO

import zstandard

from stager import fsutil
from stager.errors import IntegrityError
from stager.formats import tarstream
from stager.formats.tarstream import TRAILER, Member
from stager.formats.tarzst.index import (
    FRAME_SIZE,
    MAX_FRAME_SIZE,
    MIN_FRAME_SIZE,
    Data,
    Index,
    Piece,
)


class Writer:
    """An image being written. The same members give the same bytes, whatever ``threads`` is.

    Args:
        fileobj: where the bytes go; it is neither flushed nor closed.
        level: zstd level.
        threads: how many frames are compressed at once; 0 is one for each processor. About twice
            as many are in memory.
        frame_size: bytes of tar stream in a frame; a member that is larger gets several.
    """

    def __init__(
        self, fileobj: BinaryIO, *, level: int = 3, threads: int = 0, frame_size: int = FRAME_SIZE
    ) -> None:
        if not MIN_FRAME_SIZE <= frame_size <= MAX_FRAME_SIZE:
            raise ValueError(f"frame_size is not in {MIN_FRAME_SIZE}..{MAX_FRAME_SIZE}")
        self._fileobj = fileobj
        self._level = level
        self._frame_size = frame_size
        self._threads = threads or len(os.sched_getaffinity(0))
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="zstd")
        self._local = threading.local()
        self._pending: deque[tuple[int, Future[bytes]]] = deque()
        self._buffer = bytearray()
        self._begun = 0
        self._frames: list[tuple[int, int]] = []
        self._pieces: list[Piece] = []

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def write_member(self, member: Member, data: Data | Iterable[Data] = b"") -> None:
        """Append one member.

        Args:
            member: what it is.
            data: exactly ``member.size`` bytes, whole or in pieces; copied before this returns.

        Raises:
            UsageError: the member cannot be in an image.
            IntegrityError: there is more or less data than ``member.size``.
            NoSpaceError: the file system is full.
        """
        head = tarstream.header(member)
        if self._buffer and len(self._buffer) + len(head) + member.size > self._frame_size:
            self._flush()
        self._buffer += head
        first, done = self._begun, 0
        for piece in (data,) if isinstance(data, (bytes, bytearray, memoryview)) else data:
            view = memoryview(piece)
            done += len(view)
            if done > member.size:
                raise _changed(member)
            while view:
                if len(self._buffer) >= self._frame_size:
                    self._flush()
                    at = done - len(view)
                    path = os.fsencode(member.path)
                    self._pieces.append(Piece(self._begun, at, member.size, path))
                room = self._frame_size - len(self._buffer)
                self._buffer += view[:room]
                view = view[room:]
        if done != member.size:
            raise _changed(member)
        self._buffer += tarstream.padding(member.size)
        if self._begun > first:
            self._flush()  # the next member begins a frame

    def close(self) -> None:
        """Write what is left, the end of the archive and the index.

        Raises:
            NoSpaceError: the file system is full.
        """
        try:
            self._flush()
            self._buffer += TRAILER
            self._flush()
            self._write_frames(0)
            self._write(Index(self._frames, self._pieces).to_bytes())
        finally:
            self.abort()

    def abort(self) -> None:
        """Give up the image; what is written of it cannot be extracted."""
        self._pending.clear()
        self._pool.shutdown(cancel_futures=True)

    def _flush(self) -> None:
        if self._buffer:
            self._pending.append(
                (len(self._buffer), self._pool.submit(self._compress, self._buffer))
            )
            self._buffer = bytearray()
            self._begun += 1
            self._write_frames(self._threads)

    def _compress(self, data: bytearray) -> bytes:
        # A compressor must not be used by two threads, and is too large to make for each frame.
        compressor: zstandard.ZstdCompressor | None = getattr(self._local, "compressor", None)
        if compressor is None:
            compressor = self._local.compressor = zstandard.ZstdCompressor(
                level=self._level, write_checksum=True, write_content_size=True
            )
        return compressor.compress(data)

    def _write_frames(self, leave: int) -> None:
        while len(self._pending) > leave:
            size, future = self._pending.popleft()
            frame = future.result()
            self._frames.append((len(frame), size))
            self._write(frame)

    def _write(self, data: bytes) -> None:
        try:
            self._fileobj.write(data)
        except OSError as error:
            raise fsutil.explain(error, f"write the image {self._fileobj.name}") from error


def _changed(member: Member) -> IntegrityError:
    return IntegrityError(
        f"{member.path!r} changed while it was read",
        hint="pack again when nothing writes to the environment",
    )
