"""Whether an environment can run on this node, told before a job finds out."""

from __future__ import annotations

import os

from stager import fsutil
from stager.errors import IncompatibleError
from stager.manifest import Manifest
from stager.staging.store import Store


def require(manifest: Manifest) -> None:
    """Refuse an environment that cannot run on this machine, before any byte is copied."""
    needed, machine, glibc = manifest.platform, os.uname().machine, _glibc()
    if needed.machine != machine:
        raise IncompatibleError(
            f"the environment was packed on {needed.machine}; this node is {machine}",
            hint="pack it on a machine like the nodes",
        )
    if needed.glibc and glibc and _version(glibc) < _version(needed.glibc):
        raise IncompatibleError(
            f"the environment needs glibc {needed.glibc}; this node has {glibc}",
            hint="pack it on a machine as old as the nodes",
        )
    base = manifest.local_base
    if base and not os.access(base, os.X_OK):
        raise IncompatibleError(
            f"the environment's base Python {base} is missing on this node",
            hint="leave its directory out of the key `local_prefixes`, so that it is packed too",
        )


def _glibc() -> str:
    """The version of the node's glibc, or empty; the module `platform` takes 5 ms to tell it."""
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    except (ValueError, OSError):
        return ""
    return version if name == "glibc" else ""


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def try_out(manifest: Manifest, node: Store) -> None:
    """Start the staged Python once: the surest test of everything that can be wrong with it."""
    import subprocess

    python = os.path.join(node.tree(manifest.top.id), manifest.python.executable)
    try:
        answer = subprocess.run(
            [
                python,
                "-I",
                "-S",
                "-B",
                "-c",
                "import sys; print('%d.%d.%d' % sys.version_info[:3])",
            ],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=60,
            check=False,
            text=True,
            **node.trying(),
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        if isinstance(error, OSError) and error.errno in fsutil.SCARCE:
            raise fsutil.explain(error, f"start {python}") from error
        reason = error.strerror if isinstance(error, OSError) else "it does not end"
        raise IncompatibleError(
            f"the staged Python does not start: {python}: {reason}",
            hint="is the store's file system mounted noexec? `stager doctor` shows that",
        ) from error
    if answer.returncode != 0:
        said = answer.stderr.strip().splitlines()
        raise IncompatibleError(
            f"the staged Python does not start: {said[-1] if said else answer.returncode}",
            hint="`stager doctor` shows what is missing on this node",
        )
    found, packed = answer.stdout.strip().split(".")[:2], manifest.python.version.split(".")[:2]
    if found != packed:
        raise IncompatibleError(
            f"the environment needs Python {'.'.join(packed)}; the node's base Python is"
            f" {answer.stdout.strip()}",
            hint="leave its directory out of the key `local_prefixes`, so that it is packed too",
        )
