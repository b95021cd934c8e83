"""The end of a PBS job without hooks: nobody else unmounts what was mounted for it on a node.

pbs_mom ends the sessions of a job's tasks, and a FUSE server is in none of them. So the first
process of a job that stages on a node leaves a watcher there, which waits until the session that it
was started from, and then every other process of the job, is gone.
"""

from __future__ import annotations

import contextlib
import glob
import os
import subprocess
import time

from stager import jobstate, schedulers
from stager.errors import StagerError
from stager.schedulers import Allocation
from stager.staging import lease, processes, sessions
from stager.staging.store import Store

_PAUSE = 1.0


def start(where: Allocation, store: str, command: list[str]) -> None:
    """Leave a watcher, unless there is one, or a hook that gives back what the job holds.

    Args:
        where: the allocation we are in.
        store: the store's directory.
        command: how this program is started.
    """
    if jobstate.State(jobstate.ROOT, where.job).exists():
        return
    mark = os.path.join(sessions.session_directory(), f"{where.job}.{where.node}.watched")
    try:
        os.close(os.open(mark, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        return
    session = os.getsid(0)
    since = lease.start_time(session)
    arguments = ["--session", f"{session} {since}", "--mark", mark, "--store", store]
    environ = {"PATH": os.environ.get("PATH", os.defpath), "PBS_JOBID": os.environ["PBS_JOBID"]}
    try:
        subprocess.Popen(
            [*command, "watch", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**environ, processes.KEEPER: where.job},
            cwd="/",
            start_new_session=True,
        )
    except OSError:  # the next one to stage here tries again
        os.unlink(mark)


def watch(session: str, mark: str, node: Store, job: str) -> None:
    """Wait for the end of a job on this node; then unmount what it mounted and drop its claims.

    Args:
        session: process number and start time of a session's leader.
        mark: a file that tells that we watch.
        node: the store.
        job: the job.
    """
    pid, _, since = session.partition(" ")
    while lease.start_time(int(pid)) == since and since != "0":
        time.sleep(_PAUSE)
    while processes.has_tasks(job):
        time.sleep(_PAUSE)
    for path in (mark, *glob.glob(os.path.join(glob.escape(os.path.dirname(mark)), f"{job}.*"))):
        with contextlib.suppress(OSError):
            os.unlink(path)
    for process in list(processes.processes()):
        owner = processes.owner_of(process.environ)
        tree = process.arguments[-1]
        if not process.is_server or owner is None or owner.job != job:
            continue
        layer = os.path.basename(tree)
        if tree == node.tree(layer):
            with contextlib.suppress(StagerError), node.lock(layer, timeout=5.0):
                node.end_mount(layer, owner.text)
    node.release(lease.of_job(schedulers.PBS, job))
