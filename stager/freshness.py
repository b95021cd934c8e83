"""Whether an environment changed since it was packed, told by a handful of ``stat`` calls."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from stager.manifest import Manifest, Watch

if TYPE_CHECKING:
    from stager.walk import Entry

_METADATA = (".dist-info", ".egg-info", ".egg-link", ".pth", ".py", ".so")


def watch(path: str, *, tree: bool = False) -> Watch:
    """Note what a path looks like now.

    Args:
        path: absolute path; links are followed.
        tree: look at everything below it, as for editable sources.
    """
    return Watch(path, _mark(path, tree=tree), tree)


Seen = Mapping[str, os.stat_result]
"""What some paths look like; those that cannot be seen are missing."""


def changed(manifest: Manifest, seen: Seen | None = None) -> list[str]:
    """The watched paths that are not as they were when the environment was packed.

    What cannot be seen from here (the original hidden or gone) counts as unchanged: there is
    nothing to pack again from.

    Args:
        manifest: what was packed.
        seen: what all that it watches looks like, where somebody has just asked.
    """
    return list(_changed(manifest.watches, seen))


def is_untouched(one: Watch, seen: Seen | None = None) -> bool:
    """Tell whether a single ``stat`` shows that a path is as it was, or that it cannot be seen."""
    now = _stat_mark(one.path, seen)
    return not now or one.mark.startswith(f"{now}:")


def _changed(watches: Iterable[Watch], seen: Seen | None) -> Iterator[str]:
    for one in watches:
        if one.tree:
            now = _mark(one.path, tree=True)
        else:
            if is_untouched(one, seen):
                continue
            now = _mark(one.path, tree=False)
            # Importing a module for the first time changes a directory's time, not its modules.
            if now.partition(":")[2] and now.partition(":")[2] == one.mark.partition(":")[2]:
                continue
        if now and now != one.mark:
            yield one.path


def _stat_mark(path: str, seen: Seen | None) -> str:
    if seen is not None:
        return str(seen[path].st_mtime_ns) if path in seen else ""
    try:
        return str(os.stat(path).st_mtime_ns)
    except OSError:
        return ""


def _mark(path: str, *, tree: bool) -> str:
    """``time:summary``, where the summary is over a file's size or a directory's content."""
    try:
        info = os.stat(path)
        if not stat.S_ISDIR(info.st_mode):
            return f"{info.st_mtime_ns}:{info.st_size}-{info.st_mtime_ns}"
        if tree:
            from stager.walk import fingerprint  # most watch no tree

            return "tree:" + fingerprint(_below(path))
        return f"{info.st_mtime_ns}:{_children(path)}"
    except OSError:
        return ""


def _children(path: str) -> str:
    import hashlib  # loads OpenSSL: 5 ms that a warm start does without

    digest = hashlib.sha256()
    with os.scandir(path) as entries:
        for item in sorted(entries, key=lambda one: one.name):
            if item.name == "__pycache__":
                continue
            time = 0
            if item.name.endswith(_METADATA):
                with contextlib.suppress(OSError):  # a link to nothing has no time
                    time = item.stat().st_mtime_ns
            digest.update(f"{item.name}\0{time}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def _below(path: str) -> Iterator[Entry]:
    from stager.walk import DIRECTORY, Excluder, walk

    skip = Excluder(("__pycache__", ".git"))
    with contextlib.suppress(OSError):
        for item in walk(path, skip):
            # A directory's own time changes with every __pycache__ made in it.
            yield item._replace(mtime_ns=0, size=0) if item.kind == DIRECTORY else item
