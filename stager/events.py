"""One line for each thing a hook did, for the site's log: ``key=value`` pairs.

They go to syslog (tag ``stager``, facility daemon), or to the file of the key ``hook.log``.
Counters by outcome go to a textfile for Prometheus' node_exporter, if the key ``hook.metrics``
names one. The fields are listed in ``docs/admin-guide.md``.

Nothing here raises: a log that cannot be written is no reason to fail a job.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Mapping

STAGE, RELEASE, FAIL = "stage", "release", "fail"
_FIELDS = ("event", "job", "uid", "node", "ref", "how", "seconds", "bytes", "blame", "reason")
_LONGEST = 300
_PLAIN = re.compile(r"[\w./:@+,-]+\Z", re.ASCII)
_METRIC = re.compile(r"(stager_\w+(?:\{[^}]*\})?) (\d+(?:\.\d+)?)\Z")


def clean(text: object, longest: int = _LONGEST) -> str:
    """Make text harmless for logs and terminals: one line, printable, of bounded length.

    Args:
        text: what users or file names may have put together.
        longest: number of characters to keep.
    """
    value = str(text)
    if len(value) > longest:
        value = value[: longest - 3] + "..."
    value = "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode()
        for char in value
    )
    return value.encode("utf-8", "backslashreplace").decode()


def line(event: str, fields: Mapping[str, object]) -> str:
    """An event as one line; values with anything unusual in them are quoted."""
    known = {"event": event, **fields}
    parts = []
    for name in _FIELDS:
        if known.get(name) in (None, ""):
            continue
        value = clean(known[name])
        if not _PLAIN.match(value):
            value = '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
        parts.append(f"{name}={value}")
    return " ".join(parts)


def emit(
    event: str, fields: Mapping[str, object], *, log: str = "", metrics: str = "", lock: str = ""
) -> None:
    """Write one event.

    Args:
        event: :data:`STAGE`, :data:`RELEASE` or :data:`FAIL`.
        fields: of :mod:`stager.events`; others are left out.
        log: a file to append to; syslog where it is empty.
        metrics: a textfile of counters to bring up to date, or empty.
        lock: a file to lock meanwhile, needed with ``metrics``.
    """
    with contextlib.suppress(OSError):
        _write(line(event, fields), log, urgent=event == FAIL)
    if metrics:
        with contextlib.suppress(OSError, ValueError):
            _count(event, fields, metrics, lock)


def _write(text: str, log: str, *, urgent: bool) -> None:
    if not log:
        import syslog

        syslog.openlog("stager", syslog.LOG_PID, syslog.LOG_DAEMON)
        syslog.syslog(syslog.LOG_WARNING if urgent else syslog.LOG_INFO, text)
        return
    import time

    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    fd = os.open(log, flags, 0o640)
    try:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        os.write(fd, f"{stamp} {text}\n".encode())  # one write: lines of others stay whole
    finally:
        os.close(fd)


def _count(event: str, fields: Mapping[str, object], path: str, lock: str) -> None:
    """Add one to the counter of an outcome; written by rename, so that no reader sees half."""
    label = "blame" if event == FAIL else "how"
    added = {f'stager_{event}_total{{{label}="{clean(fields.get(label) or "none", 20)}"}}': 1.0}
    if event == STAGE:
        added["stager_stage_seconds_total"] = float(str(fields.get("seconds") or 0))
        added["stager_stage_bytes_total"] = float(str(fields.get("bytes") or 0))
    fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        counters: dict[str, float] = {}
        with contextlib.suppress(FileNotFoundError), open(path, encoding="ascii") as file:
            for text in file:
                match = _METRIC.match(text.strip())
                if match:
                    counters[match[1]] = float(match[2])
        for name, value in added.items():
            counters[name] = counters.get(name, 0.0) + value
        temporary = f"{path}.new"  # only we write it: the lock is held
        with open(temporary, "w", encoding="ascii") as file:
            kinds = sorted({name.partition("{")[0] for name in counters})
            for kind in kinds:
                file.write(f"# TYPE {kind} counter\n")
                for name in sorted(counters):
                    if name.partition("{")[0] == kind:
                        file.write(f"{name} {counters[name]:.15g}\n")
        os.rename(temporary, path)
    finally:
        os.close(fd)
