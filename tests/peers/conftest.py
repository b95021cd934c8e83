"""Fixtures that these tests share with those in ``tests/root``."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from conda.fixtures import conda_channel, conda_env

__all__ = ["conda_channel", "conda_env", "new_directory"]


@pytest.fixture(scope="session")
def new_directory() -> Callable[[], Path]:
    """Makes directories with short paths; the session removes them."""

    def make() -> Path:
        public = Path(os.environ["TESTING_DIRECTORY"]) / "public"
        return Path(tempfile.mkdtemp(dir=public, prefix=""))

    return make
