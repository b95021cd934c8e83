"""Our user's processes on this node, and whose job each belongs to."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import stager
from stager import schedulers

KEEPER = "STAGER_KEEPER"
"""The job at whose end, and not at a step's, what a process mounts goes away."""


class Owner(NamedTuple):
    """A job, and its step where something lasts only as long as that."""

    job: str
    step: str

    @property
    def text(self) -> str:
        """As a stamp has it."""
        return f"{self.job}/{self.step}"

    @classmethod
    def read(cls, text: str) -> Owner | None:
        """The inverse; nobody for an empty text."""
        job, _, step = text.rpartition("/")
        return cls(job, step) if text else None


def owner_of(environ: Mapping[str, str]) -> Owner | None:
    """Who a process with these variables belongs to; None outside of any job."""
    if environ.get(KEEPER):
        return Owner(environ[KEEPER], "")
    job = schedulers.current(environ)
    if job is None:
        return None
    if job.scheduler == schedulers.PBS:
        return Owner(job.id, "")  # what a task leaves behind outlives it
    from stager.schedulers import slurm

    return Owner(job.id, slurm.step_of(environ))


class Process(NamedTuple):
    """One of our user's processes: its number, its command line, the variables it began with."""

    pid: int
    arguments: list[str]
    environ: dict[str, str]

    @property
    def is_server(self) -> bool:
        """Whether it serves a FUSE mount of ours."""
        return os.path.basename(self.arguments[0]).startswith("squashfuse")


def processes() -> Iterator[Process]:
    """Our user's processes on this node."""
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            if os.stat(f"/proc/{name}").st_uid != os.geteuid():
                continue
            arguments = _strings(f"/proc/{name}/cmdline")
            pairs = (item.partition("=") for item in _strings(f"/proc/{name}/environ"))
            variables = {key: value for key, _, value in pairs}
        except OSError:
            continue  # it ended, or does not let itself be looked at
        if arguments:
            yield Process(int(name), arguments, variables)


def _strings(path: str) -> list[str]:
    with open(path, "rb") as file:
        return os.fsdecode(file.read()).rstrip("\0").split("\0")


def has_tasks(job: str) -> bool:
    """Tell whether processes of a job run here, other than those that hold its mounts."""
    for process in processes():
        if KEEPER in process.environ or process.is_server:
            continue
        found = owner_of(process.environ)
        if found is not None and found.job == job:
            return True
    return False


def own_command() -> list[str]:
    """How this program is started on another node: from the same files, with the same Python."""
    place = os.path.dirname(os.path.dirname(os.path.abspath(stager.__file__)))
    if os.path.exists(os.path.join(place, "__main__.py")):  # installed by an administrator
        return [sys.executable, "-I", "-S", "-B", place]
    return [sys.executable, "-I", "-m", "stager"]
