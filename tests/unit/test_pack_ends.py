"""The end of an image overlaps with the next layer: what comes of one where the other fails."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tiny
from stager.config import Config
from stager.environments import Request
from stager.errors import StagerError
from stager.manifest import Finding
from stager.packing import layers, pack


class _Told:
    """Stands for :class:`stager.packing.layers.Layers` with two layers, ``a`` below ``b``."""

    def __init__(self, fails: str) -> None:
        self.fails = fails
        self.said: list[str] = []
        self.layers = layers.Layers.__new__(layers.Layers)
        vars(self.layers).update(
            _config={"pack.format": "squashfs", "pack.bytecode": True},
            reused=[],
            _places=lambda: iter([(SimpleNamespace(), name, SimpleNamespace()) for name in "ab"]),
            _known=lambda *_: None,
            _spread=lambda *_: None,
            _image=self._image,
            _produce=self._produce,
            _finish=self._finish,
        )
        self._names = iter("ab")

    def _say(self, what: str) -> None:
        self.said.append(what)
        if what == self.fails:
            raise OSError(what)

    @contextlib.contextmanager
    def _image(self, survey: Any, path: str) -> Iterator[str]:
        name = next(self._names)
        try:
            yield name
            self._say(f"close {name}")
        except BaseException:
            self.said.append(f"abort {name}")
            raise

    def _produce(self, survey: Any, place: Any, sink: str, *, compile_all: bool) -> str:
        self._say(f"produce {sink}")
        return sink

    def _finish(self, repository: Any, path: str, end: Any, made: Any) -> dict[str, Any]:
        end.close()
        self._say(f"add {made[0]}")
        return {"layer": made[0]}


def test_records_are_in_the_order_of_the_layers() -> None:
    told = _Told("")
    assert told.layers.write(None, "/nowhere") == [{"layer": "a"}, {"layer": "b"}]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fails", "aborted", "kept"),
    [
        ("produce a", ["abort a"], []),
        ("close a", ["abort a"], None),
        ("produce b", ["abort b"], ["add a"]),
        ("close b", ["abort b"], ["add a"]),
    ],
)
def test_a_failure_gives_up_its_own_image_and_no_other(
    fails: str, aborted: list[str], kept: list[str] | None
) -> None:
    told = _Told(fails)
    with pytest.raises(OSError, match=fails):
        told.layers.write(None, "/nowhere")  # type: ignore[arg-type]
    assert [one for one in told.said if one.startswith("abort")] == aborted
    if kept is not None:
        assert [one for one in told.said if one.startswith("add")] == kept


def _environment(monkeypatch: pytest.MonkeyPatch, wrong: str) -> tuple[Any, list[str]]:
    """An environment of two trees, ``a`` and ``b``; those in ``wrong`` cannot be packed."""
    looked: list[str] = []

    def look(tree: str, *_: Any) -> Any:
        looked.append(tree)
        severity = "error" if tree in wrong else "note"
        return SimpleNamespace(findings=[Finding(tree, "code", "is as it is", severity)])

    monkeypatch.setattr(pack, "look_through", look)
    return SimpleNamespace(findings=(), trees=("a", "b")), looked


def test_a_tree_is_looked_through_when_its_turn_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    environment, looked = _environment(monkeypatch, "b")
    surveys = pack._surveys(environment, Config(), check=False)
    next(surveys)
    assert looked == ["a"]
    with pytest.raises(StagerError, match="b: is as it is"):
        next(surveys)


def test_all_that_is_wrong_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    environment, looked = _environment(monkeypatch, "ab")
    with pytest.raises(StagerError, match=r"(?s)a: is as it is.*b: is as it is"):
        next(pack._surveys(environment, Config(), check=False))
    assert [*pack._surveys(environment, Config(), check=True)] and looked == ["a", "b"] * 2


def test_a_link_to_what_is_on_the_nodes_now_is_packed_again(public_path: Path) -> None:
    """Which paths are on the nodes decides where a link leads."""
    (public_path / "disk").mkdir()
    (public_path / "disk" / "data").touch()
    (public_path / "alias").symlink_to("disk")
    prefix = tiny.environment(public_path / "environment")
    (prefix / "data").symlink_to(public_path / "alias" / "data")
    for local in ([], [str(public_path / "disk")]):
        prefixes = (tiny.BASE_PREFIX, "/usr", *local)
        config = tiny.configured(public_path, local_prefixes=prefixes)
        found = pack.pack(Request((str(prefix),)), config).findings
        assert [one.path for one in found if "not on the node" in one.reason] == (
            [] if local else ["data"]
        )
