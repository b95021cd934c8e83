"""What the PBS hook decides by itself, without PBS: the form of a directive, names, escapes."""

from __future__ import annotations

import errno
import importlib.util
import os
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from environments import REPO
from stager import config, ref, schedulers
from stager.errors import UsageError


@pytest.fixture(scope="module")
def hook() -> Any:
    """The file as a module; importing it runs it, for an event that it does not know."""
    pbs: Any = types.ModuleType("pbs")
    pbs.event = lambda: types.SimpleNamespace(type="other")
    spec = importlib.util.spec_from_file_location("hook", REPO / "hooks/pbs/stager_hook.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["pbs"] = pbs
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules["pbs"]
    return module


_WORDS = st.sampled_from(
    ["a", "my.env", "+", "?", "&", "strict", "timeout=", "5m", "=", "/x/y", "~/e", "./e", " ", "@"]
    + [
        "on_stale=",
        "ignore",
        "tar.zst",
        "sha256:",
        "0123456789ab",
        "-",
        "",
        "\t",
        "é",
        "verbose",
        "format=squashfs",
        "format=",
        ",",
    ]
)


@hypothesis.given(st.lists(_WORDS, max_size=6).map("".join))
@hypothesis.example("a+b?strict&timeout=5m")
@hypothesis.example("a@sha256:0123456789ab")
def test_what_it_lets_pass_stager_can_parse(hook: Any, wish: str) -> None:
    if hook.malformed(wish):
        return
    directive = ref.parse_directive(wish, cwd="/home/alice")
    assert set(directive.options) <= {"strict", "verbose", *ref.KEYS}


def test_options_have_the_values_that_stager_knows(hook: Any) -> None:
    """The hook is one file, for another Python: it has copies."""
    assert set(hook._OPTIONS) == {"strict", "verbose", *ref.KEYS}
    for option, key in ref.KEYS.items():
        for value in ("repack", "warn", "fallback", "ignore", "squashfs", "tar.zst", "5m", "x", ""):
            try:
                config.KEYS[key].parse(value)
            except (ValueError, UsageError):
                assert hook.malformed(f"a?{option}={value}"), value
            else:
                assert not hook.malformed(f"a?{option}={value}"), value


@hypothesis.given(st.lists(_WORDS, max_size=6).map("".join))
def test_it_refuses_no_environment_that_stager_knows(hook: Any, wish: str) -> None:
    names = wish.partition("?")[0]
    try:
        ref.parse_directive(names, cwd="/home/alice")
    except UsageError:
        assert hook.malformed(names)
    else:
        assert hook.malformed(names) == ""


@pytest.mark.parametrize("job", ["12.head", "56[3].head", "56[].head", "7.a b/../c", "x" * 300])
def test_jobs_have_one_directory(hook: Any, job: str) -> None:
    assert hook.file_name(job) == schedulers.file_name(job)
    assert "/" not in hook.file_name(job)


@hypothesis.given(st.text(alphabet="ab,/:;=\\", max_size=20).filter(lambda text: "\\" not in text))
def test_commas_survive(hook: Any, value: str) -> None:
    assert hook.unescaped(hook.escaped(value)) == value


def test_a_clock_that_is_set_ends_no_wait(
    hook: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "jobs/7.head"
    state.mkdir(parents=True)
    (state / "status").write_text("pending 1\n")
    monkeypatch.setitem(hook.SETTINGS, "state", str(tmp_path))
    waited = 0

    def sleep(seconds: float) -> None:
        nonlocal waited
        waited += 1
        real = time.time
        monkeypatch.setattr(time, "time", lambda: real() + 86400.0)
        if waited == 5:
            (state / "status").write_text("ready\n")
        assert waited < 10

    monkeypatch.setattr(time, "sleep", sleep)
    assert hook.await_worker(types.SimpleNamespace(id="7.head")) == ("ready", "")


def of_job(told: list[str], **more: Any) -> Any:
    """A job as an event has it; what is done to it is told."""
    return types.SimpleNamespace(
        id="7.head", euser="root", run_count=1, exec_host2="n1:15002/0", Variable_List={},
        in_ms_mom=lambda: True, delete=lambda: told.append("delete"),
        Resource_List={"pyenv": "a?strict"}, **more,
    )  # fmt: skip


def rejecting(told: list[str]) -> Callable[[str], None]:
    def reject(message: str) -> None:
        told.append("reject")
        raise SystemExit

    return reject


def test_strict_whatever_happens(
    hook: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job's output may be on a full disk, which may be why it was not staged."""
    state = tmp_path / "jobs/7.head"
    state.mkdir(parents=True)
    (state / "status").write_text("failed\n")
    (state / "message").write_text("No space left on device\n")
    monkeypatch.setitem(hook.SETTINGS, "state", str(tmp_path))
    told: list[str] = []
    monkeypatch.setattr(hook, "log", told.append)
    monkeypatch.setattr(hook.pbs, "get_local_nodename", lambda: "n1", raising=False)
    event = types.SimpleNamespace(job=of_job(told), reject=rejecting(told))
    written: list[int] = []

    def write(fd: int, text: bytes) -> int:
        written.append(fd)
        raise OSError(errno.ENOSPC, "it is full")

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(SystemExit):
        hook.prologue(event)
    monkeypatch.undo()
    assert written == [2]
    cannot, *after = told
    assert "cannot tell the user" in cannot and "No space left on device" in cannot
    assert after == ["delete", "reject"]


def test_strict_where_the_hook_itself_fails(hook: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(hook, "log", told.append)
    monkeypatch.setattr(hook.pbs, "get_local_nodename", lambda: "n1", raising=False)
    monkeypatch.setattr(hook, "await_worker", lambda job: 1 // 0)
    event = types.SimpleNamespace(job=of_job(told), reject=rejecting(told))
    with pytest.raises(SystemExit):
        hook.prologue(event)
    assert told[0].startswith("ZeroDivisionError") and told[1:] == ["delete", "reject"]


def test_nodes_that_cannot_be_counted_are_not_staged(
    hook: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hook.pbs, "get_local_nodename", lambda: "n1", raising=False)
    monkeypatch.setattr(hook, "call", lambda verb, told: {"notes": []})
    job = of_job([])
    assert not hook.tell_of_others(job, True)
    for unknown in (None, "n1:15002/0+n1:15005/0", "n1:15002/0+n2:15002/0"):
        job.exec_host2 = unknown
        assert hook.tell_of_others(job, True)
        assert not hook.tell_of_others(job, False)
    assert "n2: did not confirm" in capfd.readouterr().err


def test_a_value_that_pbs_does_not_take(hook: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job is not activated by half: it is not staged, and told so."""

    class Variables(dict[str, str]):
        def __setitem__(self, name: str, value: str) -> None:
            value.encode()
            super().__setitem__(name, value)

    called: list[str] = []

    def call(verb: str, told: object) -> dict[str, Any]:
        called.append(verb)
        bad = {"A": "/run/stager/jobs/7.head/env", "B": "\udcff", "TMPDIR": "/x", "PBS_JOBID": "1"}
        return {"set": bad} if verb == "pbs-begin" else {}

    monkeypatch.setattr(hook, "call", call)
    monkeypatch.setattr(hook, "log", called.append)
    monkeypatch.setattr(hook.pbs, "get_local_nodename", lambda: "n1", raising=False)
    job = of_job([])
    job.Variable_List = Variables(OWN="1", NOTE="/run/stager/jobs")
    hook.begin(types.SimpleNamespace(job=job))
    assert called[0] == "pbs-begin" and called[2:] == ["pbs-end"]
    assert "UnicodeEncodeError" in called[1]
    assert job.Variable_List == {"OWN": "1", "NOTE": "/run/stager/jobs"}


def test_the_store_of_a_user_is_not_looked_at(
    hook: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its user has mounted there might never answer."""
    uid, gid = 20001, 20002
    user = types.SimpleNamespace(pw_uid=uid, pw_gid=gid)
    monkeypatch.setattr("pwd.getpwnam", lambda name: user)
    monkeypatch.setitem(hook.SETTINGS, "stores", str(tmp_path / "stores"))
    hook.make_store(of_job([]))  # a site without any
    assert not (tmp_path / "stores").exists()
    seen: list[object] = []
    audited: list[object] = []

    def chown(path: object, *ids: int, **more: object) -> None:
        seen.append((path, ids, more["follow_symlinks"]))

    real = os.fstat

    def fstat(fd: int) -> os.stat_result:
        return os.stat_result((*real(fd)[:4], 0, *real(fd)[5:]))  # root's

    monkeypatch.setattr(os, "chown", chown)
    monkeypatch.setattr(os, "fstat", fstat)
    (tmp_path / "stores").mkdir(mode=0o755)
    hook.make_store(of_job([]))
    assert os.listdir(tmp_path / "stores") == ["20001"]
    assert seen == [("20001.new", (uid, gid), False)]
    monkeypatch.setattr(os, "lstat", audited.append)
    monkeypatch.setattr(os, "stat", audited.append)
    hook.make_store(of_job([]))
    assert audited == [] and len(seen) == 1
