"""The node-local side: images, trees, leases, locks. Only notes are written elsewhere.

::

    images/<layer id>        the copy of an image that is or will be mounted, or was pushed
    envs/<layer id>/         a mounted or extracted tree; its path is what was rewritten into it
    ready/<layer id>         the stamp of a complete tree, written last; JSON
    leases/<layer id>/<who>  claims that protect a tree from collection
    locks/<layer id>         an flock for whoever makes, mounts or removes any of these
    tmp/<layer id>/          work in progress
    warm/<name>              notes of :mod:`stager.staging.notes`

The format is specified in ``docs/formats/store.md``. A store belongs to one user and is private,
so that nobody can plant a tree that another one runs.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import sys
from collections.abc import Iterator
from typing import Any, Callable, NamedTuple

from stager import fsutil, warm
from stager.errors import NODE, StagerError, UsageError
from stager.formats import squashfs

FORMAT = 1
ROOMS = ("images", "envs", "ready", "leases", "locks", "tmp")
"""The directories of a store."""
_BESIDE = ("warm", "sessions")
"""What else of ours may lie in it: notes, and what :mod:`stager.staging.sessions` leaves."""
SENT = ".stager-"
"""How the name of an image begins that sbcast brings into a store."""
_ID = re.compile(r"[0-9a-f]{16}\Z")
_LONGEST = 4096
"""Bytes of a stamp; what we write has some hundred."""

boot_id = warm.boot_id

MOUNTED, EXTRACTED, RECEIVED = "mounted", "extracted", "received"


class Stamp(NamedTuple):
    """What makes a tree ready.

    Attributes:
        image: the file name of the image it was made from.
        how: :data:`MOUNTED`, :data:`EXTRACTED`; or :data:`RECEIVED` where there is no tree yet, but
            its image, verified.
        boot: the boot it was made in; after another one nothing is trusted unverified.
        size: bytes it takes in the store.
        format: version of the store's format.
        owner: whose end takes a mount away, see :attr:`stager.staging.processes.Owner.text`; empty
            for nobody's, None where an older stager did not write it down.
    """

    image: str
    how: str
    boot: str
    size: int
    format: int = FORMAT
    owner: str | None = None


class Held(NamedTuple):
    """One tree in a store, for status and collection."""

    id: str
    stamp: Stamp | None
    leases: tuple[str, ...]
    used: float


class Store:
    """One user's store on this node.

    Args:
        root: its directory, made when missing.

    Raises:
        DeniedError: it belongs to somebody else, is a link, or is open to others.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        try:
            fsutil.own_directory(root, "store")
            for room in ROOMS:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(os.path.join(root, room), 0o700)
        except OSError as error:
            raise fsutil.explain(error, f"make the store {root}", blame=NODE) from error

    def tree(self, layer_id: str) -> str:
        """Where a layer's tree is, or will be."""
        return os.path.join(self.root, "envs", layer_id)

    def image(self, layer_id: str) -> str:
        """Where the copy of a layer's image is, or will be."""
        return os.path.join(self.root, "images", layer_id)

    # -- the warm path: no lock --------------------------------------------------------------

    def ready(self, layer_id: str) -> Stamp | None:
        """The stamp of a tree that can be used now, or None.

        Which image it was made from does not matter: a layer's id names the tree. A stamp of
        another boot does not count; neither does a mount whose server died, or that another mount
        namespace holds.
        """
        stamp = self.stamp(layer_id)
        if stamp is None or stamp.boot != boot_id() or stamp.how == RECEIVED:
            return None
        there = warm.is_there(self.tree(layer_id), mounted=stamp.how == MOUNTED)
        return stamp if there else None

    def was_mounted(self, layer_id: str) -> bool:
        """Tell whether a tree was mounted in this boot; it may still be, where we cannot see it."""
        stamp = self.stamp(layer_id)
        return stamp is not None and _is_of_a_mount(stamp)

    def stamp(self, layer_id: str) -> Stamp | None:
        """The stamp as it is written, or None."""
        try:
            path = os.path.join(self.root, "ready", layer_id)
            with open(path, "rb", opener=fsutil.regular) as file:  # root's collection waits for us
                value = json.loads(file.read(_LONGEST))  # in no job's cgroup: not all the memory
            return Stamp(**value) if value.get("format") == FORMAT else None
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            return None

    # -- what the site's store does in its own way -------------------------------------------

    def admit(self, image: str) -> None:
        """Refuse an image that nothing may be made of here; a user's own choice is never."""

    def why_not_mount(self) -> str:
        """Why images cannot be mounted here; empty where they can."""
        return squashfs.why_not_mount()

    def mount(self, layer_id: str) -> None:
        """Mount a layer's image on its tree, which is an empty directory."""
        squashfs.mount(self.image(layer_id), self.tree(layer_id))

    def unmount(self, layer_id: str, *, force: bool = False) -> bool:
        """Unmount a tree, see :func:`stager.formats.squashfs.unmount`."""
        return squashfs.unmount(self.tree(layer_id), force=force)

    def put(self, directory: str, layer_id: str) -> None:
        """Let an unpacked tree be a layer's."""
        os.rename(directory, self.tree(layer_id))

    def trying(self) -> dict[str, Any]:
        """Who tries out whether a Python starts, for :class:`subprocess.Popen`."""
        return {}

    # -- making trees ------------------------------------------------------------------------

    def lock(
        self, layer_id: str, *, timeout: float, waiting: Callable[[float], None] | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """Be the only one to make, mount or remove this tree."""
        path = os.path.join(self.root, "locks", layer_id)
        return fsutil.locked(path, timeout=timeout, waiting=waiting)

    def withdraw(self, layer_id: str) -> None:
        """Take the stamp away: from here on the tree is not taken for complete. Needs the lock."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(self.root, "ready", layer_id))

    def clear(self, layer_id: str) -> None:
        """Take away what is left of a tree: a dead mount, a half-made directory. Needs the lock."""
        self.withdraw(layer_id)
        tree = self.tree(layer_id)
        for _ in range(8):  # mounts may lie on top of each other
            if warm.mounted(tree):
                self.unmount(layer_id, force=True)
        fsutil.remove_tree(tree)

    def end_mount(self, layer_id: str, owner: str) -> None:
        """Unmount a tree at the end of whoever mounted it. Needs the lock.

        Meanwhile another job may have put a tree of its own in its place; that stays.

        Args:
            layer_id: the tree.
            owner: who ends, as :attr:`Stamp.owner` has it.
        """
        stamp = self.stamp(layer_id)
        if stamp is None or (stamp.how == MOUNTED and stamp.owner in (owner, None)):
            self.withdraw(layer_id)
            self.unmount(layer_id)

    def workspace(self, layer_id: str) -> str:
        """A directory to make this tree or image in, cleared of earlier tries. Needs the lock."""
        path = os.path.join(self.root, "tmp", layer_id)
        fsutil.remove_tree(path)
        os.mkdir(path, 0o700)
        return path

    @staticmethod
    def unpacking(workspace: str) -> str:
        """Where to unpack a tree in a workspace; never the same path twice.

        What unpacks outlives a stage that is killed, for a moment: it must not find the next one's.
        """
        return os.path.join(workspace, os.urandom(8).hex())

    def partial(self, layer_id: str, name: str) -> str:
        """Where an image arrives piece by piece; what came in this boot is kept. Needs the lock."""
        directory = os.path.join(self.root, "tmp", layer_id)
        with contextlib.suppress(FileExistsError):
            os.mkdir(directory, 0o700)
        return os.path.join(directory, f"{name}-{boot_id()[:8]}")

    def place(self, layer_id: str, path: str, image: str, size: int) -> None:
        """Take in a verified image, for a tree to be made of it later. Needs the lock.

        Args:
            layer_id: the tree.
            path: the image, in this store.
            image: its file name in a repository.
            size: its bytes.
        """
        before = self.stamp(layer_id)
        self.withdraw(layer_id)
        os.rename(path, self.image(layer_id))
        self._set_received(layer_id, image, size, before)
        fsutil.remove_tree(os.path.dirname(path))

    def set_received(self, layer_id: str, image: str, size: int) -> None:
        """Write that the image is whole: it is not verified again in this boot. Needs the lock."""
        self._set_received(layer_id, image, size, self.stamp(layer_id))

    def _set_received(self, layer_id: str, image: str, size: int, before: Stamp | None) -> None:
        stamp = Stamp(image, RECEIVED, boot_id(), size)
        # One that is mounted elsewhere, in a job's own mount namespace, goes on being used.
        if before is not None and _is_of_a_mount(before):
            stamp = before._replace(image=image)
        self.set_ready(layer_id, stamp)

    def set_ready(self, layer_id: str, stamp: Stamp) -> None:
        """Write the stamp: from here on the tree is taken for complete. Needs the lock."""
        path = os.path.join(self.root, "ready", layer_id)
        fsutil.write_atomic(path, json.dumps(stamp._asdict()).encode(), durable=False)

    # -- leases ------------------------------------------------------------------------------

    def lease(self, layer_id: str, holder: str) -> bool:
        """Claim a tree. Written before the tree is looked at, so that a collector sees it.

        Args:
            layer_id: the tree.
            holder: who claims it, see :mod:`stager.staging.lease`.

        Returns:
            Whether the holder had not claimed it before.
        """
        name = holder_name(holder)
        with blame_node("claim a tree in the store"):
            return warm.claim(self.root, layer_id, name)

    def leases(self, layer_id: str) -> tuple[str, ...]:
        """Who claims a tree."""
        try:
            return tuple(sorted(os.listdir(os.path.join(self.root, "leases", layer_id))))
        except FileNotFoundError:
            return ()

    def release(self, holder: str, layer_id: str | None = None) -> int:
        """Drop a holder's claims, on one tree or on all; how many there were."""
        ids = [layer_id] if layer_id else _listdir(os.path.join(self.root, "leases"))
        name = holder_name(holder)
        dropped = 0
        for one in ids:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(self.root, "leases", one, name))
                dropped += 1
        return dropped

    # -- everything in it --------------------------------------------------------------------

    def held(self) -> list[Held]:
        """Every tree that takes space or is claimed."""
        rooms = ("images", "envs", "ready", "leases", "tmp")
        ids = {name for room in rooms for name in _listdir(os.path.join(self.root, room))}
        held = []
        for layer_id in sorted(filter(_ID.match, ids)):
            try:
                used = os.stat(os.path.join(self.root, "leases", layer_id)).st_mtime
            except OSError:
                used = 0.0
            held.append(Held(layer_id, self.stamp(layer_id), self.leases(layer_id), used))
        return held

    def strangers(self) -> list[str]:
        """What somebody else has put into the store, as paths in it; it is not ours to remove."""
        ours = (*ROOMS, *_BESIDE)
        names = [one for one in _listdir(self.root) if not (one in ours or one.startswith(SENT))]
        for room in ROOMS:
            for name in _listdir(os.path.join(self.root, room)):
                half = room == "ready" and name.startswith(".")
                if not (half or _ID.match(name)):
                    names.append(f"{room}/{name}")
        return sorted(names)

    def size(self) -> int:
        """Bytes that all images and extracted trees take."""
        return sum(map(self.size_of, self.held()))

    def size_of(self, held: Held) -> int:
        """Bytes that one tree and its image take."""
        total = 0
        if held.stamp is not None and held.stamp.how == EXTRACTED:
            total = held.stamp.size
        with contextlib.suppress(FileNotFoundError):
            total += os.stat(self.image(held.id)).st_blocks * 512
        return total

    def forget(self, layer_id: str) -> None:
        """Remove a tree with its image. Needs the lock.

        Raises:
            StagerError: something still uses the tree.
        """
        tree = self.tree(layer_id)
        if warm.mounted(tree) in (warm.LIVE, warm.SILENT) and not self.unmount(layer_id):
            raise StagerError(f"{tree} is in use")
        self.clear(layer_id)
        for room in ("images", "tmp"):
            fsutil.remove_tree(os.path.join(self.root, room, layer_id))
        with contextlib.suppress(OSError):
            os.rmdir(os.path.join(self.root, "leases", layer_id))

    def free(self) -> int:
        """Bytes free on the store's file system."""
        info = os.statvfs(self.root)
        return info.f_bavail * info.f_frsize

    def free_inodes(self) -> int:
        """Inodes free there; of a file system that does not count them, more than enough."""
        info = os.statvfs(self.root)
        return info.f_favail if info.f_files else sys.maxsize


def _is_of_a_mount(stamp: Stamp) -> bool:
    return (stamp.how, stamp.boot) == (MOUNTED, boot_id())


def holder_name(text: str) -> str:
    """A holder, which is to be the name of a file.

    Raises:
        UsageError: it cannot be.
    """
    if not re.match(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}\Z", text):
        raise UsageError(
            f"{text!r} cannot hold a claim", hint="`stager status --json` lists holders"
        )
    return text


def _listdir(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return []
        raise


@contextlib.contextmanager
def blame_node(doing: str) -> Iterator[None]:
    """Turn system errors of the store into ours, the node's fault where its disk failed."""
    try:
        yield
    except OSError as error:
        raise fsutil.explain(error, doing, blame=NODE) from error
