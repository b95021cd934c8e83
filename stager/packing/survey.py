"""What a tree holds: its entries, and whatever it needs from outside of itself.

An environment reaches out of its directory in two ways that an image must take in: links, and
editable installs.
"""

from __future__ import annotations

import filecmp
import glob
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from typing import Callable

from stager import freshness, walk
from stager.config import Config
from stager.environments import Environment, Tree, editables, records
from stager.manifest import TREE, USER, Finding, Watch
from stager.packing import plan
from stager.paths import is_within
from stager.rewriting import condameta
from stager.rewriting.condameta import Recorded
from stager.rewriting.relocate import Move, Relocation
from stager.walk import DIRECTORY, FILE, LINK, Entry, Excluder

SNAPSHOTS = ".stager/editable"
"""Where copies of editable source trees lie in a layer."""
_PYTHON = r"bin/python[\d.]*t?"


class Survey:
    """What a tree holds.

    Attributes:
        tree: the tree.
        entries: everything to pack, taken-in link targets and snapshots included.
        moves: paths outside the tree whose copies lie in it, relative to the destination.
        copies: directories outside the tree, and where in it a link was replaced by their copy.
        slow: the files lie on a network file system.
        watches: source trees whose changes make the environment stale.
        recorded: what conda recorded of its files.
    """

    def __init__(self, tree: Tree, entries: list[Entry], *, slow: bool) -> None:
        self.tree = tree
        self.entries = entries
        self.slow = slow
        self.moves: list[tuple[str, str]] = []
        self.copies: list[tuple[str, str]] = []
        self.watches: list[Watch] = []
        self.findings: list[Finding] = []
        self.recorded: dict[str, Recorded] = {}


def look_through(tree: Tree, environment: Environment, config: Config) -> Survey:
    """Look through one tree of an environment.

    Raises:
        OSError: something in it cannot be looked at.
    """
    exclude = Excluder((*tree.exclude, *config["pack.exclude"]), tree.only)
    entries, slow = walk.timed(tree.root, exclude)
    found = Survey(tree, entries, slow=slow)
    found.recorded = condameta.read(tree.root)
    found.findings += _too_long(found.recorded, config)
    _take_in_links(found, environment, config)
    # What else comes and goes in a directory that is not packed whole is no change.
    found.entries = [
        one._replace(mtime_ns=0) if one.path in exclude.partial else one for one in found.entries
    ]
    if tree.role in ("env", "base"):
        _take_in_editables(found, environment, config)
    _settle_links(found)
    if tree is environment.top:
        if environment.kind in (USER, TREE):
            _add_python(found, environment)
        else:
            _require_python(found, environment)
    found.entries.sort(key=lambda entry: entry.path)
    return found


def _add_python(survey: Survey, environment: Environment) -> None:
    """Put links to its Python into ``bin`` of an environment that has none."""
    base = environment.interpreter.base_executable
    top = next(entry for entry in survey.entries if entry.path == ".")
    versioned = os.path.basename(environment.interpreter.library)
    paths = [f"bin/{name}" for name in ("python", "python3", versioned)]
    known = next((entry for entry in survey.entries if entry.path == "bin"), None)
    if known is None or known.kind != DIRECTORY:  # a link to another of its directories, or a file
        directory = [top._replace(path="bin", mode=0o755)]
        if known is not None and os.path.isdir(known.source):
            exclude = Excluder(survey.tree.exclude, survey.tree.only)
            directory = walk.walk(os.path.realpath(known.source), exclude, at="bin")
        survey.entries = [one for one in survey.entries if one is not known] + directory
    survey.entries = [one for one in survey.entries if one.path not in paths]
    link = walk.entry(paths[0], base)._replace(kind=LINK, target=base, size=0)
    survey.entries += [link._replace(path=path) for path in paths]


def _require_python(survey: Survey, environment: Environment) -> None:
    """An error where the patterns of `--exclude` leave no Python."""
    python = os.path.relpath(environment.interpreter.executable, environment.prefix)
    if not any(entry.path == python for entry in survey.entries):
        reason = "the environment's Python is left out: see --exclude and the key pack.exclude"
        survey.findings.append(Finding(python, "python", reason, "error"))


def _too_long(recorded: dict[str, Recorded], config: Config) -> Iterator[Finding]:
    """An error where a compiled file has no room for the new prefix, before any is written."""
    below = len("/envs/") + 16  # and the layer's id
    length = len(os.fsencode(config["store"])) + below
    for path, one in itertools.islice(condameta.too_long(recorded, length), 1):
        reason = (
            f"a compiled file of the package {one.package} has room for a path of {one.room} bytes,"
            f" and the staged prefix has {length}: choose a store whose path has at most"
            f" {one.room - below} bytes (--store, STAGER_STORE)"
        )
        yield Finding(path, "room", reason, "error")


def _take_in_links(survey: Survey, environment: Environment, config: Config) -> None:
    """Replace links out of the Python directories, and such directories, by what they lead to.

    An installer that links modules to its cache (``UV_LINK_MODE=symlink``) leaves an environment
    of nothing but such links. Elsewhere, a link may lead to data that are much larger than the
    environment: what it leads to is taken in only where an installer put it there.
    """
    place = place_of(survey, environment, config, "/", {})
    tree, policy = survey.tree, config["pack.links"]
    kept: list[Entry] = []
    taken = 0
    installed: frozenset[str] | None = None
    for entry in survey.entries:
        if not plan.leaves(place, entry):
            kept.append(entry)
            continue
        if not _is_pythons(entry.path, (*tree.python_directories, "bin")):
            if installed is None:
                installed = _installed_data(survey)
            if entry.path not in installed:
                kept.append(entry)
                continue
        real = os.path.realpath(entry.source)
        if policy == "refuse":
            reason = f"a link out of the environment, to {real} (--links refuse)"
            survey.findings.append(Finding(entry.path, "link", reason, "error"))
        if policy != "copy":
            kept.append(entry)
            continue
        taken += 1
        if os.path.isdir(real):
            # A project may have its environment in it, and the environment a link to the project.
            itself = os.path.normpath(
                os.path.join(entry.path, os.path.relpath(os.path.realpath(tree.root), real))
            )
            patterns = (*tree.exclude, *config["pack.exclude"], f"/{glob.escape(itself)}")
            kept += walk.walk(real, Excluder(patterns, tree.only), at=entry.path)
            survey.copies.append((real, entry.path))
        else:
            kept.append(walk.entry(entry.path, real))
    survey.entries = kept
    if taken:
        reason = f"{taken} links out of the environment: what they lead to is included"
        survey.findings.append(Finding(".", "links", reason, "note"))


def _is_pythons(path: str, directories: Iterable[str]) -> bool:
    """Tell whether a path is one of the directories, in one, or what one is in."""
    own = [f"{one}/" for one in directories if one]
    return plan.is_below(path, directories) or any(one.startswith(f"{path}/") for one in own)


def _settle_links(survey: Survey) -> None:
    """Give links in copies of other trees a target that is right where the copy lies.

    One between copied entries stays a link. One to a file that is not copied becomes the file, as
    does one to a directory of a copied source tree; a directory elsewhere may be of any size, so a
    link to it goes on leading there. A module that is a link becomes a file everywhere: bytecode
    is made of files only.
    """
    own = f"{survey.tree.root}/"
    known = {entry.path for entry in survey.entries}
    settled: list[Entry] = []
    for entry in survey.entries:
        if entry.kind != LINK:
            settled.append(entry)
            continue
        target = os.path.normpath(os.path.join(os.path.dirname(entry.source), entry.target))
        real = os.path.realpath(entry.source)
        copies = [_copy_of(path, survey) for path in (target, real)]
        copy = next((path for path in copies if path in known), None)
        inside = real.startswith(own) or copy is not None
        if inside and entry.path.endswith(".py") and os.path.isfile(real):
            settled.append(walk.entry(entry.path, real))
        elif entry.source.startswith(own):
            settled.append(entry)
        elif copy is not None:
            relative = os.path.relpath(copy, os.path.dirname(entry.path))
            settled.append(entry._replace(target=relative))
        elif os.path.isfile(real):
            settled.append(walk.entry(entry.path, real))
        elif any(copies) and os.path.isdir(real):
            settled += walk.walk(real, Excluder(()), at=entry.path)
        else:
            settled.append(entry._replace(target=target))
    survey.entries = settled


def _copy_of(path: str, survey: Survey) -> str | None:
    """Where the copy of a path outside of the tree lies in it, if the tree it is in is copied."""
    for old, at in (*survey.moves, *survey.copies):
        if path == old or path.startswith(f"{old}/"):
            return at + path[len(old) :]
    return None


def _installed_data(survey: Survey) -> frozenset[str]:
    """The files outside of site-packages that installed packages list as theirs."""
    found: set[str] = set()
    for entry in survey.entries:
        if entry.path.endswith(".dist-info/RECORD"):
            site = os.path.dirname(os.path.dirname(entry.path))
            found.update(
                os.path.normpath(os.path.join(site, name))
                for name in records.read(entry.source)
                if name.startswith("../")
            )
    return frozenset(found)


def _take_in_editables(survey: Survey, environment: Environment, config: Config) -> None:
    tree, policy = survey.tree, config["pack.editables"]
    packed = _packed(environment, config)
    # A base may be packed without its packages; a copy of a staged environment has copies already.
    taken = {entry.path for entry in survey.entries}
    sources: list[editables.Source] = []
    for site in tree.sites:
        found, rebuilding = editables.find(os.path.join(tree.root, site), packed)
        sources += found
        for one in rebuilding:
            named_by = os.path.relpath(one.named_by, tree.root)
            if named_by in taken:
                survey.findings.append(_rebuilds(named_by, tree, policy))
    sources += editables.scripts(os.path.join(tree.root, "bin"), packed)
    places = (f"{SNAPSHOTS}/{number}" for number in itertools.count())
    free = (place for place in places if place not in taken)
    for source in sources:
        named_by = os.path.relpath(source.named_by, tree.root)
        if named_by not in taken:
            continue
        if policy != "snapshot":
            severity = "error" if policy == "refuse" else "warning"
            reason = f"an editable install of {source.path}, which is not on the node"
            survey.findings.append(Finding(named_by, "editable", reason, severity))
            continue
        # A directory of its own: beside one another, two modules could have one name.
        at = f"{next(free)}/{os.path.basename(source.path)}"
        # Before it is looked through: what changes from here on may not be in the image.
        survey.watches += (freshness.watch(path, tree=True) for path in _watchable(source))
        survey.entries += _snapshot(source, at)
        survey.moves.append((source.path, at))
        reason = f"an editable install: a copy of {source.path} is included"
        survey.findings.append(Finding(named_by, "editable", reason, "note"))
    if survey.moves:
        top = next(entry for entry in survey.entries if entry.path == ".")
        parents = {os.path.dirname(at) for _, at in survey.moves}
        new = {".stager", SNAPSHOTS, *parents} - taken
        survey.entries += (top._replace(path=path, mode=0o755) for path in sorted(new))


def _rebuilds(named_by: str, tree: Tree, policy: str) -> Finding:
    reason = "an editable install that rebuilds itself on import cannot be packed; install the"
    reason += " package without -e"
    if policy == "keep":
        return Finding(named_by, "editable", reason, "note")
    # In a base it is somebody else's, and leads where it has always led.
    return Finding(named_by, "editable", reason, "warning" if tree.role == "base" else "error")


def _packed(environment: Environment, config: Config) -> Callable[[str], bool]:
    """Tell of a path whether the nodes have it: their own, or in a tree and not left out of it.

    What --exclude leaves out is not wanted, and counts as there.
    """
    trees = [
        (spelling, Excluder(tree.exclude, tree.only).leaves_out)
        for tree in environment.trees
        for spelling in tree.spellings
    ]

    def packed(path: str) -> bool:
        return is_within(path, config["local_prefixes"]) or any(
            is_within(path, [root]) and not leaves_out(os.path.relpath(path, root))
            for root, leaves_out in trees
        )

    return packed


def _snapshot(source: editables.Source, at: str) -> Iterator[Entry]:
    exclude = Excluder((".git", ".hg", ".svn", "node_modules"))
    if source.module:
        # setuptools puts a suffix in place of the mapped path's own: keep the file's.
        name = os.path.basename(source.module)
        yield walk.entry(f"{os.path.dirname(at)}/{name}", source.module)
        return
    yield walk.entry(at, source.path)
    names = source.items if source.items is not None else sorted(os.listdir(source.path))
    for name in names:
        path = os.path.join(source.path, name)
        if exclude(name):
            continue
        entry = walk.entry(f"{at}/{name}", path)
        if entry.kind == DIRECTORY:
            yield from walk.walk(path, exclude, at=f"{at}/{name}")
        else:
            yield entry


def _watchable(source: editables.Source) -> list[str]:
    if source.module:
        return [source.module]
    if source.items is None:
        return [source.path]
    return [os.path.join(source.path, name) for name in source.items]


def place_of(
    survey: Survey,
    environment: Environment,
    config: Config,
    destination: str,
    below: dict[str, str],
) -> plan.Place:
    """Everything a plan has to know of where a layer goes.

    Args:
        survey: the layer.
        environment: its environment.
        config: the configuration.
        destination: the layer's new prefix.
        below: old roots of the layers below, and where they go.
    """
    tree, interpreter = survey.tree, environment.interpreter
    moves = [Move(spelling, destination) for spelling in tree.spellings]
    for lower in environment.trees:
        if lower is tree:
            break
        moves += [Move(spelling, below.get(lower.root, "/")) for spelling in lower.spellings]
    moves += [Move(old, f"{destination}/{at}") for old, at in survey.moves]
    relocation = Relocation(moves)
    base = interpreter.base_executable
    copies = frozenset(
        entry.path
        for entry in survey.entries
        if tree.role == "env" and entry.kind == FILE and _is_copy_of_python(entry, base)
    )
    return plan.Place(
        root=tree.root,
        destination=destination,
        relocation=relocation,
        python_directories=(*tree.python_directories, SNAPSHOTS),
        tag=interpreter.tag,
        interpreter=relocation.path(base) or base,
        base_executable=base,
        local=config["local_prefixes"],
        copies_of_python=copies,
        recorded=survey.recorded,
    )


def _is_copy_of_python(entry: Entry, base: str) -> bool:
    # Asked for each file of an environment: what is cheapest comes first.
    if not (entry.path.startswith("bin/python") and re.fullmatch(_PYTHON, entry.path)):
        return False
    if os.path.realpath(entry.source) == base:
        return False
    return os.path.getsize(base) == entry.size and filecmp.cmp(entry.source, base, shallow=False)
