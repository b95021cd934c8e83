"""Root's two steps for a user: become them, and make them a private directory."""

from __future__ import annotations

import contextlib
import os
import pwd
import resource
import stat

from stager import mounts
from stager.errors import SITE, DeniedError, StagerError

_NOGROUP = 65534
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def become(uid: int, gid: int | None = None, *, known: bool = True) -> None:
    """Become a user for good, in a process made for that: ids, all groups, variables, umask.

    Must be called before anything is opened that the user controls.

    Args:
        uid: the user.
        gid: the group of the job; None is the user's own.
        known: whether they must be in the node's user database. Who has left still has files, and
            is given no group of anybody's, and no home.

    Raises:
        StagerError: there is no such user, it is root, or the kernel refuses.
    """
    if uid <= 0:
        raise StagerError(
            "stager does not stage environments for root", hint="run the job as a user"
        )
    try:
        entry = pwd.getpwuid(uid)
    except KeyError as error:
        if known:
            raise StagerError(
                f"uid {uid} is unknown on this node", hint="the node's user database is incomplete"
            ) from error
        entry = pwd.struct_passwd((str(uid), "x", uid, _NOGROUP, "", "/", "/bin/false"))
    gid = entry.pw_gid if gid is None else gid
    try:
        # slurmd protects itself from the kernel's out-of-memory killer; a user must not be.
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write("0")
    except OSError:
        pass  # not every kernel or container has it
    os.initgroups(entry.pw_name, gid)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    if os.getresuid() != (uid, uid, uid) or os.getresgid() != (gid, gid, gid):
        raise StagerError(f"could not become uid {uid}")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.umask(0o077)
    os.chdir("/")
    os.environ.clear()
    os.environ.update(
        HOME=entry.pw_dir,
        USER=entry.pw_name,
        LOGNAME=entry.pw_name,
        PATH=PATH,
        LC_ALL="C.UTF-8",
    )


def private_directory(path: str, uid: int) -> bool:
    """Make a user's directory below one that only root can change, never following a link.

    Args:
        path: absolute and normal; only its last part is made.
        uid: whose it becomes; mode 0700.

    Returns:
        Whether root could do it safely. False: somebody else may write above it, as straight in
        /tmp, and the user has to make it.

    Raises:
        DeniedError: what is there already is not the user's own directory, or they have mounted
            something on it: its server need not answer whoever looks.
        OSError: the file system failed.
    """
    parent = trusted_directory(os.path.dirname(path))
    if parent is None:
        return False
    try:
        name = os.path.basename(path)
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=parent)
        try:
            fd = os.open(name, _DIRECTORY | os.O_PATH, dir_fd=parent)
        except NotADirectoryError as error:
            raise DeniedError(
                f"the store {path} is a link or a file",
                hint="the administrator of the node has to remove it",
                blame=SITE,
            ) from error
        try:
            if mounts.is_users(fd):
                raise DeniedError(
                    f"something is mounted on the store {path}",
                    hint=f"its user has to unmount it: fusermount3 -u {path}",
                )
            owner = os.fstat(fd).st_uid
            if owner == 0:  # just made: by us, or by a Prolog that runs beside us or was killed
                os.chown(f"/proc/self/fd/{fd}", uid, -1)
            elif owner != uid:
                raise DeniedError(
                    f"the store {path} belongs to uid {owner}, not to {uid}",
                    hint="the administrator of the node has to remove it",
                    blame=SITE,
                )
        finally:
            os.close(fd)
    finally:
        os.close(parent)
    return True


def trusted_directory(path: str) -> int | None:
    """Open a directory in which only root can make, rename or replace anything.

    Args:
        path: absolute and normal.

    Returns:
        A descriptor; None where others could, or where a link is on the way: the user may go where
        it leads, we need not.

    Raises:
        OSError: the file system failed.
    """
    here = os.open("/", _DIRECTORY)
    sticky = False
    try:
        for part in filter(None, path.split("/")):
            below = os.open(part, _DIRECTORY, dir_fd=here)
            os.close(here)
            here = below
            info = os.fstat(here)
            open_to_others = info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
            sticky = bool(open_to_others and info.st_mode & stat.S_ISVTX)
            # Above what is root's: in a sticky directory nobody else can rename or replace that.
            if info.st_uid != 0 or (open_to_others and not sticky):
                break
        else:
            if not sticky:
                return os.dup(here)
    except NotADirectoryError:
        pass
    finally:
        os.close(here)
    return None


def is_broken(directory: str) -> bool:
    """Tell whether a file system is broken for root as well: the proof of a fault of the node.

    What a user says about their own directory proves nothing: they could have put anything there.
    A disk that is merely full is not broken, for any user could fill it.

    Args:
        directory: owned by root; a file is written and removed.
    """
    import errno

    broken = (errno.EIO, errno.EROFS, errno.ENODEV, errno.ENXIO, errno.EUCLEAN, errno.ESHUTDOWN)
    name = f".stager-probe-{os.getpid()}"
    try:
        parent = os.open(directory, _DIRECTORY)
        try:
            mode = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(name, mode, 0o600, dir_fd=parent)
            try:
                os.write(fd, b"x")
                os.fsync(fd)
            finally:
                os.close(fd)
                os.unlink(name, dir_fd=parent)
        finally:
            os.close(parent)
    except OSError as error:
        return error.errno in broken
    return False
