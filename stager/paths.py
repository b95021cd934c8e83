"""Paths, told by their text alone."""

from __future__ import annotations

import os
from collections.abc import Iterable


def is_within(path: str, directories: Iterable[str]) -> bool:
    """Tell whether a path is one of the directories or below one; all in the same normal form."""
    return os.path.join(path, "").startswith(tuple(os.path.join(one, "") for one in directories))


MARK = "\ufeff"
"""What an editor may leave at the beginning of a file (a byte order mark)."""


def of_pth_line(line: str) -> str:
    """The path that a line of a ``.pth`` file adds to ``sys.path``; empty for comments and code.

    A byte order mark before it is none of it, as Python has it since 3.13 (site.py).
    """
    text = line.strip().lstrip(MARK)
    return "" if text.startswith(("#", "import ", "import\t")) else text
