"""The job we run in, read from the process environment and nothing else."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Job:
    """A scheduler's job as its processes see it.

    Attributes:
        scheduler: ``slurm`` or ``pbs``.
        id: the job's id, with nothing in it that a file name could not have.
        local_rank: rank of this process on its node, where the launcher says so.
        node: index of this node in the job, where the scheduler says so.
    """

    scheduler: str
    id: str
    local_rank: int | None
    node: int | None


def current(environ: Mapping[str, str] | None = None) -> Job | None:
    """The job this process belongs to, or None outside of any."""
    environ = os.environ if environ is None else environ
    for scheduler, variable in (("slurm", "SLURM_JOB_ID"), ("pbs", "PBS_JOBID")):
        if environ.get(variable):
            return Job(
                scheduler,
                file_name(environ[variable]),
                _integer(
                    environ, ("SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
                ),
                _integer(environ, ("SLURM_NODEID", "PBS_NODENUM")),
            )
    return None


def file_name(job: str) -> str:
    """A job's id as a file name: that of an array's part has brackets under PBS."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", job)[:100]


def _integer(environ: Mapping[str, str], names: tuple[str, ...]) -> int | None:
    for name in names:
        if environ.get(name, "").isdigit():
            return int(environ[name])
    return None
