"""The site's own store on a node: what root stages, once for all users, mounted by the kernel.

A rank's every open(2) in a tree that squashfuse serves is a question to another process; the
kernel's own squashfs answers by itself. But its parser may be handed only what nobody but root
could have written (``docs/adr/0016-kernel-mounts.md``). So an environment is staged here where

- it was packed for this store, ``stager pack --store``, and
- it is published in a repository that root's configuration names and only root can write.

Jobs share the tree; each has a claim on it that root's worker makes, and nobody else writes here.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable

from stager import stage as staging
from stager import trees
from stager.config import Config
from stager.errors import SITE, DeniedError, NotFoundError, StagerError
from stager.manifest import Manifest
from stager.ref import Ref
from stager.repository import Published, Repository
from stager.stage import HIT, Staged
from stager.store import ROOMS, Store

_LINKS = 40
"""As many as the kernel follows in one path (path_resolution(7))."""


class SiteStore(Store):
    """The site's store; anybody may look into it, root makes and fills it.

    Args:
        root: its directory.
    """

    of_site = True

    def __init__(self, root: str) -> None:
        self.root = root

    def make(self) -> None:
        """Make what is missing.

        Raises:
            DeniedError: others than root could write there.
        """
        require_of_root(os.path.dirname(self.root))
        for directory in (self.root, *(os.path.join(self.root, room) for room in ROOMS)):
            if not os.path.isdir(directory):
                os.mkdir(directory, 0o755)
        require_of_root(self.root)

    def lease(self, layer_id: str, holder: str) -> bool:
        """Claim a tree, for all to see, see :meth:`stager.store.Store.lease`."""
        new = super().lease(layer_id, holder)
        os.chmod(os.path.join(self.root, "leases", layer_id), 0o755)  # noqa: S103 - jobs look whether theirs is there
        return new


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
    if not all(holder in node.leases(one) and node.ready(one) is not None for one in layers):
        return None
    return described(published.manifest, dict.fromkeys(layers, HIT))


def described(manifest: Manifest, layers: dict[str, str]) -> Staged:
    """An environment in the site's store, for those who run it.

    Args:
        manifest: the environment; it was packed for the store.
        layers: how each came to be, as in :class:`stager.stage.Staged`.
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
        DeniedError: others than root could have written the image, the manifest or the store.
        StagerError: it cannot be staged.
    """
    if repository not in config["repositories"]:
        raise DeniedError(f"{repository} is no repository of this site")
    place = Repository(repository)
    require_of_root(place.manifest(digest) if wish.digest else place.ref(wish.name))
    published = place.find(wish)
    node = of(published, config) if published is not None else None
    if published is None or node is None or published.digest != digest:
        raise NotFoundError(
            f"{repository} has no such {wish} for the store {config['site_store']}",
            hint="was it packed again this moment? submit once more",
        )
    for layer in published.manifest.layers:
        require_of_root(place.image(layer))
    node.make()
    return staging.stage(published, node, config, holder=holder)


def require_of_root(path: str) -> None:
    """See to it that nobody but root can change what a path leads to, at any step of the way.

    Raises:
        DeniedError: somebody can; the message says where.
    """
    for one in _steps(path):
        try:
            info = os.lstat(one)
        except OSError as error:
            raise StagerError(
                f"root cannot see {one}: {error.strerror}", hint="chmod a+rX it", blame=SITE
            ) from error
        loose = info.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not stat.S_ISLNK(info.st_mode)
        if info.st_uid != 0 or loose:
            raise DeniedError(
                f"others than root can write {one}",
                hint="the kernel mounts only what is root's: chown root, chmod go-w",
                blame=SITE,
            )


def _steps(path: str) -> Iterable[str]:
    """Everything that a path leads through, the targets of links included."""
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
