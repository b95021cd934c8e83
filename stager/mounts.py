"""What users have mounted on this machine: the file systems whose server tells what it likes.

Where ``/etc/fuse.conf`` has ``user_allow_other``, such a server is asked when root looks at its
mount point, too, and need never answer.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

_ESCAPED = re.compile(r"\\([0-7]{3})")


def of_users() -> dict[str, int]:
    """The FUSE file systems that this mount namespace has of users: see :func:`parsed`."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        return parsed(file)


def parsed(mountinfo: Iterable[str]) -> dict[str, int]:
    """The mount points of FUSE file systems whose server is a user's, and their device numbers.

    Args:
        mountinfo: its lines, see proc(5).
    """
    found = {}
    for line in mountinfo:
        words = line.split()
        user = re.search(r"(?:^|,)user_id=(\d+)", words[-1])
        if user and user[1] != "0":
            major, minor = map(int, words[2].split(":"))
            path = _ESCAPED.sub(lambda match: chr(int(match[1], 8)), words[4])
            found[path] = os.makedev(major, minor)
    return found
