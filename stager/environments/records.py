"""What an installed package lists as its files (the recording installs specification)."""

from __future__ import annotations

import csv

from stager import fsutil


def read(path: str) -> list[str]:
    """The paths in a ``RECORD``, as they are written: relative to the directory above its own.

    Args:
        path: the file. Of one that is missing, malformed or may not be read nothing is known.
    """
    try:
        with open(path, encoding="utf-8", errors="surrogateescape", opener=fsutil.regular) as file:
            return [row[0] for row in csv.reader(file) if row]
    except (OSError, csv.Error):
        return []
