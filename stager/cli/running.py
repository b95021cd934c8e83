"""``stager run``, the part of ``stage-run`` that needs Python, and ``stager keep``."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import shutil
import signal
import sys
from collections.abc import Mapping

from stager import activate as activation
from stager import containers, fsutil, lookup, schedulers
from stager.cli import report
from stager.cli.common import Bars, load_config, say
from stager.cli.preparing import ask_job, prepare
from stager.errors import OptionError, StagerError, UsageError, known
from stager.staging import allocation, lease, sessions
from stager.staging.processes import KEEPER
from stager.staging.stage import Staged

FAILED, NOT_EXECUTABLE, NOT_FOUND = 125, 126, 127
"""What env(1) exits with for itself, for a program that cannot start, and for a missing one."""


def run(arguments: argparse.Namespace) -> int:
    """Stage, activate and exec; fall back to the original where staging fails."""
    # stage-run tells where the other ranks of the node wait for us.
    session = os.environ.pop("STAGER_SESSION", "")
    options = os.environ.pop("STAGER_SESSION_OPTIONS", "")
    command = arguments.command
    if command[:1] == ["--"]:
        command = command[1:]
    strict, prefix = arguments.strict, ""
    environ: dict[str, str] | None
    try:
        if not command:
            raise UsageError("no command was given", hint="stage-run [--env REF] [--strict] CMD...")
        faults: list[UsageError] = []
        config = load_config(arguments, faults)
        strict = config["run.strict"]
        ask_job(arguments, "env", config)
        strict = config["run.strict"]
        if faults:
            raise faults[0]
        where = schedulers.allocation(os.environ)
        everywhere = where if allocation.needs_every_node(where, command) else None
        with allocation.lasting(where):
            # exec keeps our process number: the claim lasts as long as the command.
            found, results = prepare(
                arguments.env,
                config,
                holder=lease.of_job_or_process(os.getpid()),
                everywhere=everywhere,
                via=arguments.via,
            )
        name = lookup.called(arguments.env or os.environ.get("STAGER_ENV"), found)
        environ = activation.staged(results, config, os.environ, ref=name)
        prefix = results[0].prefix
        warning = containers.warning(command, results[0].manifest)
        if warning:
            say(f"stage-run: {warning}")
        if arguments.same_path:
            _take_place(command, results, strict=strict, everywhere=everywhere is not None)
        if everywhere is not None:
            environ = allocation.also_outside(environ, found[0].manifest, everywhere)
    except Exception as problem:
        # Also what we did not foresee: a bug of ours is no reason for a job not to run.
        if os.environ.get("STAGER_DEBUG") and not isinstance(problem, StagerError):
            raise
        error = _explained(problem)
        if not command:
            report(error)
            return FAILED
        environ = _without(arguments, error, strict=strict)
    if session:
        sessions.write_session(session, options, os.environ, environ, prefix=prefix)
    return FAILED if environ is None else _exec(command, environ)


def _take_place(
    command: list[str], results: list[Staged], *, strict: bool, everywhere: bool
) -> None:
    """Put staged trees in the place of their originals, for the command; or say why not."""
    launcher = os.path.basename(command[0])
    try:
        if launcher == "srun" or (everywhere and launcher in allocation.LAUNCHERS):
            raise UsageError(
                f"--same-path does not reach what {launcher} starts on the nodes",
                hint=f"put it behind: {launcher} stage-run --same-path CMD",
            )
        from stager import samepath

        samepath.enter([activation.Part.staged(result) for result in results])
    except StagerError as error:
        if strict:
            raise
        say(f"stage-run: running without --same-path: {error.message}")
        if error.hint:
            say(f"hint: {error.hint}")


def _explained(problem: Exception) -> StagerError:
    if isinstance(problem, OSError):
        return fsutil.explain(problem, "stage")
    return known(problem)


def _without(
    arguments: argparse.Namespace, error: StagerError, *, strict: bool
) -> dict[str, str] | None:
    """The environment to run in where staging failed; None where that is an error."""
    if strict or isinstance(error, OptionError):
        report(error)
        return None
    original = None
    with contextlib.suppress(StagerError):  # there may be no home
        original = activation.original(arguments.env, load_config(arguments, []), os.environ)
    if original is None and not arguments.env and _is_active(os.environ):
        original = dict(os.environ)
    if original is None:
        # Nothing to fall back to: some other Python is not what was asked for.
        report(error)
        return None
    say(f"stage-run: running the original environment: {error.message}")
    return original


def _is_active(environ: Mapping[str, str]) -> bool:
    return any(environ.get(name) for name in ("VIRTUAL_ENV", "CONDA_PREFIX"))


def _exec(command: list[str], environ: Mapping[str, str]) -> int:
    # Python ignores these two, and what it becomes would: `yes | head -1` would not end.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    try:
        try:
            os.execvpe(command[0], command, environ)
        except OSError as error:
            found = shutil.which(command[0], path=environ.get("PATH"))
            if error.errno != errno.ENOEXEC or found is None:
                raise
            # A script without an interpreter's line: as execvp(3) does, and sh where it execs.
            os.execve("/bin/sh", ["sh", found, *command[1:]], environ)
    except (FileNotFoundError, ValueError):  # an empty name is a ValueError
        say(f"stage-run: {command[0]}: not found")
        return NOT_FOUND
    except OSError as error:
        say(f"stage-run: {command[0]}: {error.strerror}")
        return NOT_EXECUTABLE


def watch(arguments: argparse.Namespace) -> int:
    """Wait for the end of a PBS job here, and clear up after it."""
    from stager.staging import watcher
    from stager.staging.store import Store

    config = load_config(arguments)
    job = os.environ.get(KEEPER, "")
    if not job:
        raise UsageError("only stage-run and `stager activate` start this, in a job")
    watcher.watch(arguments.session, arguments.mark, Store(config["store"]), job)
    return 0


def keep(arguments: argparse.Namespace) -> int:
    """Stage on this node, tell how it went, and hold what was mounted until the job ends."""
    from stager.ref import parse
    from stager.staging import keeper
    from stager.staging.store import Store

    where = schedulers.allocation(os.environ)
    if where is None or KEEPER not in os.environ:
        raise UsageError("only stage-run and `stager activate` start this, in an allocation")
    keeper.put_off_end()
    held: list[str] = []
    bars = Bars(quiet=True)
    try:
        config = load_config(arguments)
        node = Store(config["store"])
        keeper.receive(arguments.received, node)
        published = lookup.find(parse(arguments.ref), config)
        holder = lease.of_job(where.scheduler, os.environ[KEEPER])
        result = allocation.stage_with_room(published, config, holder=holder, progress=bars)
        held = keeper.mounted_layers(result, node)
        stays = bool(held) or where.scheduler == schedulers.PBS
        line = keeper.report(result, mounted=bool(held), stays=stays)
        staged = True
    except Exception as problem:
        # Whatever it is: who waits for us cannot tell a node that says nothing from one at work.
        if os.environ.get("STAGER_DEBUG"):
            import traceback

            traceback.print_exc()
        keeper.drop(arguments.received)
        line = keeper.report(_explained(problem))
        staged = False
    if arguments.answers:
        keeper.answer(line, arguments.answers)
        if staged:
            keeper.stay()
        return 0
    sys.stdout.write(line)
    sys.stdout.flush()
    if held:
        keeper.hold(held, node, holder)
    return 0
