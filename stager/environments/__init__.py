"""Kinds of environments: what lies at a path, and which trees it is made of.

A kind that is told by what lies there is a module with ``detect(path, config)``, which may return
None; one that the user has to name has ``describe(request, config)``.
"""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from stager.config import Config
from stager.envpatch import EnvPatch
from stager.errors import IncompatibleError, NotFoundError, UsageError
from stager.manifest import TREE, USER, Finding, Manifest
from stager.paths import is_within
from stager.walk import Excluder

PATH = "path"
"""The role of a directory that a variable names beside the environment."""


class Interpreter(NamedTuple):
    """A Python, as it describes itself.

    Attributes:
        executable: the absolute path it was asked at.
        version: ``X.Y.Z``.
        tag: bytecode tag, such as ``cpython-311``.
        magic: the first four bytes of its bytecode files.
        base_prefix: prefix of the standard library it uses.
        base_executable: real path of the interpreter in that prefix.
        library: the standard library relative to ``base_prefix``, such as ``lib/python3.11``.
    """

    executable: str
    version: str
    tag: str
    magic: bytes
    base_prefix: str
    base_executable: str
    library: str


class Tree(NamedTuple):
    """One tree to pack as a layer.

    Attributes:
        role: ``env``, ``base``, ``tree`` for a directory of modules, or ``path`` for one that a
            variable names beside the environment.
        root: absolute path.
        spellings: every path the root is known by, the root included.
        exclude: fnmatch patterns of relative paths to leave out.
        python_directories: relative directories that hold importable modules; an empty one is the
            root itself.
        only: relative paths; nothing else is packed. None packs everything.
        search: the variables and directories, relative, by which it is searched for modules or
            libraries.
    """

    role: str
    root: str
    spellings: tuple[str, ...]
    exclude: tuple[str, ...]
    python_directories: tuple[str, ...]
    only: tuple[str, ...] | None = None
    search: tuple[tuple[str, str], ...] = ()

    @property
    def sites(self) -> tuple[str, ...]:
        """The relative directories that packages are installed into."""
        return tuple(f"{one}/site-packages" if one else "" for one in self.python_directories)


class Environment(NamedTuple):
    """What a user brings.

    Attributes:
        kind: ``venv``, ``conda``, ``user`` or ``tree``.
        prefix: its absolute path.
        name: what to call it when the user gives no name.
        interpreter: the Python it runs.
        trees: the trees to pack, from the bottom up; the environment's own is last.
        activation: the variables that activate it, with ``{prefix}`` for the staged prefix.
        watched: absolute paths that tell whether it changed.
        findings: what was noticed while looking at it.
    """

    kind: str
    prefix: str
    name: str
    interpreter: Interpreter
    trees: tuple[Tree, ...]
    activation: EnvPatch
    watched: tuple[str, ...]
    findings: tuple[Finding, ...] = ()

    @property
    def top(self) -> Tree:
        """The environment's own tree."""
        return self.trees[-1]


class Request(NamedTuple):
    """What to pack.

    Attributes:
        paths: a directory; of directories of modules one or more, in the order of ``sys.path``.
        kind: :data:`~stager.manifest.USER` or :data:`~stager.manifest.TREE`, or empty for whatever
            environment lies there.
        python: the interpreter, where the kind has none of its own.
        search: the variables that may name more directories to import or to link from.
    """

    paths: tuple[str, ...]
    kind: str = ""
    python: str = ""
    search: Mapping[str, str] = MappingProxyType({})

    @classmethod
    def here(cls, paths: Iterable[str], kind: str = "", python: str = "") -> Request:
        """What a user asks for, with the variables that are set."""
        return cls(tuple(paths), kind, python, dict(os.environ))

    @classmethod
    def again(cls, manifest: Manifest) -> Request:
        """What to pack for an environment to be packed again as it was."""
        beside = {layer.origin for layer in manifest.layers if layer.role == PATH}
        bases = [layer.origin for layer in manifest.layers if layer.role == "base"]
        original = manifest.activated([layer.origin for layer in manifest.layers])
        search = {
            name: ":".join(one for one in items if one in beside or is_within(one, bases))
            for name, items in original.prepend.items()
        }
        if manifest.kind not in (USER, TREE):
            return cls((manifest.origin,), search=search)
        trees = tuple(layer.origin for layer in manifest.layers[::-1] if layer.role == TREE)
        paths = trees or (manifest.origin,)
        return cls(paths, manifest.kind, manifest.original_python, search)


_QUESTION = """
import json, os, sys, importlib.util
print(json.dumps({
    "version": "%d.%d.%d" % sys.version_info[:3],
    "tag": sys.implementation.cache_tag,
    "magic": importlib.util.MAGIC_NUMBER.hex(),
    "base_prefix": sys.base_prefix,
    "base_executable": getattr(sys, "_base_executable", "") or sys.executable,
    "library": os.path.dirname(os.__file__),
}))
"""


def ask(executable: str) -> Interpreter:
    """Ask a Python what it is.

    Raises:
        IncompatibleError: it does not start.
    """
    try:
        answer = subprocess.run(
            [executable, "-I", "-S", "-B", "-c", _QUESTION],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=60,
            check=True,
        )
        return _interpreter(executable, json.loads(answer.stdout))
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip().splitlines()
        raise IncompatibleError(
            f"the environment's Python does not start: {executable}",
            hint=said[-1] if said else f"it ended with status {error.returncode}",
        ) from error
    except (OSError, ValueError, KeyError, TypeError, subprocess.TimeoutExpired) as error:
        raise IncompatibleError(
            f"the environment's Python does not start: {executable}: {error}",
            hint="was the Python it was made from removed, or is a module not loaded?",
        ) from error


def _interpreter(executable: str, value: Any) -> Interpreter:
    # Relative, to where Python was started, where `home` in a pyvenv.cfg is.
    base = os.path.abspath(value["base_prefix"])
    return Interpreter(
        executable=executable,
        version=value["version"],
        tag=value["tag"],
        magic=bytes.fromhex(value["magic"]),
        base_prefix=base,
        base_executable=os.path.realpath(value["base_executable"]),
        library=os.path.relpath(value["library"], base),
    )


def spellings(paths: Iterable[str]) -> tuple[str, ...]:
    """Every given path as it is, without detours, and its real path, once each, in order."""
    found: dict[str, None] = {}
    for path in paths:
        found[path.rstrip("/") or "/"] = None
        found[os.path.normpath(path)] = None
        found[os.path.realpath(path)] = None
    return tuple(found)


def is_local(path: str, config: Config) -> bool:
    """Tell whether a path lies on every node's own disk, by the configured prefixes."""
    return is_within(path, config["local_prefixes"])


def base_tree(interpreter: Interpreter, *, with_packages: bool) -> Tree:
    """The base interpreter's prefix as a layer that environments above it share.

    Args:
        interpreter: the Python of an environment above it.
        with_packages: the environment imports the base's own site-packages.
    """
    from stager.environments import conda

    library = interpreter.library
    exclude = [
        f"{library}/test",
        f"{library}/config-*/*.a",
        "lib/libpython*.a",
        "share/man",
        "share/doc",
    ]
    if not with_packages:
        exclude.append(f"{library}/site-packages/*")
    library_parent, own = os.path.split(library)
    for name in _listdir(os.path.join(interpreter.base_prefix, library_parent)):
        if re.fullmatch(r"python\d+\.\d+t?", name) and name != own:
            exclude.append(f"{library_parent}/{name}")
    names = [interpreter.base_prefix, os.path.dirname(os.path.dirname(interpreter.base_executable))]
    if conda.is_prefix(interpreter.base_prefix):
        exclude += conda.excluded(interpreter.base_prefix)
        names += conda.called(interpreter.base_prefix, library)[0]
    else:  # of whose package cache each name would be asked for
        exclude += (f"/{glob.escape(path)}" for path in _environments(interpreter.base_prefix))
    return Tree(
        role="base",
        root=interpreter.base_prefix,
        spellings=spellings(names),
        exclude=tuple(exclude),
        python_directories=(library,),
    )


def _environments(prefix: str) -> Iterator[str]:
    """The paths of virtual environments in a Python's prefix, where pyenv-virtualenv makes them.

    A directory that holds nothing else is one path: what is made there later is no change.
    """
    for name in _listdir(prefix):
        if name in ("bin", "include", "lib", "lib64", "share"):
            continue
        found = _listdir(os.path.join(prefix, name))
        inside = [one for one in found if _is_virtual(os.path.join(prefix, name, one))]
        if _is_virtual(os.path.join(prefix, name)) or (inside and inside == found):
            yield name
        else:
            yield from (f"{name}/{one}" for one in inside)


def _is_virtual(path: str) -> bool:
    return os.path.exists(os.path.join(path, "pyvenv.cfg"))


def _listdir(path: str) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except OSError:
        return []


def default_name(prefix: str) -> str:
    """What to call an environment at ``prefix``: its directory, or its project's for ``.venv``."""
    base = os.path.basename(prefix)
    if base in (".venv", "venv", "env", ".env"):
        base = os.path.basename(os.path.dirname(prefix))
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", base).strip("-._")
    return name[:128] or "environment"


def describe(request: Request, config: Config) -> Environment:
    """Find out what is to be packed.

    Raises:
        NotFoundError: nothing is there, or nothing that is an environment.
        IncompatibleError: its Python does not start.
        UsageError: it lies where much more than an environment is.
    """
    from stager.environments import searchpaths, trees, userbase

    for path in map(os.path.abspath, request.paths):
        if not os.path.isdir(path):
            raise NotFoundError(
                f"there is no environment at {path}",
                hint="give the directory of a virtual or conda environment",
            )
    if request.kind == USER:
        environment = userbase.describe(request, config)
    elif request.kind == TREE:
        environment = trees.describe(request, config)
    else:
        environment = _detected(os.path.abspath(request.paths[0]), config)
    for tree in environment.trees:
        _require_apart(tree, config)
    return searchpaths.settle(environment, request.search, config)


def _require_apart(tree: Tree, config: Config) -> None:
    """Refuse a tree with the repository in it, and a base with a home in it.

    Raises:
        UsageError: it is one.
    """
    held = {"the repository": config["repository"]}
    hint = "name another repository (--repository, STAGER_REPOSITORY)"
    if tree.role == "base":  # which nobody has asked to pack: it is where Python was installed
        held = {"the home directory": os.path.expanduser("~"), **held}
        hint = "make the environment with a Python that is installed in a directory of its own"
    exclude = Excluder((*tree.exclude, *config["pack.exclude"]), tree.only)
    for what, path in held.items():
        inside = os.path.relpath(os.path.realpath(path), os.path.realpath(tree.root))
        if inside.split("/")[0] != ".." and not exclude.leaves_out(inside):
            raise UsageError(f"{tree.root} cannot be packed: {what} {path} is in it", hint=hint)


def _detected(prefix: str, config: Config) -> Environment:
    from stager.environments import conda, venv

    environment = venv.detect(prefix, config) or conda.detect(prefix, config)
    if environment is None:
        raise NotFoundError(
            f"{prefix} is not a Python environment: it has no pyvenv.cfg and no conda-meta",
            hint="give the directory that was named to `python -m venv` or `conda create -p`;"
            " a directory of modules is packed with --tree",
        )
    return environment


def base_of(python: str, config: Config) -> tuple[Interpreter, list[Tree], list[Finding]]:
    """The interpreter that imports what has none of its own, and its layer, if it is no node's own.

    Args:
        python: a path, a command, or empty for ``python3``.
        config: ``local_prefixes`` are the nodes' own.

    Raises:
        NotFoundError: there is no such command.
        IncompatibleError: it does not start.
    """
    found = shutil.which(python or "python3")
    if found is None:
        raise NotFoundError(
            f"there is no Python `{python or 'python3'}`", hint="name another one with --python"
        )
    # One of a virtual environment stands for the Python that it was made from.
    interpreter = ask(ask(os.path.abspath(found)).base_executable)
    if not is_local(interpreter.base_prefix, config):
        return interpreter, [base_tree(interpreter, with_packages=True)], []
    return interpreter, [], [of_the_node(interpreter.executable, interpreter)]


def of_the_node(path: str, interpreter: Interpreter) -> Finding:
    """Tell that packages of the node's own Python are imported, too."""
    return Finding(
        path,
        "system-site",
        f"also imports packages from {interpreter.base_prefix}: each node has its own there,"
        " which may differ",
        "warning",
    )
