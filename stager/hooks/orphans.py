"""What a user's processes leave running behind them in a hook: it is in no job's cgroup.

A pack runs the environment's Python and conda's activation scripts; any of these may start a daemon
in a session of its own. With prctl(2)'s ``PR_SET_CHILD_SUBREAPER`` such processes become children
of the worker and not of init, and can be found and ended.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Container, Iterator

from stager import privilege
from stager.formats import squashfs

_PR_SET_CHILD_SUBREAPER = 36
_LIMIT = 1.0
"""Seconds; what hangs in a dead file system is not waited for."""


def adopt() -> None:
    """Become the parent of what our children leave running."""
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end() -> None:
    """End all our children but the servers of mounts, for which trees are left to the next job."""
    until = time.monotonic() + _LIMIT
    servers = {os.path.realpath(one) for one in squashfs.helpers(privilege.PATH)}
    while time.monotonic() < until:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        left = [*_children(servers)]
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        if not left:
            return
        time.sleep(0.01)  # what they have started in turn becomes ours


def _children(servers: Container[str]) -> Iterator[int]:
    """Our children that serve no mount."""
    me = str(os.getpid()).encode()
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            with open(f"/proc/{name}/stat", "rb") as file:
                words = file.read().rpartition(b")")[2].split()
            if words[1] == me and words[0] != b"Z" and _program(name) not in servers:
                yield int(name)


def _program(pid: str) -> str:
    """The program of a process; one that is ending has none any more."""
    try:
        return os.readlink(f"/proc/{pid}/exe")
    except OSError:
        return ""
