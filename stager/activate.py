"""Activation: the environment variables that make staged environments the ones that are used.

Several together: the first one is the base. Its Python runs, its variables are set, its programs
are found first. The others add their modules in front of it, by ``PYTHONPATH``, the last one in
front of all; and their programs behind.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from stager import containers, paths
from stager.config import Config
from stager.envpatch import EnvPatch
from stager.errors import StagerError
from stager.manifest import TREE, USER, Manifest
from stager.staging.stage import Staged

CONDA = "conda"
"""The kind of environments whose packages bring scripts."""

ACTIVE, PREFIX, ORIGIN = "STAGER_ACTIVE", "STAGER_PREFIX", "STAGER_ORIGIN"


class Part(NamedTuple):
    """An environment, and where its layers are: staged, or the original."""

    manifest: Manifest
    trees: tuple[str, ...]

    @classmethod
    def staged(cls, result: Staged) -> Part:
        """A staged one."""
        return cls(result.manifest, result.manifest.staged_at(result.prefix))

    @classmethod
    def original(cls, manifest: Manifest) -> Part:
        """The one that was packed."""
        return cls(manifest, (*(layer.origin for layer in manifest.layers[:-1]), manifest.origin))

    @property
    def prefix(self) -> str:
        """The path of the environment's own tree."""
        return self.trees[-1]

    @property
    def sites(self) -> tuple[str, ...]:
        """The directories that its modules are in, for another one's Python."""
        found = self.manifest.activated(self.trees).prepend.get("PYTHONPATH", ())
        if self.manifest.kind == TREE:
            return found
        site = os.path.join(self.prefix, self.manifest.library, "site-packages")
        return (*found, site, *_path_lines(site))


def _path_lines(site: str) -> list[str]:
    """The directories that ``.pth`` files add, which only a site directory's are read for."""
    found = []
    for name in sorted(os.listdir(site)) if os.path.isdir(site) else ():
        if not name.endswith(".pth"):
            continue
        with open(os.path.join(site, name), encoding="utf-8", errors="surrogateescape") as file:
            added = [os.path.join(site, line) for line in map(paths.of_pth_line, file) if line]
        directories = [path for path in map(os.path.normpath, added) if os.path.isdir(path)]
        found += [path for path in directories if path != site]
    return found


def staged(
    results: Sequence[Staged], config: Config, environ: Mapping[str, str], *, ref: str
) -> dict[str, str]:
    """The environment variables with staged environments active.

    Args:
        results: what staging gave; the first is the base of the others.
        config: ``run.user_site`` decides whether ``~/.local`` is imported from.
        environ: the environment before.
        ref: what the user called them; ``stage-run`` compares it to stay in ``sh``.

    Raises:
        StagerError: an activation script of the first does not come to an end.
    """
    parts = [Part.staged(result) for result in results]
    origins: dict[str, str] = {}
    for part in parts:
        origins.update(part.manifest.moved(part.trees))
    # A cache on shared storage would be looked into for every module, and valid for none.
    conda = parts[0].manifest.kind == CONDA
    if conda or environ.get("CONDA_PREFIX"):
        from stager import sourcing  # a warm start of other kinds does without

        environ = sourcing.leave(environ)
    after = patch(parts, config, ref=ref).apply(environ, origins)
    after.pop("PYTHONPYCACHEPREFIX", None)
    return sourcing.enter(after, parts[0].prefix) if conda else after


def patch(
    parts: Sequence[Part], config: Config, *, ref: str, bound: Sequence[str] = ()
) -> EnvPatch:
    """What activating staged trees changes, whatever the environment is before.

    Args:
        parts: the environments.
        config: ``run.user_site`` as above.
        ref: as above.
        bound: what containers need beside the trees.
    """
    first = parts[0]
    own = together(parts)
    user_site = config["run.user_site"] or first.manifest.kind == USER
    inside = {} if user_site else {"PYTHONNOUSERSITE": "1"}
    trees = [*(tree for part in parts for tree in part.trees), *bound]
    own = containers.reached(EnvPatch({**own.set, **inside}, own.unset, own.prepend), trees)
    extra = {ACTIVE: ref, PREFIX: first.prefix, ORIGIN: first.manifest.origin}
    return EnvPatch({**own.set, **extra}, own.unset, own.prepend)


def together(parts: Sequence[Part]) -> EnvPatch:
    """The activation of several environments, each where its trees are."""
    first, *more = parts
    patch = first.manifest.activated(first.trees)
    prepend = {name: list(items) for name, items in patch.prepend.items()}
    for part in more:
        for name, items in part.manifest.activated(part.trees).prepend.items():
            if name != "PYTHONPATH":
                prepend[name] = [*prepend.get(name, ()), *items]
    for part in more:
        prepend["PYTHONPATH"] = [*part.sites, *prepend.get("PYTHONPATH", ())]
    once = {name: tuple(dict.fromkeys(paths)) for name, paths in prepend.items()}
    return EnvPatch(patch.set, patch.unset, once)


def original(text: str | None, config: Config, environ: Mapping[str, str]) -> dict[str, str] | None:
    """The environment with the original active: what a job runs on where staging failed.

    Args:
        text: what the user typed, or None.
        config: where to look for its manifest.
        environ: the environment before.

    Returns:
        None where the original is not to be found from here.
    """
    from stager import lookup

    parts = []
    try:
        for wish in lookup.wanted(text, environ):
            try:
                parts.append(Part.original(lookup.find(wish, config).manifest))
            except StagerError:
                path = lookup.located(wish, environ).path
                return _at(path, environ) if path and not parts else None
    except StagerError:
        return None
    if not all(os.path.isdir(part.prefix) for part in parts):
        return None
    after = together(parts).apply(environ)
    return _entered(after, parts[0].prefix) if parts[0].manifest.kind == CONDA else after


def _at(path: str, environ: Mapping[str, str]) -> dict[str, str] | None:
    """An environment that was never packed."""
    if not os.path.isdir(f"{path}/bin"):
        return None
    conda = os.path.isdir(f"{path}/conda-meta")
    variable = "CONDA_PREFIX" if conda else "VIRTUAL_ENV"
    after = EnvPatch({variable: path}, (), {"PATH": (f"{path}/bin",)}).apply(environ)
    return _entered(after, path) if conda else after


def _entered(environ: dict[str, str], prefix: str) -> dict[str, str]:
    from stager import sourcing

    try:
        return sourcing.enter(environ, prefix)
    except StagerError:  # better without than not at all
        return environ
