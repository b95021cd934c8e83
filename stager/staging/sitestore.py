"""The site's own store on a node: what root stages, once for all users, mounted by the kernel.

A rank's every open(2) in a tree that squashfuse serves is a question to another process; the
kernel's own squashfs answers by itself. But its parser may be handed only what nobody but root
could have written (``docs/adr/0016-kernel-mounts.md``). So an environment is staged here where

- it was packed for this store, ``stager pack --store``, and
- it is published in a repository that root's configuration names and only root can write.

Jobs share the tree; each has a claim on it that root's worker makes, and nobody else writes here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterable
from typing import Any

from stager import mounts
from stager.config import Config
from stager.errors import SITE, DeniedError, NotFoundError, StagerError
from stager.formats import squashfs
from stager.manifest import Manifest
from stager.ref import Ref
from stager.repository import Published, Repository
from stager.staging import stage as staging
from stager.staging import trees
from stager.staging.stage import HIT, Staged
from stager.staging.store import MOUNTED, ROOMS, Store, boot_id

_NOBODY = 65534
_READABLE = "chmod a+rX it; or let users publish it for each other, and not for the site's store"
_LINKS = 40
"""As many as the kernel follows in one path (path_resolution(7))."""


class SiteStore(Store):
    """The site's store, for whoever looks into it; for writing there is :meth:`of_root`.

    Args:
        root: its directory.
    """

    def __init__(self, root: str) -> None:
        self.root = root

    @classmethod
    def of_root(cls, root: str) -> SiteStore:
        """The store for root, who writes into it; it is made where it is missing.

        Raises:
            DeniedError: others than root could write there.
        """
        os.umask(0o022)  # all may read it
        require_trusted(os.path.dirname(root))
        for directory in (root, *(os.path.join(root, room) for room in ROOMS)):
            with contextlib.suppress(FileExistsError):  # several jobs may begin at once
                os.mkdir(directory, 0o755)
            require_trusted(directory)
        return cls(root)

    def lease(self, layer_id: str, holder: str) -> bool:
        """Claim a tree; a job can see whether it has a claim, but not who else does."""
        with contextlib.suppress(FileExistsError):
            os.mkdir(os.path.join(self.root, "leases", layer_id), 0o711)
        return super().lease(layer_id, holder)

    def is_claimed(self, layer_id: str, holder: str) -> bool:
        """Tell whether somebody has claimed a tree."""
        return os.path.exists(os.path.join(self.root, "leases", layer_id, holder))

    def admit(self, image: str) -> None:
        """Refuse an image that others than root could have written, or that not all may read."""
        require_trusted(image)

    def why_not_mount(self) -> str:
        """The kernel tells when it is asked."""
        return ""

    def mount(self, layer_id: str) -> None:
        """Have the kernel mount a layer's image."""
        squashfs.mount_by_kernel(self.image(layer_id), self.tree(layer_id))

    def unmount(self, layer_id: str, *, force: bool = False) -> bool:
        """Unmount a tree."""
        return squashfs.unmount_by_kernel(self.tree(layer_id), force=force)

    def put(self, directory: str, layer_id: str) -> None:
        """Let an unpacked tree be a layer's, for all to use."""
        os.chmod(directory, 0o755)  # noqa: S103 - archives are unpacked into a private one
        super().put(directory, layer_id)

    def trying(self) -> dict[str, Any]:
        """Root runs nothing from there."""
        return {"user": _NOBODY, "group": _NOBODY, "extra_groups": []}


def of(published: Published, config: Config) -> SiteStore | None:
    """The site's store, where an environment was packed for it and is the site's; else None."""
    if not config["site_store"] or published.repository.root not in config["repositories"]:
        return None
    node = SiteStore(config["site_store"])
    layers = published.manifest.layers
    return None if any(trees.is_moved(layer, node) for layer in layers) else node


def staged(published: Published, config: Config, holder: str) -> Staged | None:
    """What the job we run in was given in the site's store; None where that is not so.

    Args:
        published: the environment.
        config: anybody's; ``site_store`` is used.
        holder: whose claim is looked for: without one, the tree may go away at any time.
    """
    node = of(published, config)
    if node is None:
        return None
    layers = [layer.id for layer in published.manifest.layers]
    if not all(node.is_claimed(one, holder) and node.ready(one) is not None for one in layers):
        return None
    return described(published.manifest, dict.fromkeys(layers, HIT))


def described(manifest: Manifest, layers: dict[str, str]) -> Staged:
    """An environment in the site's store, for those who run it.

    Args:
        manifest: the environment; it was packed for the store.
        layers: how each came to be, as in :class:`stager.staging.stage.Staged`.
    """
    return Staged(manifest.top.destination, staging.slowest(layers.values()), manifest, layers)


def stage(repository: str, wish: Ref, digest: str, config: Config, holder: str) -> Staged:
    """Stage an environment, as root.

    Args:
        repository: the path of one of the site's repositories.
        wish: what finds the environment there.
        digest: of the manifest that the job has read.
        config: loaded with ``trusted_only``.
        holder: the job.

    Raises:
        DeniedError: others than root could have written the image, the manifest or the store; or
            not all may read them.
        StagerError: it cannot be staged.
    """
    if repository not in config["repositories"]:
        raise DeniedError(f"{repository} is no repository of this site")
    place = Repository(repository)
    require_trusted(place.manifest(digest) if wish.digest else place.ref(wish.name))
    published = place.find(wish)
    if published is None or of(published, config) is None or published.digest != digest:
        raise NotFoundError(
            f"{repository} has no such {wish} for the store {config['site_store']}",
            hint="it may just have been repacked: submit the job again",
        )
    node = SiteStore.of_root(config["site_store"])
    for layer in published.manifest.layers:
        _require_same_mounts(node, layer.id, holder)
    return staging.stage(published, node, config, holder=holder)


def _require_same_mounts(node: SiteStore, layer_id: str, holder: str) -> None:
    """Leave a tree alone that running jobs have mounted where we cannot see it.

    To make it anew would take it away from them: a directory that is removed in one mount
    namespace is unmounted in all others.
    """
    stamp = node.stamp(layer_id)
    here = stamp is None or stamp.boot != boot_id() or stamp.how != MOUNTED
    if here or node.ready(layer_id) is not None or not {*node.leases(layer_id)} - {holder}:
        return
    raise StagerError(
        f"{node.tree(layer_id)} is mounted for other jobs, in another mount namespace",
        hint="hooks that mount must all run in the node's own: was slurmd started with PrivateTmp?",
        blame=SITE,
    )


def require_trusted(path: str) -> None:
    """See to it that nobody but root can change what a path leads to, and that all may read it.

    Each step of the way counts, the targets of links included; so does who mounted it.

    Raises:
        NotFoundError: there is no such path.
        DeniedError: somebody can, or not all may; the message says where.
    """
    users = {one.device for one in mounts.of_users()}
    for one in _steps(path):
        try:
            info = os.lstat(one)
        except OSError as error:
            if error.errno == errno.ENOENT:
                hint = "publish it again, or mend the configuration"
                raise NotFoundError(f"{one} is missing", hint=hint, blame=SITE) from error
            raise DeniedError(
                f"root cannot see {one}: {error.strerror}", hint=_READABLE, blame=SITE
            ) from error
        link = stat.S_ISLNK(info.st_mode)
        loose = not link and info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if info.st_uid != 0 or loose or info.st_dev in users:
            raise DeniedError(
                f"{one} is writable by users other than root",
                hint=(
                    "only files that root alone can write are mounted by the kernel: chown"
                    " root, chmod go-w"
                ),
                blame=SITE,
            )
        needed = stat.S_IXOTH if stat.S_ISDIR(info.st_mode) else stat.S_IROTH
        if not link and not info.st_mode & needed:
            raise DeniedError(
                f"{one} is not readable by everyone, but the site's store is", hint=_READABLE,
                blame=SITE,
            )  # fmt: skip


def _steps(path: str) -> Iterable[str]:
    """Everything that a path leads through."""
    here, left, links = "/", path.strip("/").split("/"), 0
    yield here
    while left:
        part = left.pop(0)
        if part in ("", "."):
            continue
        here = os.path.dirname(here) if part == ".." else os.path.join(here, part)
        yield here
        if os.path.islink(here):
            links += 1
            if links > _LINKS:
                raise DeniedError(f"{path} leads through too many links")
            target = os.readlink(here)
            here = "/" if target.startswith("/") else os.path.dirname(here)
            left = [*target.split("/"), *left]
