"""From what the user typed, or did not type, to a published environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from stager import freshness, ref
from stager.config import Config
from stager.errors import NotFoundError, UsageError
from stager.ref import Ref
from stager.repository import Published, Repository
from stager.store import Store

if TYPE_CHECKING:
    from stager import pack


def repositories(config: Config) -> list[Repository]:
    """The user's repository, then the site's."""
    return [Repository(path) for path in (config["repository"], *config["repositories"])]


def wanted(text: str | None, environ: Mapping[str, str]) -> Ref:
    """The ref to use: what is given, else ``STAGER_ENV``, else the environment that is active.

    Raises:
        UsageError: nothing says which.
    """
    if text:
        return ref.parse(text)
    if environ.get("STAGER_ENV"):
        return ref.parse(environ["STAGER_ENV"])
    active = environ.get("VIRTUAL_ENV") or environ.get("CONDA_PREFIX")
    if active and active == environ.get("STAGER_PREFIX") and environ.get("STAGER_ACTIVE"):
        return ref.parse(environ["STAGER_ACTIVE"])  # a staged one, and this is what it is called
    if active:
        return Ref(path=os.path.abspath(active))
    if os.path.exists("./.venv/pyvenv.cfg"):
        return Ref(path=os.path.abspath(".venv"))
    raise UsageError(
        "no environment is named and none is active",
        hint="name one (--env NAME), set STAGER_ENV, or activate one",
    )


def called(text: str | None, published: Published) -> str:
    """What an active environment is called: as the user typed it, but from any directory."""
    return str(ref.parse(text)) if text else published.manifest.name


def find(wish: Ref, config: Config) -> Published:
    """Find a published environment.

    Raises:
        NotFoundError: no repository has it.
    """
    for repository in repositories(config):
        published = repository.find(wish)
        if published is not None:
            return published
    known = sorted({name for repository in repositories(config) for name in repository.names()})
    import difflib

    near = difflib.get_close_matches(wish.name, known, n=1) if wish.name else []
    if near:
        hint = f"did you mean `{near[0]}`?"
    elif wish.path and os.path.isdir(wish.path):
        hint = f"pack it first: stager pack {wish.path}"
    else:
        hint = "`stager list` shows what is published; `stager pack` publishes"
    raise NotFoundError(f"environment `{wish}` is not published", hint=hint)


def fresh(
    wish: Ref, config: Config, *, progress: pack.Progress | None = None
) -> tuple[Published, list[str]]:
    """Find an environment and see to it that it is up to date, by the policy ``stage.on_stale``.

    A path that was never packed is packed now, where the policy is to pack.

    Returns:
        The environment, and the paths that changed since it was packed: empty where it is up to
        date or was packed again.

    Raises:
        NotFoundError: no repository has it.
        StagerError: packing it again failed.
    """
    policy = config["stage.on_stale"]
    try:
        published = find(wish, config)
    except NotFoundError:
        if not (wish.path and policy == "repack" and os.path.isdir(wish.path)):
            raise
        if progress is not None:
            progress.note(f"packing {wish.path}, which was never packed")
        return _pack(wish.path, config, None, progress), []
    changes = [] if wish.digest else freshness.changed(published.manifest)
    if changes and _is_covered(published, config):
        changes = []
    own = published.repository.root == config["repository"]
    if not (changes and policy == "repack" and own):
        return published, changes
    manifest = published.manifest
    for key, value in manifest.options.items():
        config.values[key] = tuple(value) if isinstance(value, list) else value
    if progress is not None:
        progress.note(f"packing `{manifest.name}` again: {changes[0]} changed")
    return _pack(manifest.origin, config, manifest.name, progress), []


def _is_covered(published: Published, config: Config) -> bool:
    """Whether the original cannot be seen from here: the staged tree is in its place."""
    manifest = published.manifest
    try:
        return os.path.samefile(Store(config["store"]).tree(manifest.top.id), manifest.origin)
    except OSError:
        return False


def _pack(path: str, config: Config, name: str | None, progress: pack.Progress | None) -> Published:
    from stager import pack  # a warm start does without

    result = pack.pack(path, config, name=name, progress=progress)
    assert result.published is not None  # only a check publishes nothing
    return result.published
