"""Staging on every node of an allocation from one of them: a batch script, or the shell of salloc.

::

    stage-run, activate --srun--> `stager keep` on each node: stages, reports, holds the mounts

The step that holds the mounts is called the keeper. It lasts until the job ends, for a FUSE server
started in a step is killed with it; where every tree was extracted, it ends at once. Under PBS it
is pbsdsh that starts it, and it stays in any case: a watcher does what is to be done at the end.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shlex
import signal
import stat
import subprocess
import time
from collections.abc import Iterable
from typing import Any

from stager import fsutil, schedulers
from stager.config import Config
from stager.errors import BusyError, StagerError, from_data
from stager.formats import squashfs
from stager.repository import Published, Repository
from stager.schedulers import Allocation
from stager.staging import lease, store
from stager.staging.processes import KEEPER, has_tasks, own_command, owner_of
from stager.staging.sessions import session_directory
from stager.staging.stage import Staged
from stager.staging.store import EXTRACTED, MOUNTED, SENT, Store
from stager.staging.trees import Progress

_INPUT = ("SLURM_", "SRUN_", "SBATCH_", "SALLOC_", "PMI", "OMPI_", "STAGER_SESSION")
"""Variables that would tell an srun of ours what the user meant for theirs."""

_PREFIX = re.compile(r"\A(srun|slurmstepd\S*): (error: )?")
_LOST = re.compile(r"srun: error: (?P<node>\S+): tasks? \S+: (?P<how>.+)")
"""What srun says as soon as a task has ended with another status than 0."""

_LAST_WORDS = 0.5
"""Seconds to wait for what a lost node has said: srun may tell of its end before its words."""

_MOMENT = 1.0
"""Seconds to wait for who looks into the store, or unmounts; who stages takes longer."""


def stage_everywhere(
    published: Published,
    config: Config,
    where: Allocation,
    *,
    via: str,
    progress: Progress,
) -> Staged:
    """Stage on all nodes of an allocation, by a job step that then holds the mounts.

    A job has one such step for each environment; it is found again by a record beside the
    sessions (see :func:`session_directory`).

    Args:
        published: the environment.
        config: see :mod:`stager.config`.
        where: the allocation; what is staged belongs to it.
        via: how the image gets to the nodes: ``shared``, ``sbcast``, or ``auto`` by their number.
        progress: told what the user may want to know.

    Raises:
        StagerError: a node could not do it; then none is used, for a job has one environment.
    """
    name = f"{where.job}.{where.restart}.keeper-{published.digest[:16]}"
    record = os.path.join(session_directory(), name)
    with fsutil.locked(f"{record}.lock", timeout=config["stage.timeout"], waiting=progress.waiting):
        kept = _read_record(record)
        if kept is None:
            kept = _keep(published, config, where, via, progress, record)
            fsutil.write_atomic(record, json.dumps(kept).encode(), mode=0o600, durable=False)
    how = {layer.id: kept["how"] for layer in published.manifest.layers}
    return Staged(kept["prefix"], kept["how"], published.manifest, how)


def _read_record(path: str) -> dict[str, Any] | None:
    try:
        with open(path, "rb") as file:
            kept: dict[str, Any] = json.load(file)
    except (OSError, ValueError):
        return None
    # Where nothing had to be held, the step is over and what it did stays.
    return kept if not kept["keeper"] or lease.is_alive(kept["keeper"]) else None


def _keep(
    published: Published,
    config: Config,
    where: Allocation,
    via: str,
    progress: Progress,
    record: str,
) -> dict[str, Any]:
    arguments = [
        *own_command(), "keep", published.ref,
        "--repository", published.repository.root,
        "--store", config["store"],
        "--how", config["stage.how"],
        "--timeout", str(config["stage.timeout"]),
    ]  # fmt: skip
    with contextlib.ExitStack() as stack:
        answers = ""
        if where.scheduler == schedulers.PBS:
            # What tasks print is the job's own output: the nodes answer where all can write.
            answers = stack.enter_context(Repository(config["repository"]).workspace())
            command = _pbsdsh(where, [*arguments, "--answers", answers])
        else:
            if _is_sent(via, config, where):
                arguments += _send(published, config, progress)
            command = _srun(where, arguments)
        process = _start(command, record, where.job)
        reports: list[dict[str, Any]] = []
        try:
            _await(reports, process, record, answers, where.nodes, config["stage.timeout"])
            failed = [one for one in reports if "error" in one]
            if failed:
                raise _folded(failed, len(reports))
            prefixes = {str(one["prefix"]) for one in reports}
            if len(prefixes) != 1:
                raise StagerError(f"the nodes have different stores: {', '.join(sorted(prefixes))}")
        except BaseException:
            # What it mounted may be in use by another environment of the job, over the same base.
            # One that found all mounts there is not kept: a script may fail so a hundred times.
            if not any(one.get("serves") for one in reports):
                _end(process)
            raise
        held = any(one["holds"] for one in reports)
        return {
            "prefix": prefixes.pop(),
            "how": EXTRACTED if any(one["how"] == EXTRACTED for one in reports) else MOUNTED,
            "keeper": lease.of_process(process.pid) if held else "",
        }


def _start(command: list[str], record: str, job: str) -> subprocess.Popen[bytes]:
    """Start the step; what it says goes to files beside the record."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith(_INPUT)}
    environ[KEEPER] = job
    if "SLURM_CONF" in os.environ:
        environ["SLURM_CONF"] = os.environ["SLURM_CONF"]
    try:
        with open(f"{record}.out", "wb") as out, open(f"{record}.err", "wb") as said:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=said,
                env=environ,
                start_new_session=True,
            )
    except OSError as error:
        raise fsutil.explain(error, f"start {command[0]}") from error


def _srun(where: Allocation, command: list[str]) -> list[str]:
    """The command line that runs a command once on each node, beside all other steps."""
    argv = ["srun"]
    for number, nodes in enumerate(where.components):
        if number:
            argv.append(":")
        argv += [
            f"--jobid={where.job}", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1",
            "--cpus-per-task=1", "--mem=0", "--gres=none", "--overlap", "--mpi=none",
            "--input=none", "--quiet", "--wait=0", "--kill-on-bad-exit=0", "--job-name=stager",
        ]  # fmt: skip
        if len(where.components) > 1:
            argv.append(f"--het-group={number}")
        argv += command
    return argv


def _pbsdsh(where: Allocation, command: list[str]) -> list[str]:
    """The command line that runs a command once on each node of a PBS job.

    pbsdsh hands no variables on, and counts the lines of the job's list of nodes.
    """
    from stager.schedulers import pbs

    lines = " ".join(map(str, pbs.first_entries(os.environ).values()))
    script = 'lines=$1; shift; for one in $lines; do pbsdsh -n "$one" -- "$@" & done; wait'
    return ["sh", "-c", script, "sh", lines, "env", f"{KEEPER}={where.job}", *command]


def _reports(record: str, answers: str) -> list[dict[str, Any]]:
    """What the nodes have said so far."""
    if answers:
        found = []
        for name in sorted(one for one in os.listdir(answers) if one.endswith(".json")):
            with open(os.path.join(answers, name), "rb") as file:
                found.append(json.load(file))
        return found
    with open(f"{record}.out", "rb") as file:
        lines = file.read().split(b"\n")[:-1]  # the last one may be half of a line
    return [json.loads(line) for line in lines if line.startswith(b"{")]


def _await(
    reports: list[dict[str, Any]],
    process: subprocess.Popen[bytes],
    record: str,
    answers: str,
    nodes: int,
    timeout: float,
) -> None:
    """Fill in what the nodes say; also where it fails, for what those have mounted is to stay."""
    deadline = time.monotonic() + timeout + 30.0  # the nodes have the limit itself
    until = 0.0
    while True:
        ended = process.poll() is not None
        # Before the reports: who has said before such news that it serves is known to us then.
        with open(f"{record}.err", encoding="utf-8", errors="replace") as file:
            said = [line.strip() for line in file if line.strip()]
        reports[:] = _reports(record, answers)
        if len(reports) >= nodes:
            return
        # Who has answered exits 0, or stays.
        lost = next(filter(None, map(_LOST.match, said)), None)
        others = [line for line in said if not _LOST.match(line)]
        # What led to it: a traceback begins with another line, and any node may warn.
        wrong = [line for line in others if "rror: " in line]
        if lost and not until:
            until = time.monotonic() + _LAST_WORDS
        if lost and (wrong or ended or time.monotonic() > until):
            reasons = wrong or others
            raise StagerError(
                f"stager failed on {lost['node']} ({lost['how']})"
                + (f": {_PREFIX.sub('', reasons[0])}" if reasons else ""),
                hint=f"does `{shlex.join([*own_command(), '--version'])}` work there?",
            )
        if ended:
            reason = _PREFIX.sub("", said[-1] if said else "")
            raise StagerError(f"no job step could stage on all nodes: {reason or 'it ended'}")
        if time.monotonic() > deadline:
            raise BusyError(
                f"{nodes - len(reports)} of {nodes} nodes have not staged in time",
                hint="raise the time limit: --timeout, or the key `stage.timeout`",
            )
        time.sleep(0.05)


def _folded(failed: list[dict[str, Any]], total: int) -> StagerError:
    """One error for all nodes: the most frequent reason, and where."""
    reasons: dict[str, list[dict[str, Any]]] = {}
    for one in failed:
        reasons.setdefault(str(one["error"]), []).append(one)
    reason, those = max(reasons.items(), key=lambda item: len(item[1]))
    names = sorted(str(one["node"]) for one in those)
    shown = ",".join(names[:4]) + (",..." if len(names) > 4 else "")
    message = f"{len(failed)} of {total} nodes cannot stage: {shown}: {reason}"
    return from_data({**those[0], "error": message})


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the step on all nodes: what srun and pbsdsh do when they are told to end."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(15.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def report(result: Staged | StagerError, *, mounted: bool = False, stays: bool = False) -> str:
    """The line in which a node of the keeper tells how it went.

    Args:
        result: what came out.
        mounted: some of it is mounted.
        stays: this process lasts as long as the job.
    """
    node = os.environ.get("SLURMD_NODENAME") or os.uname().nodename
    if isinstance(result, StagerError):
        value = result.as_data()
    else:
        how = MOUNTED if mounted else EXTRACTED
        serves = stays and MOUNTED in result.layers.values()
        value = {"prefix": result.prefix, "how": how, "holds": stays, "serves": serves}
    return json.dumps({"node": node, **value}) + "\n"


def answer(line: str, directory: str) -> None:
    """Put the line where :func:`stage_everywhere` waits for it."""
    path = os.path.join(directory, f"{os.uname().nodename}.json")
    with contextlib.suppress(OSError):  # nobody waits any more
        fsutil.write_atomic(path, line.encode(), mode=0o600, durable=False)


def mounted_layers(result: Staged, node: Store) -> list[str]:
    """The layers of a staged environment that are mounted, not extracted."""
    return [one.id for one in result.manifest.layers if squashfs.is_mounted(node.tree(one.id))]


def put_off_end() -> None:
    """Block SIGTERM until :func:`hold`, and for ever in the FUSE servers we start.

    They inherit that; else they would unmount when it comes (fuse_set_signal_handlers(3)).
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def stay() -> None:
    """Stay until the job ends; a watcher does the rest (:mod:`stager.staging.watcher`)."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # one may have come meanwhile
    while True:
        signal.pause()


def hold(layers: list[str], node: Store, holder: str) -> None:
    """Stay until the job ends, then unmount, and give up the job's claims.

    At the end Slurm sends SIGTERM to all and, ``KillWait`` later, SIGKILL. Meanwhile a program may
    be writing its last checkpoint: the mounts stay until no other process of the job is left.
    """
    me = owner_of(os.environ)
    assert me is not None
    signal.sigwait({signal.SIGTERM})  # no thread takes it: all have been started with it blocked
    while has_tasks(me.job):
        time.sleep(0.2)
    for layer in layers:
        with contextlib.suppress(StagerError), node.lock(layer, timeout=1.0):
            node.end_mount(layer, me.text)
    node.release(holder)


# -- the image, sent ahead -------------------------------------------------------------------


def _is_sent(via: str, config: Config, where: Allocation) -> bool:
    threshold = config["stage.sbcast_nodes"]
    return via == "sbcast" or (via == "auto" and 0 < threshold <= where.nodes)


def _send(published: Published, config: Config, progress: Progress) -> list[str]:
    """Send the images with sbcast; returns the arguments that tell the nodes where they are.

    sbcast makes no directories, and without --force it never writes to a file that is there. Where
    only root may make stores, the Prolog has made ours on every node of the job.
    """
    place, parent = config["store"], os.path.dirname(config["store"])
    if os.access(parent, os.W_OK):
        place = parent
    elif not os.path.isdir(place):
        place = "/tmp"  # noqa: S108 - under a name that nobody can guess
    arguments: list[str] = []
    for layer in published.manifest.layers:
        if layer.image.format != "squashfs":
            continue  # archives are unpacked as they are read
        target = os.path.join(place, f"{SENT}{os.getuid()}-{secrets.token_hex(8)}")
        done = subprocess.run(
            ["sbcast", published.repository.image(layer), target],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
        # Also where it failed: some nodes may have all of it, others a part for them to remove.
        arguments += ["--received", f"{layer.id}={target}"]
        if done.returncode != 0:
            said = done.stderr.decode(errors="replace").strip().splitlines()
            reason = said[-1] if said else f"status {done.returncode}"
            progress.note(f"sbcast failed ({reason}); the nodes read the shared image instead")
            break
    return arguments


def receive(received: Iterable[str], node: Store) -> None:
    """Take images that were sent here into the store; staging then verifies them.

    Args:
        received: ``ID=PATH`` each, as :func:`_send` told.
        node: the store.

    Raises:
        StagerError: the store cannot take them. They are :func:`drop`'s then.
    """
    for one in received:
        layer, _, path = one.partition("=")
        if not re.fullmatch(r"[0-9a-f]{16}", layer):
            raise StagerError(f"{one!r} names no layer")
        if not _is_ours(path):
            continue
        # Who holds the lock for longer makes this tree, or brings its image: nobody needs ours.
        with (
            contextlib.suppress(BusyError),
            store.blame_node("take in an image"),
            node.lock(layer, timeout=_MOMENT),
        ):
            # Where one is mounted, if only where we cannot see it, its image is here already.
            if node.ready(layer) is None and not node.was_mounted(layer):
                # Only an image of this boot that has a stamp is used without being verified.
                node.withdraw(layer)
                try:
                    os.rename(path, node.image(layer))
                except OSError as error:
                    if error.errno != errno.EXDEV:
                        raise
                    _copy(path, layer, node)
        drop([one])


def _copy(path: str, layer_id: str, node: Store) -> None:
    """Take in an image from another disk. Needs the layer's lock."""
    import shutil

    workspace = node.workspace(layer_id)
    try:
        copied = os.path.join(workspace, "image")
        shutil.copyfile(path, copied)
        os.rename(copied, node.image(layer_id))
    finally:
        fsutil.remove_tree(workspace)


def drop(received: Iterable[str]) -> None:
    """Remove images that were sent here and that no store has taken in; nobody else would."""
    for one in received:
        path = one.partition("=")[2]
        with contextlib.suppress(OSError):
            if _is_ours(path):
                os.unlink(path)


def _is_ours(path: str) -> bool:
    try:
        info = os.lstat(path)
    except FileNotFoundError:
        return False
    return stat.S_ISREG(info.st_mode) and info.st_uid == os.geteuid()
