"""Lustre: over how many of its servers an image is spread, which is settled when its file is made.

A file that lies on one storage target is read by every node through that one: at 1.7 GB/s for all
together, 128 nodes wait 280 s for an image of 3.7 GB, and 5 s for one that is spread wide. That is
what most file systems do by default, for it is right for small files.
"""

from __future__ import annotations

import os
import shutil

from stager import fsutil

SMALL = 32 << 20
"""Bytes before compression below which an image is left on one target: a second for 128 nodes."""

_TIMEOUT = 20.0
"""Seconds for lfs, which asks the metadata server."""


def is_on(path: str) -> bool:
    """Tell whether a path, or what exists of it, is on Lustre."""
    return fsutil.file_system(_existing(path)) == "lustre"


def spread(path: str, size: int, count: int) -> str:
    """Make the empty file that an image is going to be written to, spread over storage targets.

    A file keeps the layout it was made with, also where it is renamed, as images are, and where it
    is truncated and written.

    Args:
        path: the file, which does not exist yet.
        size: bytes that will be packed into it.
        count: of storage targets; -1 for all, 0 to leave it to the directory.

    Returns:
        Why not, where it should have been.
    """
    if count == 0 or size < SMALL or not is_on(os.path.dirname(path)):
        return ""
    reason, _ = _lfs("setstripe", "-c", str(count), path)
    return reason


def count_of(path: str) -> int | None:
    """The number of storage targets that a file is on; of a directory, that its new files get.

    Of a path that does not exist, that of what exists of it. None where lfs does not tell; -1 is
    all.
    """
    path = _existing(path)
    reason, said = _lfs("getstripe", "-c", *(["-d"] if os.path.isdir(path) else []), path)
    try:
        return None if reason else int(said.split()[-1])
    except (ValueError, IndexError):
        return None


def _existing(path: str) -> str:
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return path


def has_tool() -> bool:
    """Tell whether lfs is installed here."""
    return shutil.which("lfs") is not None


def _lfs(*arguments: str) -> tuple[str, str]:
    """Run lfs(1); what went wrong if anything did, and what it printed."""
    import subprocess

    if not has_tool():
        return "lfs is not installed", ""
    try:
        done = subprocess.run(
            ["lfs", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"lfs {arguments[0]}: {error}", ""
    if done.returncode == 0:
        return "", done.stdout
    lines = (done.stderr or done.stdout).strip().splitlines()
    return f"lfs {arguments[0]}: {lines[-1] if lines else done.returncode}", ""
