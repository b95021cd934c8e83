"""What the hooks of all schedulers share: configuration, events, working as other users."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Mapping
from typing import Any

from stager import config as configuration
from stager import events, privilege
from stager.config import Config
from stager.errors import StagerError, known
from stager.jobstate import Job, State
from stager.staging import lease

_LONGEST = 1 << 20
"""Bytes of an answer of a user's process: a few hundred for each node of the largest jobs."""
_RELEASE = 5.0
"""Seconds that giving up a user's claims may take."""


def load(uid: int, root: str, site_directory: str) -> Config:
    """The site's configuration, for a user's store; root keeps it beside the job states.

    Raises:
        UsageError: it is malformed, or is writable by users other than root.
    """
    cache = os.path.join(root, "config.json")
    return configuration.load(
        trusted_only=True, uid=uid, site_directory=site_directory, cache=cache
    )


def stores(config: Config) -> dict[str, str]:
    """What a job's record says of where the job may hold trees, for its end."""
    return {key: config[key] for key in ("store", "site_store")}


def is_strict(job: Job, config: Config | None) -> bool:
    """Tell whether a job is to fail where it cannot be staged, whatever else it asks for.

    Args:
        job: the job.
        config: the site's, which may want that of all; None where it cannot be read.
    """
    return job.asks_strict() or (config is not None and bool(config["run.strict"]))


def explained(error: BaseException) -> tuple[str, str]:
    """What happened, and what to do; empty where nobody knows."""
    if isinstance(error, OSError):
        said = error.strerror or str(error) or type(error).__name__
        where = f" ({error.filename})" if error.filename else ""
        return f"{said}{where}", "tell your administrator"
    told = known(error, "tell your administrator")
    return told.message, told.hint or ""


def in_one_line(error: BaseException) -> str:
    """What happened and what to do."""
    reason, hint = explained(error)
    return f"{reason}; {hint}" if hint else reason


def emit(event: str, fields: Mapping[str, object], config: Config | None, root: str) -> None:
    """Tell an event where the site wants it, see :mod:`stager.events`."""
    log = config["hook.log"] if config is not None else ""
    metrics = config["hook.metrics"] if config is not None else ""
    lock = os.path.join(root, "metrics.lock")
    events.emit(event, fields, log=log, metrics=metrics, lock=lock)


def detach(keep: int) -> None:
    """Close what a hook was given: who started it waits until nobody has its output open."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.closerange(3, keep)
    os.closerange(keep + 1, 4096)


def how_it_ended(pid: int) -> str | None:
    """Wait a moment for a process of ours.

    Returns:
        The name of the signal that ended it, empty for none; None where it has not ended.
    """
    pause = 0.001
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return _signal_name(os.WTERMSIG(status)) if os.WIFSIGNALED(status) else ""
        if pause > 0.6:  # a second in all
            return None
        time.sleep(pause)
        pause *= 2


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def release(
    state: State, uid: int | None, fields: Mapping[str, object], root: str, site_directory: str
) -> None:
    """Give back what a job holds on this node, and remove its state; any number of times.

    Args:
        state: the job's.
        uid: whose job the scheduler says it is; None where it does not say.
        fields: of the event that is told.
        root: where job states are kept.
        site_directory: where the site's configuration is.
    """
    state.end_worker()
    record = state.record()
    store, owner = str(record.get("store", "")), record.get("uid")
    dropped = 0
    try:
        if store and isinstance(owner, int) and uid in (None, owner):
            holder = lease.of_job(str(record.get("scheduler", "slurm")), str(record["key"]))
            try:  # where others than root could have been there, that is told
                dropped = _release_shared(str(record.get("site_store") or ""), holder)
            finally:
                # A claim that stays is dropped by the next collection; an Epilog must not be late.
                work = as_user(owner, record.get("gid"), _release, store, holder, limit=_RELEASE)
                dropped += int(work)
    finally:
        state.remove()
    config: Config | None = None
    with contextlib.suppress(StagerError):
        config = load(owner if isinstance(owner, int) else 0, root, site_directory)
    emit(events.RELEASE, {**fields, "how": str(dropped)}, config, root)


def _release(store: str, holder: str) -> int:
    from stager.staging.store import Store

    return Store(store).release(holder) if os.path.isdir(store) else 0


def _release_shared(store: str, holder: str) -> int:
    if not os.path.isdir(store):
        return 0
    from stager.staging.sitestore import SiteStore

    return SiteStore.of_root(store).release(holder)


# -- Working as other users ------------------------------------------------------------------


def as_user(
    uid: int,
    gid: int | None,
    work: Any,
    *arguments: Any,
    limit: float = 20.0,
    known: bool = True,
) -> str:
    """Call a function in a process that has become the user; its result is a text.

    Args:
        uid: the user.
        gid: as :func:`stager.privilege.become` has it; so has ``known``.
        work: the function.
        arguments: of the function.
        limit: seconds it may take.
        known: whether the node must know the user.

    Raises:
        StagerError: it failed, or took longer than ``limit`` seconds.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            detach(writer)
            try:
                privilege.become(uid, gid, known=known)
                answer = f"+{work(*arguments)}"
            except BaseException as error:
                answer = "-" + events.clean(explained(error)[0])
            with open(writer, "wb") as file:
                file.write(answer.encode(errors="replace")[:_LONGEST])
        finally:
            os._exit(0)
    os.close(writer)
    try:
        data = _answer(reader, limit)
    finally:
        os.close(reader)
        # What is the user's need not end by itself.
        with contextlib.suppress(OSError):
            os.killpg(child, signal.SIGKILL)
    how_it_ended(child)  # and no longer: where storage hangs not even SIGKILL ends it
    if data is None:
        raise StagerError(f"an operation as uid {uid} timed out after {limit:.0f} s")
    answer = data.decode(errors="replace")
    if not answer.startswith("+"):
        raise StagerError(events.clean(answer[1:]) or f"the process of uid {uid} was ended")
    return answer[1:]


def _answer(reader: int, limit: float) -> bytes | None:
    """All that is written to a pipe; None where that takes longer than so many seconds."""
    until, data = time.monotonic() + limit, b""
    while len(data) < _LONGEST:
        if not select.select([reader], [], [], max(0.0, until - time.monotonic()))[0]:
            return None
        piece = os.read(reader, _LONGEST - len(data))
        if not piece:
            break
        data += piece
    return data
