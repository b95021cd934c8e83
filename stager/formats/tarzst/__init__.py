"""``tar.zst`` images: many independent zstd frames, so that all cores extract one image.

:class:`Writer` makes one from members, :func:`extract` makes a tree of one. The bytes of the
format and the reasons for it are in ``docs/formats/tar-zst.md``.

Extraction trusts nothing that the image says. What keeps it safe is mostly order: worker processes
create directories and files while no link exists in the tree at all, so that no path can lead
through one; then the parent, alone, makes the links, and last sets the directories' modes. Every
directory is opened below its parent without following links, every file is created exclusively,
and whatever goes wrong, the whole tree is removed.
"""

from __future__ import annotations

from stager.formats.tarzst.extracting import extract
from stager.formats.tarzst.index import FRAME_SIZE, MIN_FRAME_SIZE
from stager.formats.tarzst.writing import Writer

__all__ = ["FRAME_SIZE", "MIN_FRAME_SIZE", "Writer", "extract"]
