"""The command line: arguments in, text and exit codes out. The only place that prints."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import Any

import stager
from stager.errors import StagerError, known

_EPILOG = """\
examples:
  stager pack ~/envs/torch           pack an environment and publish it as `torch`
  stage-run --env torch python t.py  run from a node-local copy
  eval "$(stager activate torch)"    the same for this shell

exit codes: 0 ok, 1 failed, 2 usage, 3 some nodes failed, 10 not found, 11 busy or timed out,
12 integrity, 13 no space, 14 permission, 15 cannot run on this machine, 130 interrupted
"""


_ON_STALE = ("repack", "warn", "fallback", "ignore")
"""Of the key `stage.on_stale`; reading the configuration's table takes longer than --help may."""

_SHELLS = {"bash": "sh", "dash": "sh", "ksh": "sh", "zsh": "sh", "tcsh": "csh"}
"""Shells that read what another one's code is."""

_NEVER_EMPTY = ("environment", "ref", "env", "python", "store", "repository", "nodes")
"""Arguments that are left out where nothing is meant: if empty, a variable is not set."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        if self.prog == "stager activate":
            print("false")  # as where it fails later: `eval` of nothing succeeds
        hint = f"{self.prog} --help"
        print(f"stager: error: {message}\nhint: see `{hint}`", file=sys.stderr)
        # What env(1) does: 125 is its own failure, everything else the command's.
        sys.exit(125 if self.prog == "stage-run" else 2)


def _parser(asked: str) -> argparse.ArgumentParser:
    # argparse looks for translations: eight paths for each of fifty words, below Python's prefix,
    # which may be on shared storage.
    argparse._ = str  # type: ignore[attr-defined]
    parser = _Parser(
        prog="stager",
        description="Pack a Python environment into one file, stage it node-local, run from there.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"stager {stager.__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=_Parser)

    def verb(
        name: str, module: str, text: str, *, store: bool = False, ours: bool = False
    ) -> argparse.ArgumentParser:
        if ours and name != asked:  # other verbs start it: nobody is to read of it
            command = _Parser()
        else:
            command = verbs.add_parser(name, description=text, help=text)
        command.set_defaults(module=module, function=name.replace("-", "_"), parser=command)
        command.add_argument(
            "--repository", metavar="DIR", help="repository of published environments"
        )
        if store:
            command.add_argument("--store", metavar="DIR", help="node-local store")
        return command

    def as_json(command: argparse.ArgumentParser) -> None:
        command.add_argument("--json", action="store_true", help="print one JSON object")

    pack = verb("pack", "packing", "Pack an environment and publish it.", store=True)
    pack.add_argument(
        "environment",
        nargs="?",
        metavar="ENV",
        help="a directory; default: the active one, else ./.venv",
    )
    pack.add_argument("--name", help="name to publish it under; default: the directory's")
    which = pack.add_mutually_exclusive_group()
    which.add_argument(
        "-n", dest="named", metavar="NAME", help="the environment that is published or kept as NAME"
    )
    which.add_argument(
        "--user", action="store_true", help="what `pip install --user` has installed"
    )
    which.add_argument(
        "--tree",
        action="append",
        metavar="DIR",
        help="a directory of modules, for PYTHONPATH; may be repeated, the first is searched first",
    )
    pack.add_argument(
        "--python", metavar="PYTHON", help="the Python for --user and --tree; default: python3"
    )
    pack.add_argument("--format", choices=("squashfs", "tar.zst"), help="format of the image")
    pack.add_argument("--level", metavar="N", help="zstd level")
    pack.add_argument("--threads", metavar="N", help="threads that compress")
    pack.add_argument(
        "--exclude",
        action="append",
        metavar="PATTERN",
        help="leave out paths that match (fnmatch); may be repeated",
    )
    pack.add_argument(
        "--editables",
        choices=("snapshot", "refuse", "keep"),
        help="editable installs: include a copy of their source (default), refuse, or leave them",
    )
    pack.add_argument(
        "--links",
        choices=("copy", "refuse", "keep"),
        help="links out of the environment: include what they name (default), refuse, or keep",
    )
    pack.add_argument(
        "--include-module-paths",
        action="store_const",
        const="include",
        dest="module_paths",
        help="include what PYTHONPATH and LD_LIBRARY_PATH name that is not on the nodes",
    )
    pack.add_argument(
        "--no-bytecode", action="store_true", help="do not compile modules that lack bytecode"
    )
    pack.add_argument(
        "--check", action="store_true", help="only report what would move, what would not, and why"
    )
    as_json(pack)

    as_json(verb("list", "published", "List what is published."))
    inspect = verb("inspect", "published", "Show what a published environment is.")
    inspect.add_argument("ref", metavar="REF")
    as_json(inspect)
    remove = verb("remove", "published", "Take a name back, and remove images nothing else uses.")
    remove.add_argument("ref", metavar="REF")

    plan = verb("plan", "planning", "Estimate whether staging pays.", store=True)
    plan.add_argument("ref", metavar="REF")
    plan.add_argument(
        "-N", "--nodes", type=int, default=1, metavar="N", help="nodes that start at once"
    )
    as_json(plan)

    def on_stale(command: argparse.ArgumentParser) -> None:
        command.add_argument(
            "--on-stale",
            choices=_ON_STALE,
            help="where the original changed: pack again (default), warn, use it, or do not look",
        )

    stage = verb(
        "stage", "staging", "Stage an environment on this node; prints its prefix.", store=True
    )
    activate = verb(
        "activate", "staging", 'Print shell code: eval "$(stager activate REF)".', store=True
    )
    for command in (stage, activate):
        command.add_argument("ref", nargs="?", metavar="REF")
        command.add_argument(
            "--how", choices=("auto", "mount", "extract"), help="how the tree is made usable"
        )
        command.add_argument(
            "--timeout",
            metavar="DURATION",
            help="longest wait for whoever else stages it, such as 5m",
        )
        on_stale(command)
    as_json(stage)
    activate.add_argument("--strict", action="store_true", help="fail where staging fails")
    activate.add_argument(
        "--shell",
        choices=("sh", "csh", "fish", "json"),
        type=lambda name: _SHELLS.get(name, name),
        default="sh",
        help="bash, dash, ksh and zsh are sh, tcsh is csh",
    )

    def in_allocation(command: argparse.ArgumentParser) -> None:
        command.add_argument(
            "--via",
            choices=("auto", "shared", "sbcast"),
            default="auto",
            help="how an image gets to the nodes of a Slurm allocation",
        )

    in_allocation(activate)
    run = verb("run", "running", "Run a command in an environment; stage-run is this.", store=True)
    run.prog = "stage-run"
    run.add_argument("--env", metavar="REF", help="a published name, or a path")
    run.add_argument("--strict", action="store_true", help="exit 125 where staging fails")
    run.add_argument(
        "--how", choices=("auto", "mount", "extract"), help="how the tree is made usable"
    )
    run.add_argument(
        "--timeout", metavar="DURATION", help="longest wait for whoever else stages it, such as 5m"
    )
    on_stale(run)
    run.add_argument("--user-site", action="store_true", help="let ~/.local be imported from")
    run.add_argument(
        "--same-path",
        action="store_true",
        help="for the command, the staged tree is also at the path of the original",
    )
    in_allocation(run)
    run.add_argument("command", nargs=argparse.REMAINDER, metavar="CMD")

    keep = verb(
        "keep",
        "running",
        "Stage and hold until the job ends: what stage-run starts.",
        store=True,
        ours=True,
    )
    keep.add_argument("ref", metavar="REF")
    keep.add_argument("--how", choices=("auto", "mount", "extract"))
    keep.add_argument("--timeout", metavar="DURATION")
    keep.add_argument(
        "--received", action="append", default=[], metavar="ID=PATH", help="an image that was sent"
    )
    keep.add_argument("--answers", metavar="DIR", help="where to tell how it went")
    watch = verb(
        "watch", "running", "Clear up when a PBS job has ended here.", store=True, ours=True
    )
    watch.add_argument("--session", required=True, metavar="PROCESS")
    watch.add_argument("--mark", required=True, metavar="FILE")

    release = verb("release", "staging", "Drop claims on staged environments.", store=True)
    release.add_argument("--holder", help="whose; default: this job's, or the calling shell's")
    collect = verb("collect", "staging", "Evict staged trees that nobody claims.", store=True)
    collect.add_argument("--all", action="store_true", help="evict every unclaimed tree")
    collect.add_argument(
        "--all-users", action="store_true", help="as root: in every user's store, as that user"
    )
    collect.add_argument("--max-size", metavar="SIZE")
    collect.add_argument("--min-free", metavar="SIZE")
    as_json(collect)
    status = verb("status", "staging", "Show what is staged on this node, or others.", store=True)
    as_json(status)

    def on_nodes(command: argparse.ArgumentParser, *, required: bool = False) -> None:
        command.add_argument(
            "-w", "--nodes", metavar="NODES", required=required,
            help="nodes to reach by ssh: node[01-64], a,b, @group",
        )  # fmt: skip
        command.add_argument("--fanout", metavar="N", type=int, default=32, help="nodes at a time")
        command.add_argument(
            "--min-success",
            metavar="N|P%",
            default="100%",
            help="nodes that must succeed for exit status 0",
        )
        command.add_argument("--connect-timeout", metavar="DURATION", default="10s")
        command.add_argument(
            "--idle-timeout", metavar="DURATION", default="60s", help="longest silence of a node"
        )
        command.add_argument(
            "--remote-stager", metavar="COMMAND", default="stager", help="stager on the nodes"
        )
        command.add_argument("--ssh-config", metavar="FILE", help="instead of ~/.ssh/config")

    on_nodes(collect)
    on_nodes(status)
    push = verb("push", "pushing", "Send an environment to nodes, ahead of their jobs.", store=True)
    push.add_argument("ref", nargs="?", metavar="REF")
    on_nodes(push, required=True)
    push.add_argument(
        "--tree",
        metavar="K",
        nargs="?",
        type=int,
        const=2,
        help="serve K nodes (2), each of which serves a share of the others",
    )
    push.add_argument(
        "--forward-agent", action="store_true", help="with --tree: lend nodes the ssh agent"
    )
    then = push.add_mutually_exclusive_group()
    then.add_argument(
        "--stage",
        action="store_const",
        const="everything",
        default="lasting",
        help="stage on the nodes, mounts too; default: extract where that will be needed",
    )
    then.add_argument(
        "--no-stage",
        dest="stage",
        action="store_const",
        const="nothing",
        help="only put the images into the stores",
    )
    on_stale(push)
    as_json(push)
    verb(
        "receive", "pushing", "Take in what a push sends: what push starts.", store=True, ours=True
    )

    verify = verb(
        "verify", "verifying", "Import from the staged tree, tracing every open.", store=True
    )
    verify.add_argument("ref", nargs="?", metavar="REF")
    verify.add_argument(
        "--import", dest="modules", metavar="A,B", action="append", help="what to import"
    )
    as_json(verify)

    as_json(
        verb("doctor", "doctor", "Tell what this machine can do and what it lacks.", store=True)
    )
    config = verb("config", "configuration", "Show every value and where it came from.", store=True)
    config.add_argument("action", choices=("show",))
    as_json(config)
    return parser


def main(argv: Sequence[str]) -> int:
    """Run one command.

    Args:
        argv: the arguments, without the program's name.

    Returns:
        The exit status.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed: the next file to be opened would take its place
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Paths are bytes; what a shell or a program reads from us must be the same bytes.
        sys.stdout.reconfigure(encoding=sys.getfilesystemencoding(), errors="surrogateescape")
    try:
        arguments = _parse(argv)
        module = importlib.import_module(f"stager.cli.{arguments.module}")
        status: int = getattr(module, arguments.function)(arguments)
        _flush()
        return status
    except StagerError as error:
        report(error)
        return error.exit_code
    except KeyboardInterrupt:
        print("stager: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _drop_output()  # who read it has gone
        return 1
    except OSError as error:
        if os.environ.get("STAGER_DEBUG"):
            raise
        from stager.fsutil import explain

        failure = explain(error, "go on")
        report(failure)
        _drop_output()
        return failure.exit_code
    except Exception as error:
        if os.environ.get("STAGER_DEBUG"):
            raise
        told = known(error)
        # With nothing that is still to be imported: there may be no memory for it.
        print(f"stager: error: {told.message}\nhint: {told.hint}", file=sys.stderr)
        return 1


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    try:
        arguments, unknown = _parser(argv[0] if argv else "").parse_known_args(argv)
        if unknown:  # the verb's own parser knows its status
            arguments.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        for name in _NEVER_EMPTY:
            if getattr(arguments, name, None) == "":
                arguments.parser.error(f"`{name}` is empty: is a variable not set?")
        return arguments
    except SystemExit:
        _flush()  # what --help prints may have no reader either
        raise


def _flush() -> None:
    """Write what was printed.

    Raises:
        BrokenPipeError: nobody reads it.
        StagerError: it cannot be written.
    """
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        from stager.fsutil import explain

        failure = explain(error, "write to standard output")
        failure.hint = "what was asked for is done: look at the disk that its output goes to"
        raise failure from error


def _drop_output() -> None:
    """Let nobody try again to write what could not be written."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def report(error: StagerError) -> None:
    """Print an error and its hint."""
    from stager.cli.common import say

    say(f"stager: error: {error.message}")
    if error.hint:
        say(f"hint: {error.hint}")
