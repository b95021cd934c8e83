"""squashfs images: written by ``mksquashfs`` from a stream, mounted by FUSE or by the kernel.

The tree is never copied: members are piped as a tar stream (``mksquashfs - OUT -tar``, which
squashfs-tools have since 4.5), so that every file is read once and rewritten on the way.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterable
from typing import IO, TYPE_CHECKING

from stager import fsutil, warm
from stager.errors import (
    LIMITS,
    NODE,
    IncompatibleError,
    IntegrityError,
    NoSpaceError,
    StagerError,
)

if TYPE_CHECKING:
    from stager.formats.tarstream import Member

# Modules that only making a tree needs are imported there: a warm start does without them.

MOUNT_TIMEOUT = 30.0
"""Seconds a mount may take to appear; measured: 4 to 14 ms."""

_DAMAGE = ("superblock", "corruption", "uncompress failed")
_DISK_FAULTS = ("Input/output error", "Read-only file system")
"""What unsquashfs says of a damaged image, and of a disk; else it lacked something."""

_BUFFER = 1 << 20
_PIECES = 512  # IOV_MAX is 1024
_F_SETPIPE_SZ = 1031
_ONLY_READ = "ro,nosuid,nodev"
_HELPERS = {
    # Tells the kernel to keep names, attributes and contents for as long as the mount lives.
    "squashfuse_ll": _ONLY_READ,
    # Has to be told to: else names and attributes last a second, what is missing is asked for
    # again each time, and opening a file forgets its contents. An image never changes.
    "squashfuse": f"{_ONLY_READ},kernel_cache,"
    + ",".join(f"{kind}_timeout={1 << 30}" for kind in ("entry", "attr", "negative")),
}
"""Programs that mount, the better one first, and the options of each."""

is_mounted = warm.is_mounted


class Writer:
    """A squashfs image being written.

    Args:
        path: the file to create.
        level: zstd level.
        threads: compressor threads; 0 is one for each processor.
        newest: the latest modification time of all members, in seconds. mksquashfs gives the root
            directory the present time when it reads a stream, unless that is later than
            ``SOURCE_DATE_EPOCH``.

    Raises:
        IncompatibleError: there is no ``mksquashfs`` that reads streams.
    """

    def __init__(self, path: str, *, level: int, threads: int, newest: int) -> None:
        import subprocess

        from stager.formats import tarstream

        self._tar = tarstream  # looking it up for each member takes as long as its padding
        self._path = path
        self._messages = fsutil.nameless()  # closed with the image
        self._waiting: list[bytes | memoryview] = []
        self._size = 0
        # Its own choice of memory, a quarter of the machine's, is no faster than 128 MB.
        arguments = [
            program("mksquashfs"), "-", path, "-tar", "-noappend", "-quiet", "-no-progress",
            "-comp", "zstd", "-Xcompression-level", str(level), "-b", "128K",
            "-no-xattrs", "-all-root", "-root-mode", "0755", "-no-exports", "-mem", "128M",
        ]  # fmt: skip
        if threads:
            arguments += ["-processors", str(threads)]
        environ = {**os.environ, "SOURCE_DATE_EPOCH": str(newest)}
        self._process = subprocess.Popen(
            arguments,
            stdin=subprocess.PIPE,
            stdout=self._messages,
            stderr=subprocess.STDOUT,
            env=environ,
            start_new_session=True,
        )
        assert self._process.stdin is not None
        self._pipe: IO[bytes] = self._process.stdin
        with contextlib.suppress(OSError):  # a lower limit for this user: the default size works
            fcntl.fcntl(self._pipe.fileno(), _F_SETPIPE_SZ, _BUFFER)

    def write_member(
        self, member: Member, data: bytes | Iterable[bytes | memoryview] = b""
    ) -> None:
        """Append one member."""
        if member.path == ".":
            return  # the root's mode and time are given on the command line
        header, padding = self._tar.header(member), self._tar.padding(member.size)
        if isinstance(data, bytes):
            self._put(header, data, padding)
            return
        self._put(header)
        self._flush()
        for piece in data:
            self._write([piece])
        self._put(padding)

    def close(self) -> None:
        """Finish the image.

        Raises:
            NoSpaceError: the file system is full.
            StagerError: ``mksquashfs`` failed.
        """
        self._put(self._tar.TRAILER)
        self._flush()
        with contextlib.suppress(BrokenPipeError):
            self._pipe.close()
        if self._process.wait() != 0:
            raise self._failure()
        self._messages.close()

    def abort(self) -> None:
        """End ``mksquashfs`` and give up the image."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._pipe.close()
        self._messages.close()

    def _put(self, *pieces: bytes) -> None:
        """Write soon: many small pieces go with one call, none of them is copied."""
        self._waiting += pieces
        self._size += sum(map(len, pieces))
        if self._size >= _BUFFER or len(self._waiting) >= _PIECES:
            self._flush()

    def _flush(self) -> None:
        self._write(self._waiting)
        self._waiting, self._size = [], 0

    def _write(self, pieces: list[bytes | memoryview]) -> None:
        fd, at = self._pipe.fileno(), 0
        try:
            while at < len(pieces):
                written = os.writev(fd, pieces[at:])
                while at < len(pieces) and written >= len(pieces[at]):
                    written -= len(pieces[at])
                    at += 1
                if written:
                    pieces[at] = memoryview(pieces[at])[written:]
        except BrokenPipeError as error:
            self._process.wait()
            raise self._failure() from error

    def _failure(self) -> StagerError:
        import signal

        self._messages.seek(0)
        said = self._messages.read().decode(errors="replace").strip()
        for full in (errno.ENOSPC, errno.EDQUOT):
            if os.strerror(full) in said:
                return fsutil.explain(OSError(full, os.strerror(full)), f"write {self._path}")
        status = self._process.returncode
        line = said.splitlines()[-1] if said else f"status {status}"
        if status < 0:
            line = f"ended by {signal.Signals(-status).name}"
        if status == -signal.SIGXFSZ or "File too large" in said:
            where = os.path.dirname(self._path)
            return NoSpaceError(
                f"mksquashfs failed while writing {where}: {line}", hint=fsutil.TOO_LARGE
            )
        old = "nvalid option" in said  # -tar is one since 4.5
        hint = "squashfs-tools 4.5 or newer is needed" if old else "`--format tar.zst` does without"
        if "create thread" in said or "Out of memory" in said:
            hint = LIMITS
        return StagerError(f"mksquashfs failed: {line}", hint=hint)


def program(name: str) -> str:
    """Find a program.

    Raises:
        IncompatibleError: it is not installed.
    """
    found = _which(name) or _which(name, path="/usr/sbin:/sbin:/usr/bin:/bin")
    if found is None:
        package = "squashfuse" if name.startswith("squashfuse") else "squashfs-tools"
        raise IncompatibleError(
            f"{name} is not installed here",
            hint=f"install the package {package}, or use the other format: --format tar.zst",
        )
    return found


def _which(name: str, path: str | None = None) -> str | None:
    """What ``shutil.which`` does, which loads all compressors: 3 ms for every job."""
    for directory in (path or os.environ.get("PATH") or os.defpath).split(os.pathsep):
        found = os.path.join(directory, name)
        if os.path.isabs(found) and os.path.isfile(found) and os.access(found, os.X_OK):
            return found
    return None


def helpers(path: str | None = None) -> list[str]:
    """The programs that mount, the better one first, by a search path; None stands for ours."""
    return [found for name in _HELPERS if (found := _which(name, path))]


def why_not_mount() -> str:
    """Why images cannot be mounted here; empty where they can."""
    if not helpers():
        return "squashfuse is not installed"
    if not (_which("fusermount3") or _which("fusermount")):
        return "fusermount is not installed"
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"/dev/fuse cannot be used: {error.strerror}"
    return ""


def mount_by_kernel(image: str, directory: str) -> None:
    """Mount an image with the kernel's squashfs, as root, who alone could have written it.

    Raises:
        StagerError: it did not work; the message says what mount(8) said.
    """
    import subprocess

    done = subprocess.run(
        [program("mount"), "-t", "squashfs", "-o", f"loop,{_ONLY_READ}", image, directory],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        check=False,
    )
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        line = said[0] if said else f"status {done.returncode}"
        raise StagerError(f"the kernel cannot mount {os.path.basename(image)}: {line}")


def unmount_by_kernel(directory: str, *, force: bool = False) -> bool:
    """Unmount what :func:`mount_by_kernel` has mounted; see :func:`unmount`."""
    return _unmounted([program("umount"), *(["-l"] if force else []), directory])


def mount(image: str, directory: str) -> None:
    """Mount an image with squashfuse, as a daemon that outlives us.

    Raises:
        StagerError: it did not work; the message says what squashfuse said.
    """
    import subprocess

    helper, options = next(
        (found, options) for name, options in _HELPERS.items() if (found := _which(name))
    )
    # Not in a pipe: squashfuse's daemon keeps it open, and a reader would wait for its end.
    with fsutil.nameless() as said:
        mounting = subprocess.Popen(
            [helper, "-o", options, image, directory],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=said,
            cwd="/",
            start_new_session=True,
        )
        deadline = time.monotonic() + MOUNT_TIMEOUT
        # Popen.wait(timeout) would sleep longer each time, and notice it after twice as long.
        while (status := mounting.poll()) is None or (status == 0 and not is_mounted(directory)):
            if time.monotonic() > deadline:
                mounting.kill()
                mounting.wait()
                raise StagerError(f"squashfuse did not mount {image} in time")
            time.sleep(0.001)
        said.seek(0)
        message = said.read().decode(errors="replace").strip()
    if status != 0:
        line = message.splitlines()[-1] if message else f"status {status}"
        raise StagerError(f"squashfuse cannot mount {os.path.basename(image)}: {line}")


def unmount(directory: str, *, force: bool = False) -> bool:
    """Unmount what :func:`mount` has mounted.

    Args:
        directory: the mount point.
        force: detach it even where the server is dead, or where it is in use.

    Returns:
        Whether it is gone; False means that something still uses it.
    """
    helper = _which("fusermount3") or _which("fusermount")
    if helper is None:
        return False
    return _unmounted([helper, "-u", *(["-z"] if force else []), directory])


def _unmounted(argv: list[str]) -> bool:
    import subprocess

    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=MOUNT_TIMEOUT
        )
    directory = argv[-1]
    return not warm.mounted(directory)


def extract(image: str, directory: str) -> None:
    """Unpack an image into a new directory, on every processor.

    Raises:
        IncompatibleError: ``unsquashfs`` is not installed.
        NoSpaceError: the disk is full.
        IntegrityError: the image is damaged.
        StagerError: anything else; the node's fault where its disk failed.
    """
    import signal
    import subprocess

    environ = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(
        [program("unsquashfs"), "-no-progress", "-no-xattrs", "-quiet", "-d", directory, image],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environ,
        check=False,
        start_new_session=True,
        umask=0o022,  # modes are as in the image; the store around it is private
    )
    if done.returncode == 0:
        return
    said = done.stdout.decode(errors="replace")
    if "No space left" in said or "Disk quota" in said:
        raise NoSpaceError(
            f"no space left while unpacking into {os.path.dirname(directory)}",
            hint="free some, `stager collect`, or choose another store (--store, STAGER_STORE)",
        )
    if done.returncode == -signal.SIGXFSZ:
        raise NoSpaceError(f"unsquashfs cannot unpack {image}", hint=fsutil.TOO_LARGE)
    if done.returncode < 0:
        raise StagerError(f"unsquashfs was ended by {signal.Signals(-done.returncode).name}")
    lines = [line for line in said.splitlines() if line.strip()]
    message = f"unsquashfs cannot unpack the image: {lines[-1] if lines else done.returncode}"
    if any(word in said for word in _DISK_FAULTS):
        raise StagerError(message, hint="check the store's disk", blame=NODE)
    if any(word in said for word in _DAMAGE):
        raise IntegrityError(message, hint="pack the environment again")
    raise StagerError(message, hint=LIMITS)
