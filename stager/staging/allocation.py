"""Staging inside a scheduler's job, without an administrator's help.

Three facts shape it. A FUSE server started in a job step is killed with the step (``setsid`` does
not help where a cgroup tracks processes), so a mount serves only those whose end it shares. A
batch script runs on one node of many. And what runs once per rank must not be a Python.

*Whose mount.* :func:`stage_here` looks at who serves a mounted tree. A mount of another job or
step is never relied on: while its owner lives, the tree is extracted beside it and put in its
place; once the owner is gone, it is mounted again from the image in the store.

*Every node.* See :mod:`stager.staging.keeper`.

*Every rank.* :mod:`stager.staging.sessions` has what one rank found out for the others of its node.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping

from stager import fsutil, ref, schedulers, warm
from stager.config import Config
from stager.errors import NoSpaceError, StagerError
from stager.formats import squashfs
from stager.manifest import Layer, Manifest
from stager.ref import Directive
from stager.repository import Published
from stager.schedulers import Allocation
from stager.staging import sitestore, store, trees
from stager.staging import stage as staging
from stager.staging.processes import KEEPER, Owner, own_command, owner_of, processes
from stager.staging.stage import Staged
from stager.staging.store import EXTRACTED, MOUNTED, Stamp, Store
from stager.staging.trees import Progress

LAUNCHERS = frozenset(("srun", "mpirun", "mpiexec", "orterun", "prterun", "prun"))
_RANKS = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "PALS_RANKID")


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


def foreign(node: Store, layer: Layer) -> Owner | None:
    """Who else a mounted tree depends on, or None where it can be relied on."""
    stamp = node.stamp(layer.id)
    if stamp is None or stamp.how != MOUNTED:
        return None
    # One whose job is suspended, say, does not answer now, and will again.
    if warm.mounted(node.tree(layer.id)) not in (warm.LIVE, warm.SILENT):
        return None
    told = stamp.owner
    owner = Owner.read(told) if told is not None else _server_owner(node.tree(layer.id))
    me = owner_of(os.environ)
    if owner is None or owner == me:
        return None
    return None if me is not None and owner == Owner(me.job, "") else owner


def _is_elsewhere(node: Store, layer: Layer) -> bool:
    """Tell whether a tree is mounted where we cannot see it, in another mount namespace.

    To make it anew would take it away there: a directory that is removed in one namespace is
    unmounted in all others.
    """
    tree = node.tree(layer.id)
    if not node.was_mounted(layer.id) or warm.mounted(tree):
        return False
    return any(one.is_server and one.arguments[-1] == tree for one in processes())


def stage_here(
    published: Published, config: Config, *, holder: str, progress: Progress | None = None
) -> Staged:
    """Stage on this node, not relying on a mount that somebody else's end would take away.

    The arguments and errors are those of :func:`stager.staging.stage.stage`.
    """
    shared = sitestore.staged(published, config, holder)
    if shared is not None:
        return shared
    node = Store(config["store"])
    for _ in range(3):
        for layer in published.manifest.layers:
            _settle(layer, node, config, holder)
        result = staging.stage(published, node, config, holder=holder, progress=progress)
        # Between the two somebody may have mounted what was not there.
        if not any(foreign(node, layer) for layer in published.manifest.layers):
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
        from stager.staging import watcher

        with store.blame_node("leave somebody here who clears up after the job"):
            watcher.start(where, config["store"], own_command())
    try:
        return stage_here(published, config, holder=holder, progress=progress)
    except NoSpaceError:
        from stager.staging import collect

        node = Store(config["store"])
        limits = {"max_size": config["collect.max_size"], "min_free": config["collect.min_free"]}
        freed = collect.collect(node, **limits, exists=schedulers.job_exists)
        if not (freed.leases or freed.trees):
            raise
        return stage_here(published, config, holder=holder, progress=progress)


def _settle(layer: Layer, node: Store, config: Config, holder: str) -> None:
    if foreign(node, layer) is None and not _is_elsewhere(node, layer):
        return
    with (
        store.blame_node("stage into the store"),
        node.lock(layer.id, timeout=config["stage.timeout"]),
    ):
        owner = foreign(node, layer)
        if _is_elsewhere(node, layer) or (owner is not None and _lives(owner)):
            node.lease(layer.id, holder)
            _extract_in_place(layer, node, config)
        elif owner is not None:
            node.clear(layer.id)


def _extract_in_place(layer: Layer, node: Store, config: Config) -> None:
    """Put an extracted tree in the place of a mounted one that is in use. Needs the lock.

    Who has files of the mount open keeps them: it is detached, and its server lives on for them.
    """
    trees.make_room(layer, EXTRACTED, node, config, present=layer.image.size)
    image, tree = node.image(layer.id), node.tree(layer.id)
    workspace = node.workspace(layer.id)
    try:
        extracted = node.unpacking(workspace)
        squashfs.extract(image, extracted)
        node.withdraw(layer.id)
        _swap(extracted, tree)
        size = trees.extracted_size(layer)
        node.set_ready(layer.id, Stamp(layer.filename, EXTRACTED, store.boot_id(), size))
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
