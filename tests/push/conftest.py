"""The lab, and an environment in its repository."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import tiny
from push.lab import Lab

BALLAST = 3 << 20
"""Bytes in the environment that do not get smaller by packing."""


@pytest.fixture
def lab() -> Iterator[Lab]:
    """Four nodes with empty stores; nothing is published."""
    public = Path(os.environ["TESTING_DIRECTORY"]) / "public"
    root = Path(tempfile.mkdtemp(dir=public, prefix=""))
    root.chmod(0o755)
    made = Lab(root)
    yield made
    made.close()


def pack(lab: Lab, *options: str, name: str = "it", ballast: int = BALLAST) -> None:
    """Publish a small environment as `name`."""
    prefix = tiny.environment(lab.home / "envs" / name)
    data = random.Random(name).randbytes(ballast)
    (prefix / tiny.SITE / "ballast.bin").write_bytes(data)
    lab.stager("pack", prefix, "--name", name, *options)
