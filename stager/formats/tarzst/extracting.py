"""Extracting an image on every processor, believing nothing that it says."""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
from collections.abc import Iterator
from typing import Any, Callable

import zstandard

from stager import checksum as sums
from stager import fsutil, transfer
from stager.errors import NODE, IntegrityError, UsageError
from stager.formats import tarstream
from stager.formats.tarstream import DIR, FILE, HARDLINK, TRAILER, Member
from stager.formats.tarzst.index import (
    FRAME_MAGIC,
    MAX_FRAME,
    Data,
    Index,
    Piece,
    bad_index,
    read_into,
    write_all,
)
from stager.formats.tarzst.workers import MAX_WORKERS, Workers

_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_OLD_FILE = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def extract(
    source: str,
    destination: str,
    *,
    workers: int,
    max_files: int,
    max_bytes: int,
    crc32: int,
    allowed_links: Callable[[str, str], bool],
    progress: Callable[[int], None] | None = None,
) -> None:
    """Make a tree of an image, on several cores.

    The image is read once: first the index at its end, then the rest from beginning to end, which
    is summed up at the same time. Damage is found without: every frame has a checksum of its own,
    and so has the index.

    Args:
        source: the path of a regular file.
        destination: the directory to create. It gets mode 0700, whatever the image says of the
            root; everything in it belongs to the caller.
        workers: how many processes decompress and write.
        max_files: most members, of any kind; from the manifest.
        max_bytes: most bytes of data in all files together; from the manifest.
        crc32: CRC-32 that the image must have: tells an image from another one, not from one that
            was made to look like it.
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
    destination = os.path.abspath(destination)
    with _opened(source) as fd:
        image_size = os.fstat(fd).st_size
        index, raw_index = Index.load(fd, image_size)
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
            raise fsutil.explain(error, f"extract to {destination}", blame=NODE) from error
        try:
            with contextlib.ExitStack() as stack:
                root = os.open(destination, _DIRECTORY)
                stack.callback(os.close, root)
                os.fchmod(root, 0o700)  # a parent with a set-group-ID bit passes that on
                unpacker = _Unpacker(index, root, destination)
                done = _Report(index, max_files, max_bytes)
                unpacker.prepare()
                checksum = _Checksum(crc32)
                _unpack_all(fd, unpacker, done, checksum, workers, progress)
                checksum.update(raw_index)
                checksum.check()
                _finish(done, root, allowed_links)
                if progress is not None:
                    progress(len(raw_index))
        except BaseException as error:
            with contextlib.suppress(OSError):
                fsutil.remove_tree(destination)
            if isinstance(error, OSError):
                raise fsutil.explain(error, f"extract to {destination}", blame=NODE) from error
            raise


@contextlib.contextmanager
def _opened(source: str) -> Iterator[int]:
    fd = transfer.open_image(source)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise UsageError(f"the image is not a regular file: {source}")
        yield fd
    finally:
        os.close(fd)


def _too_large() -> IntegrityError:
    return IntegrityError(
        "the image holds more than its manifest says",
        hint="image and manifest do not belong together: pack again",
    )


class _Checksum:
    """The CRC-32 of the bytes of an image."""

    def __init__(self, expected: int) -> None:
        self._expected = expected
        self._crc32 = 0

    def update(self, data: Data) -> None:
        """Take in the next bytes of the image."""
        self._crc32 = sums.crc32(data, self._crc32)

    def check(self) -> None:
        """Compare, when all of the image was taken in."""
        if self._crc32 != self._expected:
            raise IntegrityError(
                f"the image has CRC-32 {self._crc32:08x}, expected was {self._expected:08x}",
                hint="it was damaged on the way or replaced: stage or pack it again",
            )


def _unpack_all(
    fd: int,
    unpacker: _Unpacker,
    done: _Report,
    checksum: _Checksum,
    workers: int,
    progress: Callable[[int], None] | None,
) -> None:
    """Read every frame into a free slot of shared memory, have it summed and unpacked from there.

    So what is summed up is what is extracted, whoever changes the file meanwhile.
    """
    frames = unpacker.index.frames
    workers = max(1, min(workers, len(frames), MAX_WORKERS))
    free = list(range(2 * workers + 1))
    slot_size = max(compressed for compressed, _ in frames)
    memory = memoryview(mmap.mmap(-1, len(free) * slot_size))
    busy: set[int] = set()

    def frame(number: int, slot: int) -> memoryview:
        return memory[slot * slot_size : slot * slot_size + frames[number][0]]

    def unpack(number: int, slot: int) -> dict[str, Any]:
        return unpacker.unpack(number, frame(number, slot))

    def collect() -> None:
        for number, slot, report in pool.results():
            done.add(number, report)
            busy.remove(slot)
            free.append(slot)

    with Workers(workers, unpack) as pool:
        offset = 0
        for number in range(len(frames)):
            while not free:
                collect()
            slot = free.pop()
            view = frame(number, slot)
            read_into(fd, offset, view)
            busy.add(slot)
            pool.submit(number, slot)
            checksum.update(view)
            offset += len(view)
            if progress is not None:
                progress(len(view))
        while busy:
            collect()


class _Report:
    """What the workers have done, and whether it is within what is allowed."""

    def __init__(self, index: Index, max_files: int, max_bytes: int) -> None:
        self.files = 0
        self.bytes = 0
        self.directories: dict[str, tuple[int, int]] = {}
        self.spans: list[Member] = []
        self._index = index
        self._max_files = max_files
        self._max_bytes = max_bytes
        self._parents: set[str] = set()
        self._links: dict[int, list[Member]] = {}
        self._begun: dict[Piece, Member] = {}

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
            piece = Piece(number + 1, offset, member.size, os.fsencode(member.path))
            self._begun[piece] = member

    def check(self) -> None:
        """Compare the reports on all frames with each other and with the index."""
        orphans = self._parents - self.directories.keys() - {""}
        if orphans:
            raise IntegrityError(f"refused tar stream: {min(orphans)!r} is no directory of it")
        first: dict[bytes, Piece] = {}
        for piece in self._index.pieces:
            first.setdefault(piece.path, piece)
        if set(first.values()) != self._begun.keys():
            raise bad_index("it does not know the members that go on in further frames")
        self.spans = list(self._begun.values())

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
        """Open a file that exists, for writing."""
        directory, _, name = path.rpartition("/")
        return os.open(name, _OLD_FILE, dir_fd=self.directory(directory))

    def __enter__(self) -> _Tree:
        return self

    def __exit__(self, *_: object) -> None:
        self.directory("")  # closes all the others


class _Unpacker:
    """Makes files of frames. Used by the workers; the parent only prepares for them."""

    def __init__(self, index: Index, root: int, destination: str) -> None:
        self.index = index
        self._destination = destination
        self._pieces = {piece.frame: piece for piece in index.pieces}
        self._root = root
        self._tree = _Tree(root)
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_FRAME)

    def prepare(self) -> None:
        """Create the files that several workers will write to."""
        with _Tree(self._root) as tree:
            for path in {os.fsdecode(piece.path) for piece in self.index.pieces}:
                directory, _, name = path.rpartition("/")
                parent = tree.directory(directory, create=True)
                try:
                    os.close(os.open(name, _NEW_FILE, 0o600, dir_fd=parent))
                except FileExistsError:
                    raise bad_index(f"{path!r} is a file and a directory") from None

    def unpack(self, number: int, frame: memoryview) -> dict[str, Any]:
        """Write what is in a frame, and tell what the parent has to know of it."""
        data = self._decompress(number, frame)
        piece = self._pieces.get(number)
        try:
            if piece is not None:
                return self._continue(piece, data)
            return self._members(data, last=number == len(self.index.frames) - 1)
        except OSError as error:
            doing = f"extract to {self._destination}"
            raise fsutil.explain(error, doing, blame=NODE) from error

    def _decompress(self, number: int, frame: memoryview) -> bytes:
        size = self.index.frames[number][1]
        try:
            if frame[:4] != FRAME_MAGIC:
                raise IntegrityError(f"frame {number} of the image is not a zstd frame")
            told = zstandard.get_frame_parameters(frame)
            if told.content_size != size or told.window_size > MAX_FRAME:
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
        directories, links, span = [], [], None
        parents = set()
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
                    self._write_piece(path, 0, piece)
                else:
                    parent = self._tree.directory(directory, create=True)
                    self._create(member, parent, name, piece)
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
        }

    def _create(self, member: Member, parent: int, name: str, content: Data) -> None:
        try:
            fd = os.open(name, _NEW_FILE, member.mode & 0o777, dir_fd=parent)
        except FileExistsError:
            raise _duplicate(member.path) from None
        try:
            write_all(fd, content)
            os.utime(fd, (member.mtime, member.mtime))
        finally:
            os.close(fd)

    def _continue(self, piece: Piece, data: bytes) -> dict[str, Any]:
        path = os.fsdecode(piece.path)
        view = memoryview(data)[: piece.size - piece.offset]
        if data[len(view) :].strip(b"\0"):
            raise IntegrityError("malformed tar stream: padding is not zeros")
        self._write_piece(path, piece.offset, view)
        return {
            "files": 0, "bytes": 0, "directories": [], "links": [], "parents": [], "span": None,
        }  # fmt: skip

    def _write_piece(self, path: str, offset: int, view: memoryview) -> None:
        try:
            fd = self._tree.file(path)
        except FileNotFoundError:
            raise bad_index(f"it does not know that {path!r} goes on in further frames") from None
        try:
            os.lseek(fd, offset, os.SEEK_SET)
            write_all(fd, view)
        finally:
            os.close(fd)


def _finish(done: _Report, root: int, allowed_links: Callable[[str, str], bool]) -> None:
    """All that must not happen while workers create files: links, and what they may not change."""
    done.check()
    with _Tree(root) as tree, _Tree(root) as targets:
        for member in done.spans:
            fd = tree.file(member.path)
            try:
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
    member: Member, allowed: Callable[[str, str], bool], parent: int, name: str
) -> None:
    path, target = member.path, member.target
    if not (tarstream.stays_inside(path, target) or allowed(path, target)):
        raise IntegrityError(f"refused link {path!r}: {target!r} leads out of the tree")
    os.symlink(target, name, dir_fd=parent)


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
