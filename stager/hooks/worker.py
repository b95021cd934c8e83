"""Root's side of a staging that goes on after the hook that started it has returned."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import signal
import socket
import time
from typing import TYPE_CHECKING, Any, Callable, NoReturn

from stager import events, fsutil, jobstate, privilege, schedulers
from stager.config import Config
from stager.errors import NODE, SITE, StagerError, from_data
from stager.hooks import orphans
from stager.hooks.common import (
    as_user,
    detach,
    emit,
    explained,
    how_it_ended,
    in_one_line,
    is_strict,
    stores,
)
from stager.jobstate import (
    FAILED,
    FAULTY,
    ORIGINAL,
    PENDING,
    READY,
    STAGED,
    Activation,
    Job,
    State,
)
from stager.staging import lease

if TYPE_CHECKING:
    from stager.hooks.aside import Aside

# An Epilog loads this module too: what only staging needs is imported there.

STARTED, MAY_MOUNT, BEFOREHAND, DONE, FAULT = b"s", b"m", b"b", b"d", b"f"
"""What the worker tells the hook that started it."""
_MOST_SHARED = 16
"""Environments of the site's that a job may have; who names more fills the node's disk."""
_MOST_ROOMS = 4
"""How often a job may have others' trees evicted: for each of its layers that lacks room."""
_NOTE = 10.0
"""Seconds for a small file on shared storage."""


def start(
    job: Job, state: State, config: Config, root: str, mounts: Callable[[], str]
) -> socket.socket:
    """Start the worker; returns when it can no longer be killed with the hook.

    Args:
        job: the job.
        state: what was begun for it.
        config: the site's.
        root: where job states are kept.
        mounts: tells whether a mount made later is seen by the job, see :mod:`stager.hooks.forjob`.

    Returns:
        Where the worker tells how far it is: one of the bytes above, and more behind some of them.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        try:
            os.setsid()
            # pbs_mom starts its hooks with SIGTERM blocked (seen); we and all we start must hear.
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            ours.close()
            detach(theirs.fileno())
            worker = Worker(job, state, config, root, mounts, theirs)
            worker.note_processes()  # should the hook be killed now, its shim sees that we go on
            theirs.send(STARTED)
            worker.run()
        finally:
            os._exit(0)
    theirs.close()
    if ours.recv(1) != STARTED:
        raise StagerError("the worker ended at once")
    return ours


class Worker:
    """Root's side of a staging that goes on after the Prolog has returned."""

    def __init__(
        self,
        job: Job,
        state: State,
        config: Config,
        root: str,
        mounts: Callable[[], str],
        hook: socket.socket,
    ) -> None:
        self.job, self.state, self.config, self.root = job, state, config, root
        self.mounts = mounts
        self.hook = hook
        self.trees: list[tuple[str, str, str]] = []  # links, what they lead to once staged, before
        self.fields: dict[str, object] = {"job": job.id, "uid": job.uid, "node": job.node}
        self.proven = False  # whether root could look at the store's parent
        self.told = False  # whether the user's process said itself what went wrong
        self.child = 0  # works as the user
        self.holder = lease.of_job(job.scheduler, job.key)
        self.aside: Aside | None = None  # works as root, for the user
        self.shares = 0  # how often that was for the site's store
        self.rooms = 0  # how often it was for room
        self.visible = False  # whether the job sees a mount made later
        self.started = time.monotonic()
        self.until = self.started + config["hook.deadline"]

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
        self._tell(FAULT if fault else DONE)
        orphans.end()

    def _ended(self, number: int, frame: object) -> NoReturn:
        """The Epilog ends us: the job is over."""
        self._kill()
        orphans.end()
        os._exit(0)

    def _work(self) -> dict[str, Any]:
        from stager.hooks import forjob

        store = self.config["store"]
        broken: StagerError | None = None
        try:
            self.proven = privilege.private_directory(store, self.job.uid)
        except OSError as error:
            self.proven = error.errno in (errno.EIO, errno.EROFS)
            blame = NODE if self.proven else SITE
            broken = fsutil.explain(error, f"make the store {store}", blame=blame)
        except StagerError as error:
            broken = error
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        mounts = self.config["hook.mounts"]
        if mounts == "auto":
            mounts = self.mounts()
        self.visible = mounts == forjob.VISIBLE
        self.child = os.fork()
        if self.child == 0:
            try:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                os.setsid()
                detach(theirs.fileno())
                place = self.state.path
                order = forjob.Order(self.job, self.config, mounts, self.holder, place, broken)
                forjob.run(order, theirs)
            finally:
                os._exit(0)
        theirs.close()
        orphans.adopt()  # by now, for it takes as long as the child takes to begin
        self.note_processes()
        return self._listen(ours)

    def note_processes(self) -> None:
        """Write down whom the Epilog has to end."""
        pids = (os.getpid(), *self._helpers())
        processes = " ".join(f"{pid} {lease.start_time(pid)}" for pid in pids)
        self.state.write("worker", processes + "\n")

    def _helpers(self) -> list[int]:
        """The processes that work for us; each leads a group of its own."""
        return [pid for pid in (self.child, self.aside.pid if self.aside else 0) if pid]

    def _listen(self, talk: socket.socket) -> dict[str, Any]:
        """Take messages until the last one; beat meanwhile, and keep the deadline."""
        beat = 0
        while True:
            now = time.monotonic()
            if now >= self.until:
                self._kill()
                raise StagerError(
                    f"staging took longer than {self.until - self.started:.0f} s",
                    hint="is shared storage slow? pack before you submit; the limit is the"
                    " directive's ?timeout= or the key hook.deadline",
                )
            sources = [talk] if self.aside is None else [self.aside, talk]
            ready = select.select(sources, [], [], min(1.0, self.until - now))[0]
            if self.aside is not None and self.aside in ready:
                with contextlib.suppress(OSError):  # who asked has ended: how, is told next
                    _answer(talk, self.aside.answer())
                self.aside = None
            elif ready:
                data = talk.recv(jobstate.MAX_MESSAGE + 1)
                if not data:
                    raise self._how_it_died()
                message = _decoded(data)
                if not self._take(message, talk):
                    return message
            else:
                beat += 1
                self.state.write("status", f"{PENDING} {beat}\n")

    def _take(self, message: dict[str, Any], talk: socket.socket) -> bool:
        """Do what a message of :mod:`stager.hooks.forjob` asks for; False for the last one."""
        if "timeout" in message:
            self.until = min(self.until, self.started + float(message["timeout"]))
        elif "original" in message:
            # At once: should we be killed, the tasks still find it.
            self.state.write(ORIGINAL, Activation.checked(message["original"]).lines())
        elif "trees" in message:
            self._link(message["trees"])
            _answer(talk, b"y")
        elif "beforehand" in message:
            value = Activation.checked(message["beforehand"], below=(self.state.path,))
            self.state.write(STAGED, value.lines())
            self._tell(BEFOREHAND + json.dumps(message["beforehand"]).encode())
        elif self.aside is not None and "error" not in message:
            raise ValueError("more, while root has something to do")
        elif "shared" in message:
            self._share(message["shared"])
        elif "room" in message:
            self._make_room(message["room"], talk)
        elif "may" in message:
            _answer(talk, self._may_mount())
        elif "error" in message:
            self.told = True
            texts = {key: events.clean(message.get(key) or "", 600) for key in ("error", "hint")}
            raise from_data({**message, **texts})
        elif "nothing" in message and self.shares:
            raise ValueError("nothing, after something was shared")
        else:
            return False
        return True

    def _share(self, wanted: Any) -> None:
        """Start staging into the site's store."""
        from stager.hooks import sharing

        self.shares += 1
        if self.shares > _MOST_SHARED:
            raise ValueError("not so many environments of the site's")
        # A mount that the job's own namespace may not be told of is no use to it.
        config = self.config if self.visible else self.config.changed({"stage.how": "extract"})
        work = sharing.ordered(wanted, config, self.holder)
        self._begin_aside("stages into the site's store", work)

    def _make_room(self, wanted: Any, talk: socket.socket) -> None:
        """Start evicting what others have left on the disk."""
        from stager.hooks import collecting

        size, inodes = (int(one) for one in wanted)
        self.rooms += 1
        if self.rooms > _MOST_ROOMS:
            _answer(talk, json.dumps({"evicted": 0}).encode())
            return

        def work() -> dict[str, Any]:
            return {"evicted": collecting.make_room(self.config, size, inodes)}

        self._begin_aside("makes room in the stores", work)

    def _begin_aside(self, what: str, work: Callable[[], dict[str, Any]]) -> None:
        from stager.hooks.aside import Aside

        # The Epilog ends what is written down, and nobody else.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            self.aside = Aside(what, work)
            self.note_processes()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _link(self, parts: Any) -> None:
        """Make the links by which the job finds its trees: to the originals, until they are staged.

        Whatever becomes of us, the job has an environment.
        """
        trees = []
        for part, layers in enumerate(parts):
            for number, (staged, before, ready) in enumerate(layers):
                name = jobstate.link_name(part, number, len(layers))
                original = jobstate.path(before) if before else ""
                if staged:
                    jobstate.path(staged, below=self._places())
                    trees.append((name, staged, original))
                if ready is True or original:
                    self.state.link(name, staged if ready is True else original)
        self.trees = trees

    def _places(self) -> tuple[str, ...]:
        """Where a job's trees may be."""
        roots = filter(None, stores(self.config).values())
        return tuple(os.path.join(root, "envs") for root in roots)

    def _unlink(self) -> None:
        """Let the links lead to the originals."""
        for name, _, original in self.trees:
            if original:
                self.state.link(name, original)

    def _tell_first_node(self, reason: str) -> None:
        """PBS shows the user only what the first node's prologue says."""
        if self.job.scheduler != schedulers.PBS or self.job.first:
            return
        with contextlib.suppress(StagerError):
            from stager.hooks import jobnotes

            as_user(self.job.uid, self.job.gid, jobnotes.tell_first, self.job, reason, limit=_NOTE)

    def _tell_other_nodes(self, reason: str) -> None:
        """They wait for what the first node packs, and know only what its user's process says."""
        if self.told or not self.job.first:
            return
        with contextlib.suppress(StagerError):
            from stager.hooks import jobnotes

            as_user(self.job.uid, self.job.gid, jobnotes.tell_others, self.job, reason, limit=_NOTE)

    def _tell(self, what: bytes) -> None:
        with contextlib.suppress(OSError):  # the hook has returned
            self.hook.send(what)

    def _may_mount(self) -> bytes:
        """Ask the Prolog, if it is still there, to wait for a mount."""
        try:
            self.hook.send(MAY_MOUNT)
            answered = select.select([self.hook], [], [], 1.0)[0]
            return b"y" if answered and self.hook.recv(1) == b"y" else b"n"
        except OSError:
            return b"n"

    def _how_it_died(self) -> StagerError:
        reason = "the staging process ended without a word"
        by = how_it_ended(self.child)
        if by:
            reason = f"the staging process was ended by {by}"
        if by is not None:
            self.child = 0
        return StagerError(reason, hint="tell your administrator")

    def _kill(self) -> None:
        """End what works for us; one that hangs in a dead file system is not waited for."""
        for pid in self._helpers():
            with contextlib.suppress(OSError):
                os.killpg(pid, signal.SIGKILL)

    def _ready(self, end: dict[str, Any]) -> None:
        linked = self.job.scheduler == schedulers.PBS
        below = (self.state.path,) if linked else self._places()
        staged = Activation.checked(end["staged"], below=below)
        for name, tree, _ in self.trees:
            self.state.link(name, tree)
        how = events.clean(end.get("how"), 20)
        seconds = f"{time.monotonic() - self.started:.2f}"
        self.state.write(STAGED, staged.lines())
        if is_strict(self.job, self.config):
            self._tell_first_node("")
        self.fields.update(ref=end.get("ref"), how=how, seconds=seconds)
        self.fields["bytes"] = int(end.get("bytes") or 0)
        notes = []
        if end.get("verbose") is True:
            notes.append(f"staged {events.clean(end.get('ref'))} ({how}, {seconds} s)")
        if end.get("warning"):
            notes.append(f"warning: {events.clean(end['warning'])}")
        self.state.finish(READY, "; ".join(notes))
        emit(events.STAGE, self.fields, self.config, self.root)

    def _failed(self, error: BaseException) -> bool:
        """Write down why; returns whether the node is to be drained."""
        self._kill()
        reason, _ = explained(error)
        blame = error.blame if isinstance(error, StagerError) else SITE
        fault = blame == NODE and self.proven and self.config["hook.on_node_fault"] == "drain"
        fault = fault and privilege.is_broken(os.path.dirname(self.config["store"]))
        with contextlib.suppress(OSError):
            if fault:
                self.state.write(FAULTY, events.clean(reason, 300) + "\n")
            text = in_one_line(error)
            self._unlink()
            self._tell_first_node(text)
            self.state.finish(FAILED, text)
            self._tell_other_nodes(text)
        self.fields.update(blame=blame, reason=reason)
        self.fields["seconds"] = f"{time.monotonic() - self.started:.2f}"
        emit(events.FAIL, self.fields, self.config, self.root)
        return fault


def _answer(talk: socket.socket, data: bytes) -> None:
    """Answer the user's process; one that reads nothing must not make us wait for that.

    Raises:
        ValueError: it has not read what was said before.
        OSError: it has ended.
    """
    try:
        talk.send(data, socket.MSG_DONTWAIT)
    except BlockingIOError:
        raise ValueError("more questions, and no answer read") from None


def _decoded(data: bytes) -> dict[str, Any]:
    if len(data) > jobstate.MAX_MESSAGE:
        raise ValueError("too long a message")
    value = json.loads(data)
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value
