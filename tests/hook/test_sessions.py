"""How the ranks of a step on one node find each other, in the shells that /bin/sh may be.

The part that stages is a stand-in here; ``tests/slurm/unprivileged`` has all of it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from environments import clean_environ

SHELLS = ["dash", "bash --posix", "bash", "busybox sh"]
RANKS = 8

# Says that it was called, then does what the test wants, then becomes the command.
STAGER = """#!/bin/sh
echo called >>"$LOG"
while [ "$1" != -- ]; do shift; done
shift
{behaviour}
FOUND=self exec "$@"
"""
WRITES = """
echo "$STAGER_SESSION_OPTIONS" >>"$LOG"
[ -n "$STAGER_SESSION" ] || exec "$@"
cat >"$STAGER_SESSION.new" <<'END'
{lines}
END
mv "$STAGER_SESSION.new" "$STAGER_SESSION"
"""


@dataclass
class Step:
    """A step of ``RANKS`` ranks on this node."""

    place: Path
    sessions: Path
    shell: str
    through: tuple[str, ...] = ()
    """A command that starts each rank."""

    def run(
        self, behaviour: str, *options: str, ranks: int = RANKS, **changes: str
    ) -> list[tuple[int, str]]:
        """Start all ranks at once; the exit status and output of each, sorted."""
        (self.place / "log").write_text("")
        (self.place / "stager").write_text(STAGER.format(behaviour=behaviour))
        (self.place / "stager").chmod(0o755)
        variables = {
            "SLURM_JOB_ID": "17",
            "SLURM_STEP_ID": "3",
            "SLURM_JOB_UID": self.sessions.parent.name.removeprefix("stager-"),
            "SLURMD_NODENAME": "n1",
            "LOG": str(self.place / "log"),
        }
        environ = clean_environ(**{**variables, **changes})
        command = ["sh", "-c", "echo found $FOUND"]
        argv = [*self.shell.split(), str(self.place / "stage-run"), *options, "--", *command]
        argv = [*self.through, *argv]

        def rank(_: int) -> tuple[int, str]:
            done = subprocess.run(
                argv, env=environ, stdout=subprocess.PIPE, text=True, timeout=60, check=False
            )
            return done.returncode, done.stdout

        # Each is waited for at once, as slurmstepd does: a dead leader must not stay a zombie.
        with ThreadPoolExecutor(ranks) as pool:
            return sorted(pool.map(rank, range(ranks)))

    def calls(self) -> int:
        return (self.place / "log").read_text().split("\n").count("called")


@pytest.fixture(params=SHELLS)
def step(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Step]:
    script = Path(sysconfig.get_path("scripts")) / "stage-run"
    shutil.copy(script, tmp_path / "stage-run")
    # The place is fixed, so that sh can know it; the name of the user in it is a variable's.
    own = Path(f"/tmp/stager-tests-sessions-{os.getpid()}")  # no leftover to another session
    try:
        yield Step(tmp_path, own / "sessions", str(request.param))
    finally:
        shutil.rmtree(own, ignore_errors=True)


def test_one_is_called_and_all_have_what_it_found(step: Step) -> None:
    behaviour = WRITES.format(lines='[ "$options" = "|--env=x|" ] || return 1\nexport FOUND=same')
    ended = step.run(behaviour, "--env", "x")
    assert ended == [(0, "found same\n")] * (RANKS - 1) + [(0, "found self\n")]
    assert step.calls() == 1
    assert (step.sessions.stat().st_mode & 0o777) == 0o700
    # What comes later in the step finds it too.
    assert step.run("exit 1", "--env", "x") == [(0, "found same\n")] * RANKS
    assert step.calls() == 0


def test_other_options_are_not_answered(step: Step) -> None:
    behaviour = WRITES.format(lines='[ "$options" = "|--env=x|" ] || return 1\nexport FOUND=same')
    step.run(behaviour, "--env", "x")
    assert step.run("", "--env", "y") == [(0, "found self\n")] * RANKS
    assert step.calls() == RANKS
    assert step.run("", "--env", "x", STAGER_ENV="z") == [(0, "found self\n")] * RANKS


def test_the_word_of_failure_is_for_all(step: Step) -> None:
    behaviour = WRITES.format(lines="exit 125") + "exit 125"
    assert step.run(behaviour, "--strict") == [(125, "")] * RANKS
    assert step.calls() == 1


def test_a_failure_of_long_ago_is_no_answer(step: Step) -> None:
    """The tasks of a PBS job are all one step, and a loop may try again in one of Slurm's."""
    ago = "! over $(($(date +%s) - {})) || return 1\nexit 125"
    assert step.run(WRITES.format(lines=ago.format(5)) + "exit 125") == [(125, "")] * RANKS
    assert step.run("") == [(125, "")] * RANKS
    (step.sessions / "17.3.0.n1").write_text(ago.format(100) + "\n")
    assert step.run("") == [(0, "found self\n")] * RANKS


def test_nobody_waits_for_a_leader_that_cannot_say_who_it_is(step: Step) -> None:
    """The disk is full, or it was killed in between."""
    step.through = ("sh", "-c", 'trap "" XFSZ; ulimit -f 0; exec "$@"', "sh")
    assert step.run("") == [(0, "found self\n")] * RANKS
    assert list(step.sessions.iterdir()) == []
    step.through = ()
    (step.sessions / "17.3.0.n1.leader").touch()
    assert step.run("") == [(0, "found self\n")] * RANKS


def test_a_leader_that_dies_leaves_the_others_to_themselves(step: Step) -> None:
    behaviour = 'if [ -n "$STAGER_SESSION" ]; then exit 9; fi'
    ended = step.run(behaviour)
    assert ended == [(0, "found self\n")] * (RANKS - 1) + [(9, "")]


def test_a_leader_that_cannot_write_sends_the_others_away(step: Step) -> None:
    behaviour = '[ -z "$STAGER_SESSION" ] || rm "$STAGER_SESSION.leader"; sleep 1'
    assert step.run(behaviour) == [(0, "found self\n")] * RANKS


def test_a_place_that_is_a_link_is_not_used(step: Step, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    step.sessions.parent.symlink_to(tmp_path / "elsewhere")
    try:
        assert step.run("") == [(0, "found self\n")] * RANKS
        assert list((tmp_path / "elsewhere").iterdir()) == []
    finally:
        step.sessions.parent.unlink()


@pytest.mark.parametrize(
    "changes",
    [
        {"SLURM_STEP_ID": "4294967291"},  # a batch script, as slurm.h calls it
        {"SLURM_STEP_ID": "-5"},
        {"SLURM_JOB_ID": "../../etc"},
        {"SLURMD_NODENAME": "n1/x"},
    ],
    ids=str,
)
def test_what_is_no_step(step: Step, changes: dict[str, str]) -> None:
    ended = step.run('echo "in $STAGER_SESSION"', ranks=1, **changes)
    assert ended == [(0, "in \nfound self\n")]
