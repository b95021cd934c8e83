"""What a job's Prolog leaves on the node for its tasks and its Epilog.

The format is specified in ``docs/formats/job-state.md``. Everything is owned by root and written
by rename; what came from a user was checked before, and is read by that user alone.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import signal
import struct
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from stager import events, fsutil, ref, schedulers
from stager.envpatch import EnvPatch, separator
from stager.errors import StagerError
from stager.ref import Directive
from stager.schedulers import PBS, SLURM
from stager.warm import boot_id, start_time

ROOT = "/run/stager"
PENDING, READY, FAILED, CANCELLED = "pending", "ready", "failed", "cancelled"
STAGED, ORIGINAL, FAULTY, STRICT, PARTLY = "staged", "original", "fault", "strict", "partly"
_OF_THE_USER = (STAGED, ORIGINAL, "message")
"""Files with what may be secret: an environment's variables have tokens in them."""
MAX_MESSAGE = 65536
"""Bytes of one message of the process that works as the user."""


_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_NODE = re.compile(r"\[([0-9A-Za-z]+)[^\]]*\]")
MOST, _LONGEST = 200, 4096
"""Variables, and characters of one, that a process of the user's may tell."""


class Job(NamedTuple):
    """What the scheduler tells a hook about a job.

    Attributes:
        key: the id that the job's tasks see, as a file name: for a heterogeneous job that of its
            leader.
        id: its own id.
        comment: where the directive is: Slurm's comment; the PBS resource is nothing else.
        restart: how often it was requeued.
        first: whether this is the first of its nodes.
        scheduler: :data:`SLURM` or :data:`PBS`.
    """

    key: str
    id: str
    uid: int
    gid: int
    comment: str
    work_dir: str
    restart: str
    node: str
    first: bool
    scheduler: str = SLURM

    def directive(self) -> Directive | None:
        """What the job asks for, or None.

        Raises:
            UsageError: it is malformed.
        """
        if self.scheduler == PBS:
            return ref.parse_directive(self.comment, cwd=self.work_dir)
        return ref.find_directive(self.comment, cwd=self.work_dir)

    def asks_strict(self) -> bool:
        """Whether it is to fail where it cannot be staged; seen in a malformed directive too."""
        asks = ref.is_strict if self.scheduler == PBS else ref.asks_strict
        return asks(self.comment)

    @classmethod
    def of_pbs(cls, told: Mapping[str, Any]) -> Job:
        """Read what ``hooks/pbs/stager_hook.py`` tells of a job.

        Raises:
            StagerError: it is not as it should be, or there is no such user here.
        """
        import pwd

        texts = [str(told.get(name) or "") for name in ("id", "user", "pyenv", "work_dir", "node")]
        identity, user, value, work_dir, node = texts
        try:
            entry = pwd.getpwnam(user)
        except (KeyError, ValueError) as error:
            raise StagerError(
                f"the user {user!r} is unknown on this node",
                hint="the node's user database is incomplete",
            ) from error
        return cls(
            key=schedulers.file_name(identity),
            id=identity,
            uid=entry.pw_uid,
            gid=entry.pw_gid,
            comment=value,
            work_dir=work_dir if work_dir.startswith("/") else entry.pw_dir,
            restart=str(int(told.get("run_count") or 0)),
            node=node,
            first=told.get("first") is True,
            scheduler=PBS,
        )

    @classmethod
    def of_prolog(cls, environ: Mapping[str, str]) -> Job:
        """Read the variables of a Prolog or Epilog (prolog_epilog(5) of Slurm; 22.05 and newer).

        Raises:
            StagerError: one of them is missing or is not a number.
        """

        def number(name: str, default: str = "") -> str:
            value = environ.get(name) or default
            if not re.fullmatch(r"[0-9]{1,20}", value):
                raise StagerError(f"{name} is {value!r} in the Prolog's environment")
            return value

        identity = number("SLURM_JOB_ID")
        nodes = environ.get("SLURM_JOB_NODELIST") or environ.get("SLURM_NODELIST", "")
        node = environ.get("SLURMD_NODENAME", "")
        return cls(
            key=number("SLURM_HET_JOB_ID", identity),
            id=identity,
            uid=int(number("SLURM_JOB_UID")),
            gid=int(number("SLURM_JOB_GID")),
            comment=environ.get("SLURM_JOB_COMMENT", ""),
            work_dir=environ.get("SLURM_JOB_WORK_DIR", "/"),
            restart=number("SLURM_JOB_RESTART_COUNT", "0"),
            node=node,
            first=not nodes or first_node(nodes) == node,
        )


def first_node(nodes: str) -> str:
    """The first host of a list such as ``n[1-4],m7`` or ``rack[2-3]n[01,05]``."""
    depth, end = 0, len(nodes)
    for position, char in enumerate(nodes):
        depth += (char == "[") - (char == "]")
        if char == "," and depth == 0:
            end = position
            break
    # The first number of a range may be followed by "-" or ",": hosts are named after it.
    return _NODE.sub(r"\1", nodes[:end])


class Activation(NamedTuple):
    """What a task's environment becomes, as data that the root side has checked.

    Attributes:
        python: the interpreter, absolute; a task looks whether it can be seen.
        prefix: the environment's prefix.
        leave: prefixes whose directories leave PATH, and are replaced in other search paths.
        set: variables to set.
        unset: variables to remove.
        prepend: directories to put first in list variables.
    """

    python: str
    prefix: str
    leave: tuple[str, ...]
    set: dict[str, str]
    unset: tuple[str, ...]
    prepend: dict[str, tuple[str, ...]]

    @classmethod
    def checked(cls, value: Any, below: tuple[str, ...] = ()) -> Activation:
        """Check what a process of the user said.

        Args:
            value: decoded JSON.
            below: the directories that prefix and Python must be in; any where there are none.

        Raises:
            ValueError: anything about it is not as it should be.
        """
        if not isinstance(value, dict) or set(value) != {
            "python", "prefix", "leave", "set", "unset", "prepend"
        }:  # fmt: skip
            raise ValueError("not an activation")
        result = cls(
            python=path(value["python"], below),
            prefix=path(value["prefix"], below),
            leave=tuple(path(one) for one in _few(value["leave"], list)),
            set={_name(key): _text(one) for key, one in _few(value["set"], dict).items()},
            unset=tuple(_name(one) for one in _few(value["unset"], list)),
            prepend={
                _name(key): tuple(path(one) for one in _few(items, list))
                for key, items in _few(value["prepend"], dict).items()
            },
        )
        if any(separator(key) in one for key, items in result.prepend.items() for one in items):
            raise ValueError("a directory with a separator in a search path")
        return result

    def applied(self, environ: Mapping[str, str]) -> dict[str, str]:
        """The variables of a process that had these, with the environment active."""
        patch = EnvPatch(self.set, self.unset, self.prepend)
        return patch.apply(environ, dict.fromkeys(self.leave, self.prefix))

    def lines(self) -> str:
        """The file that TaskProlog reads: a keyword, a blank, a value."""
        out = [f"python {self.python}", f"prefix {self.prefix}"]
        out += [f"leave {one}" for one in self.leave]
        out += [f"env unset {name}" for name in self.unset]
        out += [f"env export {name}={value}" for name, value in self.set.items()]
        out += [
            f"prepend {name} {separator(name).join(items)}" for name, items in self.prepend.items()
        ]
        return "\n".join(out) + "\n"


def can_have(name: str, value: str) -> bool:
    """Tell whether an activation can set a variable: its text is one line, and not too long."""
    try:
        return bool(_name(name)) and _text(value) == value
    except ValueError:
        return False


def _few(value: Any, kind: type) -> Any:
    if not isinstance(value, kind) or len(value) > MOST:  # type: ignore[arg-type]
        raise ValueError("not a list or mapping, or too long a one")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > _LONGEST:
        raise ValueError("not a text, or too long a one")
    if any(ord(char) < 32 or ord(char) == 127 for char in value):
        raise ValueError("control characters")
    return value


def _name(value: Any) -> str:
    if not isinstance(value, str) or len(value) > 255 or not _VARIABLE.match(value):
        raise ValueError("not the name of a variable")
    return value


def path(value: Any, below: tuple[str, ...] = ()) -> str:
    """Check a path that a user named: absolute, in normal form.

    Args:
        value: what the user said.
        below: the directories that it must be in; any where there are none.

    Raises:
        ValueError: it is not.
    """
    text = _text(value)
    if not text.startswith("/") or os.path.normpath(text) != text:
        raise ValueError("not an absolute path in normal form")
    places = tuple(f"{one}/" for one in below)
    if places and not text.startswith(places):
        raise ValueError(f"a path outside {' and '.join(places)}")
    return text


def link_name(part: int, layer: int, layers: int) -> str:
    """The link in a job's directory that leads to a tree.

    Args:
        part: which of several environments together.
        layer: which of its layers, from the bottom up.
        layers: how many it has; the last one is the environment itself.
    """
    name = "env" if part == 0 else f"env{part + 1}"
    return name if layer == layers - 1 else f"{name}.base{layer}"


def _write(path: str, text: str, *, reader: int | None = None) -> None:
    """Write a file by rename.

    Args:
        path: the file.
        text: its content.
        reader: the only user who may read it, besides us; None: everybody may.
    """
    temporary = f"{path}.new"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(temporary, flags, 0o644 if reader is None else 0o600)
    with open(fd, "w", encoding="utf-8", errors="surrogateescape") as file:
        if reader:
            _let_read(fd, reader)
        file.write(text)
    os.rename(temporary, path)


def _let_read(fd: int, uid: int) -> None:
    """Let a user read a file that stays ours: an entry in its access control list, see acl(5)."""
    undefined = 0xFFFFFFFF
    entries = (  # tag, permissions, id: include/uapi/linux/posix_acl.h
        (0x01, 6, undefined),  # the owner
        (0x02, 4, uid),
        (0x04, 0, undefined),  # the group
        (0x10, 4, undefined),  # the most that the user or the group may
        (0x20, 0, undefined),  # others
    )
    version = struct.pack("<I", 2)
    packed = b"".join(struct.pack("<HHI", *one) for one in entries)
    try:
        os.setxattr(fd, "system.posix_acl_access", version + packed)
    except OSError as error:
        if error.errno != errno.ENOTSUP:
            raise
        os.fchown(fd, uid, -1)


def _end(pid: int, start: str) -> None:
    """End a process of ours, if it is still the one that was started; no matter how it is."""
    for number, tries in ((signal.SIGTERM, 40), (signal.SIGKILL, 20)):
        if start in ("", "0") or start_time(pid) != start:
            return
        with contextlib.suppress(OSError):
            os.killpg(pid, number)  # each leads a group of its own
        for _ in range(tries):
            if start_time(pid) != start:
                return
            time.sleep(0.05)


class State:
    """The directory of one job.

    Args:
        root: where the directories of all jobs are; made by root.
        key: the job, see :attr:`Job.key`.

    Raises:
        StagerError: no job is called that.
    """

    def __init__(self, root: str, key: str) -> None:
        if not re.fullmatch(r"[0-9][A-Za-z0-9._-]*", key):
            raise StagerError(f"{key!r} is no job")  # nor a way to some other directory
        self.root = os.path.join(root, "jobs")
        self.path = os.path.join(self.root, key)

    def begin(self, job: Job, record: Mapping[str, Any], *, strict: bool = False) -> bool:
        """Make the directory, with the status ``pending``.

        Args:
            job: the job.
            record: what else its end is to know.
            strict: whether its tasks are to fail where it is not staged.

        Returns:
            False where another component of a heterogeneous job has made it for this run already.
        """
        os.makedirs(self.root, 0o755, exist_ok=True)
        partial = f"{self.path}.{os.getpid()}.new"
        os.mkdir(partial, 0o755)
        try:
            os.mkdir(os.path.join(partial, "holders"), 0o755)
            _write(os.path.join(partial, "holders", job.id), "")
            known = {**job._asdict(), "boot": boot_id(), **record}
            _write(os.path.join(partial, "record.json"), json.dumps(known), reader=0)
            if strict:
                _write(os.path.join(partial, STRICT), "")
            _write(os.path.join(partial, "status"), f"{PENDING} 0\n")
            for _ in range(8):
                try:
                    os.rename(partial, self.path)
                    return True
                except OSError:
                    if not os.path.isdir(self.path):
                        raise
                known = self.record()
                run = (known.get("restart"), known.get("uid"), known.get("boot"))
                if run == (job.restart, job.uid, boot_id()) and job.id not in self.holders():
                    if strict:
                        self.write(STRICT, "")
                    self.write("holders/" + job.id, "")
                    return False
                self.discard()
            raise StagerError(f"cannot replace {self.path}")
        finally:
            with contextlib.suppress(OSError):
                fsutil.remove_tree(partial)

    def exists(self) -> bool:
        """Tell whether a Prolog has left anything for this job."""
        return os.path.isdir(self.path)

    def write(self, name: str, text: str) -> None:
        """Write one file by rename; what may tell the user's secrets, for that user alone."""
        owner = self.record().get("uid") if name in _OF_THE_USER else None
        _write(os.path.join(self.path, name), text, reader=owner)

    def link(self, name: str, target: str) -> None:
        """Let a link lead to a tree, by rename; root never goes where it leads.

        Args:
            name: see :func:`link_name`.
            target: absolute; whose content is the user's.
        """
        path = os.path.join(self.path, name)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{path}.new")
        os.symlink(target, f"{path}.new")
        os.rename(f"{path}.new", path)

    def read(self, name: str) -> str:
        """The text of a file; empty where there is none."""
        try:
            path = os.path.join(self.path, name)
            with open(path, encoding="utf-8", errors="surrogateescape") as file:
                return file.read()
        except OSError:
            return ""

    def finish(self, status: str, message: str = "") -> None:
        """Write the outcome; the message first, for whoever sees the status reads it."""
        if message:
            self.write("message", events.clean(message, 1000) + "\n")
        self.write("status", status + "\n")

    def fail(self, message: str, *, strict: bool = False) -> None:
        """Write a failure, even where :meth:`begin` was not reached."""
        os.makedirs(self.path, 0o755, exist_ok=True)
        if strict:
            self.write(STRICT, "")
        self.finish(FAILED, message)

    def record(self) -> dict[str, Any]:
        """What the Prolog knew about the job; empty where it cannot be read."""
        try:
            value = json.loads(self.read("record.json"))
        except ValueError:
            return {}
        return value if isinstance(value, dict) else {}

    def holders(self) -> list[str]:
        """The components of the job that are on this node."""
        try:
            return os.listdir(os.path.join(self.path, "holders"))
        except OSError:
            return []

    def leave(self, job_id: str) -> bool:
        """One component has ended; returns whether it was the last."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(self.path, "holders", job_id))
        return not self.holders()

    def end_worker(self) -> None:
        """End the worker, which alone writes here, and what it started.

        A process of the user's that hangs in a dead file system is given up after three seconds.
        """
        words = self.read("worker").split()
        for pid, start in zip(words[::2], words[1::2]):
            if pid.isdigit():
                _end(int(pid), start)

    def discard(self) -> None:
        """Remove what an earlier run left whose Epilog never came.

        Its worker outlives the daemon that started it, and would go on writing here.
        """
        self.end_worker()
        self.remove()

    def remove(self) -> None:
        """Remove the directory; nothing happens where it is gone already."""
        with contextlib.suppress(OSError):
            fsutil.remove_tree(self.path)
