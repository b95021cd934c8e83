"""The processes behind :mod:`benchmarks.metafs`: started by it, told what to do on standard input.

One process for each node, all forked from one that has made what they share: the moments at which
the metadata service, the bandwidth and each object server are free again. The mount is made by a
helper that enters the node's mount namespace and is gone then; the server itself stays where the
backing directory can be seen, whatever is mounted over it on the nodes.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import multiprocessing
import os
import signal
import stat
import sys
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from typing import Any

import mfusepy

from benchmarks.libfuse import allow_parallel_lookups
from benchmarks.settings import Settings

MS_RDONLY, MS_NOSUID, MS_NODEV, MNT_DETACH = 1, 2, 4, 2  # mount(2), umount2(2)
PR_SET_TIMERSLACK = 29  # prctl(2); inherited by the threads that libfuse makes
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
FOREVER = 10**8
"""Seconds for which a client keeps what it knows: nobody else changes anything here."""
LOOP_ENDED = 8
"""What libfuse's fuse_main returns where its loop ended with an error: seen at some unmounts."""
THREADS = 128
"""As many operations of a node may be waiting at the same time."""
PAGES = 1 << 20
"""Bytes of directory that one RPC brings: Lustre's max_pages_per_rpc of 256, 4 KiB each."""
READ_AHEAD = 16384
"""KiB. Lustre reads further ahead still, but this keeps the requests of 1 MiB coming."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.pread.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64]
_libc.pread.restype = ctypes.c_ssize_t


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


class Service:
    """What all nodes share: each resource is one queue, told by when it will be free again."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        # The metadata service, the bandwidth, each object server; at the end, the dilation.
        self._free = memoryview(mmap.mmap(-1, 8 * (3 + settings.osts))).cast("d")
        self.dilate(1)
        self._lock = multiprocessing.get_context("fork").Lock()
        self._link = 0.0  # this process's own: one node's network card

    def dilate(self, factor: float) -> None:
        """From now on, everything takes so many times as long as the settings say."""
        self._free[-1] = factor

    def metadata(self, arrived: float) -> float:
        """Queue one operation; returns when its answer is there."""
        settings, dilation = self.settings, self._free[-1]
        if settings.rate:
            with self._lock:
                done = max(arrived, self._free[0]) + dilation / settings.rate
                self._free[0] = done
        else:
            done = arrived
        return done + dilation * settings.latency

    def data(self, arrived: float, size: int, offset: int, file: int, *, wide: bool) -> float:
        """Queue a read of one piece of a file; returns when it is there."""
        settings, dilation = self.settings, self._free[-1]
        done = arrived
        stripe = offset // settings.stripe_size if wide else 0
        server = 2 + (file + stripe) % settings.osts
        with self._lock:
            if settings.node_bandwidth:  # of many threads
                taken = dilation * size / settings.node_bandwidth
                done = self._link = max(arrived, self._link) + taken
            for index, rate in ((1, settings.bandwidth), (server, settings.ost_bandwidth)):
                if rate:
                    self._free[index] = max(arrived, self._free[index]) + dilation * size / rate
                    done = max(done, self._free[index])
        return done + dilation * settings.data_latency


class Handle:
    """An open file."""

    def __init__(self, path: str, wide: bool) -> None:
        self.path = path
        self.wide = wide
        self.server = zlib.crc32(path.encode(errors="surrogateescape"))
        self.closed = False


class Shared(mfusepy.Operations):  # type: ignore[misc]
    """The file system as one node's client sees it; what gets here the kernel did not know."""

    use_ns = True

    def __init__(
        self, directory: str, target: str, service: Service, ledger: int, init: Callable[[], None]
    ) -> None:
        # Stays what it is, whatever is mounted over it. (libfuse changes to the root directory.)
        self.directory = f"/proc/self/fd/{os.open(directory, os.O_PATH | os.O_CLOEXEC)}"
        self.target = target.rstrip("/")
        self.service, self.ledger = service, ledger
        self.init_done = init
        self.delays = service.settings.delays
        self.wide = service.settings.wide
        self.callers = service.settings.callers
        self.handles: dict[int, Handle] = {}
        self.directories: dict[int, str] = {}
        self.next_directory = 0
        self.links: dict[str, str] = {}
        self.listed: set[str] = set()
        self.looked_up: dict[int, str] = {}

    # The settings that libfuse has no option for.
    def init_with_config(self, connection: Any, config: Any) -> None:
        connection.max_background = 64  # reads ahead; 12 if nothing is said
        connection.congestion_threshold = 64
        self.init_done()

    def _enter(
        self,
        kind: str,
        path: str,
        error: int = 0,
        *,
        size: int = 0,
        asked: int = 1,
        data: Callable[[float], float] | None = None,
    ) -> float:
        """Queue an operation and write it down; returns when it is answered."""
        arrived = done = time.monotonic()
        if self.delays:
            if data is not None:
                done = data(arrived)
            elif asked:
                done = self.service.metadata(arrived)
        pid = mfusepy.fuse_get_context()[2]
        comm = ""
        if self.callers:
            try:
                with open(f"/proc/{pid}/comm") as file:
                    comm = file.read().strip().replace("\t", " ")
            except OSError:
                comm = "?"
        name = errno.errorcode.get(error, str(error)) if error else ""
        shown = self.target + path if path != "/" else self.target
        # In the order of benchmarks.metafs.entries; no path has a NUL. JSON takes longer.
        entry = (
            f"{arrived!r}\t{kind}\t{name}\t{size}\t{pid}\t{asked}\t{done - arrived:.6f}\t{comm}"
            f"\t{shown}\0"
        )
        os.write(self.ledger, entry.encode(errors="surrogateescape"))
        if kind == "lookup":
            self.looked_up[pid] = path
        else:
            self.looked_up.pop(pid, None)
        return done

    def _ask(self, kind: str, path: str, error: int = 0, *, asked: int = 1) -> None:
        """One metadata operation: write it down and wait until it is answered."""
        _sleep(self._enter(kind, path, error, asked=asked))

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        kind = "lookup" if fh is None and path != "/" else "getattr"
        try:
            info = os.lstat(self.directory + path)
        except OSError as error:
            self._ask(kind, path, error.errno or errno.EIO)
            raise
        self._ask(kind, path)
        return {
            "st_mode": info.st_mode,
            "st_nlink": info.st_nlink,
            "st_uid": info.st_uid,
            "st_gid": info.st_gid,
            "st_size": info.st_size,
            "st_blocks": info.st_blocks,
            "st_atime": info.st_atime_ns,
            "st_mtime": info.st_mtime_ns,
            "st_ctime": info.st_ctime_ns,
        }

    def readlink(self, path: str) -> str:
        if path not in self.links:  # a Lustre client keeps it with the inode, FUSE here does not
            self._ask("readlink", path)
            self.links[path] = os.readlink(self.directory + path)
        return self.links[path]

    def open(self, path: str, flags: int) -> int:
        # "Open with intent" is one RPC with the lookup of the same name, which came right before.
        pid = mfusepy.fuse_get_context()[2]
        asked = 0 if self.looked_up.get(pid) == path else 1
        self._ask("open", path, asked=asked)
        fd = os.open(self.directory + path, os.O_RDONLY | os.O_CLOEXEC)
        self.handles[fd] = Handle(path, any(fnmatchcase(path, one) for one in self.wide))
        return fd

    def read_into(self, buffer: int, size: int, offset: int, fh: int) -> int:
        """Read to an address; returns how many bytes there were."""
        count: int = _libc.pread(fh, buffer, size, offset)
        _check(min(count, 0), "pread")
        if count:
            handle = self.handles[fh]

            def queue(arrived: float) -> float:
                return self.service.data(arrived, count, offset, handle.server, wide=handle.wide)

            _sleep(self._enter("read", handle.path, size=count, asked=0, data=queue))
        return count

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        raise NotImplementedError  # libfuse is told that there is one; see _Direct

    def flush(self, path: str, fh: int) -> int:
        # Called by close(2), which waits for it, once for each copy of the descriptor.
        handle = self.handles[fh]
        if not handle.closed:
            handle.closed = True
            self._ask("close", handle.path)
        return 0

    def release(self, path: str, fh: int) -> int:
        handle = self.handles.pop(fh)
        if not handle.closed:  # nobody waits: what was executed, for example
            self._enter("close", handle.path)
        os.close(fh)
        return 0

    def opendir(self, path: str) -> int:
        self._ask("opendir", path)
        self.next_directory += 1
        self.directories[self.next_directory] = path
        return self.next_directory

    def readdir(self, path: str, fh: int) -> Iterator[tuple[str, int, int]]:
        path = self.directories[fh]
        found = [(".", stat.S_IFDIR, 0), ("..", stat.S_IFDIR, 0)]
        with os.scandir(self.directory + path) as entries:
            for one in entries:
                if one.is_symlink():
                    mode = stat.S_IFLNK
                else:
                    mode = stat.S_IFDIR if one.is_dir() else stat.S_IFREG
                found.append((one.name, mode, 0))
        if path not in self.listed:  # the client keeps the pages
            self.listed.add(path)
            for _ in range(0, sum(len(name) + 32 for name, _, _ in found), PAGES):
                self._ask("readdir", path)
        return iter(found)

    def releasedir(self, path: str, fh: int) -> int:
        self._enter("closedir", self.directories.pop(fh))
        return 0

    def statfs(self, path: str) -> dict[str, int]:
        self._ask("statfs", path)
        info = os.statvfs(self.directory)
        return {name: getattr(info, name) for name in dir(info) if name.startswith("f_")}


class _Direct(mfusepy.FUSE):  # type: ignore[misc]
    """The binding, but for reads: what is read goes into the answer without being copied there."""

    def read(self, path: bytes, buffer: Any, size: int, offset: int, info: Any) -> int:
        address = ctypes.cast(buffer, ctypes.c_void_p).value
        count: int = self.operations.read_into(address, size, offset, info.contents.fh)
        return count


def _sleep(until: float) -> None:
    left = until - time.monotonic()
    if left > 0:
        time.sleep(left)


# -- mounting --------------------------------------------------------------------------------------


def _in_namespace(namespace: int | None, work: Callable[[], None]) -> int:
    """Run something in a mount namespace, in a child; returns the child's status."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if namespace is not None:
                _check(_libc.setns(namespace, 0), "setns")
            work()
            status = 0
        except OSError as error:
            print(f"metafs: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _mount(device: int, target: str) -> None:
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions"
    flags = MS_RDONLY | MS_NOSUID | MS_NODEV
    _check(
        _libc.mount(b"metafs", target.encode(), b"fuse.metafs", flags, options.encode()),
        f"mount {target}",
    )


def _settle(target: str) -> None:
    """Wait until it answers, then have the kernel read further ahead."""
    number = os.stat(target).st_dev
    name = f"/sys/class/bdi/{os.major(number)}:{os.minor(number)}/read_ahead_kb"
    with open(name, "w") as file:
        file.write(str(READ_AHEAD))


def _unmount(target: str) -> None:
    _check(_libc.umount2(target.encode(), MNT_DETACH), f"umount {target}")


class Node:
    """One node: its namespace, its mount and the process that answers."""

    def __init__(self, name: str, pid: int | None, target: str) -> None:
        self.name, self.target = name, target
        flags = os.O_RDONLY | os.O_CLOEXEC
        self.namespace = os.open(f"/proc/{pid}/ns/mnt", flags) if pid is not None else None
        self.mounted = False
        self.server = 0

    def start(self, directory: str, service: Service, ledger: str) -> None:
        device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        if _in_namespace(self.namespace, lambda: _mount(device, self.target)) != 0:
            raise SystemExit(f"metafs: cannot mount {self.target} on {self.name}")
        self.mounted = True
        reader, writer = os.pipe()
        self.server = os.fork()
        if self.server == 0:
            try:
                _serve(directory, self.target, service, ledger, device, writer)
            except BaseException as error:
                if error.args != (LOOP_ENDED,):
                    traceback.print_exc()
            finally:
                os._exit(0)
        os.close(device)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            if not pipe.read(1):
                raise SystemExit(f"metafs: the server of {self.name} ended")
        if _in_namespace(self.namespace, lambda: _settle(self.target)) != 0:
            raise SystemExit(f"metafs: {self.target} on {self.name} does not answer")

    def stop(self) -> None:
        if self.mounted:
            _in_namespace(self.namespace, lambda: _unmount(self.target))
        if self.server:
            os.kill(self.server, signal.SIGTERM)
            os.waitpid(self.server, 0)


def _serve(
    directory: str, target: str, service: Service, ledger: str, device: int, ready: int
) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)  # libfuse has handlers of its own
    os.setsid()
    # Or the buffer of each large answer is mapped and cleared anew.
    _libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
    _libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)
    _libc.prctl(PR_SET_TIMERSLACK, 1000, 0, 0, 0)
    sys.setswitchinterval(0.0005)
    entries = os.open(ledger, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def begin() -> None:
        allow_parallel_lookups(device)
        os.write(ready, b"r")

    operations = Shared(directory, target, service, entries, begin)
    warnings.simplefilter("ignore")
    _Direct(
        operations,
        f"/dev/fd/{device}",
        foreground=True,
        kernel_cache=True,
        entry_timeout=FOREVER,
        negative_timeout=FOREVER,
        attr_timeout=FOREVER,
        max_threads=THREADS,
        max_idle_threads=THREADS,
    )


def main() -> int:
    """Mount, say ``ready``, and serve until standard input ends; its lines are dilations."""
    order = json.loads(sys.stdin.readline())
    service = Service(Settings(**order["settings"]))
    nodes = [Node(name, pid, order["target"]) for name, pid in order["nodes"].items()]

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, end)
    try:
        for node in nodes:
            node.start(order["directory"], service, os.path.join(order["ledgers"], node.name))
        print("ready", flush=True)
        for line in sys.stdin:
            service.dilate(float(line))
            print("dilated", flush=True)
    finally:
        for node in nodes:
            node.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
