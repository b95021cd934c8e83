"""The keeper's step: what a node answers, the images that were sent to it, and when it is ended."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

import tiny
from stager.cli import running
from stager.cli.common import Bars
from stager.errors import NotFoundError, StagerError
from stager.repository import Repository
from stager.schedulers import Allocation
from stager.staging import keeper, lease
from stager.staging.processes import KEEPER
from stager.staging.stage import Staged
from stager.staging.store import MOUNTED, Stamp, Store, boot_id

pytestmark = pytest.mark.unit

A, B = "a" * 16, "b" * 16


# What a node answers


@pytest.mark.parametrize("debug", ["", "1"])
@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (NotFoundError("it is gone"), "it is gone"),
        (OSError(28, "No space left on device", "/tmp/x"), "No space left on device (/tmp/x)"),
        (RuntimeError("oops"), "a bug in stager: RuntimeError: oops"),
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
    monkeypatch.setattr(keeper, "put_off_end", lambda: None)  # it would be for all tests
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


def test_an_image_of_what_is_mounted_elsewhere_is_not_taken_in(
    tmp_path: Path, sent: list[str]
) -> None:
    """Another job may have it mounted in a mount namespace of its own, where we cannot see it."""
    node = Store(str(tmp_path / "store"))
    stamp = Stamp("image", MOUNTED, boot_id(), 1, owner="slurm-1.0")
    Path(node.image(A)).write_text("its image")
    node.set_ready(A, stamp)
    keeper.receive(sent, node)
    assert node.stamp(A) == stamp
    assert Path(node.image(A)).read_text() == "its image"
    assert not (tmp_path / A).exists()
    node.set_ready(A, stamp._replace(boot="another"))
    (tmp_path / A).write_text(A)
    keeper.receive(sent, node)
    assert node.stamp(A) is None
    assert Path(node.image(A)).read_text() == A


def test_an_end_that_comes_while_it_stages_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Store(str(tmp_path / "store"))
    node.lease(A, "slurm-17")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setattr(keeper, "has_tasks", lambda job: False)

    def keep() -> None:
        signal.alarm(30)
        keeper.put_off_end()
        os.kill(os.getpid(), signal.SIGTERM)
        keeper.hold([], node, "slurm-17")

    assert tiny.in_child(keep) == 0
    assert node.leases(A) == ()

    def stay() -> None:
        signal.alarm(30)
        keeper.put_off_end()
        os.kill(os.getpid(), signal.SIGTERM)
        keeper.stay()

    assert tiny.in_child(stay) == -signal.SIGTERM


def test_an_image_whose_tree_somebody_makes_is_not_needed(tmp_path: Path, sent: list[str]) -> None:
    node = Store(str(tmp_path / "store"))
    with node.lock(A, timeout=0.0):
        keeper.receive(sent, node)
    assert not Path(node.image(A)).exists()
    assert Path(node.image(B)).read_text() == B
    assert not (tmp_path / A).exists()


def test_nodes_are_told_of_what_a_failed_sbcast_has_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sbcast = tmp_path / "sbcast"
    sbcast.write_text('#!/bin/sh\necho part >"$2"\necho "sbcast: error: no space" >&2\nexit 1\n')
    sbcast.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    layers = [SimpleNamespace(id=name, image=SimpleNamespace(format="squashfs")) for name in (A, B)]
    published = SimpleNamespace(
        manifest=SimpleNamespace(layers=layers), repository=SimpleNamespace(image=str)
    )
    bars = Bars(quiet=True)
    config = {"store": str(tmp_path / "store")}
    option, sent = keeper._send(cast(Any, published), cast(Any, config), bars)
    assert option == "--received"
    node = Store(config["store"])
    keeper.receive([sent], node)
    assert not Path(sent.partition("=")[2]).exists()
    assert Path(node.image(A)).read_text() == "part\n"  # which staging verifies


def test_an_image_that_came_to_another_disk_is_copied(
    tmp_path: Path, sent: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.rename

    def rename(source: str, target: str) -> None:
        if os.path.dirname(source) == str(tmp_path):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    node = Store(str(tmp_path / "store"))
    keeper.receive(sent, node)
    assert [Path(node.image(name)).read_text() for name in (A, B)] == [A, B]
    assert not (tmp_path / A).exists()
    assert os.listdir(os.path.join(node.root, "tmp")) == []


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


# The end of the step


@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
@pytest.mark.parametrize("serves", [True, False])
def test_a_step_that_failed_stays_where_others_may_use_its_mounts(
    public_path: Path, monkeypatch: pytest.MonkeyPatch, serves: bool
) -> None:
    good = {"node": "n1", "prefix": "/s", "how": "mounted", "holds": True, "serves": serves}
    bad = {"node": "n2", "error": "it is full", "hint": None, "blame": "node"}
    (public_path / "reports").write_text("".join(f"{json.dumps(one)}\n" for one in (good, bad)))
    srun = public_path / "srun"
    srun.write_text(f"#!/bin/sh\ncd {public_path}\necho $$ >pid\ncat reports\nexec sleep 600\n")
    srun.chmod(0o755)
    monkeypatch.setenv("PATH", f"{public_path}:/usr/bin:/bin")
    monkeypatch.setattr(keeper, "session_directory", lambda: str(public_path))
    config = tiny.configured(public_path)
    published = tiny.publish(Repository(config["repository"]), tiny.described())
    where = Allocation("slurm", "17", (2,), "", "0", "n1")
    with pytest.raises(StagerError, match="1 of 2 nodes cannot stage: n2: it is full"):
        keeper.stage_everywhere(published, config, where, via="shared", progress=Bars(quiet=True))
    step = int((public_path / "pid").read_text())
    try:
        assert (lease.start_time(step) != "0") is serves
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(step, signal.SIGKILL)
            os.waitpid(step, 0)


def test_who_mounted_serves_and_who_found_mounts_does_not() -> None:
    value = tiny.described()
    for how, stays, expected in (
        ("mounted", True, True),
        ("hit", True, False),
        ("mounted", False, False),
    ):
        staged = Staged("/s", how, value, {A: "hit", B: how})
        said = json.loads(keeper.report(staged, mounted=True, stays=stays))
        assert said["serves"] is expected


def test_a_report_that_comes_between_the_looks_is_known_where_a_node_was_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = str(tmp_path / "record")
    for name in ("out", "err"):
        Path(f"{record}.{name}").write_text("")
    real = keeper._reports

    def reports(record: str, answers: str) -> list[dict[str, Any]]:
        found = real(record, answers)
        Path(f"{record}.out").write_text('{"node": "n1", "serves": true}\n')
        Path(f"{record}.err").write_text("srun: error: n2: task 1: Killed\n")
        return found

    monkeypatch.setattr(keeper, "_reports", reports)
    known: list[dict[str, Any]] = []
    with subprocess.Popen(["sleep", "60"]) as process:
        with pytest.raises(StagerError, match="failed on n2"):
            keeper._await(known, process, record, "", 2, 600)
        process.kill()
    assert [one["serves"] for one in known] == [True]


@pytest.mark.parametrize("words", ["before", "after"])
def test_a_node_that_ends_without_a_word_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    """Its Python does not start there, say, while the other nodes hold what they have mounted."""
    srun = tmp_path / "srun"
    srun.write_text(
        f"""#!/bin/sh
        words() {{ echo 'slurmstepd: error: execve(): /sw/python: No such file or directory' >&2; }}
        echo '{{"node": "n1", "prefix": "/p", "how": "mounted", "holds": true, "serves": true}}'
        echo 'of a profile: a warning' >&2
        [ {words} = after ] || words
        echo 'srun: error: n2: task 1: Exited with exit code 2' >&2
        [ {words} = before ] || {{ sleep 0.1; words; }}
        exec sleep 600
        """
    )
    srun.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    record = str(tmp_path / "record")
    reports: list[dict[str, Any]] = []
    command = keeper._srun(Allocation("slurm", "17", (2,), "", "0", "n1"), ["keep"])
    with open(f"{record}.out", "wb") as out, open(f"{record}.err", "wb") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, start_new_session=True)
    try:
        with pytest.raises(StagerError) as caught:
            keeper._await(reports, process, record, "", 2, 600)
    finally:
        keeper._end(process)
    assert caught.value.message == (
        "stager failed on n2 (Exited with exit code 2):"
        " execve(): /sw/python: No such file or directory"
    )
    assert caught.value.hint is not None
    assert caught.value.hint.endswith("--version` work there?")
    assert [one["serves"] for one in reports] == [True]  # so its step is left alone
