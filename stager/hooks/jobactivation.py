"""The activation of a job as a value, which :class:`stager.jobstate.Activation` reads.

What works as the job's user makes it; who writes it into the job is root, and believes nothing.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from stager import activate, jobstate
from stager.config import Config
from stager.envpatch import EnvPatch
from stager.errors import JOB, StagerError
from stager.manifest import Manifest
from stager.ref import Directive

_OF_THE_USER = ("HOME", "USER", "LOGNAME", "SHELL", "LANG")
_INHERITED = (
    "VIRTUAL_ENV", "VIRTUAL_ENV_PROMPT", "PYTHONHOME", "PYTHONPYCACHEPREFIX",
    "__PYVENV_LAUNCHER__", "_CE_CONDA", "_CE_M", "CONDA_PREFIX",
    *(f"CONDA_PREFIX_{level}" for level in range(1, 10)),
    "CONDA_DEFAULT_ENV", "CONDA_PROMPT_MODIFIER", "CONDA_SHLVL", "CONDA_EXE", "CONDA_PYTHON_EXE",
    "APPTAINERENV_VIRTUAL_ENV", "APPTAINERENV_CONDA_PREFIX",
    "SINGULARITYENV_VIRTUAL_ENV", "SINGULARITYENV_CONDA_PREFIX",
)  # fmt: skip
"""Traces of an activation that a job may have inherited from where it was submitted."""
_SHOWN = 4
"""Names that are told."""


class Described(NamedTuple):
    """An activation, and what the user is to know of it.

    Attributes:
        value: what :meth:`stager.jobstate.Activation.checked` takes.
        warning: which variables are left out; empty for none.
    """

    value: dict[str, Any]
    warning: str


def of_path(path: str) -> dict[str, Any]:
    """The activation of an original of which no more than the path is known."""
    patch = EnvPatch({"VIRTUAL_ENV": path}, (), {"PATH": (os.path.join(path, "bin"),)})
    return _value(patch, path, "bin/python", ())


def of_original(manifest: Manifest) -> dict[str, Any]:
    """The activation of an original."""
    patch = activate.together([activate.Part.original(manifest)])
    return _value(patch, manifest.origin, manifest.original_python, ())


def linked(manifest: Manifest, directory: str, part: int) -> activate.Part:
    """An environment by the links in the job's directory, which lead to its trees."""
    layers = len(manifest.layers)
    names = (jobstate.link_name(part, number, layers) for number in range(layers))
    return activate.Part(manifest, tuple(os.path.join(directory, name) for name in names))


def of_staged(
    directive: Directive,
    parts: list[activate.Part],
    config: Config,
    *,
    bound: tuple[str, ...] = (),
) -> Described:
    """The activation of staged environments together, see :func:`stager.activate.patch`.

    Variables that a job's state has no place for, with a newline in them, say, are left out.

    Args:
        directive: by which they were named.
        parts: each with its trees, the first with the Python of all.
        config: the job's.
        bound: directories besides the trees that a container has to bind.

    Raises:
        StagerError: there are more variables than a job's state takes.
    """
    name = "+".join(str(wish) for wish in directive.refs)
    patch = activate.patch(parts, config, ref=name, bound=bound)
    if parts[0].manifest.kind == activate.CONDA:
        from stager import sourcing

        user = {name: os.environ[name] for name in _OF_THE_USER if name in os.environ}
        patch = sourcing.known_beforehand(patch, parts[0].prefix, user)
    # A task replaces all that it finds below these by the first one's prefix.
    leave = [
        old
        for part in parts
        for old, new in part.manifest.moved(part.trees).items()
        if new == part.prefix
    ]
    executable = parts[0].manifest.python.executable
    left = sorted(key for key, value in patch.set.items() if not jobstate.can_have(key, value))
    kept = {key: value for key, value in patch.set.items() if key not in left}
    if max(len(kept), len(patch.unset) + len(_INHERITED)) > jobstate.MOST:
        raise StagerError(
            f"the environment sets more than {jobstate.MOST} variables",
            hint="`conda env config vars list` shows those of a conda environment",
            blame=JOB,
        )
    value = _value(
        patch._replace(set=kept), parts[0].prefix, executable, tuple(dict.fromkeys(leave))
    )
    names = ", ".join(map(ascii, left[:_SHOWN])) + (", ..." if len(left) > _SHOWN else "")
    reason = "a job can have no variable of several lines, or of more than 4096 characters"
    return Described(value, f"{names} not set: {reason}" if left else "")


def _value(patch: EnvPatch, prefix: str, executable: str, leave: tuple[str, ...]) -> dict[str, Any]:
    unset = [name for name in (*_INHERITED, *patch.unset) if name not in patch.set]
    return {
        "python": os.path.join(prefix, executable),
        "prefix": prefix,
        "leave": [one for one in leave if os.path.normpath(one) == one and one != "/"],
        "set": dict(patch.set),
        "unset": list(dict.fromkeys(unset)),
        "prepend": {name: list(items) for name, items in patch.prepend.items()},
    }
