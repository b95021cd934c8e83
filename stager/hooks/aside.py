"""What root does beside the worker, in a process of its own: something may keep it waiting."""

from __future__ import annotations

import json
import os
import signal
from typing import Any, Callable

from stager import events, jobstate, privilege
from stager.hooks.common import detach, explained, how_it_ended


class Aside:
    """The process; there is something to read from it when it is done.

    Args:
        what: what it does, for a message: "stages into the site's store".
        work: does it, and returns what is answered.
    """

    def __init__(self, what: str, work: Callable[[], dict[str, Any]]) -> None:
        self._what = what
        self._reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                signal.pthread_sigmask(signal.SIG_SETMASK, ())
                os.setsid()
                detach(writer)
                os.umask(0o022)
                os.chdir("/")
                os.environ.clear()
                os.environ.update(PATH=privilege.PATH, LC_ALL="C.UTF-8")
                os.write(writer, json.dumps(_tried(work)).encode())
            finally:
                os._exit(0)
        os.close(writer)

    def fileno(self) -> int:
        """For :func:`select.select`."""
        return self._reader

    def answer(self) -> bytes:
        """A JSON object: what was answered, or ``error`` and ``hint``. Ends the process."""
        told = os.read(self._reader, jobstate.MAX_MESSAGE)
        os.close(self._reader)
        by = how_it_ended(self.pid)
        if told:
            return told
        how = f"was ended by {by}" if by else "ended without a word"
        reason = f"the process that {self._what} {how}"
        return json.dumps({"error": reason, "hint": "tell your administrator"}).encode()


def _tried(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return work()
    except BaseException as error:
        reason, hint = explained(error)
        return {"error": events.clean(reason, 600), "hint": events.clean(hint, 300)}
