"""Slurm's hooks in every shell that a node may have as its ``sh``, with a Python that stands in.

The real Python behind them is tested by the root and slurm tiers.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from environments import REPO
from stager import envpatch

SHELLS = {"dash": ["dash"], "bash": ["bash", "--posix"], "busybox": ["busybox", "sh"]}
PREFIX = "/store/20001/envs/0123456789abcdef"
JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_UID": "20001", "SLURMD_NODENAME": "n1", "SLURM_LOCALID": "0"}
PYENV = {**JOB, "SLURM_JOB_COMMENT": "pyenv:demo"}


@dataclass(frozen=True)
class Node:
    """The shims as deploy/install would put them, below a directory of the test."""

    root: Path
    shell: list[str]

    @property
    def state(self) -> Path:
        return self.root / "run" / "jobs" / "7"

    def python(self, body: str) -> None:
        """What stands in for the hook's Python: a shell script."""
        path = self.root / "python"
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    def run(
        self, hook: str, env: Mapping[str, str], *, trace: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        strace = ["strace", "-f", "-qq", "-o", str(trace)] if trace else []
        shell = shutil.which(self.shell[0])
        assert shell is not None
        return subprocess.run(
            [*strace, shell, *self.shell[1:], str(self.root / hook)],
            env=dict(env),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def tasks(self, **variables: str) -> list[str]:
        """The lines of TaskProlog, which must succeed and say nothing else."""
        done = self.run("task_prolog", {**JOB, "PATH": "/usr/bin:/bin", **variables})
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.splitlines()

    def leave(self, status: str, **files: str) -> None:
        self.state.mkdir(parents=True, exist_ok=True)
        (self.state / "status").write_text(f"{status}\n")
        for name, text in files.items():
            (self.state / name).write_text(text)


@pytest.fixture(params=SHELLS)
def node(tmp_path: Path, request: pytest.FixtureRequest) -> Node:
    words = {"PYTHON": tmp_path / "python", "LIBDIR": "/lib/x", "STATEDIR": tmp_path / "run"}
    words["STORES"] = tmp_path / "stores"
    for hook in ("prolog", "epilog", "task_prolog"):
        text = (REPO / "hooks/slurm" / hook).read_text()
        for word, value in words.items():
            text = text.replace(f"@{word}@", str(value))
        assert "@" not in re.sub(r'"\$@"', "", text)
        (tmp_path / hook).write_text(text)
    return Node(tmp_path, SHELLS[request.param])


def activation(prefix: str, python: str = "/bin/sh", *more: str) -> str:
    return "\n".join(
        [
            f"python {python}",
            f"prefix {prefix}",
            "leave /home/alice/envs/demo",
            "leave /h/alice/envs/demo",
            "env unset CONDA_PREFIX",
            f"env export VIRTUAL_ENV={prefix}",
            "env export GREETING= two  words $(id) `id` \\n",
            f"prepend PATH {prefix}/bin",
            *more,
            "",
        ]
    )


# -- Prolog


@pytest.mark.parametrize("comment", [None, "", "other", "pyenv", '{"env": 1}'])
def test_a_job_without_the_directive_starts_nothing(node: Node, comment: str | None) -> None:
    node.python(f"touch {node.root}/started")
    env = {**JOB, **({"SLURM_JOB_COMMENT": comment} if comment is not None else {})}
    done = node.run("prolog", env)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not (node.root / "started").exists()
    assert not (node.root / "run").exists()


def test_a_job_without_the_directive_finds_a_store(node: Node) -> None:
    node.python(f'echo "$@" >>{node.root}/started; echo said; echo this >&2; exit 1')
    seen = node.root / "started"
    store = node.root / "stores" / JOB["SLURM_JOB_UID"]
    assert node.run("prolog", JOB).returncode == 0
    assert not seen.exists()  # the site has another place for stores: nothing of ours
    store.parent.mkdir()
    (store.parent / "2000").mkdir()
    (store.parent / "120001").mkdir()
    done = node.run("prolog", JOB)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert seen.read_text() == f"-I -S -B /lib/x hook store {node.root}/run\n"
    store.mkdir()
    assert node.run("prolog", JOB).returncode == 0
    assert seen.read_text().count("hook") == 1


def test_a_store_is_not_looked_at(node: Node, tmp_path: Path) -> None:
    """Its user may have mounted a file system there that never answers."""
    (node.root / "stores" / JOB["SLURM_JOB_UID"]).mkdir(parents=True)
    trace = tmp_path / "trace"
    assert node.run("prolog", JOB, trace=trace).returncode == 0
    assert f'stores/{JOB["SLURM_JOB_UID"]}"' not in trace.read_text()
    assert '/stores"' in trace.read_text()


def test_a_store_that_users_make_themselves_is_left_to_them(node: Node) -> None:
    node.python(f"touch {node.root}/started")
    stores = node.root / "stores"
    stores.mkdir()
    stores.chmod(0o1777)
    assert node.run("prolog", JOB).returncode == 0
    assert not (node.root / "started").exists()


def test_what_the_prolog_starts(node: Node) -> None:
    node.python(f'echo "$@" >{node.root}/seen; umask >>{node.root}/seen; env >>{node.root}/seen')
    env = {**PYENV, "PATH": "/evil", "LD_PRELOAD": "/evil.so", "LD_LIBRARY_PATH": "/evil"}
    assert node.run("prolog", {**env, "LD_PRELOAD": ""}).returncode == 0
    seen = (node.root / "seen").read_text().splitlines()
    assert seen[0] == f"-I -S -B /lib/x hook prolog {node.root}/run"
    assert seen[1] == "0022"
    assert "PATH=/usr/sbin:/usr/bin:/sbin:/bin" in seen
    assert not [line for line in seen if "/evil" in line]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("exit 1", "stager's prolog ended with status 1;"),
        ("exit 125", "stager's prolog ended with status 125;"),
        ("kill -SEGV $$", "stager's prolog ended with status 139;"),
        ("kill -KILL $$", "stager's prolog took too long or was killed;"),
        ("exit 124", "stager's prolog took too long or was killed;"),
        (None, "stager's Python ({root}/python) cannot be started on this node;"),
    ],
)
def test_whatever_happens_the_prolog_succeeds_and_tells_the_tasks(
    node: Node, body: str | None, reason: str
) -> None:
    if body is not None:
        node.python(body)
    assert node.run("prolog", PYENV).returncode == 0
    reason = reason.replace("{root}", str(node.root)) + " tell your administrator"
    assert (node.state / "status").read_text() == "failed\n"
    assert (node.state / "message").read_text() == reason + "\n"
    assert node.tasks() == [
        f"print stager: n1: not staged, running without: {reason}",
        "export STAGER_REPORTED=n1",
    ]


def test_a_worker_that_lives_has_the_last_word(node: Node) -> None:
    with subprocess.Popen(["sleep", "60"]) as worker:
        node.leave("pending 3", worker=f"{worker.pid} 1 2 3\n")
        node.python("kill -KILL $$")
        assert node.run("prolog", PYENV).returncode == 0
        assert (node.state / "status").read_text() == "pending 3\n"
        worker.kill()
    assert node.run("prolog", PYENV).returncode == 0
    assert (node.state / "status").read_text() == "failed\n"


@pytest.mark.parametrize(
    ("comment", "strict"),
    [
        ("pyenv:x?strict", True),
        ("a=1,pyenv:x?timeout=5m&strict;b", True),
        ('{"pyenv": "x?strict"}', True),
        ("pyenv:strict", False),
        ("pyenv:x?verbose strict", False),
    ],
)
def test_a_strict_job_is_told_by_the_shim_too(node: Node, comment: str, strict: bool) -> None:
    assert node.run("prolog", {**PYENV, "SLURM_JOB_COMMENT": comment}).returncode == 0
    done = node.run("task_prolog", JOB)
    assert done.returncode == int(strict)
    assert ("this job is strict: stager's Python" in done.stdout) == strict


def test_the_one_status_that_fails_the_prolog(node: Node) -> None:
    node.python("exit 99")
    assert node.run("prolog", PYENV).returncode == 1


def test_a_state_that_cannot_be_written_is_no_failure(node: Node) -> None:
    (node.root / "run").write_text("a file in the way")
    node.python("exit 3")
    assert node.run("prolog", PYENV).returncode == 0


@pytest.mark.parametrize("job", ["", "../7", "7;x", "7 8", "a"])
def test_a_job_id_that_is_no_number(node: Node, job: str) -> None:
    node.python("exit 3")
    for hook in ("prolog", "epilog", "task_prolog"):
        done = node.run(hook, {**PYENV, "SLURM_JOB_ID": job})
        assert (done.returncode, done.stdout) == (0, "")
    assert not (node.root / "run").exists()


@pytest.mark.parametrize("comment", ["pyenv:x;$(touch {})`touch {}`", "pyenv:x\n. {}", "pyenv:*"])
def test_the_comment_is_never_evaluated(node: Node, comment: str) -> None:
    node.python("exit 1")
    env = {**PYENV, "SLURM_JOB_COMMENT": comment.replace("{}", str(node.root / "evil"))}
    assert node.run("prolog", env).returncode == 0
    assert not (node.root / "evil").exists()


def test_het_jobs_share_the_leaders_key(node: Node) -> None:
    node.python("exit 1")
    node.run("prolog", {**PYENV, "SLURM_JOB_ID": "8", "SLURM_HET_JOB_ID": "7"})
    assert (node.state / "status").exists()
    node.python("exit 1")
    node.run("epilog", {**PYENV, "SLURM_JOB_ID": "8", "SLURM_HET_JOB_ID": "7"})
    assert not node.state.exists()


# -- Epilog


def test_the_epilog_goes_by_the_state_and_not_by_the_comment(node: Node) -> None:
    node.python(f"echo $4-$5-$6 >>{node.root}/seen")
    assert node.run("epilog", PYENV).returncode == 0
    assert not (node.root / "seen").exists()
    node.leave("ready")
    assert node.run("epilog", JOB).returncode == 0
    assert (node.root / "seen").read_text() == "/lib/x-hook-epilog\n"


def test_the_epilog_never_fails(node: Node) -> None:
    for body in ("exit 1", "exit 99", "kill -KILL $$", None):
        node.leave("ready")
        if body is None:
            (node.root / "python").unlink()
        else:
            node.python(body)
        assert node.run("epilog", JOB).returncode == 0
        assert not node.state.exists()


# -- TaskProlog


def test_a_task_of_another_job(node: Node) -> None:
    assert node.tasks() == []


def test_activation(node: Node) -> None:
    node.leave("ready", staged=activation(PREFIX))
    path = "/home/alice/envs/demo/bin:/a b:/c*:/h/alice/envs/demo/bin:/home/alice/envs/demo2/bin"
    inherited = {"VIRTUAL_ENV": "/other/env", "CONDA_PREFIX": "/opt/conda/"}
    told = node.tasks(
        PATH=f"{path}:/opt/conda/bin:/other/env/bin::{PREFIX}/bin:/bin:/a b",
        PYTHONPATH="/home/alice/envs/demo/lib:/x",
        LD_LIBRARY_PATH="/y",
        SSL_CERT_FILE="/h/alice/envs/demo/cert.pem",
        **inherited,
    )
    assert told == [
        "unset CONDA_PREFIX",
        f"export VIRTUAL_ENV={PREFIX}",
        "export GREETING= two  words $(id) `id` \\n",
        f"export PATH={PREFIX}/bin:/a b:/c*:/home/alice/envs/demo2/bin:/bin",
        f"export PYTHONPATH={PREFIX}/lib:/x",
        f"export SSL_CERT_FILE={PREFIX}/cert.pem",
    ]


def test_activation_twice_changes_nothing_more(node: Node) -> None:
    node.leave("ready", staged=activation(PREFIX))
    once = node.tasks(PATH="/usr/bin:/bin")
    path = next(line for line in once if line.startswith("export PATH="))[12:]
    assert node.tasks(PATH=path, VIRTUAL_ENV=PREFIX, STAGER_PREFIX=PREFIX) == once


def test_what_follows_is_what_follows_elsewhere(node: Node) -> None:
    node.leave("ready", staged=activation(PREFIX))
    names = {*envpatch.SEARCH_PATHS, *envpatch.FILES} - {"PATH"}
    told = node.tasks(**dict.fromkeys(names, "/home/alice/envs/demo/x"))
    for name in names:
        assert f"export {name}={PREFIX}/x" in told


def test_other_search_paths_are_prepended_to(node: Node) -> None:
    more = "prepend PYTHONPATH /store/below:/store/lower"
    node.leave("ready", staged=activation(PREFIX, "/bin/sh", more))
    assert "export PYTHONPATH=/store/below:/store/lower" in node.tasks()
    told = node.tasks(PYTHONPATH="/mine:/store/lower")
    assert "export PYTHONPATH=/store/below:/store/lower:/mine" in told


def test_containers_are_reached(node: Node) -> None:
    """What is bound stays, of an environment that was active nothing does, nor twice."""
    program = "APPTAINER"
    more = [
        f"prepend {program}_BIND {PREFIX},/store/envs/base",
        f"prepend {program}ENV_PREPEND_PATH {PREFIX}/bin",
    ]
    node.leave("ready", staged=activation(PREFIX, "/bin/sh", *more))
    bind, path = f"export {program}_BIND=", f"export {program}ENV_PREPEND_PATH="

    def told(**variables: str) -> list[str]:
        return [line for line in node.tasks(**variables) if "APPTAINER" in line]

    ours = [f"{bind}{PREFIX},/store/envs/base", f"{path}{PREFIX}/bin"]
    assert told() == ours
    # Slurm gives a step what its batch script had.
    first, second = (line.partition("=")[2] for line in ours)
    again = {"APPTAINER_BIND": f"{first},/a:/b:ro", "APPTAINERENV_PREPEND_PATH": second}
    assert told(**again, STAGER_PREFIX=PREFIX) == [f"{ours[0]},/a:/b:ro", ours[1]]
    other = {
        "STAGER_PREFIX": "/old/envs/1",
        "APPTAINER_BIND": "/old/envs/0,/old/envs/1,/a:/b:ro",
        "APPTAINERENV_PREPEND_PATH": "/old/envs/1/bin:/x",
    }
    assert told(**other) == [f"{ours[0]},/a:/b:ro", f"{ours[1]}:/x"]
    assert told(SINGULARITY_BIND="/d") == [f"{ours[0]},/d", ours[1]]
    node.leave("failed", message="why\n")
    (node.state / "staged").unlink()
    assert told(**other) == [f"{bind}/a:/b:ro", f"{path}/x"]
    other["APPTAINER_BIND"] = "/old/envs/1"
    assert told(**other) == ["unset APPTAINER_BIND", f"{path}/x"]


def test_a_note_for_whoever_asked_for_it(node: Node) -> None:
    node.leave("ready", staged=activation(PREFIX), message="staged demo (hit, 0.01 s)\n")
    told = node.tasks()
    assert told[-2:] == [
        "print stager: n1: staged demo (hit, 0.01 s)",
        "export STAGER_REPORTED=n1",
    ]


def test_a_tree_that_cannot_be_seen(node: Node) -> None:
    node.leave(
        "ready",
        staged=activation(PREFIX, f"{PREFIX}/bin/python"),
        original=activation("/home/alice/envs/demo"),
    )
    told = node.tasks()
    assert told[0].startswith(
        f"print stager: n1: not staged, running the original /home/alice/envs/demo: {PREFIX} cannot"
    )
    assert "export VIRTUAL_ENV=/home/alice/envs/demo" in told
    path = next(line for line in told if line.startswith("export PATH="))
    assert path == "export PATH=/home/alice/envs/demo/bin:/usr/bin:/bin"


def test_failure_with_and_without_an_original(node: Node) -> None:
    node.leave("failed", message="no $(id) luck; try again\n")
    first = "print stager: n1: not staged, running without: no $(id) luck; try again"
    assert node.tasks() == [first, "export STAGER_REPORTED=n1"]
    (node.state / "original").write_text(activation("/there", "/nowhere/python"))
    assert node.tasks() == [first, "export STAGER_REPORTED=n1"]
    (node.state / "original").write_text(activation("/there"))
    assert "export VIRTUAL_ENV=/there" in node.tasks()


def test_a_step_falls_back_to_what_its_batch_script_had_on_another_node(node: Node) -> None:
    (node.root / "origin/bin").mkdir(parents=True)
    (node.root / "origin/bin/python").symlink_to("/bin/sh")
    origin = f"{node.root}/origin"
    node.leave("failed", message="why\n")
    inherited = {"STAGER_PREFIX": PREFIX, "VIRTUAL_ENV": PREFIX, "PATH": f"{PREFIX}/bin:/bin"}
    assert node.tasks(STAGER_ORIGIN=origin, **inherited) == [
        f"print stager: n1: not staged, running the original {origin}: why",
        "export STAGER_REPORTED=n1",
        f"export PATH={origin}/bin:/bin",
        f"export VIRTUAL_ENV={origin}",
    ]
    told = node.tasks(STAGER_ORIGIN="/gone", **inherited)
    assert told[0] == "print stager: n1: not staged, running without: why"


def test_one_line_for_each_node(node: Node) -> None:
    node.leave("failed", message="why\n")
    assert node.tasks(SLURM_LOCALID="1") == []
    assert node.tasks(STAGER_REPORTED="n1") == []
    assert len(node.tasks(STAGER_REPORTED="n2")) == 2


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        ("failed", "why"),
        ("ready", f"{PREFIX} cannot be seen in this job"),
        ("pending 3", "the staging worker was killed;"),
        ("", "the Prolog left no status;"),
    ],
)
def test_strict(node: Node, status: str, reason: str) -> None:
    """Whatever went wrong, neither the original nor the system's Python takes its place."""
    text = (node.root / "task_prolog").read_text()
    (node.root / "task_prolog").write_text(text.replace("sleep 0.2", "sleep 0"))
    staged = activation(PREFIX, f"{PREFIX}/bin/python")
    node.leave(status, strict="", message="why\n", staged=staged, original=activation("/there"))
    done = node.run("task_prolog", JOB)
    assert done.returncode == 1
    first, *more = done.stdout.splitlines()
    assert first.startswith(f"print stager: n1: not staged, and this job is strict: {reason}")
    assert more == ["export STAGER_REPORTED=n1"]


def test_strict_is_nothing_to_a_task_that_finds_what_is_staged(node: Node) -> None:
    node.leave("ready", strict="", staged=activation(PREFIX))
    assert f"export VIRTUAL_ENV={PREFIX}" in node.tasks()


@pytest.mark.parametrize("status", ["", "nonsense", None])
def test_a_status_that_is_none(node: Node, status: str | None) -> None:
    node.state.mkdir(parents=True)
    if status is not None:
        (node.state / "status").write_text(status)
    assert node.tasks()[0].endswith("the Prolog left no status; tell your administrator")


def test_waiting_for_a_worker_that_counts(node: Node) -> None:
    node.leave("pending 0")

    def work() -> None:
        for beat in range(1, 4):
            time.sleep(0.3)
            (node.state / "status.new").write_text(f"pending {beat}\n")
            os.rename(node.state / "status.new", node.state / "status")
        (node.state / "staged").write_text(activation(PREFIX))
        (node.state / "status.new").write_text("ready\n")
        os.rename(node.state / "status.new", node.state / "status")

    worker = threading.Thread(target=work)
    worker.start()
    try:
        assert f"export VIRTUAL_ENV={PREFIX}" in node.tasks()
    finally:
        worker.join()


def test_a_worker_that_counts_no_more(node: Node) -> None:
    """75 looks without a change; what sleeps here does so in no time."""
    text = (node.root / "task_prolog").read_text()
    (node.root / "task_prolog").write_text(text.replace("sleep 0.2", "sleep 0"))
    node.leave("pending 3")
    assert node.tasks()[0].endswith("the staging worker was killed; tell your administrator")


def test_a_state_that_goes_away_meanwhile(node: Node) -> None:
    node.leave("pending 3")
    timer = threading.Timer(0.5, shutil.rmtree, [node.state])
    timer.start()
    try:
        assert node.tasks() == []
    finally:
        timer.join()


# -- what it costs


def calls(node: Node, hook: str, env: Mapping[str, str], tmp_path: Path) -> int:
    """How many more system calls a hook makes than an empty script does."""
    (node.root / "empty").write_text("#!/bin/sh\nexit 0\n")
    counted = []
    for name in ("empty", hook):
        trace = tmp_path / "trace"
        assert node.run(name, env, trace=trace).returncode == 0
        counted.append(len(trace.read_text().splitlines()))
    return counted[1] - counted[0]


def test_a_job_without_the_directive_pays_next_to_nothing(node: Node, tmp_path: Path) -> None:
    env = {**JOB, "SLURM_JOB_COMMENT": "something else"}
    assert calls(node, "prolog", env, tmp_path) <= 3
    (node.root / "stores" / JOB["SLURM_JOB_UID"]).mkdir(parents=True)
    assert calls(node, "prolog", env, tmp_path) <= 12
    assert calls(node, "epilog", env, tmp_path) <= 5
    assert calls(node, "task_prolog", env, tmp_path) <= 5


def test_a_warm_task_starts_no_process(node: Node, tmp_path: Path) -> None:
    node.leave("ready", staged=activation(PREFIX))
    trace = tmp_path / "trace"
    assert node.run("task_prolog", {**JOB, "PATH": "/usr/bin:/bin"}, trace=trace).returncode == 0
    text = trace.read_text()
    assert text.count("execve(") == 1
    assert not re.search(r"\b(clone3?|v?fork)\(", text)
    # Shells read a file byte by byte so as not to read too far; that is most of it.
    size = sum(path.stat().st_size for path in node.state.iterdir())
    assert len(text.splitlines()) < 250 + 2 * size


def test_no_hook_asks_slurm_anything() -> None:
    """Slurm's manual forbids it: a thousand nodes would ask at once."""
    asking = re.compile(r"\b(scontrol|squeue|sinfo|sacct|srun|sbcast)\b")
    for hook in ("prolog", "epilog", "task_prolog"):
        text = (REPO / "hooks/slurm" / hook).read_text()
        assert not asking.search(re.sub(r"#.*", "", text)), hook
