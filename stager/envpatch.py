"""Changes of environment variables as data, rendered last."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

SEARCH_PATHS = (
    *("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "MANPATH", "PKG_CONFIG_PATH", "CMAKE_PREFIX_PATH"),
    *("CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH"),
)
"""Variables that hold lists of directories and may name the original environment."""

FILES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "JUPYTER_PATH")
"""Variables that hold one path; hooks/slurm/task_prolog has both lists, too."""
CONTAINERS = ("APPTAINER", "SINGULARITY")
"""How the variables of container programs begin: ``X_BIND``, and ``XENV_NAME`` for NAME inside.

Apptainer reads the other's too, but only where its own is not there.
"""

_INHERITED = re.compile(
    r"(?:(?:APPTAINER|SINGULARITY)ENV_)?"
    r"(?:CONDA_(?!ENVS_|PKGS_)|__CONDA_|_CE_|VIRTUAL_ENV|PYTHONHOME\Z|__PYVENV_LAUNCHER__\Z)"
)
_WORD = re.compile(r"\{(?:prefix|layer\d+)\}")
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


def separator(variable: str) -> str:
    """What parts the items of a list variable."""
    return "," if variable.endswith("_BIND") else ":"


class EnvPatch(NamedTuple):
    """What activation does to the environment.

    Attributes:
        set: variables to set.
        unset: variables to remove.
        prepend: directories to put first in list variables, in order; see :func:`separator`.
    """

    set: Mapping[str, str] = MappingProxyType({})
    unset: tuple[str, ...] = ()
    prepend: Mapping[str, tuple[str, ...]] = MappingProxyType({})

    def at(self, *trees: str) -> EnvPatch:
        """Fill in ``{layer0}``, ... by the trees, from the bottom up; the last is ``{prefix}``."""
        words = {f"{{layer{number}}}": tree for number, tree in enumerate(trees)}
        words["{prefix}"] = trees[-1]

        def fill(text: str) -> str:
            return _WORD.sub(lambda match: words.get(match[0], match[0]), text)

        return EnvPatch(
            {key: fill(value) for key, value in self.set.items()},
            self.unset,
            {key: tuple(map(fill, items)) for key, items in self.prepend.items()},
        )

    def apply(
        self, environ: Mapping[str, str], origins: Mapping[str, str] | None = None
    ) -> dict[str, str]:
        """Compute the environment after activation.

        An activation that is inherited, be it of this environment's original or of another one, is
        taken back first: its directories leave PATH, its variables go.

        Args:
            environ: the environment before.
            origins: original prefixes and where each is now; other variables that name them follow.
        """
        origins = origins or {}
        after = {key: value for key, value in environ.items() if not _INHERITED.match(key)}
        leaving = [f"{prefix}/" for prefix in origins]
        for variable in ("VIRTUAL_ENV", "CONDA_PREFIX", "STAGER_PREFIX"):
            if environ.get(variable, "").startswith("/"):
                leaving.append(environ[variable].rstrip("/") + "/")
        for variable in SEARCH_PATHS:
            if variable not in after:
                continue
            items = after[variable].split(":")
            if variable == "PATH":
                kept = [item for item in items if not (item + "/").startswith(tuple(leaving))]
            else:
                kept = [_follow(item, origins) for item in items]
            after[variable] = ":".join(kept)
        _leave_containers(after, tuple(leaving))
        for variable in FILES:
            if variable in after:
                after[variable] = _follow(after[variable], origins)
        for variable in self.unset:
            after.pop(variable, None)
        after.update(self.set)
        for variable, first in self.prepend.items():
            parting, old = separator(variable), after.get(variable)
            if old is None and variable.startswith("APPTAINER"):
                old = after.get(variable.replace(*CONTAINERS, 1))
            rest = [item for item in (old or "").split(parting) if item and item not in first]
            after[variable] = parting.join([*first, *rest])
        return after

    def to_json(self) -> dict[str, Any]:
        """The patch as a JSON value."""
        return {
            "set": dict(self.set),
            "unset": list(self.unset),
            "prepend": {key: list(items) for key, items in self.prepend.items()},
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> EnvPatch:
        """The inverse of :meth:`to_json`.

        Raises:
            TypeError, ValueError, AttributeError: it is no such value.
        """
        prepend = {key: tuple(items) for key, items in value.get("prepend", {}).items()}
        patch = cls(dict(value.get("set", {})), tuple(value.get("unset", ())), prepend)
        texts = [
            *patch.set.values(),
            *patch.unset,
            *(one for row in prepend.values() for one in row),
        ]
        if not all(isinstance(text, str) and "\0" not in text for text in texts):
            raise TypeError("a variable's value is no text")
        return patch


def _leave_containers(environ: dict[str, str], leaving: tuple[str, ...]) -> None:
    """Take back what an activation has set for containers."""
    # A container does not start where what is to be bound has been evicted.
    staged = environ.get("STAGER_PREFIX", "")
    store = (os.path.dirname(staged) + "/",) if staged.startswith("/") else ()
    for program in CONTAINERS:
        _drop(environ, f"{program}_BIND", store)
        _drop(environ, f"{program}ENV_PREPEND_PATH", leaving)


def _drop(environ: dict[str, str], variable: str, prefixes: tuple[str, ...]) -> None:
    """Take the items below these directories out of a list variable."""
    if variable not in environ:
        return
    parting = separator(variable)
    items = environ[variable].split(parting)
    kept = [item for item in items if not (item + "/").startswith(prefixes)]
    if kept:
        environ[variable] = parting.join(kept)
    else:
        del environ[variable]


def _follow(path: str, origins: Mapping[str, str]) -> str:
    for old, new in origins.items():
        if path == old or path.startswith(old + "/"):
            return new + path[len(old) :]
    return path


def changes(
    before: Mapping[str, str], after: Mapping[str, str]
) -> tuple[dict[str, str], list[str]]:
    """The variables to set and to unset to come from one environment to the other.

    Names that no shell could say are left out: in its code they would be code.
    """
    changed = {
        key: value
        for key, value in sorted(after.items())
        if before.get(key) != value and _IDENTIFIER.match(key)
    }
    return changed, sorted(key for key in before if key not in after and _IDENTIFIER.match(key))


def _quote(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def render_sh(changed: Mapping[str, str], unset: Iterable[str]) -> str:
    """Commands for sh, dash, bash, ksh and zsh."""
    lines = [f"unset {name}" for name in unset]
    lines += [f"export {name}={_quote(value)}" for name, value in changed.items()]
    return "\n".join([*lines, "hash -r 2>/dev/null || true"]) + "\n"


def render_csh(changed: Mapping[str, str], unset: Iterable[str]) -> str:
    """Commands for csh and tcsh, on one line each; ``eval`` there joins lines with spaces."""
    lines = [f"unsetenv {name};" for name in unset]
    for name, value in changed.items():
        quoted = _quote(value).replace("!", "'\\!'")
        lines.append(f"setenv {name} {quoted};")
    return "\n".join([*lines, "rehash;"]) + "\n"


def render_fish(changed: Mapping[str, str], unset: Iterable[str]) -> str:
    """Commands for fish."""

    def quote(text: str) -> str:
        return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"

    lines = [f"set -e {name};" for name in unset]
    for name, value in changed.items():
        values = value.split(":") if name == "PATH" else [value]
        lines.append(f"set -gx {name} {' '.join(quote(item) for item in values)};")
    return "\n".join(lines) + "\n"


def render_json(changed: Mapping[str, str], unset: Iterable[str]) -> str:
    """A JSON object: a string for each variable to set, null for each to unset."""
    value: dict[str, str | None] = dict.fromkeys(unset)
    value.update(changed)
    return json.dumps(value, sort_keys=True) + "\n"


RENDERERS = {"sh": render_sh, "csh": render_csh, "fish": render_fish, "json": render_json}
