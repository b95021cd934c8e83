"""The scheduler hooks' Python: ``stager hook prolog`` and ``stager hook epilog``, run as root.

The Prolog never keeps a job hostage. It starts a worker that survives it (slurmd kills a Prolog's
process group, so the worker has a session of its own and none of the Prolog's descriptors), waits
at most ``hook.prolog_wait`` and returns. The worker has a child become the user, see
:mod:`stager.forjob`, writes down what that says, see :mod:`stager.jobstate`, and gives up after
``hook.deadline``. TaskProlog, in ``sh``, waits for the rest.

This is the only code that fails open: whatever happens, the status is 0 and the job runs. Only
where the site chose ``hook.on_node_fault: drain`` and root itself cannot write beside the store is
it :data:`DRAIN`. Nothing here asks slurmctld anything.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import select
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from stager import config as configuration
from stager import events, fsutil, jobstate, lease, privilege
from stager.config import Config
from stager.errors import JOB, NODE, SITE, StagerError
from stager.jobstate import FAILED, ORIGINAL, PENDING, READY, STAGED, STRICT, Activation, Job, State

DRAIN = 99
"""Exit status that the shim turns into a failed Prolog, which drains the node."""
LONGEST_WAIT = 60.0
"""Seconds; the shim ends us somewhat later."""

_MOUNTING = 5.0
"""Seconds that a Prolog stays longer so that a mount is seen by the job; measured: 0.02."""
_STARTED, _MAY_MOUNT, _DONE, _FAULT = b"s", b"m", b"d", b"f"


def main(argv: Sequence[str]) -> int:
    """Run one hook.

    Args:
        argv: the verb, and optionally where job states are kept.

    Returns:
        0, or :data:`DRAIN`.
    """
    verbs = {"prolog": prolog, "epilog": epilog}
    if not argv or argv[0] not in verbs:
        return 2
    os.umask(0o022)
    return verbs[argv[0]](os.environ, argv[1] if len(argv) > 1 else jobstate.ROOT)


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
            config = _load(job.uid, root, site_directory)
            began = state.begin(job, {"store": config["store"]})
        except Exception:
            state.remove()  # of an earlier run
            raise
        talk = _start_worker(job, state, config, root) if began else None
        wait = min(config["hook.prolog_wait"], LONGEST_WAIT)
        return _wait_for(talk, state, wait) if talk else _wait_status(state, wait)
    except BaseException as error:
        reason, hint = _explained(error)
        fields = {"reason": f"{reason}; {hint}" if hint else reason, "blame": SITE}
        if job is not None:
            fields.update(job=job.id, uid=str(job.uid), node=job.node)
            with contextlib.suppress(OSError):
                State(root, job.key).fail(fields["reason"])
        _emit(events.FAIL, fields, config, root)
        return 0


def _load(uid: int, root: str, site_directory: str) -> Config:
    cache = os.path.join(root, "config.json")
    return configuration.load(
        trusted_only=True, uid=uid, site_directory=site_directory, cache=cache
    )


def _explained(error: BaseException) -> tuple[str, str]:
    if isinstance(error, StagerError):
        return error.message, error.hint or ""
    if isinstance(error, OSError):
        return f"{error.strerror} ({error.filename})", "tell your administrator"
    return f"a bug in stager: {type(error).__name__}: {error}", "tell your administrator"


def _emit(event: str, fields: Mapping[str, object], config: Config | None, root: str) -> None:
    log = config["hook.log"] if config is not None else ""
    metrics = config["hook.metrics"] if config is not None else ""
    lock = os.path.join(root, "metrics.lock")
    events.emit(event, fields, log=log, metrics=metrics, lock=lock)


def _start_worker(job: Job, state: State, config: Config, root: str) -> socket.socket:
    """Start the worker; returns when it can no longer be killed with the Prolog."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        try:
            os.setsid()
            ours.close()
            _detach(theirs.fileno())
            theirs.send(_STARTED)
            _Worker(job, state, config, root, theirs).run()
        finally:
            os._exit(0)
    theirs.close()
    if ours.recv(1) != _STARTED:
        raise StagerError("the worker ended at once")
    return ours


def _detach(keep: int) -> None:
    """Close what the Prolog was given: slurmd waits until nobody has its output open."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.closerange(3, keep)
    os.closerange(keep + 1, 4096)


def _wait_for(talk: socket.socket, state: State, seconds: float) -> int:
    """Wait for the worker, and stay a moment longer where it is about to mount."""
    until = time.monotonic() + seconds
    while True:
        if not select.select([talk], [], [], max(0.0, until - time.monotonic()))[0]:
            return 0
        said = talk.recv(1)
        if said == _MAY_MOUNT:
            until = max(until, time.monotonic() + _MOUNTING)
            with contextlib.suppress(OSError):
                talk.send(b"y")
        elif said == _FAULT:
            return DRAIN
        else:
            if said != _DONE and state.read("status").startswith(PENDING):
                raise StagerError("the staging worker was killed", hint="tell your administrator")
            return 0


def _wait_status(state: State, seconds: float) -> int:
    """Wait for what the worker of another component of this job does."""
    until = time.monotonic() + seconds
    while state.read("status").startswith(PENDING) and time.monotonic() < until:
        time.sleep(0.1)
    return 0


# -- The worker ------------------------------------------------------------------------------


class _Worker:
    """Root's side of a staging that goes on after the Prolog has returned."""

    def __init__(
        self, job: Job, state: State, config: Config, root: str, prolog_side: socket.socket
    ) -> None:
        self.job, self.state, self.config, self.root = job, state, config, root
        self.prolog = prolog_side
        self.strict = bool(config["run.strict"])
        self.fields: dict[str, object] = {"job": job.id, "uid": job.uid, "node": job.node}
        self.proven = False  # whether root could look at the store's parent
        self.child = 0
        self.started = time.monotonic()

    def run(self) -> None:
        """Stage, write the outcome, tell the Prolog."""
        fault = False
        signal.signal(signal.SIGTERM, self._ended)
        try:
            end = self._work()
            if end.get("nothing"):
                self.state.remove()
            else:
                self._ready(end)
        except BaseException as error:
            fault = self._failed(error)
        with contextlib.suppress(OSError):
            self.prolog.send(_FAULT if fault else _DONE)

    def _ended(self, number: int, frame: object) -> NoReturn:
        """The Epilog ends us: the job is over."""
        self._kill()
        os._exit(0)

    def _work(self) -> dict[str, Any]:
        store = self.config["store"]
        try:
            self.proven = privilege.private_directory(store, self.job.uid)
        except OSError as error:
            self.proven = error.errno in (errno.EIO, errno.EROFS)
            blame = NODE if self.proven else SITE
            raise fsutil.explain(error, f"make the store {store}", blame=blame) from error
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        mounts = self.config["hook.mounts"]
        if mounts == "auto":
            mounts = _mounts(os.environ)
        self.child = os.fork()
        if self.child == 0:
            try:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                os.setsid()
                _detach(theirs.fileno())
                from stager import forjob

                holder = lease.of_job("slurm", self.job.key)
                forjob.run(self.job, self.config, theirs, mounts, holder)
            finally:
                os._exit(0)
        theirs.close()
        pids = (os.getpid(), self.child)
        processes = " ".join(f"{pid} {lease.start_time(pid)}" for pid in pids)
        self.state.write("worker", processes + "\n")
        return self._listen(ours)

    def _listen(self, talk: socket.socket) -> dict[str, Any]:
        """Take messages until the last one; beat meanwhile, and keep the deadline."""
        until = self.started + self.config["hook.deadline"]
        beat = 0
        while True:
            now = time.monotonic()
            if now >= until:
                self._kill()
                raise StagerError(
                    f"staging took longer than {until - self.started:.0f} s",
                    hint="is shared storage slow? pack before you submit; the limit is the"
                    " directive's ?timeout= or the key hook.deadline",
                )
            if select.select([talk], [], [], min(1.0, until - now))[0]:
                data = talk.recv(jobstate.MAX_MESSAGE + 1)
                if not data:
                    raise self._how_it_died()
                message = _decoded(data)
                if "options" in message:
                    self.strict = self.strict or message["options"]["strict"] is True
                    until = min(until, self.started + float(message["options"]["timeout"]))
                elif "original" in message:
                    # At once: should we be killed, the tasks still find it.
                    self.state.write(ORIGINAL, Activation.checked(message["original"]).lines())
                elif "may" in message:
                    talk.send(self._may_mount())
                elif "error" in message:
                    blame = message.get("blame")
                    raise StagerError(
                        events.clean(message["error"], 600),
                        hint=events.clean(message.get("hint") or "", 300),
                        blame=blame if blame in (JOB, SITE, NODE) else SITE,
                    )
                else:
                    return message
            else:
                beat += 1
                self.state.write("status", f"{PENDING} {beat}\n")

    def _may_mount(self) -> bytes:
        """Ask the Prolog, if it is still there, to wait for a mount."""
        try:
            self.prolog.send(_MAY_MOUNT)
            answered = select.select([self.prolog], [], [], 1.0)[0]
            return b"y" if answered and self.prolog.recv(1) == b"y" else b"n"
        except OSError:
            return b"n"

    def _how_it_died(self) -> StagerError:
        reason = "the staging process ended without a word"
        for _ in range(20):
            pid, status = os.waitpid(self.child, os.WNOHANG)
            if pid and os.WIFSIGNALED(status):
                reason = f"the staging process was ended by {_signal_name(os.WTERMSIG(status))}"
            if pid:
                self.child = 0
                break
            time.sleep(0.05)
        return StagerError(reason, hint="tell your administrator")

    def _kill(self) -> None:
        """End the user's side; one that hangs in a dead file system is not waited for."""
        if self.child:
            with contextlib.suppress(OSError):
                os.killpg(self.child, signal.SIGKILL)

    def _ready(self, end: dict[str, Any]) -> None:
        store = self.config["store"]
        staged = Activation.checked(end["staged"], below=os.path.join(store, "envs"))
        how = events.clean(end.get("how"), 20)
        seconds = f"{time.monotonic() - self.started:.2f}"
        self.state.write(STAGED, staged.lines())
        self.fields.update(ref=end.get("ref"), how=how, seconds=seconds)
        self.fields["bytes"] = int(end.get("bytes") or 0)
        note = f"staged {events.clean(end.get('ref'))} ({how}, {seconds} s)"
        self.state.finish(READY, note if end.get("verbose") is True else "")
        _emit(events.STAGE, self.fields, self.config, self.root)

    def _failed(self, error: BaseException) -> bool:
        """Write down why; returns whether the node is to be drained."""
        self._kill()
        reason, hint = _explained(error)
        blame = error.blame if isinstance(error, StagerError) else SITE
        with contextlib.suppress(OSError):
            text = f"{reason}; {hint}" if hint else reason
            self.state.finish(STRICT if self.strict else FAILED, text)
        self.fields.update(blame=blame, reason=reason)
        self.fields["seconds"] = f"{time.monotonic() - self.started:.2f}"
        _emit(events.FAIL, self.fields, self.config, self.root)
        if blame != NODE or not self.proven or self.config["hook.on_node_fault"] != "drain":
            return False
        return privilege.is_broken(os.path.dirname(self.config["store"]))


def _decoded(data: bytes) -> dict[str, Any]:
    if len(data) > jobstate.MAX_MESSAGE:
        raise ValueError("too long a message")
    value = json.loads(data)
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


# -- Mounts and what the job sees of them ----------------------------------------------------

_INCLUDE = re.compile(r"include\s+(\S+)", re.IGNORECASE)


def _mounts(environ: Mapping[str, str]) -> str:
    """When a mount made now is seen by the job, for ``hook.mounts: auto``.

    With ``PrologFlags=RunInJob`` we belong to the job's own step: its namespace is older than we
    are, and a FUSE server would end with it under other jobs' feet. With a private /tmp the job's
    namespace is a copy that is made when the Prolog returns, and is told of later mounts only
    where ``Shared=true`` (job_container.conf(5)).
    """
    from stager.forjob import NEVER, PROLOG, VISIBLE

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
    config: Config | None = None
    fields: dict[str, object] = {}
    try:
        job = Job.of_prolog(environ)
        fields = {"job": job.id, "uid": job.uid, "node": job.node}
        state = State(root, job.key)
        if not state.exists() or not state.leave(job.id):
            return 0
        for pid, start in state.processes():
            _end(pid, start)
        record = state.record()
        store, uid = str(record.get("store", "")), record.get("uid")
        dropped = 0
        try:
            if store and uid == job.uid:
                holder = lease.of_job("slurm", job.key)
                dropped = _as_user(job.uid, job.gid, _release, store, holder)
        finally:
            state.remove()
        with contextlib.suppress(StagerError):
            config = _load(job.uid, root, site_directory)
        _emit(events.RELEASE, {**fields, "how": str(dropped)}, config, root)
    except BaseException as error:
        reason, _ = _explained(error)
        _emit(events.FAIL, {**fields, "reason": reason, "blame": SITE}, config, root)
    return 0


def _end(pid: int, start: str) -> None:
    """End a process of ours, if it is still the one that was started; no matter how it is."""
    for number, tries in ((signal.SIGTERM, 40), (signal.SIGKILL, 20)):
        if start in ("", "0") or lease.start_time(pid) != start:
            return
        with contextlib.suppress(OSError):
            os.killpg(pid, number)  # both lead a group of their own
        for _ in range(tries):
            if lease.start_time(pid) != start:
                return
            time.sleep(0.05)


def _release(store: str, holder: str) -> int:
    from stager.store import Store

    return Store(store).release(holder) if os.path.isdir(store) else 0


# -- Working as other users ------------------------------------------------------------------


def _as_user(uid: int, gid: int | None, work: Any, *arguments: Any, limit: float = 20.0) -> Any:
    """Call a function in a process that has become the user; its result is a whole number.

    Raises:
        StagerError: it failed, or took longer than ``limit`` seconds.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            _detach(writer)
            try:
                privilege.become(uid, gid)
                answer = f"+{int(work(*arguments))}"
            except BaseException as error:
                answer = "-" + events.clean(_explained(error)[0])
            os.write(writer, answer.encode())
        finally:
            os._exit(0)
    os.close(writer)
    try:
        ready = select.select([reader], [], [], limit)[0]
        answer = os.read(reader, 4000).decode(errors="replace") if ready else ""
    finally:
        os.close(reader)
    if not ready:
        with contextlib.suppress(OSError):
            os.killpg(child, signal.SIGKILL)
        raise StagerError(f"working as uid {uid} took longer than {limit:.0f} s")
    os.waitpid(child, 0)
    if not answer.startswith("+"):
        raise StagerError(answer[1:] or f"the process of uid {uid} was ended")
    return int(answer[1:])


def collect_all_users(config: Config, *, everything: bool = False) -> dict[int, int]:
    """Collect the store of every user on this node, each as that user.

    Args:
        config: loaded with ``trusted_only``.
        everything: evict every unclaimed tree.

    Returns:
        For each uid the number of trees evicted, or -1 where it failed.

    Raises:
        StagerError: we are not root, or the store is not one directory for each user.
    """
    if os.geteuid() != 0:
        raise StagerError("only root can collect for all users", hint="sudo stager collect ...")
    template = config.store_template
    if template.count("{uid}") != 1 or "{uid}" not in os.path.basename(template):
        raise StagerError(
            f"the store {template} does not end in one directory for each user",
            hint="set the key `store` to something like /var/lib/stager/{uid}",
        )
    parent, name = os.path.split(template)
    pattern = re.compile(re.escape(name).replace(r"\{uid\}", "([0-9]+)"))
    result = {}
    for entry in sorted(os.listdir(parent)):
        match = pattern.fullmatch(entry)
        if match is None:
            continue
        uid, path = int(match[1]), os.path.join(parent, entry)
        info = os.lstat(path)
        if uid == 0 or info.st_uid != uid or not os.path.isdir(path) or os.path.islink(path):
            continue  # planted by somebody else; nobody uses it
        try:
            result[uid] = _as_user(uid, None, _collect, path, config, everything, limit=600)
        except StagerError as error:
            fields = {"uid": uid, "reason": f"collect: {error.message}", "blame": SITE}
            _emit(events.FAIL, fields, config, jobstate.ROOT)
            result[uid] = -1
    return result


def _collect(path: str, config: Config, everything: bool) -> int:
    from stager.collect import collect
    from stager.schedulers import slurm
    from stager.store import Store

    done = collect(
        Store(path),
        max_size=config["collect.max_size"],
        min_free=config["collect.min_free"],
        everything=everything,
        exists=slurm.job_exists,
    )
    return len(done.trees)
