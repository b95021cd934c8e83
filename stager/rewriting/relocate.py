"""Where old prefixes are baked into bytes, and their replacement. Pure: bytes in, bytes out.

A prefix is replaced in every spelling it is known by, the longest first, and only where it stands
as a path of its own: ``/x/env`` is found in ``/x/env/bin`` and ``-I/x/env``, not in ``/x/env2``
or ``/mnt/x/env``.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Iterable
from typing import Callable, NamedTuple
from urllib.parse import quote

from stager import paths
from stager.errors import UsageError
from stager.rewriting import prefix

# What may follow a prefix for it to be the whole of a path component: anything that cannot go on
# a file name. A dot goes on a name unless it ends a sentence.
_AFTER = rb"(?![A-Za-z0-9_+~%@\x80-\xff-]|\.[A-Za-z0-9_])"
# What may come before: anything that cannot be the end of another path, besides compiler options
# such as -I/x, the escapes \n, \t, \r and \0 of string literals, and the mark that a text in
# Unicode may begin with.
_NOT_BEFORE = rb"[A-Za-z0-9_.+~%\x80-\xff-]"
_BEFORE = (rb"-[A-Z]", rb"\\[ntr0]", rb"\xef\xbb\xbf")

MIN_COMPONENTS = 2
"""A prefix such as ``/opt`` is too common a string to be replaced wherever it stands."""


class Move(NamedTuple):
    """One directory that lies elsewhere after packing.

    Attributes:
        old: absolute path as it may be spelled in files.
        new: absolute path it will have.
    """

    old: str
    new: str


class Relocation:
    """Every move of one layer, ready to be applied to paths and file contents.

    Args:
        moves: the moves; the same directory may appear in several spellings.

    Raises:
        UsageError: an old prefix is the root or a top-level directory.
    """

    def __init__(self, moves: Iterable[Move]) -> None:
        self.moves = sorted(set(moves), key=lambda move: (-len(move.old), move.old))
        table: dict[bytes, bytes] = {}
        for move in self.moves:
            if len([part for part in move.old.split("/") if part]) < MIN_COMPONENTS:
                raise UsageError(
                    f"an environment directly under / cannot be moved safely: {move.old}",
                    hint="so short a path cannot be told from others; put it one level deeper",
                )
            for encode in (os.fsencode, _as_url, _as_json, *_QUOTED):
                old, new = encode(move.old), encode(move.new)
                table.setdefault(old, new)
        self._table = table
        ordered = sorted(table, key=len, reverse=True)
        # One needle is enough for all that begin with it: scanning is the cost of packing.
        self.needles = [
            one
            for one in ordered
            if not any(one != other and one.startswith(other) for other in ordered)
        ]
        # And one that several begin with tells of most files that none of them is there.
        self._scouts = _scouts(self.needles)
        alternatives = b"|".join(map(_as_pattern, ordered))
        self._pattern = re.compile(b"(?:" + alternatives + b")" + _AFTER)
        plain = [os.fsencode(move.old) for move in self.moves]
        self._plain = re.compile(b"|".join(re.escape(old) for old in plain))

    def touches(self, data: bytes | bytearray, end: int | None = None) -> bool:
        """Tell quickly whether any old prefix may be in ``data``; False is certain."""
        for scout, needles in self._scouts:
            at = data.find(scout, 0, end)
            if at >= 0 and (
                data.startswith(needles, at, end)
                or any(data.find(needle, at, end) >= 0 for needle in needles)
            ):
                return True
        return False

    def found(self, data: bytes) -> bool:
        """Tell whether an old prefix stands in ``data`` as a path of its own."""
        # The needles first: a plain search is several times as fast as the pattern.
        return self.touches(data) and self._pattern.search(data) is not None

    def text(self, data: bytes, *, certain: bool = False) -> bytes:
        """Replace every old prefix in a text.

        Args:
            data: the text, in any encoding that has ASCII in it.
            certain: an installer put the prefix wherever it stands, whatever is beside it.
        """
        if not self.touches(data):
            return data
        if certain:
            data = self._plain.sub(self._new, data)
        return self._pattern.sub(self._new, data)

    def wide_text(self, data: bytes) -> bytes:
        """Replace every old prefix in a text of UTF-16 or UTF-32 that begins with its mark."""
        encoding = wide_encoding(data)
        try:
            text = data.decode(encoding).encode()
            new = self.text(text)
            return data if new == text else new.decode().encode(encoding)
        except UnicodeError:
            return data

    def strings(self, data: bytes, *, certain: bool = False) -> tuple[bytes, int]:
        """Replace every old prefix in the C strings of a compiled file; its length stays.

        Args:
            data: the file, or a part of it that begins and ends between strings.
            certain: an installer put the prefix there and left padding behind it.

        Returns:
            The new content, and how many strings have no room for the new prefix.
        """
        if not self.touches(data):
            return data, 0
        find = self._plain if certain else self._pattern
        return prefix.replace(data, find, self._new, grow=certain)

    def _new(self, match: re.Match[bytes]) -> bytes:
        return self._table[match.group()]

    def path(self, path: str) -> str | None:
        """The new place of an absolute path, or None where it does not move."""
        for move in self.moves:
            if path == move.old:
                return move.new
            if path.startswith(move.old + "/"):
                return move.new + path[len(move.old) :]
        return None


def _scouts(needles: Iterable[bytes]) -> list[tuple[bytes, tuple[bytes, ...]]]:
    """What needles begin with, at least two directories of it, and those needles."""
    groups: dict[bytes, list[bytes]] = {}
    for needle in needles:
        groups.setdefault(b"/".join(needle.split(b"/")[:3]), []).append(needle)
    scout = os.path.commonprefix  # of bytes, be they whole names or not
    return [(scout(group) or b"", tuple(group)) for group in groups.values()]  # typed as if none


def _as_pattern(old: bytes) -> bytes:
    """A pattern of an old prefix and of what is before it.

    It begins with the prefix and looks back from its end: what begins with a literal is searched
    for a hundred times as fast, which makes seconds in a compiled file.
    """
    old = re.escape(old)
    allowed = b"|".join(b"(?<=" + before + old + b")" for before in _BEFORE)
    return old + b"(?:(?<!" + _NOT_BEFORE + old + b")|" + allowed + b")"


def _as_url(path: str) -> bytes:
    return quote(os.fsencode(path)).encode()


def _as_json(path: str) -> bytes:
    return json.dumps(path)[1:-1].encode(errors="surrogateescape")


def _quoting(escape: str) -> Callable[[str], bytes]:
    return lambda path: os.fsencode(path.replace("'", escape))


# How activation scripts write an apostrophe: shlex.quote, other POSIX shells and csh, fish.
_QUOTED = (_quoting("'\"'\"'"), _quoting("'\\''"), _quoting("\\'"))


def wide_encoding(data: bytes) -> str:
    """The encoding of a text that begins with the mark of UTF-16 or UTF-32, or empty."""
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return encoding
    return ""


# Longest first: that of UTF-16 is the beginning of another. The codecs named do not eat the mark.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def is_binary(data: bytes) -> bool:
    """Tell whether a file's content is binary; text in this sense has no NUL byte."""
    return b"\0" in data


def rewrite_config(data: bytes, values: dict[str, str]) -> bytes:
    """Set keys of a ``pyvenv.cfg``, keeping every other line and their order.

    A value may contain ``=``: only the first one on a line separates.
    """
    lines = []
    for line in data.decode("utf-8", "surrogateescape").splitlines():
        key = line.partition("=")[0].strip().lower()
        lines.append(f"{key} = {values[key]}" if key in values and "=" in line else line)
    return ("\n".join(lines) + "\n").encode("utf-8", "surrogateescape")


def rewrite_archive(data: bytes, relocation: Relocation) -> bytes:
    """Rewrite the interpreter line that may stand before a zip: zipapp, pex, shiv.

    A reader finds what is in a zip from its end, so what stands before it may change its length.
    """
    head, start, rest = data.partition(b"PK\3\4")
    if not (start and head.startswith(b"#!")):
        return data
    return relocation.text(head) + start + rest


def shebang(data: bytes) -> str:
    """The interpreter a script names, through the trampolines that installers write, or empty.

    Recognised: ``#!/path/python``, ``#!/usr/bin/env -S /path/python``, and ``#!/bin/sh`` before a
    line ``'''exec' path "$0" "$@"`` in the dialects of distlib and pip (bare or quoted) and conda
    (quoted).
    """
    if not data.startswith(b"#!"):
        return ""
    first, _, rest = data[:4096].partition(b"\n")
    words = first[2:].split()
    if not words:
        return ""
    if words[0] == b"/bin/sh" and rest.startswith(b"'''exec' "):
        target = rest.partition(b"\n")[0][len(b"'''exec' ") :]
        quoted = re.match(rb"\"([^\"]+)\"|'([^']+)'", target)
        word = (quoted[1] or quoted[2]) if quoted else target.split(b" ")[0]
        return os.fsdecode(word)
    if words[0].endswith(b"/env"):  # which may have options and variables before the program
        named = (word for word in words[1:] if not re.match(rb"-|\w+=", word))
        return os.fsdecode(next(named, words[0]))
    return os.fsdecode(words[0])


def rewrite_paths(data: bytes, directory: str, relocation: Relocation) -> bytes:
    """Rewrite the path lines of a ``.pth`` or ``.egg-link`` file.

    A relative line is relative to the file's directory; one that leads out of what moves becomes
    absolute, one that leads elsewhere inside is followed to its new place. Lines that begin with
    ``import`` are code and treated as text.

    Args:
        data: the file.
        directory: where the file lies now.
        relocation: the moves.
    """
    lines = []
    for line in data.decode("utf-8", "surrogateescape").splitlines(keepends=True):
        text = paths.of_pth_line(line)
        if not text:
            lines.append(relocation.text(os.fsencode(line)))
            continue
        absolute = os.path.normpath(os.path.join(directory, text))
        moved = relocation.path(absolute)
        inside = not text.startswith("/") and _common(relocation, directory, absolute)
        if inside:
            lines.append(os.fsencode(line))
        else:
            lines.append(os.fsencode(line.replace(text, moved or absolute)))
    return b"".join(lines)


def _common(relocation: Relocation, directory: str, target: str) -> bool:
    """Tell whether two old paths move together, so that the way between them stays the same."""
    for move in relocation.moves:
        if f"{directory}/".startswith(f"{move.old}/"):
            return f"{target}/".startswith(f"{move.old}/")
    return False
