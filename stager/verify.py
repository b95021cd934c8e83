"""Proof that a staged environment is used and nothing else: every path that an import touches.

With ``strace`` every system call that names a file is seen. Without it, Python's audit hooks tell
what Python opens and the process's map tells which libraries the dynamic loader took.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from stager.config import Config
from stager.errors import StagerError
from stager.paths import is_within
from stager.staging.stage import Staged

STRACE, AUDIT = "strace", "audit hooks"
TIMEOUT = 600.0
"""Seconds that all imports together may take."""

_SYSTEM = (
    "/usr",
    "/lib",
    "/lib64",
    "/bin",
    "/sbin",
    "/etc",
    "/proc",
    "/sys",
    "/dev",
    "/run",
    "/var",
)
_CALL = re.compile(r'^(?:\[pid +\d+\] |\d+ +)?(\w+)\((?:[^"]*?)"((?:[^"\\]|\\.)*)"')
_LANDMARK = re.compile(r"(.*)/lib(?:64)?/python[\d.]+t?(?:\.zip|/os\.pyc?|/lib-dynload)?\Z")
_ESCAPE = re.compile(r"\\([0-7]{1,3}|x[0-9a-f]{2}|.)")

_IMPORTS = """
import json, sys, importlib
seen, failed = set(), {}
def hook(event, arguments):
    if event == "open" and arguments and isinstance(arguments[0], str):
        seen.add(arguments[0])
result, names, audited = sys.argv[1], sys.argv[2].split(","), sys.argv[3] == "audit"
if audited:
    sys.addaudithook(hook)
for name in names:
    try:
        importlib.import_module(name)
    except BaseException as error:
        failed[name] = f"{type(error).__name__}: {error}"
if audited:
    with open("/proc/self/maps") as maps:
        seen.update(line.split(None, 5)[5].strip() for line in maps if "/" in line)
touched = sorted(seen)  # writing the result is no import
with open(result, "w") as file:
    json.dump({"seen": touched, "failed": failed, "prefix": sys.prefix}, file)
"""


class Verified(NamedTuple):
    """What the imports touched.

    Attributes:
        method: :data:`STRACE` or :data:`AUDIT`.
        paths: how many different paths were named.
        origin: paths of the original environment or its base.
        outside: other paths that are neither node-local trees nor the system.
        failed: modules that do not import, and why.
        before: those of them that do not import from the original either.
    """

    method: str
    paths: int
    origin: tuple[str, ...]
    outside: tuple[str, ...]
    failed: Mapping[str, str]
    before: tuple[str, ...] = ()


def verify(
    results: Sequence[Staged],
    config: Config,
    environ: Mapping[str, str],
    *,
    modules: Sequence[str],
    original: Mapping[str, str] | None = None,
) -> Verified:
    """Import modules from a staged tree and report every path that is not on the node.

    Args:
        results: the staged environments; the first one's Python imports.
        config: ``local_prefixes`` are the node's own.
        environ: the activated environment variables.
        modules: modules to import.
        original: the variables with the original active; None where it is not here.

    Raises:
        StagerError: the imports could not be run.
    """
    python = os.path.join(results[0].prefix, results[0].manifest.python.executable)
    with tempfile.TemporaryDirectory(prefix="stager-verify-") as scratch:
        answer = os.path.join(scratch, "answer")
        trace = os.path.join(scratch, "trace")
        method = STRACE if _can_trace() else AUDIT
        command = [python, "-B", "-c", _IMPORTS, answer, ",".join(modules)]
        if method == STRACE:
            command = [
                "strace", "-f", "-qq", "-s", "4096", "-e", "trace=%file", "-o", trace, *command,
                "strace",
            ]  # fmt: skip
        else:
            command.append("audit")
        try:
            done = _run(command, environ, scratch)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise StagerError(
                f"the imports did not finish: {error}", hint="name fewer modules with --import"
            ) from error
        try:
            with open(answer, encoding="utf-8") as file:
                said = json.load(file)
        except (OSError, ValueError) as error:
            lines = done.stderr.decode(errors="replace").split("\n")
            reason = next(filter(None, lines[::-1]), f"status {done.returncode}")
            raise StagerError(
                f"the imports did not finish: {reason}",
                hint="does the staged Python start? `stage-run --strict --env REF python -V`",
            ) from error
        if done.returncode != 0 and not said["failed"]:
            raise StagerError(f"the imports ended with status {done.returncode}")
        paths = set(said["seen"])
        if method == STRACE:
            with open(trace, encoding="utf-8", errors="surrogateescape") as file:
                paths = set(_traced(file, scratch))
    absolute = {path for path in paths if path.startswith("/")}
    origin, outside = _sort(absolute, results, config, scratch)
    before: tuple[str, ...] = ()
    if said["failed"] and original is not None:
        before = _failing(results[0].manifest.original_python, original, [*said["failed"]])
    return Verified(method, len(absolute), origin, outside, dict(said["failed"]), before)


def _run(
    command: Sequence[str], environ: Mapping[str, str], directory: str
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        command,
        cwd=directory,
        env={**environ, "MPLCONFIGDIR": directory},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=TIMEOUT,
        check=False,
    )


def _failing(python: str, environ: Mapping[str, str], modules: Sequence[str]) -> tuple[str, ...]:
    """Which modules a Python cannot import; none where it does not get through with them."""
    with tempfile.TemporaryDirectory(prefix="stager-verify-") as scratch:
        answer = os.path.join(scratch, "answer")
        command = [python, "-B", "-c", _IMPORTS, answer, ",".join(modules), "plain"]
        try:
            _run(command, environ, scratch)
            with open(answer, encoding="utf-8") as file:
                failed = json.load(file)["failed"]
        except (OSError, ValueError, subprocess.TimeoutExpired):
            return ()
    return tuple(name for name in modules if name in failed)


def _can_trace() -> bool:
    if shutil.which("strace") is None:
        return False
    probe = subprocess.run(
        ["strace", "-o", "/dev/null", "true"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    return probe.returncode == 0


def _traced(lines: Iterable[str], directory: str) -> Iterable[str]:
    for line in lines:
        match = _CALL.match(line)
        if match and match[1] not in ("readlink", "readlinkat"):
            path = _ESCAPE.sub(_unescape, match[2])
            yield os.path.normpath(os.path.join(directory, path))


def _unescape(match: re.Match[str]) -> str:
    text = match[1]
    if text[0] in "01234567":
        return os.fsdecode(bytes([int(text, 8) & 0xFF]))
    return {"n": "\n", "t": "\t", "r": "\r"}.get(text, text)


def _sort(
    paths: Iterable[str], results: Sequence[Staged], config: Config, scratch: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The paths of the original or its base, and the others that are not on the node."""
    store = os.path.dirname(os.path.dirname(results[0].prefix))
    origins = {
        path
        for manifest in (result.manifest for result in results)
        for path in (manifest.origin, *manifest.spellings, *(one.origin for one in manifest.layers))
    }
    local = (store, scratch, *_SYSTEM, *config["local_prefixes"])
    origin, outside = set(), set()
    for path in paths:
        if is_within(path, (store,)):
            continue
        if is_within(path, origins):
            origin.add(path)
        elif not (
            is_within(path, local)
            or _is_parent(path, (*local, *origins))
            or _is_landmark(path, store)
        ):
            outside.add(path)
    return tuple(sorted(origin)), tuple(sorted(outside))


def _is_landmark(path: str, store: str) -> bool:
    """A Python looks for its standard library in every directory above its own."""
    match = _LANDMARK.match(path)
    return match is not None and is_within(store, (match[1],))


def _is_parent(path: str, prefixes: Iterable[str]) -> bool:
    """Looking at a directory on the way to a local one is no leak."""
    return any(is_within(prefix, (path,)) for prefix in prefixes)
