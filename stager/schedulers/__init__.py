"""The job we run in, read from the process environment, and what a scheduler can be asked.

What only one scheduler has is in its own module.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import NamedTuple

SLURM, PBS = "slurm", "pbs"


class Allocation(NamedTuple):
    """The allocation a process belongs to.

    Attributes:
        scheduler: :data:`SLURM` or :data:`PBS`.
        job: its job id; of a heterogeneous job, the id of the first component.
        components: number of nodes of each component: one, but in heterogeneous jobs.
        step: id of the job step or PBS task we run in; empty in a batch script or an interactive
            shell.
        restart: tells this run from one before a requeue.
        node: the node we run on; empty where salloc's shell runs outside of the allocation.
    """

    scheduler: str
    job: str
    components: tuple[int, ...]
    step: str
    restart: str
    node: str

    @property
    def nodes(self) -> int:
        """How many nodes it has; a node in two components counts twice."""
        return sum(self.components)


def allocation(environ: Mapping[str, str]) -> Allocation | None:
    """The allocation we are in, or None outside of any; `environ` are our variables."""
    from stager.schedulers import pbs, slurm

    return slurm.allocation(environ) or pbs.allocation(environ)


def job_exists(scheduler: str, job: str) -> bool | None:
    """Tell whether a job is still pending, running or completing.

    Args:
        scheduler: whose.
        job: its id, see :func:`file_name`.

    Returns:
        None where nobody could tell.
    """
    from stager.schedulers import pbs, slurm

    return slurm.job_exists(job) if scheduler == SLURM else pbs.job_exists(job)


class Job(NamedTuple):
    """A scheduler's job as its processes see it.

    Attributes:
        scheduler: :data:`SLURM` or :data:`PBS`.
        id: the job's id, with nothing in it that a file name could not have.
    """

    scheduler: str
    id: str


def current(environ: Mapping[str, str] | None = None) -> Job | None:
    """The job this process belongs to, or None outside of any."""
    environ = os.environ if environ is None else environ
    for scheduler, variable in ((SLURM, "SLURM_JOB_ID"), (PBS, "PBS_JOBID")):
        if environ.get(variable):
            return Job(scheduler, file_name(environ[variable]))
    return None


def file_name(job: str) -> str:
    """A job's id as a file name: that of an array's part has brackets under PBS."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", job)[:100]
