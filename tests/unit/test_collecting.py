"""Which trees of which users go; that each is removed by its owner is for the slurm tier."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from stager import config as configuration
from stager import events
from stager.config import Config
from stager.errors import StagerError
from stager.hooks import collecting
from stager.hooks.collecting import Place


class Disk:
    """Users' idle trees, by uid: when each was used, its id and its bytes."""

    def __init__(self, trees: dict[int, list[tuple[float, str, int]]], free: int) -> None:
        self.trees, self.free = trees, free
        self.evicted: list[str] = []
        self.broken: set[int] = set()
        self.breaks: object = None
        self.asked: list[int] = []

    def as_user(self, uid: int, gid: None, work: Any, *arguments: Any, **more: Any) -> str:
        self.asked.append(uid)
        function, _, *rest = arguments
        if uid in self.broken and function is self.breaks:
            raise StagerError(f"working as uid {uid} took longer than {more['limit']:.0f} s")
        if function is collecting._tidy:
            return work(lambda: {"evicted": 0, "failed": "", "idle": self.trees[uid]})
        (tree,) = rest
        self.evicted.append(tree)
        self.free += next(size for _, name, size in self.trees[uid] if name == tree)
        return work(lambda: 1)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Disk:
    trees = {
        1: [(30.0, "a", 10), (50.0, "b", 10)],
        2: [(10.0, "c", 10), (float("inf"), "d", 10)],
        3: [(20.0, "e", 10)],
    }
    disk = Disk(trees, free=100)

    def places(config: Config, failed: object) -> Iterator[Place]:
        for uid in trees:
            yield Place(uid, f"{tmp_path}/{uid}", str(tmp_path))

    monkeypatch.setattr(collecting, "_places", places)
    monkeypatch.setattr(collecting, "as_user", disk.as_user)
    monkeypatch.setattr(collecting, "_free", lambda _: (disk.free, 1000))
    monkeypatch.setattr(events, "emit", lambda *_, **__: None)
    return disk


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return configuration.load().changed({"store": f"{tmp_path}/9"})


@pytest.mark.parametrize(
    ("needed", "gone"), [(100, []), (101, ["c"]), (125, ["c", "e", "a"]), (150, [*"ceabd"])]
)
def test_the_least_recently_used_goes_first_whoevers_it_is(
    disk: Disk, config: Config, needed: int, gone: list[str]
) -> None:
    assert collecting.make_room(config, needed, 0) == len(gone)
    assert disk.evicted == gone


def test_nothing_goes_in_vain(disk: Disk, config: Config) -> None:
    assert collecting.make_room(config, 151, 0) == 0
    assert disk.evicted == []


@pytest.mark.parametrize("breaks", ["_tidy", "_evict"])
def test_a_store_that_fails_is_left_alone(disk: Disk, config: Config, breaks: str) -> None:
    disk.broken.add(1)
    disk.breaks = getattr(collecting, breaks)
    assert collecting.make_room(config, 130, 0) == 3
    assert disk.evicted == ["c", "e", "d"]
    assert disk.asked.count(1) == (1 if breaks == "_tidy" else 2)


def test_a_disk_that_cannot_be_asked_is_left_alone(
    disk: Disk, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collecting, "_free", Mock(side_effect=OSError(errno.EIO, "gone")))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert collecting.for_all_users(config) == {1: -1, 2: -1, 3: -1}
    assert disk.evicted == []


def test_a_waiting_job_does_not_wait_for_ever(
    disk: Disk, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collecting, "_WHOLE", -1.0)
    assert collecting.make_room(config, 110, 0) == 0
    assert disk.asked == []


def test_all_that_works_for_a_user_has_the_time_of_one(
    disk: Disk, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who lets every step take long would keep all others waiting."""
    clock, limits = [0.0], []

    def as_user(uid: int, *arguments: Any, **more: Any) -> str:
        if uid == 1:
            limits.append(more["limit"])
            clock[0] += 8.0
        return disk.as_user(uid, *arguments, **more)

    monkeypatch.setattr(collecting.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(collecting, "as_user", as_user)
    disk.trees[1] = [(number, str(number), 1) for number in range(9)]
    assert collecting.make_room(config, 125, 0) == 5
    assert limits == [20.0, 12.0, 4.0]
    assert disk.evicted == ["0", "1", "c", "e", "d"]


def test_what_went_before_a_store_failed_counts(
    disk: Disk, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_user(uid: int, gid: None, work: Any, *arguments: Any, **more: Any) -> str:
        if "b" in disk.evicted:
            raise StagerError("the process was ended")
        return disk.as_user(uid, gid, work, *arguments, **more)

    disk.trees[1] = [(1.0, "a", 10), (2.0, "b", 10), (3.0, "f", 10)]
    monkeypatch.setattr(collecting, "as_user", as_user)
    assert collecting.make_room(config, 145, 0) == 2  # and the job tries again
