"""The grammar of the command line: verbs, their arguments, and what help says of them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, Protocol

import stager

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

_NEVER_EMPTY = {
    "environment": "ENV", "ref": "REF", "env": "--env", "python": "--python", "store": "--store",
    "repository": "--repository", "nodes": "-w/--nodes",
}  # fmt: skip
"""Arguments that are left out where nothing is meant: if empty, a variable is not set."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        if self.prog == "stager activate":
            print("false")  # as where it fails later: `eval` of nothing succeeds
        hint = f"{self.prog} --help"
        print(f"stager: error: {message}\nhint: see `{hint}`", file=sys.stderr)
        # What env(1) does: 125 is its own failure, everything else the command's.
        sys.exit(125 if self.prog == "stage-run" else 2)


class _Verb(Protocol):
    """Makes the parser of one verb."""

    def __call__(
        self, name: str, module: str, text: str, *, store: bool = False, ours: bool = False
    ) -> argparse.ArgumentParser:
        """Add a verb.

        Args:
            name: the verb; the function of that name does it.
            module: where that is, in :mod:`stager.cli`.
            text: what it does.
            store: whether it has ``--store``.
            ours: other verbs start it: nobody is to read of it.
        """


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read a command line.

    Args:
        argv: the arguments, without the program's name.

    Raises:
        SystemExit: it is wrong, which was told; or help or the version was asked for.
    """
    arguments, unknown = _parser(argv[0] if argv else "").parse_known_args(argv)
    if unknown:  # the verb's own parser knows its status
        arguments.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    for name, typed in _NEVER_EMPTY.items():
        if getattr(arguments, name, None) == "":
            arguments.parser.error(f"{typed} is empty: is a variable not set?")
    return arguments


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
        if ours and name != asked:
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

    _pack(verb)
    _published(verb)
    _stage(verb)
    _run(verb)
    _tend(verb)
    _push(verb)
    _check(verb)
    return parser


# -- options that several verbs have -----------------------------------------------------------


def _as_json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print one JSON object")


def _on_stale(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--on-stale",
        choices=_ON_STALE,
        help=(
            "if the original changed: repack it (default), use the old pack with a warning,"
            " fall back to the original, or ignore changes (do not check)"
        ),
    )


def _how(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--how", choices=("auto", "mount", "extract"), help="mount the image, or extract it"
    )
    command.add_argument(
        "--timeout",
        metavar="DURATION",
        help="longest wait for another process that stages it, such as 5m",
    )


def _in_allocation(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--via",
        choices=("auto", "shared", "sbcast"),
        default="auto",
        help="how an image gets to the nodes of a Slurm allocation",
    )


def _on_nodes(command: argparse.ArgumentParser, *, required: bool = False) -> None:
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
        "--idle-timeout",
        metavar="DURATION",
        default="60s",
        help="give up on a node that sends nothing for this long",
    )
    command.add_argument(
        "--remote-stager", metavar="COMMAND", default="stager", help="stager on the nodes"
    )
    command.add_argument("--ssh-config", metavar="FILE", help="instead of ~/.ssh/config")


# -- the verbs -----------------------------------------------------------------------------------


def _pack(verb: _Verb) -> None:
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
        "-n",
        dest="named",
        metavar="NAME",
        help="an environment by name: published, or known to conda, pixi and the like",
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
        help=(
            "editable installs: include a copy of their source (default), refuse to pack, or"
            " leave them as they are"
        ),
    )
    pack.add_argument(
        "--links",
        choices=("copy", "refuse", "keep"),
        help=(
            "symbolic links out of the environment: include their targets (default), refuse"
            " to pack, or keep them"
        ),
    )
    pack.add_argument(
        "--include-module-paths",
        action="store_const",
        const="include",
        dest="module_paths",
        help="include directories on PYTHONPATH and LD_LIBRARY_PATH that are not on the nodes",
    )
    pack.add_argument(
        "--no-bytecode", action="store_true", help="do not compile modules that lack bytecode"
    )
    pack.add_argument(
        "--check",
        action="store_true",
        help="dry run: report what would be rewritten, left out or refused, and why",
    )
    _as_json(pack)


def _published(verb: _Verb) -> None:
    _as_json(verb("list", "published", "List what is published."))
    inspect = verb("inspect", "published", "Show what a published environment is.")
    inspect.add_argument("ref", metavar="REF")
    _as_json(inspect)
    remove = verb(
        "remove", "published", "Unpublish an environment, and remove images that nothing else uses."
    )
    remove.add_argument("ref", metavar="REF")
    plan = verb("plan", "planning", "Estimate whether staging pays.", store=True)
    plan.add_argument("ref", metavar="REF")
    plan.add_argument(
        "-N", "--nodes", type=int, default=1, metavar="N", help="nodes that start at once"
    )
    _as_json(plan)


def _stage(verb: _Verb) -> None:
    stage = verb(
        "stage", "staging", "Stage an environment on this node; prints its prefix.", store=True
    )
    activate = verb(
        "activate", "staging", 'Print shell code: eval "$(stager activate REF)".', store=True
    )
    for command in (stage, activate):
        command.add_argument("ref", nargs="?", metavar="REF")
        _how(command)
        _on_stale(command)
    _as_json(stage)
    activate.add_argument("--strict", action="store_true", help="fail where staging fails")
    activate.add_argument(
        "--shell",
        choices=("sh", "csh", "fish", "json"),
        type=lambda name: _SHELLS.get(name, name),
        default="sh",
        help="bash, dash, ksh and zsh are sh, tcsh is csh",
    )
    _in_allocation(activate)


def _run(verb: _Verb) -> None:
    run = verb(
        "run", "running", "Run a command in an environment (the same as stage-run).", store=True
    )
    run.prog = "stage-run"
    run.add_argument("--env", metavar="REF", help="a published name, or a path")
    run.add_argument("--strict", action="store_true", help="exit 125 where staging fails")
    _how(run)
    _on_stale(run)
    run.add_argument("--user-site", action="store_true", help="allow imports from ~/.local")
    run.add_argument(
        "--same-path",
        action="store_true",
        help="the command also sees the staged tree at the path of the original",
    )
    _in_allocation(run)
    run.add_argument("command", nargs=argparse.REMAINDER, metavar="CMD")
    keep = verb(
        "keep",
        "running",
        "Stage and hold until the job ends: what stage-run starts.",
        store=True,
        ours=True,
    )
    keep.add_argument("ref", metavar="REF")
    _how(keep)
    keep.add_argument(
        "--received", action="append", default=[], metavar="ID=PATH", help="an image that was sent"
    )
    keep.add_argument("--answers", metavar="DIR", help="where to tell how it went")
    watch = verb(
        "watch", "running", "Clear up when a PBS job has ended here.", store=True, ours=True
    )
    watch.add_argument("--session", required=True, metavar="PROCESS")
    watch.add_argument("--mark", required=True, metavar="FILE")


def _tend(verb: _Verb) -> None:
    release = verb(
        "release",
        "staging",
        "Release the claims of this job or shell on staged environments.",
        store=True,
    )
    release.add_argument(
        "--holder", help="whose claims; default: those of this job, or of the calling shell"
    )
    collect = verb("collect", "staging", "Evict staged trees that nobody claims.", store=True)
    collect.add_argument("--all", action="store_true", help="evict every unclaimed tree")
    collect.add_argument(
        "--all-users", action="store_true", help="as root: in every user's store, as that user"
    )
    collect.add_argument("--max-size", metavar="SIZE")
    collect.add_argument("--min-free", metavar="SIZE")
    status = verb("status", "staging", "Show what is staged on this node, or others.", store=True)
    for command in (collect, status):
        _as_json(command)
        _on_nodes(command)


def _push(verb: _Verb) -> None:
    push = verb("push", "pushing", "Send an environment to nodes, ahead of their jobs.", store=True)
    push.add_argument("ref", nargs="?", metavar="REF")
    _on_nodes(push, required=True)
    push.add_argument(
        "--tree",
        metavar="K",
        nargs="?",
        type=int,
        const=2,
        help="send to K nodes (default: 2), which forward to the others",
    )
    push.add_argument(
        "--forward-agent",
        action="store_true",
        help="with --tree: forward the ssh agent to the nodes",
    )
    then = push.add_mutually_exclusive_group()
    then.add_argument(
        "--stage",
        action="store_const",
        const="everything",
        default="lasting",
        help="also mount on the nodes; default: extract only if mounting will not be possible",
    )
    then.add_argument(
        "--no-stage",
        dest="stage",
        action="store_const",
        const="nothing",
        help="only put the images into the stores",
    )
    _on_stale(push)
    _as_json(push)
    verb(
        "receive", "pushing", "Take in what a push sends: what push starts.", store=True, ours=True
    )


def _check(verb: _Verb) -> None:
    verify = verb(
        "verify", "verifying", "Import from the staged tree, tracing every open.", store=True
    )
    verify.add_argument("ref", nargs="?", metavar="REF")
    verify.add_argument(
        "--import", dest="modules", metavar="A,B", action="append", help="modules to import"
    )
    _as_json(verify)
    _as_json(
        verb(
            "doctor", "doctor", "Check what this machine supports and what is missing.", store=True
        )
    )
    config = verb("config", "configuration", "Show every value and where it came from.", store=True)
    config.add_argument("action", choices=("show",))
    _as_json(config)
