"""From what the user typed, or did not type, to a published environment."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Callable, NamedTuple

from stager import freshness, fsutil, ref
from stager.config import Config
from stager.errors import NotFoundError, UsageError
from stager.ref import Ref
from stager.repository import Published, Repository

if TYPE_CHECKING:
    from stager.packing.layers import Progress


def repositories(config: Config) -> list[Repository]:
    """The user's repository, then the site's."""
    return [Repository(path) for path in (config["repository"], *config["repositories"])]


def wanted(text: str | None, environ: Mapping[str, str]) -> tuple[Ref, ...]:
    """The refs to use: what is given, else ``STAGER_ENV``, else the environment that is active.

    Raises:
        UsageError: nothing says which.
    """
    if text or environ.get("STAGER_ENV"):
        return parse(text or environ["STAGER_ENV"])
    active = environ.get("VIRTUAL_ENV") or environ.get("CONDA_PREFIX")
    prefix = environ.get("STAGER_PREFIX")
    first = f"{prefix}/bin" in environ.get("PATH", "").split(":") and active in (None, prefix)
    if first and environ.get("STAGER_ACTIVE"):
        return parse(environ["STAGER_ACTIVE"])  # a staged one, and this is what it is called
    if active:
        return (Ref(path=os.path.abspath(active)),)
    if os.path.exists("./.venv/pyvenv.cfg"):
        return (Ref(path=os.path.abspath(".venv")),)
    raise UsageError(
        "no environment is named and none is active",
        hint="name one (`stager list` shows which), set STAGER_ENV, or activate one",
    )


def parse(text: str) -> tuple[Ref, ...]:
    """Parse ``REF[+REF...]``; a directory with ``+`` in its name is itself.

    Raises:
        UsageError: a part is no ref.
    """
    if "+" in text and not (ref.is_path(text) and os.path.isdir(os.path.expanduser(text))):
        return tuple(map(ref.parse, text.split("+")))
    return (ref.parse(text),)


def called(text: str | None, found: Iterable[Published]) -> str:
    """What active environments are called: as the user typed it, but from any directory."""
    if text:
        return "+".join(map(str, parse(text)))
    return "+".join(published.manifest.name for published in found)


def located(wish: Ref, environ: Mapping[str, str], *, cwd: str | None = None) -> Ref:
    """For a name that is not published, the path where a tool keeps an environment of that name.

    Args:
        wish: what the user typed; it is returned where there is none.
        environ: the user's variables.
        cwd: the user's directory; None is the current one.

    Raises:
        UsageError: there are several environments of that name.
    """
    if wish.path or wish.digest:
        return wish
    from stager.environments import kept  # a warm start does without

    path = kept.named(wish.name, environ, cwd or os.getcwd())
    return Ref(path=path) if path else wish


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
    if wish.digest and wish.name in known:
        hint = f"that pack is gone: `stager inspect {wish.name}` shows the one there is"
    elif wish.path and not os.path.isdir(wish.path):
        hint = "there is no such directory, nor was an environment packed from there"
    elif near:
        hint = f"did you mean `{near[0]}`?"
    elif wish.path and os.path.isdir(wish.path):
        hint = f"pack it first: stager pack {wish.path}"
    else:
        hint = "`stager list` shows what is published; `stager pack` publishes"
    raise NotFoundError(f"environment `{wish}` is not published", hint=hint)


def ask_ahead(published: Published) -> Callable[[], freshness.Seen]:
    """Ask shared storage at once for what it is watched by, which is asked in turn otherwise.

    Args:
        published: what was found.

    Returns:
        A function that waits for the answers, for :func:`stager.freshness.changed`; until then
        nothing else may look at the original.
    """
    origin = f"{published.manifest.origin}/"
    groups: dict[str, list[str]] = {}
    for one in published.manifest.watches:
        inside = one.path[len(origin) :] if one.path.startswith(origin) else ""
        groups.setdefault(inside.partition("/")[0], []).append(one.path)
    # All of those inside begin with it.
    return fsutil.ask(groups.values(), first=origin if any(groups) else "")


def fresh(
    wish: Ref, config: Config, *, progress: Progress | None = None, timeout: float | None = None
) -> tuple[Published, list[str]]:
    """Find an environment and see to it that it is up to date, by the policy ``stage.on_stale``.

    A path that was never packed is packed now, where the policy is to pack; so is what a tool keeps
    under a name that is not published. Of several that would pack the same at once, all nodes of a
    job or an array of jobs, one does.

    Args:
        wish: which.
        config: the policy, and where to publish.
        progress: told what is done.
        timeout: seconds to wait for another who packs it; None is the key ``stage.timeout``.

    Returns:
        The environment, and the paths that changed since it was packed: empty where it is up to
        date or was packed again.

    Raises:
        NotFoundError: no repository has it.
        BusyError: another one packs it, for longer.
        StagerError: packing it again failed.
    """
    found = _looked_at(wish, config)
    if found.published is not None and not found.is_to_pack:
        return found.published, found.changes
    own = Repository(config["repository"])
    limit = config["stage.timeout"] if timeout is None else timeout
    waiting = progress.waiting if progress is not None else None
    with own.alone(found.origin, timeout=limit, waiting=waiting):
        found = _looked_at(wish, config)  # who waited finds what the other one has packed
        if found.published is not None and not found.is_to_pack:
            return found.published, found.changes
        return _pack(found, config, progress), []


class _Looked(NamedTuple):
    """An environment as it is published, if it is.

    Attributes:
        published: what there is.
        origin: the path to pack.
        changes: the paths that changed since.
        is_to_pack: whether the policy is to pack it again.
    """

    published: Published | None
    origin: str
    changes: list[str]
    is_to_pack: bool


def _looked_at(wish: Ref, config: Config) -> _Looked:
    policy = config["stage.on_stale"]
    try:
        try:
            published = find(wish, config)
        except NotFoundError:
            wish = located(wish, os.environ)
            published = find(wish, config)
    except NotFoundError:
        if not (wish.path and policy == "repack" and os.path.isdir(wish.path)):
            raise
        return _Looked(None, wish.path, [], True)
    changes = []
    if not wish.digest and policy != "ignore":
        changes = freshness.changed(published.manifest, ask_ahead(published)())
    if changes and _is_covered(published, config):
        changes = []
    own = published.repository.root == config["repository"]
    again = bool(changes) and policy == "repack" and own
    return _Looked(published, published.manifest.origin, changes, again)


def _is_covered(published: Published, config: Config) -> bool:
    """Whether the original cannot be seen from here: the staged tree is in its place."""
    manifest = published.manifest
    tree = os.path.join(config["store"], "envs", manifest.top.id)  # looking makes no store
    try:
        return os.path.samefile(tree, manifest.origin)
    except OSError:
        return False


def _pack(found: _Looked, config: Config, progress: Progress | None) -> Published:
    from stager.environments import Request
    from stager.packing import pack  # a warm start does without

    if found.published is not None:
        manifest = found.published.manifest
        request, name = Request.again(manifest), manifest.name
        options = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in manifest.options.items()
        }
        config = config.changed(options)
        note = f"packing `{manifest.name}` again: {found.changes[0]} changed"
    else:
        request, name = Request.here((found.origin,)), None
        note = f"packing {found.origin}, which was never packed"
    if progress is not None:
        progress.note(note)
    result = pack.pack(request, config, name=name, progress=progress)
    assert result.published is not None  # only a check publishes nothing
    return result.published
