"""Old prefixes in bytes: found as paths of their own, replaced in every spelling, nothing else."""

from __future__ import annotations

import json
import os
from urllib.parse import quote

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from stager.errors import UsageError
from stager.rewriting import relocate
from stager.rewriting.relocate import Move, Relocation

pytestmark = pytest.mark.unit

OLD, NEW = "/home/ada/env", "/tmp/s-7/envs/0123"
ONE = Relocation([Move(OLD, NEW)])


@pytest.mark.parametrize(
    "text",
    [
        "{}", "{}/bin/python", "#!{}/bin/python -I\n", "PREFIX={}", "prefix = '{}'", '"{}"',
        "-I{}/include -L{}/lib", "-Wl,-rpath,{}/lib", "{}:{}/a:/b", "file://{}/x", "({}),[{}],<{}>",
        "{}.", "It is in {}. Then", "{};x", "{},x", "a\\n{}\\n", "\\t{}", "\\0{}\\0", "{}\n{}",
        "\0{}\0", "`{}`", "|{}|", "{}//lib", "{}/../x", "={}", "@{}/x", "&{}", "*{}", "$({}/bin/x)",
        "https://host:{}/x", "{}..", "{}./x", "{} x",
    ],
)  # fmt: skip
def test_a_path_of_its_own_is_replaced(text: str) -> None:
    before, after = (text.replace("{}", one).encode() for one in (OLD, NEW))
    assert ONE.touches(before)
    assert ONE.found(before)
    assert ONE.text(before) == after


@pytest.mark.parametrize(
    "text",
    [
        "{}2", "{}2/bin", "{}-data", "{}_x", "{}.bak", "{}.d/x", "{}._x", "{}+x", "{}~",
        "{}é", "{}%20x",
        "/mnt{}", "/mnt/lustre{}/bin", "x{}", "0{}", "_{}", ".{}", "..{}", "~{}", "é{}", "a-{}",
        "$HOME{}", "%2F{}", "{}@1", "HTTP{}",
    ],
)  # fmt: skip
def test_part_of_another_path_is_left(text: str) -> None:
    data = text.replace("{}", OLD).encode()
    assert ONE.touches(data)
    assert not ONE.found(data)
    assert ONE.text(data) == data


def test_several_in_one_string_each_by_its_own_boundary() -> None:
    text = f"{OLD}/bin:{OLD}2/bin:{OLD}:/mnt{OLD}:{OLD}/lib"
    assert ONE.text(text.encode()).decode() == f"{NEW}/bin:{OLD}2/bin:{NEW}:/mnt{OLD}:{NEW}/lib"


def test_the_longest_spelling_goes_first() -> None:
    moves = [Move("/a/b", "/n/1"), Move("/a/b/c", "/n/2"), Move("/a/b/c/d", "/n/3")]
    for order in (moves, moves[::-1]):
        found = Relocation(order)
        text = b"/a/b/x /a/b/c/x /a/b/c/d/x /a/b/c2 /a/b /a/b/c/d2"
        assert found.text(text) == b"/n/1/x /n/2/x /n/3/x /n/1/c2 /n/1 /n/2/d2"
        assert found.path("/a/b/c/d/x") == "/n/3/x"
        assert found.path("/a/b/c2") == "/n/1/c2"
        assert found.needles == [b"/a/b"]


def test_moves_are_not_chained() -> None:
    found = Relocation([Move("/a/one", "/b/two"), Move("/b/two", "/c/three")])
    assert found.text(b"/a/one /b/two") == b"/b/two /c/three"


@pytest.mark.parametrize("old", ["/", "/opt", "//opt//", "opt", ""])
def test_a_prefix_too_short_to_be_told_from_others_is_refused(old: str) -> None:
    with pytest.raises(UsageError, match="cannot be moved"):
        Relocation([Move(old, "/n/x")])


def test_nothing_moves_without_moves() -> None:
    none = Relocation([])
    data = b"/home/ada/env and \0 bytes"
    assert (none.text(data), none.touches(data), none.found(data)) == (data, False, False)
    assert none.path(OLD) is None


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (OLD, NEW),
        (f"{OLD}/", f"{NEW}/"),
        (f"{OLD}/a/b", f"{NEW}/a/b"),
        (f"{OLD}2", None),
        (f"/mnt{OLD}", None),
        ("/home/ada", None),
        ("", None),
    ],
)
def test_paths(path: str, expected: str | None) -> None:
    assert ONE.path(path) == expected


# As other programs write paths

AWKWARD = "/home/a b/größe&c'd/\udcff"


@pytest.mark.parametrize(
    "encode",
    [
        os.fsencode,
        lambda path: b"file://" + quote(os.fsencode(path)).encode(),
        lambda path: json.dumps({"p": path}).encode(),
    ],
    ids=["plain", "url", "json"],
)
def test_every_encoding_is_replaced_by_its_like(encode: object) -> None:
    assert callable(encode)
    new = "/n/ü/new place"
    found = Relocation([Move(AWKWARD, new)])
    assert found.text(encode(f"{AWKWARD}/x")) == encode(f"{new}/x")
    assert found.found(encode(AWKWARD))


# Properties

PART = st.text(st.sampled_from("abé -.'\"%&\\ÿ2"), min_size=1, max_size=5).filter(
    lambda part: part not in (".", "..")
)
PATH = st.lists(PART, min_size=2, max_size=4).map(lambda parts: "/" + "/".join(parts))
BYTES = st.lists(
    st.sampled_from(
        [b"/", b"/a", b"/a/a", b"/a/a/a", b"a", b".", b"-I", b" ", b"\0", b":", b"\\n", b"\xff"]
    )
    | st.binary(max_size=3)
).map(b"".join)


@given(PATH, PATH, BYTES, BYTES)
def test_between_separators_a_path_is_always_found(
    old: str, new: str, before: bytes, after: bytes
) -> None:
    found = Relocation([Move(old, new)])
    data = os.fsencode(old) + b"/x"
    assert found.text(b"=" + data + b"\n") == b"=" + os.fsencode(new) + b"/x\n"
    # Whatever stands around it changes nothing between two NULs, which end every path.
    text = found.text(before + b"\0" + data + b"\0" + after)
    assert b"\0" + os.fsencode(new) + b"/x\0" in text


@given(st.lists(st.sampled_from(["/a/a", "/a/a/a", "/a/b"]), min_size=1), BYTES)
def test_text_is_left_alone_wherever_no_old_path_is_found(olds: list[str], data: bytes) -> None:
    found = Relocation(Move(old, f"/new{old}") for old in olds)
    if not found.touches(data):
        assert not found.found(data)
        assert not any(old.encode() in data for old in olds)
    if found.found(data):
        assert found.text(data) != data
    else:
        assert found.text(data) == data


@given(st.lists(st.sampled_from(["/a/a", "/a/a/a", "/a/b"]), min_size=1), BYTES)
def test_replacing_twice_is_replacing_once(olds: list[str], data: bytes) -> None:
    found = Relocation(Move(old, f"/q{old.replace('/', 'q')}/n") for old in olds)
    once = found.text(data)
    assert not found.found(once)
    assert found.text(once) == once


@given(PATH, PATH, BYTES)
def test_there_and_back_is_where_it_was(old: str, new: str, data: bytes) -> None:
    assume(not new.startswith(old) and not old.startswith(new))
    there, back = Relocation([Move(old, new)]), Relocation([Move(new, old)])
    assume(not back.touches(data))
    moved = there.text(data)
    assume(moved.count(os.fsencode(new)) == data.count(os.fsencode(old)))
    assert back.text(moved) == data


@given(st.lists(st.tuples(PATH, PATH), max_size=5), PATH)
def test_a_path_moves_as_it_does_in_a_text(moves: list[tuple[str, str]], path: str) -> None:
    found = Relocation(Move(old, new) for old, new in dict(moves).items())
    moved = found.path(path)
    if moved is not None:
        assert found.text(os.fsencode(path)) == os.fsencode(moved)


# Configuration of a venv


def test_values_of_a_configuration_are_set_and_everything_else_is_kept() -> None:
    before = (
        b"home = /opt/py/bin\ninclude-system-site-packages = false\nversion = 3.11.2\n"
        b"Executable=/opt/py/bin/python3.11\n"
        b"command = /opt/py/bin/python -m venv --prompt=a=b /home/ada/env\n\n"
        b"no separator\nx = home\n"
    )
    after = relocate.rewrite_config(before, {"home": "/n/bin", "executable": "/n/bin/python=3"})
    assert after == (
        b"home = /n/bin\ninclude-system-site-packages = false\nversion = 3.11.2\n"
        b"executable = /n/bin/python=3\n"
        b"command = /opt/py/bin/python -m venv --prompt=a=b /home/ada/env\n\n"
        b"no separator\nx = home\n"
    )


def test_a_configuration_without_a_key_does_not_get_it() -> None:
    assert relocate.rewrite_config(b"a = \xff\n", {"home": "/n"}) == b"a = \xff\n"


# Launchers: the dialects that installers write

PYTHON = "/home/ada/env/bin/python3.11"
SPACED = "/home/a b/env/bin/python"
DIALECTS = {
    "plain": (f"#!{PYTHON}\nimport x\n", PYTHON),
    "options": (f"#!{PYTHON} -sE\n", PYTHON),
    "blank": (f"#! {PYTHON}\n", PYTHON),
    "no newline": (f"#!{PYTHON}", PYTHON),
    "CRLF": (f"#!{PYTHON}\r\n", PYTHON),
    "another interpreter": ("#!/home/ada/env/bin/perl -w\n", "/home/ada/env/bin/perl"),
    "env": ("#!/usr/bin/env python3\n", "python3"),
    "env with options": (f"#!/usr/bin/env -S -i A=/b {PYTHON} -s\n", PYTHON),
    "env alone": ("#!/usr/bin/env -i\n", "/usr/bin/env"),
    "relative": ("#!../env/bin/python\n", "../env/bin/python"),
    "sh": ("#!/bin/sh\necho '''exec' /x\n", "/bin/sh"),
    "distlib": (f"#!/bin/sh\n'''exec' {PYTHON} \"$0\" \"$@\"\n' '''\nimport x\n", PYTHON),
    "distlib with an option": (f"#!/bin/sh\n'''exec' {PYTHON} -E \"$0\" \"$@\"\n' '''\n", PYTHON),
    "pip with blanks": (f"#!/bin/sh\n'''exec' \"{SPACED}\" \"$0\" \"$@\"\n' '''\n", SPACED),
    "conda": (f"#!/bin/sh\n'''exec' \"{PYTHON}\" \"$0\" \"$@\" #'''\nimport x\n", PYTHON),
    "uv": (f"#!/bin/sh\n'''exec' '{SPACED}' \"$0\" \"$@\"\n' '''\nimport x\n", SPACED),
    "a python that was found by name": ("#!python\n", "python"),
    "no script": ("import x\n", ""),
    "nothing": ("", ""),
    "an empty line": ("#!\n/bin/sh", ""),
    "blanks": ("#!   \n", ""),
}
SELF_LOCATING = {
    "uv relocatable": (
        "#!/bin/sh\n'''exec' \"$(dirname -- \"$(realpath -- \"$0\")\")\"/'python'"
        " \"$0\" \"$@\"\n' '''\n"
    ),
    "venv-pack": "#!/bin/sh\n'''exec' \"$(dirname \"$0\")/python\" \"$0\" \"$@\"\n' '''\n",
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_interpreter_of_a_launcher(dialect: str) -> None:
    text, interpreter = DIALECTS[dialect]
    assert relocate.shebang(text.encode()) == interpreter


@pytest.mark.parametrize("dialect", SELF_LOCATING)
def test_a_launcher_that_finds_itself_names_no_path(dialect: str) -> None:
    assert not relocate.shebang(SELF_LOCATING[dialect].encode()).startswith("/")


def test_an_interpreter_whose_name_is_no_text() -> None:
    assert relocate.shebang(b"#!/home/\xff/bin/python\n") == "/home/\udcff/bin/python"


@pytest.mark.parametrize("dialect", [*DIALECTS, *SELF_LOCATING])
def test_a_launcher_is_moved_with_nothing_else_in_it(dialect: str) -> None:
    text = DIALECTS[dialect][0] if dialect in DIALECTS else SELF_LOCATING[dialect]
    found = Relocation([Move(OLD, NEW), Move("/home/a b/env", "/n/x")])
    expected = text.replace(OLD, NEW).replace("/home/a b/env", "/n/x")
    assert found.text(text.encode()).decode() == expected


@given(st.binary(max_size=60).map(lambda data: b"#!/bin/sh\n'''exec' " + data) | st.binary())
def test_no_script_makes_the_search_for_its_interpreter_fail(data: bytes) -> None:
    found = relocate.shebang(data)
    assert os.fsencode(found) in data


# Path files

SITE = f"{OLD}/lib/python3.11/site-packages"
FILES = Relocation([Move(OLD, NEW), Move("/src/proj", f"{NEW}/.stager/editable/0-proj")])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (f"{OLD}/src\n", f"{NEW}/src\n"),
        ("/src/proj/src\n", f"{NEW}/.stager/editable/0-proj/src\n"),
        ("/elsewhere/x\n", "/elsewhere/x\n"),
        ("sub/dir\n", "sub/dir\n"),
        ("./sub\n", "./sub\n"),
        ("../../../share\n", "../../../share\n"),
        ("../../../../proj\n", "/home/ada/proj\n"),
        ("../../../../../../src/proj/a\n", f"{NEW}/.stager/editable/0-proj/a\n"),
        (f"import os; x = '{OLD}/a'\n", f"import os; x = '{NEW}/a'\n"),
        ("import\tos\n", "import\tos\n"),
        (f"# {OLD}\n", f"# {NEW}\n"),
        ("\n", "\n"),
        (f"  {OLD}/src  \r\n", f"  {NEW}/src  \r\n"),
        ("\ufeff/src/proj\n", f"\ufeff{NEW}/.stager/editable/0-proj\n"),
        (f"{OLD}/a\n{OLD}2/b\n./c", f"{NEW}/a\n{OLD}2/b\n./c"),
        ("/home/\udcff\n", "/home/\udcff\n"),
    ],
)
def test_lines_of_a_path_file(before: str, after: str) -> None:
    assert relocate.rewrite_paths(os.fsencode(before), SITE, FILES) == os.fsencode(after)


def test_a_binary_file_has_a_nul() -> None:
    assert relocate.is_binary(b"a\0b")
    assert not relocate.is_binary("\x01\x7fé".encode())


@example(["/a/b/c", "/a/b/d"], [b"/a/b/x", b"/a/b", b"/d"], 40)
@given(
    st.lists(st.sampled_from(["/a/b/c", "/a/b/d", "/a/b/cd", "/a/x", "/y/b/c"]), min_size=1),
    st.lists(
        st.sampled_from([b"/a/b", b"/a/b/x", b"/c", b"/d", b"/a", b"/x", b"/y", b"%2F", b" "])
    ),
    st.integers(0, 40),
)
def test_what_is_looked_for_first_hides_nothing(
    olds: list[str], pieces: list[bytes], end: int
) -> None:
    """A file in which an old path is overlooked goes on using the original."""
    relocation = Relocation(Move(old, f"/new{number}") for number, old in enumerate({*olds}))
    data = b"".join(pieces)
    for until in (None, end):
        there = any(data.find(needle, 0, until) >= 0 for needle in relocation.needles)
        assert relocation.touches(data, until) == there
        assert relocation.touches(bytearray(data), until) == there
