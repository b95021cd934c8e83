"""Looking at a tree: every entry with what a fingerprint and a later check need."""

from __future__ import annotations

import fnmatch
import os
import stat
import time
from collections.abc import Iterable
from queue import SimpleQueue
from typing import NamedTuple

FILE, DIRECTORY, LINK, SPECIAL = "file", "dir", "symlink", "special"

_SLOW_STAT = 0.0005
"""Seconds per entry above which a file system is read with many threads: a local disk takes
microseconds, a network file system a round trip."""
SLOW_WORKERS = 32
"""Threads that ask a slow file system at once."""
_TOGETHER = 16
"""Entries of a directory that one of these threads looks at: a large one is shared by several."""


class Entry(NamedTuple):
    """One entry of a tree.

    Attributes:
        path: relative to the tree's root, '/'-separated; ``.`` is the root.
        source: absolute path to read it from, which lies elsewhere for copied link targets.
        kind: :data:`FILE`, :data:`DIRECTORY`, :data:`LINK` or :data:`SPECIAL`.
        mode: permission bits.
        mtime_ns: modification time in nanoseconds.
        target: where a link points, as stored.
    """

    path: str
    source: str
    kind: str
    mode: int
    size: int
    mtime_ns: int
    inode: int
    target: str = ""


class Excluder:
    """Decides which paths are left out.

    The patterns are those of fnmatch, for the path or, without ``/`` in it, for the last name; one
    that begins with ``/`` is for the path from the top of the tree.

    Args:
        patterns: what to leave out.
        only: paths; all but these, what is below them and what they are below is left out. None
            leaves out nothing more.
    """

    def __init__(self, patterns: Iterable[str], only: Iterable[str] | None = None) -> None:
        self._patterns = tuple(patterns)
        self._only = None if only is None else frozenset(only)
        self.partial = frozenset(up for one in self._only or () for up in _above(one))
        """The directories of which only a part is kept."""

    def __call__(self, path: str) -> bool:
        """Tell whether ``path`` (relative to the tree) is left out."""
        if not self._patterns and self._only is None:
            return False  # by far the most common: asked for each of many thousand entries
        if self._only is not None and path not in self.partial:
            whole = (path, *_above(path))
            if not any(one in self._only for one in whole):
                return True
        name = path.rpartition("/")[2]
        return any(
            fnmatch.fnmatchcase(f"/{path}" if pattern.startswith("/") else path, pattern)
            or ("/" not in pattern and fnmatch.fnmatchcase(name, pattern))
            for pattern in self._patterns
        )

    def leaves_out(self, path: str) -> bool:
        """Tell whether ``path``, or a directory that it is in, is left out."""
        return any(map(self, (*_above(path)[1:], path)))


def _above(path: str) -> list[str]:
    """Every directory on the way to a relative path, the top of the tree included."""
    parts = path.split("/")[:-1]
    return [".", *("/".join(parts[: end + 1]) for end in range(len(parts)))]


def entry(path: str, source: str) -> Entry:
    """Look at one path without following a link.

    Raises:
        OSError: it cannot be looked at.
    """
    return _entry(path, source, os.lstat(source))


def _entry(path: str, source: str, info: os.stat_result) -> Entry:
    target = ""
    if stat.S_ISREG(info.st_mode):
        kind = FILE
    elif stat.S_ISDIR(info.st_mode):
        kind = DIRECTORY
    elif stat.S_ISLNK(info.st_mode):
        kind, target = LINK, os.readlink(source)
    else:
        kind = SPECIAL
    return Entry(
        path,
        source,
        kind,
        stat.S_IMODE(info.st_mode),
        info.st_size if kind == FILE else 0,
        info.st_mtime_ns,
        info.st_ino,
        target,
    )


def walk(root: str, exclude: Excluder, *, at: str = "") -> list[Entry]:
    """List a tree, its root included, sorted by path. See :func:`timed`."""
    return timed(root, exclude, at=at)[0]


def timed(root: str, exclude: Excluder, *, at: str = "") -> tuple[list[Entry], bool]:
    """List a tree, its root included, sorted by path, and tell whether its file system is slow.

    The first directories are read one by one; where that turns out to be slow, the rest is read by
    many threads at once, because a metadata server answers many questions in the time of one.

    Args:
        root: the directory.
        exclude: what to leave out.
        at: path in the tree that ``root`` stands for, when it is not the tree's own root.

    Raises:
        OSError: a directory cannot be read.
    """
    # A root that is known by a link's name is the directory that the link leads to.
    found = [entry(at or ".", os.path.join(root, ".") if os.path.islink(root) else root)]
    waiting = [(root, at)]
    started, seen, slow = time.monotonic(), 0, False
    while waiting and not slow:
        directory, path = waiting.pop()
        children = _children(directory, path, exclude)
        found += _entries(children)
        waiting += [(child.item.path, child.path) for child in children if child.directory]
        seen += len(children) + 1
        slow = (time.monotonic() - started) / seen > _SLOW_STAT
    if waiting:
        found += _walk_parallel(waiting, exclude)
    found.sort(key=lambda item: item.path)
    return found, slow


def _walk_parallel(waiting: Iterable[tuple[str, str]], exclude: Excluder) -> list[Entry]:
    from concurrent.futures import Future, ThreadPoolExecutor

    left = 0
    listed: SimpleQueue[Future[list[_Child]]] = SimpleQueue()
    looked: list[Future[list[Entry]]] = []
    with ThreadPoolExecutor(SLOW_WORKERS) as pool:
        try:
            while waiting or left:
                for directory, path in waiting:
                    pool.submit(_children, directory, path, exclude).add_done_callback(listed.put)
                    left += 1
                children = listed.get().result()
                left -= 1
                waiting = [(child.item.path, child.path) for child in children if child.directory]
                looked += [
                    pool.submit(_entries, children[first : first + _TOGETHER])
                    for first in range(0, len(children), _TOGETHER)
                ]
            return [one for future in looked for one in future.result()]
        finally:
            pool.shutdown(cancel_futures=True)


class _Child(NamedTuple):
    path: str
    item: os.DirEntry[str]
    directory: bool


def _children(directory: str, path: str, exclude: Excluder) -> list[_Child]:
    children = []
    with os.scandir(directory) as items:
        for item in items:
            relative = f"{path}/{item.name}" if path else item.name
            if not exclude(relative):
                children.append(_Child(relative, item, item.is_dir(follow_symlinks=False)))
    return children


def _entries(children: Iterable[_Child]) -> list[Entry]:
    return [
        _entry(child.path, child.item.path, child.item.stat(follow_symlinks=False))
        for child in children
    ]


def fingerprint(entries: Iterable[Entry], *more: object) -> str:
    """16 hex digits over path, kind, mode, size, time and link of every entry, and ``more``."""
    import hashlib  # loads OpenSSL: 5 ms that a warm start does without

    digest = hashlib.sha256(repr(more).encode("utf-8", "surrogateescape"))
    lines = (
        f"{item.path}\0{item.kind}\0{item.mode}\0{item.size}\0{item.mtime_ns}\0{item.target}\0"
        for item in entries
    )
    digest.update("".join(lines).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]
