"""What activation scripts do is found out once, and is the same for every shell."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from stager import sourcing
from stager.envpatch import EnvPatch
from stager.errors import StagerError

pytestmark = pytest.mark.unit

BEFORE = {"PATH": "/usr/bin:/bin", "HOME": "/h", "SHLVL": "3", "PWD": "/somewhere", "KEPT": "a\nb"}


def scripts(prefix: Path, **contents: str) -> Path:
    for name, text in contents.items():
        kind, _, number = name.partition("_")
        directory = prefix / "etc" / "conda" / f"{kind}.d"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"{number}.sh").write_text(text)
    return prefix


def test_in_the_order_of_names_and_back(tmp_path: Path) -> None:
    code = 'export ORDER="${ORDER-}%s"\n'
    scripts(tmp_path, activate_02=code % "b", activate_01=code % "a", activate_10=code % "c")
    scripts(tmp_path, deactivate_02=code % "B", deactivate_01=code % "A")
    (tmp_path / sourcing.ACTIVATE / "00.fish").write_text("exit 1\n")
    assert sourcing.enter(BEFORE, str(tmp_path)) == {**BEFORE, "ORDER": "abc"}
    inside = {**BEFORE, "CONDA_PREFIX": str(tmp_path)}
    assert sourcing.leave(inside) == {**inside, "ORDER": "BA"}


def test_scripts_as_they_are(tmp_path: Path) -> None:
    """They talk, fail, read what is not set, are for bash, and change directory."""
    scripts(
        tmp_path,
        activate_01="echo talks; false; cd /; export A=$NOT_SET B='two\nlines' C=\\'; unset KEPT\n",
        activate_02="local_() { local one=1; export ONE=$one; }; local_; [[ a == a ]] || exit\n",
        activate_03="no_such_command; return 3\n",
        activate_04="syntax ( error\n",
        activate_05='set -- a b; export LAST="$#"; unexported=1\n',
    )
    after = sourcing.enter(BEFORE, str(tmp_path))
    expected = {**BEFORE, "A": "", "B": "two\nlines", "C": "'", "ONE": "1", "LAST": "2"}
    del expected["KEPT"]
    assert after == expected


def test_what_users_have_for_their_shells_is_not_read(tmp_path: Path) -> None:
    scripts(tmp_path, activate_01="export A=1\n")
    (tmp_path / "rc").write_text("export FROM_RC=1; sleep 1000\n")
    before = {**BEFORE, "BASH_ENV": str(tmp_path / "rc"), "ENV": str(tmp_path / "rc")}
    assert sourcing.enter(before, str(tmp_path)) == {**before, "A": "1"}


@pytest.mark.parametrize("trap", ["trap 'rm -f x' EXIT", "trap - EXIT", "trap '' EXIT TERM"])
def test_traps_of_a_script_are_its_own(tmp_path: Path, trap: str) -> None:
    scripts(tmp_path, activate_01=f"{trap}\nexport A=1\n", deactivate_01=f"{trap}\nunset A\n")
    assert sourcing.enter(BEFORE, str(tmp_path)) == {**BEFORE, "A": "1"}
    inside = {**BEFORE, "CONDA_PREFIX": str(tmp_path)}
    assert sourcing.leave(inside) == inside


def test_a_script_that_leaves_a_program_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not waited for, nor does it outlive the activation."""
    monkeypatch.setattr(sourcing, "LIMIT", 10.0)
    scripts(tmp_path, activate_01=f"sleep 600 &\necho $! >{tmp_path}/pid\nexport A=1\n")
    assert sourcing.enter(BEFORE, str(tmp_path)) == {**BEFORE, "A": "1"}
    stat = Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}/stat")
    until = time.monotonic() + 60.0
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX":
        assert time.monotonic() < until
        time.sleep(0.05)


def test_what_is_left_behind_stops_nobody(tmp_path: Path) -> None:
    scripts(tmp_path, deactivate_01="exit 1\n")
    inside = {**BEFORE, "CONDA_PREFIX": str(tmp_path)}
    assert sourcing.leave(inside) == inside


def test_a_script_that_ends_the_shell(tmp_path: Path) -> None:
    scripts(tmp_path, activate_01="export A=1; exit 0\n", activate_02="export B=1\n")
    with pytest.raises(StagerError, match=r"activate\.d exits the shell"):
        sourcing.enter(BEFORE, str(tmp_path))


def test_a_script_that_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sourcing, "LIMIT", 0.2)
    scripts(tmp_path, activate_01="sleep 1000\n")
    with pytest.raises(StagerError, match="did not finish within"):
        sourcing.enter(BEFORE, str(tmp_path))


def test_without_scripts_nothing_is_started(tmp_path: Path) -> None:
    assert sourcing.enter(BEFORE, str(tmp_path)) == BEFORE
    assert sourcing.leave({**BEFORE, "CONDA_PREFIX": str(tmp_path)})["PATH"] == BEFORE["PATH"]
    assert sourcing.leave({**BEFORE, "CONDA_PREFIX": ""})["PATH"] == BEFORE["PATH"]
    patch = EnvPatch({"A": "1"}, (), {"PATH": ("/x/bin",)})
    assert sourcing.known_beforehand(patch, str(tmp_path), {}) is patch


def test_known_before_the_environment_is(tmp_path: Path) -> None:
    """What scripts do to lists is told apart from what was in them."""
    scripts(
        tmp_path,
        activate_01="""
            export PATH="$CONDA_PREFIX/tools:$PATH" LD_LIBRARY_PATH="$LD_LIBRARY_PATH:/behind/"
            export XDG_DATA_DIRS="$CONDA_PREFIX/share${XDG_DATA_DIRS:+:$XDG_DATA_DIRS}"
            export PLAIN="$HOME/x" LINES_='a
b' ; unset GONE SET_BY_US
        """,
    )
    prefix = str(tmp_path)
    patch = EnvPatch(
        {"CONDA_PREFIX": prefix, "SET_BY_US": "1"}, ("OTHER",), {"PATH": (f"{prefix}/bin",)}
    )
    found = sourcing.known_beforehand(patch, prefix, {"HOME": "/h"})
    assert found.prepend == {
        "PATH": (f"{prefix}/tools", f"{prefix}/bin"),
        "LD_LIBRARY_PATH": ("/behind",),
        "XDG_DATA_DIRS": (f"{prefix}/share",),
    }
    assert found.set == {"CONDA_PREFIX": prefix, "PLAIN": "/h/x"}
    assert found.unset == ("OTHER", "SET_BY_US")
