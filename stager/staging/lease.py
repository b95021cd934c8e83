"""Who holds a lease, and whether the holder still lives.

A holder is a file name: ``slurm-<job>-<boot>``, ``pbs-<job>-<boot>``, or
``pid-<process>-<start time>-<boot>-<PID namespace>``; a boot is told by the first digits of its id.
"""

from __future__ import annotations

import contextlib
import os
import re
from typing import Callable

from stager import schedulers, warm
from stager.warm import boot_id

_PROCESS = re.compile(r"pid-(\d+)-(\d+)-([0-9a-f]{8})(?:-(\d+))?\Z")  # once without the last
_JOB = re.compile(r"(slurm|pbs)-(.+)-([0-9a-f]{8})\Z")
_MACHINES_OWN = 0xEFFFFFFC
"""The first PID namespace, in which all processes are seen (PROC_PID_INIT_INO of proc_ns.h)."""

start_time = warm.start_time


def of_process(pid: int) -> str:
    """The holder that a process is; its start time tells it from a later one with its number."""
    return warm.holder_of(pid, boot_id())


def of_job(scheduler: str, job: str) -> str:
    """The holder that a job is on this node, for as long as the node stays up."""
    return f"{scheduler}-{job}-{boot_id()[:8]}"


def of_job_or_process(pid: int) -> str:
    """The job we run in, or outside of any the given process."""
    job = schedulers.current()
    return of_job(job.scheduler, job.id) if job is not None else of_process(pid)


def is_alive(holder: str, exists: Callable[[str, str], bool | None] | None = None) -> bool:
    """Tell whether a holder may still use what it claims.

    Args:
        holder: who.
        exists: asks a scheduler, which comes first, whether a job still exists; None where nobody
            knows. Left out, a job counts as alive until the node's next boot: its end is the
            Epilog's to know.
    """
    match = _PROCESS.match(holder)
    if match is not None:
        if match[3] != boot_id()[:8]:
            return False
        own, its = warm.namespace(), int(match[4] or 0)
        if its and its != own:
            return own != _MACHINES_OWN or _has_processes(its)
        return _is_running(int(match[1]), match[2])
    match = _JOB.match(holder)
    if match is None:
        return True
    if match[3] != boot_id()[:8]:
        return False
    return exists is None or exists(match[1], match[2]) is not False


def _is_running(pid: int, start: str) -> bool:
    """Tell whether a process still runs; one whose start nobody may see by its number alone."""
    if start != "0":
        return start_time(pid) == start
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return start_time(pid) != "0"  # one of ours has an end that can be seen


def _has_processes(namespace: int) -> bool:
    """Tell whether any process that we may look at is in a PID namespace."""
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if os.stat(f"/proc/{name}/ns/pid").st_ino == namespace:
                return True
    return False
