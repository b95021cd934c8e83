"""Bytecode: which files are valid as they are, moving the path they carry, compiling the rest.

The layout of a ``.pyc`` is PEP 552's: magic number, flags, then source time and size or a source
hash; a marshalled code object follows. Marshal has no absolute offsets (references are counted
objects), so a string in it may change its length.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import struct
import subprocess
import threading
from queue import LifoQueue

HEADER = 16
_UNCHECKED, _CHECKED = 1, 3

# Type bytes of marshal's strings: short and long ASCII, then any Unicode; each plain or interned.
_SHORT, _LONG, _UNICODE = b"zZ", b"aA", b"ut"
_REFERENCED = 0x80


def split(path: str) -> tuple[str, str] | None:
    """The source and tag of a cached bytecode file.

    >>> split("pkg/__pycache__/mod.cpython-311.opt-1.pyc")
    ('pkg/mod.py', 'cpython-311.opt-1')

    Returns:
        None where the path is not of that form.
    """
    directory, _, name = path.rpartition("/")
    parent, _, last = directory.rpartition("/")
    if last != "__pycache__" or not name.endswith(".pyc"):
        return None
    module, _, tag = name[: -len(".pyc")].partition(".")
    if not tag:
        return None
    return (f"{parent}/{module}.py" if parent else f"{module}.py"), tag


def cached(source: str, tag: str) -> str:
    """The path of a source's bytecode, the inverse of :func:`split`."""
    directory, slash, name = source.rpartition("/")
    return f"{directory}{slash}__pycache__/{name[: -len('.py')]}.{tag}.pyc"


def is_valid(pyc: bytes, magic: bytes, mtime: int, size: int) -> bool:
    """Tell whether the import system will take a file without reading its source.

    Args:
        pyc: the file.
        magic: the interpreter's magic number.
        mtime: modification time of the source in seconds.
        size: length of the source in bytes.
    """
    if len(pyc) <= HEADER or pyc[:4] != magic:
        return False
    flags, stamp, length = struct.unpack_from("<III", pyc, 4)
    if flags == 0:
        return bool(stamp == mtime & 0xFFFFFFFF and length == size & 0xFFFFFFFF)
    return bool(flags == _UNCHECKED)


def unchecked(pyc: bytes, magic: bytes, source: bytes) -> bytes:
    """Bytecode with the right hash of its source, as bytecode that nobody compares again.

    What builds of packages compile has such hashes; each import would read the source for it. How
    a source is hashed depends on the version, so that of any other is returned as it is.
    """
    if len(pyc) > HEADER and pyc[:4] == magic == importlib.util.MAGIC_NUMBER:
        (flags,) = struct.unpack_from("<I", pyc, 4)
        if flags == _CHECKED and pyc[8:HEADER] == importlib.util.source_hash(source):
            return pyc[:4] + struct.pack("<I", _UNCHECKED) + pyc[8:]
    return pyc


def move(pyc: bytes, old: str, new: str) -> bytes:
    """Replace the source path that a code object carries, its length free to change.

    Only whole marshalled strings equal to ``old`` are replaced: their type and length bytes stand
    before them.
    """
    data = old.encode("utf-8", "surrogatepass")
    # One pass for all ways of marshal to write it, told apart by what stands before the text.
    at = pyc.find(data, HEADER)
    while at >= 0:
        end = at + len(data)
        start = _start_of_string(pyc, at, data)
        if start:
            replacement = _marshalled(new, pyc[start])
            pyc = pyc[:start] + replacement + pyc[end:]
            end = start + len(replacement)
        at = pyc.find(data, end)
    return pyc


def _start_of_string(pyc: bytes, at: int, data: bytes) -> int:
    """Where the marshalled string begins whose content is the ``data`` at ``at``; 0 if none does.

    Its type and its length, in one byte or in four, stand before the content.
    """
    if pyc[at - 1] == len(data) and pyc[at - 2] & ~_REFERENCED in _SHORT:
        return at - 2
    if pyc[at - 4 : at] == struct.pack("<I", len(data)):
        types = _LONG + _UNICODE if data.isascii() else _UNICODE
        if pyc[at - 5] & ~_REFERENCED in types:
            return at - 5
    return 0


def _marshalled(text: str, kind: int) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    interned = kind & ~_REFERENCED in b"ZAt"
    if data.isascii() and len(data) < 256:
        types, length = _SHORT, bytes([len(data)])
    else:
        types, length = (_LONG if data.isascii() else _UNICODE), struct.pack("<I", len(data))
    return bytes([types[interned] | kind & _REFERENCED]) + length + data


class Compiler:
    """Worker processes of one interpreter that turn source into unchecked-hash bytecode.

    Unchecked, because the tree is read-only: whatever happens to times on the way to a node, the
    file stays valid and no rank compiles.

    Args:
        python: the interpreter; it decides the bytecode's format.
        workers: how many processes; they start when first needed.
    """

    def __init__(self, python: str, workers: int) -> None:
        self._python = python
        self.workers = max(1, workers)
        # The last one that worked comes first: another starts only while all others are busy.
        self._idle: LifoQueue[subprocess.Popen[bytes] | None] = LifoQueue()
        self._started: list[subprocess.Popen[bytes]] = []
        self._starting = threading.Lock()
        for _ in range(self.workers):
            self._idle.put(None)

    def compile(self, source: bytes, filename: str) -> bytes | None:
        """Compile one source file.

        Args:
            source: its content.
            filename: the path it will have, for tracebacks.

        Returns:
            The ``.pyc``, or None where the source does not compile (templates, other versions).
        """
        worker = self._idle.get()
        try:
            if worker is None or worker.poll() is not None:
                worker = self._start()
            assert worker.stdin is not None and worker.stdout is not None
            name = filename.encode("utf-8", "surrogateescape")
            worker.stdin.write(struct.pack("<II", len(name), len(source)) + name + source)
            worker.stdin.flush()
            head = worker.stdout.read(4)
            (length,) = struct.unpack("<I", head)
            data = worker.stdout.read(length)
            if len(data) < length:
                raise EOFError
            return data or None
        except (BrokenPipeError, EOFError, struct.error):
            # The interpreter died of this source. It may take a moment to be gone, and nobody
            # else's source must be given to it.
            if worker is not None:
                worker.kill()
                worker.wait()
            return None
        finally:
            self._idle.put(worker)

    def _start(self) -> subprocess.Popen[bytes]:
        # A fixed hash seed: sets among constants would otherwise be marshalled in random order.
        environ = {"PATH": "/usr/bin:/bin", "PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"}
        libraries = os.environ.get("LD_LIBRARY_PATH")
        if libraries:  # a Python of a module may find its own only by that
            environ["LD_LIBRARY_PATH"] = libraries
        worker = subprocess.Popen(
            [self._python, "-S", "-B", "-c", _WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environ,
            cwd="/",  # with -c, Python imports from the current directory first
        )
        with self._starting:
            self._started.append(worker)
        return worker

    def close(self) -> None:
        """End the workers."""
        for worker in self._started:
            for pipe in (worker.stdin, worker.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
            worker.terminate()
            worker.wait()

    def __enter__(self) -> Compiler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# The hash field of an unchecked file is never compared, but tools print it: it is the true one.
_WORKER = """
import sys, marshal, struct, importlib.util as util, importlib._bootstrap_external as ext
sys.setrecursionlimit(4000)
get, put = sys.stdin.buffer, sys.stdout.buffer
while True:
    head = get.read(8)
    if len(head) < 8:
        break
    names, sources = struct.unpack("<II", head)
    name = get.read(names).decode("utf-8", "surrogateescape")
    source = get.read(sources)
    try:
        import warnings
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            code = compile(source, name, "exec", dont_inherit=True, optimize=0)
        data = bytes(ext._code_to_hash_pyc(code, util.source_hash(source), False))
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
        data = b""
    code = None
    put.write(struct.pack("<I", len(data)) + data)
    put.flush()
"""
