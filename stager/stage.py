"""Staging: make a published environment's layers present and usable on this node. Read this first.

::

    published --stage(store, holder)--> Staged --activate--> environment variables
    end of the holder: release          now and then: collect

A tree that is ready costs no lock and nothing on shared storage. One that is not is made by
whoever gets its lock first; the others wait, and take over should the maker die.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Callable, Protocol

from stager import fsutil, store
from stager.config import Config
from stager.errors import IncompatibleError, NoSpaceError, StagerError
from stager.formats import squashfs
from stager.manifest import Layer, Manifest
from stager.repository import Published
from stager.store import EXTRACTED, MOUNTED, Stamp, Store

HIT = "hit"
_MARGIN, _MARGIN_INODES = 16 << 20, 1000
"""Bytes and inodes to leave free beside a tree: jobs have use for the disk too."""


class Progress(Protocol):
    """What staging reports while it works."""

    def copying(self, what: str, size: int) -> Callable[[int], None]:
        """An image of so many bytes is copied; the result is told the bytes as they pass."""

    def waiting(self, seconds: float) -> None:
        """Somebody else is staging the same; so long so far."""

    def note(self, message: str) -> None:
        """Something the user may want to know."""


@dataclass(frozen=True)
class Staged:
    """An environment that can be used on this node.

    Attributes:
        prefix: its path here.
        how: ``hit``, ``mounted`` or ``extracted``: the slowest thing that was done.
        layers: for each layer its id and how it came to be.
        seconds: how long each step took.
    """

    prefix: str
    how: str
    manifest: Manifest
    layers: dict[str, str]
    seconds: dict[str, float] = field(default_factory=dict)


def stage(
    published: Published,
    node: Store,
    config: Config,
    *,
    holder: str,
    progress: Progress | None = None,
) -> Staged:
    """Stage every layer of an environment, claiming each for ``holder``.

    Args:
        published: the environment.
        node: the store on this node.
        config: see :mod:`stager.config`; ``stage.how`` and ``stage.timeout`` are used.
        holder: who claims it, see :mod:`stager.lease`.
        progress: told how far it is.

    Raises:
        StagerError: it cannot be staged; nothing half-made is left, and nothing is claimed.
    """
    started = time.monotonic()
    manifest = published.manifest
    made: dict[str, str] = {}
    claimed: list[str] = []
    try:
        for layer in manifest.layers:
            if node.lease(layer.id, holder):
                claimed.append(layer.id)
            if node.ready(layer.id) is not None:
                made[layer.id] = HIT
                continue
            _require(manifest)
            remaining = config["stage.timeout"] - (time.monotonic() - started)
            waiting = progress.waiting if progress is not None else None
            with (
                store.blame_node("stage into the store"),
                node.lock(layer.id, timeout=max(0.0, remaining), waiting=waiting),
            ):
                # Somebody may have made it while we waited.
                if node.ready(layer.id) is not None:
                    made[layer.id] = HIT
                else:
                    made[layer.id] = _make(published, layer, node, config, progress)
        new = [layer_id for layer_id, how in made.items() if how != HIT]
        if new:
            try:
                _try(manifest, node)
            except StagerError:
                for layer_id in new:  # or the next one would find them ready
                    with contextlib.suppress(StagerError), node.lock(layer_id, timeout=1):
                        node.withdraw(layer_id)
                raise
    except BaseException:
        for layer_id in claimed:  # what the holder had before may be in use
            node.release(holder, layer_id)
        raise
    order = (EXTRACTED, MOUNTED, HIT)
    how = next(one for one in order if one in made.values())
    prefix = node.tree(manifest.top.id)
    return Staged(prefix, how, manifest, made, {"total": time.monotonic() - started})


def _make(
    published: Published, layer: Layer, node: Store, config: Config, progress: Progress | None
) -> str:
    """Make one tree, holding its lock; returns how."""
    from stager import transfer

    moved = layer.destination != node.tree(layer.id)
    how = _choose(layer, config["stage.how"], moved, progress)
    trusted = node.stamp(layer.id)
    # What an interrupted run left is not looked at; an image of another boot is verified again.
    verified = (
        trusted is not None and trusted.boot == store.boot_id() and trusted.image == layer.filename
    )
    node.clear(layer.id)
    _make_room(layer, how, node, config)
    tree, source = node.tree(layer.id), published.repository.image(layer)
    image = node.image(layer.id)
    workspace = node.workspace(layer.id)
    try:
        advance = progress.copying(layer.origin, layer.image.size) if progress else None
        if layer.image.format == "squashfs":
            if not (os.path.exists(image) and (verified or transfer.is_image(image, layer.image))):
                copied = os.path.join(workspace, "image")
                transfer.copy(source, layer.image, copied, advance=advance)
                os.rename(copied, image)
            if how == MOUNTED and not _mounted(image, tree, config["stage.how"], progress):
                how = EXTRACTED
                _make_room(layer, how, node, config)
            if how == EXTRACTED:
                squashfs.extract(image, os.path.join(workspace, "tree"))
                os.unlink(image)
        else:
            allowed = _links_out(published.manifest, layer, config["local_prefixes"])
            _extract_archive(source, layer, os.path.join(workspace, "tree"), allowed, advance)
        if how == EXTRACTED:
            if moved:
                from stager import retarget

                retarget.rewrite(os.path.join(workspace, "tree"), published.manifest, layer, node)
            os.rename(os.path.join(workspace, "tree"), tree)
        size = layer.image.size if how == MOUNTED else layer.size
        node.set_ready(layer.id, Stamp(layer.filename, how, store.boot_id(), size))
    except BaseException:
        node.clear(layer.id)
        raise
    finally:
        fsutil.remove_tree(workspace)
    return how


def _mounted(image: str, tree: str, wanted: str, progress: Progress | None) -> bool:
    """Mount an image; where that is refused, False unless mounting was asked for by name."""
    os.mkdir(tree, 0o700)
    try:
        squashfs.mount(image, tree)
    except StagerError as error:
        os.rmdir(tree)
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
    known = {one.path for one in manifest.findings if one.code in ("link", "dangling")}
    places = (*local, *(one.destination for one in manifest.layers))

    def allowed(path: str, target: str) -> bool:
        start = os.path.dirname(os.path.join(layer.destination, path))
        absolute = os.path.normpath(os.path.join(start, target))
        if path in known or absolute == manifest.python.base:
            return True
        return any(f"{absolute}/".startswith(f"{place}/") for place in places)

    return allowed


def _extract_archive(
    source: str,
    layer: Layer,
    directory: str,
    allowed: Callable[[str, str], bool],
    advance: Callable[[int], None] | None,
) -> None:
    from stager.formats import tarzst

    tarzst.extract(
        source,
        directory,
        workers=len(os.sched_getaffinity(0)),
        max_files=layer.files,
        max_bytes=layer.size,
        allowed_links=allowed,
        progress=advance,
    )


def _choose(layer: Layer, wanted: str, moved: bool, progress: Progress | None) -> str:
    """How to make a tree here: what is asked for, else what works, mounting first."""
    if layer.image.format != "squashfs":
        if wanted == "mount":
            raise IncompatibleError(
                f"an image in format {layer.image.format} cannot be mounted",
                hint="pack with --format squashfs, or stage with --how extract",
            )
        return EXTRACTED
    if wanted == "extract":
        return EXTRACTED
    reason = squashfs.why_not_mount()
    if moved:
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


def _make_room(layer: Layer, how: str, node: Store, config: Config) -> None:
    """Make sure that there is space for a tree, evicting unclaimed ones where needed."""
    size = layer.image.size if how == MOUNTED else layer.size + layer.image.size
    files = 0 if how == MOUNTED else layer.files
    if how == EXTRACTED and os.statvfs(node.root).f_flag & os.ST_NOEXEC:
        raise IncompatibleError(
            f"the store {node.root} is on a file system mounted noexec",
            hint="choose another store (--store, STAGER_STORE), or install squashfuse",
        )
    if _fits(node, size, files):
        return
    from stager import collect

    collect.collect(node, max_size=config["collect.max_size"], min_free=size + _MARGIN)
    if not _fits(node, size, files):
        info = os.statvfs(node.root)
        lacking = "inodes" if info.f_files and info.f_favail < files + _MARGIN_INODES else "space"
        raise NoSpaceError(
            f"not enough {lacking} in the store {node.root}: {size >> 20} MiB in {files} files are"
            f" needed, {node.free() >> 20} MiB are free",
            hint="`stager collect` frees what no job uses; or choose another store (--store)",
        )


def _fits(node: Store, size: int, files: int) -> bool:
    info = os.statvfs(node.root)
    enough = info.f_bavail * info.f_frsize >= size + _MARGIN
    return enough and (not info.f_files or not files or info.f_favail >= files + _MARGIN_INODES)


def _require(manifest: Manifest) -> None:
    """Refuse an environment that cannot run on this machine, before any byte is copied."""
    import platform

    needed = manifest.platform
    if needed.machine != platform.machine():
        raise IncompatibleError(
            f"the environment was packed on {needed.machine}; this node is {platform.machine()}",
            hint="pack it on a machine like the nodes",
        )
    here = platform.libc_ver()
    if needed.glibc and here[0] == "glibc" and _version(here[1]) < _version(needed.glibc):
        raise IncompatibleError(
            f"the environment needs glibc {needed.glibc}; this node has {here[1]}",
            hint="pack it on a machine as old as the nodes",
        )
    base = manifest.local_base
    if base and not os.access(base, os.X_OK):
        raise IncompatibleError(
            f"the environment's base Python {base} is missing on this node",
            hint="leave its directory out of the key `local_prefixes`, so that it is packed too",
        )


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def _try(manifest: Manifest, node: Store) -> None:
    """Start the staged Python once: the surest test of everything that can be wrong with it."""
    import subprocess

    python = os.path.join(node.tree(manifest.top.id), manifest.python.executable)
    try:
        answer = subprocess.run(
            [
                python,
                "-I",
                "-S",
                "-B",
                "-c",
                "import sys; print('%d.%d.%d' % sys.version_info[:3])",
            ],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=60,
            check=False,
            text=True,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = error.strerror if isinstance(error, OSError) else "it does not end"
        raise IncompatibleError(
            f"the staged Python does not start: {python}: {reason}",
            hint="is the store's file system mounted noexec? `stager doctor` tells",
        ) from error
    if answer.returncode != 0:
        said = answer.stderr.strip().splitlines()
        raise IncompatibleError(
            f"the staged Python does not start: {said[-1] if said else answer.returncode}",
            hint="`stager doctor` tells what this node lacks",
        )
    found, packed = answer.stdout.strip().split(".")[:2], manifest.python.version.split(".")[:2]
    if found != packed:
        raise IncompatibleError(
            f"the environment needs Python {'.'.join(packed)}; the node's base Python is"
            f" {answer.stdout.strip()}",
            hint="leave its directory out of the key `local_prefixes`, so that it is packed too",
        )


def release(node: Store, holder: str, layers: Iterable[str] | None = None) -> int:
    """Drop a holder's claims; returns how many trees it had."""
    if layers is None:
        return node.release(holder)
    return sum(node.release(holder, layer) for layer in layers)
