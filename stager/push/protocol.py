"""What pusher and node say to each other. The protocol: ``docs/formats/push.md``.

Both sides speak JSON objects, one on each line; the bytes of the manifest and of images go between
them, in the numbers that the lines tell. Nothing here reads or writes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Callable, NamedTuple, TypeVar

import stager
from stager import manifest
from stager.errors import (
    SITE,
    IncompatibleError,
    StagerError,
)

VERSION = 1
GREETING = "stager-push"
"""The key of the node's first line; what the login shell prints before it is passed over."""

MAX_LINE = 1 << 20
MAX_MANIFEST = 64 << 20
_MAX_NOISE = 1000

LASTING, EVERYTHING, NOTHING = "lasting", "everything", "nothing"
"""What the node does with complete images: what lasts without a process (extracting), all of
``stager stage``, or nothing."""

STAGING = (LASTING, EVERYTHING, NOTHING)
LONGEST_WAIT = 1e6
"""Seconds that either side may be told to wait."""

_T = TypeVar("_T")


class Settings(NamedTuple):
    """How to reach nodes, and what is wanted of them. Nodes that hand images on get the same.

    Attributes:
        remote: the command that is stager on a node, for its shell.
        store: the store there; empty is the one that it is configured to use.
        stage: :data:`LASTING`, :data:`EVERYTHING` or :data:`NOTHING`.
        fanout: nodes that are served at the same time.
        tree: how many nodes each serves before they serve others; 0 is all.
        ssh_config: the configuration of the ssh client; empty is the user's.
        connect_timeout: seconds until a node must have let us in.
        idle_timeout: seconds for which either side may be silent.
        forward_agent: let nodes use the agent to reach others.
    """

    remote: str = "stager"
    store: str = ""
    stage: str = LASTING
    fanout: int = 32
    tree: int = 0
    ssh_config: str = ""
    connect_timeout: float = 10.0
    idle_timeout: float = 60.0
    forward_agent: bool = False


class Request(NamedTuple):
    """The pusher's first line; the manifest follows it.

    Attributes:
        size: bytes of the manifest.
        digest: their sha256.
        settings: see :class:`Settings`.
        share: the nodes that this one is to serve when it has the images.
    """

    size: int
    digest: str
    settings: Settings
    share: tuple[str, ...] = ()


class Outcome(NamedTuple):
    """What came of one node.

    Attributes:
        node: its name.
        how: ``had`` (nothing was sent), ``received``, ``extracted``, ``mounted``; empty where it
            failed.
        sent: bytes of images that went there.
        seconds: how long it took.
        via: the node that served it; empty is ours.
        error: why it failed, or empty.
        hint: what to do about it.
        blame: whose fault it is, see :mod:`stager.errors`.
        code: the exit code of that error.
    """

    node: str
    how: str = ""
    sent: int = 0
    seconds: float = 0.0
    via: str = ""
    error: str = ""
    hint: str = ""
    blame: str = ""
    code: int = 0

    @property
    def ok(self) -> bool:
        """Whether the node has it."""
        return not self.code

    @classmethod
    def failed(cls, node: str, error: StagerError, *, sent: int = 0) -> Outcome:
        """Of a node that failed."""
        return cls(node, sent=sent, **error.as_data())

    def through(self, node: str) -> Outcome:
        """The same, told by the node that served it."""
        return self._replace(via=self.via or node)


def encode(message: Mapping[str, Any]) -> bytes:
    """One line."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> dict[str, Any]:
    """Read one line.

    Raises:
        StagerError: it is none of the protocol's.
    """
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _nonsense(line) from error
    if not isinstance(message, dict):
        raise _nonsense(line)
    return message


def _nonsense(line: bytes) -> StagerError:
    shown = line[:80].decode(errors="replace").strip()
    return StagerError(
        f"the other side does not speak the protocol: {shown!r}",
        hint="something else prints to standard output there, such as a shell start-up file",
    )


def greeting() -> dict[str, Any]:
    """The node's first line."""
    return {GREETING: VERSION, "stager": stager.__version__}


def check_greeting(message: Mapping[str, Any]) -> None:
    """Refuse a node that speaks another version.

    Raises:
        IncompatibleError: it does.
    """
    if message[GREETING] != VERSION:
        raise IncompatibleError(
            f"the node's stager {message.get('stager')} speaks version {message[GREETING]} of the"
            f" protocol, this one ({stager.__version__}) version {VERSION}",
            hint="install the same stager on both, or name another with --remote-stager",
            blame=SITE,
        )


def request(value: Request) -> dict[str, Any]:
    """The pusher's first line."""
    return {"request": VERSION, **manifest.plain(value)}


def read_request(message: Mapping[str, Any]) -> Request:
    """Read the pusher's first line.

    Raises:
        StagerError: it is none.
    """
    try:
        settings = _made(Settings, message["settings"])
        share = tuple(str(node) for node in message["share"])
        size, digest = message["size"], str(message["digest"])
        waits = (settings.connect_timeout, settings.idle_timeout)
        if type(size) is not int or not 0 < size <= MAX_MANIFEST:
            raise ValueError("the size of the manifest")
        if not all(0 < wait <= LONGEST_WAIT for wait in waits) or settings.stage not in STAGING:
            raise ValueError("settings")
    except (KeyError, TypeError, ValueError) as error:
        raise _nonsense(encode(message)) from error
    return Request(size, digest, settings, share)


def _made(kind: type[_T], values: Mapping[str, Any]) -> _T:
    """Make a named tuple, each field of the type that it declares.

    Raises:
        TypeError: one is of another type, unknown or missing.
    """
    made = kind(**values)
    for name, declared in manifest.declarations(kind):
        value = getattr(made, name)
        if declared == "float" and type(value) is int:
            continue
        if type(value).__name__ != declared:
            raise TypeError(f"`{name}` is of another type")
    return made


def outcome(message: Mapping[str, Any]) -> Outcome:
    """Read what a node tells of another.

    Raises:
        StagerError: it is none.
    """
    try:
        return _made(Outcome, message)
    except TypeError as error:
        raise _nonsense(encode(message)) from error


def done(message: Mapping[str, Any]) -> str:
    """Read how a node says that it has got what was sent.

    Raises:
        StagerError: it is none of the words of :class:`Outcome`.
    """
    how = message["done"]
    if how not in ("had", "received", "extracted", "mounted"):
        raise _nonsense(encode(message))
    return str(how)


@dataclass
class Reader:
    """Lines, and bytes between them, from anything that is read piece by piece.

    Args:
        receive: gives at most so many bytes, and none at the end.
    """

    receive: Callable[[int], bytes]
    _buffer: bytes = field(default=b"", init=False)

    def line(self) -> bytes:
        """The next line; an empty one is the end.

        Raises:
            StagerError: it is too long to be one of the protocol's.
        """
        while b"\n" not in self._buffer:
            if len(self._buffer) > MAX_LINE:
                raise _nonsense(self._buffer)
            more = self.receive(1 << 16)
            if not more:
                line, self._buffer = self._buffer, b""
                return line if line.endswith(b"\n") else b""
            self._buffer += more
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line + b"\n"

    def some(self, count: int) -> bytes:
        """At most so many of the next bytes; none at the end."""
        if self._buffer:
            piece, self._buffer = self._buffer[:count], self._buffer[count:]
            return piece
        return self.receive(count)

    def exactly(self, count: int) -> bytes:
        """So many bytes, or fewer at the end."""
        pieces = []
        while count:
            piece = self.some(count)
            if not piece:
                break
            pieces.append(piece)
            count -= len(piece)
        return b"".join(pieces)

    def greeting(self) -> dict[str, Any] | None:
        """The node's first line, after whatever its login shell has printed; None at the end.

        Raises:
            StagerError: it prints too much.
        """
        for _ in range(_MAX_NOISE):
            line = self.line()
            if not line:
                return None
            if line.startswith(b'{"' + GREETING.encode() + b'":'):
                return decode(line)
        raise _nonsense(line)
