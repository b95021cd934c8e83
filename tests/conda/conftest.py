"""The fixtures, for the tests of this directory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from workbench import Bench, Staged

from .fixtures import CondaEnvironment, conda_channel, conda_clone, conda_env, pixi_like_env

__all__ = ["conda_channel", "conda_clone", "conda_env", "pixi_like_env"]

KINDS = {"conda": "conda_env", "clone": "conda_clone", "pixi": "pixi_like_env"}
"""Kinds of environments, and the fixtures that make them."""


def _directory() -> Path:
    public = Path(os.environ["TESTING_DIRECTORY"]) / "public"
    return Path(tempfile.mkdtemp(dir=public, prefix=""))


@pytest.fixture
def bench() -> Iterator[Bench]:
    """An empty repository and an empty store."""
    made = Bench(_directory())
    yield made
    made.close()


@pytest.fixture(scope="session")
def staged(
    request: pytest.FixtureRequest, conda_channel: Path
) -> Iterator[Callable[[str, str], Staged]]:
    """Stage one of :data:`KINDS` in one of the ways, once per session.

    The ways: ``mounted`` (squashfs), ``archive`` (tar.zst), and ``elsewhere`` (squashfs packed for
    another store than it is staged in). Hidden are the environment and what is beside it: the
    package cache, and of a clone the original.
    """
    benches: dict[str, Bench] = {}
    made: dict[tuple[str, str], Staged] = {}

    def make(kind: str, way: str) -> Staged:
        if (kind, way) not in made:
            environment: CondaEnvironment = request.getfixturevalue(KINDS[kind])
            bench = benches.setdefault(way, Bench(_directory()))
            options = ["--format", "tar.zst"] if way == "archive" else []
            if way == "elsewhere":
                options += ["--store", f"{bench.root}/packed-for"]
            bench.pack(environment, *options, name=kind)
            how = "mount" if way == "mounted" else "extract"
            hide = [environment.prefix, environment.cache, conda_channel]
            if kind == "clone":
                hide.append(request.getfixturevalue(KINDS["conda"]).prefix)
            made[kind, way] = bench.stage("--how", how, name=kind, hide=hide)
        return made[kind, way]

    yield make
    for bench in benches.values():
        bench.close()
