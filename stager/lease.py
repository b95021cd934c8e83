"""Who holds a lease, and whether the holder still lives.

A holder is a file name: ``slurm-<job>``, ``pbs-<job>``, or ``pid-<process>-<start time>-<boot>``.
"""

from __future__ import annotations

import os
import re

from stager import schedulers
from stager.store import boot_id

_PROCESS = re.compile(r"pid-(\d+)-(\d+)-([0-9a-f]{8})\Z")


def of_process(pid: int) -> str:
    """The holder that a process is; its start time tells it from a later one with its number."""
    return f"pid-{pid}-{_start_time(pid)}-{boot_id()[:8]}"


def of_job_or_process(pid: int) -> str:
    """The job we run in, or outside of any the given process."""
    job = schedulers.current()
    return f"{job.scheduler}-{job.id}" if job is not None else of_process(pid)


def is_alive(holder: str) -> bool:
    """Tell whether a holder may still use what it claims.

    A job counts as alive: its end is the epilogue's to know (``stager release``).
    """
    match = _PROCESS.match(holder)
    if match is None:
        return True
    pid, start, boot = int(match[1]), match[2], match[3]
    return boot == boot_id()[:8] and _start_time(pid) == start


def _start_time(pid: int) -> str:
    """Clock ticks after boot at which a process started (proc(5), field 22), or ``0``."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The second field is the program's name in brackets, which may hold spaces.
            return file.read().rpartition(b")")[2].split()[19].decode()
    except (OSError, IndexError):
        return "0"


def parent() -> int:
    """The process that called us: a shell, for ``activate`` and ``stage``."""
    return os.getppid()
