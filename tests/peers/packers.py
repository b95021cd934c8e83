"""One small adapter for each packer: from an environment to the same one at another path."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from environments import VENV, Environment, clean_environ, run, run_hidden
from workbench import Bench

from . import subjects


@dataclass(frozen=True)
class Moved:
    """An environment that was packed and brought to another place.

    Args:
        prefix: where it is now.
        hide: the original, and what it was made from.
    """

    original: Environment
    prefix: Path
    hide: tuple[Path, ...]

    @property
    def python(self) -> Path:
        return self.prefix / "bin" / "python"

    @property
    def site_packages(self) -> Path:
        (found,) = self.prefix.glob("lib/python3.*/site-packages")
        return found

    def run(
        self, *argv: str | Path, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command for which the original does not exist."""
        return run_hidden(argv, hide=self.hide, env=env)


class Packer(Protocol):
    """A packer, used as its own documentation says."""

    name: str

    def pack(self, environment: Environment, directory: Path) -> Path:
        """Pack into a new directory; returns the archive."""

    def unpack(self, archive: Path, directory: Path) -> Path:
        """Bring it to a new place, as its documentation says; returns the prefix."""


class CondaPacker(Packer, Protocol):
    """One of conda environments."""

    def activation(self, prefix: Path) -> str:
        """Shell code that activates the environment."""

    def environ(self) -> Mapping[str, str]:
        """Variables to start a shell with."""


class VenvPacker(Packer, Protocol):
    """One of virtual environments."""

    make: subjects.Make
    """Makes the environments that it is meant for."""


class Stager:
    name = "stager"
    make = staticmethod(subjects.with_venv)

    def __init__(self, bench: Bench) -> None:
        self._bench = bench

    def pack(self, environment: Environment, directory: Path) -> Path:
        self._bench.pack(environment, name=directory.name)
        layer = self._bench.json("inspect", directory.name)["layers"][-1]
        (image,) = self._bench.repository.glob(f"images/{layer['id']}-*")
        return image

    def unpack(self, archive: Path, directory: Path) -> Path:
        return self._bench.stage(name=directory.name).prefix

    def activation(self, prefix: Path) -> str:
        return f'eval "$({VENV}/bin/stager activate conda-there)"'

    def environ(self) -> Mapping[str, str]:
        return self._bench.environ()


class VenvPack:
    name = "venv-pack2"
    make = staticmethod(subjects.with_venv)

    def pack(self, environment: Environment, directory: Path) -> Path:
        archive = directory / "packed.tar.gz"
        # It refuses environments with editable installs unless told to leave them as they are.
        options = ["--force", "--quiet", "--prefix", environment.prefix, "--output", archive]
        run([VENV / "bin" / "venv-pack", *options])
        return archive

    def unpack(self, archive: Path, directory: Path) -> Path:
        return _untar(archive, directory)


class CondaPack:
    name = "conda-pack"

    def pack(self, environment: Environment, directory: Path) -> Path:
        archive = directory / "packed.tar.gz"
        options = ["--quiet", "--prefix", environment.prefix, "--output", archive]
        run([VENV / "bin" / "conda-pack", *options])
        return archive

    def unpack(self, archive: Path, directory: Path) -> Path:
        prefix = _untar(archive, directory)
        run([prefix / "bin" / "python", prefix / "bin" / "conda-unpack"])
        return prefix

    def activation(self, prefix: Path) -> str:
        return f". {prefix}/bin/activate"

    def environ(self) -> Mapping[str, str]:
        return clean_environ()


class UvAndTar:
    name = "uv --relocatable, tar"
    make = staticmethod(subjects.with_uv)

    def pack(self, environment: Environment, directory: Path) -> Path:
        archive = directory / "packed.tar.gz"
        run(["tar", "-czf", archive, "-C", environment.prefix, "."])
        return archive

    def unpack(self, archive: Path, directory: Path) -> Path:
        return _untar(archive, directory)


def _untar(archive: Path, directory: Path) -> Path:
    prefix = directory / "env"
    prefix.mkdir()
    run(["tar", "-xzf", archive, "-C", prefix])
    return prefix
