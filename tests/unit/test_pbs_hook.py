"""What the PBS hook decides by itself, without PBS: the form of a directive, names, escapes."""

from __future__ import annotations

import importlib.util
import sys
import time
import types
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from environments import REPO
from stager import ref, schedulers
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
    + ["sha256:", "0123456789ab", "-", "", "\t", "é", "verbose", "format=squashfs", "format=", ","]
)


@hypothesis.given(st.lists(_WORDS, max_size=6).map("".join))
@hypothesis.example("a+b?strict&timeout=5m")
@hypothesis.example("a@sha256:0123456789ab")
def test_what_it_lets_pass_stager_can_parse(hook: Any, wish: str) -> None:
    if hook.malformed(wish):
        return
    directive = ref.parse_directive(wish, cwd="/home/alice")
    assert set(directive.options) <= {"strict", "verbose", "format", "timeout"}


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
