"""What the tests that stage real environments share."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from environments import Environment
from workbench import KINDS, Bench, Staged


def _directory() -> Path:
    public = Path(os.environ["TESTING_DIRECTORY"]) / "public"
    directory = Path(tempfile.mkdtemp(dir=public, prefix=""))
    directory.chmod(0o755)
    return directory


@pytest.fixture(scope="session")
def new_directory() -> Callable[[], Path]:
    """Makes directories with short paths that other users can reach; the session removes them."""
    return _directory


@pytest.fixture
def bench() -> Iterator[Bench]:
    """An empty repository and an empty store."""
    made = Bench(_directory())
    yield made
    made.close()


@pytest.fixture(scope="session")
def staged(request: pytest.FixtureRequest) -> Iterator[Callable[[str, str], Staged]]:
    """Stage one of :data:`KINDS` in one of the ways, once per session.

    The ways: ``mounted`` and ``extracted`` (squashfs), ``archive`` (tar.zst), and ``elsewhere``
    (squashfs packed for another store than it is staged in).
    """
    benches: dict[str, Bench] = {}
    made: dict[tuple[str, str], Staged] = {}

    def make(kind: str, way: str) -> Staged:
        if (kind, way) not in made:
            made[kind, way] = _stage(kind, way)
        return made[kind, way]

    def _stage(kind: str, way: str) -> Staged:
        environment: Environment = request.getfixturevalue(KINDS[kind])
        bench = benches.setdefault(way, Bench(_directory()))
        options = ["--format", "tar.zst"] if way == "archive" else []
        if way == "elsewhere":
            options += ["--store", f"{bench.root}/packed-for"]
        bench.pack(environment, *options, name=kind)
        how = "mount" if way == "mounted" else "extract"
        return bench.stage("--how", how, name=kind, hide=originals(environment, request))

    yield make
    for bench in benches.values():
        bench.close()


def originals(environment: Environment, request: pytest.FixtureRequest) -> list[Path]:
    """What must not be needed any more: the environment, and all that it was made from."""
    hidden = [environment.prefix]
    if not str(environment.base_prefix).startswith("/usr"):
        hidden.append(environment.base_prefix)
    if "nested" in environment.prefix.name:
        hidden.append(request.getfixturevalue("venv_stdlib").prefix)
    if "uv" in environment.prefix.name:
        hidden.append(Path(os.environ["HOME"]) / "uv-cache")
    return hidden
