"""A staged tree in the place of its original, for one process and what it starts.

See ``docs/adr/0011-same-path.md``.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Sequence

from stager.errors import IncompatibleError
from stager.manifest import Manifest

# linux/sched.h and linux/mount.h
_NEW_MOUNTS, _NEW_USERS = 0x00020000, 0x10000000
_BIND, _RECURSIVE, _SLAVE = 4096, 16384, 1 << 19


def enter(prefix: str, manifest: Manifest) -> None:
    """Show the staged tree at the original's path, to this process and those it will start.

    Nobody else sees it. Without root's privileges that takes a user namespace, in which the user
    stays who he is; the rights that come with it end with the next ``exec``. Where it fails nothing
    has changed.

    Args:
        prefix: the staged tree.
        manifest: the environment's; every spelling of its path leads to the tree then.

    Raises:
        IncompatibleError: the original's directory is not there, or the kernel does not allow it.
    """
    places = _places(prefix, manifest)
    if not places:
        return  # we are where somebody did this before
    # In a child first: half of it could not be taken back.
    child = os.fork()
    if child == 0:
        try:
            os._exit(_enter(prefix, places))
        finally:
            os._exit(errno.EIO)
    failed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) or _enter(prefix, places)
    if failed:
        reason = os.strerror(failed) if failed > 0 else f"signal {-failed}"
        raise IncompatibleError(
            f"the staged tree cannot be bound over {places[0]}: {reason}",
            hint="--same-path needs user namespaces, which this node does not let its users make"
            " (sysctl user.max_user_namespaces, or a security module); run without it",
        )


def _places(prefix: str, manifest: Manifest) -> list[str]:
    """Where to bind: every spelling of the original's path that is a directory of its own."""
    try:
        original = os.stat(manifest.origin)
    except OSError as error:
        raise IncompatibleError(
            f"{manifest.origin} is not there to be bound over: {error.strerror}",
            hint="--same-path needs the original's directory, were it empty: mount its file system"
            " on this node, or run without --same-path",
        ) from error
    places: list[str] = []
    for spelling in (manifest.origin, *manifest.spellings):
        path = os.path.realpath(spelling)
        try:
            here = os.stat(path)
        except OSError:
            continue  # a path it had elsewhere, or before it was moved
        same = os.path.samestat(here, original)
        if same and path not in places and not os.path.samefile(path, prefix):
            places.append(path)
    return places


def _enter(prefix: str, places: Sequence[str]) -> int:
    """Do it; returns 0 or the number of the error."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.geteuid(), os.getegid()
    if libc.unshare(_NEW_MOUNTS) != 0:
        if ctypes.get_errno() != errno.EPERM:
            return ctypes.get_errno()
        if libc.unshare(_NEW_USERS | _NEW_MOUNTS) != 0:
            return ctypes.get_errno()
        try:
            for name, text in (
                ("setgroups", "deny"),  # without which no group may be mapped
                ("uid_map", f"{user} {user} 1"),
                ("gid_map", f"{group} {group} 1"),
            ):
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(text)
        except OSError as error:
            return error.errno or errno.EIO
    mounts = [("none", "/", _SLAVE | _RECURSIVE)]  # what is mounted here stays here
    mounts += [(prefix, place, _BIND | _RECURSIVE) for place in places]
    for source, target, flags in mounts:
        paths = (os.fsencode(source), os.fsencode(target))
        if libc.mount(*paths, None, ctypes.c_ulong(flags), None) != 0:
            return ctypes.get_errno()
    with contextlib.suppress(OSError):  # not everything in the original need be in the tree
        os.chdir(os.getcwd())  # or we would stay below what is covered
    return 0
