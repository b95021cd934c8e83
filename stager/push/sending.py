"""The pushing side: one node, all nodes, and nodes that serve others.

::

    Pusher.push(nodes)
        tree: K nodes are served, each with a share of the rest, to which it hands on what arrives
        flat: whoever has not got it by then is served from here, so many at a time
"""

from __future__ import annotations

import contextlib
import os
import queue
import shlex
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Callable, NamedTuple, Protocol, TypeVar

from stager import manifest as manifests
from stager import transfer
from stager.errors import (
    NODE,
    SITE,
    IncompatibleError,
    IntegrityError,
    NotFoundError,
    StagerError,
    from_data,
    known,
)
from stager.manifest import Layer, Manifest
from stager.push import protocol
from stager.push.protocol import Outcome, Request, Settings
from stager.push.ssh import Connection, Network, Session
from stager.repository import Published

_T = TypeVar("_T")

_PIECE = 1 << 20
_PACKET = 1 << 15  # what OpenSSH's server takes at once


class Source(Protocol):
    """An image that is read."""

    def read(self, offset: int, count: int) -> bytes:
        """At least one and at most so many bytes from there; waits where they are yet to come."""


class Parcel(NamedTuple):
    """What is pushed.

    Attributes:
        manifest: the environment's.
        data: its bytes, as they are published.
        open: opens a layer's image.
    """

    manifest: Manifest
    data: bytes
    open: Callable[[Layer], contextlib.AbstractContextManager[Source]]

    @classmethod
    def of(cls, published: Published) -> Parcel:
        """What a repository has."""
        return cls(
            published.manifest,
            published.data,
            lambda layer: _opened(published.repository.image(layer), layer),
        )

    @property
    def size(self) -> int:
        """Bytes of all images."""
        return sum(layer.image.size for layer in self.manifest.layers)


class Reports(Protocol):
    """What pushing tells while it works; called from several threads, one at a time."""

    def sent(self, node: str, count: int) -> None:
        """So many more bytes went to a node."""

    def done(self, outcome: Outcome) -> None:
        """A node has it, or has failed for good."""

    def note(self, message: str) -> None:
        """Something the user may want to know."""


class Pusher:
    """Sends one environment to nodes.

    Args:
        parcel: what is sent.
        settings: how.
        network: connections; closing it ends everything.
        reports: told what happens.
    """

    def __init__(
        self, parcel: Parcel, settings: Settings, network: Network, reports: Reports
    ) -> None:
        self._parcel = parcel
        self._settings = settings
        self._network = network
        self._reports = reports
        self._lock = threading.Lock()

    def push(self, nodes: Sequence[str]) -> None:
        """Send it to all these nodes; each is reported once.

        Raises:
            NotFoundError: an image is missing here.
            IntegrityError: an image here has another size than it should have.
        """
        for layer in self._parcel.manifest.layers:
            with self._parcel.open(layer):
                pass  # told before any node is asked
        left: Sequence[str] = nodes
        if self._settings.tree:
            left = self.relay(nodes)
        in_parallel(self._last_try, left, self._settings.fanout, self._network)

    def relay(self, nodes: Sequence[str]) -> list[str]:
        """Send it by way of some of the nodes; returns those that have not got it then.

        Who gets it is reported; who does not is not: another way may still lead there.
        """
        shares = split(nodes, self._settings.tree)
        left: list[str] = []

        def serve(share: list[str]) -> None:
            missing = self._serve_share(share)
            with self._lock:
                left.extend(missing)

        in_parallel(serve, shares, len(shares), self._network)
        return left

    # -- one node ----------------------------------------------------------------------------

    def _last_try(self, node: str) -> None:
        outcome = self._serve(node, ())[0]
        self._report(self._reports.done, outcome)

    def _serve_share(self, share: list[str]) -> list[str]:
        """Send it to the first node that takes it, which serves the others."""
        left: list[str] = []
        while share:
            head, *share = share
            outcome, served = self._serve(head, tuple(share))
            share = [one for one in share if one not in served]
            if outcome.ok:
                self._report(self._reports.done, outcome)
                return left + share
            left.append(head)
        return left

    def _serve(self, node: str, share: tuple[str, ...]) -> tuple[Outcome, set[str]]:
        """Send it to one node; returns how that went, and who else has it now."""
        started = time.monotonic()
        visit = _Visit(self, node, share)
        try:
            if self._network.closed:
                raise StagerError("interrupted")
            how = visit.go()
            taken = time.monotonic() - started
            outcome = Outcome(node, how, visit.sent, round(taken, 3))
        except Exception as error:  # what a node makes us do wrong is that node's failure alone
            outcome = Outcome.failed(node, known(error), sent=visit.sent)
        return outcome, visit.served

    def _report(self, tell: Callable[..., None], *what: object) -> None:
        with self._lock:
            tell(*what)


class _Visit:
    """One node, from the login to its last word."""

    def __init__(self, pusher: Pusher, node: str, share: tuple[str, ...]) -> None:
        self._pusher = pusher
        self._node = node
        self._share = share
        self.sent = 0
        self.served: set[str] = set()

    def go(self) -> str:
        network = self._pusher._network
        connection = network.connect(self._node)
        try:
            return self._talk(connection)
        finally:
            network.forget(connection)

    def _talk(self, connection: Connection) -> str:
        settings, parcel = self._pusher._settings, self._pusher._parcel
        session = connection.start(command(settings, "receive"))
        greeting = session.reader.greeting()
        if greeting is None:
            raise not_started(*session.status(), settings, "receive")
        protocol.check_greeting(greeting)
        request = Request(
            len(parcel.data), manifests.digest(parcel.data), settings, share=self._share
        )
        with contextlib.suppress(BrokenPipeError):  # it has told why
            session.send(protocol.encode(protocol.request(request)))
            session.send(parcel.data)
        while True:
            line = session.reader.line()
            if not line:
                raise self._ended(session)
            message = protocol.decode(line)
            if "error" in message:
                raise from_data(message, blame=NODE)
            if "send" in message:
                with contextlib.suppress(BrokenPipeError):
                    self._send(session, str(message.get("layer")), message["send"])
            elif "relayed" in message:
                self._relayed(protocol.outcome(message["relayed"]))
            elif "note" in message:
                text = f"{self._node}: {message['note']}"
                self._pusher._report(self._pusher._reports.note, text)
            elif "done" in message:
                return protocol.done(message)

    def _send(self, session: Session, layer_id: str, offset: object) -> None:
        parcel, pusher = self._pusher._parcel, self._pusher
        layer = next((one for one in parcel.manifest.layers if one.id == layer_id), None)
        if layer is None or not isinstance(offset, int) or not 0 <= offset <= layer.image.size:
            raise StagerError(
                "protocol error: the node requested something that was not offered", blame=NODE
            )
        with parcel.open(layer) as source:
            while offset < layer.image.size:
                piece = memoryview(source.read(offset, _PIECE))
                for start in range(0, len(piece), _PACKET):
                    packet = bytes(piece[start : start + _PACKET])
                    session.send(packet)
                    self.sent += len(packet)
                offset += len(piece)
                pusher._report(pusher._reports.sent, self._node, len(piece))

    def _relayed(self, outcome: Outcome) -> None:
        if outcome.node in self._share and outcome.ok and outcome.node not in self.served:
            self.served.add(outcome.node)
            self._pusher._report(self._pusher._reports.done, outcome.through(self._node))

    def _ended(self, session: Session) -> StagerError:
        status, said = session.status()
        lines = [one.strip() for one in said.splitlines() if one.strip()]
        reason = f"status {status}" if status >= 0 else "the connection broke"
        return StagerError(
            f"it ended before it was done: {lines[-1] if lines else reason}",
            hint="push again: what has arrived is kept",
            blame=NODE,
        )


# -- what the verbs that ask nodes share ---------------------------------------------------------


def command(settings: Settings, *words: str) -> str:
    """A command line for the shell of a node."""
    options = ["--store", settings.store] if settings.store else []
    return f"{settings.remote} {shlex.join([*words, *options])}"


def not_started(status: int, said: str, settings: Settings, verb: str) -> StagerError:
    """Why a verb of the node's stager has not begun.

    Args:
        status: the exit status, -1 for none.
        said: what came on standard error.
        settings: how the node was asked.
        verb: the verb.
    """
    lines = [one.strip() for one in said.splitlines() if one.strip()]
    program = settings.remote
    if status in (126, 127):
        return NotFoundError(
            f"`{program}` cannot be started there: {lines[-1] if lines else f'status {status}'}",
            hint="install stager on the nodes, or say where it is: --remote-stager /path/stager;"
            " a login that runs a command may have a shorter PATH",
            blame=SITE,
        )
    if "invalid choice" in said:
        return IncompatibleError(
            f"`{program}` is too old there: it has no verb `{verb}`",
            hint="install the same stager on both, or name another with --remote-stager",
            blame=SITE,
        )
    reason = f"status {status}" if status >= 0 else "the connection broke"
    return StagerError(
        f"`{program} {verb}` did not start there: {lines[-1] if lines else reason}",
        hint=f"try `ssh NODE {program} --version`",
        blame=SITE,
    )


def in_parallel(
    work: Callable[[_T], None], items: Iterable[_T], width: int, network: Network
) -> None:
    """Do something for each, in so many threads; an interruption closes all connections.

    Raises:
        BaseException: the first that the work did, or KeyboardInterrupt.
    """
    waiting: queue.SimpleQueue[_T] = queue.SimpleQueue()
    count = 0
    for item in items:
        waiting.put(item)
        count += 1
    raised: list[BaseException] = []

    def run() -> None:
        while not raised:
            try:
                item = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                work(item)
            except BaseException as error:
                raised.append(error)

    # Daemons, for one that is being refused by a dead node must not delay the end.
    threads = [threading.Thread(target=run, daemon=True) for _ in range(min(width, count))]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException:
        raised.append(KeyboardInterrupt())  # nothing new is begun
        network.close()
        raise
    if raised:
        network.close()
        raise raised[0]


def split(nodes: Sequence[str], count: int) -> list[list[str]]:
    """So many shares of about the same size, neighbours together, none empty."""
    count = min(count, len(nodes))
    bounds = [len(nodes) * number // count for number in range(count + 1)] if count else [0]
    return [list(nodes[start:end]) for start, end in zip(bounds, bounds[1:])]


class _File:
    def __init__(self, fd: int, path: str) -> None:
        self._fd, self._path = fd, path

    def read(self, offset: int, count: int) -> bytes:
        piece = os.pread(self._fd, count, offset)
        if not piece:
            raise _truncated(self._path)
        return piece


@contextlib.contextmanager
def _opened(path: str, layer: Layer) -> Iterator[Source]:
    fd = transfer.open_image(path)
    try:
        if os.fstat(fd).st_size != layer.image.size:
            raise _truncated(path)
        yield _File(fd, path)
    finally:
        os.close(fd)


def _truncated(path: str) -> IntegrityError:
    return IntegrityError(
        f"the image {path} is truncated or damaged", hint="pack the environment again"
    )
