"""What the nodes of a job tell each other, in files of the user's own repository.

That packing failed on the first node, for the others to give up; and under PBS, where only the
first node's words reach the user, that another node is not staged, or in a strict job that it is.
All of it is called as the job's user.
"""

from __future__ import annotations

import contextlib
import json
import os
import time

from stager import config as configuration
from stager import events, fsutil
from stager.config import Config
from stager.errors import JOB, StagerError, from_data, known
from stager.jobstate import MAX_MESSAGE, Job

_OLD = 3600.0
"""Seconds after which a job has long read its note."""
LONGEST = 600
"""Characters of one node's note that are told."""


def path(config: Config, job: Job, node: str = "") -> str:
    """Where a node tells the others; the first one where `node` is empty."""
    name = f"job-{job.key}-{job.restart}{'.' if node else ''}{node}.failed"
    return os.path.join(config["repository"], "tmp", name)


def leave(note: str, error: Exception) -> None:
    """Write down what went wrong, where :func:`path` says; nothing happens where that fails."""
    with contextlib.suppress(OSError):
        os.makedirs(os.path.dirname(note), 0o700, exist_ok=True)
        data = json.dumps(known(error).as_data()).encode()
        fsutil.write_atomic(note, data, mode=0o600, durable=False)
        for one in os.listdir(os.path.dirname(note)):
            if one.startswith("job-") and one.endswith(".failed"):
                old = os.path.join(os.path.dirname(note), one)
                with contextlib.suppress(OSError):  # other nodes remove it too
                    if time.time() - os.stat(old).st_mtime > _OLD:
                        os.unlink(old)


def read(note: str) -> StagerError | None:
    """What was written down, or None."""
    try:
        with open(note, "rb", opener=fsutil.regular) as file:
            value = json.loads(file.read(MAX_MESSAGE))
        return from_data({**value, "blame": JOB})
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def tell_first(job: Job, reason: str) -> None:
    """Tell the job's first node why this one is not staged; with no reason, that it is."""
    leave(path(_config(), job, job.node), StagerError(reason))


def tell_others(job: Job, reason: str) -> None:
    """Tell the job's other nodes that the first one, which this is, packs nothing any more."""
    leave(path(_config(), job), StagerError(reason))


def _config() -> Config:
    # A malformed one may be what there is to tell of.
    return configuration.load(faults=[])


def take(job: Job) -> str:
    """What other nodes have told, ``NODE: REASON`` in a line each; it is removed."""
    directory, name = os.path.split(path(_config(), job))
    beginning, found = name[: -len("failed")], []
    with contextlib.suppress(OSError):
        for one in sorted(os.listdir(directory)):
            node = one[len(beginning) : -len(".failed")]
            if one.startswith(beginning) and node:
                told = read(os.path.join(directory, one))
                if told is not None:
                    found.append(events.clean(f"{node}: {told.message}", LONGEST))
                with contextlib.suppress(OSError):
                    os.unlink(os.path.join(directory, one))
    return "\n".join(found)
