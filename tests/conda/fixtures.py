"""Conda environments, as conda and as pixi leave them; made when a test first asks for one.

They belong to the whole session, like those of ``environments.py``: tests must not change them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import environments
from environments import Environment, Workshop, run, sample_wheel

from . import channel

VARIABLES = {"DEMO_STATE": "from conda-meta/state", "DEMO_STATE_PATH": "{prefix}/share"}
"""What ``conda-meta/state`` holds."""


@dataclass(frozen=True)
class CondaEnvironment(Environment):
    """A conda environment.

    Args:
        cache: the directory of unpacked packages that it was linked from.
    """

    cache: Path

    @property
    def site_packages(self) -> Path:
        (found,) = self.prefix.glob("lib/python3.*/site-packages")
        return found

    def records(self) -> dict[str, dict[str, Any]]:
        """What ``conda-meta`` has of each package, by name."""
        records = (json.loads(path.read_text()) for path in self.prefix.glob("conda-meta/*.json"))
        return {record["name"]: record for record in records}

    def paths(self) -> Iterator[dict[str, Any]]:
        """What ``conda-meta`` has of each path of each package."""
        for record in self.records().values():
            yield from record["paths_data"]["paths"]

    def untracked(self) -> Iterator[Path]:
        """Files and links that no package owns, relative to the prefix; ``conda-meta`` aside."""
        owned = {path["_path"] for path in self.paths()}
        for parent, _directories, files in os.walk(self.prefix):
            for name in files:
                path = Path(parent, name).relative_to(self.prefix)
                if str(path) not in owned and path.parts[0] != "conda-meta":
                    yield path


@pytest.fixture(scope="session")
def conda_channel() -> Path:
    """The channel; built once per checkout, which takes a minute."""
    hidden = environments.CALLERS  # how to reach the registry may be told by files in HOME
    callers = {name: value for name, value in os.environ.items() if name.startswith(hidden)}
    environ = {name.removeprefix(hidden): value for name, value in callers.items()}
    return channel.build(channel.WORK / "channel", environ={**os.environ, **environ})


@pytest.fixture(scope="session")
def conda_env(workshop: Workshop, conda_channel: Path) -> CondaEnvironment:
    """All packages of the channel as conda installs them, and one more installed by pip.

    It lies where a user's Miniforge has it, beside the cache that its files are linked from.
    """

    def make(prefix: Path, cache: Path) -> None:
        install(prefix, cache, conda_channel)

    return _made(workshop, "miniforge/envs/everything", "miniforge/pkgs", make)


@pytest.fixture(scope="session")
def conda_clone(
    workshop: Workshop, conda_env: CondaEnvironment, conda_channel: Path
) -> CondaEnvironment:
    """What ``conda create --clone`` makes of :func:`conda_env`.

    The packages are linked from the same cache. What no package owns is copied, and names the new
    prefix only where it is UTF-8: other files go on naming that of the original.
    """

    def make(prefix: Path, cache: Path) -> None:
        _conda(prefix, cache, conda_channel)
        for path in conda_env.untracked():
            new = prefix / path
            new.parent.mkdir(parents=True, exist_ok=True)
            new.unlink(missing_ok=True)  # of a link script
            shutil.copy2(conda_env.prefix / path, new, follow_symlinks=False)
            try:
                text = new.read_bytes().decode()
            except UnicodeDecodeError:
                continue
            times = new.stat()
            new.write_bytes(text.replace(str(conda_env.prefix), str(prefix)).encode())
            os.utime(new, ns=(times.st_atime_ns, times.st_mtime_ns))

    return _made(workshop, "miniforge/envs/clone", "miniforge/pkgs", make)


@pytest.fixture(scope="session")
def pixi_like_env(workshop: Workshop, conda_channel: Path) -> CondaEnvironment:
    """All packages as pixi installs them: noarch ones have no bytecode, link scripts do not run."""

    def make(prefix: Path, cache: Path) -> None:
        channel.environment(prefix, channel=conda_channel, cache=cache, pixi=True)

    return _made(workshop, "project/.pixi/envs/default", "rattler/cache/pkgs", make)


def install(prefix: Path, cache: Path, conda_channel: Path) -> None:
    """Make what :func:`conda_env` is at any place."""
    _conda(prefix, cache, conda_channel)
    wheel = sample_wheel(Path(os.environ["TMPDIR"]) / f"sample-{os.getpid()}")
    pip = [prefix / "bin" / "pip", "--quiet", "--no-cache-dir", "install"]
    run([*pip, "--no-index", "--no-deps", wheel])


def _conda(prefix: Path, cache: Path, conda_channel: Path) -> None:
    variables = {name: value.format(prefix=prefix) for name, value in VARIABLES.items()}
    channel.environment(prefix, channel=conda_channel, cache=cache, pyc=True, variables=variables)


def _made(
    workshop: Workshop, name: str, cache: str, make: Callable[[Path, Path], None]
) -> CondaEnvironment:
    packages = workshop.root / cache

    def made(prefix: Path) -> Environment:
        make(prefix, packages)
        return Environment(prefix=prefix, base_prefix=prefix)

    found = workshop.once(name, made)
    return CondaEnvironment(found.prefix, found.base_prefix, cache=packages)
