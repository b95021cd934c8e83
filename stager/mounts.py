"""What users have mounted on this machine: the file systems whose server tells what it likes.

Where ``/etc/fuse.conf`` has ``user_allow_other``, such a server is asked when root looks at its
mount point, too, and need never answer; then not even SIGKILL ends whoever waits. A descriptor
that was opened with ``O_PATH`` asks nobody, and stays where it is whatever is mounted meanwhile.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

_USER = re.compile(r"(?:^|,)user_id=(\d+)")


class Mount(NamedTuple):
    """A mounted file system: its number in this mount namespace, and its device."""

    id: int
    device: int


def of_users() -> Iterator[Mount]:
    """The FUSE file systems that this mount namespace has of users, see :func:`parsed`."""
    # Of what ends a line elsewhere, the kernel escapes the newline alone.
    with open(
        "/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape", newline="\n"
    ) as file:
        yield from parsed(file)


def parsed(mountinfo: Iterable[str]) -> Iterator[Mount]:
    """The FUSE file systems whose server is a user's.

    Args:
        mountinfo: its lines, see proc(5).
    """
    for line in mountinfo:
        words = line.rstrip("\n").split(" ")
        user = _USER.search(words[-1])
        if user and user[1] != "0":
            major, minor = map(int, words[2].split(":"))
            yield Mount(int(words[0]), os.makedev(major, minor))


def is_users(fd: int) -> bool:
    """Tell whether what is open there belongs to a file system that a user serves.

    Args:
        fd: opened with ``O_PATH``.
    """
    with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as file:
        fields = dict(line.split(":", 1) for line in file)
    return int(fields["mnt_id"]) in {one.id for one in of_users()}
