"""Images that are copied into the store while it is still being looked at what to stage.

Whether an original changed is asked of shared storage, name by name; so is its image. A Prolog that
did one after the other would keep the job longer.
"""

from __future__ import annotations

import functools
import time
from typing import Callable

from stager import fsutil, store
from stager.config import Config
from stager.manifest import Layer
from stager.repository import Published
from stager.store import MOUNTED, RECEIVED, Stamp, Store, boot_id


class Fetcher:
    """Sees to it that squashfs images are in the store and verified, each in a thread.

    An image that turns out not to be wanted stays, as a pushed one would: until it is collected.

    Args:
        node: the store; None where there is none, and then nothing is done.
        config: its bounds.
        until: the moment (CLOCK_MONOTONIC) when to give up waiting for others.
    """

    def __init__(self, node: Store | None, config: Config, until: float) -> None:
        self.node, self.config, self.until = node, config, until
        self._started: dict[str, _Fetch] = {}

    def start(self, published: Published) -> None:
        """Begin; what goes wrong is told by :meth:`wait`."""
        if self.node is None:
            return
        for layer in published.manifest.layers:
            known = layer.image.format != "squashfs" or layer.filename in self._started
            if not known and not _is_verified(self.node, layer):
                work = functools.partial(_fetch, published, layer, self.node, self.config)
                self._started[layer.filename] = _Fetch(work, self.until)

    def wait(self, published: Published) -> None:
        """Return when the images of an environment are in the store.

        Raises:
            StagerError: one cannot be copied.
        """
        self.start(published)
        for layer in published.manifest.layers:
            if layer.filename in self._started:
                self._started[layer.filename].end()


class _Fetch:
    """One image on its way."""

    def __init__(self, work: Callable[[float], None], until: float) -> None:
        import threading  # a warm start does without

        self._work, self._until = work, until
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Wait for it; raises what went wrong."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            with store.blame_node("copy an image into the store"):
                self._work(self._until)
        except BaseException as error:
            self._error = error


def _is_verified(node: Store, layer: Layer) -> bool:
    stamp = node.stamp(layer.id)
    return stamp is not None and stamp.boot == boot_id()


def _fetch(published: Published, layer: Layer, node: Store, config: Config, until: float) -> None:
    from stager import trees

    with node.lock(layer.id, timeout=max(0.0, until - time.monotonic())):
        if _is_verified(node, layer):
            return  # somebody else was faster
        trees.make_room(layer, MOUNTED, node, config)
        workspace = node.workspace(layer.id)
        try:
            trees.fetch(published, layer, node, workspace)
            # Staging would read it once more if this did not say that it was summed up.
            stamp = Stamp(layer.filename, RECEIVED, boot_id(), layer.image.size)
            node.set_ready(layer.id, stamp)
        finally:
            fsutil.remove_tree(workspace)
