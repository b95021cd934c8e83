"""The Python of the hooks, as far as it needs neither root nor Slurm."""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import venv
import zlib
from pathlib import Path
from typing import Any

import pytest

from environments import REPO
from stager import config, events, jobstate, privilege
from stager.cli import doctor
from stager.errors import LIMITS, StagerError
from stager.hooks import common, jobnotes, pbs
from stager.hooks import slurm as hook
from stager.jobstate import STAGED, Activation, Job, State
from stager.staging import lease
from stager.staging.store import boot_id

VARIABLES = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_UID": "20001",
    "SLURM_JOB_GID": "20001",
    "SLURM_JOB_COMMENT": "pyenv:x",
    "SLURM_JOB_WORK_DIR": "/home/alice",
    "SLURM_NODELIST": "n[2-4]",
    "SLURMD_NODENAME": "n2",
}
ACTIVATION: dict[str, Any] = {
    "python": "/store/1/envs/x/bin/python",
    "prefix": "/store/1/envs/x",
    "leave": ["/home/alice/x"],
    "set": {"A": "b c"},
    "unset": ["B"],
    "prepend": {"PATH": ["/store/1/envs/x/bin", "/y"]},
}


# -- jobs


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[1-4]", "n1"),
        ("n[03,07-09],m1", "n03"),
        ("rack[2-3]n[01,05]-ib,x", "rack2n01-ib"),
        ("a-b", "a-b"),
    ],
)
def test_the_first_node_of_a_list(nodes: str, first: str) -> None:
    assert jobstate.first_node(nodes) == first


def test_a_job_as_the_prolog_has_it() -> None:
    job = Job.of_prolog(VARIABLES)
    assert (job.key, job.id, job.uid, job.first, job.restart) == ("7", "7", 20001, True, "0")
    more = {"SLURM_HET_JOB_ID": "6", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_RESTART_COUNT": "2"}
    job = Job.of_prolog({**VARIABLES, **more})
    assert (job.key, job.id, job.first, job.restart) == ("6", "7", False, "2")


@pytest.mark.parametrize("name", ["SLURM_JOB_ID", "SLURM_JOB_UID", "SLURM_HET_JOB_ID"])
@pytest.mark.parametrize("value", ["../1", "1\n", "1 2", "-1", "x", "9" * 30])
def test_numbers_that_are_none(name: str, value: str) -> None:
    with pytest.raises(StagerError, match=name):
        Job.of_prolog({**VARIABLES, name: value})


# -- what the process of the user says


def test_an_activation_as_tasks_read_it() -> None:
    checked = Activation.checked(ACTIVATION, below=("/store/1/envs",))
    assert checked.lines().splitlines() == [
        "python /store/1/envs/x/bin/python",
        "prefix /store/1/envs/x",
        "leave /home/alice/x",
        "env unset B",
        "env export A=b c",
        "prepend PATH /store/1/envs/x/bin:/y",
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"python": "/store/2/envs/x/bin/python"},
        {"prefix": "/store/1/envs/../../../etc"},
        {"prefix": "/store/1/envs"},
        {"prefix": "x"},
        {"prefix": 3},
        {"leave": ["/a\nprefix /b"]},
        {"leave": "/a"},
        {"leave": ["/a"] * 201},
        {"set": {"A\n": "x"}},
        {"set": {"A B": "x"}},
        {"set": {"A": "x\nexport B=1"}},
        {"set": {"A": "x" * 5000}},
        {"set": {"A": 1}},
        {"set": []},
        {"unset": ["$(id)"]},
        {"prepend": {"PATH": ["/a:/b"]}},
        {"prepend": {"x$(id)": ["/a"]}},
        {"more": 1},
    ],
)
def test_an_activation_that_is_none(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Activation.checked({**ACTIVATION, **change}, below=("/store/1/envs",))
    for value in (None, [], "x", {}):
        with pytest.raises(ValueError):
            Activation.checked(value)


# -- the state


@pytest.mark.parametrize("key", ["", ".", "..", "a", "7/..", "7 8"])
def test_no_state_of_what_is_no_job(tmp_path: Path, key: str) -> None:
    with pytest.raises(StagerError, match="is no job"):
        State(str(tmp_path), key)


def test_a_state_is_made_joined_and_left(tmp_path: Path) -> None:
    job = Job.of_prolog({**VARIABLES, "SLURM_HET_JOB_ID": "6"})
    other = Job.of_prolog({**VARIABLES, "SLURM_HET_JOB_ID": "6", "SLURM_JOB_ID": "6"})
    state = State(str(tmp_path), "6")
    assert state.begin(job, {"store": "/s"})
    assert state.read("status") == "pending 0\n"
    assert state.record()["store"] == "/s"
    assert not state.begin(other, {"store": "/s"})
    assert sorted(state.holders()) == ["6", "7"]
    assert not state.leave("7")
    assert not state.leave("7")
    assert state.leave("6")
    state.remove()
    state.remove()
    assert os.listdir(tmp_path / "jobs") == []


@pytest.mark.parametrize("change", [{"SLURM_JOB_RESTART_COUNT": "1"}, {}, {"SLURM_JOB_UID": "5"}])
def test_a_state_of_an_earlier_run_is_replaced(tmp_path: Path, change: dict[str, str]) -> None:
    state = State(str(tmp_path), "7")
    assert state.begin(Job.of_prolog(VARIABLES), {})
    state.finish(jobstate.READY)
    assert state.begin(Job.of_prolog({**VARIABLES, **change}), {})
    assert state.read("status") == "pending 0\n"


STRICT = {**VARIABLES, "SLURM_JOB_COMMENT": "pyenv:x?strict&strikt"}


def test_a_strict_job_is_known_before_anything_can_go_wrong(tmp_path: Path) -> None:
    plain, asking = Job.of_prolog(VARIABLES), Job.of_prolog(STRICT)
    loaded = config.load(environ={}, site_directory=str(tmp_path / "none"))
    assert not common.is_strict(plain, loaded) and not common.is_strict(plain, None)
    assert common.is_strict(asking, loaded) and common.is_strict(asking, None)
    loaded.set("run.strict", "yes", "test")
    assert common.is_strict(plain, loaded)
    state = State(str(tmp_path), "7")
    strict = tmp_path / "jobs/7/strict"
    assert state.begin(asking, {}, strict=True) and strict.exists()
    assert state.begin(plain, {}) and not strict.exists()
    joining = Job.of_prolog({**STRICT, "SLURM_JOB_ID": "8", "SLURM_HET_JOB_ID": "7"})
    assert not state.begin(joining, {}, strict=True) and strict.exists()


@pytest.mark.parametrize("environ", [VARIABLES, STRICT], ids=["", "strict"])
def test_a_wrong_configuration_is_told_to_strict_jobs(
    tmp_path: Path, environ: dict[str, str]
) -> None:
    (tmp_path / "config.yaml").write_text("hook: [")
    assert hook.prolog(environ, str(tmp_path), str(tmp_path)) == 0
    assert State(str(tmp_path), "7").read("status") == "failed\n"
    assert (tmp_path / "jobs/7/strict").exists() == (environ is STRICT)


@pytest.mark.parametrize("wanted", ["no", "yes"])
def test_a_pbs_job_whose_state_cannot_be_made_is_as_strict_as_the_site_wants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: str
) -> None:
    def fail(*_: object, **__: object) -> bool:
        raise OSError(28, "No space left on device")

    loaded = config.load(environ={}, site_directory=str(tmp_path / "none"))
    loaded.set("run.strict", wanted, "test")
    monkeypatch.setattr(pbs, "load", lambda *_: loaded)
    monkeypatch.setattr(State, "begin", fail)
    told = {"id": "7.server", "user": "root", "pyenv": "x", "node": "n1"}
    with pytest.raises(OSError, match="No space"):
        pbs.begin(told, str(tmp_path), str(tmp_path))
    state = State(str(tmp_path), "7.server")
    assert state.read("status") == "failed\n"
    assert os.path.exists(os.path.join(state.path, "strict")) == (wanted == "yes")


@pytest.mark.parametrize("begins", [True, False])
def test_a_worker_of_an_earlier_run_is_ended(tmp_path: Path, begins: bool) -> None:
    """It outlives a slurmd that was killed, and would go on writing into the new run's state."""
    state = State(str(tmp_path), "7")
    assert state.begin(Job.of_prolog(VARIABLES), {})
    cat: Any = {"args": ["cat"], "stdin": subprocess.PIPE, "start_new_session": True}
    with subprocess.Popen(**cat) as worker, subprocess.Popen(**cat) as other:
        start = lease.start_time(worker.pid)
        # The second one has no more than the number of one that ended long ago.
        state.write("worker", f"{worker.pid} {start} {other.pid} {start}0\n")
        if begins:
            assert state.begin(Job.of_prolog(VARIABLES), {})
            assert state.read("status") == "pending 0\n"
        else:
            (tmp_path / "config.yaml").write_text("hook: [")
            assert hook.prolog(VARIABLES, str(tmp_path), str(tmp_path)) == 0
            assert state.read("status") == "failed\n"
        assert (worker.poll(), other.poll()) == (-signal.SIGTERM, None)
        assert state.read("worker") == ""


def test_a_message_is_one_harmless_line(tmp_path: Path) -> None:
    state = State(str(tmp_path), "7")
    state.fail("a\nb\x1b[31m\udcff" + "c" * 5000)
    text = (tmp_path / "jobs/7/message").read_text()
    assert text.startswith("a\\nb\\x1b[31m\\udcff")
    assert text.count("\n") == 1
    assert len(text) < 1100


def test_only_the_owner_writes_and_secrets_are_the_users(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        state = State(str(tmp_path), "7")
        state.begin(Job.of_prolog(VARIABLES), {})
        state.write(STAGED, "env export TOKEN=x\n")
        state.finish("ready", "told")
    finally:
        os.umask(before)
    closed = {"record.json": 0o600, STAGED: 0o640, "message": 0o640}  # 0o040 is the list's mask
    for path in (tmp_path / "jobs").rglob("*"):
        expected = 0o755 if path.is_dir() else closed.get(path.name, 0o644)
        assert stat.S_IMODE(path.stat().st_mode) == expected, path


# -- events


def test_an_event_is_one_line_whatever_is_in_it() -> None:
    fields = {"job": "1", "reason": 'a "b"\n\\ event=x\x1b', "ref": "x" * 500, "how": "", "y": "z"}
    line = events.line("fail", fields)
    assert line.startswith("event=fail job=1 ref=xxx")
    assert line.endswith(r' reason="a \"b\"\\n\\ event=x\\x1b"')
    assert "how=" not in line and "y=" not in line
    assert len(line) < 400


def test_a_file_for_events_and_one_for_prometheus(tmp_path: Path) -> None:
    log, metrics = tmp_path / "log", tmp_path / "stager.prom"
    more = {"log": str(log), "metrics": str(metrics), "lock": str(tmp_path / "lock")}
    events.emit("stage", {"how": "hit", "seconds": "0.25", "bytes": 5}, **more)
    events.emit("stage", {"how": "hit", "seconds": "0.5", "bytes": 0}, **more)
    events.emit("fail", {"blame": "site"}, **more)
    assert len(log.read_text().splitlines()) == 3
    assert metrics.read_text().splitlines() == [
        "# TYPE stager_fail_total counter",
        'stager_fail_total{blame="site"} 1',
        "# TYPE stager_stage_bytes_total counter",
        "stager_stage_bytes_total 5",
        "# TYPE stager_stage_seconds_total counter",
        "stager_stage_seconds_total 0.75",
        "# TYPE stager_stage_total counter",
        'stager_stage_total{how="hit"} 2',
    ]


def test_a_log_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for path in (tmp_path / "link", tmp_path / "no/such", tmp_path):
        events.emit("fail", {}, log=str(path), metrics=str(path / "x"), lock=str(path / "y"))
    assert not (tmp_path / "target").exists()


# -- leases


def test_a_job_holds_until_it_is_gone_or_the_node_boots() -> None:
    holder = lease.of_job("slurm", "12")
    assert holder == f"slurm-12-{boot_id()[:8]}"
    asked: list[str] = []

    def exists(scheduler: str, job: str) -> bool | None:
        asked.append(f"{scheduler} {job}")
        return {"12": True, "13": False, "13.server": True}.get(job)

    assert lease.is_alive(holder)
    assert lease.is_alive(holder, exists)
    assert not lease.is_alive(lease.of_job("slurm", "13"), exists)
    assert lease.is_alive(lease.of_job("slurm", "14"), exists)  # nobody could tell
    assert lease.is_alive(lease.of_job("pbs", "13.server"), exists)
    assert not lease.is_alive("slurm-12-00000000", exists)
    assert asked == ["slurm 12", "slurm 13", "slurm 14", "pbs 13.server"]


# -- what root prepares


def test_a_store_whose_parent_others_can_change_is_not_made_by_root(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    assert not privilege.private_directory(str(shared / "1"), os.getuid())
    assert not (shared / "1").exists()


def test_a_full_or_closed_directory_is_no_broken_disk(tmp_path: Path) -> None:
    assert not privilege.is_broken(str(tmp_path))
    assert not privilege.is_broken(str(tmp_path / "no"))
    assert list(tmp_path.iterdir()) == []


def test_root_is_not_staged_for() -> None:
    with pytest.raises(StagerError, match="root"):
        privilege.become(0)


# -- what the nodes of a job tell each other


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STAGER_REPOSITORY", str(tmp_path))
    return tmp_path / "tmp"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (StagerError("no", hint="do it"), ("no", "do it")),
        (MemoryError(), ("there is not enough memory", LIMITS)),
        (RuntimeError("can't start new thread"), ("cannot start a thread", LIMITS)),
        (KeyError("x"), ("a bug in stager: KeyError: 'x'", "tell your administrator")),
        (OSError(5, "I/O error", "/x"), ("I/O error (/x)", "tell your administrator")),
        (OSError(11, "No more of it"), ("No more of it", "tell your administrator")),
        (TimeoutError(), ("TimeoutError", "tell your administrator")),
    ],
)
def test_what_a_hook_tells_of_an_error(error: Exception, told: tuple[str, str]) -> None:
    assert common.explained(error) == told


def test_other_nodes_are_told_as_much(notes: Path) -> None:
    note = str(notes / "job-7-0.failed")
    jobnotes.leave(note, MemoryError())
    read = jobnotes.read(note)
    assert read is not None
    assert (read.message, read.hint) == ("there is not enough memory", LIMITS)


def test_the_notes_of_many_nodes(notes: Path) -> None:
    job = Job.of_prolog(VARIABLES)
    nodes = [f"x3001c0s{number}b0n0" for number in range(400)]
    for node in nodes:
        jobnotes.tell_first(job._replace(node=node), "" if node != nodes[7] else "why " * 1000)
    told = jobnotes.take(job).splitlines()
    assert {line.partition(": ")[0] for line in told} == {*nodes}
    assert max(map(len, told)) == 600
    assert os.listdir(notes) == []


def test_a_note_is_left_though_others_remove_old_ones(
    notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes.mkdir()
    for name in ("job-5-0.failed", "job-6-0.failed"):
        (notes / name).touch()
        os.utime(notes / name, (0, 0))
    real = os.unlink

    def unlink(path: str, **options: Any) -> None:
        real(path, **options)
        if path.endswith(".failed"):
            raise FileNotFoundError(path)  # another node was faster

    monkeypatch.setattr(os, "unlink", unlink)
    job = Job.of_prolog(VARIABLES)
    jobnotes.tell_first(job, "why")
    assert os.listdir(notes) == ["job-7-0.n2.failed"]


# -- configuration


def test_the_stores_template_is_filled_in_for_the_job(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("store: /var/lib/stager/{uid}\n")
    loaded = config.load(environ={}, site_directory=str(tmp_path), uid=123)
    assert loaded["store"] == "/var/lib/stager/123"
    assert loaded.store_template == "/var/lib/stager/{uid}"


@pytest.mark.parametrize(
    ("conf", "containers", "seen"),
    [
        ("ClusterName=x\n", "", "visible"),
        ("JobContainerType=job_container/tmpfs\n", "AutoBasePath=true\n", "prolog"),
        ("  jobcontainertype = job_container/tmpfs\n", "AutoBasePath=true Shared=TRUE", "visible"),
        ("NamespaceType=namespace/tmpfs\n", "", "prolog"),
        ("#JobContainerType=job_container/tmpfs\n", "", "visible"),
        ("include more.conf\n", "", "prolog"),
        ("include missing.conf\n", "", "prolog"),
    ],
)
def test_which_mounts_a_job_sees(tmp_path: Path, conf: str, containers: str, seen: str) -> None:
    (tmp_path / "slurm.conf").write_text(conf)
    (tmp_path / "more.conf").write_text("NamespaceType=namespace/tmpfs\n")
    (tmp_path / "job_container.conf").write_text(containers)
    assert hook._mounts({"SLURM_CONF": str(tmp_path / "slurm.conf")}) == seen
    assert hook._mounts({}) == "prolog"


# -- doctor

SCONTROL = """\
Configuration data as of 2026-11-21T00:09:14
BatchStartTimeout       = 10 sec
Epilog                  = {hooks}/epilog
JobContainerType        = {container}
MessageTimeout          = 10 sec
Prolog[0]               = {hooks}/prolog
PrologEpilogTimeout     = {limit}
PrologFlags             = {flags}
SLURM_CONF              = {conf}/slurm.conf
SLURM_VERSION           = {version}
TaskProlog              = {hooks}/task_prolog
"""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, "ok Slurm 24.11.5 runs the hooks"),
        ({"version": "21.08.8"}, "error Slurm 21.08.8 does not pass the job comment to the Prolog"),
        (
            {"hooks": "/nowhere"},
            "error Prolog=/nowhere/prolog is missing here, which drains the node",
        ),
        ({"hooks": ""}, "error TaskProlog=/task_prolog is missing here, which fails every task"),
        ({"flags": "(null)"}, "warning without PrologFlags=Alloc"),
        ({"flags": "NoHold"}, "warning with PrologFlags=NoHold"),
        ({"limit": "12"}, "error Slurm ends a Prolog after 12 s"),
        ({"limit": "65534"}, "ok Slurm 24.11.5"),
        (
            {"store": "/tmp/stager-{uid}", "container": "job_container/tmpfs"},
            "error the store /tmp",
        ),
        ({"container": "job_container/tmpfs"}, "ok jobs have a private /tmp"),
        ({"store": "/own/x/{uid}", "container": "job_container/tmpfs"}, "error the store /own/x"),
        ({"prolog_wait": "20s"}, "error srun gives up after 20 s"),
        ({"prolog_wait": "20s", "flags": "Alloc,DeferBatch"}, "ok Slurm 24.11.5"),
    ],
)
def test_doctor_reads_slurms_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, str], said: str
) -> None:
    hooks = tmp_path / "stager"
    hooks.mkdir()
    for name in ("prolog", "epilog", "task_prolog"):
        (hooks / name).touch()
    if change.get("container"):
        (tmp_path / "slurm.conf").write_text("")
        (tmp_path / "job_container.conf").write_text("Dirs=/tmp,/own/x\n")
    values = {
        "hooks": str(hooks), "container": "(null)", "limit": "65534", "flags": "Alloc",
        "conf": str(tmp_path), "version": "24.11.5", **change,
    }  # fmt: skip
    text = SCONTROL.format(**values)
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f"#!/bin/sh\ncat <<'END'\n{text}END\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    loaded = config.load(environ={}, site_directory=str(tmp_path / "none"))
    loaded.set("store", change.get("store", "/var/lib/stager/{uid}"), "test")
    loaded.set("hook.prolog_wait", change.get("prolog_wait", "10s"), "test")
    found = [f"{verdict} {what}" for verdict, what, _ in doctor._slurm(loaded)]
    assert any(line.startswith(said) for line in found), found


# -- deploy/install


def test_install_again_and_without_a_trace(tmp_path: Path) -> None:
    """Below a directory, as for a node image; the whole of it on nodes: the slurm tier."""
    packages = next(Path(path) for path in sys.path if path.endswith("site-packages"))

    def install(*more: str) -> str:
        return subprocess.run(
            [REPO / "deploy/install", "--root", tmp_path, "--packages", packages]
            + ["--python", os.path.realpath(sys.executable), *more],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip

    def files() -> set[str]:
        return {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}

    said = install()
    assert "Prolog=/usr/libexec/stager/slurm/prolog" in said
    first = files()
    (program,) = (tmp_path / "usr/lib/stager").iterdir()
    text = (tmp_path / "usr/libexec/stager/slurm/prolog").read_text()
    assert f"-I -S -B /usr/lib/stager/{program.name} hook prolog /run/stager" in text
    assert not re.search(r"@[A-Z]+@", text)
    python = os.path.realpath(sys.executable)
    version = subprocess.run(
        [python, "-I", "-S", "-B", program, "--version"], check=True, capture_output=True, text=True
    )
    assert version.stdout.startswith("stager ")
    kept = tmp_path / "etc/stager/config.yaml"
    assert kept.read_text().count("\nstore: /var/lib/stager/{uid}\n") == 1
    kept.write_text("store: /mine/{uid}\n")
    assert "(kept as it is)" in install()
    assert files() == {*first, "mine"}
    assert kept.read_text() == "store: /mine/{uid}\n"
    prolog = (tmp_path / "usr/libexec/stager/slurm/prolog").read_text()
    assert "set -- /mine/*\n" in prolog
    spared = (tmp_path / "usr/lib/tmpfiles.d/stager.conf").read_text()
    assert spared.endswith("\nx /mine/[0-9]*\nx /tmp/stager-[0-9]*\n")
    # What is installed never writes bytecode, and finds its own for every module.
    modules = [path for path in program.rglob("*.py") if "__pycache__" not in path.parts]
    assert len(list(program.rglob("*.pyc"))) == len(modules)

    # What began before an upgrade goes on with its files; what the last upgrade left goes.
    command = tmp_path / "usr/bin/stager"
    earlier, oldest = (program.with_name(name) for name in ("0123456789ab", "ba9876543210"))
    for one in (earlier, oldest):
        one.mkdir()
    command.write_text(command.read_text().replace(program.name, earlier.name))
    install()
    assert {*program.parent.iterdir()} == {program, earlier}
    assert program.name in command.read_text()
    install()
    assert [*program.parent.iterdir()] == [program]

    tree = tmp_path / "mine/1000/envs"
    tree.mkdir(parents=True)
    assert "kept" in install("--uninstall")
    assert kept.exists()
    assert tree.exists()
    left = [name for name in files() if (tmp_path / name).is_file()]
    assert left == ["etc/stager/config.yaml"]
    install("--uninstall", "--purge")
    assert not [name for name in files() if "stager" in name or "mine" in name]


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """The interpreter of an environment without any packages, not even pip."""
    venv.create(tmp_path / "bare", with_pip=False)
    return tmp_path / "bare/bin/python"


def own_packages(python: Path) -> Path:
    (directory,) = python.parent.parent.glob("lib/python3*/site-packages")
    return directory


def put_packages(directory: Path, *names: str) -> None:
    """Copies of ours, which work."""
    ours = next(Path(path) for path in sys.path if path.endswith("site-packages"))
    for name in names:
        shutil.copytree(ours / name, directory / name)


def spoil(directory: Path, name: str = "zstandard") -> None:
    """Make a copy of a package of ours one that was compiled for another Python."""
    for file in (directory / name).glob("*.so"):
        file.rename(file.with_name(f"{file.name.partition('.')[0]}.cpython-20-other.so"))


def install_below(
    root: Path, python: Path, *more: object, units: str = "", cwd: Path | None = None
) -> Any:
    return subprocess.run(
        [REPO / "deploy/install", "--root", root, "--python", python, "--unitdir", units, *more],
        capture_output=True, text=True, check=False, cwd=cwd,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("lacking", "said"),
    [
        ("for another Python", "cannot use the zstandard in --packages {0}: ModuleNotFoundError"),
        ("older", "cannot use the zstandard in --packages {0}: 0.18.0 is older than 0.19"),
        ("no modules", "cannot use the PyYAML in --packages {0}: AttributeError"),
        ("missing", "has no PyYAML that it can use, nor is there one in --packages {0}"),
        ("no directory", "pip could not get PyYAML for "),
    ],
)
def test_packages_that_hooks_cannot_import_are_refused(
    tmp_path: Path, bare: Path, lacking: str, said: str
) -> None:
    packages = tmp_path / "packages"
    put_packages(packages, "yaml", "zstandard")
    old = tmp_path / "old"
    done = install_below(old, bare, "--packages", packages)
    assert done.returncode == 0, done.stderr
    if lacking == "for another Python":
        spoil(packages)
    elif lacking == "older":
        (packages / "zstandard/__init__.py").write_text("__version__ = '0.18.0'\n")
    elif lacking == "no modules":
        shutil.rmtree(packages / "yaml")
        (packages / "yaml").mkdir()
    elif lacking == "missing":
        shutil.rmtree(packages / "yaml")

    def files(root: Path) -> dict[Path, tuple[int, ...]]:
        """All that there is; making and removing a directory's entry is no change of it."""
        found = ((path, path.lstat()) for path in root.rglob("*"))
        return {
            path: (at.st_ino, at.st_mode, at.st_mtime_ns if path.is_file() else 0)
            for path, at in found
        }

    hint = "hint: nothing was changed; install both for that Python, or make a directory for"
    hint += f" --packages by its pip: {bare} -m pip install --target DIR PyYAML zstandard\n"
    new = tmp_path / "new"
    (new / "usr/lib").mkdir(parents=True)
    for root in (new, old):
        before = files(root)
        given = [] if lacking == "no directory" else ["--packages", packages]
        done = install_below(root, bare, *given)
        assert done.returncode == 15, done.stderr
        assert said.format(packages) in done.stderr
        assert f"{bare} (Python {sys.version_info[0]}.{sys.version_info[1]})" in done.stderr
        assert hint in done.stderr
        assert "Traceback" not in done.stderr
        assert files(root) == before


def test_the_timer_is_enabled_in_an_image(tmp_path: Path, bare: Path) -> None:
    """Which the systemd of the machine that makes it cannot be asked for."""
    packages, root, units = tmp_path / "packages", tmp_path / "root", "/usr/lib/systemd/system"
    put_packages(packages, "yaml", "zstandard")
    for _ in range(2):
        done = install_below(root, bare, "--packages", packages, units=units)
        assert done.returncode == 0, done.stderr
    link = root / "etc/systemd/system/timers.target.wants/stager-collect.timer"
    assert os.readlink(link) == f"{units}/stager-collect.timer"
    assert "WantedBy=timers.target\n" in (root / os.readlink(link)[1:]).read_text()
    done = install_below(root, bare, "--uninstall", units=units)
    assert done.returncode == 0, done.stderr
    assert not os.path.lexists(link)


def test_own_packages_of_the_python_come_first(tmp_path: Path, bare: Path) -> None:
    packages, root = tmp_path / "packages", tmp_path / "root"
    put_packages(packages, "yaml", "zstandard")
    spoil(packages)
    own = own_packages(bare)
    put_packages(own, "yaml", "zstandard")
    (own / "zstandard/own").write_text("this one")

    def installed() -> Path:
        command = (root / "usr/bin/stager").read_text()
        (program,) = re.findall(r" -B /(\S+) ", command)
        return root / program

    # What lies in the current directory is nobody's package.
    done = install_below(root, bare, "--packages", packages, cwd=packages)
    assert done.returncode == 0, done.stderr
    assert (installed() / "zstandard/own").exists()
    code = "import sys; sys.path.insert(0, sys.argv[1]); import yaml, zstandard"
    subprocess.run([bare, "-I", "-S", "-B", "-c", code, installed()], check=True)

    # Own ones that cannot be used are told, and stand in nobody's way.
    shutil.rmtree(packages)
    put_packages(packages, "yaml", "zstandard")
    spoil(own)
    done = install_below(root, bare, "--packages", packages)
    assert done.returncode == 0, done.stderr
    assert f"cannot use its own zstandard in {own}/zstandard: ModuleNotFoundError" in done.stdout
    assert not (installed() / "zstandard/own").exists()
    subprocess.run([bare, "-I", "-S", "-B", "-c", code, installed()], check=True)


def test_the_installer_wants_the_packages_of_the_project() -> None:
    installer = (REPO / "deploy/install").read_text()
    wanted = re.findall(r"(?:wheel|name)=(\w+) least=([0-9.]+)", installer)
    assert [name for name, _ in wanted] == ["PyYAML", "zstandard", "isal"]
    project = (REPO / "pyproject.toml").read_text()
    assert all(f'    "{name}>={version}' in project for name, version in wanted)


def test_what_makes_checksums_faster_is_taken_where_it_can_be_used(
    tmp_path: Path, bare: Path
) -> None:
    pytest.importorskip("isal")  # not on each kind of machine
    packages, root = tmp_path / "packages", tmp_path / "root"
    put_packages(packages, "yaml", "zstandard", "isal")
    summing = """
import sys
sys.path.insert(0, sys.argv[1])
from stager.checksum import crc32
print(crc32(b"x"), crc32.__module__.partition(".")[0])
"""
    for spoilt in (False, True):
        if spoilt:
            spoil(packages, "isal")
        done = install_below(root, bare, "--packages", packages)
        assert (done.returncode, done.stderr) == (0, "")
        (program,) = re.findall(r" -B /(\S+) ", (root / "usr/bin/stager").read_text())
        told = subprocess.run(
            [bare, "-I", "-S", "-B", "-c", summing, root / program],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        assert told.stdout.split() == [str(zlib.crc32(b"x")), "zlib" if spoilt else "isal"]


def test_the_state_format_is_documented() -> None:
    text = (REPO / "docs/formats/job-state.md").read_text()
    for word in ("status", "message", "staged", "original", "record.json", "worker", "holders"):
        assert f"`{word}" in text
    assert all(f"`{name}`" in text for name in Job._fields)
