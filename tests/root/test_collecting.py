"""Collection for all users, of whom one is hostile: what the others have left goes all the same."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from stager import config as configuration
from stager.config import Config
from stager.hooks import collecting
from stager.staging.store import EXTRACTED, Stamp, Store, boot_id

pytestmark = pytest.mark.root

HOSTILE, OTHER, JOBS = 30001, 30002, 30003


@pytest.fixture
def stores(new_directory: Callable[[], Path]) -> Path:
    """The directory above the users' stores."""
    return new_directory()


@pytest.fixture
def config(stores: Path) -> Config:
    return configuration.load(
        trusted_only=True,
        uid=JOBS,
        site_directory="/nonexistent",
        overrides={"store": f"{stores}/{{uid}}"},
    )


def made(store: Path, layer_id: str, size: int) -> Path:
    """What tells of an idle tree; returns the tree, which is not there yet."""
    node = Store(str(store))
    os.mkdir(store / "leases" / layer_id, 0o700)
    os.utime(store / "leases" / layer_id, (size, size))  # the large ones were used last
    stamp = Stamp("image", EXTRACTED, boot_id(), size)
    (store / "ready" / layer_id).write_text(json.dumps(stamp._asdict()))
    return Path(node.tree(layer_id))


def given(store: Path, uid: int) -> None:
    """Make all of a store a user's."""
    for path, directories, files in os.walk(store):
        for name in ("", *directories, *files):
            os.chown(os.path.join(path, name), uid, uid)


def test_trees_that_a_user_makes_up_do_not_keep_others_waiting(
    stores: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3000):
        made(stores / str(HOSTILE), f"{number:016x}", 1000)
    tree = made(stores / str(OTHER), "a" * 16, 2000)
    tree.mkdir()
    for uid in (HOSTILE, OTHER):
        given(stores / str(uid), uid)
    monkeypatch.setattr(collecting, "_free", lambda _: (0 if tree.exists() else 2000, sys.maxsize))
    assert collecting.make_room(config, 2000, 0) > 1
    assert not tree.exists()


def test_a_user_has_one_store_however_it_is_written(stores: Path, config: Config) -> None:
    for name in (f"{HOSTILE}", f"0{HOSTILE}", f"00{HOSTILE}", f"{OTHER}"):
        given(Path(Store(str(stores / name)).root), HOSTILE)
    found = [place.path for place in collecting._places(config, pytest.fail)]
    assert found == [f"{stores}/{HOSTILE}"]


def test_where_all_may_make_a_store_only_those_of_users_count(stores: Path, config: Config) -> None:
    """Not those of subordinate ids, of which a user may have thousands."""
    nobody = 65534
    for uid in (HOSTILE, nobody):
        given(Path(Store(str(stores / str(uid))).root), uid)
    for mode, expected in ((0o755, [HOSTILE, nobody]), (0o1777, [nobody])):
        stores.chmod(mode)
        assert [place.uid for place in collecting._places(config, pytest.fail)] == expected
