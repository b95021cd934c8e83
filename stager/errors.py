"""What can go wrong, whose fault it is, and what to do next.

Every error a user can cause or meet is a :class:`StagerError`. It carries an exit code (the
documented ones, see ``docs/exit-codes.md``), a *blame* that alone decides what a scheduler hook
exits with, and a hint that says what to do next.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing is not needed for it
    from collections.abc import Mapping
    from typing import Any

JOB = "job"
"""The user's reference, environment or options."""
SITE = "site"
"""Configuration, the repository, a timeout, or a bug of ours."""
NODE = "node"
"""This node's own disk: the only blame that may ever drain a node, and only if a site opts in."""

LIMITS = "check the limits on processes, memory and open files (`ulimit -a`)"
"""What to do where a process, a thread, memory or a file cannot be had."""


class StagerError(Exception):
    """An error with a place in the interface.

    Args:
        message: what happened, in one sentence without a final full stop.
        hint: what to do next; printed on a line of its own.
        blame: whose fault it is: :data:`JOB`, :data:`SITE` or :data:`NODE`.
    """

    exit_code = 1
    blame = SITE

    def __init__(self, message: str, *, hint: str | None = None, blame: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if blame is not None:
            self.blame = blame

    def as_data(self) -> dict[str, Any]:
        """The error as JSON has it, for another process or node: see :func:`from_data`."""
        return {
            "error": self.message,
            "hint": self.hint or "",
            "blame": self.blame,
            "code": self.exit_code,
        }


class UsageError(StagerError):
    """The command line, a reference or a configuration value is not what it should be."""

    exit_code = 2
    blame = JOB


class OptionError(UsageError):
    """A value of the command line is not what it should be: the command is not what was meant."""


class NotFoundError(StagerError):
    """No such environment, reference or repository."""

    exit_code = 10
    blame = JOB


class BusyError(StagerError):
    """Somebody else holds it, or a time limit ran out."""

    exit_code = 11
    blame = SITE


class IntegrityError(StagerError):
    """Bytes are not what they were: truncated, altered, hostile, or changed while being read."""

    exit_code = 12
    blame = JOB


class NoSpaceError(StagerError):
    """No bytes or no inodes left where something had to be written.

    Attributes:
        needed: the bytes and inodes that have to be free, where they were counted beforehand.
    """

    exit_code = 13
    blame = SITE
    needed: tuple[int, int] | None = None


class DeniedError(StagerError):
    """Permission, ownership or modes forbid it."""

    exit_code = 14
    blame = JOB


class IncompatibleError(StagerError):
    """The environment cannot run here: architecture, C library, base Python, mount options."""

    exit_code = 15
    blame = JOB


_KINDS: tuple[type[StagerError], ...] = (
    UsageError, NotFoundError, BusyError, IntegrityError, NoSpaceError, DeniedError,
    IncompatibleError,
)  # fmt: skip


def from_data(value: Mapping[str, Any], *, blame: str = SITE) -> StagerError:
    """The error that another process or node has met, of the class that it was.

    Args:
        value: what :meth:`StagerError.as_data` gave there; only ``error`` has to be in it.
        blame: whose fault it is where that is not told.
    """
    kind = next((one for one in _KINDS if one.exit_code == value.get("code")), StagerError)
    told = value.get("blame")
    return kind(
        str(value["error"]),
        hint=str(value.get("hint") or "") or None,
        blame=str(told) if told in (JOB, SITE, NODE) else blame,
    )


def known(
    error: BaseException, hint: str = "run it again with STAGER_DEBUG=1 and report what it prints"
) -> StagerError:
    """An error as one of ours: what is read of it, whatever it is.

    Args:
        error: one of ours, which it stays, or any other.
        hint: what to do about a bug.
    """
    if isinstance(error, StagerError):
        return error
    if isinstance(error, MemoryError):
        return StagerError("there is not enough memory", hint=LIMITS)
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return StagerError("cannot start a thread", hint=LIMITS)
    return StagerError(f"a bug in stager: {type(error).__name__}: {error}", hint=hint)
