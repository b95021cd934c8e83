"""Collection for all users of a node: root looks for their stores, each works in their own."""

from __future__ import annotations

import json
import math
import os
import pwd
import re
import stat
import sys
import time
from collections.abc import Iterator
from typing import Any, Callable, NamedTuple

from stager import events, jobstate, mounts, schedulers
from stager.config import Config
from stager.errors import SITE, DeniedError, StagerError
from stager.hooks.common import as_user, emit, explained
from stager.staging import collect
from stager.staging.sitestore import SiteStore
from stager.staging.store import Store

_LONG, _SHORT = 600.0, 20.0
"""Seconds that all processes of a user may take together: by the clock, and while a job waits."""
_WHOLE = 60.0
"""Seconds that all of it may take while a job waits."""
_MOST = 250
"""Trees of one user that are thought of at a time, the least recently used: to make up any number
costs a user nothing, and others would wait for each."""

Exists = Callable[[str, str], "bool | None"]
"""Asks the scheduler about jobs, see :func:`stager.staging.lease.is_alive`."""


class Place(NamedTuple):
    """One of the stores of this node.

    Attributes:
        uid: whose it is; 0 is the site's.
        path: where it is.
        parent: root's directory above it, by which its disk is asked: the user cannot mount
            anything there.
    """

    uid: int
    path: str
    parent: str

    def store(self) -> Store:
        """Open it; for its owner."""
        return Store(self.path) if self.uid else SiteStore.of_root(self.path)


class Idle(NamedTuple):
    """A tree that nobody claims.

    Attributes:
        used: when it last was, in seconds after the epoch.
        place: where it is.
        id: which.
        size: bytes that it takes.
    """

    used: float
    place: Place
    id: str
    size: int


def for_all_users(config: Config, *, everything: bool = False) -> dict[int, int]:
    """Collect in every store of this node, each as its owner.

    Each keeps to ``collect.max_size``; for ``collect.min_free`` the trees of all are evicted, the
    least recently used first.

    Args:
        config: loaded with ``trusted_only``.
        everything: evict every unclaimed tree.

    Returns:
        For each uid the number of trees evicted, or -1 where it failed; the site's store is root's.

    Raises:
        DeniedError: we are not root.
        StagerError: the store is not one directory for each user.
    """
    if os.geteuid() != 0:
        raise DeniedError("only root can collect for all users", hint="sudo stager collect ...")
    round_ = _Round(config, _LONG)
    for place in _places(config, round_.failed):
        round_.tidy(place, config["collect.max_size"], everything, schedulers.job_exists)
    round_.evict_oldest(config["collect.min_free"], 0)
    return {**round_.evicted, **dict.fromkeys(round_.broken, -1)}


def make_room(config: Config, size: int, inodes: int) -> int:
    """Evict trees that nobody claims, whoever's, until a job's own fits on the users' disk.

    Args:
        config: loaded with ``trusted_only``; the store is the job's user's.
        size: bytes that are to be free.
        inodes: that are to be free.

    Returns:
        How many trees.
    """
    parent = os.path.dirname(config["store"])
    disk = os.stat(parent).st_dev
    round_ = _Round(config, _SHORT, until=time.monotonic() + _WHOLE)
    for place in _places(config, round_.failed):
        if os.stat(place.parent).st_dev == disk:
            # Thousands of nodes may do this at once: no scheduler is asked. Nor is its bound kept.
            round_.tidy(place, sys.maxsize, False, None)
    if _free(parent)[0] + round_.size >= size:  # or it is all in vain
        round_.evict_oldest(size, inodes)
    return sum(round_.evicted.values())


class _Round:
    """One collection, in several stores; what fails in one is told, and no reason to end.

    Args:
        config: the site's.
        limit: seconds that all processes of a user may take together.
        until: when it is over, whatever is left to do, by the monotonic clock.

    Attributes:
        evicted: for each uid the number of trees evicted.
        broken: the uids where anything failed: the store is left alone from there on.
    """

    def __init__(self, config: Config, limit: float, *, until: float = math.inf) -> None:
        self._config, self._limit, self._until = config, limit, until
        self._spent: dict[int, float] = {}
        self._idle: list[Idle] = []
        self.evicted: dict[int, int] = {}
        self.broken: set[int] = set()

    @property
    def size(self) -> int:
        """Bytes that could still be evicted, as their owners' processes say."""
        return sum(one.size for one in self._idle)

    def failed(self, uid: int, reason: str) -> None:
        """Tell what failed."""
        fields = {"uid": uid, "reason": f"collect: {reason}", "blame": SITE}
        emit(events.FAIL, fields, self._config, jobstate.ROOT)
        self.broken.add(uid)

    def tidy(self, place: Place, max_size: int, everything: bool, exists: Exists | None) -> None:
        """Collect one store to its own bound, and note what could still be evicted."""
        self.evicted[place.uid] = 0
        try:
            done = self._as_owner(place, _tidy, max_size, everything, exists)
            self.evicted[place.uid] = int(done["evicted"])
            now = time.time()
            for used, layer_id, size in done["idle"]:
                used_then = max(0.0, min(now, float(used)))
                self._idle.append(Idle(used_then, place, str(layer_id), max(0, int(size))))
            if done["failed"]:
                self.failed(place.uid, f"could not be removed: {done['failed']}")
        except Exception as error:  # whatever a user's process says
            self.failed(place.uid, explained(error)[0])

    def evict_oldest(self, size: int, inodes: int) -> None:
        """Evict what is idle, the least recently used first, until disks have so much free."""
        for tree in sorted(self._idle, key=lambda one: one.used):
            uid = tree.place.uid
            if uid in self.broken:
                continue
            try:
                free, free_inodes = _free(tree.place.parent)
                if free >= size and free_inodes >= inodes:
                    continue
                self.evicted[uid] += int(self._as_owner(tree.place, _evict, tree.id))
            except Exception as error:
                self.failed(uid, explained(error)[0])

    def _as_owner(self, place: Place, work: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function with a store, as whoever it belongs to; what it returns, by way of JSON.

        Raises:
            StagerError, OSError: it failed.
            ValueError: what came back is no JSON.
        """
        if place.uid == 0:
            return work(place, *arguments)
        started, spent = time.monotonic(), self._spent.get(place.uid, 0.0)
        limit = min(self._limit - spent, self._until - started)
        if limit <= 0:
            raise StagerError("there was no time left for it")
        told = as_user(place.uid, None, _in_json, work, place, *arguments, limit=limit, known=False)
        self._spent[place.uid] = spent + time.monotonic() - started
        return json.loads(told)


def _in_json(work: Callable[..., Any], *arguments: Any) -> str:
    return json.dumps(work(*arguments))


def _tidy(place: Place, max_size: int, everything: bool, exists: Exists | None) -> dict[str, Any]:
    node = place.store()
    done = collect.collect(
        node, max_size=max_size, min_free=0, everything=everything, exists=exists
    )
    idle = sorted(
        (one.used, one.id, one.stamp.size if one.stamp else 0) for one in collect.idle(node)
    )[:_MOST]
    return {"evicted": len(done.trees), "failed": "; ".join(done.failed), "idle": idle}


def _evict(place: Place, layer_id: str) -> int:
    return int(collect.evict(place.store(), layer_id))


def _places(config: Config, failed: Callable[[int, str], None]) -> Iterator[Place]:
    """The stores on this node; which of them cannot be looked into, is told.

    Raises:
        StagerError: the store is not one directory for each user.
    """
    site = config["site_store"]
    if os.path.isdir(site):
        yield Place(0, site, os.path.dirname(site))
    template = config.store_template
    if template.count("{uid}") != 1 or "{uid}" not in os.path.basename(template):
        raise StagerError(
            f"the key `store` ({template}) must end in a directory named after {{uid}}",
            hint="set the key `store` to something like /var/lib/stager/{uid}",
        )
    parent, name = os.path.split(template)
    # Where all may write, as in /tmp, a user must not have stores without number: by zeros before
    # their own, or by their subordinate ids, see subuid(5).
    pattern = re.compile(re.escape(name).replace(r"\{uid\}", "(0|[1-9][0-9]*)"))
    open_to_others = os.stat(parent).st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    for entry in sorted(os.listdir(parent)):
        match = pattern.fullmatch(entry)
        if match is None:
            continue
        uid, path = int(match[1]), os.path.join(parent, entry)
        try:
            owner = _owner(path)
        except (StagerError, OSError) as error:
            failed(uid, f"{path}: {explained(error)[0]}")
            continue
        # What somebody else has planted nobody uses.
        if uid != 0 and owner == uid and (not open_to_others or _is_known(uid)):
            yield Place(uid, path, parent)


def _is_known(uid: int) -> bool:
    try:
        pwd.getpwuid(uid)
    except KeyError:
        return False
    return True


def _owner(path: str) -> int:
    """Whose a directory is; nobody is asked who need not answer. What is none is nobody's.

    Raises:
        StagerError: a user has mounted something on it.
        OSError: it cannot be looked at.
    """
    try:
        fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except NotADirectoryError:
        return -1
    try:
        if mounts.is_users(fd):
            raise StagerError("something is mounted there")
        return os.fstat(fd).st_uid
    finally:
        os.close(fd)


def _free(directory: str) -> tuple[int, int]:
    """Bytes and inodes free there; of inodes that nobody counts, more than enough."""
    info = os.statvfs(directory)
    return info.f_bavail * info.f_frsize, info.f_favail if info.f_files else sys.maxsize
