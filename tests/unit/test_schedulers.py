"""What the environment says about a job, and the questions asked of Slurm."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stager import config, schedulers
from stager.errors import NoSpaceError, UsageError
from stager.schedulers import Allocation, pbs, slurm
from stager.staging import allocation, lease
from stager.staging.store import Store

Squeue = Callable[[str], None]

BATCH = {
    "SLURM_JOB_ID": "17",
    "SLURM_JOB_NUM_NODES": "4",
    "SLURMD_NODENAME": "n1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
STEP = {**BATCH, "SLURM_STEP_ID": "3", "SLURM_PROCID": "5"}


# -- the environment


def test_no_job() -> None:
    assert schedulers.current({}) is None
    assert slurm.allocation({}) is None
    assert slurm.allocation({"SLURM_JOB_ID": "$(id)"}) is None


def test_a_batch_script() -> None:
    assert slurm.allocation(BATCH) == Allocation("slurm", "17", (4,), "", "0", "n1")


@pytest.mark.parametrize("special", ["-5", "-6", "4294967291", "4294967290", "", "x"])
def test_what_slurm_calls_a_step_but_is_none(special: str) -> None:
    found = slurm.allocation({**BATCH, "SLURM_STEP_ID": special})
    assert found is not None
    assert found.step == ""


def test_a_step_of_a_requeued_job() -> None:
    found = slurm.allocation({**STEP, "SLURM_RESTART_COUNT": "2"})
    assert found == Allocation("slurm", "17", (4,), "3", "2", "n1")


def test_a_heterogeneous_job() -> None:
    environ = {
        "SLURM_JOB_ID": "17",
        "SLURM_HET_SIZE": "2",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NUM_NODES_HET_GROUP_0": "1",
        "SLURM_JOB_NUM_NODES_HET_GROUP_1": "3",
    }
    found = slurm.allocation(environ)
    assert found is not None
    assert found.components == (1, 3)
    assert found.nodes == 4
    assert found.node == ""  # the shell of salloc


def slurmstepd(title: str, environ: dict[str, str]) -> str:
    """The step that a process finds itself in whose parent has that title."""
    code = (
        "import os; from stager.schedulers import slurm;"
        "print('step', slurm.allocation(os.environ).step)"
    )
    script = """exec -a "$1" sh -c '"$0" -c "$1"; true' "$2" "$3" """
    done = subprocess.run(
        ["bash", "-c", script, "bash", title, sys.executable, code],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.removeprefix("step").strip()


def test_slurmstepd_knows_better_than_variables_of_another_job() -> None:
    assert slurmstepd("slurmstepd: [17.batch]", STEP) == ""
    assert slurmstepd("slurmstepd: [17.interactive]", STEP) == ""
    assert slurmstepd("slurmstepd: [17.3]", STEP) == "3"
    assert slurmstepd("slurmstepd: [StepId=17.3]", STEP) == "3"
    assert slurmstepd("something else", STEP) == "3"


@pytest.mark.parametrize(
    ("environ", "command", "expected"),
    [
        (BATCH, [], True),
        (BATCH, ["python", "x"], True),
        (STEP, ["python", "x"], False),
        (STEP, ["/usr/bin/srun", "python", "x"], True),
        ({**BATCH, "SLURM_JOB_NUM_NODES": "1"}, ["srun"], False),
        ({"SLURM_JOB_ID": "17", "SLURM_JOB_NUM_NODES": "1"}, ["srun"], True),  # salloc's shell
        ({**BATCH, "OMPI_COMM_WORLD_RANK": "0"}, ["python"], False),
        ({}, ["srun"], False),
    ],
)
def test_when_every_node_is_needed(
    monkeypatch: pytest.MonkeyPatch,
    environ: dict[str, str],
    command: list[str],
    expected: bool,
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert allocation.needs_every_node(slurm.allocation(environ), command) is expected


# -- asking Slurm


@pytest.fixture
def squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Squeue:
    """A program `squeue` that does what a line of sh says, and nobody else on PATH."""
    monkeypatch.setitem(sys.modules, "pyslurm", None)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def write(line: str) -> None:
        path = tmp_path / "squeue"
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)

    return write


def record(job: str, state: str, directory: str, comment: str) -> str:
    return f"printf '\\036%s\\037%s\\037%s\\037%s\\n' {job} {state} {directory} '{comment}'"


def test_the_comment_of_a_job(squeue: Squeue) -> None:
    squeue(record("17", "RUNNING", "/home/alice", "a=1 pyenv:x?strict"))
    assert slurm.comment("17") == ("a=1 pyenv:x?strict", "/home/alice")
    assert slurm.job_exists("17") is True


def test_a_comment_may_hold_anything(squeue: Squeue) -> None:
    squeue(record("17", "RUNNING", "/", "two\nlines JobState=FAILED | 99"))
    assert slurm.comment("17")[0] == "two\nlines JobState=FAILED | 99"


def test_the_job_is_found_among_those_of_its_array(squeue: Squeue) -> None:
    squeue("\n".join([record("18", "RUNNING", "/", "other"), record("17", "PENDING", "/", "own")]))
    assert slurm.comment("17")[0] == "own"


def test_no_comment(squeue: Squeue) -> None:
    squeue(record("17", "RUNNING", "/", "(null)"))
    assert slurm.comment("17")[0] == ""
    assert allocation.directive({"SLURM_JOB_ID": "17"}) is None


@pytest.mark.parametrize("state", ["COMPLETED", "CANCELLED", "TIMEOUT", "NODE_FAIL"])
def test_a_job_that_has_ended(squeue: Squeue, state: str) -> None:
    squeue(record("17", state, "/", ""))
    assert slurm.job_exists("17") is False


def test_a_job_that_is_forgotten(squeue: Squeue) -> None:
    squeue("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert slurm.job_exists("17") is False
    assert slurm.comment("17") == ("", "")
    squeue("exit 0")  # as some releases have it
    assert slurm.job_exists("17") is False


def test_nobody_who_could_tell(squeue: Squeue, monkeypatch: pytest.MonkeyPatch) -> None:
    squeue("echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    assert slurm.job_exists("17") is None
    squeue("exec sleep 60")
    monkeypatch.setattr(slurm, "TIMEOUT", 0.2)
    assert slurm.job_exists("17") is None
    monkeypatch.setenv("PATH", "/nonexistent")
    assert slurm.job_exists("17") is None


def test_what_the_user_wants_squeue_to_show_is_no_matter(
    squeue: Squeue, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SQUEUE_PARTITION", "SQUEUE_FORMAT2", "SLURM_CLUSTERS"):
        monkeypatch.setenv(name, "other")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm/here.conf")
    wrong = "$SQUEUE_PARTITION$SQUEUE_FORMAT2$SLURM_CLUSTERS"
    here = record("17", "RUNNING", "/", "pyenv:x")
    squeue(f'[ -z "{wrong}" ] && [ -n "$SLURM_CONF" ] || exit 0\n{here}')
    assert slurm.job_exists("17") is True
    assert slurm.comment("17")[0] == "pyenv:x"


def test_only_numbers_are_asked_for(squeue: Squeue, tmp_path: Path) -> None:
    squeue(f"touch {tmp_path}/asked")
    assert slurm.job_exists("17;id") is None
    assert slurm.comment("--help") == ("", "")
    assert not (tmp_path / "asked").exists()


def fake_pyslurm(load: Callable[[int], object]) -> types.ModuleType:
    module = types.ModuleType("pyslurm")
    module.Job = types.SimpleNamespace(load=load)  # type: ignore[attr-defined]
    return module


def test_pyslurm_is_preferred(squeue: Squeue, monkeypatch: pytest.MonkeyPatch) -> None:
    squeue("exit 1")
    job = types.SimpleNamespace(state="RUNNING", comment="pyenv:x", working_directory="/w")
    monkeypatch.setitem(sys.modules, "pyslurm", fake_pyslurm({17: job}.__getitem__))
    assert slurm.comment("17") == ("pyenv:x", "/w")
    assert slurm.job_exists("17") is True
    job.state, job.comment = "COMPLETED", None
    assert slurm.comment("17") == ("", "/w")
    assert slurm.job_exists("17") is False


def test_a_pyslurm_that_fails_is_passed_over(
    squeue: Squeue, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An error of its own tells neither that there is no such job nor that there is one.
    squeue(record("17", "RUNNING", "/", "pyenv:x"))
    monkeypatch.setitem(sys.modules, "pyslurm", fake_pyslurm({}.__getitem__))
    assert slurm.comment("17")[0] == "pyenv:x"


@pytest.mark.parametrize("error", ["ImportError", "OSError"])
def test_a_pyslurm_for_another_slurm_is_passed_over(
    squeue: Squeue, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: str
) -> None:
    squeue(record("17", "RUNNING", "/", "pyenv:x"))
    (tmp_path / "pyslurm.py").write_text(f"raise {error}('libslurmfull.so: undefined symbol')\n")
    monkeypatch.delitem(sys.modules, "pyslurm")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert slurm.comment("17")[0] == "pyenv:x"


# -- the directive


def test_the_directive_and_where_its_paths_begin(squeue: Squeue) -> None:
    squeue(record("17", "RUNNING", "/home/alice/project", "pyenv:./.venv?strict"))
    found = allocation.directive({"SLURM_JOB_ID": "17"})
    assert found is not None
    assert found.refs[0].path == "/home/alice/project/.venv"
    assert found.options == {"strict": ""}


def test_a_malformed_directive(squeue: Squeue) -> None:
    squeue(record("17", "RUNNING", "/", "pyenv:x pyenv:y"))
    with pytest.raises(UsageError, match="more than one"):
        allocation.directive({"SLURM_JOB_ID": "17"})


# -- what only Slurm knows


def test_where_space_is_short_the_claims_of_ended_jobs_go(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = config.load(overrides={"store": str(tmp_path / "s")}, environ={})
    node = Store(settings["store"])
    tree = "0123456789abcdef"
    ended, running = lease.of_job("slurm", "17"), lease.of_job("slurm", "18")
    node.lease(tree, ended)
    tries = []

    def stage_here(*_: object, **__: object) -> str:
        tries.append(node.leases(tree))
        if ended in node.leases(tree):
            raise NoSpaceError("full")
        return "staged"

    monkeypatch.setattr(allocation, "stage_here", stage_here)
    monkeypatch.setattr(slurm, "job_exists", {"17": False, "18": True}.__getitem__)
    node.lease(tree, running)
    published: Any = None
    assert allocation.stage_with_room(published, settings, holder="me") == "staged"
    assert tries == [(ended, running), (running,)]

    # With nothing to gain there is no second attempt.
    node.lease(tree, ended)
    monkeypatch.setattr(slurm, "job_exists", lambda job: None)
    with pytest.raises(NoSpaceError):
        allocation.stage_with_room(published, settings, holder="me")
    assert len(tries) == 3


def test_a_tree_that_was_evicted_is_worth_a_second_attempt(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = config.load(overrides={"store": str(tmp_path / "s")}, environ={})
    node = Store(settings["store"])
    os.mkdir(node.tree("0123456789abcdef"))  # as a stage that was killed leaves it

    def stage_here(*_: object, **__: object) -> str:
        if node.held():
            raise NoSpaceError("full")
        return "staged"

    monkeypatch.setattr(allocation, "stage_here", stage_here)
    published: Any = None
    assert allocation.stage_with_room(published, settings, holder="me") == "staged"


# -- PBS


PBS_SCRIPT = {"PBS_JOBID": "12.head", "PBS_TASKNUM": "00000001", "PBS_NODENUM": "0"}


@pytest.fixture
def nodefile(tmp_path: Path) -> str:
    path = tmp_path / "nodes"
    path.write_text("n1\nn1\nn2\n\nn3\nn2\n")
    return str(path)


def test_a_pbs_script(nodefile: str) -> None:
    found = pbs.allocation({**PBS_SCRIPT, "PBS_NODEFILE": nodefile})
    assert found is not None
    assert (found.scheduler, found.job, found.nodes, found.step) == ("pbs", "12.head", 3, "")
    assert found.node == os.uname().nodename
    assert allocation.needs_every_node(found, ["python"])


def test_the_lines_that_pbsdsh_counts(nodefile: str) -> None:
    assert pbs.first_entries({"PBS_NODEFILE": nodefile}) == {"n1": 0, "n2": 2, "n3": 3}
    assert pbs.first_entries({}) == pbs.first_entries({"PBS_NODEFILE": "/no/such"}) == {}


def test_another_run_on_other_nodes(nodefile: str, tmp_path: Path) -> None:
    environ = {**PBS_SCRIPT, "PBS_NODEFILE": nodefile}
    first = pbs.allocation(environ)
    Path(nodefile).write_text("n1\nn4\n")
    second = pbs.allocation(environ)
    assert first is not None and second is not None and first.restart != second.restart


@pytest.mark.parametrize("task", ["00000002", "20000001", "A0000003", "2"])
def test_a_pbs_task(task: str) -> None:
    found = pbs.allocation({**PBS_SCRIPT, "PBS_TASKNUM": task})
    assert found is not None and found.step and found.nodes == 1
    assert not allocation.needs_every_node(found, ["python"])


@pytest.mark.parametrize("job", ["", "head", "$(id)", "../x"])
def test_no_pbs_job(job: str) -> None:
    assert pbs.allocation({"PBS_JOBID": job}) is None


def test_an_array_of_pbs_is_a_file_name() -> None:
    found = schedulers.current({"PBS_JOBID": "12[3].head"})
    assert found is not None and found.id == "12_3_.head"


@pytest.mark.parametrize(
    ("status", "exists"), [(0, True), (153, False), (35, False), (1, None), (255, None)]
)
def test_asking_qstat(
    status: int, exists: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qstat = tmp_path / "qstat"
    qstat.write_text(f'#!/bin/sh\necho "$@" >"{tmp_path}/asked"\nexit {status}\n')
    qstat.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert pbs.job_exists("12_3_.head") is exists
    assert (tmp_path / "asked").read_text() == "12[3].head\n"
    assert schedulers.job_exists("pbs", "12.head") is exists
    assert pbs.job_exists("$(id)") is None


def test_qstat_where_pbs_says_that_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hooks and timers have no PATH that leads there."""
    qstat = tmp_path / "opt" / "bin" / "qstat"
    qstat.parent.mkdir(parents=True)
    qstat.write_text("#!/bin/sh\nexit 153\n")
    qstat.chmod(0o755)
    (tmp_path / "pbs.conf").write_text(f"PBS_SERVER=head\nPBS_EXEC={tmp_path}/opt\n")
    monkeypatch.setenv("PATH", "/bin")
    monkeypatch.setenv("PBS_CONF_FILE", f"{tmp_path}/pbs.conf")
    assert schedulers.job_exists(schedulers.PBS, "17.head") is False
    monkeypatch.setenv("PBS_CONF_FILE", f"{tmp_path}/none")
    assert schedulers.job_exists(schedulers.PBS, "17.head") is None


def test_without_qstat(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert pbs.job_exists("12.head") is None
