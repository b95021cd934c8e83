"""Which keys the hosts that we reach by ssh are known to have."""

from __future__ import annotations

from typing import Any


def read(paramiko: Any, path: str) -> tuple[list[tuple[str, Any]], set[bytes]]:
    """What a file says, see sshd(8), SSH_KNOWN_HOSTS FILE FORMAT; nothing where it cannot be read.

    A line that we cannot use is passed over, as ssh(1) does: it may be of no node that is meant.
    paramiko's own reader gives up at the first one that has a marker, a second blank between
    fields, or damage.

    Args:
        paramiko: the module.
        path: the file.

    Returns:
        Names, which may be hashed, each with a key; and keys that are revoked. A revoked one counts
        for all hosts, whatever its line names: whoever has it is not to be believed.
    """
    known: list[tuple[str, Any]] = []
    revoked: set[bytes] = set()
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = [line.split() for line in file]
    except OSError:
        return known, revoked
    for fields in lines:
        marker = fields.pop(0) if fields and fields[0].startswith("@") else ""
        if not fields or fields[0].startswith("#") or marker not in ("", "@revoked"):
            continue  # @cert-authority: paramiko knows no certificates of hosts
        try:
            entry = paramiko.hostkeys.HostKeyEntry.from_line(" ".join(fields))
            if entry is None:
                continue  # a kind of key that paramiko does not know
            for name in entry.hostnames:
                if name.startswith("|1|"):  # a damaged one would fail whenever it is looked at
                    paramiko.HostKeys.hash_host("", name)
        except (
            paramiko.hostkeys.InvalidHostKey,
            paramiko.SSHException,
            AssertionError,  # the salt of a hashed name
            OverflowError,  # a negative number
            ValueError,  # other numbers that are no key, and text that is none
        ):
            continue
        if marker:
            revoked.add(entry.key.asbytes())
        else:
            known += [(name, entry.key) for name in entry.hostnames]
    return known, revoked
