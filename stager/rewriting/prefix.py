"""Replacing prefixes in compiled files, whose length must not change. Pure: bytes in, bytes out.

A compiled file has its strings as C has them, ended by a NUL. A shorter string is padded with NULs;
a longer one may grow only into NULs that are known to be padding, as those are which an installer
left when it replaced a placeholder (conda's convention, which leaves one byte of the placeholder's
255 for each byte that the prefix is shorter).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Callable, Union

LONGEST = 1 << 20
"""A longer string is not collected from its pieces, and so not replaced."""

_NULS = re.compile(rb"\0*")
_PATHS = re.compile(rb"[^\0-\x20\x7f]{1,4096}")

Piece = Union[bytes, memoryview]


def replace(
    data: bytes, find: re.Pattern[bytes], new: Callable[[re.Match[bytes]], bytes], *, grow: bool
) -> tuple[bytes, int]:
    """Replace matches in the C strings of a compiled file.

    Args:
        data: the file, or a part of it that begins and ends between strings.
        find: what to replace, wherever in a string, as often as it is there.
        new: gives the replacement of a match.
        grow: an installer put the paths there; the NULs behind a string are padding, all but one.
            Otherwise only strings that look like nothing but paths change: compilers of languages
            whose strings know their length put one behind the other, without a NUL.

    Returns:
        As many bytes as there were, and how many strings do not fit and were left as they are.
    """
    result: bytearray | None = None
    left = 0
    match = find.search(data)
    while match is not None:
        start, end = match.start(), data.find(b"\0", match.start())
        if end < 0:  # no string of C
            return (data if result is None else bytes(result)), left + 1
        string = data[start:end]
        changed = find.sub(new, string)
        room = _nuls_end(data, end) - 1 if grow else end
        alone = grow or (data[start - 1 : start] in (b"", b"\0") and _PATHS.fullmatch(string))
        if len(changed) > room - start or not (alone or len(changed) == len(string)):
            left += 1
        else:
            if result is None:
                result = bytearray(data)
            changed = changed.ljust(len(string), b"\0")
            result[start : start + len(changed)] = changed
        match = find.search(data, end)
    return (data if result is None else bytes(result)), left


def _nuls_end(data: bytes, start: int) -> int:
    match = _NULS.match(data, start)
    assert match is not None  # no NUL at all matches as well
    return match.end()


def whole_strings(pieces: Iterable[Piece], needles: Sequence[bytes]) -> Iterator[bytes]:
    """Cut a stream anew, so that no string with a needle in it, nor its padding, is cut in two.

    What is held back is at most :data:`LONGEST` and a piece.

    Args:
        pieces: the file, in order; a buffer may be used again once the next piece is asked for.
        needles: what will be searched for.
    """
    # A few bytes more than an unfinished needle: what stands before one may matter.
    overlap = max(map(len, needles)) + 8
    held = b""
    for piece in pieces:
        held = b"".join((held, piece))
        cut = _cut(held, needles, overlap)
        if cut:
            yield held[:cut]
            held = held[cut:]
    yield held


def _cut(data: bytes, needles: Sequence[bytes], overlap: int) -> int:
    """How much of a stream can be handed on when no more than ``data`` of it is known."""
    last = max(data.rfind(needle) for needle in needles)
    usual = max(0, len(data) - overlap)
    if last < 0:
        return usual
    end = data.find(b"\0", last)
    if end >= 0:
        end = _nuls_end(data, end)
        if end < len(data):
            return max(usual, end)
    start = data.rfind(b"\0", 0, last) + 1
    return start if len(data) - start <= LONGEST else usual
