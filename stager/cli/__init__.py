"""The command line: arguments in, text and exit codes out. The only place that prints."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence

from stager.cli.arguments import parse
from stager.errors import StagerError, known


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
        return parse(argv)
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
        failure.hint = (
            "the command succeeded, only its output could not be written: check that disk"
        )
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
