"""Where tools keep environments, for a user who says the name and not the path."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from stager.environments import conda, default_name, venv
from stager.errors import UsageError


def named(name: str, environ: Mapping[str, str], cwd: str) -> str | None:
    """Find the environment of a name, or None where no tool keeps one.

    Looked at are ``CONDA_ENVS_PATH``, ``CONDA_ENVS_DIRS``, ``~/.conda/environments.txt``,
    ``WORKON_HOME``, ``~/.virtualenvs``, and in the current directory ``.pixi/envs`` and ``.venv``.

    Args:
        name: what the user typed.
        environ: the user's variables.
        cwd: the directory the user is in.

    Raises:
        UsageError: there are several.
    """
    found: dict[str, str] = {}
    for path in _candidates(name, environ, cwd):
        if os.path.exists(os.path.join(path, venv.CONFIG)) or conda.is_prefix(path):
            found.setdefault(os.path.realpath(path), path)
    if len(found) > 1:
        listed = "".join(f"\n  {path}" for path in found.values())
        raise UsageError(f"`{name}` is ambiguous, it matches:{listed}", hint="give the path of one")
    return next(iter(found.values()), None)


def _candidates(name: str, environ: Mapping[str, str], cwd: str) -> Iterator[str]:
    home = environ.get("HOME", "")
    for variable in ("CONDA_ENVS_PATH", "CONDA_ENVS_DIRS"):
        for directory in environ.get(variable, "").split(":"):
            if directory.startswith("/"):
                yield os.path.join(directory, name)
    for path in _lines(os.path.join(home, ".conda", "environments.txt")):
        # Of an installation itself the list has the path, and conda calls that `base`.
        if os.path.basename(path) == name or (name == "base" and conda.excluded(path)):
            yield path
    for directory in (environ.get("WORKON_HOME", ""), os.path.join(home, ".virtualenvs")):
        if directory.startswith("/"):
            yield os.path.join(directory, name)
    yield os.path.join(cwd, ".pixi", "envs", name)
    own_venv = os.path.join(cwd, ".venv")
    settings = venv.read_config(os.path.join(own_venv, venv.CONFIG)) or {}
    if name in (default_name(own_venv), settings.get("prompt", "").strip("'\"")):
        yield own_venv


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            lines = file.read().splitlines()
    except OSError:
        return []
    return [line.strip().rstrip("/") for line in lines if line.strip().startswith("/")]
