"""Replacing prefixes in texts of any composition, compared with what a plain model says.

A text is a list of words with separators between them. Of each word it is known beforehand whether
a prefix stands in it as a path of its own, so what the whole has to become is known, too.
"""

from __future__ import annotations

import codecs
import json
import os
from dataclasses import dataclass
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stager.rewriting.relocate import Move, Relocation

pytestmark = pytest.mark.unit

# One below another, and two spellings of one directory.
MOVES = {
    "/home/ada/env": "/s/envs/01",
    "/lustre/home/ada/env": "/s/envs/01",
    "/home/ada/env/src/tool": "/s/envs/01/.stager/editable/0/tool",
    "/apps/python": "/s/envs/0123456789abcdef",
}
RELOCATION = Relocation(Move(old, new) for old, new in MOVES.items())


@dataclass(frozen=True)
class Word:
    """A part of a text, and what it has to become."""

    before: str
    after: str


def model(path: str) -> str:
    """Where a path is after the moves: by the longest of those that are above it."""
    above = [old for old in MOVES if f"{path}/".startswith(f"{old}/")]
    if not above:
        return path
    old = max(above, key=len)
    return MOVES[old] + path[len(old) :]


olds = st.sampled_from(sorted(MOVES))
rests = st.sampled_from(["", "/", "/bin/python", "/lib/x.so.1", "/a b", "/é", "/..", "//x"])
leads = st.sampled_from(["", "#!", "=", "-I", "-L", "'", '"', "(", "file://", "\\n", "$(", "PATH="])
names = st.sampled_from(["2", "-data", "_x", ".bak", ".d/x", "+x", "~", "%20", "@1", "é"])
parents = st.sampled_from(["/mnt", "/x/y", "x", "0", "_", ".", "..", "~", "$HOME", "é", "host-"])

paths = st.builds(
    lambda lead, old, rest: Word(lead + old + rest, lead + model(old + rest)), leads, olds, rests
)
# Another name that only begins as a prefix does may still be below a shorter prefix.
longer = st.builds(
    lambda old, name, rest: Word(old + name + rest, model(old + name + rest)), olds, names, rests
)
other_roots = st.builds(
    lambda parent, old, rest: Word(parent + old + rest, parent + old + rest),
    parents,
    st.sampled_from(["/home/ada/env", "/apps/python"]),
    rests,
)
plain = st.text("abcXYZ019 =-.é\\$", max_size=8).map(lambda text: Word(text, text))
separators = st.sampled_from(["\n", ":", ";", ",", " ", '"', "'", "\t", "|", "\r\n", ")", ">"])
texts = st.lists(st.tuples(paths | longer | other_roots | plain, separators), max_size=12)


def written(words: list[tuple[Word, str]], which: str) -> str:
    return "".join(getattr(word, which) + separator for word, separator in words)


@given(texts)
def test_every_path_of_its_own_and_nothing_else(words: list[tuple[Word, str]]) -> None:
    before, after = (written(words, which) for which in ("before", "after"))
    assert RELOCATION.text(before.encode()).decode() == after
    assert RELOCATION.found(before.encode()) == (before != after)


@given(texts, st.sampled_from(["utf-8", "latin-1", "cp1252", "utf-8-sig"]))
def test_every_encoding_that_has_ascii_in_it(words: list[tuple[Word, str]], encoding: str) -> None:
    before, after = (written(words, which) for which in ("before", "after"))
    assert RELOCATION.text(before.encode(encoding)) == after.encode(encoding)


@given(texts, st.sampled_from(["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"]))
def test_wide_encodings_with_a_mark(words: list[tuple[Word, str]], encoding: str) -> None:
    mark = getattr(codecs, "BOM_" + encoding.upper().replace("-", "", 1).replace("-", "_"))
    before, after = (mark + written(words, which).encode(encoding) for which in ("before", "after"))
    assert RELOCATION.wide_text(before) == after


# A component of a path may be any bytes but NUL and a slash.
components = st.binary(min_size=1, max_size=6).filter(
    lambda name: not set(name) & set(b"\0/") and name not in (b".", b"..")
)
places = st.lists(components, min_size=2, max_size=4).map(
    lambda parts: os.fsdecode(b"/" + b"/".join(parts))
)


# A store has a plain path, which is the same however it is written.
stores = st.from_regex(r"/[a-z0-9._-]+/envs/[0-9a-f]{16}", fullmatch=True)


@given(places, stores)
def test_every_way_to_write_a_path(old: str, new: str) -> None:
    found = Relocation([Move(old, new)])

    def url(path: str) -> bytes:
        return b"file://" + quote(os.fsencode(path)).encode() + b"/x"

    def as_json(path: str) -> bytes:
        return json.dumps({"prefix": f"{path}/x"}).encode(errors="surrogateescape")

    def in_a_shell(path: str) -> bytes:
        return os.fsencode("VAR='" + path.replace("'", "'\\''") + "/x'")

    for write in (url, as_json, in_a_shell):
        assert found.text(write(old)) == write(new)


@given(st.lists(st.tuples(places, places), min_size=1, max_size=4), st.data())
def test_the_longest_spelling_first(moves: list[tuple[str, str]], data: st.DataObject) -> None:
    """In whatever order the moves are given, each path goes with the innermost above it."""
    table = dict(moves)
    old = data.draw(st.sampled_from(sorted(table)))
    table[f"{old}/inner"] = "/elsewhere/inner"
    order = data.draw(st.permutations(sorted(table.items())))
    found = Relocation(Move(*one) for one in order)
    text = os.fsencode(f"{old}/inner/x:{old}/innermost")
    other = os.fsdecode(found.text(os.fsencode(f"{old}/innermost")))
    assert os.fsdecode(found.text(text)) == f"/elsewhere/inner/x:{other}"
    assert found.path(f"{old}/inner/x") == "/elsewhere/inner/x"
