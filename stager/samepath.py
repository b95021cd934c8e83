"""A staged tree in the place of its original, for one process and what it starts.

See ``docs/adr/0011-same-path.md``.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Mapping, Sequence

from stager import fsutil
from stager.activate import Part
from stager.errors import IncompatibleError
from stager.manifest import USER

# linux/sched.h and linux/mount.h
_NEW_MOUNTS, _NEW_USERS = 0x00020000, 0x10000000
_NOSUID, _NODEV, _BIND, _RECURSIVE, _SLAVE = 2, 4, 4096, 16384, 1 << 19


def enter(parts: Sequence[Part]) -> None:
    """Show staged trees at the original paths, to this process and those it will start.

    Nobody else sees it. Without root's privileges that takes a user namespace, in which the user
    stays who he is; the rights that come with it end with the next ``exec``. Where it fails nothing
    has changed.

    Args:
        parts: the staged environments; every spelling of a path leads to the tree then.

    Raises:
        IncompatibleError: an original's directory is not there, or the kernel does not allow it.
    """
    places = _places(parts)
    if not places:
        return  # we are where somebody did this before
    fsutil.settle()
    # In a child first: half of it could not be taken back.
    child = os.fork()
    if child == 0:
        try:
            os._exit(_enter(places))
        finally:
            os._exit(errno.EIO)
    failed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) or _enter(places)
    if failed:
        reason = os.strerror(failed) if failed > 0 else f"signal {-failed}"
        raise IncompatibleError(
            f"the staged tree cannot be mounted over {next(iter(places))}: {reason}",
            hint="--same-path needs user namespaces, which this node does not let its users make"
            " (sysctl user.max_user_namespaces, or a security module); run without it",
        )


def _places(parts: Sequence[Part]) -> dict[str, str]:
    """What to bind where: over every spelling of an original's path that is its directory.

    Parents come before what is below them.
    """
    found: dict[str, str] = {}
    for part in parts:
        manifest = part.manifest
        # The rest of a user base is not packed, and goes on being used where it is.
        below = f"/{manifest.library}" if manifest.kind == USER else ""
        found.update(_over(part.prefix, manifest.origin, manifest.spellings, below))
        for layer, tree in zip(manifest.layers[:-1], part.trees):
            if layer.role != "base":
                found.update(_over(tree, layer.origin, layer.spellings))
    return dict(sorted(found.items()))


def _over(tree: str, origin: str, spellings: Sequence[str], below: str = "") -> dict[str, str]:
    try:
        original = os.stat(origin + below)
    except OSError as error:
        raise IncompatibleError(
            f"the staged tree cannot be mounted over {origin}{below}: {error.strerror}",
            hint="--same-path needs the original's directory, even an empty one: mount"
            " its file system on this node, or run without --same-path",
        ) from error
    places: dict[str, str] = {}
    for spelling in (origin, *spellings):
        path = os.path.realpath(spelling + below)
        try:
            here = os.stat(path)
        except OSError:
            continue  # a path it had elsewhere, or before it was moved
        if os.path.samestat(here, original) and not os.path.samefile(path, tree + below):
            places[path] = tree + below
    return places


def _enter(places: Mapping[str, str]) -> int:
    """Do it; returns 0 or the number of the error."""
    user, group = os.geteuid(), os.getegid()
    try:
        try:
            _call("unshare", _NEW_MOUNTS)
        except PermissionError:
            _call("unshare", _NEW_USERS | _NEW_MOUNTS)
            for name, text in (
                ("setgroups", "deny"),  # without which no group may be mapped
                ("uid_map", f"{user} {user} 1"),
                ("gid_map", f"{group} {group} 1"),
            ):
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(text)
        _mount("none", "/", _SLAVE | _RECURSIVE)  # what is mounted here stays here
        for place, tree in places.items():
            _mount(tree, place, _BIND | _RECURSIVE)
            _mend_links(f"{tree}/bin", f"{place}/bin")
    except OSError as error:
        return error.errno or errno.EIO
    with contextlib.suppress(OSError):  # not everything in the original need be in the tree
        os.chdir(os.getcwd())  # or we would stay below what is covered
    return 0


def _mend_links(programs: str, place: str) -> None:
    """Show links to a tree's programs where the way to its base's Python is another one.

    That way is relative, from the tree to the layer beside it, so that a store can lie anywhere.
    """
    names = os.listdir(programs) if os.path.isdir(programs) else []
    if not any(_climbs_out(f"{programs}/{name}", os.path.dirname(programs)) for name in names):
        return
    _mount("tmpfs", place, _NOSUID | _NODEV, kind="tmpfs", data="mode=0755,size=4m")
    for name in names:
        os.symlink(f"{programs}/{name}", f"{place}/{name}")


def _climbs_out(path: str, tree: str) -> bool:
    """Tell whether a path is a link whose way out of the tree begins in the tree."""
    if not os.path.islink(path) or os.readlink(path).startswith("/"):
        return False
    target = os.path.normpath(os.path.join(os.path.dirname(path), os.readlink(path)))
    return not target.startswith(f"{tree}/")


def _mount(source: str, target: str, flags: int, *, kind: str = "", data: str = "") -> None:
    _call(
        "mount",
        os.fsencode(source),
        os.fsencode(target),
        kind.encode() or None,
        ctypes.c_ulong(flags),
        data.encode() or None,
    )


def _call(name: str, *arguments: object) -> None:
    """Call a function of the C library.

    Raises:
        OSError: it failed.
    """
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), name)
