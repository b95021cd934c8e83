"""Whether an environment changed since it was packed: seen where it matters, nowhere else."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

import tiny
from stager import freshness
from stager.manifest import Manifest, Watch
from stager.packing import layers

pytestmark = pytest.mark.unit

SECOND = 10**9


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A directory as old as files usually are: times of now are too coarse to tell changes by."""
    path = tmp_path / "site-packages"
    (path / "pkg" / "sub").mkdir(parents=True)
    (path / "pkg-1.dist-info").mkdir()
    for name in (
        "pkg/__init__.py",
        "pkg/sub/mod.py",
        "pkg-1.dist-info/RECORD",
        "single.py",
        "a.pth",
        "data",
    ):
        (path / name).write_text(name)
    for one in (*path.rglob("*"), path):
        os.utime(one, ns=(SECOND, SECOND))
    return path


def changed(*watches: Watch) -> list[str]:
    return freshness.changed(cast(Manifest, SimpleNamespace(watches=watches)))


def touch(path: Path) -> None:
    os.utime(path, ns=(5 * SECOND, 5 * SECOND))


CHANGES: dict[str, Callable[[Path], object]] = {
    "a package more": lambda site: (site / "new").mkdir(),
    "a module more": lambda site: (site / "new.py").touch(),
    "a package less": lambda site: shutil.rmtree(site / "pkg"),
    "a package of another version": lambda site: (site / "pkg-1.dist-info").rename(
        site / "pkg-2.dist-info"
    ),
    "the same version again": lambda site: (
        (site / "pkg-1.dist-info" / "RECORD").unlink(),
        touch(site / "pkg-1.dist-info"),
        touch(site),
    ),
    "a module changed": lambda site: (touch(site / "single.py"), touch(site)),
    "a path file changed": lambda site: (touch(site / "a.pth"), touch(site)),
}
NO_CHANGES: dict[str, Callable[[Path], object]] = {
    "nothing": lambda site: None,
    "read": lambda site: (site / "single.py").read_text(),
    "the first import of a module": lambda site: (site / "__pycache__").mkdir(),
    "a time of its own": touch,
    "the first import of a package": lambda site: (site / "pkg" / "__pycache__").mkdir(),
    "a time of another file": lambda site: (touch(site / "data"), touch(site)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_directory_that_changed(site: Path, change: str) -> None:
    watch = freshness.watch(str(site))
    CHANGES[change](site)
    assert changed(watch) == [str(site)]


@pytest.mark.parametrize("change", NO_CHANGES)
def test_a_directory_that_did_not(site: Path, change: str) -> None:
    watch = freshness.watch(str(site))
    NO_CHANGES[change](site)
    assert changed(watch) == []


def test_a_link_to_nothing_does_not_hide_changes(site: Path) -> None:
    (site / "gone.py").symlink_to("/no/such/place")
    watch = freshness.watch(str(site))
    assert changed(watch) == []
    (site / "new.py").touch()
    assert changed(watch) == [str(site)]


@pytest.mark.parametrize("name", ["single.py", "data"])
def test_a_file_that_changed(site: Path, name: str) -> None:
    watch = freshness.watch(str(site / name))
    assert changed(watch) == []
    (site / name).write_text("something else")
    assert changed(watch) == [str(site / name)]


def test_one_look_is_enough_where_nothing_changed(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watches = [freshness.watch(str(site)), freshness.watch(str(site / "data"))]
    stats: list[str] = []
    real = os.stat

    def count(path: str, **options: bool) -> os.stat_result:
        stats.append(path)
        return real(path, **options)

    def never(*_: object) -> None:
        raise AssertionError("a directory was listed")

    monkeypatch.setattr(os, "stat", count)
    monkeypatch.setattr(os, "scandir", never)
    assert changed(*watches) == []
    assert stats == [str(site), str(site / "data")]


def test_what_was_not_there_and_came(site: Path) -> None:
    watch = freshness.watch(str(site / "later"))
    assert watch.mark == ""
    assert changed(watch) == []
    (site / "later").touch()
    assert changed(watch) == [str(site / "later")]


@pytest.mark.parametrize("tree", [False, True])
def test_an_original_that_cannot_be_seen_has_not_changed(site: Path, tree: bool) -> None:
    watch = freshness.watch(str(site), tree=tree)
    site.rename(site.with_name("hidden"))
    assert changed(watch) == []


def test_a_link_is_followed(site: Path) -> None:
    alias = site.with_name("alias")
    alias.symlink_to(site)
    watch = freshness.watch(str(alias))
    (site / "new.py").touch()
    assert changed(watch) == [str(alias)]


# Source trees of editable installs


TREE_CHANGES: dict[str, Callable[[Path], object]] = {
    **{key: CHANGES[key] for key in ("a package more", "a module more", "a package less")},
    "deep below": lambda site: touch(site / "pkg" / "sub" / "mod.py"),
    "data": lambda site: touch(site / "data"),
    "a mode": lambda site: (site / "data").chmod(0o600),
}


@pytest.mark.parametrize("change", TREE_CHANGES)
def test_a_source_tree_that_changed(site: Path, change: str) -> None:
    watch = freshness.watch(str(site), tree=True)
    TREE_CHANGES[change](site)
    assert changed(watch) == [str(site)]


@pytest.mark.parametrize(
    "change",
    [
        lambda site: None,
        lambda site: (site / "pkg" / "__pycache__").mkdir(),
        lambda site: ((site / ".git").mkdir(), (site / ".git" / "HEAD").touch()),
        lambda site: touch(site / "pkg"),
    ],
)
def test_a_source_tree_that_did_not(site: Path, change: Callable[[Path], object]) -> None:
    watch = freshness.watch(str(site), tree=True)
    change(site)
    assert changed(watch) == []


def test_a_source_that_is_one_file(site: Path) -> None:
    watch = freshness.watch(str(site / "single.py"), tree=True)
    assert changed(watch) == []
    touch(site / "single.py")
    assert changed(watch) == [str(site / "single.py")]


def test_only_what_changed_is_named(site: Path) -> None:
    watches = [freshness.watch(str(site / name)) for name in ("data", "a.pth", "single.py")]
    touch(site / "a.pth")
    assert changed(*watches) == [str(site / "a.pth")]


def test_what_somebody_has_just_asked_is_not_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["same", "other", "gone"]
    for name in names:
        (tmp_path / name).write_text(name)
    watches = [freshness.watch(str(tmp_path / name)) for name in names]
    (tmp_path / "gone").unlink()
    os.utime(tmp_path / "other", (1, 1))
    seen = {one.path: os.stat(one.path) for one in watches[:2]}
    other, asked, stat = str(tmp_path / "other"), [], os.stat
    manifest = cast(Manifest, SimpleNamespace(watches=watches))
    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", lambda path: asked.append(path) or stat(path))
        found = freshness.changed(manifest, seen)
    assert (found, asked) == ([other], [other])  # only what is another one now is looked into


@pytest.mark.parametrize("before", ["nothing packed before", "the layer packed before"])
def test_what_is_installed_while_an_image_is_written_is_a_change(
    public_path: Path, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    config = tiny.configured(public_path)
    source = public_path / "source" / "mine"
    source.mkdir(parents=True)
    (source / "__init__.py").touch()
    files = {f"{tiny.SITE}/mine.pth": str(source.parent)}
    prefix = tiny.environment(public_path / "environment", files)
    if before.startswith("the"):
        tiny.packed(prefix, config)
    write = layers.Layers.write

    def meanwhile(*arguments: Any) -> list[dict[str, Any]]:
        done = write(*arguments)
        for directory in (prefix / tiny.SITE, source):
            (directory / "later.py").touch()
        return done

    monkeypatch.setattr(layers.Layers, "write", meanwhile)
    published = tiny.packed(prefix, config)
    assert freshness.changed(published.manifest) == [str(prefix / tiny.SITE), str(source)]
