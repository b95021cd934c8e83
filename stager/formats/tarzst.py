"""``tar.zst`` images: many independent zstd frames, so that all cores extract one image.

:class:`Writer` makes one from members, :func:`extract` makes a tree of one. The bytes of the
format and the reasons for it are in ``docs/formats/tar-zst.md``.

Extraction trusts nothing that the image says. What keeps it safe is mostly order: worker processes
create directories and files while no link exists in the tree at all, so that no path can lead
through one; then the parent, alone, makes the links, and last sets the directories' modes. Every
directory is opened below its parent without following links, every file is created exclusively,
and whatever goes wrong, the whole tree is removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import select
import signal
import stat
import struct
import threading
import warnings
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO, Callable, NamedTuple, NoReturn, Union

import zstandard

from stager import errors, fsutil
from stager.errors import JOB, IntegrityError, NotFoundError, StagerError, UsageError
from stager.formats import tarstream
from stager.formats.tarstream import DIR, FILE, HARDLINK, TRAILER, Member

SUFFIX = "tar.zst"
FRAME_SIZE = 2 << 20
"""Bytes of tar stream in a frame. Measured: half of it compresses 3 % worse, twice as much (or
more) extracts 4 % slower, because a decompressed frame no longer fits into a core's cache."""
MIN_FRAME_SIZE = 16 << 10
"""A frame that begins a member holds its whole header."""
MAX_FRAME_SIZE = 64 << 20
"""What the extractor is willing to hold in memory for each of its workers."""

Data = Union[bytes, bytearray, memoryview]
Source = Union[str, int, BinaryIO]

_FRAME_MAGIC = b"\x28\xb5\x2f\xfd"
_MAX_FRAME = MAX_FRAME_SIZE + tarstream.BLOCK  # padding is never cut off from its data
_MAX_INDEX = 64 << 20

_INDEX_MAGIC = b"stgindx1"
_SKIPPABLE = 0x184D2A5E
_SKIPPABLE_HEAD = struct.Struct("<II")  # magic, bytes that follow
_FRAME = struct.Struct("<II")  # compressed size, size
_PIECE = struct.Struct("<IQQH")  # frame number, offset in the member, size of the member, path
_COUNTS = struct.Struct("<II")  # frames, pieces
_FOOT = struct.Struct("<II8s")  # CRC-32 of the index, its size with this, magic

_TASK = struct.Struct("<II")  # frame number, slot
_MAX_WORKERS = 128  # so that all tasks there can be fit into the smallest pipe the kernel makes
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_OLD_FILE = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class ExtractResult(NamedTuple):
    """What was extracted.

    Attributes:
        files: members of any kind, directories and links included.
        bytes: data of all files as the image has it, before any rewriting.
        sha256: digest of the whole image, in hexadecimal, if one was expected.
        crc32: CRC-32 of the whole image, if one was expected.
    """

    files: int
    bytes: int
    sha256: str | None
    crc32: int | None


# Writing --------------------------------------------------------------------------------------


class Writer:
    """An image being written. The same members give the same bytes, whatever ``threads`` is.

    Args:
        fileobj: where the bytes go; it is neither flushed nor closed.
        level: zstd level.
        threads: how many frames are compressed at once; 0 is one for each processor. About twice
            as many are in memory.
        frame_size: bytes of tar stream in a frame; a member that is larger gets several.

    Attributes:
        files: members written so far, of any kind.
        bytes: data written so far, without headers.
    """

    def __init__(
        self, fileobj: BinaryIO, *, level: int = 3, threads: int = 0, frame_size: int = FRAME_SIZE
    ) -> None:
        if not MIN_FRAME_SIZE <= frame_size <= MAX_FRAME_SIZE:
            raise ValueError(f"frame_size is not in {MIN_FRAME_SIZE}..{MAX_FRAME_SIZE}")
        self.files = 0
        self.bytes = 0
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
        self._pieces: list[_Piece] = []

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
                    self._pieces.append(_Piece(self._begun, at, member.size, path))
                room = self._frame_size - len(self._buffer)
                self._buffer += view[:room]
                view = view[room:]
        if done != member.size:
            raise _changed(member)
        self._buffer += tarstream.padding(member.size)
        if self._begun > first:
            self._flush()  # the next member begins a frame
        self.files += 1
        self.bytes += member.size

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
            self._write(_Index(self._frames, self._pieces).to_bytes())
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
            raise fsutil.explain(error, "write the image") from error


def _changed(member: Member) -> IntegrityError:
    return IntegrityError(
        f"{member.path!r} changed while it was read",
        hint="pack again when nothing writes to the environment",
    )


# The index ------------------------------------------------------------------------------------


class _Piece(NamedTuple):
    """A frame that holds nothing but data of a member which began in an earlier one."""

    frame: int
    offset: int
    size: int
    path: bytes


class _Index:
    """Where the frames are, and whose data those are that do not begin with a header."""

    def __init__(self, frames: list[tuple[int, int]], pieces: list[_Piece]) -> None:
        self.frames = frames
        self.pieces = pieces

    def to_bytes(self) -> bytes:
        """The skippable frame that ends an image."""
        body = b"".join(
            (
                *(_FRAME.pack(*sizes) for sizes in self.frames),
                *(_PIECE.pack(*piece[:3], len(piece.path)) + piece.path for piece in self.pieces),
                _COUNTS.pack(len(self.frames), len(self.pieces)),
            )
        )
        size = len(body) + _FOOT.size
        foot = _FOOT.pack(zlib.crc32(body), size, _INDEX_MAGIC)
        return _SKIPPABLE_HEAD.pack(_SKIPPABLE, size) + body + foot

    @classmethod
    def load(cls, fd: int, image_size: int) -> tuple[_Index, bytes]:
        """Read the index of an image: two small reads at its end.

        Returns:
            the index, and the bytes of the image that it was read from.

        Raises:
            IntegrityError: there is none, or it does not describe this file.
        """
        foot = _read(fd, image_size - _FOOT.size, _FOOT.size) if image_size > _FOOT.size else b""
        if foot[-len(_INDEX_MAGIC) :] != _INDEX_MAGIC:
            raise IntegrityError(
                "the image does not end in an index of frames",
                hint="it is truncated, or not a tar.zst image of stager: copy or pack it again",
            )
        checksum, size, _ = _FOOT.unpack(foot)
        start = image_size - size - _SKIPPABLE_HEAD.size
        if not _COUNTS.size + _FOOT.size <= size <= _MAX_INDEX or start < 0:
            raise _bad_index("its size is impossible")
        raw = _read(fd, start, image_size - start - _FOOT.size) + foot
        body = raw[_SKIPPABLE_HEAD.size : -_FOOT.size]
        if raw[: _SKIPPABLE_HEAD.size] != _SKIPPABLE_HEAD.pack(_SKIPPABLE, size):
            raise _bad_index("it does not begin where it says")
        if zlib.crc32(body) != checksum:
            raise _bad_index("its checksum is wrong")
        index = cls._parse(body)
        if sum(compressed for compressed, _ in index.frames) != start:
            raise _bad_index("the sizes of the frames do not add up to the image's")
        index._check()
        return index, raw

    @classmethod
    def _parse(cls, body: bytes) -> _Index:
        end = len(body) - _COUNTS.size
        frame_count, piece_count = _COUNTS.unpack_from(body, end)
        pos = frame_count * _FRAME.size
        if pos > end:
            raise _bad_index("it is too short for its frames")
        frames = list(_FRAME.iter_unpack(body[:pos]))
        pieces = []
        for _ in range(piece_count):
            if pos + _PIECE.size > end:
                raise _bad_index("it is too short for its pieces")
            frame, offset, size, length = _PIECE.unpack_from(body, pos)
            pos += _PIECE.size + length
            pieces.append(_Piece(frame, offset, size, body[pos - length : pos]))
        if pos != end:
            raise _bad_index("it does not end where it should")
        return cls(frames, pieces)

    def _check(self) -> None:
        for compressed, size in self.frames:
            # Incompressible data grows by less than this (ZSTD_compressBound).
            if not (0 < size <= _MAX_FRAME and 0 < compressed <= size + (size >> 7) + 1024):
                raise _bad_index("a frame's size is impossible")
        if not self.frames or self.frames[-1][1] != len(TRAILER):
            raise _bad_index("the last frame is not the end of the archive")
        seen = set()
        going_on: tuple[int, int, int, bytes] | None = None  # what the next piece has to be
        for piece in self.pieces:
            if going_on is None:
                if piece.path in seen or not 0 < piece.frame < len(self.frames):
                    raise _bad_index("a piece belongs to no member")
                if tarstream.path_problem(piece.path, FILE):
                    raise _bad_index("a piece has an impossible path")
                seen.add(piece.path)
            elif piece != going_on:
                raise _bad_index("a piece is out of place")
            size = self.frames[piece.frame][1]
            left = piece.size - piece.offset
            last = size == left + len(tarstream.padding(piece.size))
            if left <= 0 or (size >= left and not last):
                raise _bad_index("a piece is not within its member")
            going_on = None
            if not last:
                going_on = (piece.frame + 1, piece.offset + size, piece.size, piece.path)
        if going_on is not None:
            raise _bad_index("a member has no end")
        numbers = [piece.frame for piece in self.pieces]
        if numbers != sorted(set(numbers)) or numbers[-1:] == [len(self.frames) - 1]:
            raise _bad_index("a piece is out of order")


def _bad_index(what: str) -> IntegrityError:
    return IntegrityError(
        f"the image's index of frames is damaged: {what}", hint="copy or pack the image again"
    )


def _read(fd: int, offset: int, size: int) -> bytes:
    buffer = bytearray(size)
    _read_into(fd, offset, memoryview(buffer))
    return bytes(buffer)


def _read_into(fd: int, offset: int, view: memoryview) -> None:
    while view:
        try:
            count = os.preadv(fd, [view], offset)
        except OSError as error:
            raise fsutil.explain(error, "read the image") from error
        if not count:
            raise IntegrityError("the image became shorter while it was read")
        offset += count
        view = view[count:]


# Extracting -----------------------------------------------------------------------------------


def extract(
    source: Source,
    destination: str,
    *,
    workers: int,
    max_files: int,
    max_bytes: int,
    expected_sha256: str | None = None,
    expected_crc32: int | None = None,
    rewrite: Callable[[str, bytes], bytes] | None = None,
    rewrite_needle: bytes | None = None,
    allowed_links: Callable[[str, str], bool] | None = None,
    progress: Callable[[int], None] | None = None,
) -> ExtractResult:
    """Make a tree of an image, on several cores.

    The image is read once: first the index at its end, then the rest from beginning to end, which
    is hashed at the same time if there is something to compare with. Damage is found without:
    every frame has a checksum of its own, and so has the index.

    Args:
        source: a path, descriptor or file object of a regular file. What is handed over open is
            not closed, and its position does not matter.
        destination: the directory to create. It gets mode 0700, whatever the image says of the
            root; everything in it belongs to the caller.
        workers: how many processes decompress and write.
        max_files: most members, of any kind; from the manifest.
        max_bytes: most bytes of data in all files together; from the manifest.
        expected_sha256: digest in hexadecimal that the image must have. On a processor without
            instructions for it, this costs half as much as decompressing.
        expected_crc32: CRC-32 that the image must have: tells an image from another one, not from
            one that was made to look like it.
        rewrite: called with path and content of every file that contains ``rewrite_needle``, in
            some worker process; returns the content to be written instead.
        rewrite_needle: what to look for; not empty. Without it nothing is rewritten.
        allowed_links: called with a symbolic link's path and target where the target may leave
            the tree (see :func:`stager.formats.tarstream.stays_inside`); such links are refused
            unless it returns true.
        progress: called with the number of further bytes of the image that were read.

    Raises:
        IntegrityError: the image is damaged, hostile, larger than allowed, or another one.
        NoSpaceError: no bytes or inodes left.
        DeniedError: the destination cannot be written, or the image cannot be read.
        UsageError: the source is no regular file, or the destination exists.
        NotFoundError: there is no such image.
        StagerError: a worker process died, or the disk failed.

    Whatever is raised, nothing is left of the destination.
    """
    if (rewrite is None) != (not rewrite_needle):
        raise ValueError("rewrite and rewrite_needle are of use only together")
    destination = os.path.abspath(destination)
    with _opened(source) as fd:
        image_size = os.fstat(fd).st_size
        index, raw_index = _Index.load(fd, image_size)
        overhead = tarstream.MAX_HEADER + tarstream.BLOCK
        if sum(size for _, size in index.frames) > max_bytes + max_files * overhead + len(TRAILER):
            raise _too_large()
        try:
            os.mkdir(destination, 0o700)
        except FileExistsError as error:
            raise UsageError(
                f"{destination} exists", hint="extraction needs a directory of its own; remove it"
            ) from error
        except OSError as error:
            raise fsutil.explain(error, f"extract to {destination}") from error
        try:
            with contextlib.ExitStack() as stack:
                root = os.open(destination, _DIRECTORY)
                stack.callback(os.close, root)
                os.fchmod(root, 0o700)  # a parent with a set-group-ID bit passes that on
                unpacker = _Unpacker(index, root, destination, rewrite, rewrite_needle)
                done = _Report(index, max_files, max_bytes)
                unpacker.prepare()
                sums = _Sums(expected_sha256, expected_crc32)
                _unpack_all(fd, unpacker, done, sums, workers, progress)
                sums.update(raw_index)
                sums.check()
                _finish(done, root, unpacker, allowed_links)
                if progress is not None:
                    progress(len(raw_index))
                return ExtractResult(done.files, done.bytes, sums.sha256, sums.crc32)
        except BaseException as error:
            with contextlib.suppress(OSError):
                fsutil.remove_tree(destination)
            if isinstance(error, OSError):
                raise fsutil.explain(error, f"extract to {destination}") from error
            raise


@contextlib.contextmanager
def _opened(source: Source) -> Iterator[int]:
    with contextlib.ExitStack() as stack:
        if isinstance(source, str):
            try:
                # A named pipe must not make us wait for its writer.
                fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            except FileNotFoundError as error:
                raise NotFoundError(
                    f"the image {source} is missing", hint="pack the environment again"
                ) from error
            except OSError as error:
                raise fsutil.explain(error, f"read the image {source}", blame=JOB) from error
            stack.callback(os.close, fd)
        else:
            fd = source if isinstance(source, int) else source.fileno()
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise UsageError(f"the image is not a regular file: {source}")
        yield fd


def _too_large() -> IntegrityError:
    return IntegrityError(
        "the image holds more than its manifest says",
        hint="image and manifest do not belong together: pack again",
    )


class _Sums:
    """What the bytes of an image are compared by, as far as anything is expected of them."""

    def __init__(self, sha256: str | None, crc32: int | None) -> None:
        self._expected = sha256.lower() if sha256 is not None else None, crc32
        self._sha256 = hashlib.sha256() if sha256 is not None else None
        self.crc32 = 0 if crc32 is not None else None
        self.wanted = self._expected != (None, None)

    @property
    def sha256(self) -> str | None:
        return self._sha256.hexdigest() if self._sha256 is not None else None

    def update(self, data: Data) -> None:
        """Take in the next bytes of the image."""
        if self._sha256 is not None:
            self._sha256.update(data)
        if self.crc32 is not None:
            self.crc32 = zlib.crc32(data, self.crc32)

    def check(self) -> None:
        """Compare, when all of the image was taken in."""
        names = ("sha256 {}", "CRC-32 {:08x}")
        for name, found, expected in zip(names, (self.sha256, self.crc32), self._expected):
            if found != expected:
                raise IntegrityError(
                    f"the image has {name.format(found)}, expected was {name.format(expected)}",
                    hint="it was damaged on the way or replaced: stage or pack it again",
                )


def _unpack_all(
    fd: int,
    unpacker: _Unpacker,
    done: _Report,
    sums: _Sums,
    workers: int,
    progress: Callable[[int], None] | None,
) -> None:
    """Read every frame into a free slot of shared memory, have it hashed and unpacked from there.

    So what is hashed is what is extracted, whoever changes the file meanwhile.
    """
    frames = unpacker.index.frames
    workers = max(1, min(workers, len(frames), _MAX_WORKERS))
    free = list(range(2 * workers + 1))
    slot_size = max(compressed for compressed, _ in frames)
    memory = memoryview(mmap.mmap(-1, len(free) * slot_size))
    busy: dict[int, Future[None] | None] = {}

    def frame(number: int, slot: int) -> memoryview:
        return memory[slot * slot_size : slot * slot_size + frames[number][0]]

    def unpack(number: int, slot: int) -> dict[str, Any]:
        return unpacker.unpack(number, frame(number, slot))

    def collect() -> None:
        for number, slot, report in pool.results():
            done.add(number, report)
            hashing = busy.pop(slot)
            if hashing is not None:
                hashing.result()
            free.append(slot)

    with _Workers(workers, unpack) as pool, ThreadPoolExecutor(1, "sums") as hasher:
        offset = 0
        for number in range(len(frames)):
            while not free:
                collect()
            slot = free.pop()
            view = frame(number, slot)
            _read_into(fd, offset, view)
            busy[slot] = hasher.submit(sums.update, view) if sums.wanted else None
            pool.submit(number, slot)
            offset += len(view)
            if progress is not None:
                progress(len(view))
        while busy:
            collect()


class _Report:
    """What the workers have done, and whether it is within what is allowed."""

    def __init__(self, index: _Index, max_files: int, max_bytes: int) -> None:
        self.files = 0
        self.bytes = 0
        self.directories: dict[str, tuple[int, int]] = {}
        self.spans: list[Member] = []
        self.rewritable: set[str] = set()
        self._index = index
        self._max_files = max_files
        self._max_bytes = max_bytes
        self._parents: set[str] = set()
        self._links: dict[int, list[Member]] = {}
        self._begun: dict[tuple[int, int, int, bytes], Member] = {}

    def add(self, number: int, report: dict[str, Any]) -> None:
        """Take in the report on one frame."""
        self.files += report["files"]
        self.bytes += report["bytes"]
        if self.files > self._max_files or self.bytes > self._max_bytes:
            raise _too_large()
        for path, mode, mtime in report["directories"]:
            if path in self.directories:
                raise _duplicate(path)
            self.directories[path] = mode, mtime
        self._parents.update(report["parents"])
        self._links[number] = [Member(*fields) for fields in report["links"]]
        if report["span"]:
            *fields, offset = report["span"]
            member = Member(*fields)
            self._begun[number + 1, offset, member.size, os.fsencode(member.path)] = member
        if report["found"]:
            self.rewritable.add(report["found"])

    def check(self) -> None:
        """Compare the reports on all frames with each other and with the index."""
        orphans = self._parents - self.directories.keys() - {""}
        if orphans:
            raise IntegrityError(f"refused tar stream: {min(orphans)!r} is no directory of it")
        first: dict[bytes, tuple[int, int, int, bytes]] = {}
        for piece in self._index.pieces:
            first.setdefault(piece.path, piece)
        if set(first.values()) != self._begun.keys():
            raise _bad_index("it does not know the members that go on in further frames")
        self.spans = list(self._begun.values())

    def seams(self, member: Member) -> list[int]:
        """Offsets in a member of several frames at which a frame ends and the next begins."""
        path = os.fsencode(member.path)
        return [piece.offset for piece in self._index.pieces if piece.path == path]

    def links(self) -> Iterator[Member]:
        """All links, in the order of the archive."""
        for number in sorted(self._links):
            yield from self._links[number]


def _duplicate(path: str) -> IntegrityError:
    return IntegrityError(f"refused tar stream: {path!r} is there twice")


class _Tree:
    """The directories of a tree, each opened below its parent and never through a link."""

    def __init__(self, root: int) -> None:
        self._path = ""
        self._names: list[str] = []
        self._fds = [root]

    def directory(self, path: str, *, create: bool = False) -> int:
        """A descriptor of the directory, good until the next call; "" is the root."""
        if path != self._path:
            names = path.split("/") if path else []
            self._path = "/"  # not any more where it was, and perhaps never where it should be
            same = 0
            while names[same : same + 1] == self._names[same : same + 1] != []:
                same += 1
            while len(self._names) > same:
                self._names.pop()
                os.close(self._fds.pop())
            for name in names[same:]:
                self._fds.append(self._open(name, create))
                self._names.append(name)
            self._path = path
        return self._fds[-1]

    def _open(self, name: str, create: bool) -> int:
        parent = self._fds[-1]
        try:
            try:
                return os.open(name, _DIRECTORY, dir_fd=parent)
            except FileNotFoundError:
                if not create:
                    raise
            with contextlib.suppress(FileExistsError):  # another worker was faster
                os.mkdir(name, 0o700, dir_fd=parent)
            return os.open(name, _DIRECTORY, dir_fd=parent)
        except NotADirectoryError:
            path = "/".join([*self._names, name])
            raise IntegrityError(f"refused tar stream: {path!r} is no directory") from None

    def file(self, path: str) -> int:
        """Open a file that exists, for reading and writing."""
        directory, _, name = path.rpartition("/")
        return os.open(name, _OLD_FILE, dir_fd=self.directory(directory))

    def __enter__(self) -> _Tree:
        return self

    def __exit__(self, *_: object) -> None:
        self.directory("")  # closes all the others


class _Unpacker:
    """Makes files of frames. Used by the workers; the parent only prepares for them."""

    def __init__(
        self,
        index: _Index,
        root: int,
        destination: str,
        rewrite: Callable[[str, bytes], bytes] | None,
        needle: bytes | None,
    ) -> None:
        self.index = index
        self.rewrite = rewrite
        self.needle = needle or b""
        self._destination = destination
        self._pieces = {piece.frame: piece for piece in index.pieces}
        self._root = root
        self._tree = _Tree(root)
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_FRAME)

    def prepare(self) -> None:
        """Create the files that several workers will write to."""
        with _Tree(self._root) as tree:
            for path in {os.fsdecode(piece.path) for piece in self.index.pieces}:
                directory, _, name = path.rpartition("/")
                parent = tree.directory(directory, create=True)
                try:
                    os.close(os.open(name, _NEW_FILE, 0o600, dir_fd=parent))
                except FileExistsError:
                    raise _bad_index(f"{path!r} is a file and a directory") from None

    def unpack(self, number: int, frame: memoryview) -> dict[str, Any]:
        """Write what is in a frame, and tell what the parent has to know of it."""
        data = self._decompress(number, frame)
        piece = self._pieces.get(number)
        try:
            if piece is not None:
                return self._continue(piece, data)
            return self._members(data, last=number == len(self.index.frames) - 1)
        except OSError as error:
            raise fsutil.explain(error, f"extract to {self._destination}") from error

    def _decompress(self, number: int, frame: memoryview) -> bytes:
        size = self.index.frames[number][1]
        try:
            if frame[:4] != _FRAME_MAGIC:
                raise IntegrityError(f"frame {number} of the image is not a zstd frame")
            told = zstandard.get_frame_parameters(frame)
            if told.content_size != size or told.window_size > _MAX_FRAME:
                raise IntegrityError(f"frame {number} of the image is not what the index says")
            if not told.has_checksum:
                raise IntegrityError(f"frame {number} of the image has no checksum")
            data = self._decompressor.decompress(frame, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise IntegrityError(
                f"frame {number} of the image is damaged: {error}", hint="copy the image again"
            ) from error
        if len(data) != size:
            raise IntegrityError(f"frame {number} of the image is damaged: its size is wrong")
        return data

    def _members(self, data: bytes, *, last: bool) -> dict[str, Any]:
        files = size = 0
        directories, links, span, found = [], [], None, None
        parents = set()
        rewritable = bool(self.needle) and self.needle in data
        reader = tarstream.Reader()
        for member, piece in reader.feed(data):
            files += 1
            size += member.size
            path = member.path
            directory, _, name = path.rpartition("/")
            parents.add(directory)
            if member.kind == FILE:
                if reader.missing:
                    span = [path, FILE, member.mode, member.mtime, member.size, "", len(piece)]
                    found = path if rewritable else None
                    self._write_piece(path, 0, piece)
                else:
                    parent = self._tree.directory(directory, create=True)
                    self._create(member, parent, name, piece, rewritable)
            elif member.kind == DIR:
                if path != ".":
                    self._tree.directory(path, create=True)
                directories.append([path, member.mode, member.mtime])
            else:
                links.append([path, member.kind, member.mode, member.mtime, 0, member.target])
        if reader.ended != last or (span is None and not reader.at_boundary):
            raise IntegrityError("malformed tar stream: it ends too early or too late")
        return {
            "files": files,
            "bytes": size,
            "directories": directories,
            "links": links,
            "parents": sorted(parents),
            "span": span,
            "found": found,
        }

    def _create(
        self, member: Member, parent: int, name: str, content: Data, rewritable: bool
    ) -> None:
        if rewritable:
            content = bytes(content)
            if self.needle in content and self.rewrite is not None:
                content = self.rewrite(member.path, content)
        try:
            fd = os.open(name, _NEW_FILE, member.mode & 0o777, dir_fd=parent)
        except FileExistsError:
            raise _duplicate(member.path) from None
        try:
            _write_all(fd, content)
            os.utime(fd, (member.mtime, member.mtime))
        finally:
            os.close(fd)

    def _continue(self, piece: _Piece, data: bytes) -> dict[str, Any]:
        path = os.fsdecode(piece.path)
        view = memoryview(data)[: piece.size - piece.offset]
        if data[len(view) :].strip(b"\0"):
            raise IntegrityError("malformed tar stream: padding is not zeros")
        self._write_piece(path, piece.offset, view)
        found = path if self.needle and self.needle in data else None
        return {
            "files": 0, "bytes": 0, "directories": [], "links": [], "parents": [], "span": None,
            "found": found,
        }  # fmt: skip

    def _write_piece(self, path: str, offset: int, view: memoryview) -> None:
        try:
            fd = self._tree.file(path)
        except FileNotFoundError:
            raise _bad_index(f"it does not know that {path!r} goes on in further frames") from None
        try:
            os.lseek(fd, offset, os.SEEK_SET)
            _write_all(fd, view)
        finally:
            os.close(fd)


def _write_all(fd: int, data: Data) -> None:
    while data:
        count = os.write(fd, data)
        if count == len(data):
            return
        data = memoryview(data)[count:]


def _finish(
    done: _Report,
    root: int,
    unpacker: _Unpacker,
    allowed_links: Callable[[str, str], bool] | None,
) -> None:
    """All that must not happen while workers create files: links, and what they may not change."""
    done.check()
    with _Tree(root) as tree, _Tree(root) as targets:
        for member in done.spans:
            fd = tree.file(member.path)
            try:
                _rewrite_span(fd, member, done, unpacker)
                os.fchmod(fd, member.mode & 0o777)
                os.utime(fd, (member.mtime, member.mtime))
            finally:
                os.close(fd)
        for member in done.links():
            directory, _, name = member.path.rpartition("/")
            parent = tree.directory(directory)
            try:
                if member.kind == HARDLINK:
                    _hard_link(member, targets, parent, name)
                else:
                    _symbolic_link(member, allowed_links, parent, name)
            except FileExistsError:
                raise _duplicate(member.path) from None
        # Deepest first: a directory that nobody may enter can still be finished.
        for path in sorted(done.directories, key=lambda path: path.split("/"), reverse=True):
            mode, mtime = done.directories[path]
            fd = root if path == "." else tree.directory(path)
            if path != ".":
                os.fchmod(fd, mode & 0o777)
            os.utime(fd, (mtime, mtime))


def _symbolic_link(
    member: Member, allowed: Callable[[str, str], bool] | None, parent: int, name: str
) -> None:
    if not tarstream.stays_inside(member.path, member.target) and not (
        allowed is not None and allowed(member.path, member.target)
    ):
        raise IntegrityError(
            f"refused link {member.path!r}: {member.target!r} leads out of the tree"
        )
    os.symlink(member.target, name, dir_fd=parent)


def _hard_link(member: Member, targets: _Tree, parent: int, name: str) -> None:
    directory, _, target = member.target.rpartition("/")
    try:
        source = targets.directory(directory)
        if not stat.S_ISREG(os.stat(target, dir_fd=source, follow_symlinks=False).st_mode):
            raise FileNotFoundError
    except (FileNotFoundError, IntegrityError):
        raise IntegrityError(
            f"refused hard link {member.path!r}: {member.target!r} is no file of the tree"
        ) from None
    os.link(target, name, src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)


def _rewrite_span(fd: int, member: Member, done: _Report, unpacker: _Unpacker) -> None:
    """Rewrite a file of several frames if the needle is in it, perhaps across two of them."""
    needle, rewrite = unpacker.needle, unpacker.rewrite
    if rewrite is None:
        return
    if member.path not in done.rewritable:
        around = len(needle) - 1
        for start in done.seams(member):
            window = os.pread(fd, 2 * around, max(0, start - around))
            if needle in window:
                break
        else:
            return
    content = rewrite(member.path, _read(fd, 0, member.size))
    os.lseek(fd, 0, os.SEEK_SET)
    os.ftruncate(fd, 0)
    _write_all(fd, content)


# Workers --------------------------------------------------------------------------------------


class _Workers:
    """Forked processes that share one queue of tasks.

    They end when the queue is closed, which the kernel does for a parent that is killed, and they
    notice a dead parent when they report, so none goes on working for nobody.
    """

    def __init__(self, count: int, work: Callable[[int, int], dict[str, Any]]) -> None:
        self._pids: dict[int, int] = {}  # by the descriptor that the worker reports to
        self._received: dict[int, bytes] = {}
        self._poll = select.poll()
        tasks, self._tasks = os.pipe()
        try:
            for _ in range(count):
                self._start(tasks, work)
        except BaseException:
            self._kill()
            raise
        finally:
            os.close(tasks)

    def _start(self, tasks: int, work: Callable[[int, int], dict[str, Any]]) -> None:
        reports, report = os.pipe()
        try:
            with warnings.catch_warnings():
                # Other threads of the caller do not matter: a worker takes no lock they may hold.
                warnings.simplefilter("ignore", DeprecationWarning)
                pid = os.fork()
        except OSError as error:
            os.close(reports)
            os.close(report)
            raise StagerError(
                f"cannot start a worker process: {error.strerror}",
                hint="a limit on processes or memory is in force; try fewer workers",
            ) from error
        if pid == 0:
            # Ends held here would hide from the others that the parent is gone.
            _work(tasks, report, work, close=(self._tasks, reports, *self._pids))
        os.close(report)
        self._pids[reports] = pid
        self._received[reports] = b""
        self._poll.register(reports, select.POLLIN)

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            os.close(self._tasks)
            self._reap()
        else:
            self._kill()

    def submit(self, number: int, slot: int) -> None:
        """Queue a frame. The queue is a pipe; it holds more tasks than there are slots."""
        with contextlib.suppress(BrokenPipeError):  # all have died: results() will say so
            os.write(self._tasks, _TASK.pack(number, slot))

    def results(self) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """Wait for reports: frame number, slot, report.

        Raises:
            StagerError: what a worker met, or that one died.
        """
        for fd, _ in self._poll.poll():
            data = os.read(fd, 1 << 16)
            if not data:
                os.close(fd)
                raise _died(_wait(self._pids.pop(fd)))
            *lines, self._received[fd] = (self._received[fd] + data).split(b"\n")
            for line in lines:
                number, slot, report = json.loads(line)
                if "error" in report:
                    name, message, hint, blame = report["error"]
                    kind = getattr(errors, name, StagerError)
                    raise kind(message, hint=hint, blame=blame)
                yield number, slot, report

    def _kill(self) -> None:
        os.close(self._tasks)
        for pid in self._pids.values():
            os.kill(pid, signal.SIGKILL)
        self._reap()

    def _reap(self) -> None:
        for fd, pid in self._pids.items():
            _wait(pid)
            os.close(fd)


def _wait(pid: int) -> int:
    """Wait for a process to end, and tell its status."""
    try:
        return os.waitpid(pid, 0)[1]
    except ChildProcessError:  # the caller ignores SIGCHLD, so the kernel told nobody
        return 0


def _died(status: int) -> StagerError:
    if os.WIFSIGNALED(status):
        how = f"was killed by signal {os.WTERMSIG(status)}"
    else:
        how = f"ended with status {os.WEXITSTATUS(status)}"
    return StagerError(
        f"a worker process of the extraction {how}",
        hint="was there too little memory? Ask for more, or allow fewer workers",
    )


def _work(
    tasks: int, report: int, work: Callable[[int, int], dict[str, Any]], *, close: Iterable[int]
) -> NoReturn:
    """What a worker process does; never returns into the caller's code."""
    try:
        for fd in close:
            os.close(fd)
        # The parent takes care of an interrupted terminal; its handlers are not meant for us.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.umask(0)
        while True:
            task = os.read(tasks, _TASK.size)
            if not task:
                os._exit(0)
            number, slot = _TASK.unpack(task)
            try:
                result = work(number, slot)
            except BaseException as error:
                result = {"error": _described(error)}
            _write_all(report, json.dumps([number, slot, result]).encode() + b"\n")
    finally:
        os._exit(1)


def _described(error: BaseException) -> list[str | None]:
    if not isinstance(error, StagerError):
        error = StagerError(f"extraction failed: {type(error).__name__}: {error}")
    return [type(error).__name__, error.message, error.hint, error.blame]
