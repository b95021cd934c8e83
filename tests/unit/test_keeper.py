"""The keeper's step: what a node answers, the images that were sent to it, and when it is ended."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from stager import keeper
from stager.cli import running
from stager.errors import NotFoundError, StagerError
from stager.processes import KEEPER
from stager.store import Store

pytestmark = pytest.mark.unit

A, B = "a" * 16, "b" * 16


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
    sent = tmp_path / "sent"
    for answers in ("", str(tmp_path)):
        sent.touch()
        arguments = argparse.Namespace(received=[f"{A}={sent}"], answers=answers)
        assert running.keep(arguments) == 0
        assert not sent.exists()
    printed = capsys.readouterr()
    (answer,) = tmp_path.glob("*.json")
    assert answer.read_text() == printed.out
    assert message in json.loads(printed.out)["error"]
    assert printed.err.count("Traceback") == (2 if debug else 0)


# Images that were sent


@pytest.fixture
def sent(tmp_path: Path) -> list[str]:
    """Two images that sbcast has left, as the node's options."""
    for name in (A, B):
        (tmp_path / name).write_text(name)
    return [f"{name}={tmp_path / name}" for name in (A, B)]


def test_images_that_were_sent_are_taken_in(tmp_path: Path, sent: list[str]) -> None:
    node = Store(str(tmp_path / "store"))
    keeper.receive(sent, node)
    assert [Path(node.image(name)).read_text() for name in (A, B)] == [A, B]
    assert not (tmp_path / A).exists()


def test_an_image_whose_tree_somebody_makes_is_not_needed(tmp_path: Path, sent: list[str]) -> None:
    node = Store(str(tmp_path / "store"))
    with node.lock(A, timeout=0.0):
        keeper.receive(sent, node)
    assert not Path(node.image(A)).exists()
    assert Path(node.image(B)).read_text() == B
    assert not (tmp_path / A).exists()


def test_images_that_cannot_be_taken_in_are_dropped(tmp_path: Path, sent: list[str]) -> None:
    node = Store(str(tmp_path / "store"))
    Path(node.image(A)).mkdir()
    with pytest.raises(StagerError, match="cannot take in an image"):
        keeper.receive(sent, node)
    kept = tmp_path / "kept"
    kept.touch()
    link = tmp_path / "link"
    link.symlink_to(kept)
    keeper.drop([*sent, f"{A}={link}", f"{B}={tmp_path / 'missing'}"])
    assert not (tmp_path / A).exists()
    assert not (tmp_path / B).exists()
    assert link.is_symlink() and kept.exists()
