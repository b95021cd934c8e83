"""The node's side of a push: ``stager receive``, started by ssh, at work on its standard streams.

A complete and verified image is left in the store with a stamp, so that the next ``stager stage``
mounts or extracts it without reading anything from shared storage, and without verifying it again
in this boot. What can be done now and lasts, extracting, is done now; a mount is left to the job:
one made here would be served by a process of the login's session, and end with it wherever
sessions are cleaned up (``KillUserProcesses`` of logind, ``pam_slurm_adopt``), and a job with a
mount namespace of its own would not see it. Mounting takes milliseconds.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, Callable

from stager import fsutil, manifest
from stager.checksum import crc32
from stager.config import Config
from stager.errors import NODE, BusyError, IntegrityError, NoSpaceError, StagerError
from stager.manifest import Layer, Manifest
from stager.push import protocol
from stager.push.protocol import Outcome, Reader, Request
from stager.repository import Published, Repository
from stager.staging import allocation, fitness, lease, store, trees
from stager.staging.stage import HIT
from stager.staging.store import EXTRACTED, MOUNTED, Store

_PIECE = 1 << 20
HAD = "had"


class Receiver:
    """One push into this node's store.

    Args:
        config: ``store``, ``stage.*`` and ``collect.*`` are used.
        source: file descriptor that the pusher's words come from.
        target: file descriptor for our answers.
    """

    def __init__(self, config: Config, source: int, target: int) -> None:
        self._config = config
        self._source, self._target = source, target
        self._reader = Reader(self._receive)
        self._idle = protocol.Settings().idle_timeout
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._arrivals = _Arrivals()
        self._gone: list[Callable[[], None]] = []

    def run(self) -> int:
        """Receive; returns the exit status. Errors are told to the pusher."""
        try:
            self._answer(protocol.greeting())
            self._answer({"done": self._push()})
        except StagerError as error:
            with contextlib.suppress(OSError):
                self._answer(error.as_data())
            return error.exit_code
        except OSError as error:
            failure = fsutil.explain(error, "receive", blame=NODE)
            with contextlib.suppress(OSError):
                self._answer(failure.as_data())
            return failure.exit_code
        finally:
            self._ended.set()
        return 0

    def _push(self) -> str:
        request, published = self._request()
        found = published.manifest
        fitness.require(found)
        node = Store(self._config["store"])
        holder = lease.of_process(os.getpid())
        with self._alive(), _claimed(found, node, holder):
            with self._handing_on(request, published):
                received = [self._take(layer, node) for layer in found.layers]
            how = self._stage(request, published, node, holder)
        return how or (store.RECEIVED if any(received) else HAD)

    def _request(self) -> tuple[Request, Published]:
        request = protocol.read_request(protocol.decode(self._reader.line()))
        self._idle = request.settings.idle_timeout
        data = self._reader.exactly(request.size)
        if manifest.digest(data) != request.digest:
            raise IntegrityError("the manifest did not arrive whole", hint="push again")
        # Every image is in the store before anything would look for it elsewhere.
        nowhere = Repository(os.path.join(self._config["store"], "received"))
        return request, Published(manifest.decode(data, "that was sent"), data, nowhere)

    # -- one layer ---------------------------------------------------------------------------

    def _take(self, layer: Layer, node: Store) -> bool:
        """Receive a layer's image, unless the node has it; whether it was received."""
        doing = "receive into the store"
        with (
            store.blame_node(doing),
            node.lock(layer.id, timeout=self._config["stage.timeout"]),
        ):
            if self._has(layer, node):
                self._arrivals.has(layer, node.image(layer.id))
                self._answer({"layer": layer.id, "has": True})
                return False
            path = node.partial(layer.id, layer.filename)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(path, flags, 0o600)
            try:
                self._fill(fd, layer, node)
            except (NoSpaceError, IntegrityError, OSError):
                os.unlink(path)  # the space is needed, or the bytes are wrong
                raise
            finally:
                os.close(fd)
            node.place(layer.id, path, layer.filename, layer.image.size)
            self._answer({"layer": layer.id, "has": True})
            return True

    def _has(self, layer: Layer, node: Store) -> bool:
        if node.ready(layer.id) is not None:
            return True
        if not trees.is_present(layer, node):
            return False
        node.set_received(layer.id, layer.filename, layer.image.size)
        return True

    def _fill(self, fd: int, layer: Layer, node: Store) -> None:
        """Take in what is missing of an image, and verify all of it."""
        size = layer.image.size
        if os.fstat(fd).st_size > size:
            os.ftruncate(fd, 0)
        total, offset = 0, 0
        while piece := os.read(fd, _PIECE):  # what an earlier push has brought
            total, offset = crc32(piece, total), offset + len(piece)
        trees.make_room(layer, MOUNTED, node, self._config, present=offset)
        self._arrivals.begin(layer, fd, offset)
        self._answer({"layer": layer.id, "send": offset})
        while offset < size:
            piece = self._reader.some(min(_PIECE, size - offset))
            if not piece:
                raise StagerError(
                    f"the connection ended after {offset} of {size} bytes", hint="push again"
                )
            total, offset = crc32(piece, total), offset + len(piece)
            view = memoryview(piece)
            while view:
                view = view[os.write(fd, view) :]
            self._arrivals.grow(layer, offset)
        if total != layer.image.crc32:
            raise IntegrityError(
                f"the image arrived damaged: its checksum is {total:08x}, not"
                f" {layer.image.crc32:08x}",
                hint="push again; if that does not help, pack the environment again",
            )
        os.fsync(fd)

    # -- all of them -------------------------------------------------------------------------

    def _stage(self, request: Request, published: Published, node: Store, holder: str) -> str:
        """Do what is wanted with the images; how, or empty where nothing had to be done."""
        wanted = request.settings.stage
        if wanted == protocol.NOTHING:
            return ""
        extracts = all(
            trees.choose(layer, node, self._config["stage.how"]) == EXTRACTED
            for layer in published.manifest.layers
        )
        if wanted == protocol.LASTING and not extracts:
            return ""
        done = allocation.stage_here(published, self._config, holder=holder)
        return "" if done.how == HIT else done.how

    @contextlib.contextmanager
    def _handing_on(self, request: Request, published: Published) -> Iterator[None]:
        """Serve other nodes with what arrives, while it arrives; each of them verifies it."""
        if not request.share:
            yield
            return
        try:
            from stager.push.sending import Parcel, Pusher
            from stager.push.ssh import Network

            network = Network(request.settings)
        except StagerError as error:
            self.note(f"cannot serve other nodes: {error.message}")
            yield
            return
        self._gone.append(network.close)
        self._arrivals.wanted = True
        parcel = Parcel(published.manifest, published.data, self._arrivals.open)
        pusher = Pusher(parcel, request.settings, network, self)

        def serve() -> None:
            with contextlib.suppress(OSError):  # nobody listens any more
                pusher.relay(request.share)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            self._arrivals.fail()
            network.close()
            raise
        finally:
            thread.join()
            self._arrivals.close()

    # what a Pusher reports

    def sent(self, node: str, count: int) -> None:
        """Only the whole is told."""

    def done(self, outcome: Outcome) -> None:
        """A node that was served by us has it."""
        self._answer({"relayed": outcome._asdict()})

    def note(self, message: str) -> None:
        """Something the pusher may want to know."""
        self._answer({"note": message})

    # -- both directions ---------------------------------------------------------------------

    def _receive(self, count: int) -> bytes:
        readable, _, _ = select.select([self._source], [], [], self._idle)
        if not readable:
            raise BusyError(f"nothing came from the pusher for {self._idle:g} s")
        return os.read(self._source, count)

    def _answer(self, message: Mapping[str, Any]) -> None:
        view = memoryview(protocol.encode(message))
        with self._lock:
            while view:
                view = view[os.write(self._target, view) :]

    @contextlib.contextmanager
    def _alive(self) -> Iterator[None]:
        """Say something now and then: waiting for a lock or extracting may take a while."""

        def beat() -> None:
            # Often, for it is also how one notices that the pusher has gone.
            while not self._ended.wait(min(2.0, self._idle / 4)):
                try:
                    self._answer({"alive": time.monotonic()})
                except OSError:  # nobody listens any more
                    for end in self._gone:
                        end()
                    return

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        yield


class _Arrivals:
    """The images as they arrive, for those who read them meanwhile, where that is wanted."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._files: dict[str, int] = {}
        self._sizes: dict[str, int] = {}
        self._failed = False
        self.wanted = False

    def has(self, layer: Layer, path: str) -> None:
        """An image was here already; where only the tree is, nobody can be served."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self.fail()
            return
        self.begin(layer, fd, layer.image.size)
        os.close(fd)

    def begin(self, layer: Layer, fd: int, size: int) -> None:
        """An image begins to arrive; so much of it is there."""
        if not self.wanted:
            return
        with self._changed:
            self._files[layer.id] = os.dup(fd)  # ours, wherever the file goes
            self._sizes[layer.id] = size
            self._changed.notify_all()

    def grow(self, layer: Layer, size: int) -> None:
        """So much of it is there now."""
        with self._changed:
            self._sizes[layer.id] = size
            self._changed.notify_all()

    def fail(self) -> None:
        """Nothing more comes."""
        with self._changed:
            self._failed = True
            self._changed.notify_all()

    def close(self) -> None:
        """Nobody reads any more."""
        for fd in self._files.values():
            os.close(fd)

    @contextlib.contextmanager
    def open(self, layer: Layer) -> Iterator[_Arrival]:
        """Read an image that is arriving, or will."""
        yield _Arrival(self, layer.id)

    def read(self, layer_id: str, offset: int, count: int) -> bytes:
        """At least one byte from there, once it has come.

        Raises:
            StagerError: it will not.
        """
        with self._changed:
            while self._sizes.get(layer_id, 0) <= offset:
                if self._failed:
                    raise StagerError("the image did not arrive at the node that hands it on")
                self._changed.wait()
            count = min(count, self._sizes[layer_id] - offset)
        return os.pread(self._files[layer_id], count, offset)


class _Arrival:
    def __init__(self, arrivals: _Arrivals, layer_id: str) -> None:
        self._arrivals, self._layer_id = arrivals, layer_id

    def read(self, offset: int, count: int) -> bytes:
        return self._arrivals.read(self._layer_id, offset, count)


@contextlib.contextmanager
def _claimed(found: Manifest, node: Store, holder: str) -> Iterator[None]:
    """Nothing of it is collected while the rest arrives. It is then as if it was just used."""
    for layer in found.layers:
        node.lease(layer.id, holder)
    try:
        yield
    finally:
        for layer in found.layers:
            node.release(holder, layer.id)
