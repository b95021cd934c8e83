"""Making one tree in the store: mounted, or extracted."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from typing import Callable, Protocol

from stager import fsutil
from stager.config import Config
from stager.errors import (
    IncompatibleError,
    IntegrityError,
    NoSpaceError,
    StagerError,
    UsageError,
)
from stager.formats import squashfs
from stager.manifest import Layer, Manifest
from stager.repository import Published
from stager.staging import store
from stager.staging.processes import owner_of
from stager.staging.store import EXTRACTED, MOUNTED, Stamp, Store

_MARGIN, _MARGIN_INODES = 16 << 20, 1000
"""Bytes and inodes to leave free beside a tree: jobs have use for the disk too."""
_BLOCK = 4096
"""What a file takes beyond its bytes, at most: disks give whole blocks, commonly of this size. Most
files of an environment are smaller: by their bytes, thousands would take next to nothing."""


class Progress(Protocol):
    """What staging reports while it works."""

    def copying(self, what: str, size: int) -> Callable[[int], None]:
        """An image of so many bytes is copied; the result is told the bytes as they pass."""

    def waiting(self, seconds: float) -> None:
        """Somebody else is staging the same; so long so far."""

    def note(self, message: str) -> None:
        """Something the user may want to know."""


def make(
    published: Published, layer: Layer, node: Store, config: Config, progress: Progress | None
) -> Stamp:
    """Make one tree, holding its lock.

    Returns:
        The stamp for whoever has tried it to write: without one, nobody takes it for complete.
    """
    how = choose(layer, node, config["stage.how"], progress)
    here = is_present(layer, node)
    if not here:
        node.admit(published.repository.image(layer))
    node.clear(layer.id)
    image = node.image(layer.id)
    make_room(layer, how, node, config, present=layer.image.size if here else 0)
    workspace = node.workspace(layer.id)
    unpacked = node.unpacking(workspace)
    try:
        if layer.image.format == "squashfs":
            if not here:
                fetch(published, layer, node, workspace, progress)
            if how == MOUNTED and not _mounted(node, layer, config["stage.how"], progress):
                how = EXTRACTED
                make_room(layer, how, node, config, present=layer.image.size)
            if how == EXTRACTED:
                squashfs.extract(image, unpacked)
                os.unlink(image)
        else:
            allowed = _links_out(published.manifest, layer, config["local_prefixes"])
            source = image if here else published.repository.image(layer)
            advance = progress.copying(layer.origin, layer.image.size) if progress else None
            _extract_archive(source, layer, unpacked, allowed, advance)
            if here:
                os.unlink(image)
        if how == EXTRACTED:
            if is_moved(layer, node):
                from stager.staging import retarget

                retarget.rewrite(unpacked, published.manifest, layer, node)
            node.put(unpacked, layer.id)
        size = layer.image.size if how == MOUNTED else extracted_size(layer)
        owner = owner_of(os.environ) if how == MOUNTED else None  # squashfuse has our variables
        text = owner.text if owner is not None else ""
        return Stamp(layer.filename, how, store.boot_id(), size, owner=text)
    except BaseException:
        node.clear(layer.id)
        if not here:
            with contextlib.suppress(OSError):
                os.unlink(image)
        raise
    finally:
        fsutil.remove_tree(workspace)


def extracted_size(layer: Layer) -> int:
    """Bytes of disk that an extracted layer takes, at most."""
    return layer.size + layer.files * _BLOCK


def is_moved(layer: Layer, node: Store) -> bool:
    """Tell whether a layer was packed for another store than this one."""
    return layer.destination != node.tree(layer.id)


def is_present(layer: Layer, node: Store) -> bool:
    """Tell whether a layer's image is in the store and whole.

    What an interrupted run left is not looked at; an image of another boot is verified again.
    """
    from stager import transfer

    image, stamp = node.image(layer.id), node.stamp(layer.id)
    if stamp is not None and (stamp.image, stamp.boot) == (layer.filename, store.boot_id()):
        return os.path.exists(image)
    return transfer.is_image(image, layer.image)


def fetch(
    published: Published,
    layer: Layer,
    node: Store,
    workspace: str,
    progress: Progress | None = None,
) -> None:
    """Copy a layer's image into the store. Needs the layer's lock.

    Args:
        published: the environment.
        layer: one of its layers.
        node: the store.
        workspace: a directory in the store for what is not yet whole.
        progress: told how far it is.
    """
    from stager import transfer

    advance = progress.copying(layer.origin, layer.image.size) if progress else None
    copied = os.path.join(workspace, "image")
    transfer.copy(published.repository.image(layer), layer.image, copied, advance=advance)
    os.rename(copied, node.image(layer.id))


def _mounted(node: Store, layer: Layer, wanted: str, progress: Progress | None) -> bool:
    """Mount an image; where that is refused, False unless mounting was asked for by name."""
    tree = node.tree(layer.id)
    os.mkdir(tree, 0o700)
    try:
        node.mount(layer.id)
    except StagerError as error:
        node.clear(layer.id)  # it may be there all the same, from a helper that did not end
        if wanted == "mount":
            raise
        if progress is not None:
            progress.note(f"extracting instead of mounting: {error.message}")
        return False
    return True


def _links_out(
    manifest: Manifest, layer: Layer, local: Iterable[str]
) -> Callable[[str, str], bool]:
    """Which links of a layer may lead out of it: those that a pack makes, and tells of.

    They lead to the node's own disk (the base Python above all), into another layer, or to where
    a finding of the manifest says.
    """
    from stager.paths import is_within  # squashfs does without

    known = {one.path for one in manifest.findings if one.code in ("link", "dangling")}
    places = (*local, *(one.destination for one in manifest.layers))

    def allowed(path: str, target: str) -> bool:
        start = os.path.dirname(os.path.join(layer.destination, path))
        absolute = os.path.normpath(os.path.join(start, target))
        if path in known or absolute == manifest.python.base:
            return True
        return is_within(absolute, places)

    return allowed


def _extract_archive(
    source: str,
    layer: Layer,
    directory: str,
    allowed: Callable[[str, str], bool],
    advance: Callable[[int], None] | None,
) -> None:
    from stager.formats import tarzst

    try:
        tarzst.extract(
            source,
            directory,
            workers=len(os.sched_getaffinity(0)),
            max_files=layer.files,
            max_bytes=layer.size,
            crc32=layer.image.crc32,
            allowed_links=allowed,
            progress=advance,
        )
    except (IntegrityError, UsageError) as error:
        raise IntegrityError(
            f"cannot extract {source}: {error.message}",
            hint=error.hint or "pack the environment again",
        ) from error


def choose(layer: Layer, node: Store, wanted: str, progress: Progress | None = None) -> str:
    """How to make a tree in a store: what is asked for, else what works, mounting first."""
    if layer.image.format != "squashfs":
        if wanted == "mount":
            raise IncompatibleError(
                f"an image in format {layer.image.format} cannot be mounted",
                hint="pack with --format squashfs, or stage with --how extract",
            )
        return EXTRACTED
    if wanted == "extract":
        return EXTRACTED
    reason = node.why_not_mount()
    if is_moved(layer, node):
        reason = "it was packed for another store and has to be rewritten"
    if not reason:
        return MOUNTED
    if wanted == "mount":
        raise IncompatibleError(
            f"the image cannot be mounted here: {reason}", hint="use --how extract"
        )
    if progress is not None:
        progress.note(f"extracting instead of mounting: {reason}")
    return EXTRACTED


def make_room(layer: Layer, how: str, node: Store, config: Config, *, present: int = 0) -> None:
    """Make sure that there is space for a tree, evicting unclaimed ones where needed.

    Args:
        layer: what the tree is of.
        how: mounted, or extracted.
        node: the store.
        config: bounds of the store.
        present: bytes of the image that are in the store already.

    Raises:
        NoSpaceError: there is not.
        IncompatibleError: nothing could be run from there.
    """
    size = layer.image.size - present
    if how == EXTRACTED:
        if layer.image.format != "squashfs":  # extracted from where it is
            size = 0
        size += extracted_size(layer)
    files = 0 if how == MOUNTED else layer.files
    if how == EXTRACTED and os.statvfs(node.root).f_flag & os.ST_NOEXEC:
        raise IncompatibleError(
            f"the store {node.root} is on a file system mounted noexec",
            hint="choose another store (--store, STAGER_STORE); only what is mounted can be used in"
            " this one: `stager doctor` shows whether this node can",
        )
    if not _lacking(node, size, files):
        return
    from stager.staging import collect

    needed = (size + _MARGIN, files + _MARGIN_INODES if files else 0)
    collect.collect(
        node, max_size=config["collect.max_size"], min_free=needed[0], min_inodes=needed[1]
    )
    lacking = _lacking(node, size, files)
    if lacking:
        error = NoSpaceError(
            f"not enough {lacking}",
            hint="`stager collect` frees what no job uses; or choose another store (--store)",
        )
        error.needed = needed
        raise error


def _lacking(node: Store, size: int, files: int) -> str:
    """What a tree lacks on the store's disk, in the numbers that were compared; empty: nothing."""
    free, inodes = node.free(), node.free_inodes()
    if free < size + _MARGIN:
        return (
            f"space in the store {node.root}: needs {_mib(size)} MiB and a reserve of"
            f" {_mib(_MARGIN)} MiB, {free >> 20} MiB are free"
        )
    if files and inodes < files + _MARGIN_INODES:
        return (
            f"inodes in the store {node.root}: needs {files} and a reserve of"
            f" {_MARGIN_INODES}, {inodes} are free"
        )
    return ""


def _mib(size: int) -> int:
    """Rounded up: what is free is rounded down, so that a sum that does not fit looks like it."""
    return -(-size >> 20)
