"""Processes that extract: forked, so that an image's frames are in memory that all share."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import struct
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, Callable, NoReturn

from stager.errors import StagerError, from_data
from stager.formats.tarzst.index import write_all

MAX_WORKERS = 128  # so that all tasks there can be fit into the smallest pipe the kernel makes
_TASK = struct.Struct("<II")  # frame number, slot


class Workers:
    """Forked processes that share one queue of tasks.

    They end when the queue is closed, which the kernel does for a parent that is killed, and they
    notice a dead parent when they report, so none goes on working for nobody.
    """

    def __init__(self, count: int, work: Callable[[int, int], dict[str, Any]]) -> None:
        self._pids: dict[int, int] = {}  # by the descriptor that the worker reports to
        self._received: dict[int, bytes] = {}
        self._poll = select.poll()
        tasks, self._tasks = os.pipe()
        try:
            for _ in range(count):
                self._start(tasks, work)
        except BaseException:
            self._kill()
            raise
        finally:
            os.close(tasks)

    def _start(self, tasks: int, work: Callable[[int, int], dict[str, Any]]) -> None:
        reports, report = os.pipe()
        try:
            with warnings.catch_warnings():
                # Other threads of the caller do not matter: a worker takes no lock they may hold.
                warnings.simplefilter("ignore", DeprecationWarning)
                pid = os.fork()
        except OSError as error:
            os.close(reports)
            os.close(report)
            raise StagerError(
                f"cannot start a worker process: {error.strerror}",
                hint="a limit on processes or memory is in force; try fewer workers",
            ) from error
        if pid == 0:
            # Ends held here would hide from the others that the parent is gone.
            _work(tasks, report, work, close=(self._tasks, reports, *self._pids))
        os.close(report)
        self._pids[reports] = pid
        self._received[reports] = b""
        self._poll.register(reports, select.POLLIN)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            os.close(self._tasks)
            self._reap()
        else:
            self._kill()

    def submit(self, number: int, slot: int) -> None:
        """Queue a frame. The queue is a pipe; it holds more tasks than there are slots."""
        with contextlib.suppress(BrokenPipeError):  # all have died: results() will say so
            os.write(self._tasks, _TASK.pack(number, slot))

    def results(self) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """Wait for reports: frame number, slot, report.

        Raises:
            StagerError: what a worker met, or that one died.
        """
        for fd, _ in self._poll.poll():
            data = os.read(fd, 1 << 16)
            if not data:
                os.close(fd)
                raise _died(_wait(self._pids.pop(fd)))
            *lines, self._received[fd] = (self._received[fd] + data).split(b"\n")
            for line in lines:
                number, slot, report = json.loads(line)
                if "error" in report:
                    raise from_data(report)
                yield number, slot, report

    def _kill(self) -> None:
        os.close(self._tasks)
        for pid in self._pids.values():
            os.kill(pid, signal.SIGKILL)
        self._reap()

    def _reap(self) -> None:
        for fd, pid in self._pids.items():
            _wait(pid)
            os.close(fd)


def _wait(pid: int) -> int:
    """Wait for a process to end, and tell its status."""
    try:
        return os.waitpid(pid, 0)[1]
    except ChildProcessError:  # the caller ignores SIGCHLD, so the kernel told nobody
        return 0


def _died(status: int) -> StagerError:
    if os.WIFSIGNALED(status):
        how = f"was killed by signal {os.WTERMSIG(status)}"
    else:
        how = f"ended with status {os.WEXITSTATUS(status)}"
    return StagerError(
        f"a worker process of the extraction {how}",
        hint="was there too little memory? Ask for more, or allow fewer workers",
    )


def _work(
    tasks: int, report: int, work: Callable[[int, int], dict[str, Any]], *, close: Iterable[int]
) -> NoReturn:
    """What a worker process does; never returns into the caller's code."""
    try:
        for fd in close:
            os.close(fd)
        # The parent takes care of an interrupted terminal; its handlers are not meant for us.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.umask(0)
        while True:
            task = os.read(tasks, _TASK.size)
            if not task:
                os._exit(0)
            number, slot = _TASK.unpack(task)
            try:
                result = work(number, slot)
            except BaseException as error:
                result = _described(error).as_data()
            write_all(report, json.dumps([number, slot, result]).encode() + b"\n")
    finally:
        os._exit(1)


def _described(error: BaseException) -> StagerError:
    if isinstance(error, StagerError):
        return error
    return StagerError(f"extraction failed: {type(error).__name__}: {error}")
