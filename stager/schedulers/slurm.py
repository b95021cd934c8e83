"""Slurm: the allocation we are in, and the few questions worth asking its controller.

What the environment tells is never asked. A question is about one job (5 ms, 0.1 ms of the
controller's time), by pyslurm where one is installed that fits this Slurm, else by ``squeue``,
which is there wherever jobs can be submitted. Nothing here is called by a job's hook, nor once per
rank.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from stager.schedulers import SLURM, Allocation

TIMEOUT = 10.0
"""Seconds to wait for an answer; with the controller down squeue itself would try for 18."""

_FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""Step ids from here on are names: batch script, interactive step, ... (slurm.h)."""
_CHOICES = ("SQUEUE_", "SLURM_CLUSTERS")
"""Variables that choose among jobs, or another cluster than the one whose nodes we are on."""
_ENDED = frozenset(
    ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY")
    + ("PREEMPTED", "REVOKED", "TIMEOUT")
)
"""States that a job never leaves: squeue(1), JOB STATE CODES."""


def allocation(environ: Mapping[str, str]) -> Allocation | None:
    """The allocation we are in, or None outside of any; `environ` are our variables."""
    job = environ.get("SLURM_JOB_ID", "")
    if not job.isdigit():
        return None
    names = ["SLURM_JOB_NUM_NODES"]
    size = environ.get("SLURM_HET_SIZE", "")
    if size.isdigit():
        names = [f"SLURM_JOB_NUM_NODES_HET_GROUP_{number}" for number in range(int(size))]
    counts = [environ.get(name, "") for name in names]
    restart = environ.get("SLURM_RESTART_COUNT", "")
    return Allocation(
        SLURM,
        job,
        tuple(int(count) if count.isdigit() else 1 for count in counts),
        step_of(environ) if _is_in_step() is not False else "",
        restart if restart.isdigit() else "0",
        environ.get("SLURMD_NODENAME", ""),
    )


def step_of(environ: Mapping[str, str]) -> str:
    """The id of the job step a process is in; empty in batch scripts and interactive shells."""
    step = environ.get("SLURM_STEP_ID", "")
    return step if step.isdigit() and int(step) < _FIRST_SPECIAL_STEP else ""


def _is_in_step() -> bool | None:
    """Tell whether slurmstepd runs us in a numbered step; None where it is no ancestor of ours.

    sbatch hands variables on: in a batch script submitted from within a step, such as the shell
    that ``srun --pty`` gave, ``SLURM_STEP_ID`` is still the other job's (seen with 22.05). What
    slurmstepd calls itself is right: ``slurmstepd: [4711.batch]``, ``[4711.0]``.
    """
    pid = os.getppid()
    while pid > 1:
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                title = re.match(rb"slurmstepd: \[(?:StepId=)?[\d+]+\.(\w+)", file.read())
            if title:
                return title[1].isdigit()
            with open(f"/proc/{pid}/stat", "rb") as file:
                # After the name in brackets, which may hold anything: state, parent (proc(5)).
                pid = int(file.read().rpartition(b")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            return None
    return None


def job_exists(job: str) -> bool | None:
    """Tell whether a job is still pending, running or completing.

    Args:
        job: its id.

    Returns:
        None where nobody could tell: no Slurm here, or its controller does not answer.
    """
    if not job.isdigit():
        return None
    try:
        found = _load(job)
    except LookupError:
        return False
    except _NoAnswer:
        return None
    return found["state"] not in _ENDED


def comment(job: str) -> tuple[str, str]:
    """The comment of a job and its working directory; empty where nobody could tell."""
    if not job.isdigit():
        return "", ""
    try:
        found = _load(job)
    except (LookupError, _NoAnswer):
        return "", ""
    return found["comment"], found["directory"]


class _NoAnswer(Exception):
    pass


def _load(job: str) -> dict[str, str]:
    """State, comment and directory of a job. Raises LookupError where there is no such job."""
    try:
        return _load_with_pyslurm(job)
    except _NoAnswer:
        return _load_with_squeue(job)


def _load_with_pyslurm(job: str) -> dict[str, str]:
    try:
        # A pyslurm for another Slurm release fails here: OSError where its library is missing.
        import pyslurm
    except (ImportError, OSError) as error:
        raise _NoAnswer from error
    try:
        found: Any = pyslurm.Job.load(int(job))
    except Exception as error:  # its RPCError; and no fault of pyslurm's is worth failing for
        raise _NoAnswer from error
    return {
        "state": str(found.state or ""),
        "comment": str(found.comment or ""),
        "directory": str(getattr(found, "working_directory", "") or ""),
    }


def _load_with_squeue(job: str) -> dict[str, str]:
    import subprocess  # a Prolog asks nothing, and does without

    # A comment may hold anything but NUL, new lines included: control characters part the fields.
    form = "\x1e%A\x1f%T\x1f%Z\x1f%k"
    # A user's SQUEUE_PARTITION and others choose among the jobs that are named, too: to answer
    # nothing about a job that runs would be to call it ended.
    environ = {key: value for key, value in os.environ.items() if not key.startswith(_CHOICES)}
    try:
        answer = subprocess.run(
            ["squeue", "--noheader", f"--jobs={job}", "--states=all", f"--format={form}"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TIMEOUT,
            check=False,
            env=environ,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _NoAnswer from error
    if answer.returncode != 0:
        if b"Invalid job id" in answer.stderr:
            raise LookupError(job)
        raise _NoAnswer
    # The first job of an array stands for the whole array, and a heterogeneous job's for all.
    for record in answer.stdout.decode(errors="replace").split("\x1e"):
        fields = re.sub(r"\n\Z", "", record).split("\x1f", 3)
        if len(fields) == 4 and fields[0] == job:
            text = "" if fields[3] in ("(null)", "N/A") else fields[3]
            return {"state": fields[1], "directory": fields[2], "comment": text}
    raise LookupError(job)
