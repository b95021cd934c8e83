"""Staging inside a scheduler's job, without an administrator's help.

Three facts shape it. A FUSE server started in a job step is killed with the step (``setsid`` does
not help where a cgroup tracks processes), so a mount serves only those whose end it shares. A
batch script runs on one node of many. And what runs once per rank must not be a Python.

*Whose mount.* :func:`stage_here` looks at who serves a mounted tree. A mount of another job or
step is never relied on: while its owner lives, the tree is extracted beside it and put in its
place; once the owner is gone, it is mounted again from the image in the store.

*Every node.* See :mod:`stager.keeper`.

*Every rank.* :func:`write_session` leaves what one rank found out for the others of its node.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import stager
from stager import envpatch, fsutil, ref, schedulers, store, trees
from stager import stage as staging
from stager.config import Config
from stager.errors import NoSpaceError, StagerError
from stager.formats import squashfs
from stager.manifest import Layer, Manifest
from stager.ref import Directive
from stager.repository import Published
from stager.schedulers import Allocation
from stager.stage import Staged
from stager.store import EXTRACTED, MOUNTED, Stamp, Store
from stager.trees import Progress

KEEPER = "STAGER_KEEPER"
"""The job at whose end, and not at a step's, what a process mounts goes away."""

LAUNCHERS = frozenset(("srun", "mpirun", "mpiexec", "orterun", "prterun", "prun"))
_RANKS = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "PALS_RANKID")
_OLD = 86400.0


# -- the environment that a job asked for ----------------------------------------------------


def directive(environ: Mapping[str, str]) -> Directive | None:
    """The directive of the job we are in; None without one.

    Slurm is asked for the job's comment. PBS hands on what ``qsub -v PYENV=REF`` says; with ``-l
    pyenv=REF`` it is the hook's to stage.

    Raises:
        UsageError: it is malformed.
    """
    from stager.schedulers import slurm

    job = environ.get("SLURM_JOB_ID", "")
    if not job and environ.get("PBS_JOBID") and environ.get("PYENV"):
        return ref.parse_directive(environ["PYENV"], cwd=environ.get("PBS_O_WORKDIR"))
    comment, directory = slurm.comment(job) if job else ("", "")
    return ref.find_directive(comment, cwd=directory or None)


# -- whose mount -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Owner:
    """A job, and its step where something lasts only as long as that."""

    job: str
    step: str


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


@dataclass(frozen=True)
class Process:
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


def _server_owner(tree: str) -> Owner | None:
    """Whose the FUSE server of a mounted tree is; None where it belongs to no job."""
    for process in processes():
        if process.is_server and process.arguments[-1] == tree:
            return owner_of(process.environ)
    return None


def _lives(owner: Owner) -> bool:
    """Tell whether a job or step still has processes here that may use its mounts."""
    for process in processes():
        found = owner_of(process.environ)
        if found is None or process.is_server or process.pid == os.getpid():
            continue
        if found.job == owner.job and owner.step in ("", found.step):
            return True
    return False


def _foreign(node: Store, layer: Layer) -> Owner | None:
    """Who else a mounted tree depends on, or None where it can be relied on."""
    stamp = node.stamp(layer.id)
    if stamp is None or stamp.how != MOUNTED or not squashfs.is_mounted(node.tree(layer.id)):
        return None
    owner, me = _server_owner(node.tree(layer.id)), owner_of(os.environ)
    if owner is None or owner == me:
        return None
    return None if me is not None and owner == Owner(me.job, "") else owner


def stage_here(
    published: Published, config: Config, *, holder: str, progress: Progress | None = None
) -> Staged:
    """Stage on this node, not relying on a mount that somebody else's end would take away.

    The arguments and errors are those of :func:`stager.stage.stage`.
    """
    node = Store(config["store"])
    for _ in range(3):
        for layer in published.manifest.layers:
            _settle(layer, node, config, holder)
        result = staging.stage(published, node, config, holder=holder, progress=progress)
        # Between the two somebody may have mounted what was not there.
        if not any(_foreign(node, layer) for layer in published.manifest.layers):
            break
    return result


def stage_with_room(
    published: Published, config: Config, *, holder: str, progress: Progress | None = None
) -> Staged:
    """Like :func:`stage_here`; where space is short, ask which claims are of jobs that ended.

    Nobody tells a node without hooks that a job is over.
    """
    where = schedulers.allocation(os.environ)
    if where is not None and where.scheduler == schedulers.PBS:
        from stager import watcher

        watcher.start(where, config["store"], own_command())
    try:
        return stage_here(published, config, holder=holder, progress=progress)
    except NoSpaceError:
        from stager import collect

        node = Store(config["store"])
        limits = {"max_size": config["collect.max_size"], "min_free": config["collect.min_free"]}
        freed = collect.collect(node, **limits, exists=schedulers.job_exists)
        if not freed.leases:
            raise
        return stage_here(published, config, holder=holder, progress=progress)


def _settle(layer: Layer, node: Store, config: Config, holder: str) -> None:
    if _foreign(node, layer) is None:
        return
    with (
        store.blame_node("stage into the store"),
        node.lock(layer.id, timeout=config["stage.timeout"]),
    ):
        owner = _foreign(node, layer)
        if owner is None:
            return
        if _lives(owner):
            node.lease(layer.id, holder)
            _extract_in_place(layer, node, config)
        else:
            node.clear(layer.id)


def _extract_in_place(layer: Layer, node: Store, config: Config) -> None:
    """Put an extracted tree in the place of a mounted one that is in use. Needs the lock.

    Who has files of the mount open keeps them: it is detached, and its server lives on for them.
    """
    trees.make_room(layer, EXTRACTED, node, config)
    image, tree = node.image(layer.id), node.tree(layer.id)
    workspace = node.workspace(layer.id)
    try:
        extracted = os.path.join(workspace, "tree")
        squashfs.extract(image, extracted)
        node.withdraw(layer.id)
        _swap(extracted, tree)
        node.set_ready(layer.id, Stamp(layer.filename, EXTRACTED, store.boot_id(), layer.size))
        os.unlink(image)
    finally:
        fsutil.remove_tree(workspace)


def _swap(directory: str, mounted: str) -> None:
    """Rename a directory over a mount point, which must not be missing for longer than it takes.

    That fails (EBUSY) until the mount is gone, so it is tried all the time while fusermount works.
    """
    import threading

    over = threading.Event()

    def rename() -> None:
        while not over.is_set():
            with contextlib.suppress(OSError):
                os.rename(directory, mounted)
                return

    renaming = threading.Thread(target=rename)
    renaming.start()
    try:
        squashfs.unmount(mounted, force=True)
        renaming.join(1.0)
    finally:
        over.set()
        renaming.join()
    if os.path.lexists(directory):
        raise StagerError(f"{mounted} cannot be unmounted")


# -- every node, every rank -----------------------------------------------------------------


def needs_every_node(where: Allocation | None, command: list[str]) -> bool:
    """Tell whether staging here is not enough for a command, which may start others elsewhere.

    Args:
        where: the allocation we are in.
        command: what will run; empty for a shell that goes on.
    """
    if where is None:
        return False
    launcher = bool(command) and os.path.basename(command[0]) in LAUNCHERS
    rank = where.step or any(name in os.environ for name in _RANKS)
    return (launcher or not rank) and (where.nodes > 1 or not where.node)


@contextlib.contextmanager
def lasting(where: Allocation | None) -> Iterator[None]:
    """Say that what is mounted meanwhile lasts as long as the job, where we are in no step of it.

    A batch script and an interactive shell end with their job.
    """
    if where is None or where.step:
        yield
        return
    os.environ[KEEPER] = where.job
    try:
        yield
    finally:
        del os.environ[KEEPER]


def also_outside(
    environ: Mapping[str, str], manifest: Manifest, where: Allocation
) -> dict[str, str]:
    """Let the shell of salloc find the original, where it runs on a machine with no staged tree."""
    after = dict(environ)
    if not where.node:
        first, _, rest = after.get("PATH", "").partition(":")
        after["PATH"] = ":".join([first, os.path.join(manifest.origin, "bin"), rest])
    return after


def session_directory() -> str:
    """Where the ranks of a step find what one of them found out: private, and fixed, for ``sh``.

    Raises:
        DeniedError: somebody else has made it.
    """
    path = f"/tmp/stager-{os.getuid()}"  # noqa: S108 - refused unless it is ours alone
    fsutil.own_directory(path, "directory")
    fsutil.own_directory(os.path.join(path, "sessions"), "directory")
    return os.path.join(path, "sessions")


def write_session(
    path: str,
    options: str,
    before: Mapping[str, str],
    after: Mapping[str, str] | None,
    *,
    prefix: str = "",
) -> None:
    """Leave the outcome for the other ranks of the node, as lines of ``sh``.

    Args:
        path: the file ``stage-run`` waits for.
        options: its options; a rank with others does not use it. The file also uses its functions.
        before: our environment.
        after: the environment to run in; None means that every rank is to fail.
        prefix: a staged tree that must be there, if any.
    """
    from shlex import quote

    lines = [f'[ "$options" = {quote(options)} ] || return 1']
    if after is None:
        lines.append("exit 125")
    else:
        changed, unset = envpatch.changes(before, after)
        names = (*changed, *unset)
        # A rank that started from other values would end up with ours.
        lines += [
            f'[ "${{{name}-}}" = {quote(before.get(name, ""))} ] || return 1' for name in names
        ]
        if prefix:
            lines.append(f"alive {quote(prefix)} || return 1")
        lines += [f"unset {name}" for name in unset if name in names]
        lines += [f"export {name}={quote(changed[name])}" for name in names if name in changed]
    try:
        fsutil.write_atomic(path, ("\n".join(lines) + "\n").encode(), mode=0o600, durable=False)
        _sweep(os.path.dirname(path))
    except OSError:
        # Without the other file they do not wait for this one.
        with contextlib.suppress(OSError):
            os.unlink(f"{path}.leader")


def _sweep(directory: str) -> None:
    """Remove what jobs of the past have left here, and images that nobody took in."""
    import glob

    sent = glob.glob(f"/tmp/stager-{os.getuid()}-*")  # noqa: S108 - only our own are removed
    for path in (*glob.glob(os.path.join(glob.escape(directory), "*")), *sent):
        with contextlib.suppress(OSError):
            info = os.lstat(path)
            if info.st_uid == os.geteuid() and time.time() - info.st_mtime > _OLD:
                os.unlink(path)
