"""Mounted trees: alive or mounted again, never in the way, gone when nobody claims them."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import multiprocessing
import os
import re
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import tiny
from environments import run
from stager import cli, fsutil, transfer, warm
from stager.config import Config
from stager.errors import StagerError
from stager.formats import squashfs
from stager.repository import Published
from stager.staging import allocation, collect, lease, stage, store
from stager.staging.processes import Owner
from stager.staging.stage import HIT, Staged
from stager.staging.store import EXTRACTED, MOUNTED, Store

pytestmark = pytest.mark.root

FORK = multiprocessing.get_context("fork")
NOBODY = 65534


@dataclass
class Site:
    """An environment that is published, and a store to mount it in."""

    config: Config
    published: Published

    @property
    def node(self) -> Store:
        return tiny.store(self.config)

    @property
    def id(self) -> str:
        return self.published.manifest.top.id

    @property
    def tree(self) -> str:
        return self.node.tree(self.id)

    def stage(self, holder: str = "slurm-7") -> Staged:
        return stage.stage(self.published, self.node, self.config, holder=holder)

    def collect(self) -> tuple[str, ...]:
        return collect.collect(self.node, max_size=0, min_free=0, everything=True).trees

    @property
    def mounts(self) -> list[str]:
        """The lines of the kernel's table for mounts in the store."""
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        return [line for line in lines if line.split()[4].startswith(self.config["store"])]

    @property
    def servers(self) -> list[int]:
        """The processes that serve the images of the store."""
        image, found = os.fsencode(self.node.image(self.id)), []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                arguments = (process / "cmdline").read_bytes().split(b"\0")
            except OSError:  # it has ended meanwhile
                continue
            if image in arguments and b"squashfuse" in arguments[0]:
                found.append(int(process.name))
        return found

    def kill_servers(self) -> None:
        for pid in self.servers:
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not self.servers)


@pytest.fixture
def site(public_path: Path) -> Iterator[Site]:
    config = tiny.configured(public_path, stage_how="mount")
    prefix = tiny.environment(public_path / "environment")
    site = Site(config, tiny.packed(prefix, config))
    yield site
    site.node.clear(site.id)
    assert site.mounts == []
    wait_for(lambda: not site.servers)


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.01)


def works(staged: Staged) -> bool:
    return run([f"{staged.prefix}/bin/tiny"]).stdout == f"{staged.prefix}\n"


@pytest.mark.parametrize("program", ["squashfuse_ll", "squashfuse"])
def test_what_was_asked_once_the_kernel_knows(
    site: Site, program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(squashfs, "_HELPERS", {program: squashfs._HELPERS[program]})
    site.stage()
    (server,) = site.servers
    names = [f"{site.tree}/{name}" for name in ("pyvenv.cfg", "bin", "missing", "bin/missing")]

    def ask() -> int:
        """Look up every name often, and tell how often the server was woken meanwhile."""
        before = woken()
        for _ in range(100):
            assert [os.path.exists(name) for name in names] == [True, True, False, False]
        return woken() - before

    def woken() -> int:
        status = Path(f"/proc/{server}/status").read_text()
        return int(re.findall(r"^voluntary_ctxt_switches:\s*(\d+)", status, re.MULTILINE)[0])

    ask()
    assert ask() < 10


def test_a_cold_stage_mounts_and_a_warm_one_finds_it(site: Site) -> None:
    cold = site.stage()
    assert (cold.how, cold.prefix) == (MOUNTED, site.tree)
    assert works(cold)
    assert site.stage().how == HIT
    (mount,) = site.mounts
    options = mount.split()[5].split(",")
    assert {"ro", "nosuid", "nodev"} <= set(options)
    assert os.listdir(os.path.join(site.node.root, "tmp")) == []


def test_nothing_of_the_shared_storage_is_needed_any_more(site: Site) -> None:
    site.stage()
    shutil.rmtree(site.published.repository.root)
    staged = site.stage()
    assert staged.how == HIT
    assert works(staged)


def test_a_mount_that_comes_too_late_is_taken_away_and_the_tree_extracted(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from a helper that has mounted and does not return."""
    mount = squashfs.mount

    def late(image: str, directory: str) -> None:
        mount(image, directory)
        raise StagerError("squashfuse did not mount it in time")

    monkeypatch.setattr(squashfs, "mount", late)
    with pytest.raises(StagerError, match="in time"):
        site.stage()
    assert site.mounts == []
    site.config.set("stage.how", "auto", "test")
    staged = site.stage()
    assert staged.how == EXTRACTED
    assert site.mounts == []
    assert works(staged)


def test_a_mounted_tree_cannot_be_written_to(site: Site) -> None:
    staged = site.stage()
    with pytest.raises(OSError, match=os.strerror(errno.EROFS)):
        Path(staged.prefix, "bin", "new").touch()


# Whose mount, and a note of it


def test_a_stamp_tells_whose_end_takes_a_mount_away(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    site.stage()
    (layer,) = site.published.manifest.layers
    stamp = site.node.stamp(site.id)
    assert stamp is not None
    for owner in (stamp.owner, None):  # an older stager did not write it down
        site.node.set_ready(site.id, stamp._replace(owner=owner))
        monkeypatch.setenv("SLURM_STEP_ID", "0")
        assert allocation.foreign(site.node, layer) is None
        monkeypatch.setenv("SLURM_STEP_ID", "1")
        assert allocation.foreign(site.node, layer) == Owner("7", "0")
    monkeypatch.delenv("SLURM_JOB_ID")
    assert allocation.foreign(site.node, layer) == Owner("7", "0")


def test_a_note_is_not_believed_where_the_server_died(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = site.published.manifest.name
    monkeypatch.setenv("STAGER_STORE", site.config["store"])
    monkeypatch.setenv("STAGER_REPOSITORY", site.config["repository"])
    assert warm.hit(name) == ""
    assert cli.main(["stage", name]) == 0
    assert capsys.readouterr().out == f"{site.tree}\n"
    assert warm.hit(name) == site.tree
    site.node.release(lease.of_process(os.getppid()))
    site.kill_servers()
    assert warm.hit(name) == ""
    assert site.node.leases(site.id) == ()
    assert cli.main(["stage", name]) == 0
    assert warm.hit(name) == site.tree


# Dead servers


def test_a_mount_whose_server_died_is_mounted_again(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.stage()
    for _ in range(2):
        site.kill_servers()
        assert warm.mounted(site.tree) == warm.DEAD
        assert not squashfs.is_mounted(site.tree)
        assert site.node.ready(site.id) is None

        def never(*_: object, **__: object) -> bool:
            raise AssertionError("the copy of this boot is good as it is")

        with monkeypatch.context() as patch:
            patch.setattr(transfer, "copy", never)
            patch.setattr(transfer, "is_image", never)
            again = site.stage()
        assert again.how == MOUNTED
        assert works(again)
        assert len(site.mounts) == len(site.servers) == 1


@pytest.fixture
def stopped(site: Site, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Staged, and the server is stopped, as with a job that Slurm suspends."""
    monkeypatch.setattr(warm, "_PATIENCE", 0.2)
    site.stage()
    servers = site.servers
    for pid in servers:
        os.kill(pid, signal.SIGSTOP)
    try:
        assert warm.mounted(site.tree) == warm.SILENT
        assert site.node.ready(site.id) is None
        yield
    finally:
        for pid in servers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_a_mount_that_does_not_answer_is_mounted_again(site: Site, stopped: None) -> None:
    again = site.stage()
    assert again.how == MOUNTED and works(again)
    assert len(site.mounts) == 1


def test_a_mount_of_a_suspended_job_is_not_taken_away(
    site: Site, stopped: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its job goes on from what is extracted in its place; what it has open it keeps."""
    stamp = site.node.stamp(site.id)
    assert stamp is not None
    site.node.set_ready(site.id, stamp._replace(owner=Owner("7", "0").text))
    monkeypatch.setattr(allocation, "_lives", lambda owner: True)
    before = site.servers
    again = allocation.stage_here(site.published, site.config, holder="slurm-8")
    stamp = site.node.ready(site.id)
    assert stamp is not None and stamp.how == EXTRACTED
    assert works(again)
    assert site.servers == before  # for the files that are open


def test_mounts_on_top_of_each_other_are_all_taken_away(site: Site) -> None:
    site.stage()
    squashfs.mount(site.node.image(site.id), site.tree)
    assert len(site.mounts) == 2
    site.kill_servers()
    again = site.stage()
    assert works(again)
    assert len(site.mounts) == 1


# Killed producers


def dying(target: object, name: str, *, after: bool) -> None:
    real = getattr(target, name)

    def function(*arguments: object, **options: object) -> None:
        if after:
            real(*arguments, **options)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(target, name, function)


@pytest.mark.parametrize(
    ("target", "name", "after"),
    [
        (transfer, "copy", True),
        (squashfs, "mount", False),
        (squashfs, "mount", True),
        (Store, "set_ready", False),
    ],
)
def test_a_producer_that_is_killed_leaves_nothing_in_the_way(
    site: Site, target: object, name: str, after: bool
) -> None:
    def work() -> None:
        dying(target, name, after=after)
        site.stage("killed")

    assert tiny.in_child(work) == -signal.SIGKILL
    assert site.node.ready(site.id) is None
    again = site.stage()
    assert again.how == MOUNTED
    assert works(again)
    assert len(site.mounts) == 1
    wait_for(lambda: len(site.servers) == 1)


def test_what_a_killed_producer_has_mounted_is_collected(site: Site) -> None:
    def work() -> None:
        dying(Store, "set_ready", after=False)
        site.stage(f"pid-{os.getpid()}-0-00000000")

    assert tiny.in_child(work) == -signal.SIGKILL
    assert len(site.mounts) == 1
    assert collect.collect(site.node, max_size=10**12, min_free=0).trees == (site.id,)
    assert site.mounts == []
    assert site.node.held() == []


# Another boot


@pytest.fixture
def rebooted(site: Site, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The store after a reboot: images are there, mounts are not; copies are counted."""
    site.stage()
    assert squashfs.unmount(site.tree)
    monkeypatch.setattr(store, "boot_id", lambda: "11111111-2222-3333-4444-555555555555")
    calls: list[str] = []
    real = transfer.copy

    def copy(source: str, *rest: object, **options: object) -> None:
        calls.append(source)
        real(source, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(transfer, "copy", copy)
    return calls


def test_after_a_reboot_a_good_image_is_used_again(site: Site, rebooted: list[str]) -> None:
    again = site.stage()
    assert (again.how, rebooted) == (MOUNTED, [])
    assert works(again)


def test_after_a_reboot_a_damaged_image_is_copied_again(site: Site, rebooted: list[str]) -> None:
    path = Path(site.node.image(site.id))
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4  # the disk had not got everything when the power went
    path.write_bytes(data)
    again = site.stage()
    assert again.how == MOUNTED
    assert len(rebooted) == 1
    assert works(again)


def test_an_image_of_another_pack_is_not_taken_for_this_one(site: Site) -> None:
    """The same environment packed at another level has the same id and other bytes."""
    site.stage()
    site.kill_servers()
    config = tiny.configured(
        Path(site.config["repository"]).parent, stage_how="mount", pack_level=19
    )
    again = Site(config, tiny.packed(Path(site.published.manifest.origin), config))
    assert again.id == site.id
    assert again.published.manifest.top.filename != site.published.manifest.top.filename
    assert works(again.stage())
    assert transfer.is_image(again.node.image(again.id), again.published.manifest.top.image)


# Many at once


def test_ten_processes_at_once_make_one_mount(site: Site) -> None:
    start = FORK.Event()
    results = FORK.SimpleQueue()

    def one(number: int) -> None:
        start.wait()
        results.put(site.stage(f"process-{number}").how)

    children = [FORK.Process(target=one, args=(number,)) for number in range(10)]
    for child in children:
        child.start()
    start.set()
    for child in children:
        child.join()
    assert sorted(results.get() for _ in children) == [HIT] * 9 + [MOUNTED]
    assert len(site.mounts) == len(site.servers) == 1


# Collection


def test_a_tree_that_nobody_claims_is_unmounted(site: Site) -> None:
    site.stage("slurm-7")
    assert site.collect() == ()
    assert len(site.mounts) == 1
    site.node.release("slurm-7")
    assert site.collect() == (site.id,)
    assert site.mounts == []
    assert site.node.held() == []
    wait_for(lambda: not site.servers)


def test_a_tree_in_use_without_a_claim_stays(site: Site) -> None:
    staged = site.stage()
    site.node.release("slurm-7")
    with subprocess.Popen(["sleep", "60"], cwd=staged.prefix) as process:
        assert site.collect() == ()
        assert site.stage("slurm-8").how == HIT
        site.node.release("slurm-8")
        process.kill()
    assert site.collect() == (site.id,)
    assert site.mounts == []


def test_a_dead_mount_is_collected(site: Site) -> None:
    site.stage()
    site.node.release("slurm-7")
    site.kill_servers()
    assert site.collect() == (site.id,)
    assert site.mounts == []


# Users


def see_no_other_mounts() -> None:
    """Give this process a mount namespace of its own."""
    CLONE_NEWNS = 0x20000
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS) != 0:
        raise OSError(ctypes.get_errno(), "cannot make a mount namespace")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)


def let_users_mount(directory: Path) -> None:
    """Give this process a ``/dev/fuse`` as machines have it, whatever this one's modes are."""
    see_no_other_mounts()
    device = str(directory / "fuse")
    os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(10, 229))
    os.chmod(device, 0o666)
    subprocess.run(["mount", "--bind", device, "/dev/fuse"], check=True)


def test_a_user_without_privileges_stages_and_collects(public_path: Path) -> None:
    own = public_path / "own"
    own.mkdir()
    os.chown(own, NOBODY, NOBODY)
    prefix = tiny.environment(public_path / "environment")

    def work() -> None:
        let_users_mount(own)
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        config = tiny.configured(own, stage_how="mount")
        user = Site(config, tiny.packed(prefix, config))
        staged = user.stage()
        assert staged.how == MOUNTED
        assert works(staged)
        (own / "mounted").write_text(user.mounts[0])
        user.node.release("slurm-7")
        assert user.collect() == (user.id,)
        assert user.mounts == []
        wait_for(lambda: not user.servers)

    assert tiny.in_child(work) == 0
    assert re.search(rf"\buser_id={NOBODY}\b", (own / "mounted").read_text())


def test_a_mount_of_another_namespace_is_not_taken_away(site: Site) -> None:
    """Each job may have a ``/tmp`` of its own, and with it a mount namespace."""
    reports, orders = FORK.Pipe(duplex=True)

    def work() -> None:
        os.setsid()
        see_no_other_mounts()
        staged = site.stage(holder="slurm-7")
        with open(os.path.join(staged.prefix, "pyvenv.cfg"), "rb") as used:
            orders.send((staged.how, len(site.mounts)))
            orders.recv()
            orders.send((works(staged), len(used.read()) > 0))

    job = FORK.Process(target=work, daemon=True)  # it is ended with us
    job.start()
    orders.close()
    assert reports.recv() == (MOUNTED, 1)
    assert site.mounts == []  # in our namespace
    other = allocation.stage_here(site.published, site.config, holder="slurm-8")
    stamp = site.node.stamp(site.id)
    reports.send("go on")
    assert reports.recv() == (True, True)
    job.join()
    assert job.exitcode == 0
    assert other.how == HIT
    assert works(other)
    assert stamp is not None
    assert stamp.how == EXTRACTED


# Removal never crosses a mount


def test_removing_a_tree_stops_at_a_mount_and_names_it(public_path: Path) -> None:
    inside = public_path / "tree" / "a" / "inside"
    inside.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "stager-test", inside], check=True)
    try:
        (inside / "kept").touch()
        with pytest.raises(OSError, match="mounted there") as error:
            fsutil.remove_tree(str(public_path / "tree"))
        assert error.value.errno == errno.EBUSY
        assert error.value.filename == "inside"
        assert (inside / "kept").exists()
        with pytest.raises(OSError, match="mounted there"):
            fsutil.remove_tree(str(inside))
        assert (inside / "kept").exists()
    finally:
        subprocess.run(["umount", inside], check=True)
    fsutil.remove_tree(str(public_path / "tree"))
    assert not (public_path / "tree").exists()


def test_a_bind_mount_of_the_same_file_system_is_not_emptied(public_path: Path) -> None:
    """The device is the same as around it: it must be told in another way."""
    victim, point = public_path / "victim", public_path / "tree" / "point"
    for one in (victim, point):
        one.mkdir(parents=True)
    (victim / "kept").touch()
    subprocess.run(["mount", "--bind", victim, point], check=True)
    try:
        with pytest.raises(OSError, match="mounted there"):
            fsutil.remove_tree(str(public_path / "tree"))
        assert (victim / "kept").exists()
    finally:
        subprocess.run(["umount", point], check=True)
