"""From what was found in a tree to what will be in its image. No bytes are read here.

A plan is a list of items in the order they are written: a directory's own files first, then its
subdirectories, so that a module's new bytecode follows soon after its source. Files whose content
depends on others come last: ``RECORD``, and then conda's records, which have its checksum.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

from stager.manifest import Finding
from stager.paths import is_within
from stager.rewriting import bytecode, condameta
from stager.rewriting.condameta import Recorded
from stager.rewriting.relocate import Relocation
from stager.walk import DIRECTORY, LINK, SPECIAL, Entry

_RECORD = re.compile(r"[^/]+\.dist-info/RECORD\Z")
LAST = {"record": 1, "conda": 2}
"""Kinds of items whose content depends on others', in the order they are written."""
_PYTHON_NAME = re.compile(r"python(\d(\.\d+t?)?)?\Z")


class Item(NamedTuple):
    """One thing to write.

    Attributes:
        path: its place in the layer.
        kind: ``file``, ``dir``, ``symlink``, or ``record`` for a file written last, ``conda`` for
            one written after those.
        entry: what it is made from; None for a directory that is new.
        target: where a link will point.
        pyc: the existing bytecode of a source, or None.
        tag: bytecode tag to have for a source, or empty.
    """

    path: str
    kind: str
    mode: int
    mtime: int
    entry: Entry | None = None
    target: str = ""
    pyc: Entry | None = None
    tag: str = ""


class Place(NamedTuple):
    """Where a layer comes from and goes to, and what is known around it.

    Attributes:
        root: where it lies now.
        destination: where it will lie.
        relocation: every move, those of layers below included.
        python_directories: relative directories with importable modules.
        tag: bytecode tag of the interpreter.
        interpreter: new absolute path of the base interpreter.
        base_executable: real path of the base interpreter now.
        local: prefixes on every node's own disk; links there stay.
        copies_of_python: paths of files that are the base interpreter, byte for byte: they become
            links, because a copy does not find its shared library.
        recorded: what conda recorded of its paths.
    """

    root: str
    destination: str
    relocation: Relocation
    python_directories: tuple[str, ...]
    tag: str
    interpreter: str
    base_executable: str
    local: tuple[str, ...]
    copies_of_python: frozenset[str] = frozenset()
    recorded: Mapping[str, Recorded] = MappingProxyType({})


def make(
    place: Place, entries: Iterable[Entry], *, compile_all: bool
) -> tuple[list[Item], list[Finding]]:
    """Plan a layer.

    Args:
        place: where it comes from and goes to.
        entries: everything in it, link targets that are taken in included.
        compile_all: sources in Python directories without bytecode get some.

    Returns:
        The items in writing order, and what the user should know.
    """
    findings: list[Finding] = []
    files: dict[str, Entry] = {}
    items: list[Item] = []
    for entry in entries:
        if entry.kind == DIRECTORY:
            items.append(Item(entry.path, "dir", 0o755, seconds(entry), entry))
        elif entry.kind == LINK:
            target, finding = _retarget(place, entry)
            findings += [finding] if finding else []
            items.append(Item(entry.path, "symlink", 0o777, seconds(entry), entry, target=target))
        elif entry.kind == SPECIAL:
            findings.append(
                Finding(entry.path, "special", "a socket, pipe or device: left out", "note")
            )
        elif entry.path in place.copies_of_python:
            target = _relative(place, entry.path, place.interpreter)
            items.append(Item(entry.path, "symlink", 0o777, seconds(entry), entry, target=target))
        else:
            files[entry.path] = entry
    items += _files(place, files, compile_all, findings)
    caches = {_cache_of(item.path): item.mtime for item in reversed(items) if item.tag}
    for item in items:
        if item.kind == "dir":
            caches.pop(item.path, None)
    # What else is called so, a link to nothing or a file that is to keep bytecode away, gives way.
    items = [item for item in items if item.path not in caches]
    items += (Item(path, "dir", 0o755, mtime) for path, mtime in caches.items())
    return sorted(items, key=_order), findings


def _cache_of(source: str) -> str:
    return os.path.join(os.path.dirname(source), "__pycache__")


def _files(
    place: Place, files: Mapping[str, Entry], compile_all: bool, findings: list[Finding]
) -> Iterator[Item]:
    caches: dict[str, Entry] = {}
    plain: list[Entry] = []
    dropped = 0
    for entry in files.values():
        cached = bytecode.split(entry.path)
        if cached is None:
            plain.append(entry)
            continue
        source, tag = cached
        if source in files and tag == place.tag:
            caches[source] = entry
        else:
            dropped += 1
    if dropped:
        reason = f"{dropped} bytecode files that {place.tag} would not load: left out"
        findings.append(Finding(".", "bytecode", reason, "note"))
    for entry in plain:
        executable = 0o111 if entry.mode & 0o111 else 0
        mode = (entry.mode & 0o755) | 0o444 | executable
        # Searching each path would take 4 us, longer than all else here.
        is_record = entry.path.endswith("/RECORD") and _RECORD.search(entry.path)
        kind = "record" if is_record else "file"
        kind = "conda" if condameta.RECORD.match(entry.path) else kind
        pyc = caches.get(entry.path)
        wanted = entry.path.endswith(".py") and (
            pyc is not None or (compile_all and _is_importable(place, entry.path))
        )
        tag = place.tag if wanted else ""
        yield Item(entry.path, kind, mode, seconds(entry), entry, pyc=pyc, tag=tag)


def _is_importable(place: Place, path: str) -> bool:
    name = path.rpartition("/")[2][: -len(".py")]
    return name.isidentifier() and is_below(path, place.python_directories)


def is_below(path: str, directories: Iterable[str]) -> bool:
    """Tell whether a relative path is in one of the directories; the empty one is the tree."""
    return any(not one or path.startswith(f"{one}/") for one in directories)


def seconds(entry: Entry) -> int:
    """An entry's modification time as images hold it."""
    # Image formats hold 32 bits of whole seconds; so does the check of bytecode against source.
    return min(max(entry.mtime_ns // 1_000_000_000, 0), 0xFFFFFFFF)


def _order(item: Item) -> tuple[int, tuple[str, ...], bool, str]:
    directory, _, name = item.path.rpartition("/")
    if item.kind == "dir":
        # A directory's record opens its own section.
        return 0, (() if item.path == "." else tuple(item.path.split("/"))), False, ""
    section = tuple(directory.split("/")) if directory else ()
    return LAST.get(item.kind, 0), section, True, name


def _relative(place: Place, path: str, target: str) -> str:
    """The link text for a new absolute target: relative where both lie in the store."""
    store = os.path.dirname(place.destination)
    if not target.startswith(f"{store}/"):
        return target
    here = os.path.dirname(os.path.join(place.destination, path))
    return os.path.relpath(target, here)


def _retarget(place: Place, entry: Entry) -> tuple[str, Finding | None]:
    """Where a link will point after the move, and what the user should know of it."""
    directory = os.path.dirname(os.path.join(place.root, entry.path))
    absolute = os.path.normpath(os.path.join(directory, entry.target))
    if _PYTHON_NAME.match(os.path.basename(entry.path)) and (
        os.path.realpath(entry.source) == place.base_executable
    ):
        inside = place.relocation.path(absolute)
        if inside is None or not inside.startswith(f"{place.destination}/"):
            return _relative(place, entry.path, place.interpreter), None
    moved = place.relocation.path(absolute)
    if moved is not None:
        if not os.path.exists(entry.source):
            return _relative(place, entry.path, moved), _dangling(entry)
        if moved.startswith(f"{place.destination}/") and not _climbs_out(entry):
            return entry.target, None
        return _relative(place, entry.path, moved), None
    real = os.path.realpath(entry.source)
    moved = place.relocation.path(real)
    if moved is not None:
        return _relative(place, entry.path, moved), None
    for path in (absolute, real):
        if is_within(path, place.local):
            return path, None
    if not os.path.exists(entry.source):
        # Relative to another place it would be another path, which may well be there.
        return absolute, _dangling(entry)
    return absolute, Finding(
        entry.path, "link", f"still leads to {absolute}, which is not on the node", "warning"
    )


def _climbs_out(entry: Entry) -> bool:
    """Tell whether a link's text leaves the tree, be it to come back by its present name."""
    if entry.target.startswith("/"):
        return True
    depth = entry.path.count("/")
    for part in entry.target.split("/"):
        depth += -1 if part == ".." else part not in ("", ".")
        if depth < 0:
            return True
    return False


def _dangling(entry: Entry) -> Finding:
    return Finding(entry.path, "dangling", f"leads to {entry.target}, which does not exist", "note")


def leaves(place: Place, entry: Entry) -> bool:
    """Tell whether a link leads out of everything that is packed or local, to something there."""
    if entry.kind != LINK:
        return False
    _, finding = _retarget(place, entry)
    return finding is not None and finding.code == "link"
