"""Slurm's Prolog and Epilog.

slurmd kills a Prolog's process group when it returns. TaskProlog, in ``sh``, waits for the rest.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import socket
import time
from collections.abc import Mapping

from stager import config as configuration
from stager import events, jobstate, privilege
from stager.config import Config
from stager.errors import SITE, StagerError
from stager.hooks import worker
from stager.hooks.common import emit, explained, in_one_line, is_strict, load, release, stores
from stager.jobstate import PENDING, Job, State

DRAIN = 99
"""Exit status that the shim turns into a failed Prolog, which drains the node."""
LONGEST_WAIT = 60.0
"""Seconds; the shim ends us somewhat later."""

_MOUNTING = 5.0
"""Seconds that a Prolog stays longer so that a mount is seen by the job; measured: 0.02."""


# -- Prolog ----------------------------------------------------------------------------------


def prolog(
    environ: Mapping[str, str],
    root: str = jobstate.ROOT,
    site_directory: str = configuration.SITE_DIRECTORY,
) -> int:
    """Start staging what the job's comment asks for, and wait a little for it."""
    config: Config | None = None
    job: Job | None = None
    try:
        job = Job.of_prolog(environ)
        state = State(root, job.key)
        try:
            config = load(job.uid, root, site_directory)
            began = state.begin(job, stores(config), strict=is_strict(job, config))
        except Exception:
            state.discard()
            raise
        talk = worker.start(job, state, config, root, _mounts) if began else None
        wait = min(config["hook.prolog_wait"], LONGEST_WAIT)
        return _wait_for(talk, state, wait) if talk else _wait_status(state, wait)
    except BaseException as error:
        fields = {"reason": in_one_line(error), "blame": SITE}
        if job is not None:
            fields.update(job=job.id, uid=str(job.uid), node=job.node)
            with contextlib.suppress(OSError):
                State(root, job.key).fail(fields["reason"], strict=is_strict(job, config))
        emit(events.FAIL, fields, config, root)
        return 0


def _wait_for(talk: socket.socket, state: State, seconds: float) -> int:
    """Wait for the worker, and stay a moment longer where it is about to mount."""
    until = time.monotonic() + seconds
    while True:
        if not select.select([talk], [], [], max(0.0, until - time.monotonic()))[0]:
            return 0
        said = talk.recv(1)
        if said == worker.MAY_MOUNT:
            until = max(until, time.monotonic() + _MOUNTING)
            with contextlib.suppress(OSError):
                talk.send(b"y")
        elif said == worker.FAULT:
            return DRAIN
        else:
            if said != worker.DONE and state.read("status").startswith(PENDING):
                raise StagerError("the staging worker was killed", hint="tell your administrator")
            return 0


def _wait_status(state: State, seconds: float) -> int:
    """Wait for what the worker of another component of this job does."""
    until = time.monotonic() + seconds
    while state.read("status").startswith(PENDING) and time.monotonic() < until:
        time.sleep(0.1)
    return 0


def store(
    environ: Mapping[str, str],
    root: str = jobstate.ROOT,
    site_directory: str = configuration.SITE_DIRECTORY,
) -> int:
    """Make the store of a job's user, for what may stage inside the job."""
    config: Config | None = None
    fields: dict[str, object] = {}
    try:
        job = Job.of_prolog(environ)
        fields = {"job": job.id, "uid": job.uid, "node": job.node}
        config = load(job.uid, root, site_directory)
        privilege.private_directory(config["store"], job.uid)
    except BaseException as error:
        emit(events.FAIL, {**fields, "reason": in_one_line(error), "blame": SITE}, config, root)
    return 0


# -- Mounts and what the job sees of them ----------------------------------------------------

_INCLUDE = re.compile(r"include\s+(\S+)", re.IGNORECASE)


def _mounts(environ: Mapping[str, str] = os.environ) -> str:
    """When a mount made now is seen by the job, for ``hook.mounts: auto``.

    With ``PrologFlags=RunInJob`` we belong to the job's own step: its namespace is older than we
    are, and a FUSE server would end with it under other jobs' feet. With a private /tmp the job's
    namespace is a copy that is made when the Prolog returns, and is told of later mounts only
    where ``Shared=true`` (job_container.conf(5)).
    """
    from stager.hooks.forjob import NEVER, PROLOG, VISIBLE

    if _runs_in_job():
        return NEVER
    text = slurm_config(environ.get("SLURM_CONF", ""))
    if text is None:
        return PROLOG
    keys = dict(re.findall(r"^\s*(\w+)\s*=\s*(\S+)", text.lower(), re.MULTILINE))
    if not (keys.get("jobcontainertype") or keys.get("namespacetype")):
        return VISIBLE
    return VISIBLE if keys.get("shared") == "true" else PROLOG


def slurm_config(path: str) -> str | None:
    """The text of ``slurm.conf`` with what it includes and with ``job_container.conf``.

    Args:
        path: as slurmd tells its hooks (``SLURM_CONF``).

    Returns:
        None where it cannot be read.
    """
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = file.read().splitlines()
        directory = os.path.dirname(path)
        for line in list(lines):
            match = _INCLUDE.match(line.strip())
            if match:
                with open(os.path.join(directory, match[1]), errors="replace") as file:
                    lines += file.read().splitlines()
    except OSError:
        return None
    containers = os.path.join(directory, "job_container.conf")
    with contextlib.suppress(OSError), open(containers, errors="replace") as file:
        # Keys of one node may stand in a line behind NodeName=.
        lines += file.read().replace(" ", "\n").splitlines()
    return "\n".join(lines)


def _runs_in_job() -> bool:
    """Tell whether a slurmstepd is among the processes that started us."""
    pid = os.getpid()
    for _ in range(10):
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                name, _, rest = file.read().rpartition(b")")
        except OSError:
            return False
        if b"(slurmstepd" in name:
            return True
        pid = int(rest.split()[1])
        if pid <= 1:
            return False
    return False


# -- Epilog ----------------------------------------------------------------------------------


def epilog(
    environ: Mapping[str, str],
    root: str = jobstate.ROOT,
    site_directory: str = configuration.SITE_DIRECTORY,
) -> int:
    """Release what the job holds on this node; may be run any number of times."""
    fields: dict[str, object] = {}
    try:
        job = Job.of_prolog(environ)
        fields = {"job": job.id, "uid": job.uid, "node": job.node}
        state = State(root, job.key)
        if state.exists() and state.leave(job.id):
            release(state, job.uid, fields, root, site_directory)
    except BaseException as error:
        reason, _ = explained(error)
        emit(events.FAIL, {**fields, "reason": reason, "blame": SITE}, None, root)
    return 0
