"""``stager doctor``."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess

from stager.cli.common import load_config, print_json, size
from stager.errors import StagerError
from stager.formats import squashfs
from stager.store import Store

OK, WORSE, BAD = "ok", "worse", "bad"


def doctor(arguments: argparse.Namespace) -> int:
    """Tell what this machine can do; exit 1 where staging cannot work at all."""
    config = load_config(arguments)
    checks = [_python(), _packing(), _mounting(), _extracting(), *_store(config["store"])]
    bad = any(verdict == BAD for verdict, _, _ in checks)
    if arguments.json:
        rows = [
            {"verdict": verdict, "what": what, "advice": advice} for verdict, what, advice in checks
        ]
        print_json({"checks": rows})
        return 1 if bad else 0
    for verdict, what, advice in checks:
        print(f"{verdict:<6} {what}")
        if advice:
            print(f"       {advice}")
    return 1 if bad else 0


Check = tuple[str, str, str]


def _python() -> Check:
    libc = " ".join(platform.libc_ver())
    return OK, f"Python {platform.python_version()} on {platform.machine()}, {libc}", ""


def _packing() -> Check:
    try:
        path = squashfs.program("mksquashfs")
    except StagerError as error:
        return WORSE, "cannot write squashfs images: " + error.message, error.hint or ""
    done = subprocess.run([path, "-version"], capture_output=True, text=True, check=False)
    words = done.stdout.split()
    version = words[2] if len(words) > 2 else "?"
    numbers = tuple(int(part) for part in version.split("-")[0].split(".") if part.isdigit())
    if numbers < (4, 5):
        return (
            WORSE,
            f"mksquashfs {version} cannot read streams",
            "use --format tar.zst, or 4.5 or newer",
        )
    return OK, f"packs squashfs images (mksquashfs {version})", ""


def _mounting() -> Check:
    reason = squashfs.why_not_mount()
    if reason:
        return (
            WORSE,
            f"cannot mount images: {reason}",
            "trees are extracted instead, which takes longer",
        )
    return OK, "mounts images with squashfuse", ""


def _extracting() -> Check:
    if shutil.which("unsquashfs") is None:
        return (
            WORSE,
            "cannot extract squashfs images: unsquashfs is missing",
            "install squashfs-tools",
        )
    return OK, f"extracts images on {len(os.sched_getaffinity(0))} processors", ""


def _store(path: str) -> list[Check]:
    try:
        node = Store(path)
    except StagerError as error:
        return [(BAD, error.message, error.hint or "")]
    checks = [(OK, f"store {path}: {size(node.free())} free", "")]
    info = os.statvfs(path)
    if info.f_flag & os.ST_NOEXEC:
        checks.append((WORSE, f"{path} is mounted noexec", "only mounted images can be used there"))
    if _is_memory(path):
        checks.append(
            (WORSE, f"{path} is in memory", "extracted trees there count against the job's memory")
        )
    return checks


def _is_memory(path: str) -> bool:
    """Tell whether a path is on tmpfs, by the mount table."""
    best, kind = "", ""
    with open("/proc/self/mounts", encoding="utf-8", errors="surrogateescape") as mounts:
        for line in mounts:
            _, directory, filesystem, *_ = line.split(" ")
            if f"{path}/".startswith(directory.rstrip("/") + "/") and len(directory) >= len(best):
                best, kind = directory, filesystem
    return kind == "tmpfs"
