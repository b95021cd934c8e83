"""Conda's prefixes: conda, mamba, micromamba, pixi.

Such a prefix holds its own Python, so it is one layer. What a package has in it is told by
:mod:`stager.rewriting.condameta`; here is what a prefix is called, what it sets, and what of a base
installation is no part of the environment.
"""

from __future__ import annotations

import glob
import itertools
import json
import os
import re
import shlex
import struct
from collections.abc import Iterable, Iterator

from stager import fsutil
from stager.config import Config
from stager.environments import Environment, Tree, ask, default_name, names, records, spellings
from stager.envpatch import EnvPatch
from stager.errors import IncompatibleError
from stager.manifest import Finding
from stager.rewriting import bytecode, condameta
from stager.rewriting.relocate import Move, Relocation
from stager.sourcing import ACTIVATE

_VARIABLES, _STATE = "etc/conda/env_vars.d", f"{condameta.DIRECTORY}/state"
_UNSET = "***unset***"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_OF_AN_INSTALLATION = ("pkgs", "envs", "conda-bld")
"""The package cache, other environments, and the place where packages are built."""


def is_prefix(path: str) -> bool:
    """Tell whether a directory is a prefix of conda's."""
    directory = os.path.join(path, condameta.DIRECTORY)
    return os.path.exists(os.path.join(directory, "history")) or bool(
        glob.glob(os.path.join(glob.escape(directory), "*.json"))
    )


def detect(path: str, config: Config) -> Environment | None:
    """Describe the conda environment at ``path``, or return None where there is none.

    Raises:
        IncompatibleError: it has no Python, or one that does not start.
    """
    if not is_prefix(path):
        return None
    executable = os.path.join(path, "bin", "python")
    if not os.path.exists(executable):
        raise IncompatibleError(
            f"the conda environment {path} has no Python",
            hint="it can be packed after: conda install -p DIRECTORY python",
        )
    interpreter = ask(executable)
    found, findings = called(path, interpreter.library)
    own = Tree(
        role="env",
        root=path,
        spellings=spellings([path, *found]),
        exclude=excluded(path),
        python_directories=(interpreter.library,),
    )
    findings += [*_left_out(own), *_pixi(path)]
    changed, unset = _variables(own)
    watched = (
        f"{condameta.DIRECTORY}/history",
        condameta.DIRECTORY,
        _STATE,
        "bin",
        f"{interpreter.library}/site-packages",
        ACTIVATE,
    )
    return Environment(
        kind="conda",
        prefix=path,
        name=_own_name(path),
        interpreter=interpreter,
        trees=(own,),
        activation=EnvPatch(
            set={
                "CONDA_PREFIX": "{prefix}",
                "CONDA_DEFAULT_ENV": _title(path),
                "CONDA_SHLVL": "1",
                **changed,
            },
            unset=tuple(unset),
            prepend={"PATH": ("{prefix}/bin",)},
        ),
        watched=(*(os.path.join(path, one) for one in watched), interpreter.base_executable),
        findings=tuple(findings),
    )


def excluded(path: str) -> tuple[str, ...]:
    """What of an installation's base is no part of the environment, as patterns."""
    if not _is_base(path):
        return ()
    return tuple(f"/{name}" for name in _OF_AN_INSTALLATION)


def _is_base(path: str) -> bool:
    marks = ("condabin", "pkgs/urls.txt", "pkgs/cache")
    return any(os.path.exists(os.path.join(path, mark)) for mark in marks)


def _left_out(tree: Tree) -> Iterator[Finding]:
    for pattern in tree.exclude:
        name = pattern[1:]
        if os.path.exists(os.path.join(tree.root, name)):
            reason = "part of the conda installation, not of the environment: left out"
            yield Finding(name, "installation", reason, "note")


def _pixi(path: str) -> Iterator[Finding]:
    """What pixi sets from the project's own file is not in the environment."""
    try:
        told = os.path.join(path, condameta.DIRECTORY, "pixi")
        with open(told, "rb", opener=fsutil.regular) as file:
            manifest = json.loads(file.read())["manifest_path"]
        with open(manifest, encoding="utf-8", errors="replace", opener=fsutil.regular) as file:
            text = file.read()
    except (OSError, ValueError, KeyError, TypeError):
        return
    if re.search(r"^\s*\[([^\]\n]*\.)?activation[.\]]", text, re.MULTILINE):
        reason = "variables and scripts of its table `activation` are not part of the environment"
        yield Finding(manifest, "activation", reason, "warning")


def _own_name(path: str) -> str:
    """What to call it when the user gives no name; pixi's are called by their project, too."""
    name = default_name(path)
    if os.path.basename(os.path.dirname(path)) != "envs" or "/.pixi/envs/" not in path:
        return name
    project = default_name(path.partition("/.pixi/envs/")[0])
    return project if name == "default" else f"{project}-{name}"


def _title(path: str) -> str:
    """``CONDA_DEFAULT_ENV`` as conda sets it: a name where it has one, else the prefix."""
    if _is_base(path):
        return "base"
    parent, name = os.path.split(path)
    return name if os.path.basename(parent) == "envs" else "{prefix}"


# -- variables ------------------------------------------------------------------------------


def _variables(tree: Tree) -> tuple[dict[str, str], list[str]]:
    """The variables that packages (``env_vars.d``) and then the user (``state``) have set.

    Returns:
        Those to set, with ``{prefix}`` in them, and those to unset.
    """
    relocation = Relocation(Move(spelling, "{prefix}") for spelling in tree.spellings)
    found: dict[str, str] = {}
    directory = os.path.join(tree.root, _VARIABLES)
    for path in sorted(glob.glob(os.path.join(glob.escape(directory), "*"))):
        found.update(_texts(_load(path)))
    state = _load(os.path.join(tree.root, _STATE))
    found.update(_texts(state.get("env_vars")))
    new = {
        name: os.fsdecode(relocation.text(os.fsencode(value)))
        for name, value in found.items()
        if value != _UNSET
    }
    return new, [name for name, value in found.items() if value == _UNSET]


def _load(path: str) -> dict[str, object]:
    try:
        with open(path, "rb", opener=fsutil.regular) as file:
            value = json.loads(file.read())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _texts(value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        return {}
    pairs = {str(name): str(text) for name, text in value.items()}
    return {name: text for name, text in pairs.items() if _NAME.match(name) and _can_be_set(text)}


def _can_be_set(text: str) -> bool:
    """Whether a variable can have this value: JSON also has characters that are none."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


# -- names ----------------------------------------------------------------------------------


def called(path: str, library: str) -> tuple[list[str], list[Finding]]:
    """Every path that the files of a prefix call it by, and what to say of them.

    Args:
        path: the prefix.
        library: the standard library relative to it.
    """
    # A script may be for another environment's Python, if that is there.
    scripts = (one for one in names.in_scripts(path) if _is_name(one, path))
    original = itertools.chain(_in_history(path), _in_bytecode(path, library))
    candidates = itertools.chain(scripts, names.in_kernels(path), original)
    return names.judge(path, candidates, marker=condameta.DIRECTORY)


def _is_name(candidate: str, path: str) -> bool:
    return not os.path.exists(candidate) or os.path.realpath(candidate) == os.path.realpath(path)


def _in_history(path: str) -> Iterator[str]:
    """What the environment is a clone of (``conda create --clone``), by its history."""
    try:
        history = os.path.join(path, condameta.DIRECTORY, "history")
        with open(history, encoding="utf-8", errors="replace", opener=fsutil.regular) as file:
            commands = re.findall(r"^# cmd: (.*)$", file.read(), re.MULTILINE)
    except OSError:
        return
    for command in commands:
        try:
            words = shlex.split(command)
        except ValueError:
            continue
        for word, following in zip(words, [*words[1:], ""]):
            if word == "--clone" or word.startswith("--clone="):
                name = word.partition("=")[2] or following
                yield from _clone_of(path, name, os.path.dirname(os.path.dirname(words[0])))


def _clone_of(path: str, name: str, installation: str) -> Iterator[str]:
    if name.startswith("/"):
        yield os.path.normpath(name)
    elif name in ("base", "root"):
        yield installation
    else:
        yield from (
            one
            for one in (f"{os.path.dirname(path)}/{name}", f"{installation}/envs/{name}")
            if is_prefix(one)
        )


def _in_bytecode(path: str, library: str) -> Iterator[str]:
    """The prefix in bytecode of what pip installed: a clone has it from its original."""
    site = os.path.join(path, library, "site-packages")
    recorded = os.path.join(glob.escape(site), "*.dist-info", "RECORD")
    for record in sorted(glob.glob(recorded)):
        try:
            installer = os.path.join(os.path.dirname(record), "INSTALLER")
            with open(installer, opener=fsutil.regular) as file:
                if file.read().strip() == "conda":
                    continue
        except (OSError, UnicodeError):
            continue
        found = next(_of_bytecode(site, library, records.read(record)), None)
        if found:
            yield found


def _of_bytecode(site: str, library: str, recorded: Iterable[str]) -> Iterator[str]:
    for name in recorded:
        split = bytecode.split(name)
        if split is None or name.startswith(".."):
            continue
        try:
            with open(os.path.join(site, name), "rb", opener=fsutil.regular) as file:
                code = file.read()
        except OSError:
            continue
        prefix = _prefix_before(code, os.fsencode(f"/{library}/site-packages/{split[0]}"))
        if prefix:
            yield prefix


def _prefix_before(code: bytes, rest: bytes) -> str:
    """The text before ``rest`` in the marshalled string that ends with it, or empty."""
    end = code.find(rest) + len(rest)
    start = code.rfind(b"/", bytecode.HEADER, end - len(rest)) if end >= len(rest) else -1
    while start > bytecode.HEADER and end - start <= 4096:
        length = end - start
        if code[start - 1] == length or code[start - 4 : start] == struct.pack("<I", length):
            return os.fsdecode(code[start : end - len(rest)])
        start = code.rfind(b"/", bytecode.HEADER, start)
    return ""
