"""PBS: the allocation we are in, and how to start something on each of its nodes.

What the environment tells is from qsub(1B) and pbs_task(3) of OpenPBS; Torque has the same.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping

from stager.schedulers import PBS, Allocation, file_name

TIMEOUT = 10.0
"""Seconds to wait for qstat."""

_UNKNOWN, _FINISHED = 153, 35
"""Exit statuses of qstat: PBSE_UNKJOBID and PBSE_HISTJOBID of pbs_error.h, modulo 256."""


def allocation(environ: Mapping[str, str]) -> Allocation | None:
    """The allocation we are in, or None outside of any; `environ` are our variables.

    Without a list of its nodes, as in a task on another node than the first, it is one node.
    """
    job = environ.get("PBS_JOBID", "")
    if not re.match(r"\d", job):
        return None
    hosts = list(first_entries(environ))
    # A rerun may have other nodes; the number of its run is not told.
    run = zlib.crc32("\n".join(hosts).encode(errors="surrogateescape"))
    task = environ.get("PBS_TASKNUM", "").lstrip("0")  # OpenPBS: eight hex digits, the node first
    return Allocation(
        PBS,
        file_name(job),
        (max(1, len(hosts)),),
        task if task != "1" else "",
        str(run),
        os.uname().nodename,
    )


def first_entries(environ: Mapping[str, str]) -> dict[str, int]:
    """The nodes of the job, and for each its first line in the list that pbsdsh counts by."""
    try:
        with open(environ.get("PBS_NODEFILE", ""), encoding="utf-8", errors="replace") as file:
            lines = [line.strip() for line in file if line.strip()]
    except OSError:
        return {}
    found: dict[str, int] = {}
    for number, name in enumerate(lines):
        found.setdefault(name, number)
    return found


def job_exists(job: str) -> bool | None:
    """Tell whether a job is still queued, running or exiting.

    Args:
        job: its id as a file name.

    Returns:
        None where nobody could tell.
    """
    import subprocess

    match = re.match(r"(\d+)(?:_(\d*)_)?(\..*)?\Z", job)
    if match is None:
        return None
    part = "" if match[2] is None else f"[{match[2]}]"
    try:
        answer = subprocess.run(
            [_qstat(), f"{match[1]}{part}{match[3] or ''}"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if answer.returncode in (_UNKNOWN, _FINISHED):
        return False
    return True if answer.returncode == 0 else None


def _qstat() -> str:
    """Where qstat is: a file of /etc/profile.d puts it on PATH, for login shells alone."""
    import shutil

    found = shutil.which("qstat")
    if found is not None:
        return found
    try:
        path = os.environ.get("PBS_CONF_FILE", "/etc/pbs.conf")
        with open(path, encoding="utf-8", errors="replace") as file:
            match = re.search(r"^PBS_EXEC=(\S+)", file.read(), re.MULTILINE)
    except OSError:
        match = None
    return f"{match[1]}/bin/qstat" if match else "qstat"
