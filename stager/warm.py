"""A stage that finds everything as the last one left it: answered before anything is imported.

A Python that only starts takes 10 ms of CPU; the modules that pack, stage and explain take five
times that, and nothing of them is needed where nothing has changed. So a stage leaves a note of
what its answer was derived from: the program, the boot, the variables, the configuration files,
the manifest in the repository, the watched paths of the original, the stamps in the store. The next
one compares, and where all is the same the answer is. It never decides anything: at the first
difference, or where it cannot tell, the whole way is gone, :mod:`stager.cli`, which leaves a new
note, :mod:`stager.staging.notes`. The only question to shared storage about the repository is
whether the file that the name stands for is the same.

What a node is asked on either way stands here once, and is imported by the modules it belongs to.
Nothing but ``os`` and what is built in may be imported at the top: even ``re`` is a quarter of the
whole time.
"""

from __future__ import annotations

import _thread
import os

import stager

ABSENT = "-"
"""What :func:`identity` says of a path that does not exist."""

LIVE, DEAD, SILENT = "live", "dead", "silent"
"""What may be mounted on a directory, see :func:`mounted`."""

_PATIENCE = 2.0
"""Seconds in which a FUSE server of this node answers, if it ever does."""
_NO_SERVER = (107, 103)
"""ENOTCONN and ECONNABORTED of Linux; the module errno would be one more to load."""
_BOOT_ID = "/proc/sys/kernel/random/boot_id"
_VARIABLES = ("HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "SLURM_JOB_ID", "SLURM_STEP_ID")
"""What an answer may depend on, besides all that begin with ``STAGER_``."""


# -- what a node is asked on every start -----------------------------------------------------


def boot_id() -> str:
    """This boot of this machine."""
    fd = os.open(_BOOT_ID, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 64).decode("ascii").strip()
    finally:
        os.close(fd)


def start_time(pid: int) -> str:
    """Clock ticks after boot at which a process started (proc(5), field 22), or ``0``.

    One that has ended and that nobody has waited for yet has none either.
    """
    try:
        fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
        try:
            # The second field is the program's name in brackets, which may hold spaces.
            fields = os.read(fd, 4096).rpartition(b")")[2].split()
        finally:
            os.close(fd)
        return "0" if fields[0] == b"Z" else fields[19].decode()
    except (OSError, IndexError):
        return "0"


def namespace() -> int:
    """The PID namespace in which we see the processes that we see; 0 where that is not told."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def holder_of(pid: int, boot: str) -> str:
    """The holder that a process is; its start time tells it from a later one with its number.

    A parent outside of our PID namespace has no number here (0), as where a container's engine
    started us: then it is the first process of the namespace, whose end is that of all in it.
    """
    pid = pid or 1
    return f"pid-{pid}-{start_time(pid)}-{boot[:8]}-{namespace()}"


def is_job(holder: str) -> bool:
    """Tell whether a holder is a job.

    Its claims end with it and no sooner: another of its processes may rely on one by now.
    """
    return holder.startswith(("slurm-", "pbs-"))


def is_private(info: os.stat_result) -> bool:
    """Tell whether what lstat(2) says is a directory of ours that nobody else may enter."""
    # S_IFMT of stat.h: neither a link nor a file.
    is_directory = info.st_mode & 0o170000 == 0o040000
    return is_directory and info.st_uid == os.geteuid() and not info.st_mode & 0o077


def identity(path: str) -> str:
    """What tells a file or directory from another one and from what it was before."""
    try:
        return identity_of(os.stat(path))
    except (FileNotFoundError, NotADirectoryError):
        return ABSENT


def identity_of(info: os.stat_result) -> str:
    """The same, of one that was looked at."""
    return f"{info.st_ino} {info.st_size} {info.st_mtime_ns} {info.st_ctime_ns}"


def mounted(directory: str) -> str:
    """What is mounted on a directory, so far as we can see it.

    Returns:
        :data:`LIVE`; :data:`DEAD`, where the FUSE server is gone; :data:`SILENT`, where it does not
        answer within :data:`_PATIENCE`, as that of a suspended job; empty for nothing.
    """
    answers: list[int] = []
    answered = _thread.allocate_lock()
    answered.acquire()

    def ask() -> None:
        try:
            # The kernel knows the root's attributes by heart; only this asks the server.
            os.statvfs(directory)
            answers.append(0)
        except OSError as error:
            answers.append(error.errno or 0)
        finally:
            answered.release()

    try:
        _thread.start_new_thread(ask, ())
    except RuntimeError:  # no more threads
        ask()
    if not answered.acquire(timeout=_PATIENCE):
        return SILENT
    if answers[0]:
        return DEAD if answers[0] in _NO_SERVER else ""
    try:
        on = os.stat(directory).st_dev != os.stat(os.path.dirname(directory)).st_dev
        return LIVE if on else ""
    except OSError:
        return ""


def is_mounted(directory: str) -> bool:
    """Tell whether a live mount is on ``directory``."""
    return mounted(directory) == LIVE


def is_there(tree: str, *, mounted: bool) -> bool:
    """Tell whether a tree that has a stamp of this boot can be used."""
    return is_mounted(tree) if mounted else os.path.isdir(tree)


def claim(store: str, layer_id: str, holder: str) -> bool:
    """Claim a tree of a store, see :meth:`stager.staging.store.Store.lease`."""
    directory = f"{store}/leases/{layer_id}"
    while True:
        try:
            os.mkdir(directory, 0o700)
        except FileExistsError:
            pass
        try:
            try:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                os.close(os.open(f"{directory}/{holder}", flags, 0o600))
                new = True
            except FileExistsError:
                new = False
            os.utime(directory)  # the time of last use, for collection
        except FileNotFoundError:
            continue  # a collector has just taken the empty directory away
        return new


# -- the note --------------------------------------------------------------------------------


def hit(wish: str) -> str:
    """The prefix of a staged environment where nothing has changed since it was last staged.

    It is claimed then, as by any stage.

    Args:
        wish: what the user typed.

    Returns:
        An empty text where that cannot be told at this price; then nothing is claimed.
    """
    claimed: list[str] = []
    holder = prefix = ""
    try:
        path = note_path(wish)
        if not path or not is_private(os.lstat(os.path.dirname(os.path.dirname(path)))):
            return ""
        boot = boot_id()
        known, *rest = _read(path).split("\0")
        if known != inputs(wish, boot):
            return ""
        holder = rest[0] or holder_of(os.getppid(), boot)
        for kind, value, path in zip(rest[1::3], rest[2::3], rest[3::3]):
            if kind == "same":
                good = identity(path) == value
            else:
                # The claim comes first, then the look at the stamp: see stager/staging/collect.py.
                store, layer = os.path.dirname(os.path.dirname(path)), os.path.basename(path)
                good = is_private(os.lstat(store))
                if good and claim(store, layer, holder):
                    claimed.append(f"{store}/leases/{layer}/{holder}")
                good = good and identity(f"{store}/ready/{layer}") == value
                good = good and is_there(path, mounted=kind == "mounted")
                prefix = path
            if not good:
                prefix = ""
                break
    except (OSError, ValueError, IndexError):
        prefix = ""
    for path in claimed if not prefix and not is_job(holder) else ():
        try:
            os.unlink(path)
        except OSError:
            pass
    return prefix


def note_path(wish: str) -> str:
    """Where the note for what the user typed is; empty where there is none.

    A place that is known without the configuration: the store's, where that is the default or
    named by the variable. In jobs one for each step, whose mounts may not be another's.
    """
    if "/" in wish or not wish or len(wish) > 128 or "PBS_JOBID" in os.environ:
        return ""
    store = os.environ.get("STAGER_STORE") or "/tmp/stager-{uid}"  # noqa: S108
    job = os.environ.get("SLURM_JOB_ID", "")
    step = os.environ.get("SLURM_STEP_ID", "")
    if not store.startswith("/") or "/" in job or "/" in step:
        return ""
    name = f"{wish}@{job}.{step}" if job else wish
    return f"{store.replace('{uid}', str(os.getuid()))}/warm/{name}"


def inputs(wish: str, boot: str) -> str:
    """All that is not on a file system, in one text."""
    variables = sorted(
        (name, value)
        for name, value in os.environ.items()
        if name in _VARIABLES or name.startswith("STAGER_")
    )
    return ascii((stager.__version__, __file__, os.geteuid(), boot, wish, variables))


def _read(path: str) -> str:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        data = b""
        while piece := os.read(fd, 1 << 16):
            data += piece
        return data.decode("utf-8", "surrogateescape")
    finally:
        os.close(fd)
