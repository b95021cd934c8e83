"""The one tar dialect stager writes and reads: a header per member, and nothing left to chance.

It is GNU tar's format with owner 0:0 and no owner names, so that every tar program reads it, and
a member has exactly one encoding: names longer than 100 bytes go into ``L`` and ``K`` records,
sizes from 8 GiB on are base-256, everything else is octal. Because the encoding is unique, the
reader does not validate field by field: it decodes a header, encodes the result again and
compares. Whatever differs (a PAX header, a device, a foreign owner, rubbish behind a name) is
refused.

``tarfile`` is not used for either direction: it costs several times more per member than creating
the file does, and it accepts far more than we want to extract (``docs/formats/tar-zst.md``).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import NamedTuple

from stager.errors import IntegrityError, UsageError

FILE = "file"
DIR = "dir"
SYMLINK = "symlink"
HARDLINK = "hardlink"

BLOCK = 512
TRAILER = bytes(2 * BLOCK)
"""What ends the archive: two blocks of zeros."""

MAX_PATH = 4095
"""Longest path or link target in bytes: Linux' PATH_MAX less the NUL."""
MAX_NAME = 255
"""Longest path component in bytes (NAME_MAX)."""
MAX_DEPTH = 128
"""Most components in a path: the extractor holds one descriptor open for each."""
MAX_MTIME = 2**32 - 1
"""Last second squashfs and .pyc files can express; mtimes are clamped to it."""
MAX_HEADER = 3 * BLOCK + 2 * (MAX_PATH // BLOCK + 1) * BLOCK
"""Most bytes :func:`header` returns: both long records, with their data, and the header."""

_ENCODING = sys.getfilesystemencoding()  # as os.fsencode, at half its price
_TYPES = {FILE: b"0", HARDLINK: b"1", SYMLINK: b"2", DIR: b"5"}
_KINDS = {flag[0]: kind for kind, flag in _TYPES.items()}
_LONG_NAME = ord("L")
_LONG_LINK = ord("K")
_OCTAL_SIZES = 8**11  # eleven octal digits
_OWNER = b"0000000\0" * 2
_MAGIC = b"ustar  \0"
# Magic, empty owner and group name, device numbers and the unused rest of the block.
_TAIL = _MAGIC + bytes(BLOCK - 257 - len(_MAGIC))
# The checksum field itself counts as eight blanks.
_FIXED_SUM = sum(_MAGIC) + 8 * ord(" ")


class Member(NamedTuple):
    """One entry of an archive.

    Args:
        path: relative, ``/``-separated, without a trailing slash; ``.`` is the root of the tree.
            Bytes that are not text are surrogate-escaped as :func:`os.fsdecode` does.
        kind: :data:`FILE`, :data:`DIR`, :data:`SYMLINK` or :data:`HARDLINK`.
        mode: permission bits; anything but the lower twelve is dropped.
        mtime: seconds since the epoch, clamped to 0 .. :data:`MAX_MTIME`.
        size: bytes of data that follow; 0 for everything but files.
        target: what a symbolic link says, or the path of the member a hard link repeats.
    """

    path: str
    kind: str
    mode: int
    mtime: int
    size: int = 0
    target: str = ""


def header(member: Member) -> bytes:
    """Return the bytes that announce ``member``: the header and any long-name records before it.

    Raises:
        UsageError: the path or target cannot be in an image (see :func:`path_problem`).
    """
    name = member.path.encode(_ENCODING, "surrogateescape")
    link = member.target.encode(_ENCODING, "surrogateescape")
    problem = path_problem(name, member.kind)
    if link or member.kind != FILE:
        problem = problem or _target_problem(link, member.kind)
    if problem:
        raise UsageError(
            f"{member.path!r} cannot be packed: it {problem}",
            hint="exclude or rename it",
        )
    mtime = min(max(int(member.mtime), 0), MAX_MTIME)
    size = member.size if member.kind == FILE else 0
    return _render(name, member.kind, member.mode & 0o7777, mtime, size, link)


def padding(size: int) -> bytes:
    """Return the zeros that follow ``size`` bytes of data to fill the last block."""
    return bytes(-size % BLOCK)


def path_problem(name: bytes, kind: str) -> str:
    """Say what is wrong with a member's path, as the rest of a sentence; "" if nothing is.

    One rule for both directions, so that nothing can be packed which will not be extracted.
    """
    if not name:
        return "has no name"
    if name == b".":
        return "" if kind == DIR else "stands for the root but is no directory"
    if name.startswith(b"/"):
        return "is absolute"
    if len(name) > MAX_PATH - 1:  # room for the slash of a directory
        return f"is longer than {MAX_PATH - 1} bytes"
    parts = name.split(b"/")  # faster than to search for what must not be between two slashes
    if b"" in parts or b"." in parts or b".." in parts:
        return "has an empty, '.' or '..' component"
    if b"\0" in name:
        return "has a NUL byte"
    if len(parts) > MAX_DEPTH:
        return f"is deeper than {MAX_DEPTH} directories"
    if len(name) > MAX_NAME and max(map(len, parts)) > MAX_NAME:
        return f"has a component longer than {MAX_NAME} bytes"
    return ""


def _target_problem(link: bytes, kind: str) -> str:
    if kind == SYMLINK:
        if not link:
            return "has no target"
        if len(link) > MAX_PATH:
            return f"has a target longer than {MAX_PATH} bytes"
        return "has a target with a NUL byte" if b"\0" in link else ""
    if kind == HARDLINK:
        problem = path_problem(link, kind)
        return f"has a target that {problem}" if problem else ""
    return "has a target but is no link" if link else ""


def stays_inside(path: str, target: str) -> bool:
    """Tell whether a symbolic link cannot lead out of the tree.

    True only for ``..`` components that come first and are no more than the directories above
    the link, then plain names. A ``..`` behind a name is refused even where it looks harmless:
    the name may itself be a link, and then the kernel goes up from where *that* leads.

    Args:
        path: the link's own path within the tree; all its parents are real directories.
        target: what the link says.
    """
    if not target or target.startswith("/"):
        return False
    parts = [part for part in target.split("/") if part not in ("", ".")]
    ups = 0
    while ups < len(parts) and parts[ups] == "..":
        ups += 1
    return ups <= path.count("/") and ".." not in parts[ups:]


class Reader:
    """Reads an archive of exactly this dialect, in pieces of any size.

    Attributes:
        missing: bytes of data the current member still lacks.
        ended: the end of the archive was read.
    """

    def __init__(self) -> None:
        self.missing = 0
        self.ended = False
        self._member = Member(".", DIR, 0, 0)  # whose data is being read
        self._pad = 0
        self._head = b""  # a header, or the end of the archive, of which more is needed

    @property
    def at_boundary(self) -> bool:
        """True between two members: nothing of a header, of data or of padding is missing."""
        return not (self.missing or self._pad or self._head)

    def feed(self, data: bytes) -> Iterator[tuple[Member, memoryview]]:
        """Yield ``(member, piece)`` for all data there is, in order.

        A member without data comes once, with an empty piece; one whose data ends beyond ``data``
        comes again, with its next piece, from the next call. Pieces are views of ``data``.

        Raises:
            IntegrityError: ``data`` is not this dialect.
        """
        if self._head:
            data, self._head = self._head + data, b""
        view = memoryview(data)
        pos, end = 0, len(data)
        while pos < end:
            if self.missing:
                piece = view[pos : pos + self.missing]
                pos += len(piece)
                self.missing -= len(piece)
                yield self._member, piece
            elif self._pad:
                fill = data[pos : pos + self._pad]
                if fill.strip(b"\0"):
                    raise IntegrityError("malformed tar stream: padding is not zeros")
                pos += len(fill)
                self._pad -= len(fill)
            elif self.ended:
                raise IntegrityError("malformed tar stream: data behind its end")
            else:
                stop = pos + _header_size(data, pos)
                if stop > end:
                    self._head = data[pos:]
                    return
                raw = data[pos:stop]
                pos = stop
                if raw == TRAILER:
                    self.ended = True
                    continue
                self._member = member = _decode(raw)
                self.missing = member.size
                self._pad = -member.size % BLOCK
                if not member.size:
                    yield member, view[:0]


def _render(name: bytes, kind: str, mode: int, mtime: int, size: int, link: bytes) -> bytes:
    """The one encoding of a member whose fields are known to be good."""
    if kind == DIR:
        name += b"/"
    if len(name) <= 100 and len(link) <= 100:
        return _block(name, mode, size, mtime, _TYPES[kind], link)
    # The order (link record, then name record) is GNU tar's own.
    return b"".join(
        (
            _long(b"K", link) if len(link) > 100 else b"",
            _long(b"L", name) if len(name) > 100 else b"",
            _block(name[:100], mode, size, mtime, _TYPES[kind], link[:100]),
        )
    )


def _block(name: bytes, mode: int, size: int, mtime: int, flag: bytes, link: bytes) -> bytes:
    length = b"%011o\0" % size if size < _OCTAL_SIZES else b"\x80" + size.to_bytes(11, "big")
    fields = b"%07o\0%b%b%011o\0" % (mode, _OWNER, length, mtime)
    # Summing what is not zero is several times faster than summing the finished block.
    total = sum(name) + sum(fields) + flag[0] + sum(link) + _FIXED_SUM
    return b"%b%b%06o\0 %b%b%b" % (
        name.ljust(100, b"\0"),
        fields,
        total,
        flag,
        link.ljust(100, b"\0"),
        _TAIL,
    )


def _long(flag: bytes, text: bytes) -> bytes:
    """A record whose data is a name too long for the header that follows it."""
    size = len(text) + 1
    return _block(b"././@LongLink", 0o644, size, 0, flag, b"") + text + b"\0" + padding(size)


def _header_size(data: bytes, start: int) -> int:
    """How many bytes the header at ``start`` needs, as far as can be seen of it."""
    size = 0
    while len(data) >= start + size + BLOCK:
        flag = data[start + size + 156]
        if flag in (_LONG_NAME, _LONG_LINK):
            length = _number(data, start + size + 124, 12)
            if length > MAX_PATH + 1 or size > MAX_HEADER:
                raise IntegrityError("malformed tar stream: a name is too long")
            size += BLOCK + length + -length % BLOCK
        elif not flag and not size and not data[start]:
            return len(TRAILER)
        else:
            break
    return size + BLOCK


def _number(raw: bytes, start: int, width: int) -> int:
    if raw[start] == 0x80:
        return int.from_bytes(raw[start + 1 : start + width], "big")
    try:
        number = int(raw[start : start + width - 1], 8)
    except ValueError:
        number = -1
    if number < 0:  # encoded again, a sign comes out as it went in
        raise IntegrityError("malformed tar stream: a number is not octal")
    return number


def _decode(raw: bytes) -> Member:
    """The member that ``raw``, a complete header with its long records, announces."""
    base = len(raw) - BLOCK
    name = raw[base : base + 100].rstrip(b"\0")
    link = raw[base + 157 : base + 257].rstrip(b"\0")
    pos = 0
    while pos < base:
        size = _number(raw, pos + 124, 12)
        if raw[pos + 156] == _LONG_NAME:
            name = raw[pos + BLOCK : pos + BLOCK + size - 1]
        else:
            link = raw[pos + BLOCK : pos + BLOCK + size - 1]
        pos += BLOCK + size + -size % BLOCK
    path = name.decode(_ENCODING, "surrogateescape")
    flag = raw[base + 156]
    kind = _KINDS.get(flag)
    if kind is None:
        raise IntegrityError(
            f"refused tar member {path!r}: type {chr(flag)!r} is no file, directory or link"
        )
    if kind == DIR and name[-1:] == b"/":
        name, path = name[:-1], path[:-1]
    mode = _number(raw, base + 100, 8)
    mtime = _number(raw, base + 136, 12)
    size = _number(raw, base + 124, 12) if kind == FILE else 0
    problem = path_problem(name, kind) or _target_problem(link, kind)
    if problem:
        raise IntegrityError(f"refused tar member {path!r}: it {problem}")
    if mode > 0o7777 or mtime > MAX_MTIME or _render(name, kind, mode, mtime, size, link) != raw:
        raise IntegrityError(f"malformed tar stream: the header of {path!r} is not ours")
    return Member(path, kind, mode, mtime, size, link.decode(_ENCODING, "surrogateescape"))
