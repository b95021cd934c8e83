"""What conda records of every file that it installed: ``conda-meta/*.json`` of a prefix.

conda, mamba, micromamba, rattler and pixi write the same: for each path of a package the checksum
that the file has in the package and the one that it has in the prefix, and where a prefix was put
into it, the placeholder that it was put in place of, in which mode (``text`` or ``binary``).
"""

from __future__ import annotations

import base64
import glob
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

DIRECTORY = "conda-meta"
RECORD = re.compile(r"conda-meta/[^/]+\.json\Z")
TEXT, BINARY = "text", "binary"


@dataclass(frozen=True)
class Recorded:
    """What is recorded of one path.

    Attributes:
        package: the name of the package it is from.
        checksum: hex sha256 of the file as it was installed, or empty.
        mode: :data:`TEXT` or :data:`BINARY` where it has the prefix in it, else empty.
        room: bytes of the placeholder: the longest prefix that fits; 0 without one.
    """

    package: str
    checksum: str
    mode: str
    room: int


def read(prefix: str) -> dict[str, Recorded]:
    """Everything that is recorded in a prefix, by relative path; empty where it is not conda's.

    A record that cannot be read tells nothing: its files are searched like any others.
    """
    found: dict[str, Recorded] = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(prefix), DIRECTORY, "*.json"))):
        try:
            with open(path, "rb") as file:
                record = json.loads(file.read())
            for one in _paths(record):
                placeholder = str(one.get("prefix_placeholder") or "")
                mode = BINARY if one.get("file_mode") == BINARY else TEXT
                found[str(one["_path"])] = Recorded(
                    str(record["name"]),
                    str(one.get("sha256_in_prefix") or one.get("sha256") or ""),
                    mode if placeholder else "",
                    len(os.fsencode(placeholder)),
                )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return found


def _paths(record: Any) -> Iterator[dict[str, Any]]:
    yield from (record.get("paths_data") or {}).get("paths") or ()


def too_long(recorded: Mapping[str, Recorded], length: int) -> Iterator[tuple[str, Recorded]]:
    """The compiled files that have no room for a prefix of ``length`` bytes, the tightest first."""
    tight = ((path, one) for path, one in recorded.items() if one.mode == BINARY)
    yield from sorted((one for one in tight if one[1].room < length), key=lambda one: one[1].room)


def update(
    data: bytes, rewritten: Mapping[str, tuple[str, int]], altered: Collection[str]
) -> bytes:
    """Bring the record of a package up to date.

    Args:
        data: the record, ``conda-meta/NAME.json``.
        rewritten: base64 sha256 (unpadded) and size of the files whose content changed.
        altered: files that were not as recorded to begin with: they stay so.

    Returns:
        The record with the checksums of what was rewritten, and without the paths of the package
        cache, which is no part of the environment; as it was where it is not what it should be.
    """
    try:
        record = json.loads(data)
        for one in _paths(record):
            new = rewritten.get(one["_path"])
            if new is not None and one["_path"] not in altered and "sha256_in_prefix" in one:
                one["sha256_in_prefix"] = base64.urlsafe_b64decode(f"{new[0]}=").hex()
        for key in ("extracted_package_dir", "package_tarball_full_path"):
            if record.get(key):
                record[key] = ""
        if (record.get("link") or {}).get("source"):
            record["link"]["source"] = ""
    except (ValueError, KeyError, TypeError, AttributeError):
        return data
    text = json.dumps(record, indent=2, ensure_ascii=data.isascii())
    return text.encode("utf-8", "surrogatepass") + (b"\n" if data.endswith(b"\n") else b"")
