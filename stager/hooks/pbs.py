"""What ``hooks/pbs/stager_hook.py`` has done on a node: one verb for each of its events.

The hook runs in a Python that PBS chose, and where it blocks, pbs_mom blocks. So it only starts
these, each a short process, tells them about the job as one JSON object, and watches the job's
state (``docs/formats/job-state.md``). The variables of a PBS job can be set before anything else
happens and never again; so they name links in the job's directory, which is the same on all nodes,
and the links lead to what is staged once it is, or to the original
(``docs/adr/0012-links-for-pbs-jobs.md``).
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
import time
from collections.abc import Mapping
from typing import Any

from stager import config as configuration
from stager import envpatch, events, jobstate, schedulers
from stager.config import Config
from stager.errors import SITE, StagerError
from stager.hooks import worker
from stager.hooks.common import as_user, emit, in_one_line, is_strict, load, release, stores
from stager.jobstate import CANCELLED, PENDING, Activation, Job, State

JOB_PATH = "STAGER_PATH"
"""What goes first in PATH: login shells make theirs anew, and /etc/profile.d adds it again."""

_NOTES = 10.0
"""Seconds to look for notes on shared storage."""
_GRACE = 600.0
"""Seconds for which a job's directory stays though pbs_mom does not list the job."""


def main(verb: str, root: str) -> int:
    """Run one verb: what it is told comes on standard input, what it answers goes to the output.

    Args:
        verb: ``begin``, ``note``, ``notes``, ``cancel``, ``end`` or ``sweep``.
        root: where job states are kept.

    Returns:
        0, or 2 where there is no such verb.
    """
    verbs = {
        "begin": begin, "note": note, "notes": notes, "cancel": cancel, "end": finish,
        "sweep": sweep,
    }  # fmt: skip
    if verb not in verbs:
        return 2
    told: dict[str, Any] = {}
    answer: dict[str, Any] = {}
    try:
        told = json.load(sys.stdin)
        answer = verbs[verb](told, root)
    except BaseException as error:
        reason = in_one_line(error)
        known = {name: told.get(key) for name, key in (("job", "id"), ("node", "node"))}
        emit(events.FAIL, {**known, "reason": reason, "blame": SITE}, None, root)
        answer = {"error": reason}
    with contextlib.suppress(OSError):
        json.dump(answer, sys.stdout)
        sys.stdout.flush()
    return 0


def begin(
    told: Mapping[str, Any], root: str, site_directory: str = configuration.SITE_DIRECTORY
) -> dict[str, Any]:
    """Start staging; for the first node tell what the variables of the job are to be.

    Args:
        told: the job (:meth:`stager.jobstate.Job.of_pbs`), its ``variables`` as they are, and for
            how many seconds the environment may be looked for.
        root: where job states are kept.
        site_directory: where the site's configuration is.

    Returns:
        ``deadline``, seconds within which it will be over; ``set`` and ``unset``.
    """
    job = Job.of_pbs(told)
    state = State(root, job.key)
    config: Config | None = None
    try:
        config = load(job.uid, root, site_directory)
        state.begin(job, stores(config), strict=is_strict(job, config))
    except Exception as error:
        state.discard()
        with contextlib.suppress(OSError):
            state.fail(in_one_line(error), strict=is_strict(job, config))
        raise
    talk = worker.start(job, state, config, root, _visible)
    deadline = float(config["hook.deadline"])
    if not job.first:
        return {"deadline": deadline}
    variables = {str(key): str(value) for key, value in dict(told["variables"]).items()}
    activation = _beforehand(talk, state, float(told.get("find") or 0.0))
    after = activation.applied(variables)
    after[JOB_PATH] = ":".join(activation.prepend["PATH"])
    changed, unset = envpatch.changes(variables, after)
    return {"deadline": deadline, "set": changed, "unset": list(unset)}


def _visible() -> str:
    from stager.hooks.forjob import VISIBLE

    return VISIBLE  # pbs_mom gives jobs no mount namespace of their own


def _beforehand(talk: Any, state: State, seconds: float) -> Activation:
    """What the worker says of the environment before it is staged, or as much as is certain."""
    until = time.monotonic() + seconds
    while select.select([talk], [], [], max(0.0, until - time.monotonic()))[0]:
        said = talk.recv(jobstate.MAX_MESSAGE + 1)
        if said[:1] == worker.BEFOREHAND:
            return Activation.checked(json.loads(said[1:]), below=(state.path,))
        if said[:1] != worker.MAY_MOUNT:
            break
    state.write(jobstate.PARTLY, "")  # the user is told, and a strict job ends
    prefix = os.path.join(state.path, "env")
    return Activation(
        python=f"{prefix}/bin/python",
        prefix=prefix,
        leave=(),
        set={"STAGER_PREFIX": prefix},
        unset=(),
        prepend={"PATH": (f"{prefix}/bin",)},
    )


def note(told: Mapping[str, Any], root: str) -> dict[str, Any]:
    """Tell the job's first node that this one is not staged, where the worker could not."""
    from stager.hooks import jobnotes

    job = Job.of_pbs(told)
    as_user(job.uid, job.gid, jobnotes.tell_first, job, str(told["reason"]), limit=_NOTES)
    return {}


def notes(told: Mapping[str, Any], root: str) -> dict[str, Any]:
    """What the other nodes of a job have told: ``notes``, ``NODE: REASON`` each.

    There is no reason where a node of a strict job tells that it is staged.
    """
    from stager.hooks import jobnotes

    job = Job.of_pbs(told)
    found = as_user(job.uid, job.gid, jobnotes.take, job, limit=_NOTES)
    return {"notes": [events.clean(line, jobnotes.LONGEST) for line in found.splitlines()]}


def cancel(told: Mapping[str, Any], root: str) -> dict[str, Any]:
    """Staging is given up, for the job was deleted: end it at once, and other nodes' waiting."""
    from stager.hooks import jobnotes

    state = State(root, schedulers.file_name(str(told["id"])))
    if state.read("status").startswith(PENDING):
        state.end_worker()
        reason, record = str(told["reason"]), state.record()
        if state.exists():
            state.finish(CANCELLED, reason)
        if record.get("first") is True:
            job = Job(**{name: record[name] for name in Job._fields})
            as_user(job.uid, job.gid, jobnotes.tell_others, job, reason, limit=_NOTES)
    return {}


def finish(
    told: Mapping[str, Any], root: str, site_directory: str = configuration.SITE_DIRECTORY
) -> dict[str, Any]:
    """Give back what the job holds on this node; any number of times."""
    state = State(root, schedulers.file_name(str(told["id"])))
    if state.exists():
        fields = {"job": told["id"], "node": told.get("node")}
        release(state, None, fields, root, site_directory)
    return {}


def sweep(
    told: Mapping[str, Any], root: str, site_directory: str = configuration.SITE_DIRECTORY
) -> dict[str, Any]:
    """Give back what jobs hold whose end nobody told: the node's mom was killed, say.

    A mom that was killed forgets the jobs of which it was not the first node, and they run on
    (measured): so PBS is asked, and where it does not answer, the user's processes tell.

    Args:
        told: ``jobs``, the ids of all jobs that this node's mom knows.
        root: where job states are kept.
        site_directory: where the site's configuration is.

    Returns:
        ``swept``, what was given back.
    """
    known = {schedulers.file_name(str(one)) for one in told["jobs"]}
    swept = []
    with contextlib.suppress(FileNotFoundError):
        for name in sorted(os.listdir(os.path.join(root, "jobs"))):
            if not name[:1].isdigit():
                continue  # nobody of ours made that
            state = State(root, name)
            if (
                name in known
                or name.endswith(".new")
                or state.record().get("scheduler") != schedulers.PBS
            ):
                continue
            if time.time() - os.lstat(state.path).st_mtime < _GRACE:
                continue  # its begin may be newer than the list
            if _may_run(name, state):
                continue
            with contextlib.suppress(StagerError):
                release(state, None, {"job": name, "node": told.get("node")}, root, site_directory)
                swept.append(name)
    return {"swept": swept}


def _may_run(job: str, state: State) -> bool:
    exists = schedulers.job_exists(schedulers.PBS, job)
    if exists is not None:
        return exists
    uid = state.record().get("uid")
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == uid:
                with open(f"/proc/{name}/comm", encoding="utf-8", errors="replace") as file:
                    if not file.read().startswith("squashfuse"):
                        return True
    return False
