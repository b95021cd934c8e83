"""The note that a stage leaves for the next one, see :mod:`stager.warm`, which reads it."""

from __future__ import annotations

import contextlib
import os
import time

from stager import freshness, fsutil, lookup
from stager.config import Config
from stager.errors import StagerError
from stager.ref import Ref
from stager.repository import Published
from stager.staging import allocation
from stager.staging.store import Store
from stager.warm import boot_id, identity, inputs, note_path

_OLD = 86400.0
"""Seconds after which a note is removed when another one is written."""


def remember(wish: str, published: Published, config: Config, holder: str) -> None:
    """Leave a note of a stage that has just succeeded; nothing happens where none can be made.

    Args:
        wish: what the user typed: the name of one environment.
        published: what was found under it.
        config: as it was loaded, nothing set after that.
        holder: who claimed it.
    """
    manifest, path = published.manifest, note_path(wish)
    if wish != manifest.name or not path or any(one.tree for one in manifest.watches):
        return
    with contextlib.suppress(OSError, StagerError):
        fields = [inputs(wish, boot_id()), "" if holder.startswith("pid-") else holder]
        for name, was in config.files.items():
            fields += ["same", was, name]
        for one in lookup.repositories(config):
            was = identity(one.ref(wish))
            fields += ["same", was, one.ref(wish)]
            found = one.find(Ref(name=wish))
            if found is not None:
                if found.digest != published.digest:
                    return  # it was packed again meanwhile
                break
        # What they are now, and after that the look whether they have changed: not between them.
        if config["stage.on_stale"] != "ignore":
            for watch in manifest.watches:
                fields += ["same", identity(watch.path), watch.path]
            if not all(map(freshness.is_untouched, manifest.watches)):
                return  # the whole way looks into the directories each time
        node = Store(config["store"])
        for layer in manifest.layers:
            was = identity(f"{node.root}/ready/{layer.id}")
            stamp = node.ready(layer.id)
            if stamp is None or allocation.foreign(node, layer) is not None:
                return
            fields += [stamp.how, was, node.tree(layer.id)]
        fsutil.own_directory(os.path.dirname(os.path.dirname(path)), "store")
        with contextlib.suppress(FileExistsError):
            os.mkdir(os.path.dirname(path), 0o700)
        data = "\0".join(fields).encode("utf-8", "surrogateescape")
        fsutil.write_atomic(path, data, mode=0o600, durable=False)
        _sweep(os.path.dirname(path))


def _sweep(directory: str) -> None:
    for name in os.listdir(directory):
        path = os.path.join(directory, name)
        if time.time() - os.lstat(path).st_mtime > _OLD:
            os.unlink(path)
