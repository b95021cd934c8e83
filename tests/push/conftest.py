"""Labs, and environments in their repositories."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import tiny
from push.lab import Lab

BALLAST = 3 << 20
"""Bytes in an environment that do not get smaller by packing."""


@pytest.fixture(scope="module")
def new_lab() -> Iterator[Callable[[int], Lab]]:
    """Makes labs; they end with the module."""
    labs = []

    def make(count: int) -> Lab:
        public = Path(os.environ["TESTING_DIRECTORY"]) / "public"
        root = Path(tempfile.mkdtemp(dir=public, prefix=""))
        root.chmod(0o755)
        labs.append(Lab(root, count))
        return labs[-1]

    yield make
    for one in labs:
        one.close()


@pytest.fixture
def lab(new_lab: Callable[[int], Lab]) -> Iterator[Lab]:
    """Four nodes with empty stores, and ``it`` in the repository."""
    made = new_lab(4)
    pack(made)
    yield made
    made.close()


def pack(lab: Lab, *options: str, name: str = "it", ballast: int = BALLAST) -> None:
    """Publish a small environment as `name`."""
    prefix = tiny.environment(lab.home / "envs" / name)
    with (prefix / tiny.SITE / "ballast.bin").open("wb") as file:
        source = random.Random(name)
        for start in range(0, ballast, 1 << 20):
            file.write(source.randbytes(min(1 << 20, ballast - start)))
    lab.stager("pack", prefix, "--name", name, *options)
