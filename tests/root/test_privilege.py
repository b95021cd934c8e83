"""What root has a user's process do."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stager import config as configuration
from stager import mounts, privilege
from stager.cli import doctor
from stager.errors import DeniedError, StagerError
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
    with pytest.raises(StagerError, match="timed out after 0 s"):
        as_user(NOBODY, NOBODY, lambda: os.kill(os.getpid(), signal.SIGSTOP), limit=0.2)


def test_it_may_answer_and_not_end() -> None:
    """As one that its user has got hold of could: whoever waits for it waits no longer."""

    def answer() -> str:
        os._exit = lambda _: signal.pause()  # type: ignore[assignment]
        return "done"

    assert as_user(NOBODY, NOBODY, answer) == "done"


# -- who has left


def test_a_user_whom_the_node_does_not_know() -> None:
    with pytest.raises(StagerError, match="uid 29999 is unknown on this node"):
        as_user(29999, None, os.getresuid)
    told = as_user(
        29999, None, lambda: (os.getresuid(), os.getresgid(), os.getgroups()), known=False
    )
    assert told == str(((29999,) * 3, (65534,) * 3, [65534]))


# -- the store


def test_a_store_that_its_user_has_mounted_something_on_is_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "20001"
    assert privilege.private_directory(str(store), 20001)
    assert (store.stat().st_uid, store.stat().st_mode & 0o7777) == (20001, 0o700)
    monkeypatch.setattr(mounts, "is_users", lambda _: True)
    with pytest.raises(DeniedError, match=f"something is mounted on the store {store}"):
        privilege.private_directory(str(store), 20001)


def test_the_doctor_knows_where_hooks_make_stores(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    tmp_path = tmp_path_factory.mktemp("s")  # a store's path may not be long
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "loose").mkdir()
    (tmp_path / "loose").chmod(0o775)
    (tmp_path / "loose/below").mkdir()
    for parent, made in (("real", True), ("link", False), ("loose/below", False)):
        assert privilege.private_directory(f"{tmp_path}/{parent}/20001", 20001) is made
        config = configuration.load(overrides={"store": f"{tmp_path}/{parent}/{{uid}}"})
        ((verdict, what, _),) = doctor._stores(config)
        assert (verdict == "ok") is made, what


# -- what is left running

_LEAVING = """
import subprocess, sys
from stager import privilege
from stager.hooks import orphans
privilege.PATH = sys.argv[2]
orphans.adopt()
subprocess.run(["sh", "-c", sys.argv[1]], check=True)
orphans.end()
"""


def test_what_is_left_running_is_ended_but_for_servers(tmp_path: Path) -> None:
    server, other = tmp_path / "bin/squashfuse_ll", tmp_path / "squashfuse_ll"
    server.parent.mkdir()
    for one in (server, other):
        shutil.copy("/bin/sleep", one)
    # In sessions of their own, and one of them started by what the other one started.
    script = f"""
        setsid sh -c 'sleep 600 & echo $! >{tmp_path}/below; exec sleep 600' &
        echo $! >{tmp_path}/left
        setsid {server} 600 &
        echo $! >{tmp_path}/server
        setsid {other} 600 &
        echo $! >{tmp_path}/other
        while ! [ -s {tmp_path}/below ]; do sleep 0.01; done
        # A server is told by its program, which it is only after two more calls of exec.
        until [ /proc/$(cat {tmp_path}/server)/exe -ef {server} ]; do sleep 0.01; done
    """
    # A process of its own: ours would stay the parent of orphans.
    subprocess.run([sys.executable, "-c", _LEAVING, script, server.parent], check=True, timeout=60)
    runs = {
        name: Path("/proc", (tmp_path / name).read_text().strip()).exists()
        for name in ("below", "left", "other", "server")
    }
    os.kill(int((tmp_path / "server").read_text()), signal.SIGKILL)
    assert runs == {"below": False, "left": False, "other": False, "server": True}
