"""Published environments on shared storage. The format: ``docs/formats/repository.md``.

::

    refs/<name>              a manifest, by the name of its environment
    origins/<hash>           the same, by the path that the environment was packed from
    manifests/<digest>.json  the same, by the sha256 of its bytes
    layers/<id>.<format>     what packing a layer gave: JSON, so that it need not be done again
    images/<layer>           images, named by the layer's id and their checksum
    tmp/                     half-written files of packs at work

Whatever is reached by a name was written whole, synced and then renamed into place.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import stat
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from stager import fsutil, manifest
from stager.errors import JOB, BusyError, DeniedError, IntegrityError, NotFoundError, StagerError
from stager.manifest import Layer, Manifest
from stager.ref import Ref, is_name

_ROOMS = ("refs", "origins", "manifests", "layers", "images", "tmp")
_MAX_MANIFEST = 64 << 20
_DIGITS = 64
"""Of a whole sha256, in hexadecimal."""
_FLOCK_MISSING = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)


class Published(NamedTuple):
    """A manifest that was found, its bytes, and the repository it was found in."""

    manifest: Manifest
    data: bytes
    repository: Repository

    @property
    def digest(self) -> str:
        """The hex sha256 that names the manifest."""
        return manifest.digest(self.data)

    @property
    def ref(self) -> str:
        """The ref that names exactly this manifest."""
        return f"{self.manifest.name}@sha256:{self.digest}"

    def is_of(self, origin: str) -> bool:
        """Tell whether it was packed from there, whichever way a path leads there now."""
        return os.path.realpath(self.manifest.origin) == os.path.realpath(origin)


class Repository:
    """One repository.

    Args:
        root: its directory; it is made when something is published.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self._umask = 0o077

    def ref(self, name: str) -> str:
        """The path of the manifest that a name stands for."""
        return self._path("refs", name)

    def _path(self, *parts: str) -> str:
        return os.path.join(self.root, *parts)

    def create(self) -> None:
        """Make the directories, private, where they are missing.

        Raises:
            DeniedError: that is not allowed there.
        """
        try:
            for room in ("", *_ROOMS):
                path = self._path(room)
                os.makedirs(path, 0o700, exist_ok=True)
        except OSError as error:
            raise fsutil.explain(error, f"make the repository {self.root}") from error
        info = os.stat(self.root)
        if info.st_uid not in (os.geteuid(), 0):
            raise DeniedError(
                f"the repository {self.root} belongs to uid {info.st_uid}",
                hint="set the key `repository` to a directory of your own",
            )

    # -- reading ----------------------------------------------------------------------------

    def find(self, ref: Ref) -> Published | None:
        """Find what a ref names here; None where it names nothing.

        Raises:
            IntegrityError: its manifest is damaged.
            DeniedError: it may not be read.
        """
        if ref.path:
            return self._load(self._path("origins", _origin_key(ref.path)))
        if not ref.digest:
            return self._load(self.ref(ref.name))
        if len(ref.digest) == _DIGITS:
            matches = [f"{ref.digest}.json"]
        else:
            matches = [
                name
                for name in self._listdir("manifests")
                if name.startswith(ref.digest) and name.endswith(".json")
            ]
        if len(matches) > 1:
            raise IntegrityError(f"{ref} is ambiguous here", hint="give more digits of the digest")
        found = self._load(self._path("manifests", matches[0])) if matches else None
        return found if found is not None and found.manifest.name == ref.name else None

    def _load(self, path: str) -> Published | None:
        data = self._read_manifest(path)
        return Published(manifest.decode(data, path), data, self) if data is not None else None

    @staticmethod
    def _read_manifest(path: str) -> bytes | None:
        tries = 3
        while True:
            try:
                return _content(path)
            except (FileNotFoundError, NotADirectoryError):
                return None
            except OSError as error:
                tries -= 1
                # On NFS what is replaced after it was opened can no longer be read.
                if error.errno != errno.ESTALE or not tries:
                    raise fsutil.explain(error, "read the manifest", blame=JOB) from error

    def manifest(self, digest: str) -> str:
        """The path of the manifest that a whole digest names."""
        return self._path("manifests", f"{digest}.json")

    def image(self, layer: Layer) -> str:
        """The path of a layer's image."""
        return self._path("images", layer.filename)

    def layer(self, layer_id: str, image_format: str) -> dict[str, Any] | None:
        """What packing this layer gave before, or None."""
        try:
            path = self._path("layers", f"{layer_id}.{image_format}")
            with open(path, "rb", opener=fsutil.regular) as file:
                value: dict[str, Any] = json.load(file)
            size = os.path.getsize(self._path("images", value["image"]))
            return value if size == value["layer"]["image"]["size"] else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def names(self) -> list[str]:
        """Every published name, sorted."""
        return sorted(filter(is_name, self._listdir("refs")))

    def _listdir(self, room: str) -> list[str]:
        try:
            return os.listdir(self._path(room))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise fsutil.explain(error, "list the repository") from error

    # -- writing ----------------------------------------------------------------------------

    @contextlib.contextmanager
    def workspace(self) -> Iterator[str]:
        """A directory for half-written files beside the published ones, removed at the end.

        One that a killed pack has left is removed by the next of its node: its lock is free. What
        another node's lock says is not relied on, for many mounts have locks of their own node's
        only (``localflock``, ``nolock``): there age tells.
        """
        import tempfile

        self._umask = os.umask(0o077)  # told only by being changed: before there are threads
        os.umask(self._umask)
        self.create()
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._lock("packing", shared=True))
            with self._lock("lock"):  # nobody may sweep a directory whose lock is not held yet
                self._sweep()
                directory = tempfile.mkdtemp(prefix=_of_this_node(), dir=self._path("tmp"))
                stack.callback(_removed, directory)
                lock = os.path.join("tmp", os.path.basename(directory), "lock")
                stack.enter_context(self._lock(lock))
            yield directory

    @contextlib.contextmanager
    def alone(
        self, origin: str, *, timeout: float, waiting: Callable[[float], None] | None = None
    ) -> Iterator[None]:
        """Keep others who would pack the same original waiting, as far as they ask for this.

        Args:
            origin: the original's path.
            timeout: seconds to wait for who is at it.
            waiting: as :func:`stager.fsutil.locked` has it.

        Raises:
            BusyError: somebody is, for longer.
        """
        with self._lock(f"tmp/packing-{_origin_key(origin)}", timeout=timeout, waiting=waiting):
            yield

    def _sweep(self) -> None:
        for name in self._listdir("tmp"):
            directory = self._path("tmp", name)
            with contextlib.suppress(OSError):
                try:
                    fd = os.open(os.path.join(directory, "lock"), os.O_RDWR | os.O_CLOEXEC)
                except FileNotFoundError:  # its pack was killed before it had made one
                    if fsutil.is_abandoned(directory):
                        _removed(directory)
                    continue
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if name.startswith(_of_this_node()) or fsutil.is_abandoned(directory):
                        _removed(directory)
                except OSError as error:
                    # Without working locks (some shared file systems) only age tells.
                    if error.errno in _FLOCK_MISSING and fsutil.is_abandoned(directory):
                        _removed(directory)
                finally:
                    os.close(fd)

    def add_image(self, path: str, layer: Layer) -> None:
        """Move a finished image into place.

        Args:
            path: the file, in this repository's :meth:`workspace`, already on disk.
            layer: what it is the image of.
        """
        os.chmod(path, 0o666 & ~self._umask)
        os.rename(path, self.image(layer))
        fsutil.sync(self._path("images"))

    def add_layer(self, layer_id: str, image_format: str, record: dict[str, Any]) -> None:
        """Remember what packing a layer gave."""
        path = self._path("layers", f"{layer_id}.{image_format}")
        fsutil.write_atomic(path, manifest.canonical(record))

    def refer(self, other: Repository, record: dict[str, Any]) -> None:
        """Use a layer of another repository as if it were here; its image is not copied.

        Args:
            other: the site's repository, which keeps the image.
            record: what :meth:`layer` of it gives.
        """
        name = os.path.basename(record["image"])
        fsutil.replace_link(os.path.join(other.root, "images", name), self._path("images", name))
        self.add_layer(record["layer"]["id"], record["layer"]["image"]["format"], record)

    def publish(self, value: Manifest, *, replace: bool) -> Published:
        """Make a manifest reachable by its name and its origin.

        Args:
            value: the manifest; its images are in place.
            replace: take the name over from an environment packed from elsewhere.

        Raises:
            StagerError: the name belongs to another environment, or an image went away meanwhile.
        """
        with self._lock("lock"):
            if not replace:
                self.require_name(value.name, value.origin)
            for layer in value.layers:
                if not os.path.exists(self.image(layer)):
                    raise StagerError(
                        f"the image of {layer.origin} was removed while packing",
                        hint="pack the environment again",
                    )
            data = value.encode()
            digest = manifest.digest(data)
            fsutil.write_atomic(self.manifest(digest), data)
            self._mark_replaced(value.name, f"{digest}.json")
            # Copies: following a link costs every cold node three more lookups.
            fsutil.write_atomic(self._path("origins", _origin_key(value.origin)), data)
            fsutil.write_atomic(self.ref(value.name), data)
        return Published(value, data, self)

    def _mark_replaced(self, name: str, new: str) -> None:
        """Note on the manifest that a name stands for when it was replaced, for :meth:`collect`."""
        with contextlib.suppress(OSError, StagerError):
            old = self._stands_for("refs", name)
            if old and old != new:
                os.utime(self._path("manifests", old))

    def _stands_for(self, *parts: str) -> str:
        """The file in ``manifests`` that a name stands for; empty where there is no such name.

        Raises:
            StagerError: it cannot be read.
        """
        data = self._read_manifest(self._path(*parts))
        return f"{manifest.digest(data)}.json" if data is not None else ""

    def require_name(self, name: str, origin: str) -> None:
        """Refuse a name that another environment has.

        Raises:
            StagerError: one that was packed from elsewhere has it.
        """
        with contextlib.suppress(IntegrityError):
            known = self.find(Ref(name=name))
            if known is not None and not known.is_of(origin):
                raise StagerError(
                    f"the name `{name}` is already used for {known.manifest.origin}",
                    hint="choose another one with --name",
                    blame=JOB,
                )

    def remove(self, ref: Ref) -> list[str]:
        """Take a name back and remove whatever nothing else refers to.

        Returns:
            The images that were removed.

        Raises:
            NotFoundError: there is no such name.
        """
        missing = NotFoundError(
            f"`{ref}` is not published in {self.root}", hint="`stager list` shows what is"
        )
        if not os.path.isdir(self.root):
            raise missing  # a lock would make it
        with self._lock("lock"):
            parts = ("origins", _origin_key(ref.path)) if ref.path else ("refs", ref.name)
            target = self._stands_for(*parts)
            if not target.startswith(ref.digest) or not target:
                raise missing
            # Its name may be another environment's by now: only those of this very manifest go.
            for room in ("refs", "origins"):
                for name in self._listdir(room):
                    with contextlib.suppress(OSError, StagerError):
                        if self._stands_for(room, name) == target:
                            os.unlink(self._path(room, name))
        return self.collect()

    def collect(self, *, keep: float = 0.0) -> list[str]:
        """Remove manifests no name leads to, and images that only those named.

        Where one cannot be read nothing is removed, for what it refers to is not known.
        Nothing is removed while a pack is at work: it may be about to name what it found. What no
        manifest has ever named may be of one whose lock we cannot see: that goes after a day.

        Args:
            keep: seconds for which a replaced manifest stays, for nodes that are staging it.

        Returns:
            The names of the images that were removed.
        """
        with self._lock("lock"):
            try:
                with self._lock("packing", timeout=0):
                    return self._collect(keep)
            except BusyError:
                return []

    def _collect(self, keep: float) -> list[str]:
        kept: dict[str, Manifest] = {}
        unnamed: list[str] = []
        try:
            for room in ("refs", "origins", "manifests"):
                for name in self._whole(room):
                    path = self._path(room, name)
                    if room == "manifests" and name not in kept and _age(path) >= keep:
                        unnamed.append(path)
                    elif published := self._load(path):
                        kept[f"{published.digest}.json"] = published.manifest
        except StagerError:
            return []
        images = {layer.filename for one in kept.values() for layer in one.layers}
        left: set[str] = set()  # images of the manifests that go
        for path in unnamed:
            with contextlib.suppress(StagerError):
                if published := self._load(path):
                    left |= {layer.filename for layer in published.manifest.layers}
            os.unlink(path)

        def is_over(image: str, path: str) -> bool:
            return image not in images and (image in left or fsutil.is_abandoned(path))

        for name in self._whole("layers"):
            path = self._path("layers", name)
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                with open(path, "rb") as file:
                    image = json.load(file)["image"]
                if is_over(image, path):
                    os.unlink(path)
        removed = []
        for name in self._listdir("images"):
            with contextlib.suppress(OSError):
                if is_over(name, self._path("images", name)):
                    os.unlink(self._path("images", name))
                    removed.append(name)
        return removed

    def _whole(self, room: str) -> list[str]:
        """A room's files but for halves, which a write leaves that is killed; old ones go."""
        names = self._listdir(room)
        if any(name.startswith(".") for name in names):
            fsutil.sweep(self._path(room))
        return [name for name in names if not name.startswith(".")]

    @contextlib.contextmanager
    def _lock(
        self,
        name: str,
        *,
        shared: bool = False,
        timeout: float = 60,
        waiting: Callable[[float], None] | None = None,
    ) -> Iterator[None]:
        self.create()
        held = False
        try:
            path = self._path(name)
            with fsutil.locked(path, timeout=timeout, shared=shared, waiting=waiting):
                held = True
                yield
        except OSError as error:
            if held or error.errno not in _FLOCK_MISSING:
                raise
            yield  # renames keep readers right even where locks do not work


def _content(path: str) -> bytes:
    # One open: nothing else is asked before it is known what the name stands for.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise IntegrityError(f"{path} is not a file", hint="pack the environment again")
        with open(fd, "rb", closefd=False) as file:
            # Memory for as much as is asked for is taken at once.
            return file.read(min(info.st_size, _MAX_MANIFEST))
    finally:
        fsutil.close_aside(fd)


def _of_this_node() -> str:
    return f"{os.uname().nodename}-"


def _removed(directory: str) -> None:
    import shutil  # loads all compressors: a start does without

    shutil.rmtree(directory, ignore_errors=True)


def _age(path: str) -> float:
    return time.time() - os.stat(path).st_mtime


def _origin_key(path: str) -> str:
    return manifest.digest(os.fsencode(os.path.realpath(path)))[:32]
