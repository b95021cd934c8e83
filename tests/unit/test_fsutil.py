"""File system steps that must be right once."""

from __future__ import annotations

import _thread
import contextlib
import errno
import os
import stat
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from environments import run
from stager import fsutil
from stager.errors import BusyError, DeniedError, NoSpaceError, StagerError
from tiny import in_child

pytestmark = pytest.mark.unit

NOBODY = 65534


# Errors


@pytest.mark.parametrize(
    ("number", "kind", "blame", "hint"),
    [
        (errno.ENOSPC, NoSpaceError, "site", "free some space"),
        (errno.EDQUOT, NoSpaceError, "site", "free some space"),
        (errno.EFBIG, NoSpaceError, "site", "`ulimit -f`"),
        *((number, StagerError, "site", "`ulimit -a`") for number in fsutil.SCARCE),
        (errno.EACCES, DeniedError, "node", "check the owner"),
        (errno.EPERM, DeniedError, "node", "check the owner"),
        (errno.EROFS, DeniedError, "node", "check the owner"),
        (errno.EIO, StagerError, "node", "check that path"),
        (errno.ENOENT, StagerError, "node", "check that path"),
    ],
)
def test_what_the_system_said_becomes_what_a_user_reads(
    number: int, kind: type[StagerError], blame: str, hint: str
) -> None:
    """What any user can bring about is never the node's fault."""
    error = fsutil.explain(
        OSError(number, os.strerror(number), "/some/path"), "do it", blame="node"
    )
    assert type(error) is kind
    assert error.message == f"cannot do it: {os.strerror(number)} (/some/path)"
    assert error.blame == blame
    assert hint in (error.hint or "")


def test_an_error_without_a_path_or_a_number() -> None:
    assert fsutil.explain(OSError("odd"), "do it").message == "cannot do it: odd"


# Atomic files


def test_a_file_is_written_with_its_mode(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        fsutil.write_atomic(str(tmp_path / "a"), b"content")
        fsutil.write_atomic(str(tmp_path / "b"), b"", mode=0o600)
    finally:
        os.umask(umask)
    assert (tmp_path / "a").read_bytes() == b"content"
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == 0o600
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize("failing", ["fsync", "rename"])
def test_a_failure_leaves_the_old_content_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="No space"):
        fsutil.write_atomic(str(path), b"new")
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["a"]
    assert path.read_bytes() == b"old"


def test_readers_see_one_content_or_the_other(tmp_path: Path) -> None:
    path = tmp_path / "a"
    contents = [bytes([65 + n]) * 100_000 for n in range(4)]
    path.write_bytes(contents[0])
    done = threading.Event()
    odd: list[bytes] = []

    def read() -> None:
        while not done.is_set():
            found = path.read_bytes()
            if found not in contents:
                odd.append(found)

    reader = threading.Thread(target=read)
    reader.start()
    with ThreadPoolExecutor(4) as pool:  # several writers at once, in one process
        writing = [
            pool.submit(fsutil.write_atomic, str(path), contents[number % 4], durable=False)
            for number in range(200)
        ]
        for one in writing:
            one.result()
    done.set()
    reader.join()
    assert odd == []
    assert path.read_bytes() in contents
    assert os.listdir(tmp_path) == ["a"]


def test_what_a_killed_process_has_left_is_in_nobodys_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "a")

    def die(*_: object) -> None:
        os.kill(os.getpid(), 9)

    def work() -> None:
        os.rename = die
        fsutil.write_atomic(path, b"half")

    assert in_child(work) == -9
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".a.")
    # In a container the next process has the same number.
    pid = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: pid)
    for _ in range(3):
        fsutil.write_atomic(path, b"whole")
        fsutil.replace_link("x", path + "-link")
    assert Path(path).read_bytes() == b"whole"


def test_a_link_is_replaced(tmp_path: Path) -> None:
    path = str(tmp_path / "link")
    for target in ("one", "two"):
        fsutil.replace_link(target, path)
        assert os.readlink(path) == target
    assert os.listdir(tmp_path) == ["link"]


def test_a_directory_on_a_file_system_that_cannot_be_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(number: int) -> Callable[[int], None]:
        def fsync(_: int) -> None:
            raise OSError(number, os.strerror(number))

        return fsync

    monkeypatch.setattr(os, "fsync", fail(errno.EINVAL))
    fsutil.sync(str(tmp_path))
    monkeypatch.setattr(os, "fsync", fail(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        fsutil.sync(str(tmp_path))


# A directory of our own


def test_a_directory_is_made_private_whatever_the_umask(tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        fsutil.own_directory(str(tmp_path / "a" / "b" / "store"), "store")
    finally:
        os.umask(umask)
    for name in ("a", "a/b", "a/b/store"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o700
    fsutil.own_directory(str(tmp_path / "a" / "b" / "store"), "store")


@pytest.mark.parametrize("mode", [0o755, 0o710, 0o701, 0o770, 0o777, 0o1777])
def test_a_directory_that_others_may_enter_is_refused(tmp_path: Path, mode: int) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store").chmod(mode)
    with pytest.raises(DeniedError, match="open to others") as error:
        fsutil.own_directory(str(tmp_path / "store"), "store")
    assert "chmod 700" in str(error.value.hint)


def test_where_nothing_can_be_made_the_place_itself_is_named() -> None:
    with pytest.raises(FileNotFoundError) as error:
        fsutil.own_directory("/proc/store", "store")
    assert error.value.filename == "/proc/store"


def test_a_link_is_refused_even_to_a_directory_of_our_own(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir(mode=0o700)
    (tmp_path / "store").symlink_to("mine")
    with pytest.raises(DeniedError, match="symbolic link"):
        fsutil.own_directory(str(tmp_path / "store"), "store")
    (tmp_path / "nowhere").symlink_to("gone")
    with pytest.raises(DeniedError, match="symbolic link"):
        fsutil.own_directory(str(tmp_path / "nowhere"), "store")
    assert not (tmp_path / "gone").exists()


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "store").touch(mode=0o600)
    with pytest.raises(DeniedError, match="not a directory"):
        fsutil.own_directory(str(tmp_path / "store"), "store")


def test_a_directory_of_somebody_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "store").mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(DeniedError, match=f"belongs to uid {os.getuid()}"):
        fsutil.own_directory(str(tmp_path / "store"), "store")


def test_many_may_make_the_same_directory_at_once(tmp_path: Path) -> None:
    for number in range(20):
        path = str(tmp_path / str(number) / "deep" / "store")
        barrier = threading.Barrier(8)

        def make(path: str = path, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            fsutil.own_directory(path, "store")

        with ThreadPoolExecutor(8) as pool:
            for one in [pool.submit(make) for _ in range(8)]:
                one.result()


def test_a_directory_that_somebody_makes_between_two_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "parent" / "store")
    real = os.mkdir

    def mkdir(name: str, mode: int = 0o777) -> None:
        real(name, mode)
        if name.endswith("parent"):  # somebody was waiting for just that
            real(path, 0o700)

    monkeypatch.setattr(os, "mkdir", mkdir)
    fsutil.own_directory(path, "store")


# Locks


def test_a_lock_is_for_one_and_free_afterwards(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    with fsutil.locked(path, timeout=0):
        with pytest.raises(BusyError, match="timed out after") as error:
            fsutil.locked(path, timeout=0).__enter__()
        assert error.value.exit_code == 11
    with fsutil.locked(path, timeout=0):
        pass
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_readers_share_and_writers_do_not(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    with (
        fsutil.locked(path, timeout=0, shared=True),
        fsutil.locked(path, timeout=0, shared=True),
        pytest.raises(BusyError),
    ):
        fsutil.locked(path, timeout=0).__enter__()


def test_who_waits_is_told_so_and_gets_it_in_the_end(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    told: list[float] = []
    holding, release = threading.Event(), threading.Event()

    def hold() -> None:
        with fsutil.locked(path, timeout=0):
            holding.set()
            release.wait()

    def waiting(seconds: float) -> None:
        told.append(seconds)
        if len(told) == 3:
            release.set()

    holder = threading.Thread(target=hold)
    holder.start()
    holding.wait()
    with fsutil.locked(path, timeout=60, waiting=waiting):
        pass
    holder.join()
    assert len(told) >= 3
    assert told == sorted(told)


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")

    def die() -> None:
        fsutil.locked(path, timeout=0).__enter__()
        os.kill(os.getpid(), 9)

    assert in_child(die) == -9
    with fsutil.locked(path, timeout=0):
        pass


def test_the_lock_is_free_after_an_error(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    with pytest.raises(ValueError, match="inside"), fsutil.locked(path, timeout=0):
        raise ValueError("inside")
    with fsutil.locked(path, timeout=0):
        pass


@pytest.mark.parametrize("replaced", [False, True])
def test_a_lock_file_that_was_removed_while_somebody_waited_locks_nothing(
    tmp_path: Path, replaced: bool
) -> None:
    """As by what clears a /tmp by age."""
    path, held = str(tmp_path / "lock"), contextlib.ExitStack()
    held.enter_context(fsutil.locked(path, timeout=0))

    def waiting(_: float) -> None:
        os.unlink(path)
        if replaced:
            Path(path).touch()
        held.close()

    with fsutil.locked(path, timeout=60, waiting=waiting):
        assert os.path.exists(path)
        with pytest.raises(BusyError):
            fsutil.locked(path, timeout=0).__enter__()
    with fsutil.locked(path, timeout=0):
        pass


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to("victim")
    with pytest.raises(OSError, match=os.strerror(errno.ELOOP)):
        fsutil.locked(str(tmp_path / "lock"), timeout=0).__enter__()
    assert not (tmp_path / "victim").exists()


def test_the_limit_of_a_wait_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    path = str(tmp_path / "lock")
    with fsutil.locked(path, timeout=0), pytest.raises(BusyError, match="30 s"):
        fsutil.locked(path, timeout=30).__enter__()
    assert 30 <= clock[0] < 31


# Removing


def no_more_threads(*_: object) -> None:
    raise RuntimeError("can't start new thread")


@pytest.mark.parametrize("threads", [True, False])
def test_a_close_that_nobody_waits_for_may_fail(
    threads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong: list[object] = []
    closed: list[int] = []

    def close(fd: int) -> None:
        closed.append(fd)
        raise OSError(errno.EIO, "of an earlier write")

    if not threads:
        monkeypatch.setattr(_thread, "start_new_thread", no_more_threads)
    monkeypatch.setattr(sys, "unraisablehook", wrong.append)
    with monkeypatch.context() as patched:
        patched.setattr(os, "close", close)
        fsutil.close_aside(7)
        fsutil.settle()
    assert (closed, wrong) == ([7], [])


@pytest.mark.parametrize("threads", [True, False])
def test_who_asks_at_once_waits_for_all_answers(
    threads: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not threads:
        monkeypatch.setattr(_thread, "start_new_thread", no_more_threads)
    (tmp_path / "a").mkdir()
    names = ["a", "a/not there", "a null \0", "."]
    first, missing, null, here = (f"{tmp_path}/{name}" for name in names)
    answer, stat = threading.Event(), os.stat
    asked: list[str] = []

    def late(path: str) -> os.stat_result:
        assert answer.wait(60)
        asked.append(path)
        return stat(path)

    monkeypatch.setattr(os, "stat", late)
    if not threads:
        answer.set()
    wait = fsutil.ask([[first, missing], [null], [here]])
    assert bool(asked) is not threads
    answer.set()
    assert set(wait()) == {first, here}
    assert (len(asked), asked.index(first) < asked.index(missing)) == (4, True)


@pytest.mark.parametrize("first", [True, False])
def test_so_many_groups_as_a_user_makes_up_are_not_so_many_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    """A hook asks beside all jobs' limits; while storage hangs, no thread ends."""
    started: list[object] = []
    start, stat, answer = _thread.start_new_thread, os.stat, threading.Event()

    def counted(*arguments: Any) -> int:
        started.append(arguments)
        return start(*arguments)

    def late(path: str, **more: Any) -> os.stat_result:
        assert answer.wait(60)
        return stat(path, **more)

    monkeypatch.setattr(_thread, "start_new_thread", counted)
    monkeypatch.setattr(os, "stat", late)
    paths = [str(tmp_path / str(number)) for number in range(1000)]
    for path in paths:
        Path(path).touch()
    wait = fsutil.ask([[path] for path in paths], first=str(tmp_path) if first else "")
    answer.set()
    assert {*paths} <= set(wait())
    assert len(started) < 50


@pytest.mark.parametrize("threads", [True, False])
def test_what_groups_share_is_asked_for_before_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, threads: bool
) -> None:
    if not threads:
        monkeypatch.setattr(_thread, "start_new_thread", no_more_threads)
    stat, answer = os.stat, threading.Event()
    shared, below, beside = str(tmp_path), str(tmp_path / "a"), str(tmp_path / "b")
    asked: list[str] = []

    def late(path: str) -> os.stat_result:
        assert answer.wait(60)
        asked.append(path)
        return stat(path)

    monkeypatch.setattr(os, "stat", late)
    if not threads:
        answer.set()
    wait = fsutil.ask([[below], [beside]], first=shared)
    assert bool(asked) is not threads
    answer.set()
    assert set(wait()) == {shared}
    assert (asked[0], sorted(asked[1:])) == (shared, [below, beside])


def test_settled_is_who_has_no_more_threads() -> None:
    """In a process of its own: this one may have others' threads."""
    code = """
import _thread, os
from stager import fsutil
reader, writer = os.pipe()
_thread.start_new_thread(os.read, (reader, 1))
before = len(os.listdir("/proc/self/task"))
fsutil.settle(limit=0)
still = len(os.listdir("/proc/self/task"))
os.close(writer)
fsutil.settle()
print(before, still, len(os.listdir("/proc/self/task")))
"""
    assert run([sys.executable, "-c", code]).stdout.split() == ["2", "2", "1"]


@pytest.mark.parametrize("memory", [True, False])
def test_a_file_without_a_name_can_be_had_from_any_python(
    memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not memory:
        monkeypatch.delattr(os, "memfd_create")
    with fsutil.nameless() as file:
        file.write(b"said")
        file.seek(0)
        assert (file.read(), os.fstat(file.fileno()).st_nlink) == (b"said", 0)


def test_a_lock_that_a_child_has_inherited_is_free(tmp_path: Path) -> None:
    gate, wait = os.pipe()
    with fsutil.locked(str(tmp_path / "lock"), timeout=1):
        child = os.fork()
        if child == 0:
            os.close(wait)
            os.read(gate, 1)
            os._exit(0)
    try:
        with fsutil.locked(str(tmp_path / "lock"), timeout=0):
            pass
    finally:
        os.close(wait)
        os.close(gate)
        os.waitpid(child, 0)


def test_a_tree_is_removed_and_what_its_links_lead_to_is_not(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "kept").mkdir(parents=True)
    tree = tmp_path / "tree"
    (tree / "a" / "b").mkdir(parents=True)
    (tree / "a" / "file").touch()
    (tree / "a" / "link").symlink_to(outside)
    (tree / "a" / "b" / "file-link").symlink_to(outside / "kept")
    os.mkfifo(tree / "pipe")
    (tree / "a" / "b").chmod(0o500)
    (tree / "a").chmod(0o000)
    fsutil.remove_tree(str(tree))
    assert os.listdir(tmp_path) == ["outside"]
    assert os.listdir(outside) == ["kept"]


def test_modes_do_not_stop_an_owner_without_privileges(public_path: Path) -> None:
    tree = public_path / "tree"

    def work() -> None:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        for mode in (0o000, 0o100, 0o300, 0o400, 0o500, 0o600):
            (tree / f"{mode:o}" / "below").mkdir(parents=True)
            (tree / f"{mode:o}" / "file").touch()
            (tree / f"{mode:o}").chmod(mode)
        fsutil.remove_tree(str(tree))

    public_path.chmod(0o777)
    assert in_child(work) == 0
    assert os.listdir(public_path) == []


def test_a_link_itself_is_removed_and_so_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "file").touch()
    fsutil.remove_tree(str(tmp_path / "link"))
    fsutil.remove_tree(str(tmp_path / "file"))
    assert os.listdir(tmp_path) == ["real"]


@pytest.mark.parametrize("path", ["gone", "gone/further"])
def test_what_is_not_there_need_not_be_removed(tmp_path: Path, path: str) -> None:
    fsutil.remove_tree(str(tmp_path / path))


@pytest.mark.parametrize("room", ["tree", "tree/sub"])
def test_what_somebody_still_writes_is_removed_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: str
) -> None:
    (tmp_path / "tree" / "sub").mkdir(parents=True)
    late = [tmp_path / room / f"late{number}" for number in range(2)]
    rmdir = os.rmdir

    def after_one_more(name: str, *, dir_fd: int) -> None:
        if late and late[-1].parent.name == name:
            late.pop().touch()
        rmdir(name, dir_fd=dir_fd)

    monkeypatch.setattr(os, "rmdir", after_one_more)
    fsutil.remove_tree(str(tmp_path / "tree"))
    assert not late
    assert not (tmp_path / "tree").exists()


def test_a_directory_that_becomes_a_link_at_the_last_moment_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "kept").touch()
    (tmp_path / "tree" / "swapped").mkdir(parents=True)
    real = os.open

    def swapping(path: str, *rest: int, **options: int) -> int:
        if path == "swapped":
            (tmp_path / "tree" / "swapped").rmdir()
            (tmp_path / "tree" / "swapped").symlink_to(tmp_path / "outside")
        return real(path, *rest, **options)

    monkeypatch.setattr(os, "open", swapping)
    with pytest.raises(NotADirectoryError):
        fsutil.remove_tree(str(tmp_path / "tree"))
    assert (tmp_path / "outside" / "kept").exists()


def test_names_that_are_no_text_are_removed(tmp_path: Path) -> None:
    os.makedirs(os.fsencode(tmp_path) + b"/tree/\xff")
    fsutil.remove_tree(str(tmp_path / "tree"))
    assert os.listdir(tmp_path) == []


def test_several_may_remove_a_tree_at_the_same_time(tmp_path: Path) -> None:
    for number in range(300):
        (tmp_path / "tree" / f"d{number}").mkdir(parents=True)
        (tmp_path / "tree" / f"d{number}" / "f").touch()
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(fsutil.remove_tree, str(tmp_path / "tree")) for _ in range(4)]
        errors = [job.exception() for job in jobs]
    assert not (tmp_path / "tree").exists()
    # Who comes too late may find even the tree itself gone, and nothing else.
    assert all(error is None or isinstance(error, FileNotFoundError) for error in errors)


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    before = os.listdir("/proc/self/fd")
    with (
        pytest.raises(OSError, match="not a regular file") as error,
        open(path, opener=fsutil.regular),
    ):
        pass
    assert error.value.filename == str(path)
    assert os.listdir("/proc/self/fd") == before


def test_a_directory_is_refused_as_open_does(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError), open(tmp_path, opener=fsutil.regular):
        pass
