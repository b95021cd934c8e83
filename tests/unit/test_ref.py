"""The names users type, and the directive of a job's comment: one grammar, nothing evaluated."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stager import ref
from stager.errors import UsageError
from stager.ref import Directive, Ref

pytestmark = pytest.mark.unit

HEX = "0123456789abcdef"
NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", fullmatch=True)


@pytest.mark.parametrize("name", ["a", "7", "torch-2.3_cu12", "a.b", "x" * 128, "a--", "sha256"])
def test_a_name(name: str) -> None:
    assert ref.parse(name) == Ref(name=name)
    assert ref.is_name(name)


@pytest.mark.parametrize(
    "text",
    [
        "x" * 129,
        "-a",
        ".a",
        "_a",
        "a b",
        "a/b",
        "é",
        "a@b",
        "a:b",
        "a\n",
        "a@",
        "a?",
        "a+b",
        "$HOME",
    ]
    + ["a@sha256:", f"a@sha256:{HEX[:11]}", f"a@sha256:{HEX * 4}0", f"a@sha256:{HEX.upper()}"]
    + [f"a@sha256:{HEX}\n", f"@sha256:{HEX}", f"a b@sha256:{HEX}", f"a@md5:{HEX}"],
)
def test_what_is_neither_a_name_nor_a_path(text: str) -> None:
    with pytest.raises(UsageError) as error:
        ref.parse(text)
    assert error.value.exit_code == 2
    assert not ref.is_name(text)


def test_an_empty_ref_says_where_to_look() -> None:
    with pytest.raises(UsageError, match="empty") as error:
        ref.parse("")
    assert "stager list" in str(error.value.hint)


def test_a_path_without_its_dot_is_explained() -> None:
    with pytest.raises(UsageError) as error:
        ref.parse("envs/torch")
    assert "./envs/torch" in str(error.value.hint)


@pytest.mark.parametrize("digits", [12, 13, 64])
def test_a_pinned_name(digits: int) -> None:
    digest = (HEX * 4)[:digits]
    found = ref.parse(f"torch@sha256:{digest}")
    assert found == Ref(name="torch", digest=digest)
    assert str(found) == f"torch@sha256:{digest}"


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("/a/b", "/a/b"),
        ("/a/../b//c/", "/b/c"),
        ("./x", "/here/x"),
        ("../x", "/x"),
        (".", "/here"),
        ("..", "/"),
        ("./a b", "/here/a b"),
        ("/a@sha256:0123456789ab", "/a@sha256:0123456789ab"),
    ],
)
def test_a_path_becomes_absolute(text: str, path: str) -> None:
    assert ref.parse(text, cwd="/here") == Ref(path=path)


def test_a_path_in_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    assert ref.parse("~/envs/x").path == "/home/ada/envs/x"


def test_a_relative_path_starts_from_the_current_directory(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(str(tmp_path))
    assert ref.parse("./x").path == f"{os.getcwd()}/x"


@pytest.mark.parametrize("text", ["/a\0b", "a\tb", "/a\nb", "./\x7f", "\x1b[2J"])
def test_control_characters_are_refused_and_not_printed(text: str) -> None:
    with pytest.raises(UsageError) as error:
        ref.parse(text)
    assert error.value.message.isprintable()


def test_a_directory_with_control_characters_is_refused_as_such() -> None:
    """Where a job was submitted in one, the path of an environment there has them."""
    with pytest.raises(UsageError, match=r"the environment's path has .*: '/a\\nb/env'"):
        ref.parse("./env", cwd="/a\nb")
    assert ref.parse("../env", cwd="/a\nb").path == "/env"


@given(NAMES)
def test_names_come_back_as_they_were_typed(name: str) -> None:
    assert str(ref.parse(name)) == name


@given(st.text() | st.text(st.sampled_from("./~@:ab01 -+?&=,;\0\n\ud800\udcff")))
def test_any_text_is_a_ref_or_an_error_of_the_user(text: str) -> None:
    try:
        found = ref.parse(text, cwd="/here")
    except UsageError as error:
        assert error.exit_code == 2
    else:
        assert bool(found.name) != bool(found.path)
        os.fsencode(found.path)  # what cannot be the name of a file is refused here, not later
        assert not found.path or found.path.startswith("/")


# The directive


def test_a_directive_of_one_environment() -> None:
    assert ref.parse_directive("torch") == Directive((Ref(name="torch"),))


def test_a_directive_of_several_environments_with_options() -> None:
    found = ref.parse_directive("base+./extra?strict&format=squashfs&on_stale=", cwd="/w")
    assert found.refs == (Ref(name="base"), Ref(path="/w/extra"))
    assert found.options == {"strict": "", "format": "squashfs", "on_stale": ""}


def test_an_option_may_hold_an_equals_sign() -> None:
    assert ref.parse_directive("a?x=1=2").options == {"x": "1=2"}


@pytest.mark.parametrize("text", ["", "?strict", "a+", "+a", "a++b", "a?Strict", "a?=x", "a?1=x"])
def test_a_malformed_directive(text: str) -> None:
    with pytest.raises(UsageError):
        ref.parse_directive(text)


def test_the_length_of_a_directive_is_bounded_in_bytes() -> None:
    longest = "/" + "é" * 511
    assert len(longest.encode()) == ref.MAX_DIRECTIVE - 1
    assert ref.parse_directive(longest + "x").refs
    with pytest.raises(UsageError, match="1024 bytes"):
        ref.parse_directive(longest + "é")


# The comment it stands in


@pytest.mark.parametrize(
    "comment",
    [
        "pyenv:torch",
        "  pyenv:torch\n",
        "project=x,pyenv:torch;mail=none",
        "pyenv:torch tensorboard:yes",
        '{"pyenv": "torch", "wckey": 7}',
        ' {"a": {"pyenv": "no"}, "pyenv": "torch"} ',
    ],
)
def test_the_token_is_found_among_others(comment: str) -> None:
    found = ref.find_directive(comment)
    assert found is not None
    assert found.refs == (Ref(name="torch"),)


@pytest.mark.parametrize(
    "comment",
    ["", "hello", "mypyenv:torch", "a pyenv b", "pyenv=torch", '{"x": "pyenv"}', "{pyenv:torch}"]
    + ['{"pyenv": null}', '["pyenv:torch"]', '{"pyenv"', "{" * 5000 + "pyenv"],
)
def test_a_comment_without_a_directive(comment: str) -> None:
    assert ref.find_directive(comment) is None


@pytest.mark.parametrize(
    "comment",
    [
        "pyenv:a pyenv:b",
        "pyenv:",
        "pyenv:$(reboot)",
        "pyenv:a|b",
        '{"pyenv": ["a"]}',
        '{"pyenv": 1}',
    ],
)
def test_a_directive_that_is_wrong_is_an_error_and_not_overlooked(comment: str) -> None:
    with pytest.raises(UsageError):
        ref.find_directive(comment)


def test_deep_json_is_no_crash() -> None:
    assert ref.find_directive('{"pyenv": ' + "[" * 100_000) is None


@pytest.mark.parametrize(
    ("comment", "asks"),
    [
        ("pyenv:a?strict", True),
        ("x, pyenv:a?verbose&strict;y", True),
        ('{"pyenv": "a?timeout=5m\\u0026strict"}', True),
        ("pyenv:a?strict&strikt", True),
        ("pyenv:a?timeout=soon?strict", True),
        ("pyenv:?strict", True),
        ("pyenv:a pyenv:b?strict", True),
        ("pyenv:a?strictly&not=strict", False),
        ("pyenv:strict&strict", False),
        ("pyenv:a other?strict", False),
        ('{"pyenv": ["?strict"]}', False),
        ('{"pyenv": "a", "x": "?strict"}', False),
        ("?strict", False),
    ],
)
def test_strict_is_seen_in_a_malformed_directive_too(comment: str, asks: bool) -> None:
    assert ref.asks_strict(comment) is asks


@given(
    st.text()
    | st.text().map(lambda text: f"pyenv:{text}")
    | st.dictionaries(st.sampled_from(["pyenv", "x"]), st.text() | st.none() | st.integers()).map(
        json.dumps
    )
)
def test_no_comment_makes_it_fail_in_another_way(comment: str) -> None:
    strict = ref.asks_strict(comment)
    try:
        found = ref.find_directive(comment, cwd="/here")
    except UsageError:
        return
    assert found is None or found.refs
    assert strict == (found is not None and "strict" in found.options)
