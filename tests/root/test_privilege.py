"""What root has a user's process do."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from stager.errors import StagerError
from stager.hooks.common import as_user

pytestmark = pytest.mark.root

NOBODY = 65534


@pytest.fixture(autouse=True)
def _nobody_is_left() -> Iterator[None]:
    yield
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_it_is_the_user() -> None:
    assert as_user(NOBODY, NOBODY, os.getresuid) == str((NOBODY,) * 3)


def test_it_may_answer_at_length() -> None:
    assert as_user(NOBODY, NOBODY, lambda: "x" * 300_000) == "x" * 300_000
    assert len(as_user(NOBODY, NOBODY, lambda: "x" * 3_000_000)) == (1 << 20) - 1


def test_it_may_fail() -> None:
    def fail() -> None:
        raise StagerError("no such thing")

    with pytest.raises(StagerError, match=r"^no such thing$"):
        as_user(NOBODY, NOBODY, fail)


def test_it_may_hang() -> None:
    with pytest.raises(StagerError, match="took longer than 0 s"):
        as_user(NOBODY, NOBODY, lambda: os.kill(os.getpid(), signal.SIGSTOP), limit=0.2)


def test_it_may_answer_and_not_end() -> None:
    """As one that its user has got hold of could: whoever waits for it waits no longer."""

    def answer() -> str:
        os._exit = lambda _: signal.pause()  # type: ignore[assignment]
        return "done"

    assert as_user(NOBODY, NOBODY, answer) == "done"
