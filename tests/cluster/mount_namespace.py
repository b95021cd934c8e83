"""Run a command in a mount namespace with an id lower than that of any made later.

Some Linux releases (seen on 6.18) hand namespace ids out of per-CPU batches, so an id no longer
tells which of two namespaces is older. The kernel still refuses (EINVAL) to bind-mount the file of
a mount namespace unless its id is above the caller's, and Slurm's private /tmp does exactly that
for every job. A slurmd that lives in a namespace made on a CPU with a high batch therefore loses
jobs at random. Older kernels number in order, and kernels before 6.10 cannot be asked: there one
plain unshare(2) is right.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
import sys

CLONE_NEWNS = 0x00020000  # linux/sched.h
NS_GET_MNTNS_ID = 0x8008B705  # linux/nsfs.h: _IOR(0xb7, 5, __u64)
ATTEMPTS = 20

_libc = ctypes.CDLL(None, use_errno=True)


def unshare_mounts() -> None:
    """Give this process a mount namespace of its own; raises OSError."""
    if _libc.unshare(CLONE_NEWNS) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"unshare: {os.strerror(number)}")


def current_id() -> int | None:
    """The id of this process's mount namespace, or None where the kernel does not tell."""
    answer = bytearray(8)
    with open("/proc/self/ns/mnt", "rb") as namespace:
        try:
            fcntl.ioctl(namespace, NS_GET_MNTNS_ID, answer)
        except OSError:
            return None
    return int(struct.unpack("=Q", answer)[0])


def next_id(cpu: int) -> int | None:
    """The id that a namespace made on this CPU gets now (a throw-away child makes one)."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.sched_setaffinity(0, {cpu})
            unshare_mounts()
            os.write(writer, str(current_id() or "").encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with open(reader, "rb") as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if status != 0:
        raise OSError(f"cannot make a mount namespace on CPU {cpu}")
    return int(text) if text else None


def enter_lowest() -> None:
    """Move this process into a new mount namespace below all that any CPU will make from now on."""
    cpus = os.sched_getaffinity(0)
    for _ in range(ATTEMPTS):
        ids = {cpu: next_id(cpu) for cpu in cpus}
        known = {cpu: value for cpu, value in ids.items() if value is not None}
        if known:
            os.sched_setaffinity(0, {min(known, key=known.__getitem__)})
        unshare_mounts()
        os.sched_setaffinity(0, cpus)
        mine = current_id()
        # Somebody else may have used up the batch between question and answer: look again.
        if mine is None or all((next_id(cpu) or 0) > mine for cpu in cpus):
            return
    raise OSError(f"no mount namespace with the lowest id after {ATTEMPTS} attempts")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: mount_namespace.py COMMAND [ARGUMENT...]")
    enter_lowest()
    os.execvp(sys.argv[1], sys.argv[1:])
