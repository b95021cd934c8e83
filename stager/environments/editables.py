"""Editable installs: the source trees outside an environment that it imports from.

Four mechanisms are in use:

1. a path line in a ``.pth`` file (``easy-install.pth``, ``__editable__*.pth``, hatch, flit);
2. an ``.egg-link`` beside such a line (``setup.py develop``), and programs that run a script where
   it lies in the source;
3. a finder module that maps names to paths: ``MAPPING`` (setuptools, PEP 660), or calls of
   ``map_module`` (the library ``editables``, which hatch and pdm use);
4. a loader that rebuilds on import (meson-python, scikit-build-core): it needs compilers and a
   build tree, so no copy of it can work. That of newer scikit-build-core tells whether it
   does; where it does not, a path line beside it names the source.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from typing import Callable, NamedTuple

from stager import fsutil, paths

_REBUILDS = re.compile(r"_.+_editable(_loader)?\.py\Z")
_REDIRECTS = re.compile(r"_editable_skbc_.+\.py\Z")
_CALLS = re.compile(r"_editable_impl_.+\.py\Z")
_FINDER = re.compile(r"__editable___.+_finder\.py\Z")
_DEVELOPED = re.compile(rb"^# EASY-INSTALL-DEV-SCRIPT.*?^__file__ = ([^\n]+)$", re.M | re.S)
_SKIPPED = {"build", "dist", "node_modules", "__pycache__"}


class Source(NamedTuple):
    """Something outside the environment that it imports from.

    Attributes:
        path: absolute path, as the environment names it: a directory on ``sys.path``, a package's
            own directory, a single module's file without its suffix, or a script.
        named_by: the file in site-packages that names it.
        items: what to copy, as names in ``path``; None is the whole directory.
        module: the file to copy, where it is a single module or script.
    """

    path: str
    named_by: str
    items: tuple[str, ...] | None = None
    module: str = ""


class Rebuilding(NamedTuple):
    """An editable install of the fourth mechanism."""

    named_by: str


def find(site: str, packed: Callable[[str], bool]) -> tuple[list[Source], list[Rebuilding]]:
    """Find every editable install of a site-packages directory.

    Args:
        site: absolute path of the directory.
        packed: tells of a path whether it is on the nodes anyway.

    Returns:
        Source trees to copy, and installs that cannot be copied.
    """
    sources: dict[str, Source] = {}
    rebuilding: list[Rebuilding] = []
    for name in sorted(_names(site)):
        path = os.path.join(site, name)
        if name.endswith((".pth", ".egg-link")):
            found = _path_lines(path, site, link=name.endswith(".egg-link"))
        elif _FINDER.match(name):
            found = _mapping(path)
        elif _CALLS.match(name):
            found = _map_module_calls(path)
        elif _REBUILDS.match(name) or (_REDIRECTS.match(name) and _needs_its_build(path)):
            rebuilding.append(Rebuilding(path))
            continue
        else:
            continue
        for source in found:
            if not _is_there(source, packed):
                sources.setdefault(source.path, source)
    return list(sources.values()), rebuilding


def _is_there(source: Source, packed: Callable[[str], bool]) -> bool:
    """Tell whether what Python would import from a place is on the nodes anyway.

    Of a directory that is searched: what it holds, for a base may be packed without its packages.
    """
    places = (source.path, os.path.realpath(source.path))
    paths = (os.path.join(place, name) for place in places for name in source.items or (".",))
    return any(packed(os.path.normpath(path)) for path in paths)


def scripts(directory: str, packed: Callable[[str], bool]) -> list[Source]:
    """Find the scripts that launchers of ``setup.py develop`` read and run from their source.

    Args:
        directory: where the environment's programs are.
        packed: tells of a path whether it is on the nodes anyway.
    """
    found: dict[str, Source] = {}
    for name in sorted(_names(directory)):
        path = os.path.join(directory, name)
        named = _DEVELOPED.search(_read(path, 4096))
        try:
            value = ast.literal_eval(os.fsdecode(named[1])) if named else None
        except (SyntaxError, ValueError, TypeError):
            continue
        if not (isinstance(value, str) and value.startswith("/") and os.path.isfile(value)):
            continue
        source = Source(os.path.normpath(value), path, module=os.path.normpath(value))
        if not _is_there(source, packed):
            found.setdefault(source.path, source)
    return list(found.values())


def _names(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []


def _read(path: str, size: int = -1) -> bytes:
    """The content of a file, or what it begins with.

    What is no file or may not be read says nothing to Python either.
    """
    try:
        with open(path, "rb", opener=fsutil.regular) as file:
            return file.read(size)
    except OSError:
        return b""


def _parsed(path: str) -> ast.Module:
    """The code of a module; nothing where it is no Python."""
    try:
        return ast.parse(_read(path))
    except (SyntaxError, ValueError):
        return ast.Module([], [])


def _path_lines(path: str, site: str, *, link: bool) -> Iterator[Source]:
    lines = _read(path).decode("utf-8", "surrogateescape").splitlines()
    for line in lines[:1] if link else lines:
        text = paths.of_pth_line(line)
        if not text:
            continue
        directory = os.path.normpath(os.path.join(site, text))
        if os.path.isdir(directory):
            yield Source(directory, path, tuple(sorted(_importable(directory))))


def _importable(directory: str) -> Iterator[str]:
    """The names in a ``sys.path`` directory that Python could import, and package metadata."""
    for name in _names(directory):
        path = os.path.join(directory, name)
        if name.startswith(".") or name in _SKIPPED:
            continue
        if os.path.isdir(path):
            if os.path.exists(os.path.join(path, "pyvenv.cfg")):
                continue
            # The libraries that auditwheel puts beside a package lie in a directory of their own.
            if name.endswith((".egg-info", ".dist-info", ".libs")) or (
                name.isidentifier() and _has_modules(path)
            ):
                yield name
        elif name.endswith((".py", ".so")):
            yield name


def _has_modules(path: str) -> bool:
    for _, directories, files in os.walk(path):
        if any(name.endswith((".py", ".so")) for name in files):
            return True
        directories[:] = [name for name in directories if name.isidentifier()]
    return False


def _mapping(path: str) -> Iterator[Source]:
    """The paths in a setuptools finder's ``MAPPING`` and ``NAMESPACES``, without running it."""
    for node in _parsed(path).body:
        targets: list[ast.expr]
        value: ast.expr | None
        if isinstance(node, ast.AnnAssign):
            targets, value = [node.target], node.value
        elif isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        else:
            continue
        names = {target.id for target in targets if isinstance(target, ast.Name)}
        if value is None or not names & {"MAPPING", "NAMESPACES"}:
            continue
        for literal in ast.walk(value):
            # Keys are dotted names; everything absolute is a path.
            if isinstance(literal, ast.Constant) and isinstance(literal.value, str):
                yield from _mapped(literal.value, path)


def _map_module_calls(path: str) -> Iterator[Source]:
    """The paths that a finder made by the library ``editables`` maps modules to."""
    for node in ast.walk(_parsed(path)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if node.func.attr != "map_module" or len(node.args) != 2:
            continue
        literal = node.args[1]
        if isinstance(literal, ast.Constant) and isinstance(literal.value, str):
            # A package is mapped by its first file, and is the directory that holds it.
            yield from _mapped(literal.value.removesuffix("/__init__.py"), path)


def _needs_its_build(path: str) -> bool:
    """Tell whether a finder of scikit-build-core builds on import, or finds what it has built."""
    for node in ast.walk(_parsed(path)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
            continue
        try:
            values = [ast.literal_eval(one) for one in node.args]
        except (ValueError, TypeError):
            continue
        if node.func.id == "install":
            # Second, compiled modules: by paths relative to the finder if they lie beside it.
            built = values[1] if len(values) > 1 and isinstance(values[1], dict) else {}
            if values[5:6] == [True] or any(str(one).startswith("/") for one in built.values()):
                return True
        elif node.func.id == "install_inplace" and values[3:4] == [True]:
            return True
    return False


def _mapped(text: str, path: str) -> Iterator[Source]:
    if not text.startswith("/"):
        return
    target = os.path.normpath(text)
    if os.path.isdir(target):
        yield Source(target, path)
        return
    # setuptools finds a module by putting each suffix in place of the mapped path's own.
    for module in (target, f"{target}.py"):
        if os.path.isfile(module):
            yield Source(target, path, module=module)
            return
