"""Prefixes in compiled files: what fits is replaced, and nothing else moves."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stager import prefix
from stager.relocate import Move, Relocation

pytestmark = pytest.mark.unit

OLD, SHORT = "/home/ada/envs/torch", "/tmp/s/envs/0123"
LONG = "/tmp/stager-1000/envs/0123456789abcdef"
PLACEHOLDER = 255


def installed(*strings: str) -> bytes:
    """C strings in which an installer put `OLD` in place of its placeholder."""
    found = b""
    for one in strings:
        data = one.encode()
        padding = data.count(OLD.encode()) * (PLACEHOLDER - len(OLD))
        found += data + bytes(padding) + b"\0"
    return found


@pytest.mark.parametrize("new", [SHORT, LONG])
def test_declared_strings_use_the_padding(new: str) -> None:
    strings = (f"{OLD}/lib", "between", f"-L{OLD}/lib -I{OLD}/include", f"{OLD}:{OLD}/x:{OLD}")
    data = b"\x7fELF\1\0" + installed(*strings) + b"\xff\0"
    changed, left = Relocation([Move(OLD, new)]).strings(data, certain=True)
    assert (len(changed), left) == (len(data), 0)
    assert [one for one in changed.split(b"\0") if one][1:-1] == [
        one.replace(OLD, new).encode() for one in strings
    ]
    for word in (b"between", b"\xff"):
        assert changed.index(word) == data.index(word)


def test_what_does_not_fit_is_left_and_counted() -> None:
    data = f"{OLD}/lib".encode() + b"\0next\0"
    assert Relocation([Move(OLD, LONG)]).strings(data, certain=True) == (data, 1)


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
    found, left = Relocation([Move(OLD, SHORT)]).strings(data)
    if changed:
        text = string.replace(OLD, SHORT).encode()
        assert found == b"\1\0" + text.ljust(len(string), b"\0") + b"\0after\0"
    else:
        assert found == data
        assert left == (1 if f" {OLD}/" in string or f"{OLD}/lib " in string else 0)


def test_undeclared_strings_never_grow() -> None:
    data = b"\0" + f"{OLD}/lib".encode() + bytes(200)
    assert Relocation([Move(OLD, LONG)]).strings(data) == (data, 1)


def test_an_equally_long_path_fits_anywhere() -> None:
    other = "/node/ada/envs/torch"
    data = f"see {OLD}/lib, or".encode()
    assert len(other) == len(OLD)
    changed, left = Relocation([Move(OLD, other)]).strings(data + b"\0")
    assert (changed, left) == (f"see {other}/lib, or".encode() + b"\0", 0)


PIECES = st.lists(
    st.sampled_from([OLD, f"{OLD}/lib", f"{OLD}2", "/home/ada", "x", "\0", "\0" * 240, "-L", ":"])
)


@given(PIECES, st.sampled_from([SHORT, LONG, OLD[::-1].replace("/", "_")]), st.booleans())
def test_nothing_moves(parts: Sequence[str], new: str, certain: bool) -> None:
    """The length stays; so does each string without the path, where it is."""
    data = "".join(parts).encode()
    changed, _ = Relocation([Move(OLD, f"/{new.strip('/')}")]).strings(data, certain=certain)
    assert len(changed) == len(data)
    for match in re.finditer(rb"[^\0]+", data):
        if OLD.encode() not in match.group():
            assert changed[match.start() : match.end()] == match.group()


@given(PIECES, st.integers(1, 300))
def test_a_stream_is_replaced_like_the_whole(parts: Sequence[str], size: int) -> None:
    """However it is cut into pieces that a reader gives."""
    data = "".join(parts).encode()
    relocation = Relocation([Move(OLD, LONG)])
    pieces = [memoryview(data[at : at + size]) for at in range(0, len(data), size)]
    whole = prefix.whole_strings(pieces, relocation.needles)
    changed = b"".join(relocation.strings(piece, certain=True)[0] for piece in whole)
    assert changed == relocation.strings(data, certain=True)[0]
