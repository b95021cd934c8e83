"""File system steps that must be right once: atomic files, locks, owned directories, removal."""

from __future__ import annotations

import _thread
import contextlib
import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO, Callable

from stager import warm
from stager.errors import LIMITS, NODE, BusyError, DeniedError, NoSpaceError, StagerError

TOO_LARGE = "a limit on the size of a file is in force: see `ulimit -f`, or the file system's own"
"""What to do where a file may not be as large as it should."""
_CREATED_SUFFIX = ".new"
_ABANDONED = 86400.0
"""Seconds after which nobody is at work on something any more."""
_STILL_WRITTEN = 5.0
"""Seconds for which a directory that fills up again is emptied again."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MOST_AT_ONCE = 32
"""Questions to shared storage at the same time; an environment has fewer than ten groups."""
_SHARED = (
    "9p", "afs", "beegfs", "ceph", "cifs", "fuse.ceph", "fuse.glusterfs", "fuse.sshfs", "gfs2",
    "gpfs", "lustre", "nfs", "nfs4", "ocfs2", "orangefs", "panfs", "smb3", "virtiofs", "wekafs",
)  # fmt: skip
"""Kinds of file systems that several machines have mounted, as a rule."""
SCARCE = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
"""Errors of a process that met a limit, or whose machine has no more of something."""


def explain(error: OSError, doing: str, *, blame: str | None = None) -> StagerError:
    """Turn an :class:`OSError` into the error a user reads.

    Args:
        error: what the system said.
        doing: what we were doing, as in "cannot <doing>".
        blame: whose fault it is, where the caller knows better than the default. A node's it is not
            where a disk is full or a process met a limit: that any user can bring about.
    """
    if blame == NODE and error.errno in (*_FULL, *SCARCE):
        blame = None
    known = not isinstance(error.filename, str) or error.filename in doing
    where = "" if known else f" ({error.filename})"
    message = f"cannot {doing}: {error.strerror or error}{where}"
    if error.errno == errno.EFBIG:
        return NoSpaceError(message, hint=TOO_LARGE, blame=blame)
    if error.errno in _FULL:
        return NoSpaceError(
            message,
            hint="free some space there (`stager collect` for the store, `stager remove` for the"
            " repository), or choose another place: with --store one on a disk of this node's own,"
            " or the key `repository`",
            blame=blame,
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return DeniedError(
            message,
            hint="check the owner and modes of that path, or choose another place",
            blame=blame,
        )
    if error.errno in SCARCE:
        return StagerError(message, hint=LIMITS, blame=blame)
    return StagerError(message, hint="check that path and the disk it is on", blame=blame)


def regular(path: str, flags: int) -> int:
    """An opener for :func:`open`: a pipe in the place of a file is not waited for, but refused.

    Raises:
        OSError: as :func:`os.open` does, and EINVAL for a pipe, a socket or a device.
    """
    fd = os.open(path, flags | os.O_NONBLOCK)
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):  # open() itself refuses a directory
        return fd
    os.close(fd)
    raise OSError(errno.EINVAL, "not a regular file", path)


def write_atomic(path: str, data: bytes, *, mode: int = 0o666, durable: bool = True) -> None:
    """Write a file so that readers see the old content or the new, never half.

    Args:
        path: the file; a temporary one is made beside it and renamed.
        data: the whole content.
        mode: permission bits before the umask.
        durable: fsync the file and its directory, so that it survives a crash of the machine.
    """
    temporary = _beside(path)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with open(fd, "wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(fd)
        os.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    if durable:
        sync(os.path.dirname(path))


def sync(path: str) -> None:
    """Make a file's content or a directory's entries durable, where the file system can."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def replace_link(target: str, path: str) -> None:
    """Point the symbolic link ``path`` at ``target``, atomically."""
    temporary = _beside(path)
    os.symlink(target, temporary)
    os.rename(temporary, path)


def sweep(directory: str, beginning: str = ".") -> None:
    """Remove files that writers who were killed have left: a day old, by how their names begin."""
    with os.scandir(directory) as items:
        for item in items:
            with contextlib.suppress(OSError):
                if item.name.startswith(beginning) and is_abandoned(item.path):
                    os.unlink(item.path)


def is_abandoned(path: str) -> bool:
    """Tell whether nobody can still be at work on something: it is a day old.

    Raises:
        OSError: it cannot be looked at.
    """
    return time.time() - os.lstat(path).st_mtime > _ABANDONED


def _beside(path: str) -> str:
    """A name for a file that will be renamed to ``path``.

    No process number: on shared storage another node has the same, and in a container so has the
    next process after one that was killed and left its file.
    """
    directory, name = os.path.split(path)
    return os.path.join(directory, f".{name}.{os.urandom(6).hex()}{_CREATED_SUFFIX}")


def file_system(path: str) -> str:
    """The kind of file system that a path is on, by the mount table: ``ext4``, ``tmpfs``, ..."""
    path = os.path.realpath(path)
    best, kind = "", ""
    with open("/proc/self/mounts", encoding="utf-8", errors="surrogateescape") as mounts:
        for line in mounts:
            _, directory, found, *_ = line.split(" ")
            for code, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
                directory = directory.replace(code, char)
            if f"{path}/".startswith(directory.rstrip("/") + "/") and len(directory) >= len(best):
                best, kind = directory, found
    return kind


def is_shared(path: str) -> bool:
    """Tell whether a path is on a file system that other machines may have mounted, too."""
    return file_system(path) in _SHARED


def mount_point(path: str) -> str:
    """The directory that the file system which a path is on is mounted at."""
    path = os.path.realpath(path)
    while not os.path.ismount(path):
        path = os.path.dirname(path)
    return path


def own_directory(path: str, what: str) -> None:
    """Make ``path`` a private directory of ours, or refuse it.

    A predictable path under a world-writable directory is an invitation: another user may have
    made it first, or a link to somewhere else. Neither is ever used.

    Raises:
        DeniedError: it is a link, belongs to somebody else, or others may enter it.
    """
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        pass
    except FileNotFoundError:
        # A configured parent such as /local/stager: made like mkdir -p, private where we make it.
        if not os.path.isdir(os.path.dirname(path)):
            own_directory(os.path.dirname(path), what)
        with contextlib.suppress(FileExistsError):  # others may be making it too
            os.mkdir(path, 0o700)
    info = os.lstat(path)
    if warm.is_private(info):
        return
    hint = "remove it, or choose another place with --store or STAGER_STORE"
    if stat.S_ISLNK(info.st_mode):
        raise DeniedError(f"the {what} {path} is a symbolic link", hint=hint)
    if not stat.S_ISDIR(info.st_mode):
        raise DeniedError(f"the {what} {path} is not a directory", hint=hint)
    if info.st_uid != os.geteuid():
        raise DeniedError(
            f"the {what} {path} belongs to uid {info.st_uid}, not to you (uid {os.geteuid()})",
            hint=hint,
        )
    raise DeniedError(
        f"the {what} {path} is open to others (mode {stat.S_IMODE(info.st_mode):04o})",
        hint="name a directory that is not there yet; or, if this was made for nothing else"
        f" and nobody could have changed what is in it, chmod 700 {path}",
    )


@contextlib.contextmanager
def locked(
    path: str,
    *,
    timeout: float,
    waiting: Callable[[float], None] | None = None,
    shared: bool = False,
) -> Iterator[None]:
    """Hold an flock on ``path``, which is created and never removed by us.

    What clears a /tmp by age may: two that hold a file of that name would hold different ones.

    The kernel drops the lock when the holder dies, however it dies, so a waiter takes over from a
    killed producer without any clean-up protocol.

    Args:
        path: the lock file.
        timeout: seconds to wait at most.
        waiting: called about five times a second with the seconds waited so far.
        shared: a reader's lock instead of a writer's.

    Raises:
        BusyError: somebody else still held it when the time was over.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(path, flags, 0o600)
    try:
        started = time.monotonic()
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        while True:
            try:
                fcntl.flock(fd, kind | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
            else:
                if _is_at(fd, path):
                    break
                again = os.open(path, flags, 0o600)
                os.dup2(again, fd, inheritable=False)
                os.close(again)
                continue
            waited = time.monotonic() - started
            if waited >= timeout:
                raise BusyError(
                    f"timed out after {timeout:.0f} s waiting for the lock {path}",
                    hint="another stager process is working on the same environment; try again,"
                    " or raise the time limit (`stage.timeout`)",
                )
            if waiting is not None:
                waiting(waited)
            time.sleep(min(0.2, 0.01 + waited / 4))
        yield
    finally:
        with contextlib.suppress(OSError):  # not all file systems have it
            fcntl.flock(fd, fcntl.LOCK_UN)  # a child that was forked meanwhile has it open still
        os.close(fd)


def _is_at(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def close_aside(fd: int) -> None:
    """Close a file that was only read, in a thread of its own.

    On shared storage a close is a question, 10 ms long on a busy Lustre; nobody needs its answer.
    """

    def run() -> None:
        with contextlib.suppress(OSError):
            os.close(fd)

    try:
        _thread.start_new_thread(run, ())  # the module threading is 1.5 ms to import
    except RuntimeError:  # no more threads
        run()


def ask(
    groups: Iterable[Sequence[str]], *, first: str = ""
) -> Callable[[], dict[str, os.stat_result]]:
    """Have shared storage asked for paths: those of a group in turn, the groups at the same time.

    In a manifest that a user made up there could be any number of groups, and a node may have no
    more than 32768 threads for everybody: where there are many, several are asked in turn.

    Groups may share no name that is not known yet: two that ask for it at once may both be a
    question (seen with FUSE). So nothing else may look at these paths before all are answered.

    Args:
        groups: the paths.
        first: asked for before all of them; what they share.

    Returns:
        A function that waits for all the answers and returns them; what cannot be seen has none.
    """
    together: list[list[str]] = [[] for _ in range(_MOST_AT_ONCE)]
    for number, group in enumerate(groups):
        together[number % _MOST_AT_ONCE] += group
    groups = [*filter(None, together)]
    answered: list[_thread.LockType] = []
    found: dict[str, os.stat_result] = {}

    def run(paths: Sequence[str], done: _thread.LockType, then: Iterable[Sequence[str]]) -> None:
        try:
            for path in paths:
                with contextlib.suppress(OSError, ValueError):
                    found[path] = os.stat(path)
            for group in then:
                start(group)
        finally:
            done.release()

    def start(paths: Sequence[str], then: Iterable[Sequence[str]] = ()) -> None:
        done = _thread.allocate_lock()
        done.acquire()
        answered.append(done)
        try:
            _thread.start_new_thread(run, (paths, done, then))
        except RuntimeError:  # no more threads
            run(paths, done, then)

    if first:
        start([first], then=groups)
    else:
        for group in groups:
            start(group)

    def wait() -> dict[str, os.stat_result]:
        for done in answered:
            done.acquire()
        return found

    return wait


def settle(limit: float = 30.0) -> None:
    """Wait until no thread is left that closes aside.

    unshare(2) makes no namespace of users for a process with threads; each thread takes signals.

    Args:
        limit: seconds; shared storage may hang.
    """
    until = time.monotonic() + limit
    while len(os.listdir("/proc/self/task")) > 1 and time.monotonic() < until:
        time.sleep(0.001)


def nameless() -> BinaryIO:
    """An empty file without a name, in memory where that can be had.

    Pythons that were built against a glibc before 2.27 have no ``memfd_create``, wherever they run.
    """
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("stager"), "w+b")
    import tempfile

    return tempfile.TemporaryFile()


def remove_tree(path: str) -> None:
    """Remove a directory tree, never leaving its file system and never following a link.

    Mount points below are left alone with everything above them, and the error names the first.
    Where somebody still writes, it is tried for :data:`_STILL_WRITTEN` seconds: a program that a
    killed one of us had started goes on until its directory is gone.

    Raises:
        OSError: something could not be removed.
    """
    until = time.monotonic() + _STILL_WRITTEN
    while True:
        try:
            return _remove_tree(path)
        except OSError as error:
            if error.errno != errno.ENOTEMPTY or time.monotonic() > until:
                raise
        time.sleep(0.01)


def _remove_tree(path: str) -> None:
    try:
        parent = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        name = os.path.basename(path)
        try:
            info = os.stat(name, dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:
            return
        _remove_at(parent, name, info)
    finally:
        os.close(parent)


def _mount_of(fd: int) -> tuple[int, str]:
    """Which mount a directory is on. A bind mount is on the same device as what is around it."""
    number = ""
    with contextlib.suppress(OSError), open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as file:
        number = next((line for line in file if line.startswith("mnt_id:")), "")  # proc(5)
    return os.fstat(fd).st_dev, number


def _remove_at(parent: int, name: str, info: os.stat_result) -> None:
    if not stat.S_ISDIR(info.st_mode):
        os.unlink(name, dir_fd=parent)
        return
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(name, flags, dir_fd=parent)
    except PermissionError:
        os.chmod(name, 0o700, dir_fd=parent)  # fails where it is not ours
        fd = os.open(name, flags, dir_fd=parent)
    try:
        opened = os.fstat(fd)
        if _mount_of(fd) != _mount_of(parent):
            raise OSError(errno.EBUSY, "something is mounted there", name)
        if opened.st_mode & 0o300 != 0o300:
            os.fchmod(fd, 0o700)
        with os.scandir(fd) as entries:
            children = [(entry.name, entry.stat(follow_symlinks=False)) for entry in entries]
        for child, child_info in children:
            with contextlib.suppress(FileNotFoundError):
                _remove_at(fd, child, child_info)
    finally:
        os.close(fd)
    os.rmdir(name, dir_fd=parent)
