"""Configuration: every value from the right place, and every mistake named with its place."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stager import config, warm
from stager.config import KEYS, Config, parse_duration, parse_size
from stager.errors import SITE, UsageError

pytestmark = pytest.mark.unit


@pytest.fixture
def site(tmp_path: Path) -> Path:
    (tmp_path / "etc" / "config.d").mkdir(parents=True)
    return tmp_path / "etc"


def load(site: Path, **arguments: object) -> Config:
    arguments.setdefault("environ", {"XDG_CONFIG_HOME": str(site / "none")})
    return config.load(site_directory=str(site), **arguments)  # type: ignore[arg-type]


def test_a_user_without_a_home_can_name_a_repository(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", "unknown")
    with pytest.raises(UsageError) as error:
        config.load(site_directory=str(tmp_path))
    assert "set HOME" in str(error.value.hint)
    named = config.load(overrides={"repository": "/packed"}, site_directory=str(tmp_path))
    assert named["repository"] == "/packed"


def test_defaults_are_valid_and_say_so(site: Path) -> None:
    found = load(site)
    assert set(found.values) == set(found.sources) == set(KEYS)
    assert set(found.sources.values()) == {"default"}
    assert found["store"] == f"/tmp/stager-{os.getuid()}"
    assert found["stage.timeout"] == 600.0


def test_precedence_from_the_bottom_up(site: Path, tmp_path: Path) -> None:
    user = tmp_path / "home" / "stager" / "config.yaml"
    user.parent.mkdir(parents=True)
    places: list[tuple[str, str]] = []

    def expect(value: int, source: str, **arguments: object) -> None:
        places.append((source, "x"))
        found = load(site, environ=environ, **arguments)
        assert (found["pack.level"], found.sources["pack.level"]) == (value, source)

    environ = {"XDG_CONFIG_HOME": str(tmp_path / "home")}
    expect(3, "default")
    (site / "config.yaml").write_text("pack: {level: 4}")
    expect(4, str(site / "config.yaml"))
    (site / "config.d" / "10-a.yaml").write_text("pack.level: 5")
    expect(5, str(site / "config.d" / "10-a.yaml"))
    (site / "config.d" / "20-b.yaml").write_text("pack:\n  level: 6\n")
    (site / "config.d" / "99-no.yml").write_text("pack.level: 99")
    expect(6, str(site / "config.d" / "20-b.yaml"))
    user.write_text("pack.level: 7")
    expect(7, str(user))
    environ["STAGER_PACK_LEVEL"] = "8"
    expect(8, "$STAGER_PACK_LEVEL")
    expect(8, "$STAGER_PACK_LEVEL", overrides={"pack.level": None})
    expect(9, "command line", overrides={"pack.level": "9"})


def test_the_users_file_is_below_home(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / ".config" / "stager" / "config.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("run.strict: yes")
    monkeypatch.setenv("HOME", str(tmp_path))
    found = load(site, environ={})
    assert found["run.strict"] is True


def test_an_empty_file_or_variable_says_nothing(site: Path) -> None:
    (site / "config.yaml").write_text("# nothing\n")
    found = load(site, environ={"XDG_CONFIG_HOME": "/nowhere", "STAGER_STORE": ""})
    assert found.sources["store"] == "default"


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [
        ("stage: {timeout: 5m}\nstage: {how: extract}\n", "stage", 2),
        ("stage:\n  timeout: 5m\n  timeout: 6m\n", "timeout", 3),
    ],
)
def test_a_key_that_is_twice_in_a_file_is_an_error(
    site: Path, text: str, key: str, line: int
) -> None:
    (site / "config.yaml").write_text(text)
    with pytest.raises(UsageError, match=rf"has the key `{key}` twice \(line {line}\)"):
        load(site)


@pytest.mark.parametrize("text", ["{{ stager_store }}\n", "[a, b]: c\n", "? {a: b}\n: c\n"])
def test_a_key_that_is_no_text_is_an_error(site: Path, text: str) -> None:
    """As where a template was installed as it is."""
    (site / "config.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"config.yaml has a key that is not a string \(line 1\)"):
        load(site)


def test_a_group_of_which_all_is_commented_out_says_nothing(site: Path) -> None:
    (site / "config.yaml").write_text("pack:\n#  level: 5\nstage.how: extract\n")
    found = load(site)
    assert (found["pack.level"], found["stage.how"]) == (3, "extract")


@pytest.mark.parametrize("key", ["pack.exclude", "repositories", "local_prefixes"])
def test_a_list_of_which_all_is_commented_out_is_an_error(site: Path, key: str) -> None:
    (site / "config.yaml").write_text(f"{key}:\n#  - /x\n")
    with pytest.raises(UsageError, match=key) as error:
        load(site)
    assert error.value.hint == "expected a list"


def test_a_file_that_holds_itself_is_an_error(site: Path) -> None:
    (site / "config.yaml").write_text("a: &a {b: *a}\n")
    with pytest.raises(UsageError, match=r"config.yaml is not YAML"):
        load(site)


def test_what_is_wrong_can_be_put_aside(site: Path) -> None:
    (site / "config.yaml").write_text("pack: {fromat: squashfs, level: 5}")
    (site / "config.d" / "10-a.yaml").write_text("[")
    (site / "config.d" / "20-b.yaml").write_text("pack.threads: 2")
    environ = {"STAGER_STORE": "relative", "STAGER_RUN_STRICT": "yes"}
    faults: list[UsageError] = []
    found = load(site, environ=environ, faults=faults)
    places = ["fromat", "10-a.yaml", "$STAGER_STORE"]
    assert [place in fault.message for place, fault in zip(places, faults)] == [True] * 3
    assert [found[key] for key in ("pack.level", "pack.threads", "run.strict")] == [5, 2, True]
    assert found.sources["store"] == "default"
    with pytest.raises(UsageError):  # what was typed a moment ago is not left out
        load(site, overrides={"store": "relative"}, faults=faults)


def test_an_unknown_key_is_an_error_with_a_suggestion_and_its_place(site: Path) -> None:
    path = site / "config.yaml"
    path.write_text("pack: {fromat: squashfs}")
    with pytest.raises(UsageError, match=r"pack\.fromat") as error:
        load(site)
    assert str(path) in error.value.message
    assert error.value.hint == "did you mean `pack.format`?"
    assert error.value.blame == SITE


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pack.format", "zip"),
        ("pack.level", "3.5"),
        ("pack.level", True),
        ("pack.level", ""),
        ("pack.level", 0),
        ("pack.level", 23),
        ("pack.level", "-3"),
        ("pack.threads", "many"),
        ("pack.threads", -1),
        ("pack.threads", 100000),
        ("run.strict", "maybe"),
        ("run.strict", 2),
        ("stage.timeout", "-1s"),
        ("stage.timeout", "5 minutes"),
        ("collect.max_size", "10 apples"),
        ("collect.max_size", "-1"),
        ("store", "relative/path"),
        ("store", "/with space"),
        ("store", "/quote'd"),
        ("store", "/" + "x" * 78),
        ("store", None),
        ("repository", "here"),
        ("repositories", "/fine:relative"),
        ("local_prefixes", ["/usr", "opt"]),
    ],
)
def test_a_malformed_value_is_an_error_that_names_key_value_and_place(
    key: str, value: object
) -> None:
    with pytest.raises(UsageError) as error:
        Config().set(key, value, "the place")
    assert f"`{key}`" in error.value.message
    assert repr(value) in error.value.message
    assert "the place" in error.value.message
    assert error.value.hint


@pytest.mark.parametrize(
    ("key", "value", "parsed"),
    [
        ("store", "/tmp/s-{uid}", f"/tmp/s-{os.getuid()}"),
        ("store", "/a/../b/", "/b"),
        ("store", "//tmp/s", "/tmp/s"),
        ("store", "/" + "x" * 77, "/" + "x" * 77),
        ("repositories", "/a:/b", ("/a", "/b")),
        ("repositories", ["/a", "/b:c"], ("/a", "/b:c")),
        ("repositories", "", ()),
        ("pack.exclude", "*.a:docs", ("*.a", "docs")),
        ("pack.level", " 19 ", 19),
        ("run.strict", "ON", True),
        ("run.strict", False, False),
        ("run.strict", "0", False),
        ("stage.timeout", 90, 90.0),
    ],
)
def test_values_as_they_are_understood(key: str, value: object, parsed: object) -> None:
    found = Config()
    found.set(key, value, "here")
    assert found[key] == parsed
    assert type(found[key]) is type(parsed)


def test_the_home_directory_in_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    found = Config()
    found.set("repository", "~/packed", "here")
    assert found["repository"] == "/home/ada/packed"


@pytest.mark.parametrize("data", ["relative", ""])
def test_a_useless_data_directory_is_ignored(
    site: Path, monkeypatch: pytest.MonkeyPatch, data: str
) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("XDG_DATA_HOME", data)
    assert config.load(site_directory=str(site))["repository"] == "/home/ada/.local/share/stager"


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("4096", 4096), (17, 17), ("1K", 1024), ("500MiB", 500 << 20), ("1.5G", 3 << 29)]
    + [("2 TiB", 2 << 40), ("10GB", 10 << 30), ("7B", 7), (" 3MiB ", 3 << 20)],
)
def test_sizes(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "MiB", "1e3", "5 MiBs", "5m", "1,5G", "0x10", "inf", "5 M iB"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="500MiB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0), ("30s", 30), ("5m", 300), ("1.5h", 5400), ("2d", 172800), ("250ms", 0.25), (20, 20)],
)
def test_durations(text: object, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "5M", "1h30m", "nan", "1e9", "5 s s"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="5m"):
        parse_duration(text)


@given(
    st.integers(0, 2**50), st.sampled_from(["", "K", "M", "G"]), st.sampled_from(["", "iB", "B"])
)
def test_every_whole_size_is_exact(count: int, unit: str, suffix: str) -> None:
    assert parse_size(f"{count}{unit}{suffix}") == count * 1024 ** " KMG".index(unit or " ")


@pytest.mark.parametrize(
    "text", ["a: [1, 2", "- just\n- a list\n", "a word", b"\xff\xfe\x00", "a: !!python/object:x {}"]
)
def test_a_file_that_is_no_mapping_is_named(site: Path, text: str | bytes) -> None:
    path = site / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError, match=r"YAML|mapping") as error:
        load(site)
    assert str(path) in error.value.message


def test_a_file_without_permission_or_of_another_kind_is_named(site: Path) -> None:
    (site / "config.yaml").mkdir()
    with pytest.raises(UsageError, match="cannot read") as error:
        load(site)
    assert str(site / "config.yaml") in error.value.message
    assert error.value.hint == "a file belongs there: remove what is in its place"


def test_a_pipe_does_not_hang_it(site: Path) -> None:
    os.mkfifo(site / "config.yaml")
    with pytest.raises(UsageError, match="not a regular file") as error:
        load(site)
    assert error.value.hint == "a file belongs there: remove what is in its place"


# What root hooks read


def test_trusted_files_are_read_and_the_environment_is_not(site: Path, tmp_path: Path) -> None:
    user = tmp_path / "stager" / "config.yaml"
    user.parent.mkdir()
    user.write_text("pack.level: 1")
    (site / "config.yaml").write_text("pack.threads: 2")
    environ = {
        "XDG_CONFIG_HOME": str(tmp_path),
        "XDG_DATA_HOME": str(tmp_path),
        "STAGER_PACK_LEVEL": "9",
    }
    if os.geteuid() == 0:
        found = load(site, environ=environ, trusted_only=True)
        assert (found["pack.level"], found["pack.threads"]) == (3, 2)
        assert str(tmp_path) not in found["repository"]
    else:
        with pytest.raises(UsageError, match="users other than root"):
            load(site, environ=environ, trusted_only=True)


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666])
def test_a_file_that_others_may_write_is_not_trusted(site: Path, mode: int) -> None:
    path = site / "config.yaml"
    path.write_text("pack.level: 1")
    path.chmod(mode)
    assert load(site)["pack.level"] == 1
    with pytest.raises(UsageError, match="users other than root") as error:
        load(site, trusted_only=True)
    assert f"chmod 644 {path}" in str(error.value.hint)
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_cache_saves_reading_yaml_until_a_file_changes(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "config.json"
    (site / "config.yaml").write_text("pack: {level: 4}")
    reads: list[str] = []
    parse = config._parse
    monkeypatch.setattr(
        config, "_parse", lambda path, file: reads.append(path) or parse(path, file)
    )

    def level() -> int:
        monkeypatch.setattr(config, "_parsed", {})  # as in another process
        return load(site, cache=str(cache))["pack.level"]

    assert (level(), level(), len(reads)) == (4, 4, 1)
    (site / "config.yaml").write_text("pack: {level:  5}")
    assert (level(), level(), len(reads)) == (5, 5, 2)
    cache.write_text("[")
    assert (level(), len(reads)) == (5, 3)
    (site / "config.d" / "date.yaml").write_text("x: 2026-01-01")
    with pytest.raises(UsageError, match="x"):
        level()


def test_a_cache_of_others_is_not_believed(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (site / "config.yaml").write_text("pack: {level: 4}")
    cache = tmp_path / "config.json"
    identity = warm.identity(str(site / "config.yaml"))
    cache.write_text(json.dumps({str(site / "config.yaml"): [identity, {"pack.level": 9}]}))
    for owner, expected in ((0, 9), (1, 4)):
        monkeypatch.setattr(config, "_parsed", {})
        monkeypatch.setattr(config, "_is_roots", lambda file, owner=owner: owner == 0)
        assert load(site, cache=str(cache))["pack.level"] == expected


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("collect.max_size", 50 << 30, "50GiB"),
        ("collect.max_size", 3 << 40, "3TiB"),
        ("collect.min_free", 1536 << 20, "1536MiB"),
        ("collect.min_free", 1000, "1000"),
        ("collect.min_free", 0, "0"),
        ("stage.timeout", 600.0, "10m"),
        ("stage.timeout", 7200.0, "2h"),
        ("stage.timeout", 90.0, "90s"),
        ("keep_replaced", 86400.0, "1d"),
        ("keep_replaced", 0.5, "0.5s"),
        ("keep_replaced", 0.0, "0s"),
        ("pack.bytecode", True, "yes"),
        ("run.strict", False, "no"),
        ("stripe_count", -1, "-1"),
        ("local_prefixes", ("/usr", "/opt"), "/usr:/opt"),
    ],
)
def test_values_are_shown_as_they_are_written(key: str, value: Any, text: str) -> None:
    assert config.as_text(key, value) == text
    if not isinstance(value, tuple):
        assert KEYS[key].parse(text) == value
