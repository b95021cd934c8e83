"""What one rank of a job found out, left for the others of its node."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping

from stager import envpatch, fsutil
from stager.staging.store import SENT

_OLD = 86400.0
"""Seconds after which nobody reads it any more."""
_LONGEST_JOB = 60 * _OLD
"""Seconds for which what a keeper has left may be read."""


def session_directory() -> str:
    """Where the ranks of a step find what one of them found out: private, and fixed, for ``sh``.

    Raises:
        DeniedError: somebody else has made it.
    """
    path = f"/tmp/stager-{os.getuid()}"  # noqa: S108 - refused unless it is ours alone
    fsutil.own_directory(path, "directory")
    fsutil.own_directory(os.path.join(path, "sessions"), "directory")
    return os.path.join(path, "sessions")


def write_session(
    path: str,
    options: str,
    before: Mapping[str, str],
    after: Mapping[str, str] | None,
    *,
    prefix: str = "",
) -> None:
    """Leave the outcome for the other ranks of the node, as lines of ``sh``.

    That something could not be staged holds for those who came with us, and not for a later step
    or task of the same name.

    Args:
        path: the file ``stage-run`` waits for.
        options: its options; a rank with others does not use it. The file also uses its functions.
        before: our environment.
        after: the environment to run in; None means that every rank is to fail.
        prefix: the staged tree, which must be there; empty where none could be staged.
    """
    from shlex import quote

    lines = [f'[ "$options" = {quote(options)} ] || return 1']
    if not prefix:
        lines.append(f"! over {time.time():.0f} || return 1")
    if after is None:
        lines.append("exit 125")
    else:
        changed, unset = envpatch.changes(before, after)
        # A rank that started from other values would end up with ours.
        lines += [
            f'[ "${{{name}-}}" = {quote(before.get(name, ""))} ] || return 1'
            for name in (*changed, *unset)
        ]
        if prefix:
            lines.append(f"alive {quote(prefix)} || return 1")
        lines += [f"unset {name}" for name in unset]
        lines += [f"export {name}={quote(value)}" for name, value in changed.items()]
    try:
        fsutil.write_atomic(path, ("\n".join(lines) + "\n").encode(), mode=0o600, durable=False)
        _sweep(os.path.dirname(path))
    except OSError:
        # Without the other file they do not wait for this one.
        with contextlib.suppress(OSError):
            os.unlink(f"{path}.leader")


def _sweep(directory: str) -> None:
    """Remove what jobs of the past have left here, and images that nobody took in."""
    import glob

    sent = glob.glob(f"/tmp/{SENT}{os.getuid()}-*")  # noqa: S108 - only our own are removed
    for path in (*glob.glob(os.path.join(glob.escape(directory), "*")), *sent):
        with contextlib.suppress(OSError):
            info = os.lstat(path)
            limit = _LONGEST_JOB if ".keeper-" in path else _OLD
            if info.st_uid == os.geteuid() and time.time() - info.st_mtime > limit:
                os.unlink(path)
