"""Lookups of one directory at the same time, with a libfuse that forgets to allow them.

Until 3.17 libfuse does not pass ``FUSE_CAP_PARALLEL_DIROPS`` on to the kernel (libfuse#861), which
then has one lookup after the other wait in each directory. Lustre's client does not; with 10 ms for
a lookup, eight processes that import the same modules would take eight times as long. So the flag
is put into the answer to the kernel's first request, on its way out.
"""

from __future__ import annotations

import ctypes
import os

import mfusepy

FUSE_PARALLEL_DIROPS = 1 << 18  # linux/fuse.h
_FLAGS = 12
"""Offset of ``flags`` in ``struct fuse_init_out``, which follows the header."""


class _Vector(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


_writev_type = ctypes.CFUNCTYPE(
    ctypes.c_ssize_t, ctypes.c_int, ctypes.POINTER(_Vector), ctypes.c_int, ctypes.c_void_p
)


class _Io(ctypes.Structure):
    """``struct fuse_custom_io`` of libfuse 3.13."""

    _fields_ = [
        ("writev", ctypes.c_void_p),
        ("read", ctypes.c_void_p),
        ("splice_receive", ctypes.c_void_p),
        ("splice_send", ctypes.c_void_p),
    ]


_libc = ctypes.CDLL(None, use_errno=True)
# They ignore the fourth argument.
_READ = ctypes.cast(_libc.read, ctypes.c_void_p).value
_WRITEV = ctypes.cast(_libc.writev, ctypes.c_void_p).value
_kept: list[object] = []


def allow_parallel_lookups(device: int) -> None:
    """To be called by the file system's ``init``.

    Args:
        device: the descriptor of ``/dev/fuse`` that libfuse uses.
    """
    if mfusepy.fuse_version_minor >= 17:
        return
    # What mfusepy has loaded; all of it is in the process once.
    libfuse = mfusepy._libfuse
    libfuse.fuse_get_session.restype = ctypes.c_void_p
    libfuse.fuse_get_session.argtypes = [ctypes.c_void_p]
    libfuse.fuse_session_custom_io.argtypes = [ctypes.c_void_p, ctypes.POINTER(_Io), ctypes.c_int]
    session = libfuse.fuse_get_session(libfuse.fuse_get_context().contents.fuse)

    def use(writev: int | None) -> None:
        if libfuse.fuse_session_custom_io(session, _Io(writev, _READ, None, None), device) != 0:
            raise OSError("fuse_session_custom_io")

    @_writev_type
    def answer(fd: int, vectors: ctypes._Pointer[_Vector], count: int, _: int) -> int:
        flags = ctypes.c_uint32.from_address(vectors[1].base + _FLAGS)
        flags.value |= FUSE_PARALLEL_DIROPS
        use(_WRITEV)
        return os.writev(
            fd, [ctypes.string_at(vectors[n].base, vectors[n].length) for n in range(count)]
        )

    _kept.append(answer)
    use(ctypes.cast(answer, ctypes.c_void_p).value)
