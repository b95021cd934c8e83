"""The keeper's step: what a node answers, the images that were sent to it, and when it is ended."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from stager import keeper
from stager.cli import running
from stager.errors import NotFoundError
from stager.processes import KEEPER

pytestmark = pytest.mark.unit


# What a node answers


@pytest.mark.parametrize("debug", ["", "1"])
@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (NotFoundError("it is gone"), "it is gone"),
        (OSError(28, "No space left on device", "/tmp/x"), "No space left on device (/tmp/x)"),
        (RuntimeError("oops"), "this is a bug in stager: RuntimeError: oops"),
    ],
    ids=["told", "system", "bug"],
)
def test_a_node_answers_whatever_it_meets(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    problem: Exception,
    message: str,
    debug: str,
) -> None:
    def fail(_: object) -> None:
        raise problem

    monkeypatch.setattr(running, "load_config", fail)
    monkeypatch.setattr(keeper, "ignore_end", lambda: None)  # it would be for all tests
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv(KEEPER, "17")
    monkeypatch.setenv("STAGER_DEBUG", debug)
    for answers in ("", str(tmp_path)):
        assert running.keep(argparse.Namespace(received=[], answers=answers)) == 0
    printed = capsys.readouterr()
    (answer,) = tmp_path.glob("*.json")
    assert answer.read_text() == printed.out
    assert message in json.loads(printed.out)["error"]
    assert printed.err.count("Traceback") == (2 if debug else 0)
