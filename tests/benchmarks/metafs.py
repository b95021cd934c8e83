"""A read-only file system that stands for a parallel one: it takes its time, and writes down all
that it is asked.

    with Metafs(backing, "/home", {"n1": pid1, "n2": pid2}, COLD_LUSTRE) as shared:
        start = shared.mark()
        ...                                # a job on n1 and n2
        ledger = shared.ledger(start)
        print(ledger.count(), ledger.below("/home/alice/envs").count())

As a program, as root: what ``COMMAND`` asks for (``--help`` tells more)::

    .venv/bin/python tests/benchmarks/metafs.py --setting cold-lustre DIRECTORY MOUNTPOINT COMMAND
    .venv/bin/python tests/benchmarks/metafs.py --overhead

It is a FUSE file system (mfusepy on libfuse's high-level interface), mounted once for each node, in
the node's mount namespace. The model:

- One metadata service for all nodes answers one operation after the other at a rate R; an answer is
  on its way for L. Whoever asks waits for both.
- Data has a bandwidth for all, one for each node and one for each object server. A file lies on one
  server, by its path, unless its path matches a pattern for wide ones.
- What a Lustre client keeps while it holds locks is kept as long as the mount lives: directory
  entries, also those that are not there, attributes, targets of links, pages of directories, data.
- Not kept are open and close: one operation each, every time. Where an open follows, by the same
  thread, the lookup of its path, the ledger has both, but a Lustre client sends one RPC (open with
  intent), so only the lookup takes time: ``Operation.asked``. (``stat`` and then ``open`` looks the
  same from here, and costs a real client two: direct use of an environment is judged kindly.)
- Each component of a path is one lookup, once for each mount.
- Closing a directory, and the end of a program that was run, are asked but not waited for.

Not modelled: writing, lock revocation (nobody writes), statahead, the size of a file that a Lustre
client asks of the object servers, and everything of the network but what is said above.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType

TESTS = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(TESTS)

from benchmarks.ledger import Ledger, Operation  # noqa: E402
from benchmarks.settings import ALL, NONE, Settings  # noqa: E402

LIMIT = 30.0
"""Seconds for starting and for ending."""


class Metafs:
    """The file system, from when the context is entered until it is left. Needs root.

    Args:
        directory: what it shows. It is only read; others may change it meanwhile, but a node that
            has seen it before does not see that.
        target: where it is mounted, on all nodes.
        nodes: for each a process in whose mount namespace that is; None stands for our own.
        settings: see :mod:`benchmarks.settings`.

    Raises:
        RuntimeError: it could not be mounted; what was written to standard error tells why.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        target: str,
        nodes: Mapping[str, int | None],
        settings: Settings = NONE,
    ) -> None:
        self.settings = settings
        self.dilation = 1.0
        self.nodes = tuple(nodes)
        self._order = {
            "directory": os.path.realpath(directory),
            "target": target,
            "nodes": dict(nodes),
            "settings": asdict(settings),
        }
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Metafs:
        with self._stack:
            # In memory: each operation is written there.
            directory = tempfile.TemporaryDirectory(prefix="metafs-", dir="/dev/shm")
            name = self._stack.enter_context(directory)
            self._ledgers = Path(name)
            order = json.dumps({**self._order, "ledgers": name})
            server = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.metafs_server"],
                cwd=TESTS,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,  # ^C is for us, who unmount then
            )
            self._stack.callback(_stop, server)
            assert server.stdin is not None and server.stdout is not None
            server.stdin.write(order + "\n")
            server.stdin.flush()
            if server.stdout.readline() != "ready\n":
                raise RuntimeError("metafs could not be mounted")
            self._server = server
            self._mounted = self.mark()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def dilate(self, factor: float) -> None:
        """From now on, everything takes so many times as long as the settings say.

        For more nodes than the machine can serve; measured seconds are to be divided by it.
        """
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(f"{factor}\n")
        self._server.stdin.flush()
        if self._server.stdout.readline() != "dilated\n":
            raise RuntimeError("metafs has ended")
        self.dilation = factor

    def mark(self) -> float:
        """The moment from which on :meth:`ledger` is to count."""
        return time.monotonic()

    def ledger(self, since: float | None = None) -> Ledger:
        """What was asked until now, of all nodes; from the mounting on, if `since` does not say.

        What nobody waits for (a directory that is closed, a program that ends) may come late.
        """
        first = self._mounted if since is None else since
        return Ledger.merged(
            one
            for node in self.nodes
            for one in entries(node, (self._ledgers / node).read_bytes())
            if one.at >= first
        )


def entries(node: str, data: bytes) -> Iterator[Operation]:
    """What a node's server has written."""
    for text in data.decode(errors="surrogateescape").split("\0")[:-1]:
        at, kind, error, size, pid, asked, took, comm, path = text.split("\t", 8)
        numbers = (int(size), int(pid), int(asked), float(took))
        yield Operation(node, float(at), kind, path, error, *numbers, comm)


def _stop(server: subprocess.Popen[str]) -> None:
    assert server.stdin is not None and server.stdout is not None
    server.stdin.close()
    try:
        server.wait(LIMIT)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
        raise
    finally:
        server.stdout.close()


# -- the program -----------------------------------------------------------------------------------


def overhead(files: int = 2000) -> None:
    """Print what an operation takes by way of metafs without delays, and without metafs."""
    with tempfile.TemporaryDirectory(prefix="metafs-") as name:
        backing, target = Path(name, "backing"), Path(name, "target")
        backing.mkdir()
        target.mkdir()
        for number in range(files):
            (backing / f"file{number}").write_bytes(b"x" * 1000)
        with (backing / "large").open("wb") as file:
            for _ in range(256):
                file.write(os.urandom(1 << 20))

        def stat(directory: Path) -> list[float]:
            return [_timed(os.stat, directory / f"file{number}") for number in range(files)]

        def missing(directory: Path) -> list[float]:
            return [_timed(os.path.exists, directory / f"no{number}") for number in range(files)]

        def read(directory: Path) -> list[float]:
            return [_timed(Path.read_bytes, directory / f"file{number}") for number in range(files)]

        def large(directory: Path) -> list[float]:
            def whole() -> None:
                with (directory / "large").open("rb", buffering=0) as file:
                    while file.read(1 << 20):
                        pass

            return [_timed(whole)]

        with Metafs(backing, str(target), {"here": None}) as shared:
            for what, measure, unit in (
                ("stat of a file, 1 operation", stat, 1e6),
                ("stat of what is not there, 1 operation", missing, 1e6),
                ("stat again, 0 operations", stat, 1e6),
                ("open, read, close: 3 operations", read, 1e6),
                ("read 256 MiB", large, 1e6),
            ):
                measure(backing) if measure is large else None  # not what the disk takes
                plain = statistics.median(measure(backing)) * unit
                start = shared.mark()
                times = [one * unit for one in measure(target)]
                asked = shared.ledger(start)
                print(
                    f"{what:40} n={len(times):<5} directory {plain:9.1f} us, metafs"
                    f" min {min(times):.1f} median {statistics.median(times):.1f}"
                    f" max {max(times):.1f} us; ledger {dict(asked.kinds())}"
                )


def _timed(work: object, *arguments: object) -> float:
    start = time.perf_counter()
    work(*arguments)  # type: ignore[operator]
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description="A measuring file system; see the module's head.")
    parser.add_argument("--setting", choices=ALL, default="none")
    parser.add_argument("--dilation", type=float, default=1.0, help="make all times so much longer")
    parser.add_argument("--node", action="append", default=[], metavar="NAME=PID",
                        help="mount in the namespace of this process; default: here")  # fmt: skip
    parser.add_argument("--ledger", type=Path, help="where all operations are written, .jsonl.gz")
    parser.add_argument("--overhead", action="store_true", help="measure metafs itself")
    parser.add_argument("directory", nargs="?")
    parser.add_argument("mountpoint", nargs="?")
    parser.add_argument("command", nargs="*", help="default: a shell")
    options = parser.parse_args()
    if options.overhead:
        overhead()
        return 0
    if not options.mountpoint:
        parser.error("a directory and a mount point are needed")
    nodes: dict[str, int | None] = {"here": None}
    if options.node:
        nodes = {name: int(pid) for name, _, pid in (one.partition("=") for one in options.node)}
    settings = replace(ALL[options.setting], callers=True)
    with Metafs(options.directory, options.mountpoint, nodes, settings) as shared:
        shared.dilate(options.dilation)
        start = shared.mark()
        status = subprocess.run(
            options.command or [os.environ.get("SHELL", "/bin/sh")], check=False
        ).returncode
        ledger = shared.ledger(start)
    if options.ledger:
        ledger.write(options.ledger)
    print(json.dumps(ledger.summary(), indent=1), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
