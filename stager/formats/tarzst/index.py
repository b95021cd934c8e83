"""The index at the end of an image, which tells what each frame holds."""

from __future__ import annotations

import os
import struct
import zlib
from typing import NamedTuple, Union

from stager import fsutil
from stager.errors import JOB, IntegrityError
from stager.formats import tarstream
from stager.formats.tarstream import FILE, TRAILER

FRAME_SIZE = 2 << 20
"""Bytes of tar stream in a frame. Measured: half of it compresses 3 % worse, twice as much (or
more) extracts 4 % slower, because a decompressed frame no longer fits into a core's cache."""
MIN_FRAME_SIZE = 16 << 10
"""A frame that begins a member holds its whole header."""
MAX_FRAME_SIZE = 64 << 20
"""What the extractor is willing to hold in memory for each of its workers."""

Data = Union[bytes, bytearray, memoryview]

FRAME_MAGIC = b"\x28\xb5\x2f\xfd"
MAX_FRAME = MAX_FRAME_SIZE + tarstream.BLOCK  # padding is never cut off from its data
MAX_INDEX = 64 << 20

INDEX_MAGIC = b"stgindx1"
SKIPPABLE = 0x184D2A5E
SKIPPABLE_HEAD = struct.Struct("<II")  # magic, bytes that follow
FRAME = struct.Struct("<II")  # compressed size, size
PIECE = struct.Struct("<IQQH")  # frame number, offset in the member, size of the member, path
COUNTS = struct.Struct("<II")  # frames, pieces
FOOT = struct.Struct("<II8s")  # CRC-32 of the index, its size with this, magic


class Piece(NamedTuple):
    """A frame that holds nothing but data of a member which began in an earlier one."""

    frame: int
    offset: int
    size: int
    path: bytes


class Index:
    """Where the frames are, and whose data those are that do not begin with a header."""

    def __init__(self, frames: list[tuple[int, int]], pieces: list[Piece]) -> None:
        self.frames = frames
        self.pieces = pieces

    def to_bytes(self) -> bytes:
        """The skippable frame that ends an image."""
        body = b"".join(
            (
                *(FRAME.pack(*sizes) for sizes in self.frames),
                *(PIECE.pack(*piece[:3], len(piece.path)) + piece.path for piece in self.pieces),
                COUNTS.pack(len(self.frames), len(self.pieces)),
            )
        )
        size = len(body) + FOOT.size
        foot = FOOT.pack(zlib.crc32(body), size, INDEX_MAGIC)
        return SKIPPABLE_HEAD.pack(SKIPPABLE, size) + body + foot

    @classmethod
    def load(cls, fd: int, image_size: int) -> tuple[Index, bytes]:
        """Read the index of an image: two small reads at its end.

        Returns:
            the index, and the bytes of the image that it was read from.

        Raises:
            IntegrityError: there is none, or it does not describe this file.
        """
        foot = read_at(fd, image_size - FOOT.size, FOOT.size) if image_size > FOOT.size else b""
        if foot[-len(INDEX_MAGIC) :] != INDEX_MAGIC:
            raise IntegrityError(
                "the image does not end in an index of frames",
                hint="it is truncated, or not a tar.zst image of stager: copy or pack it again",
            )
        checksum, size, _ = FOOT.unpack(foot)
        start = image_size - size - SKIPPABLE_HEAD.size
        if not COUNTS.size + FOOT.size <= size <= MAX_INDEX or start < 0:
            raise bad_index("its size is impossible")
        raw = read_at(fd, start, image_size - start - FOOT.size) + foot
        body = raw[SKIPPABLE_HEAD.size : -FOOT.size]
        if raw[: SKIPPABLE_HEAD.size] != SKIPPABLE_HEAD.pack(SKIPPABLE, size):
            raise bad_index("it does not begin where it says")
        if zlib.crc32(body) != checksum:
            raise bad_index("its checksum is wrong")
        index = cls._parse(body)
        if sum(compressed for compressed, _ in index.frames) != start:
            raise bad_index("the sizes of the frames do not add up to the image's")
        index._check()
        return index, raw

    @classmethod
    def _parse(cls, body: bytes) -> Index:
        end = len(body) - COUNTS.size
        frame_count, piece_count = COUNTS.unpack_from(body, end)
        pos = frame_count * FRAME.size
        if pos > end:
            raise bad_index("it is too short for its frames")
        frames = list(FRAME.iter_unpack(body[:pos]))
        pieces = []
        for _ in range(piece_count):
            if pos + PIECE.size > end:
                raise bad_index("it is too short for its pieces")
            frame, offset, size, length = PIECE.unpack_from(body, pos)
            pos += PIECE.size + length
            pieces.append(Piece(frame, offset, size, body[pos - length : pos]))
        if pos != end:
            raise bad_index("it does not end where it should")
        return cls(frames, pieces)

    def _check(self) -> None:
        for compressed, size in self.frames:
            # Incompressible data grows by less than this (ZSTD_compressBound).
            if not (0 < size <= MAX_FRAME and 0 < compressed <= size + (size >> 7) + 1024):
                raise bad_index("a frame's size is impossible")
        if not self.frames or self.frames[-1][1] != len(TRAILER):
            raise bad_index("the last frame is not the end of the archive")
        seen = set()
        going_on: tuple[int, int, int, bytes] | None = None  # what the next piece has to be
        for piece in self.pieces:
            if going_on is None:
                if piece.path in seen or not 0 < piece.frame < len(self.frames):
                    raise bad_index("a piece belongs to no member")
                if tarstream.path_problem(piece.path, FILE):
                    raise bad_index("a piece has an impossible path")
                seen.add(piece.path)
            elif piece != going_on:
                raise bad_index("a piece is out of place")
            size = self.frames[piece.frame][1]
            left = piece.size - piece.offset
            last = size == left + len(tarstream.padding(piece.size))
            if left <= 0 or (size >= left and not last):
                raise bad_index("a piece is not within its member")
            going_on = None
            if not last:
                going_on = (piece.frame + 1, piece.offset + size, piece.size, piece.path)
        if going_on is not None:
            raise bad_index("a member has no end")
        numbers = [piece.frame for piece in self.pieces]
        if numbers != sorted(set(numbers)) or numbers[-1:] == [len(self.frames) - 1]:
            raise bad_index("a piece is out of order")


def bad_index(what: str) -> IntegrityError:
    """The error for an index that contradicts itself or the image."""
    return IntegrityError(
        f"the image's index of frames is damaged: {what}", hint="copy or pack the image again"
    )


def read_at(fd: int, offset: int, size: int) -> bytes:
    """Read exactly ``size`` bytes of a file, or raise what :func:`read_into` does."""
    buffer = bytearray(size)
    read_into(fd, offset, memoryview(buffer))
    return bytes(buffer)


def read_into(fd: int, offset: int, view: memoryview) -> None:
    """Fill a buffer from a file.

    Raises:
        IntegrityError: the file ends before that.
    """
    while view:
        try:
            count = os.preadv(fd, [view], offset)
        except OSError as error:
            raise fsutil.explain(error, "read the image", blame=JOB) from error
        if not count:
            raise IntegrityError("the image became shorter while it was read")
        offset += count
        view = view[count:]


def write_all(fd: int, data: Data) -> None:
    """Write all of it, where a file or pipe takes less at a time."""
    while data:
        count = os.write(fd, data)
        if count == len(data):
            return
        data = memoryview(data)[count:]
