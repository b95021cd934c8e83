"""CRC-32 of images: by instructions of the processor where the package isal is there.

An image of 512 MiB in the page cache is copied in 0.106 s with it, in 0.178 s with zlib's (x86_64,
zlib 1.2.13, isal 1.9.1, medians of 8). Where a disk reads it at 2.8 GB/s both take the same time,
zlib's more of the processor. The sums are the same.
"""

from __future__ import annotations

try:
    from isal.isal_zlib import crc32
except ImportError:  # no wheel for this machine, or a node where only what must be is installed
    from zlib import crc32

__all__ = ["crc32"]
