"""The node-local side: private, never half ready, and what is claimed is never evicted."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import tiny
from stager import fsutil, schedulers
from stager.errors import BusyError, DeniedError, StagerError, UsageError
from stager.staging import collect, lease
from stager.staging import store as storing
from stager.staging.collect import Collected
from stager.staging.store import EXTRACTED, MOUNTED, RECEIVED, Stamp, Store, boot_id

pytestmark = pytest.mark.unit

A, B, C = ("a" * 16, "b" * 16, "c" * 16)
JOB = f"slurm-7-{boot_id()[:8]}"


@pytest.fixture
def node(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def made(node: Store, layer_id: str, *, size: int = 100, used: float | None = None) -> None:
    """Make a tree that is ready, as a stage does, with its last use at a time."""
    node.lease(layer_id, "someone")
    os.makedirs(os.path.join(node.tree(layer_id), "bin"))
    node.set_ready(layer_id, Stamp("image", EXTRACTED, boot_id(), size))
    node.release("someone", layer_id)
    if used is not None:
        os.utime(os.path.join(node.root, "leases", layer_id), (used, used))


def is_ready(node: Store, layer_id: str) -> bool:
    return node.ready(layer_id) is not None


# The directory


def test_it_is_private_and_can_be_opened_again(node: Store) -> None:
    for room in ("", "images", "envs", "ready", "leases", "locks", "tmp"):
        assert stat.S_IMODE(os.stat(os.path.join(node.root, room)).st_mode) == 0o700
    made(node, A)
    assert is_ready(Store(node.root), A)


def test_a_store_open_to_others_is_refused(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir(mode=0o700)
    (tmp_path / "store").chmod(0o750)
    with pytest.raises(DeniedError, match="open to others"):
        Store(str(tmp_path / "store"))


def test_a_disk_that_fails_is_the_nodes_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: str, mode: int = 0o777) -> None:
        raise OSError(30, "Read-only file system", path)

    monkeypatch.setattr(os, "mkdir", fail)
    with pytest.raises(StagerError, match="Read-only") as error:
        Store(str(tmp_path / "store"))
    assert error.value.blame == "node"


# Ready or not


def test_a_tree_is_ready_with_its_stamp_and_not_without(node: Store) -> None:
    assert not is_ready(node, A)
    made(node, A)
    assert is_ready(node, A)
    assert node.stamp(A) == Stamp("image", EXTRACTED, boot_id(), 100)
    node.withdraw(A)
    assert not is_ready(node, A)
    node.withdraw(A)


def test_a_tree_of_another_boot_is_not_ready(node: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    made(node, A)
    monkeypatch.setattr(storing, "boot_id", lambda: "00000000-0000-0000-0000-000000000000")
    assert not is_ready(node, A)


def test_a_tree_that_is_gone_is_not_ready(node: Store) -> None:
    made(node, A)
    os.rename(node.tree(A), node.tree(B))
    assert not is_ready(node, A)


def test_a_mounted_tree_without_its_mount_is_not_ready(node: Store) -> None:
    made(node, A)
    node.set_ready(A, Stamp("image", MOUNTED, boot_id(), 100))
    assert not is_ready(node, A)


def test_an_image_that_arrives_leaves_a_mount_of_this_boot_what_it_is(node: Store) -> None:
    """It may be mounted in a job's own mount namespace, where we cannot see it."""
    mounted = Stamp("old", MOUNTED, boot_id(), 100, owner="7/0")
    for before, after in (
        (mounted, mounted._replace(image="new")),
        (mounted._replace(boot="another"), Stamp("new", RECEIVED, boot_id(), 5)),
        (mounted._replace(how=EXTRACTED), Stamp("new", RECEIVED, boot_id(), 5)),
    ):
        node.set_ready(A, before)
        arrived = node.partial(A, "new")
        Path(arrived).write_bytes(b"image")
        node.place(A, arrived, "new", 5)
        assert node.stamp(A) == after
        assert Path(node.image(A)).read_bytes() == b"image"
        node.set_ready(A, before)
        node.set_received(A, "new", 5)
        assert node.stamp(A) == after


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"null", b'{"format": 1}', b"\xff", b"0" * 5000]
    + [json.dumps({**Stamp("image", EXTRACTED, boot_id(), 1)._asdict(), **change}).encode()
       for change in ({"format": 2}, {"format": 0}, {"new key": 1})]
)  # fmt: skip
def test_a_stamp_that_is_not_ours_does_not_count(node: Store, data: bytes) -> None:
    made(node, A)
    Path(node.root, "ready", A).write_bytes(data)
    assert node.stamp(A) is None
    assert not is_ready(node, A)


def test_a_stamp_that_is_a_pipe_is_not_waited_for(node: Store) -> None:
    """Root's collection waits for what works as the store's owner, who can put it there."""
    made(node, A)
    os.unlink(Path(node.root, "ready", A))
    os.mkfifo(Path(node.root, "ready", A))
    assert tiny.in_child(lambda: (signal.alarm(20), node.stamp(A))) == 0
    assert node.stamp(A) is None


def test_a_stamp_that_is_too_long_is_not_read(node: Store) -> None:
    """Root's collection is in no job's cgroup: it could take all the memory of the node."""
    made(node, A)
    os.truncate(os.path.join(node.root, "ready", A), 1 << 42)
    assert node.stamp(A) is None


def test_a_stamp_that_is_too_deep(node: Store) -> None:
    made(node, A)
    Path(node.root, "ready", A).write_text("[" * 4000)
    assert node.stamp(A) is None


# Claims


def test_a_claim_is_held_until_it_is_released(node: Store) -> None:
    assert node.lease(A, "x") is True
    assert node.lease(A, "x") is False
    assert node.lease(A, "y") is True
    assert node.leases(A) == ("x", "y")
    assert node.leases(B) == ()
    assert node.release("x") == 1
    assert node.release("x") == 0
    assert node.leases(A) == ("y",)


def test_releasing_is_for_one_tree_or_for_all(node: Store) -> None:
    for one in (A, B, C):
        node.lease(one, "x")
    assert node.release("x", B) == 1
    assert node.leases(B) == ()
    assert node.release("x") == 2


@pytest.mark.parametrize(
    "holder",
    ["", ".", "..", "../x", "a/b", "/etc/passwd", "a\0b", "-x", ".hidden", "a b", "x" * 201],
)
def test_a_holder_is_no_path(node: Store, tmp_path: Path, holder: str) -> None:
    node.lease(A, "x")
    (tmp_path / "x").touch()
    Path(node.root, "leases", "x").touch()
    with pytest.raises(UsageError):
        node.release(holder)
    with pytest.raises(UsageError):
        node.lease(A, holder)
    assert (tmp_path / "x").exists()
    assert Path(node.root, "leases", "x").exists()
    assert node.leases(A) == ("x",)


def test_a_claim_is_made_though_a_collector_removes_the_directory(
    node: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = os.path.join(node.root, "leases", A)
    real, removed = os.open, []

    def removing(path: str, *rest: int, **options: int) -> int:
        if path.startswith(directory) and len(removed) < 3:
            removed.append(path)
            os.rmdir(directory)
        return real(path, *rest, **options)

    monkeypatch.setattr(os, "open", removing)
    assert node.lease(A, "x") is True
    assert len(removed) == 3
    assert node.leases(A) == ("x",)


def test_a_claim_on_a_full_disk(node: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str, *_: int, **__: int) -> int:
        raise OSError(28, "No space left on device", path)

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(StagerError, match="No space left") as error:
        node.lease(A, "x")
    assert (error.value.exit_code, error.value.blame) == (13, "site")


def test_a_claim_is_a_use(node: Store) -> None:
    made(node, A, used=1000)
    node.lease(A, "x")
    (held,) = node.held()
    assert held.used > 1000
    os.utime(os.path.join(node.root, "leases", A), (1000, 1000))
    node.lease(A, "x")  # again
    assert node.held()[0].used > 1000


# Making and removing


def test_a_lock_is_for_one_tree(node: Store) -> None:
    with node.lock(A, timeout=0), node.lock(B, timeout=0), pytest.raises(BusyError):
        node.lock(A, timeout=0).__enter__()


def test_a_workspace_is_cleared_of_earlier_tries(node: Store) -> None:
    first = node.workspace(A)
    Path(first, "half").touch()
    assert node.workspace(A) == first
    assert os.listdir(first) == []
    assert stat.S_IMODE(os.stat(first).st_mode) == 0o700


def test_clearing_takes_away_the_stamp_and_the_tree(node: Store) -> None:
    made(node, A)
    node.clear(A)
    assert node.stamp(A) is None
    assert not os.path.exists(node.tree(A))
    node.clear(A)


def test_forgetting_leaves_nothing_but_the_lock(node: Store) -> None:
    made(node, A)
    Path(node.image(A)).touch()
    Path(node.workspace(A), "half").touch()
    node.forget(A)
    assert node.held() == []
    for room in ("images", "envs", "ready", "leases", "tmp"):
        assert os.listdir(os.path.join(node.root, room)) == []


def test_everything_that_takes_space_or_is_claimed_is_known(node: Store) -> None:
    made(node, A, size=1000, used=50)
    node.lease(B, "x")
    Path(node.image(C)).write_bytes(b"x" * 10_000)
    found = {held.id: held for held in node.held()}
    assert set(found) == {A, B, C}
    assert found[A].stamp == Stamp("image", EXTRACTED, boot_id(), 1000)
    assert (found[A].used, found[A].leases) == (50, ())
    assert (found[B].stamp, found[B].leases) == (None, ("x",))
    assert (found[C].stamp, found[C].used) == (None, 0.0)
    assert 1000 + 10_000 <= node.size() <= 1000 + 3 * 4096


def test_free_space_is_what_we_may_use(node: Store) -> None:
    info = os.statvfs(node.root)
    assert node.free() % info.f_frsize == 0
    assert 0 < node.free() <= info.f_bfree * info.f_frsize


# Collection


def collecting(
    node: Store, *, max_size: int = 10**12, min_free: int = 0, everything: bool = False
) -> Collected:
    return collect.collect(node, max_size=max_size, min_free=min_free, everything=everything)


def test_nothing_is_evicted_within_the_bounds(node: Store) -> None:
    made(node, A)
    assert collecting(node).trees == ()
    assert is_ready(node, A)


def test_images_that_nobody_took_in_are_removed(node: Store) -> None:
    """sbcast puts them into the store, or beside it where it is made by the first stage."""
    uid = os.geteuid()
    places = (node.root, os.path.dirname(node.root))
    sent = [os.path.join(place, f".stager-{uid}-{name}") for place in places for name in "xy"]
    others = [os.path.join(places[1], name) for name in (f"stager-{uid}-notes", ".stager-7-x")]
    for path in (*sent, *others):
        Path(path).touch()
        if not path.endswith("y"):
            os.utime(path, (1, 1))
    collecting(node)
    assert [os.path.exists(path) for path in sent] == [False, True, False, True]
    assert all(map(os.path.exists, others))


def test_the_least_recently_used_goes_first_and_no_more_than_is_needed(node: Store) -> None:
    for layer_id, used in ((A, 300), (B, 100), (C, 200)):
        made(node, layer_id, size=1000, used=used)
    assert collecting(node, max_size=2500).trees == (B,)
    assert collecting(node, max_size=2500).trees == ()
    assert collecting(node, max_size=999).trees == (C, A)


def test_a_claimed_tree_stays_whatever_the_bounds(node: Store) -> None:
    made(node, A, used=1)
    made(node, B, used=2)
    node.lease(A, JOB)
    os.utime(os.path.join(node.root, "leases", A), (1, 1))
    stamp = os.path.join(node.root, "ready", A)
    before = os.stat(stamp).st_ino
    assert collecting(node, max_size=0, min_free=10**18).trees == (B,)
    assert collecting(node, max_size=0, everything=True).trees == ()
    assert is_ready(node, A)
    assert os.stat(stamp).st_ino == before  # not taken away for a moment either
    assert node.leases(A) == (JOB,)


def test_everything_means_everything_unclaimed(node: Store) -> None:
    made(node, A)
    made(node, B)
    node.lease(B, JOB)
    assert collecting(node, everything=True).trees == (A,)


def test_free_space_is_a_bound_too(node: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, layer_id in enumerate((A, B, C)):
        made(node, layer_id, used=number + 1)

    def free(node: Store) -> int:
        return 1000 - 100 * len(os.listdir(os.path.join(node.root, "envs")))

    monkeypatch.setattr(Store, "free", free)
    assert collecting(node, min_free=700).trees == ()
    found = collecting(node, min_free=900)
    assert found == Collected((A, B), 200, 0)


def test_what_a_killed_stage_has_left_goes_at_once(node: Store) -> None:
    made(node, A)
    node.withdraw(A)
    Path(node.image(B)).touch()
    Path(node.workspace(C), "half").touch()
    assert sorted(collecting(node).trees) == [A, B, C]
    assert node.held() == []


@pytest.mark.parametrize("half", [f"ready/.{A}.{{}}.new", ".stager-0-{}"])
def test_half_a_file_of_who_was_killed_goes_when_it_is_old(node: Store, half: str) -> None:
    made(node, A)
    old, new = (Path(node.root, half.format(name)) for name in ("old", "new"))
    for path, age in ((old, 100_000.0), (new, 0.0)):
        path.touch()
        os.utime(path, (time.time() - age,) * 2)
    os.utime(Path(node.root, "ready", A), (1, 1))
    assert collecting(node).trees == ()
    assert (old.exists(), new.exists(), is_ready(node, A)) == (False, True, True)


def test_what_is_being_made_is_left(node: Store) -> None:
    with node.lock(A, timeout=0):
        Path(node.workspace(A), "half").touch()
        assert collecting(node, everything=True).trees == ()
        assert os.path.exists(os.path.join(node.root, "tmp", A, "half"))


def test_claims_of_the_dead_are_dropped(node: Store) -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        holder = lease.of_process(process.pid)
        made(node, A)
        node.lease(A, holder)
        node.lease(A, JOB)
        assert collecting(node).leases == 0
        process.kill()
    assert collecting(node).leases == 1
    assert node.leases(A) == (JOB,)


def test_jobs_that_the_scheduler_does_not_know_any_more_are_dead(node: Store) -> None:
    made(node, A)
    made(node, B)
    node.lease(A, JOB)
    node.lease(B, f"slurm-8-{boot_id()[:8]}")
    found = collect.collect(
        node, max_size=0, min_free=0, exists=lambda _, job: {"7": False, "8": None}[job]
    )
    assert (found.trees, found.leases) == ((A,), 1)


def test_a_tree_that_is_half_removed_is_no_tree_any_more(
    node: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(node, A)

    def fail(path: str) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy", f"{path}/something-mounted")

    with monkeypatch.context() as patched:
        patched.setattr(fsutil, "remove_tree", fail)
        found = collecting(node, everything=True)
    assert found.trees == ()
    (why,) = found.failed
    assert why.startswith(f"{A}: ") and "Device or resource busy" in why
    assert not is_ready(node, A)
    assert collecting(node).trees == (A,)


def test_a_claim_made_while_a_tree_is_evicted_keeps_it(
    node: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage claims first and looks then; the collector withdraws first and looks then."""
    made(node, A)
    real = Store.withdraw
    seen = []

    def withdraw(self: Store, layer_id: str) -> None:
        real(self, layer_id)
        self.lease(layer_id, JOB)
        seen.append(is_ready(self, layer_id))  # the stage waits for the lock, then

    monkeypatch.setattr(Store, "withdraw", withdraw)
    assert collecting(node, everything=True).trees == ()
    assert seen == [False]
    assert is_ready(node, A)


def test_a_tree_that_cannot_be_removed_stays_ready(
    node: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(node, A)

    def busy(self: Store, layer_id: str) -> None:
        raise StagerError("it is in use")

    monkeypatch.setattr(Store, "forget", busy)
    assert collecting(node, everything=True).trees == ()
    assert is_ready(node, A)


def test_a_collection_reads_each_stamp_as_often_in_a_large_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits for it must not wait for a square of the trees that a user has made up."""
    read = []
    stamp = Store.stamp
    monkeypatch.setattr(Store, "stamp", lambda *who: read.append(who) or stamp(*who))
    for number in (2, 40):
        node = Store(str(tmp_path / str(number)))
        for one in range(number):
            made(node, f"{one:016x}")
        assert len(collecting(node, max_size=0).trees) == number
    assert len(read) == 3 * (2 + 40)


def test_collectors_and_claims_at_once_never_lose_a_claimed_tree(node: Store) -> None:
    made(node, A)
    stop = threading.Event()
    lost: list[str] = []

    def use(number: int) -> int:
        turns = 0
        while not stop.wait(0.002):  # time for a collector to find it unclaimed
            holder = f"user-{number}"
            node.lease(A, holder)
            if is_ready(node, A):
                if not os.path.isdir(os.path.join(node.tree(A), "bin")):
                    lost.append(holder)
            else:
                with node.lock(A, timeout=60):
                    if not is_ready(node, A):
                        node.clear(A)
                        os.makedirs(os.path.join(node.tree(A), "bin"))
                        node.set_ready(A, Stamp("image", EXTRACTED, boot_id(), 1))
            with node.lock(A, timeout=60):  # a collector that sees the claim puts the stamp back
                if not os.path.isdir(os.path.join(node.tree(A), "bin")) or not is_ready(node, A):
                    lost.append(holder)
            node.release(holder, A)
            turns += 1
        return turns

    with ThreadPoolExecutor(2) as pool:
        users = [pool.submit(use, number) for number in range(2)]
        evicted, limit = 0, time.monotonic() + 30
        while evicted < 20 and time.monotonic() < limit:
            evicted += len(collecting(node, everything=True).trees)
        stop.set()
        turns = [user.result() for user in users]
    assert lost == []
    assert evicted >= 20
    assert min(turns) > 0


# Holders


def test_a_process_is_alive_until_it_ends() -> None:
    assert lease.is_alive(lease.of_process(os.getpid()))
    with subprocess.Popen(["sleep", "60"]) as process:
        holder = lease.of_process(process.pid)
        assert lease.is_alive(holder)
        process.kill()
    assert not lease.is_alive(holder)


def test_a_later_process_with_the_same_number_is_another() -> None:
    kind, pid, start, boot, namespace = lease.of_process(os.getpid()).split("-")
    assert not lease.is_alive(f"{kind}-{pid}-{int(start) - 1}-{boot}-{namespace}")
    assert not lease.is_alive(f"{kind}-{pid}-{start}-{'0' * 8}-{namespace}")
    assert lease.is_alive(f"{kind}-{pid}-{start}-{boot}")  # as an older stager wrote it


def test_a_process_that_nobody_may_look_at_is_alive_while_its_number_is_taken() -> None:
    """A parent that is root's, where /proc hides others' processes: its start is not to be had."""
    boot = boot_id()[:8]
    assert lease.is_alive(f"pid-1-0-{boot}")
    with subprocess.Popen(["true"]) as process:
        pass
    assert not lease.is_alive(f"pid-{process.pid}-0-{boot}")
    assert not lease.is_alive(f"pid-{'9' * 40}-0-{boot}")


def test_a_parent_of_another_namespace_is_its_first_process() -> None:
    assert lease.of_process(0) == lease.of_process(1)


def test_a_program_with_a_strange_name(tmp_path: Path) -> None:
    path = tmp_path / "a) S 1 (b"
    path.symlink_to("/bin/sleep")
    with subprocess.Popen([path, "60"]) as process:
        holder = lease.of_process(process.pid)
        start = int(holder.split("-")[2])
        own = int(lease.of_process(os.getpid()).split("-")[2])
        assert start >= own > 0
        process.kill()


@pytest.mark.parametrize(
    ("holder", "known", "alive"),
    [
        (JOB, None, True),
        (JOB, True, True),
        (JOB, False, False),
        ("slurm-7-00000000", None, False),
        (f"pbs-12.server-{boot_id()[:8]}", False, False),
        (f"pbs-12.server-{boot_id()[:8]}", None, True),
        ("something else", False, True),
    ],
)
def test_a_job_is_alive_until_somebody_knows_better(
    holder: str, known: bool | None, alive: bool
) -> None:
    assert lease.is_alive(holder, None if known is None else lambda scheduler, job: known) is alive


def test_a_holder_is_the_job_and_outside_of_any_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert lease.of_job_or_process(os.getpid()) == lease.of_process(os.getpid())
    monkeypatch.setenv("PBS_JOBID", "12[3].server")
    assert lease.of_job_or_process(1) == f"pbs-12_3_.server-{boot_id()[:8]}"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert lease.of_job_or_process(1) == JOB


@pytest.mark.parametrize("job", ["../../etc", "7/../8", "x" * 500, "a b\n", "-7"])
def test_every_job_can_hold_a_claim(node: Store, job: str) -> None:
    found = schedulers.current({"SLURM_JOB_ID": job})
    assert found is not None
    node.lease(A, lease.of_job(found.scheduler, found.id))
    assert len(node.leases(A)) == 1


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": ""}, None),
        ({"SLURM_JOB_ID": "7"}, ("slurm", "7")),
        ({"PBS_JOBID": "9.h"}, ("pbs", "9.h")),
    ],
)
def test_the_job_we_run_in(environ: dict[str, str], expected: tuple[str, str] | None) -> None:
    assert schedulers.current(environ) == expected


def test_the_boot_is_the_kernels() -> None:
    again = subprocess.run(
        [sys.executable, "-c", "print(open('/proc/sys/kernel/random/boot_id').read().strip())"],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert boot_id() == again.strip()
    assert len(boot_id()) == 36
