"""What was asked of a shared file system: one entry for each operation of each node."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

DATA = "read"
"""The one kind that is no business of the metadata service."""


class Operation(NamedTuple):
    """One operation that a node's client could not answer by itself.

    Attributes:
        node: who asked.
        at: when, by CLOCK_MONOTONIC, in seconds.
        kind: ``lookup`` (of one name in one directory), ``getattr``, ``readlink``, ``open``,
            ``close``, ``opendir``, ``readdir`` (a page), ``closedir``, ``statfs``; ``read`` is one
            of data.
        path: of what, as the node sees it.
        error: name of the error it was answered with, or empty.
        size: bytes of a read.
        pid: the thread that asked, by this machine's numbers.
        asked: 0 for an open that came with the lookup before it, see :mod:`benchmarks.metafs`.
        took: seconds of waiting for its turn and of latency, by the model.
        comm: the program's name, where the settings ask for it.
    """

    node: str
    at: float
    kind: str
    path: str
    error: str
    size: int
    pid: int
    asked: int
    took: float
    comm: str

    def __str__(self) -> str:
        return f"{self.node} {self.kind} {self.path} {self.error}".rstrip()


@dataclass(frozen=True)
class Ledger:
    """Operations in the order in which they arrived."""

    operations: Sequence[Operation]

    def __iter__(self) -> Iterator[Operation]:
        return iter(self.operations)

    def nodes(self) -> list[str]:
        return sorted({one.node for one in self.operations})

    def of(self, node: str) -> Ledger:
        return Ledger([one for one in self.operations if one.node == node])

    def metadata(self) -> Ledger:
        """All but reads of data."""
        return Ledger([one for one in self.operations if one.kind != DATA])

    def below(self, *directories: str) -> Ledger:
        """What named one of these directories or something in it; a lookup of it counts as well."""
        return Ledger(
            [
                one
                for one in self.operations
                if any(f"{one.path}/".startswith(f"{directory}/") for directory in directories)
            ]
        )

    def between(self, first: float, last: float) -> Ledger:
        return Ledger([one for one in self.operations if first <= one.at <= last])

    def count(self) -> int:
        """How many operations of metadata there were."""
        return len(self.metadata().operations)

    def requests(self) -> int:
        """How many of them a Lustre client would have sent: see ``Operation.asked``."""
        return sum(one.asked for one in self.metadata())

    def bytes(self) -> int:
        return sum(one.size for one in self.operations)

    def kinds(self) -> Counter[str]:
        return Counter(one.kind for one in self.operations)

    def summary(self) -> dict[str, object]:
        """What is kept of a run: for each node the numbers."""
        return {
            node: {
                "operations": one.count(),
                "requests": one.requests(),
                "bytes": one.bytes(),
                "kinds": dict(sorted(one.kinds().items())),
            }
            for node in self.nodes()
            for one in (self.of(node),)
        }

    def write(self, path: Path) -> None:
        """One JSON object in each line, compressed."""
        with gzip.open(path, "wt") as file:
            file.writelines(json.dumps(one._asdict()) + "\n" for one in self.operations)

    @classmethod
    def merged(cls, operations: Iterable[Operation]) -> Ledger:
        return cls(sorted(operations, key=lambda one: one.at))
