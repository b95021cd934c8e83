"""What the verbs share: configuration from arguments, tables, sizes, progress."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import Any, Callable

from stager import config as configuration
from stager.config import Config
from stager.errors import UsageError

SCHEMA = 1
"""Version of the JSON that reading verbs print; keys are only ever added."""
_WIDE, _NARROW = 100, 80
"""Columns of a terminal for all that is told of the progress, and for the bytes at least."""

_ARGUMENTS = {
    "store": "store",
    "repository": "repository",
    "format": "pack.format",
    "level": "pack.level",
    "threads": "pack.threads",
    "exclude": "pack.exclude",
    "editables": "pack.editables",
    "links": "pack.links",
    "module_paths": "pack.module_paths",
    "how": "stage.how",
    "timeout": "stage.timeout",
    "on_stale": "stage.on_stale",
    "max_size": "collect.max_size",
    "min_free": "collect.min_free",
}


def load_config(arguments: argparse.Namespace, faults: list[UsageError] | None = None) -> Config:
    """The configuration, with the command line's values on top; see :func:`stager.config.load`."""
    overrides: dict[str, object] = {}
    for name, key in _ARGUMENTS.items():
        value = getattr(arguments, name, None)
        if value is not None:
            overrides[key] = os.path.abspath(value) if key in ("store", "repository") else value
    if getattr(arguments, "no_bytecode", False):
        overrides["pack.bytecode"] = False
    if getattr(arguments, "strict", False):
        overrides["run.strict"] = True
    if getattr(arguments, "user_site", False):
        overrides["run.user_site"] = True
    return configuration.load(overrides=overrides, faults=faults)


def options_given(arguments: argparse.Namespace) -> bool:
    """Tell whether the command line has a value of the configuration."""
    return any(getattr(arguments, name, None) is not None for name in _ARGUMENTS)


def print_json(value: dict[str, Any]) -> None:
    """Print one JSON object."""
    print(json.dumps({"schema": SCHEMA, **value}, indent=2, sort_keys=True))


def say(text: str) -> None:
    """Print lines for people; standard output stays for results.

    A job whose log is on a full disk runs all the same.

    Raises:
        BrokenPipeError: nobody reads them.
    """
    try:
        print("\n".join(map(printable, text.split("\n"))), file=sys.stderr)
    except BrokenPipeError:
        raise
    except OSError:
        pass


def printable(text: str) -> str:
    """A line with paths for people: what would break the line or the terminal is escaped."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def size(count: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def count(number: int, noun: str) -> str:
    """A number of things, as in ``1 tree`` and ``2 trees``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def table(rows: Sequence[Sequence[str]], heading: Sequence[str]) -> Iterable[str]:
    """Columns of the width they need."""
    everything = [heading, *([printable(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in everything) for column in range(len(heading))]
    for row in everything:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()


def is_terminal() -> bool:
    """Tell whether progress may be drawn."""
    return sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"


class Bars:
    """Progress of packing and staging: bars on a terminal, nothing elsewhere."""

    def __init__(self, *, quiet: bool = False) -> None:
        # A program laid out by deploy/install has no rich beside it, and does without bars.
        self._draw = is_terminal() and not quiet and find_spec("rich") is not None
        self._quiet = quiet
        self._bar: Any = None
        self._task: Any = None
        self._files = self._bytes = 0
        self._drawn = 0.0
        self._waited = 0.0
        self._said: set[str] = set()

    def _open(self, what: str, total: int) -> None:
        from rich import progress
        from rich.console import Console

        console = Console(stderr=True)
        columns: list[progress.ProgressColumn] = [
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=20),
            progress.TextColumn("{task.fields[files]}"),
            progress.DownloadColumn(),
            progress.TransferSpeedColumn(),
            progress.TimeRemainingColumn(),
        ]
        if console.width < _NARROW:  # it would break into several lines, and none could be read
            columns = [columns[0], progress.BarColumn(bar_width=10), progress.TaskProgressColumn()]
        elif console.width < _WIDE:
            del columns[2]
        self._bar = progress.Progress(*columns, console=console, transient=True)
        self._bar.start()
        self._task = self._bar.add_task(what, total=max(1, total), files="")
        self._files = self._bytes = 0

    # packing

    def start(self, what: str, files: int, size: int) -> None:
        """A layer begins."""
        if self._draw:
            self._open({"env": "packing", "base": "packing base Python"}.get(what, what), size)
            self._total_files = files

    def advance(self, files: int, size: int) -> None:
        """So many more files and bytes are done."""
        if self._bar is None:
            return
        self._files += files
        self._bytes += size
        now = time.monotonic()
        if now - self._drawn > 0.1:
            self._drawn = now
            self._bar.update(
                self._task, completed=self._bytes, files=f"{self._files}/{self._total_files} files"
            )

    def finish(self) -> None:
        """The bar is done."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    # staging

    def copying(self, what: str, size: int) -> Callable[[int], None]:
        """An image is copied."""
        if not self._draw:
            return lambda _: None
        self._open("staging", size)
        bar, task, done = self._bar, self._task, [0]

        def advance(count: int) -> None:
            done[0] += count
            bar.update(task, completed=done[0])
            if done[0] >= size:
                self.finish()

        return advance

    def waiting(self, seconds: float) -> None:
        """Somebody else is at it: a line when it takes long, and every half a minute then."""
        if self._quiet or seconds < self._waited + (2 if not self._waited else 30):
            return
        self._waited = max(seconds, 2)
        say(
            "stager: waiting for another process that packs or stages this environment"
            f" ({seconds:.0f} s)"
        )

    def note(self, message: str) -> None:
        """Something the user may want to know."""
        if (
            not self._quiet and message not in self._said
        ):  # of each layer, and where it is tried again
            self._said.add(message)
            say(f"stager: {message}")
