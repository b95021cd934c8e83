"""``stager run``, the part of ``stage-run`` that needs Python."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Mapping

from stager import activate as activation
from stager import lease
from stager.cli.common import load_config, say
from stager.cli.staging import prepare
from stager.errors import StagerError, UsageError

FAILED, NOT_EXECUTABLE, NOT_FOUND = 125, 126, 127
"""What env(1) exits with for itself, for a program that cannot start, and for a missing one."""


def run(arguments: argparse.Namespace) -> int:
    """Stage, activate and exec; fall back to the original where staging fails."""
    command = arguments.command
    if command[:1] == ["--"]:
        command = command[1:]
    strict = arguments.strict
    try:
        if not command:
            raise UsageError("no command is given", hint="stage-run [--env REF] [--strict] CMD...")
        config = load_config(arguments)
        strict = config["run.strict"]
        # exec keeps our process number: the claim lasts as long as the command.
        published, result = prepare(
            arguments.env, config, holder=lease.of_job_or_process(os.getpid())
        )
        name = arguments.env or os.environ.get("STAGER_ENV") or published.manifest.name
        environ = activation.staged(result, config, os.environ, ref=name)
    except StagerError as error:
        if not command:
            raise
        if strict:
            say(f"stage-run: error: {error.message}")
            if error.hint:
                say(f"hint: {error.hint}")
            return FAILED
        say(f"stage-run: running the original environment: {error.message}")
        environ = dict(os.environ)
        with contextlib.suppress(StagerError):  # a broken configuration stands in the way of both
            config = load_config(arguments)
            environ = activation.original(arguments.env, config, os.environ) or environ
    return _exec(command, environ)


def _exec(command: list[str], environ: Mapping[str, str]) -> int:
    try:
        os.execvpe(command[0], command, environ)
    except FileNotFoundError:
        say(f"stage-run: {command[0]}: not found")
        return NOT_FOUND
    except OSError as error:
        say(f"stage-run: {command[0]}: {error.strerror}")
        return NOT_EXECUTABLE
