"""Published environments: whole or not there, whoever publishes, removes or dies meanwhile."""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import os
import signal
import stat
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny
from stager import fsutil, manifest
from stager.errors import (
    DeniedError,
    IncompatibleError,
    IntegrityError,
    NotFoundError,
    StagerError,
)
from stager.manifest import Manifest
from stager.ref import Ref
from stager.repository import Repository

pytestmark = pytest.mark.unit

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(str(tmp_path / "repository"))


def named(name: str, number: int = 1, content: bytes = b"image") -> Manifest:
    one = tiny.layer(number, content)
    return tiny.described(name=name, origin=f"/home/ada/{name}", layers=(one,))


def images(repository: Repository) -> list[str]:
    return sorted(os.listdir(os.path.join(repository.root, "images")))


@contextlib.contextmanager
def umask(value: int) -> Iterator[None]:
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


# Publishing and finding


def test_what_is_published_is_found_by_name_origin_and_digest(repository: Repository) -> None:
    value = named("torch")
    published = tiny.publish(repository, value)
    digest = manifest.digest(value.encode())
    assert published.ref == f"torch@sha256:{digest}"
    wishes = [
        Ref(name="torch"),
        Ref(path="/home/ada/torch"),
        Ref(name="torch", digest=digest),
        Ref(name="torch", digest=digest[:12]),
    ]
    for wish in wishes:
        found = repository.find(wish)
        assert found is not None
        assert found.manifest == value
        assert found.ref == published.ref
    assert Path(repository.image(value.top)).read_bytes() == b"image"
    assert repository.names() == ["torch"]


@pytest.mark.parametrize(
    "wish",
    [
        Ref(name="other"),
        Ref(path="/home/ada/other"),
        Ref(name="torch", digest="0" * 64),
        Ref(name="other", digest="{digest}"),
    ],
)
def test_what_is_not_published_is_not_found(repository: Repository, wish: Ref) -> None:
    published = tiny.publish(repository, named("torch"))
    digest = published.ref.rpartition(":")[2]
    assert repository.find(wish._replace(digest=wish.digest.replace("{digest}", digest))) is None


def test_nothing_is_found_where_there_is_no_repository(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in ("gone", "file"):
        empty = Repository(str(tmp_path / path))
        assert empty.find(Ref(name="torch")) is None
        assert empty.find(Ref(name="torch", digest="0" * 12)) is None
        assert empty.names() == []
    assert os.listdir(tmp_path) == ["file"]  # reading makes nothing


def test_a_manifest_is_read_into_as_much_memory_as_it_takes(repository: Repository) -> None:
    """A user may have a limit."""
    tiny.publish(repository, named("torch"))
    tracemalloc.start()
    try:
        assert repository.find(Ref(name="torch")) is not None
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_an_origin_is_found_by_every_path_to_it(repository: Repository, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "alias").symlink_to("real")
    tiny.publish(repository, tiny.described(origin=str(tmp_path / "real")))
    found = repository.find(Ref(path=str(tmp_path / "alias")))
    assert found is not None
    assert found.manifest.origin == str(tmp_path / "real")


def test_publishing_again_replaces_it_and_the_old_goes(repository: Repository) -> None:
    tiny.publish(repository, named("torch", 1))
    value = named("torch", 2)
    tiny.publish(repository, value, replace=False)
    repository.collect()
    found = repository.find(Ref(name="torch"))
    assert found is not None
    assert found.manifest == value
    assert images(repository) == [value.top.filename]
    assert len(os.listdir(os.path.join(repository.root, "manifests"))) == 1


def test_a_name_stays_with_an_environment_that_has_two_paths(
    repository: Repository, public_path: Path
) -> None:
    """Homes are often links: what the shell says of them depends on how one came there."""
    (public_path / "home").mkdir()
    (public_path / "link").symlink_to("home")
    mine = named("torch", 1)._replace(origin=f"{public_path}/home/torch")
    tiny.publish(repository, mine, replace=False)
    other = named("torch", 2)._replace(origin=f"{public_path}/link/torch")
    tiny.publish(repository, other, replace=False)
    found = repository.find(Ref(name="torch"))
    assert found is not None
    assert found.manifest == other


def test_a_name_of_another_environment_is_not_taken(repository: Repository) -> None:
    mine = named("torch", 1)
    tiny.publish(repository, mine)
    other = named("torch", 2)._replace(origin="/home/ada/elsewhere")
    with pytest.raises(StagerError, match="is already used for /home/ada/torch") as error:
        tiny.publish(repository, other, replace=False)
    assert "--name" in str(error.value.hint)
    found = repository.find(Ref(name="torch"))
    assert found is not None
    assert found.manifest == mine


def test_a_name_may_be_taken_over_on_purpose(repository: Repository) -> None:
    tiny.publish(repository, named("torch", 1))
    other = named("torch", 2)._replace(origin="/home/ada/elsewhere")
    tiny.publish(repository, other, replace=True)
    found = repository.find(Ref(name="torch"))
    assert found is not None
    assert found.manifest == other


def test_a_damaged_owner_does_not_hold_a_name(repository: Repository) -> None:
    tiny.publish(repository, named("torch", 1))
    Path(repository.root, "refs", "torch").write_bytes(b"{")
    tiny.publish(repository, named("torch", 2)._replace(origin="/elsewhere"), replace=False)
    assert repository.find(Ref(name="torch")) is not None


def test_a_manifest_whose_image_went_away_is_not_published(repository: Repository) -> None:
    value = named("torch")
    with repository.workspace(), pytest.raises(StagerError, match="removed while packing"):
        repository.publish(value, replace=False)
    assert repository.find(Ref(name="torch")) is None


@pytest.mark.parametrize("name", ["a.new", "x.1.new", "new", "a" * 128])
def test_every_name_is_listed(repository: Repository, name: str) -> None:
    tiny.publish(repository, named(name))
    assert repository.names() == [name]


# What cannot be read


@pytest.mark.parametrize("data", [b"", b"{", b'{"schema": 1}', b"\0" * 100])
def test_a_damaged_manifest_is_named(repository: Repository, data: bytes) -> None:
    tiny.publish(repository, named("torch"))
    path = Path(repository.root, "refs", "torch")
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="refs/torch"):
        repository.find(Ref(name="torch"))


def test_a_newer_manifest_is_refused(repository: Repository) -> None:
    tiny.publish(repository, named("torch"))
    path = Path(repository.root, "refs", "torch")
    newer = {**json.loads(path.read_bytes()), "schema": manifest.SCHEMA + 1}
    path.write_bytes(manifest.canonical(newer))
    with pytest.raises(IncompatibleError, match="has format 2"):
        repository.find(Ref(name="torch"))


def test_a_link_to_nothing_is_not_published(repository: Repository) -> None:
    tiny.publish(repository, named("torch"))
    os.symlink("../manifests/gone.json", os.path.join(repository.root, "refs", "other"))
    assert repository.find(Ref(name="other")) is None


@pytest.mark.parametrize("kind", ["pipe", "directory", "circle"])
def test_what_is_no_file_is_refused_without_waiting(repository: Repository, kind: str) -> None:
    repository.create()
    path = os.path.join(repository.root, "refs", "torch")
    {
        "pipe": lambda: os.mkfifo(path),
        "directory": lambda: os.mkdir(path),
        "circle": lambda: os.symlink("torch", path),
    }[kind]()
    with pytest.raises(StagerError):
        repository.find(Ref(name="torch"))


def test_what_may_not_be_read_is_the_users_matter(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.publish(repository, named("torch"))

    def refuse(path: str, *_: object) -> int:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(DeniedError, match="refs/torch") as error:
        repository.find(Ref(name="torch"))
    assert error.value.blame == "job"


# Modes


@pytest.mark.parametrize(("mask", "mode"), [(0o077, 0o600), (0o022, 0o644), (0o007, 0o660)])
def test_files_have_the_modes_that_the_umask_leaves(
    repository: Repository, mask: int, mode: int
) -> None:
    with umask(mask):
        value = named("torch")
        published = tiny.publish(repository, value)
    digest = published.ref.rpartition(":")[2]
    for path in (
        repository.image(value.top),
        os.path.join(repository.root, "manifests", f"{digest}.json"),
    ):
        assert stat.S_IMODE(os.stat(path).st_mode) == mode
    for room in ("", "refs", "origins", "manifests", "layers", "images", "tmp"):
        assert stat.S_IMODE(os.stat(os.path.join(repository.root, room)).st_mode) == 0o700


def test_a_repository_of_somebody_else_is_refused(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository.create()
    uid = os.getuid()
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    if uid != 0:  # root may have made it for its users
        with pytest.raises(DeniedError, match=f"uid {uid}"):
            repository.create()
    else:
        os.chown(repository.root, 12345, -1)
        with pytest.raises(DeniedError, match="uid 12345"):
            repository.create()


# Layers: what need not be packed again


def test_a_layer_is_remembered_as_long_as_its_image_is_there(repository: Repository) -> None:
    value = named("torch")
    tiny.publish(repository, value)
    found = repository.layer(value.top.id, "squashfs")
    assert found is not None
    assert found["level"] == 3
    assert repository.layer(value.top.id, "tar.zst") is None
    assert repository.layer("0" * 16, "squashfs") is None
    os.unlink(repository.image(value.top))
    assert repository.layer(value.top.id, "squashfs") is None


def test_a_layer_whose_image_was_cut_off_is_packed_again(repository: Repository) -> None:
    value = named("torch")
    tiny.publish(repository, value)
    os.truncate(repository.image(value.top), 3)
    assert repository.layer(value.top.id, "squashfs") is None


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}", b'{"image": 1}', b'"x"', b"null"])
def test_a_damaged_record_of_a_layer_is_as_none(repository: Repository, data: bytes) -> None:
    value = named("torch")
    tiny.publish(repository, value)
    Path(repository.root, "layers", f"{value.top.id}.squashfs").write_bytes(data)
    assert repository.layer(value.top.id, "squashfs") is None
    repository.collect()
    assert images(repository) == [value.top.filename]


# Removing


def test_removing_keeps_what_others_share(repository: Repository) -> None:
    base = tiny.layer(9)
    both = [
        tiny.described(name=name, origin=f"/home/ada/{name}", layers=(base, tiny.layer(number)))
        for number, name in ((1, "one"), (2, "two"))
    ]
    for value in both:
        tiny.publish(repository, value)
    assert repository.remove(Ref(name="one")) == [both[0].top.filename]
    assert images(repository) == sorted([base.filename, both[1].top.filename])
    assert repository.names() == ["two"]
    assert repository.find(Ref(path="/home/ada/one")) is None
    assert repository.find(Ref(path="/home/ada/two")) is not None
    assert repository.layer(base.id, "squashfs") is not None
    assert sorted(repository.remove(Ref(path="/home/ada/two"))) == sorted(
        [base.filename, both[1].top.filename]
    )
    for room in ("refs", "origins", "manifests", "layers", "images"):
        assert os.listdir(os.path.join(repository.root, room)) == []


@pytest.mark.parametrize(
    "wish", [Ref(name="gone"), Ref(path="/home/ada/gone"), Ref(name="torch", digest="0" * 12)]
)
def test_what_is_not_published_cannot_be_removed(repository: Repository, wish: Ref) -> None:
    tiny.publish(repository, named("torch"))
    with pytest.raises(NotFoundError):
        repository.remove(wish)
    assert repository.names() == ["torch"]


def test_removing_makes_no_repository(public_path: Path) -> None:
    mistyped = Repository(f"{public_path}/mistyped")
    with pytest.raises(NotFoundError):
        mistyped.remove(Ref(name="torch"))
    assert not os.path.exists(mistyped.root)


def test_an_environment_whose_name_was_taken_over_is_removed_by_its_path(
    repository: Repository,
) -> None:
    tiny.publish(repository, named("torch", 1))
    other = named("torch", 2)._replace(origin="/home/ada/elsewhere")
    tiny.publish(repository, other, replace=True)
    assert repository.remove(Ref(path="/home/ada/torch")) == [named("torch", 1).top.filename]
    found = repository.find(Ref(name="torch"))
    assert found is not None
    assert found.manifest == other


def test_nothing_is_collected_while_a_manifest_cannot_be_read(repository: Repository) -> None:
    published = tiny.publish(repository, named("one", 1))
    tiny.publish(repository, named("two", 2))
    path = Path(repository.root, "manifests", published.ref.rpartition(":")[2] + ".json")
    whole = path.read_bytes()
    path.write_bytes(b"{")
    assert repository.remove(Ref(name="two")) == []
    assert len(images(repository)) == 2
    path.write_bytes(whole)
    # A name that cannot be read may be all that keeps its images.
    for room in ("refs", "origins"):
        for one in Path(repository.root, room).iterdir():
            one.unlink()
            os.mkfifo(one)
    assert repository.collect() == []
    assert len(images(repository)) == 2 and path.exists()


def test_half_a_file_of_a_killed_publish_keeps_nothing(repository: Repository) -> None:
    tiny.publish(repository, named("one", 1))
    old = []
    for room in ("refs", "origins", "manifests", "layers"):
        for age in (0.0, 100_000.0):
            half = Path(repository.root, room, f".one.{age}.new")
            half.write_bytes(named("one", 1).encode() if room == "refs" else b"")
            os.utime(half, (time.time() - age,) * 2)
            old += [half] if age else []
    assert repository.remove(Ref(name="one")) == [named("one", 1).top.filename]
    assert not any(half.exists() for half in old)


def test_a_name_alone_keeps_its_images(repository: Repository) -> None:
    """Where somebody has removed the file in ``manifests``."""
    published = tiny.publish(repository, named("one", 1))
    Path(repository.root, "manifests", f"{published.digest}.json").unlink()
    assert repository.collect() == []
    assert len(images(repository)) == 1


def test_files_of_nobody_are_collected(repository: Repository) -> None:
    value = named("torch")
    tiny.publish(repository, value)
    young, old = (Path(repository.root, "images", f"{name}.squashfs") for name in ("young", "old"))
    young.touch()  # of a pack on another node, whose lock is not seen here
    old.touch()
    os.utime(old, (1, 1))
    Path(repository.root, "manifests", "left.json").write_bytes(value.encode())
    assert repository.collect() == ["old.squashfs"]
    assert young.exists()
    assert len(os.listdir(os.path.join(repository.root, "manifests"))) == 1


def test_a_name_that_is_replaced_on_nfs_is_read_again(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.publish(repository, named("torch"))
    real, stale = os.open, [2]

    def open_(path: Any, *arguments: Any, **options: Any) -> int:
        if str(path).endswith("refs/torch") and stale[0]:
            stale[0] -= 1
            raise OSError(errno.ESTALE, "Stale file handle", path)
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", open_)
    found = repository.find(Ref(name="torch"))
    assert found is not None and found.manifest.name == "torch"
    stale[0] = 3
    with pytest.raises(StagerError, match="Stale"):
        repository.find(Ref(name="torch"))


# Workspaces


def workspaces(repository: Repository) -> list[str]:
    return os.listdir(os.path.join(repository.root, "tmp"))


def test_a_workspace_is_gone_afterwards_and_after_an_error(repository: Repository) -> None:
    with repository.workspace() as directory:
        Path(directory, "half").touch()
        assert workspaces(repository) == [os.path.basename(directory)]
    with pytest.raises(ValueError, match="inside"), repository.workspace():
        raise ValueError("inside")
    assert workspaces(repository) == []


def test_the_workspace_of_a_killed_pack_is_swept_by_the_next(repository: Repository) -> None:
    def die() -> None:
        with repository.workspace() as directory:
            Path(directory, "half").write_bytes(b"x" * 1000)
            os.kill(os.getpid(), signal.SIGKILL)

    assert tiny.in_child(die) == -signal.SIGKILL
    (left,) = workspaces(repository)
    with repository.workspace() as directory:
        assert workspaces(repository) == [os.path.basename(directory)] != [left]


def test_the_workspace_of_another_node_is_swept_when_it_is_old(repository: Repository) -> None:
    """Many mounts of shared storage have locks that other nodes do not see."""
    repository.create()
    for name, age in (("n7-old", 100_000.0), ("n7-new", 0.0)):
        path = Path(repository.root, "tmp", name)
        path.mkdir()
        (path / "lock").touch()
        os.utime(path, (time.time() - age,) * 2)
    with repository.workspace() as directory:
        assert sorted(workspaces(repository)) == sorted([os.path.basename(directory), "n7-new"])


def test_a_workspace_without_a_lock_is_swept_when_it_is_old(repository: Repository) -> None:
    repository.create()
    for name, age in (("old", 100_000.0), ("new", 0.0)):
        path = Path(repository.root, "tmp", name)
        path.mkdir()
        os.utime(path, (time.time() - age,) * 2)
    with repository.workspace() as directory:
        assert sorted(workspaces(repository)) == sorted([os.path.basename(directory), "new"])


def test_the_workspace_of_a_pack_at_work_is_left(repository: Repository) -> None:
    with repository.workspace() as first, repository.workspace() as second:
        assert first != second
        assert sorted(workspaces(repository)) == sorted(map(os.path.basename, (first, second)))


def test_no_workspace_is_swept_before_its_lock_is_held(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between making the directory and holding its lock another pack may begin."""
    real = fsutil.locked
    begun: list[threading.Thread] = []

    @contextlib.contextmanager
    def locked(path: str, **options: object) -> Iterator[None]:
        if path.endswith("/lock") and "/tmp/" in path.removeprefix(repository.root) and not begun:
            Path(path).touch()  # as opening it does, a moment before it is locked
            begun.append(threading.Thread(target=other))
            begun[0].start()
            begun[0].join(0.5)  # it may have to wait for us, but not sweep
        with real(path, **options):  # type: ignore[arg-type]
            yield

    def other() -> None:
        with repository.workspace():
            pass

    monkeypatch.setattr(fsutil, "locked", locked)
    with repository.workspace() as directory:
        assert os.path.isdir(directory)
    begun[0].join()


def test_a_concurrent_pack_keeps_the_images_it_may_be_about_to_name(
    repository: Repository,
) -> None:
    value = named("old", 1)
    tiny.publish(repository, value)
    with repository.workspace():
        # It found the layer packed already, and has not published yet.
        assert repository.layer(value.top.id, "squashfs") is not None
        assert repository.remove(Ref(name="old")) == []
        assert images(repository) == [value.top.filename]
        repository.publish(named("new", 1), replace=False)
    assert repository.collect() == []
    assert images(repository) == [value.top.filename]


# Several at once


def publishing(root: str, number: int, count: int) -> None:
    repository = Repository(root)
    for turn in range(count):
        value = named("torch", number)._replace(packed=f"{number} {turn}")
        tiny.publish(repository, value)
        repository.collect()


def test_a_whole_digest_is_found_without_listing(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = tiny.publish(repository, named("torch"))
    monkeypatch.delattr(os, "listdir")
    assert repository.find(Ref(name="torch", digest=published.digest)) == published
    assert repository.find(Ref(name="torch", digest="0" * 64)) is None


def test_readers_see_a_whole_manifest_while_two_publish_the_same_name(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # a disk's speed is not what is tested
    tiny.publish(repository, named("torch", 1))
    writers = [
        FORK.Process(target=publishing, args=(repository.root, number, 100)) for number in (1, 2)
    ]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        for wish in (Ref(name="torch"), Ref(path="/home/ada/torch")):
            found = repository.find(wish)
            assert found is not None
            seen.add(found.manifest.packed)
        assert repository.names() == ["torch"]
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert len(seen) > 2
    repository.collect()
    found = repository.find(Ref(name="torch"))
    assert found is not None
    assert images(repository) == [found.manifest.top.filename]
    assert Path(repository.image(found.manifest.top)).read_bytes() == b"image"
    assert workspaces(repository) == []
    for room in ("refs", "manifests", "layers"):  # no half-written file is left
        assert len(os.listdir(os.path.join(repository.root, room))) == 1


@pytest.mark.parametrize("step", ["manifests", "origins", "refs"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_publishing_that_is_killed_leaves_the_old_or_the_new(
    repository: Repository, step: str, when: str
) -> None:
    old, new = named("torch", 1), named("torch", 2)
    tiny.publish(repository, old)
    real = fsutil.write_atomic

    def dying(path: str, data: bytes) -> None:
        here = f"/{step}/" in path
        if not here or when == "after":
            real(path, data)
        if here:
            os.kill(os.getpid(), signal.SIGKILL)

    def work() -> None:
        with repository.workspace() as directory:
            path = os.path.join(directory, "image")
            Path(path).write_bytes(b"image")
            repository.add_image(path, new.top)
            fsutil.write_atomic = dying  # type: ignore[assignment]
            repository.publish(new, replace=False)

    assert tiny.in_child(work) == -signal.SIGKILL
    found = repository.find(Ref(name="torch"))
    assert found is not None
    assert found.manifest in (old, new)
    # The next one repairs everything.
    tiny.publish(repository, new)
    repository.collect()
    found = repository.find(Ref(name="torch"))
    assert found is not None
    assert found.manifest == new
    assert images(repository) == [new.top.filename]
    assert repository.names() == ["torch"]


def test_a_file_system_without_locks_still_has_whole_manifests(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import fcntl

    def refuse(fd: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    tiny.publish(repository, named("torch"))
    assert repository.find(Ref(name="torch")) is not None
    # Only age tells whether a pack is dead.
    for name, age in (("young", 60), ("old", 2 * 86400)):
        directory = Path(repository.root, "tmp", name)
        directory.mkdir()
        (directory / "lock").touch()
        os.utime(directory, (time.time() - age, time.time() - age))
    with repository.workspace() as directory_:
        assert sorted(workspaces(repository)) == sorted(["young", os.path.basename(directory_)])
