"""Prefixes in compiled files: nothing moves, nothing is lost, what does not fit stays."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stager.rewriting import prefix
from stager.rewriting.relocate import Move, Relocation

pytestmark = pytest.mark.unit

PLACEHOLDER = b"/build/" + b"placehold_" * 5
NAMES = st.text(st.sampled_from("abcxyz"), min_size=3, max_size=10)
PATHS = st.lists(NAMES, min_size=2, max_size=4).map(lambda names: "/" + "/".join(names))
# A package's file: bytes, with the placeholder in some of its strings, several times in one.
STRINGS = st.lists(
    st.lists(st.sampled_from([PLACEHOLDER, b"/lib", b":", b"-L", b"\xff\xfe", b"x"]), max_size=5),
    max_size=6,
).map(lambda strings: b"\0".join(b"".join(parts) for parts in strings) + b"\0")


def installed(data: bytes, new: bytes) -> bytes:
    """What an installer makes of a file, written as plainly as can be (conda's convention)."""

    def put(match: re.Match[bytes]) -> bytes:
        string = match[0].replace(PLACEHOLDER, new)
        return string + b"\0" * (len(match[0]) - len(string))

    return re.sub(re.escape(PLACEHOLDER) + rb"[^\0]*\0", put, data)


def moved(data: bytes, old: str, new: str, *, certain: bool) -> tuple[bytes, int]:
    return Relocation([Move(old, new)]).strings(data, certain=certain)


@given(STRINGS, PATHS, PATHS)
def test_moving_is_as_good_as_installing_there(data: bytes, old: str, new: str) -> None:
    """Also where the new prefix is longer than the old one: as far as the placeholder reached."""
    once = installed(data, old.encode())
    assert moved(once, old, new, certain=True) == (installed(data, new.encode()), 0)


@given(STRINGS, PATHS, PATHS, PATHS)
def test_moving_twice_is_moving_once(data: bytes, old: str, middle: str, new: str) -> None:
    once, _ = moved(installed(data, old.encode()), old, middle, certain=True)
    twice, _ = moved(once, middle, new, certain=True)
    assert twice == installed(data, new.encode())


@given(STRINGS, PATHS, PATHS)
def test_where_nothing_is_certain_no_string_grows(data: bytes, old: str, new: str) -> None:
    before = installed(data, old.encode())
    after, _ = moved(before, old, new, certain=False)
    assert len(after) == len(before)
    if len(new) > len(old):
        assert after == before
    # What is beyond a string's end is never written to.
    at = [match.start() for match in re.finditer(rb"\0", before)]
    assert all(after[one] == 0 for one in at)


@given(STRINGS, PATHS, st.lists(st.integers(1, 40), min_size=1))
def test_in_pieces_as_in_one(data: bytes, new: str, sizes: list[int]) -> None:
    relocation = Relocation([Move("/old/env", new)])
    data = installed(data, b"/old/env")
    pieces = prefix.whole_strings(_cut(data, sizes), relocation.needles)
    streamed = b"".join(relocation.strings(piece, certain=True)[0] for piece in pieces)
    assert streamed == relocation.strings(data, certain=True)[0]


def _cut(data: bytes, sizes: list[int]) -> Iterator[memoryview]:
    buffer = bytearray(max(sizes))  # the same one for each piece, as when reading
    at = number = 0
    while at < len(data):
        size = sizes[number % len(sizes)]
        piece = data[at : at + size]
        buffer[: len(piece)] = piece
        yield memoryview(buffer)[: len(piece)]
        at, number = at + size, number + 1


@pytest.mark.parametrize("filler", [b"x", b"\0", b"\x90\0"])
def test_little_is_held_back(filler: bytes) -> None:
    """Of a file of many megabytes, whatever it is filled with."""
    relocation = Relocation([Move("/old/environment", "/new")])
    block = filler * (1 << 16)
    blocks = [block] * 60 + [b"\0/old/environment/lib" + b"\0" * 9] + [block] * 60
    longest = 0
    seen = bytearray()
    for piece in prefix.whole_strings(iter(blocks), relocation.needles):
        longest = max(longest, len(piece))
        seen += relocation.strings(piece, certain=True)[0]
    assert longest <= prefix.LONGEST + 2 * len(block)
    assert bytes(seen) == b"".join(blocks).replace(
        b"/old/environment/lib", b"/new/lib".ljust(len(b"/old/environment/lib"), b"\0")
    )


def test_a_string_without_an_end_is_left() -> None:
    assert moved(b"\x7fELF /old/env/lib", "/old/env", "/n", certain=True) == (
        b"\x7fELF /old/env/lib",
        1,
    )


def test_no_room() -> None:
    """An edited file may have lost its padding: then nothing is overwritten."""
    data = b"/old/env/lib\0\0next\0"
    assert moved(data, "/old/env", "/old/envx", certain=True)[0] == b"/old/envx/lib\0next\0"
    assert moved(data, "/old/env", "/old/envxy", certain=True) == (data, 1)
    assert moved(data, "/old/env", "/old/envx", certain=False) == (data, 1)


def test_boundaries_count_only_where_nothing_is_certain() -> None:
    data = b"-isystem/old/env/include\0/old/env2\0"
    assert moved(data, "/old/env", "/new/env", certain=False) == (data, 0)
    assert moved(data, "/old/env", "/new/env", certain=True)[0] == (
        b"-isystem/new/env/include\0/new/env2\0"
    )


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_wide_text(encoding: str) -> None:
    relocation = Relocation([Move("/old/env", "/elsewhere/new")])
    before, after = "\ufeffcafé=/old/env/lib\n", "\ufeffcafé=/elsewhere/new/lib\n"
    assert relocation.wide_text(before.encode(encoding)) == after.encode(encoding)
    odd = before.encode(encoding) + b"\xd8"
    assert relocation.wide_text(odd) == odd


OLD = "/home/ada/envs/torch"


@pytest.mark.parametrize(
    ("string", "changed"),
    [
        (f"{OLD}/lib/x.so", True),
        (f"{OLD}/lib:{OLD}/lib64", True),
        (f"{OLD}2/lib", False),
        (f"{OLD}/lib not found", False),  # a message; there may be another string behind it
        (f"error: {OLD}/lib", False),
        (f"one{OLD}/lib", False),
    ],
)
def test_undeclared_strings_change_where_they_are_paths(string: str, changed: bool) -> None:
    data = b"\1\0" + string.encode() + b"\0after\0"
    found, left = Relocation([Move(OLD, "/tmp/s/envs/0123")]).strings(data)
    if changed:
        text = string.replace(OLD, "/tmp/s/envs/0123").encode()
        assert found == b"\1\0" + text.ljust(len(string), b"\0") + b"\0after\0"
    else:
        assert found == data
        assert left == (1 if f" {OLD}/" in string or f"{OLD}/lib " in string else 0)


def test_an_equally_long_path_fits_anywhere() -> None:
    other = "/node/ada/envs/torch"
    data = f"see {OLD}/lib, or".encode()
    assert len(other) == len(OLD)
    changed, left = Relocation([Move(OLD, other)]).strings(data + b"\0")
    assert (changed, left) == (f"see {other}/lib, or".encode() + b"\0", 0)
