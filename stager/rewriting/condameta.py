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
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from stager import fsutil

DIRECTORY = "conda-meta"
RECORD = re.compile(r"conda-meta/[^/]+\.json\Z")
_CHECKSUM = "sha256_in_prefix"
TEXT, BINARY = "text", "binary"


class Recorded(NamedTuple):
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
            with open(path, "rb", opener=fsutil.regular) as file:
                record = json.loads(file.read())
            for one in _paths(record):
                placeholder = str(one.get("prefix_placeholder") or "")
                mode = BINARY if one.get("file_mode") == BINARY else TEXT
                found[str(one["_path"])] = Recorded(
                    str(record["name"]),
                    str(one.get(_CHECKSUM) or one.get("sha256") or ""),
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
    data: bytes, rewritten: Mapping[str, tuple[str, int]], installed: Mapping[str, int]
) -> bytes:
    """Bring the record of a package up to date.

    Args:
        data: the record, ``conda-meta/NAME.json``.
        rewritten: base64 sha256 (unpadded) and size of the files whose content changed.
        installed: sizes that those had which were as recorded; others stay as they are recorded.

    Returns:
        The record with the checksums of what was rewritten, and without the paths of the package
        cache, which is no part of the environment; as it was where it is not what it should be.
    """
    try:
        record = json.loads(data)
        changed: dict[str, str] = {}
        for one in _paths(record):
            new = rewritten.get(one["_path"])
            size = installed.get(one["_path"])
            if new is None or size is None:
                continue
            checksum = base64.urlsafe_b64decode(f"{new[0]}=").hex()
            if one.get(_CHECKSUM):
                changed[one[_CHECKSUM]] = checksum
                one[_CHECKSUM] = checksum
            if str(one.get("path_type")).endswith("_entry_point"):  # made here: in no package
                one["sha256"] = checksum
            if one.get("size_in_bytes") == size:  # conda leaves that of the file in the package
                one["size_in_bytes"] = new[1]
        for one in _paths(record):
            # The checksum of a link is that of what it leads to.
            if one.get("path_type") == "softlink" and one.get(_CHECKSUM) in changed:
                one[_CHECKSUM] = changed[one[_CHECKSUM]]
        for key in ("extracted_package_dir", "package_tarball_full_path"):
            if record.get(key):
                record[key] = ""
        if (record.get("link") or {}).get("source"):
            record["link"]["source"] = ""
    except (ValueError, KeyError, TypeError, AttributeError):
        return data
    # In one line: an indent is written by Python itself, three times as slowly.
    text = json.dumps(record, ensure_ascii=data.isascii())
    return text.encode("utf-8", "surrogatepass") + (b"\n" if data.endswith(b"\n") else b"")
