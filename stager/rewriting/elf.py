"""What an ELF file asks of the machine and of its neighbours, and moving its run path.

Only little-endian 64-bit files are parsed: every machine that staged environments run on today.
Field layouts: the System V ABI, chapters 4 and 5, and the GNU symbol versioning extension.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator
from typing import Callable, NamedTuple

MAGIC = b"\x7fELF\x02\x01"

_PT_LOAD, _PT_DYNAMIC, _PT_INTERP = 1, 2, 3
_DT_NEEDED, _DT_STRTAB, _DT_SONAME, _DT_RPATH, _DT_RUNPATH = 1, 5, 14, 15, 29
_DT_VERNEED, _DT_VERNEEDNUM = 0x6FFFFFFE, 0x6FFFFFFF
_DT_STRING_TAGS = (_DT_NEEDED, _DT_SONAME, _DT_RPATH, _DT_RUNPATH)
_SHT_DYNSYM = 11
_ORIGIN = re.compile(r"\$ORIGIN|\$\{ORIGIN\}")
_MAX_OFFSET = 1 << 62

Read = Callable[[int, int], bytes]
"""``read(offset, length)`` of the file."""


class MalformedError(ValueError):
    """The headers contradict each other or the file's length."""


class Elf(NamedTuple):
    """The parts of an ELF file that moving it depends on.

    Attributes:
        interpreter: the dynamic loader's path, or empty.
        runpath: the RPATH or RUNPATH string, or empty.
        runpath_offset: where that string lies in the file.
        glibc: highest ``GLIBC_x.y`` version asked for as (x, y), or None.
    """

    interpreter: str
    runpath: str
    runpath_offset: int
    glibc: tuple[int, int] | None


class _Dynamic(NamedTuple):
    entries: tuple[tuple[int, int], ...]
    strings: int

    def value(self, tag: int) -> int | None:
        return next((value for key, value in self.entries if key == tag), None)


def reader(fd: int) -> Read:
    """A :data:`Read` over an open file."""
    # Damaged headers ask for offsets that no file has, and pread refuses to be asked.
    return lambda offset, length: os.pread(fd, length, offset) if offset < _MAX_OFFSET else b""


def inspect(read: Read) -> Elf | None:
    """Read what matters of an ELF file.

    Returns:
        None where it is not an ELF file of a kind that is parsed.

    Raises:
        MalformedError: it claims to be one and is damaged.
    """
    if read(0, 6) != MAGIC:
        return None
    try:
        return _inspect(read)
    except (struct.error, IndexError, UnicodeError) as error:
        raise MalformedError(str(error)) from error


def _inspect(read: Read) -> Elf:
    segments = list(_segments(read))
    interpreter = ""
    for kind, offset, _, size in segments:
        if kind == _PT_INTERP:
            interpreter = os.fsdecode(read(offset, min(size, 4096)).rstrip(b"\0"))
    dynamic = _dynamic(read, segments)
    if dynamic is None:
        return Elf(interpreter, "", 0, None)
    runpath, runpath_offset = "", 0
    at = dynamic.value(_DT_RUNPATH) or dynamic.value(_DT_RPATH)
    if at is not None:
        runpath_offset = dynamic.strings + at
        runpath = os.fsdecode(_string(read, runpath_offset))
    return Elf(interpreter, runpath, runpath_offset, _glibc(read, dynamic, segments))


def _segments(read: Read) -> Iterator[tuple[int, int, int, int]]:
    """Yield (type, file offset, address, file size) of the program headers."""
    table, entry_size, count = struct.unpack_from("<Q14xHH", read(32, 26))
    for index in range(count):
        header = read(table + index * entry_size, 56)
        kind, _, offset, address, _, size = struct.unpack_from("<IIQQQQ", header)
        yield kind, offset, address, size


def _dynamic(read: Read, segments: list[tuple[int, int, int, int]]) -> _Dynamic | None:
    for kind, offset, _, size in segments:
        if kind == _PT_DYNAMIC:
            table = read(offset, min(size, 1 << 20))
            entries = tuple(struct.iter_unpack("<QQ", table[: len(table) // 16 * 16]))
            strings = next((value for tag, value in entries if tag == _DT_STRTAB), None)
            if strings is None:
                return None
            return _Dynamic(entries, _to_offset(strings, segments))
    return None


def _to_offset(address: int, segments: list[tuple[int, int, int, int]]) -> int:
    for kind, offset, start, size in segments:
        if kind == _PT_LOAD and start <= address < start + size:
            return offset + address - start
    raise MalformedError(f"address {address:#x} is in no segment")


def _string(read: Read, offset: int) -> bytes:
    data = read(offset, 4096)
    end = data.find(b"\0")
    if end < 0:
        raise MalformedError("a string has no end")
    return data[:end]


def _glibc(
    read: Read, dynamic: _Dynamic, segments: list[tuple[int, int, int, int]]
) -> tuple[int, int] | None:
    highest: tuple[int, int] | None = None
    for name in _needed_versions(read, dynamic, segments):
        text = _string(read, dynamic.strings + name)
        if text.startswith(b"GLIBC_2."):
            parts = text[6:].split(b".")
            if all(part.isdigit() for part in parts):
                version = (int(parts[0]), int(parts[1]))
                highest = max(highest or version, version)
    return highest


def _needed_versions(
    read: Read, dynamic: _Dynamic, segments: list[tuple[int, int, int, int]]
) -> Iterator[int]:
    """Yield where the names of the libraries and versions asked for lie among the strings."""
    start, count = dynamic.value(_DT_VERNEED), dynamic.value(_DT_VERNEEDNUM)
    if start is None or count is None:
        return
    offset = _to_offset(start, segments)
    for _ in range(min(count, 1024)):
        _, versions, library, first, following = struct.unpack("<HHIII", read(offset, 16))
        yield library
        at = offset + first
        for _ in range(versions):
            _, _, _, name, next_version = struct.unpack("<IHHII", read(at, 16))
            yield name
            at += next_version
            if not next_version:
                break
        offset += following
        if not following:
            break


def search_paths(elf: Elf, directory: str) -> Iterator[str]:
    """The absolute directories that the loader searches for a file in ``directory``.

    Entries with tokens other than ``$ORIGIN``, and those relative to wherever a program is started,
    are left out.
    """
    for entry in elf.runpath.split(":"):
        parts = _ORIGIN.split(entry)
        path = directory.join(parts)
        if path.startswith("/") and not any("$" in part for part in parts):
            yield os.path.normpath(path)


def move_runpath(
    elf: Elf, move: Callable[[str], str | None], directory: str, root: str
) -> str | None:
    """Compute a run path for a file's new place.

    Entries that ``move`` knows become relative to ``$ORIGIN``, which is short and right wherever
    the tree lies; others stay.

    Args:
        elf: the file.
        move: gives the new absolute path of an old one, or None where it does not move.
        directory: the new absolute path of the directory the file is in.
        root: the new prefix; entries under it are written relative to the file.

    Returns:
        The new string, or None where nothing changes.
    """
    entries = []
    for entry in elf.runpath.split(":"):
        moved = move(entry) if entry.startswith("/") else None
        if moved is None:
            entries.append(entry)
        elif moved == root or moved.startswith(root + "/"):
            relative = os.path.relpath(moved, directory)
            entries.append("$ORIGIN" if relative == "." else f"$ORIGIN/{relative}")
        else:
            entries.append(moved)
    runpath = ":".join(entries)
    return None if runpath == elf.runpath else runpath


def replace_runpath(data: bytes, elf: Elf, runpath: str) -> bytes | None:
    """Put another run path in the place of the old one, padded with NULs.

    Linkers store a string that is another one's tail only once. Where any other name shares the
    bytes of the run path, replacing it would break that name.

    Returns:
        The new content, or None where the new string is longer or the bytes are shared.
    """
    new, old = os.fsencode(runpath), os.fsencode(elf.runpath)
    try:
        if len(new) > len(old) or _shared(data, elf.runpath_offset, len(old)):
            return None
    except (struct.error, OverflowError, MalformedError):
        return None  # what cannot be read may share them
    start = elf.runpath_offset
    return data[:start] + new.ljust(len(old), b"\0") + data[start + len(old) :]


def _shared(data: bytes, start: int, length: int) -> bool:
    def read(offset: int, size: int) -> bytes:
        return data[offset : offset + size]

    segments = list(_segments(read))
    dynamic = _dynamic(read, segments)
    if dynamic is None:
        return True
    first = start - dynamic.strings
    inside = range(first + 1, first + length)
    if any(tag in _DT_STRING_TAGS and value in inside for tag, value in dynamic.entries):
        return True
    names = (*_needed_versions(read, dynamic, segments), *_symbol_names(data))
    return any(name in inside or name == first for name in names)


def _symbol_names(data: bytes) -> Iterator[int]:
    table, entry_size, count = struct.unpack_from("<Q10xHH", data, 40)
    if not table or not count:
        raise MalformedError("there is no section table")
    for index in range(count):
        at = table + index * entry_size
        kind, _, _, offset, size = struct.unpack_from("<IQQQQ", data, at + 4)
        if kind == _SHT_DYNSYM:
            for symbol in range(offset, offset + size, 24):
                yield struct.unpack_from("<I", data, symbol)[0]
