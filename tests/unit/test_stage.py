"""Staging: once per node, whole or not at all, whoever dies meanwhile. Here by extraction only."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import platform
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

import tiny
from environments import BASE_PYTHON, run
from stager import lookup, transfer
from stager.config import Config
from stager.errors import (
    BusyError,
    IncompatibleError,
    IntegrityError,
    NoSpaceError,
    NotFoundError,
    StagerError,
)
from stager.formats import squashfs, tarzst
from stager.formats.tarzst import extracting, index
from stager.hooks import forjob
from stager.jobstate import Job
from stager.manifest import Image, Layer, Manifest
from stager.ref import Ref
from stager.repository import Published, Repository
from stager.staging import collect, fitness, stage, store, trees
from stager.staging.stage import EXTRACTED, HIT, Staged
from stager.staging.store import Store

pytestmark = pytest.mark.unit

FORMATS = ("squashfs", "tar.zst")
FORK = multiprocessing.get_context("fork")
ME = "test-1"


@dataclasses.dataclass
class Site:
    """A repository with one environment in both formats, and a store that each test gets empty."""

    root: Path
    config: Config
    published: dict[str, Published]

    @property
    def node(self) -> Store:
        return tiny.store(self.config)

    def stage(self, format: str = "squashfs", *, holder: str = ME, **options: object) -> Staged:
        published = self.published[format]
        return stage.stage(published, self.node, self.config, holder=holder, **options)  # type: ignore[arg-type]

    def with_manifest(self, **changes: object) -> Published:
        """The environment with another manifest, as if it had been packed so."""
        published = self.published["squashfs"]
        changed = published.manifest._replace(**changes)  # type: ignore[arg-type]
        return Published(changed, changed.encode(), published.repository)

    @property
    def layer(self) -> Layer:
        return self.published["squashfs"].manifest.top


@pytest.fixture(scope="module")
def shop() -> Iterator[Site]:
    root = Path(tempfile.mkdtemp())  # short: the path of a store has a limit
    prefix = tiny.environment(root / "environment")
    found = {}
    for format in FORMATS:
        config = tiny.configured(root, pack_format=format)
        found[format] = tiny.packed(prefix, config, name=format.replace(".", "-"))
    assert len({one.manifest.top.id for one in found.values()}) == 1
    yield Site(root, tiny.configured(root), found)
    shutil.rmtree(root)


@pytest.fixture
def site(shop: Site) -> Iterator[Site]:
    site = dataclasses.replace(shop, config=tiny.configured(shop.root))
    yield site
    shutil.rmtree(site.config["store"], ignore_errors=True)


def works(staged: Staged) -> bool:
    """Whether the staged environment runs, from its own place."""
    return run([f"{staged.prefix}/bin/tiny"]).stdout == f"{staged.prefix}\n"


def untouched(node: Store) -> bool:
    """Whether nothing is left of a stage that failed."""
    return node.held() == [] or all(
        (held.stamp, held.leases, os.path.exists(node.tree(held.id))) == (None, (), False)
        and not os.path.exists(os.path.join(node.root, "tmp", held.id))
        for held in node.held()
    )


# The way it usually goes


def test_an_image_is_whole_before_a_prolog_is_asked_to_wait_for_a_mount(site: Site) -> None:
    worker, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    arguments = (site.published["squashfs"], site.node, site.config, ours, forjob.PROLOG)
    with worker, ours, ThreadPoolExecutor(1) as pool:
        found = pool.submit(forjob._how, *arguments, time.monotonic() + 60)
        assert json.loads(worker.recv(1000)) == {"may": "mount"}
        assert trees.is_present(site.layer, site.node)
        worker.send(b"n")
        assert found.result() == "extract"


@pytest.mark.parametrize("policy", ["repack", "fallback", "warn"])
def test_something_is_done_while_shared_storage_answers_whether_an_original_changed(
    site: Site, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    """Where that decides nothing, staging itself: nobody waits for the answers."""
    published, order = site.published["squashfs"], list[str]()

    def answers() -> dict[str, os.stat_result]:
        order.append("answered")  # with other times: what changed is looked at once more
        return dict.fromkeys((one.path for one in published.manifest.watches), os.stat("/"))

    monkeypatch.setattr(lookup, "ask_ahead", lambda _: answers)
    config = site.config.changed({"stage.on_stale": policy})
    job = cast(Job, SimpleNamespace(first=True))
    wish = Ref(published.manifest.name)
    found, changed = forjob._published(
        wish, config, job, time.monotonic() + 60, lambda one: order.append(one.ref)
    )
    assert order == ([] if policy == "warn" else [published.ref, "answered"])
    assert (found.digest, changed(), changed()) == (published.digest, "", "")
    assert order.count("answered") == 1


def test_images_are_fetched_ahead(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    published, node = site.published["squashfs"], site.node
    with monkeypatch.context() as patched:
        patched.setattr(trees, "_lacking", lambda *_: "space")
        forjob._fetch_ahead(published, node, site.config)
        assert untouched(node)
        with pytest.raises(NoSpaceError, match="not enough space"):
            site.stage()
    with node.lock(site.layer.id, timeout=0):  # by who stages it already, for whom nobody waits
        forjob._fetch_ahead(published, node, site.config)
        assert not trees.is_present(site.layer, node)
    forjob._fetch_ahead(published, node, site.config)
    assert trees.is_present(site.layer, node)


@pytest.mark.parametrize(
    ("helper", "reason"),
    [
        ("exec sleep 600", "squashfuse did not mount .*image in time"),
        ("exit 0", "squashfuse did not mount .*image in time"),
        ("echo no >&2; echo not this one >&2; exit 3", "cannot mount image: not this one"),
        ("exit 3", "cannot mount image: status 3"),
    ],
    ids=["hangs", "mounts-nothing", "says-why", "says-nothing"],
)
def test_a_helper_that_does_not_mount(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, helper: str, reason: str
) -> None:
    program = tmp_path / "squashfuse_ll"
    program.write_text(f"#!/bin/sh\necho $$ >{tmp_path}/pid\n{helper}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(squashfs, "MOUNT_TIMEOUT", 0.5)
    (tmp_path / "tree").mkdir()
    with pytest.raises(StagerError, match=reason):
        squashfs.mount(str(tmp_path / "image"), str(tmp_path / "tree"))
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_what_is_there_already_needs_no_room(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image of an earlier boot is summed up once more; nothing is evicted for it."""
    until = time.monotonic() + 60
    arguments = (site.published["squashfs"], site.layer, site.node, site.config, until)
    forjob._fetch(*arguments)
    stamp = site.node.stamp(site.layer.id)
    assert stamp is not None
    site.node.set_ready(site.layer.id, stamp._replace(boot="another"))
    monkeypatch.setattr(trees, "_lacking", lambda node, size, files: "space" if size else "")
    monkeypatch.setattr(trees, "fetch", lambda *_: pytest.fail("copied again"))
    forjob._fetch(*arguments)
    assert site.node.stamp(site.layer.id) == stamp


def test_room_is_made_for_an_image_that_a_prolog_fetches(site: Site) -> None:
    huge = site.layer._replace(image=site.layer.image._replace(size=1 << 60))
    published = site.with_manifest(layers=(huge,))
    with pytest.raises(NoSpaceError, match="not enough space in the store"):
        forjob._fetch(published, huge, site.node, site.config, time.monotonic() + 60)
    assert untouched(site.node)


def test_an_image_that_a_prolog_has_fetched_is_not_read_again(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    until = time.monotonic() + 60
    forjob._fetch(site.published["squashfs"], site.layer, site.node, site.config, until)
    with monkeypatch.context() as patched:
        patched.setattr(transfer, "is_image", lambda *_: pytest.fail("read again"))
        assert works(site.stage())


def test_a_claim_that_another_stage_of_the_same_shell_gave_up_is_made_again(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had claimed first, waited for us, and its time was over."""
    real, node, tree = fitness.try_out, site.node, site.layer.id

    def try_out(*arguments: Any) -> None:
        real(*arguments)
        node.release(ME, tree)

    monkeypatch.setattr(fitness, "try_out", try_out)
    site.stage()
    assert node.leases(tree) == (ME,)


@pytest.mark.parametrize("format", FORMATS)
def test_a_cold_stage_and_a_warm_one(site: Site, format: str) -> None:
    cold = site.stage(format)
    assert cold.how == EXTRACTED
    assert cold.prefix == f"{site.config['store']}/envs/{site.layer.id}"
    assert cold.layers == {site.layer.id: EXTRACTED}
    assert works(cold)
    assert str(site.root / "environment") not in Path(cold.prefix, "bin", "tiny").read_text()
    warm = site.stage(format)
    assert (warm.how, warm.prefix) == (HIT, cold.prefix)
    assert site.node.leases(site.layer.id) == (ME,)
    assert os.listdir(os.path.join(site.node.root, "tmp")) == []
    assert os.listdir(os.path.join(site.node.root, "images")) == []


def test_a_warm_stage_takes_no_lock_and_nothing_of_the_shared_storage(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.stage()

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a warm stage does not do this")

    monkeypatch.setattr(Store, "lock", never)
    monkeypatch.setattr(fitness, "try_out", never)
    monkeypatch.setattr(subprocess, "Popen", never)
    real = os.open

    def watched(path: str, *rest: int, **options: int) -> int:
        assert not str(path).startswith(site.published["squashfs"].repository.root)
        return real(path, *rest, **options)

    monkeypatch.setattr(os, "open", watched)
    assert site.stage().how == HIT


def test_the_other_format_gives_the_same_tree(site: Site) -> None:
    first = site.stage("squashfs")
    assert site.stage("tar.zst").how == HIT
    assert works(first)


def test_what_is_told_of_the_progress(site: Site) -> None:
    told: list[object] = []
    sums: list[int] = []

    def copying(what: str, size: int) -> Callable[[int], None]:
        told.append((what, size))
        return sums.append

    progress = SimpleNamespace(copying=copying, waiting=told.append, note=told.append)
    site.stage(progress=progress)
    assert told == [(site.layer.origin, site.layer.image.size)]
    assert sum(sums) == site.layer.image.size


def test_everything_belongs_to_us_and_nobody_else_gets_in(site: Site) -> None:
    staged = site.stage()
    assert os.stat(site.node.root).st_mode & 0o077 == 0
    for parent, names, files in os.walk(staged.prefix):
        for name in (*names, *files):
            info = os.lstat(os.path.join(parent, name))
            assert info.st_uid == os.geteuid()
            assert not info.st_mode & 0o7000


# Another place than the one it was packed for


@pytest.mark.parametrize("format", FORMATS)
def test_another_store_gets_a_rewritten_tree(site: Site, format: str) -> None:
    config = tiny.configured(site.root, store=f"{site.root}/another-store")
    node = tiny.store(config)
    staged = stage.stage(site.published[format], node, config, holder=ME)
    assert staged.prefix == f"{site.root}/another-store/envs/{site.layer.id}"
    assert works(staged)
    old = site.config["store"].encode() + b"/"
    texts = [
        path for path in Path(staged.prefix).rglob("*") if path.is_file() and path.suffix != ".pyc"
    ]
    assert [path for path in texts if not path.is_symlink() and old in path.read_bytes()] == []
    shutil.rmtree(node.root)


# What another boot has left


@pytest.mark.parametrize("format", FORMATS)
def test_after_a_reboot_it_is_staged_again(
    site: Site, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    before = site.stage(format)
    spoiled = Path(before.prefix, "bin", "tiny")
    spoiled.write_text("half of it was not on the disk when the power went")
    monkeypatch.setattr(store, "boot_id", lambda: "11111111-2222-3333-4444-555555555555")
    after = site.stage(format)
    assert after.how == EXTRACTED
    assert works(after)
    assert site.stage(format).how == HIT


# Producers that are killed


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dying(target: object, name: str, *, after: bool, turn: int = 1) -> None:
    """Make a function kill this process, before or after the given call of it."""
    real, calls = getattr(target, name), [0]

    def function(*arguments: object, **options: object) -> object:
        calls[0] += 1
        if calls[0] == turn and not after:
            kill()
        result = real(*arguments, **options)
        if calls[0] == turn:
            kill()
        return result

    setattr(target, name, function)


def half_a_copy(source: str, image: object, target: str, **_: object) -> None:
    Path(target).write_bytes(Path(source).read_bytes()[:100])
    kill()


POINTS: dict[str, tuple[str, Callable[[], object]]] = {
    "before the claim": ("squashfs", lambda: dying(Store, "lease", after=False)),
    "with a claim": ("squashfs", lambda: dying(Store, "lease", after=True)),
    "with the lock": ("squashfs", lambda: dying(trees, "make", after=False)),
    "with a workspace": ("squashfs", lambda: dying(Store, "workspace", after=True)),
    "in the copy": ("squashfs", lambda: setattr(transfer, "copy", half_a_copy)),
    "after the copy": ("squashfs", lambda: dying(transfer, "copy", after=True)),
    "with an image": ("squashfs", lambda: dying(os, "rename", after=True)),
    "before unpacking": ("squashfs", lambda: dying(squashfs, "extract", after=False)),
    "after unpacking": ("squashfs", lambda: dying(squashfs, "extract", after=True)),
    "with a tree but no stamp": ("squashfs", lambda: dying(os, "rename", after=True, turn=2)),
    "untried": ("squashfs", lambda: dying(fitness, "try_out", after=False)),
    "before the stamp": ("squashfs", lambda: dying(Store, "set_ready", after=False)),
    "in the stamp": ("squashfs", lambda: dying(os, "rename", after=False, turn=3)),
    "before extracting": ("tar.zst", lambda: dying(tarzst, "extract", after=False)),
    "while extracting": ("tar.zst", lambda: dying(extracting, "_finish", after=False)),
    "after extracting": ("tar.zst", lambda: dying(tarzst, "extract", after=True)),
    "with an extracted tree": ("tar.zst", lambda: dying(os, "rename", after=True)),
}


@pytest.mark.parametrize("point", POINTS)
def test_a_producer_that_is_killed_leaves_nothing_ready_and_the_next_repairs(
    site: Site, point: str
) -> None:
    format, spoil = POINTS[point]

    def work() -> None:
        spoil()
        site.stage(format, holder="killed")

    assert tiny.in_child(work) == -signal.SIGKILL
    assert site.node.ready(site.layer.id) is None
    after = site.stage(format)
    assert after.how == EXTRACTED
    assert works(after)
    assert os.listdir(os.path.join(site.node.root, "tmp")) == []
    assert os.listdir(os.path.join(site.node.root, "images")) == []


@pytest.mark.parametrize(
    "point", ["in the copy", "after unpacking", "while extracting", "before the stamp"]
)
def test_what_a_killed_producer_has_left_is_collected(site: Site, point: str) -> None:
    format, spoil = POINTS[point]

    def work() -> None:
        spoil()
        site.stage(format, holder=f"pid-{os.getpid()}-0-00000000")

    assert tiny.in_child(work) == -signal.SIGKILL
    assert site.node.held() != []
    found = collect.collect(site.node, max_size=10**12, min_free=0)
    assert found.trees == (site.layer.id,)
    assert site.node.held() == []


@pytest.mark.parametrize(("module", "name"), [(transfer, "copy"), (fitness, "try_out")])
def test_who_waits_takes_over_from_a_killed_producer(site: Site, module: object, name: str) -> None:
    reading, writing = os.pipe()

    def block(*_: object, **__: object) -> None:
        os.write(writing, b"x")
        while True:
            signal.pause()

    def work() -> None:
        setattr(module, name, block)
        site.stage(holder="killed")

    child = FORK.Process(target=work)
    child.start()
    assert os.read(reading, 1) == b"x"  # it has the lock, and is at it
    waits: list[float] = []

    def waiting(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            child.kill()

    progress = SimpleNamespace(copying=lambda *_: lambda _: None, waiting=waiting, note=None)
    after = site.stage(progress=progress)
    child.kill()  # it is over already, where this works
    child.join()
    assert len(waits) >= 2
    assert after.how == EXTRACTED
    assert works(after)
    for fd in (reading, writing):
        os.close(fd)


# Many at once


def counting(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []
    real = transfer.copy

    def copy(source: str, *rest: object, **options: object) -> None:
        calls.append(source)
        real(source, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(transfer, "copy", copy)
    return calls


def test_ten_threads_at_once_make_one_copy(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counting(monkeypatch)
    barrier = threading.Barrier(10)

    def one(number: int) -> Staged:
        barrier.wait()
        return site.stage(holder=f"thread-{number}")

    with ThreadPoolExecutor(10) as pool:
        found = list(pool.map(one, range(10)))
    assert len(calls) == 1
    assert sorted(one.how for one in found) == [EXTRACTED] + [HIT] * 9
    assert len({one.prefix for one in found}) == 1
    assert len(site.node.leases(site.layer.id)) == 10


@pytest.mark.parametrize("format", FORMATS)
def test_ten_processes_at_once_make_one_copy(site: Site, format: str) -> None:
    shutil.rmtree(site.config["store"], ignore_errors=True)  # they make even the store
    start = FORK.Event()
    results = FORK.SimpleQueue()

    def one(number: int) -> None:
        start.wait()
        staged = site.stage(format, holder=f"process-{number}")
        results.put((staged.how, os.stat(staged.prefix).st_ino, works(staged)))

    children = [FORK.Process(target=one, args=(number,)) for number in range(10)]
    for child in children:
        child.start()
    start.set()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 10
    found = [results.get() for _ in children]
    assert sorted(how for how, _, _ in found) == [EXTRACTED] + [HIT] * 9
    assert len({inode for _, inode, _ in found}) == 1
    assert all(fine for _, _, fine in found)


def test_the_limit_of_a_stage_covers_the_wait(site: Site) -> None:
    site.config.set("stage.timeout", "0.2s", "test")
    with site.node.lock(site.layer.id, timeout=0), pytest.raises(BusyError) as error:
        site.stage()
    assert error.value.exit_code == 11
    assert untouched(site.node)


# Claims


def test_a_failed_stage_claims_nothing_new_and_drops_nothing_old(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job may use a base that it shares with an environment that then cannot be staged."""
    site.stage(holder="job")
    missing = site.layer._replace(id="0" * 16)
    both = site.with_manifest(layers=(site.layer, missing))
    with pytest.raises(NotFoundError):
        stage.stage(both, site.node, site.config, holder="job")
    with pytest.raises(NotFoundError):
        stage.stage(both, site.node, site.config, holder="another")
    assert site.node.leases(site.layer.id) == ("job",)
    assert site.node.leases("0" * 16) == ()


def test_a_failed_stage_leaves_a_job_its_claims(site: Site) -> None:
    """Another process of the job may have found the claim of this one, and rely on it."""
    site.stage(holder="another")
    missing = site.layer._replace(id="0" * 16)
    both = site.with_manifest(layers=(site.layer, missing))
    with pytest.raises(NotFoundError):
        stage.stage(both, site.node, site.config, holder="slurm-7-01234567")
    assert "slurm-7-01234567" in site.node.leases(site.layer.id)


# What cannot be staged, and leaves nothing


def spoiled(
    site: Site, change: Callable[[Path], object]
) -> contextlib.AbstractContextManager[None]:
    """The images of the repository changed for a while."""

    @contextlib.contextmanager
    def changed() -> Iterator[None]:
        paths = [Path(one.repository.image(one.manifest.top)) for one in site.published.values()]
        content = [path.read_bytes() for path in paths]
        try:
            for path in paths:
                change(path)
            yield
        finally:
            for path, data in zip(paths, content):
                path.unlink(missing_ok=True)
                path.write_bytes(data)

    return changed()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGE: dict[str, tuple[Callable[[Path], object], type[StagerError]]] = {
    "gone": (lambda path: path.unlink(), NotFoundError),
    "empty": (lambda path: path.write_bytes(b""), IntegrityError),
    "cut off": (lambda path: os.truncate(path, path.stat().st_size - 1), IntegrityError),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"x"), IntegrityError),
    "a bit flipped": (flip, IntegrityError),
    "another file": (lambda path: path.write_bytes(bytes(path.stat().st_size)), IntegrityError),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("format", FORMATS)
def test_a_damaged_image_is_not_staged(site: Site, format: str, damage: str) -> None:
    change, kind = DAMAGE[damage]
    with spoiled(site, change), pytest.raises(StagerError) as error:
        site.stage(format)
    if not (format == "tar.zst" and damage == "gone"):
        assert isinstance(error.value, kind)
    assert error.value.message
    assert untouched(site.node)
    assert works(site.stage(format))  # and it is no reason to fail the next time


def test_an_image_that_is_a_pipe_does_not_hang(site: Site) -> None:
    for format in FORMATS:
        with spoiled(site, fifo), pytest.raises(StagerError):
            site.stage(format)


def test_another_machine(site: Site) -> None:
    needs = site.published["squashfs"].manifest.platform._replace(machine="vax")
    refused(site, "packed on vax", platform=needs)


def test_a_newer_c_library(site: Site) -> None:
    needs = site.published["squashfs"].manifest.platform._replace(glibc="2.999")
    refused(site, "needs glibc 2.999", platform=needs)


def test_a_base_that_is_missing(site: Site) -> None:
    python = site.published["squashfs"].manifest.python._replace(base="/usr/no/python")
    refused(site, "/usr/no/python is missing", python=python)


def refused(site: Site, message: str, **changes: object) -> None:
    """Such an environment is refused before any byte is copied."""
    published = site.with_manifest(**changes)
    with pytest.MonkeyPatch.context() as patch:
        calls = counting(patch)
        with pytest.raises(IncompatibleError, match=message) as error:
            stage.stage(published, site.node, site.config, holder=ME)
    assert calls == []
    assert error.value.exit_code == 15
    assert untouched(site.node)


@pytest.mark.parametrize("glibc", ["", "2.2.5", ".".join(platform.libc_ver()[1].split(".")[:2])])
def test_a_c_library_that_is_old_enough(site: Site, glibc: str) -> None:
    needs = site.published["squashfs"].manifest.platform._replace(glibc=glibc)
    assert stage.stage(site.with_manifest(platform=needs), site.node, site.config, holder=ME)


def broken(site: Site, kind: str) -> Manifest:
    """A manifest that promises another Python than the one in the tree."""
    python = site.published["squashfs"].manifest.python
    changes = {
        "another version": {"version": "2.7.18"},
        "no such program": {"executable": "bin/python9"},
        "no program": {"executable": "pyvenv.cfg"},
    }
    return site.with_manifest(python=python._replace(**changes[kind])).manifest


@pytest.mark.parametrize("kind", ["another version", "no such program", "no program"])
def test_a_python_that_does_not_start_is_refused_every_time(site: Site, kind: str) -> None:
    value = broken(site, kind)
    published = Published(value, value.encode(), site.published["squashfs"].repository)
    for _ in range(2):
        with pytest.raises(IncompatibleError) as error:
            stage.stage(published, site.node, site.config, holder=ME)
        assert error.value.hint
        assert site.node.leases(site.layer.id) == ()
    assert works(site.stage())


def test_a_python_that_does_not_end(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def expire(command: list[str], **options: object) -> None:
        raise subprocess.TimeoutExpired(command, 60)

    node, published = site.node, site.published["tar.zst"]
    monkeypatch.setattr(subprocess, "run", expire)
    with pytest.raises(IncompatibleError, match="does not end"):
        stage.stage(published, node, site.config, holder=ME)


# Images that were sent ahead


def sent_ahead(site: Site, format: str, *, boot: str = "") -> Published:
    """Put the image into the store as a push does; what is returned has no repository."""
    published = site.published[format]
    layer, node = published.manifest.top, site.node
    with node.lock(layer.id, timeout=1):
        arrived = node.partial(layer.id, layer.filename)
        shutil.copy(published.repository.image(layer), arrived)
        node.place(layer.id, arrived, layer.filename, layer.image.size)
        if boot:
            stamp = node.stamp(layer.id)
            assert stamp is not None
            node.set_ready(layer.id, stamp._replace(boot=boot))
    return Published(published.manifest, published.data, Repository("/nonexistent"))


@pytest.mark.parametrize("format", FORMATS)
def test_an_image_that_was_sent_ahead_is_used_and_not_verified_again(
    site: Site, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    published, node = sent_ahead(site, format), site.node
    assert node.ready(site.layer.id) is None

    def verify(*_: object) -> bool:
        raise AssertionError("it was verified when it arrived")

    monkeypatch.setattr(transfer, "is_image", verify)
    assert works(stage.stage(published, node, site.config, holder=ME))
    assert not os.path.exists(node.image(site.layer.id))  # it is extracted now


@pytest.mark.parametrize("format", FORMATS)
def test_after_a_reboot_an_image_that_was_sent_ahead_is_verified(site: Site, format: str) -> None:
    published, node = sent_ahead(site, format, boot="another"), site.node
    flip(Path(node.image(site.layer.id)))
    with pytest.raises(NotFoundError):  # the damaged one is not used
        stage.stage(published, node, site.config, holder=ME)
    published = sent_ahead(site, format, boot="another")
    assert works(stage.stage(published, node, site.config, holder=ME))


def test_no_room_is_asked_for_an_image_that_is_there(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes its space already: the tree has to fit beside it, not a second copy."""
    published, node = sent_ahead(site, "squashfs"), site.node
    room = (16 << 20) + whole_blocks(site.layer)
    assert site.layer.image.size >= 4096
    monkeypatch.setattr(os, "statvfs", Disk(site, room=room))
    assert works(stage.stage(published, node, site.config, holder=ME))


def test_no_room_is_asked_for_an_archive_that_is_extracted_from_where_it_is(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file takes whole blocks, however few bytes it has; the stamp tells collections so, too."""
    room = (16 << 20) + whole_blocks(site.layer)
    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", Disk(site, room=room - 4096))
        with pytest.raises(NoSpaceError):
            site.stage("tar.zst")
        patch.setattr(os, "statvfs", Disk(site, room=room))
        assert works(site.stage("tar.zst"))
    stamp = site.node.stamp(site.layer.id)
    assert stamp is not None
    assert stamp.size == site.layer.size + 4096 * site.layer.files
    assert stamp.size >= sum(
        os.lstat(path).st_blocks * 512 for path in Path(site.node.tree(site.layer.id)).rglob("*")
    )


def whole_blocks(layer: Layer) -> int:
    """Room for an extracted layer, as statvfs counts it."""
    return -(-(layer.size + 4096 * layer.files) // 4096) * 4096


# Space


@dataclasses.dataclass
class Disk:
    """What statvfs says of a disk that trees fill."""

    site: Site
    room: int
    inodes: int = 0
    flags: int = 0

    def __call__(self, path: str) -> object:
        room, inodes = self.room, self.inodes
        envs = os.path.join(self.site.config["store"], "envs")
        if os.path.isdir(envs):
            trees = len(os.listdir(envs))
            room -= trees * 10**9
            inodes -= trees * 1000
        return SimpleNamespace(
            f_bavail=room // 4096, f_frsize=4096, f_files=self.inodes, f_favail=inodes,
            f_flag=self.flags,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("disk", "message"),
    [
        (
            {"room": 10 << 20},
            "space in the store .*: needs 1 MiB and a reserve of 16 MiB, 10 MiB are free",
        ),
        (
            {"room": 10**10, "inodes": 900},
            "inodes in .*: needs .* and a reserve of 1000, 900 are free",
        ),
        ({"room": 0, "inodes": 900}, "space"),
    ],
)
def test_a_full_disk_is_told_before_anything_is_copied(
    site: Site, monkeypatch: pytest.MonkeyPatch, disk: dict[str, int], message: str
) -> None:
    node = site.node
    monkeypatch.setattr(os, "statvfs", Disk(site, **disk))
    calls = counting(monkeypatch)
    with pytest.raises(NoSpaceError, match=f"not enough {message}") as error:
        site.stage()
    assert error.value.exit_code == 13
    assert calls == []
    assert untouched(node)


@pytest.mark.parametrize(
    "disk",
    [{"room": 3 * 10**9 + (1 << 20)}, {"room": 10**12, "inodes": 4000}],
    ids=["bytes", "inodes"],
)
def test_unclaimed_trees_make_room_and_claimed_ones_stay(
    site: Site, monkeypatch: pytest.MonkeyPatch, disk: dict[str, int]
) -> None:
    node = site.node
    for number, holder in ((1, ""), (2, "someone-else"), (3, "")):
        layer_id = f"{number:016x}"
        node.lease(layer_id, holder or "nobody")
        os.mkdir(node.tree(layer_id))
        node.set_ready(layer_id, store.Stamp("x", EXTRACTED, store.boot_id(), 10**9))
        if not holder:
            node.release("nobody", layer_id)
        os.utime(os.path.join(node.root, "leases", layer_id), (number, number))
    # There is room for two of the three trees and this one: the least recently used goes.
    monkeypatch.setattr(os, "statvfs", Disk(site, **disk))
    assert works(site.stage())
    assert sorted(os.listdir(os.path.join(node.root, "envs"))) == sorted(
        [f"{2:016x}", f"{3:016x}", site.layer.id]
    )


@pytest.mark.parametrize(
    ("target", "name"), [(os, "write"), (Store, "workspace"), (Store, "set_ready")]
)
def test_a_disk_that_is_full_in_the_middle_leaves_nothing(
    site: Site, monkeypatch: pytest.MonkeyPatch, target: object, name: str
) -> None:
    def fail(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(target, name, fail)
        with pytest.raises(NoSpaceError) as error:
            site.stage()
        assert error.value.exit_code == 13
    assert untouched(site.node)
    assert works(site.stage())


@pytest.mark.parametrize(
    ("place", "function", "error", "expected", "told"),
    [
        (os, "readv", OSError(5, "Input/output error"), StagerError, "read the image"),
        (os, "readv", MemoryError("none left"), MemoryError, "none left"),
        (threading.Thread, "start", RuntimeError("no new thread"), StagerError, "no new thread"),
    ],
)
def test_a_reader_that_fails_leaves_nothing(
    site: Site,
    monkeypatch: pytest.MonkeyPatch,
    place: Any,
    function: str,
    error: Exception,
    expected: type[Exception],
    told: str,
) -> None:
    """Storage that fails in the middle, what nobody thought of, and a user without more threads."""

    def fail(*_: object) -> None:
        raise error

    before = threading.active_count()
    with monkeypatch.context() as patch:
        patch.setattr(place, function, fail)
        with pytest.raises(expected, match=told):
            site.stage()
    assert threading.active_count() == before
    assert untouched(site.node)
    assert works(site.stage())


def test_a_python_that_no_process_can_be_had_for_is_not_to_blame(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    with monkeypatch.context() as patched:
        patched.setattr(subprocess, "run", fail)
        with pytest.raises(StagerError, match="Resource temporarily unavailable") as error:
            site.stage("tar.zst")
    assert "ulimit -a" in (error.value.hint or "")
    assert untouched(site.node)


@pytest.mark.parametrize(
    ("format", "module", "function", "blame"),
    [
        ("squashfs", transfer, "readv", "job"),
        ("tar.zst", index, "preadv", "job"),
        ("squashfs", transfer, "write", "node"),
        ("tar.zst", extracting, "utime", "node"),
    ],
)
def test_a_disk_that_fails_is_the_nodes_fault_and_shared_storage_is_not(
    site: Site,
    monkeypatch: pytest.MonkeyPatch,
    format: str,
    module: Any,
    function: str,
    blame: str,
) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(module, "os", SimpleNamespace(**{**vars(os), function: fail}))
    with pytest.raises(StagerError, match="Input/output error") as error:
        site.stage(format)
    assert error.value.blame == blame
    assert untouched(site.node)


@pytest.mark.parametrize(
    ("said", "code", "blame"),
    [
        ("Write on output file failed because Input/output error", 1, "node"),
        ("Write on output file failed because No space left on device", 13, "site"),
        ("FATAL ERROR: Out of memory (cache_init)", 1, "site"),
        ("FATAL ERROR: Failed to create thread", 1, "site"),
        ("FATAL ERROR: File system corruption detected", 12, "job"),
    ],
)
def test_whose_fault_it_is_that_unsquashfs_fails(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, code: int, blame: str
) -> None:
    stand_in = tmp_path / "unsquashfs"
    stand_in.write_text(f"#!/bin/sh\necho '{said}' >&2\nexit 1\n")
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(StagerError) as error:
        site.stage()
    assert (error.value.exit_code, error.value.blame) == (code, blame)
    assert os.listdir(os.path.join(site.node.root, "images")) == []  # which may fill the disk


def test_a_full_disk_is_told_while_shared_storage_hangs(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 9 << 20
    source, copied = tmp_path / "image", tmp_path / "copied"
    source.write_bytes(bytes(size))
    read, hanging, again = os.readv, threading.Event(), threading.Event()
    readers: list[threading.Thread] = []

    def hang(fd: int, buffers: list[bytearray]) -> int:
        readers.append(threading.current_thread())
        if len(readers) > 1:
            hanging.set()
            assert again.wait(60.0)
        return read(fd, buffers)

    def fail(*_: object) -> int:
        assert hanging.wait(60.0)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "readv", hang)
        patch.setattr(os, "write", fail)
        with pytest.raises(NoSpaceError):
            transfer.copy(str(source), Image("squashfs", size, 0), str(copied))
        assert readers[0].is_alive()
        again.set()
        readers[0].join()
    assert len(readers) == 2  # the file is closed, its number may be another one's
    assert not copied.exists()


def test_an_image_that_grows_while_it_is_read_does_not_fill_the_disk(tmp_path: Path) -> None:
    size = 9 << 20  # more than is read ahead
    source, copied = tmp_path / "image", tmp_path / "copied"
    source.write_bytes(bytes(size))
    seen = 0

    def advance(count: int) -> None:
        nonlocal seen
        seen += count
        with open(source, "ab") as file:
            file.write(bytes(count))
        assert seen <= size

    with pytest.raises(IntegrityError, match=f"more than its {size} bytes"):
        transfer.copy(str(source), Image("squashfs", size, 0), str(copied), advance=advance)
    assert not copied.exists()


def test_nothing_is_extracted_where_programs_cannot_be_run(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = site.node
    monkeypatch.setattr(os, "statvfs", Disk(site, room=10**12, flags=os.ST_NOEXEC))
    with pytest.raises(IncompatibleError, match="noexec"):
        site.stage()
    assert untouched(node)


# How


def test_an_archive_cannot_be_mounted(site: Site) -> None:
    site.config.set("stage.how", "mount", "test")
    with pytest.raises(IncompatibleError, match="cannot be mounted"):
        site.stage("tar.zst")
    assert untouched(site.node)


@pytest.mark.parametrize("wanted", ["auto", "mount"])
def test_where_nothing_can_be_mounted(
    site: Site, monkeypatch: pytest.MonkeyPatch, wanted: str
) -> None:
    monkeypatch.setattr(squashfs, "why_not_mount", lambda: "squashfuse is not installed")
    site.config.set("stage.how", wanted, "test")
    notes: list[str] = []
    progress = SimpleNamespace(copying=lambda *_: lambda _: None, note=notes.append, waiting=None)
    if wanted == "mount":
        with pytest.raises(IncompatibleError, match="squashfuse is not installed"):
            site.stage(progress=progress)
        assert untouched(site.node)
    else:
        assert site.stage(progress=progress).how == EXTRACTED
        assert notes == ["extracting instead of mounting: squashfuse is not installed"]


@pytest.mark.parametrize("wanted", ["auto", "mount"])
def test_where_a_mount_is_refused(site: Site, monkeypatch: pytest.MonkeyPatch, wanted: str) -> None:
    def refuse(image: str, directory: str) -> None:
        assert os.path.exists(image)
        raise StagerError("fusermount: mount failed: Operation not permitted")

    monkeypatch.setattr(squashfs, "why_not_mount", lambda: "")
    monkeypatch.setattr(squashfs, "mount", refuse)
    site.config.set("stage.how", wanted, "test")
    if wanted == "mount":
        with pytest.raises(StagerError, match="Operation not permitted"):
            site.stage()
    else:
        staged = site.stage()
        assert staged.how == EXTRACTED
        assert works(staged)


def test_an_error_that_is_none_of_ours_leaves_nothing_either(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(squashfs, "extract", interrupt)
    with pytest.raises(KeyboardInterrupt):
        site.stage()
    assert untouched(site.node)


def test_every_tree_runs_the_python_it_was_packed_with(site: Site) -> None:
    staged = site.stage()
    said = run(
        [f"{staged.prefix}/bin/python", "-c", "import sys; print(sys.prefix, sys.base_prefix)"]
    )
    assert said.stdout.split() == [staged.prefix, str(BASE_PYTHON.parent.parent)]


def test_the_seconds_are_told(site: Site) -> None:
    started = time.monotonic()
    seconds = site.stage().seconds["total"]
    assert 0 < seconds <= time.monotonic() - started
