"""The PBS hook, with the real stager behind it, under what a real PBS did."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import pytest

from slurm.site import STORE, Site, until

from .mom import RECORDINGS, Played, login_shell, of_run, play

pytestmark = pytest.mark.usefixtures("nothing_is_left")

ENVS = f"{STORE}/20001/envs"
ORIGINAL = "/home/alice/envs/science"


def staged(job: Played) -> bool:
    """Whether every task of the last run ran from this node's own tree, by the job's one path."""
    links = {task.prefix[0] for task in job.tasks}
    assert all(task.status == 0 for task in job.tasks), job.tasks
    return len(links) == 1 and set(of_run(job, -1)) == {ENVS}


# -- jobs


@pytest.mark.parametrize(
    ("recording", "nodes"),
    [("batch1", 1), ("batch3", 3), ("program", 1), ("interactive", 1), ("exported", 2)],
)
def test_every_task_on_every_node(site: Site, hidden: None, recording: str, nodes: int) -> None:
    job = play(site, recording, "science")
    assert len(job.tasks) == nodes
    assert staged(job)
    (link,) = {task.prefix[0] for task in job.tasks}
    assert link.startswith("/run/stager/jobs/") and link.endswith("/env")
    assert (job.output, job.rejected(), job.logged()) == ("", [], [])


def test_an_array(site: Site, hidden: None) -> None:
    """Its parts have brackets in their ids, and are on the node at the same time."""
    job = play(site, "array", "science", script="echo $STAGER_PREFIX; python -c 'import science'")
    paths = [task.out.strip() for tasks in job.runs for task in tasks]
    assert len(paths) == 2 and not any("[" in path for path in paths)
    assert all(task.status == 0 for tasks in job.runs for task in tasks)


@pytest.mark.parametrize("recording", ["alias", "exported"])
def test_the_alias(site: Site, hidden: None, recording: str) -> None:
    job = play(site, recording, variables={"PYENV": "science"})
    assert job.pyenv == "science"
    assert staged(job)


def test_variables_of_the_users_survive(site: Site, hidden: None) -> None:
    """``qsub -V``: what is ours is added, and an activation that was inherited goes."""
    variables = {
        "ML": "one\ntwo", "LIST": "a\\,b", "BASH_FUNC_f%%": "() {  echo x\n}",
        "VIRTUAL_ENV": ORIGINAL, "PATH": f"{ORIGINAL}/bin:/usr/bin:/bin",
    }  # fmt: skip
    script = 'printf "%s|" "$ML" "$LIST" "$VIRTUAL_ENV" "$PATH"'
    job = play(site, "exported", "science", variables=variables, script=script)
    ml, several, virtual, path, _ = job.tasks[0].out.split("|")
    assert (ml, several) == ("one\ntwo", "a,b")
    assert virtual.endswith("/env") and path == f"{virtual}/bin:/usr/bin:/bin"


def test_variables_of_another_job(site: Site) -> None:
    """``qsub -V`` within a job: what was its environment goes, and nothing else of a list."""
    old = "/run/stager/jobs/6.head/env"
    variables = {
        "PATH": f"{old}/bin:/opt/bin:/bin", "LD_LIBRARY_PATH": f"{old}/lib:/opt/lib",
        "GDAL_DATA": f"{old}/share/gdal", "PBS_O_PATH": f"{old}/bin:/bin",
        "APPTAINER_BIND": f"/scratch\\,{old}:{old}",
    }  # fmt: skip
    script = 'printf "%s|" "$PATH" "$LD_LIBRARY_PATH" "$GDAL_DATA" "$PBS_O_PATH" "$APPTAINER_BIND"'
    first, *rest = play(site, "batch1", variables=variables, script=script).tasks[0].out.split("|")
    assert first == "/opt/bin:/bin"
    assert rest == ["/opt/lib", "", f"{old}/bin:/bin", "/scratch", ""]
    job = play(site, "batch1", "science", variables=variables, script=script)
    path, library, data, *_ = job.tasks[0].out.split("|")
    assert path.endswith("/env/bin:/opt/bin:/bin") and "6.head" not in path
    assert (library, data) == ("/opt/lib", "")


def test_login_shells_make_path_anew(site: Site) -> None:
    # The user's own process stands for the job's shell while the job's links are there.
    shown: list[str] = []
    job = Played(site, list(RECORDINGS["batch1"]["events"]), "science")

    def look() -> None:
        shown.append(login_shell(site, "n1", job, "command -v python; echo $PATH"))

    job.meanwhile = {"execjob_epilogue n1": look}
    job.play()
    found, path = shown[0].split("\n")
    assert found.startswith("/run/stager/jobs/") and path.count("/run/stager/jobs/") == 1


def test_a_job_that_nobody_asked_us_about(site: Site) -> None:
    job = play(site, "batch3", script="env")
    assert all("STAGER" not in task.out for task in job.tasks)
    assert (job.output, job.rejected(), job.logged()) == ("", [], [])
    for node in ("n1", "n2", "n3"):
        owner = site.root(node, "stat", "-c", "%u %a", f"{STORE}/20001").split()
        assert owner == ["20001", "700"]  # for stage-run in its script


def test_a_path_that_was_never_packed(site: Site) -> None:
    site.shell("alice", "/usr/bin/python3 -m venv --without-pip envs/fresh")
    job = play(site, "batch3", "/home/alice/envs/fresh")
    assert staged(job)


def test_several_together(site: Site, hidden: None) -> None:
    site.make_environment("alice", "extra")
    (site.home("alice") / "envs/extra").rename(site.home("alice") / "envs/extra-hidden")
    script = "python -c 'import science, extra; print(science.__file__, extra.__file__)'"
    for _ in ("cold", "warm"):
        job = play(site, "batch3", "science+extra", script=script)
        for task in job.tasks:
            assert task.status == 0, task.err
            assert "/env/" in task.out and "/env2/" in task.out


def test_an_environment_of_the_sites(site: Site) -> None:
    """Mounted by the kernel, for whom it may concern; PBS jobs find it by their own links."""
    with site.published_for_all("central", "n1", "n2", "n3") as tree:
        script = "readlink -f $STAGER_PREFIX; python -c 'import central; print(central.__file__)'"
        for _ in ("cold", "warm"):
            job = play(site, "batch3", "central", script=script)
            for task in job.tasks:
                assert task.status == 0, task.err
                found, module = task.out.split()
                assert found == tree
                assert module.startswith("/run/stager/jobs/")
            for node in ("n1", "n2", "n3"):
                ((place, kind, _),) = site.shared_mounts(node)
                assert (place, kind) == (tree, "squashfs")
                assert site.shared_claims(node) == []
            assert (job.output, job.rejected(), job.logged()) == ("", [], [])


# -- the end of jobs


@pytest.mark.parametrize("recording", ["deleted while running", "walltime"])
def test_ends_of_running_jobs(site: Site, hidden: None, recording: str) -> None:
    assert staged(play(site, recording, "science"))


@pytest.mark.parametrize("recording", ["requeued", "mom killed"])
def test_a_second_run(site: Site, hidden: None, recording: str) -> None:
    """PBS keeps what a hook has set, so the second run begins with the first one's variables."""
    job = play(site, recording, "science", script='python -c "print(1)"; echo "$PATH"')
    assert len(job.runs) == 2
    first, second = (tasks[0].out.split("\n") for tasks in job.runs)
    assert first == second and first[0] == "1"
    assert first[1].count("/run/stager/jobs") == 1


def test_a_node_that_forgot_the_job(site: Site, hidden: None) -> None:
    """The job goes on; where PBS cannot be asked, as here, the user's processes tell."""
    job = Played(site, list(RECORDINGS["other mom killed"]["events"]), "science")
    jobs: list[list[str]] = []

    def age() -> None:
        site.root("n2", "sh", "-c", "touch -d '-1 hour' /run/stager/jobs/*")

    def swept() -> None:
        jobs.append(site.job_states("n2"))
        # No event of that job comes to the node any more: this is what the sweep is for.
        site.root("n2", "sh", "-c", "touch -d '-1 hour' /run/stager/jobs/*")

    user = "while [ -e run ]; do sleep 0.1; done"
    (site.home("alice") / "run").touch()
    detached = ["setsid", "-f", "sh", "-c", f"exec </dev/null >/dev/null 2>&1; {user}"]
    site.cluster.exec("n2", "alice", detached)
    seen = 0
    try:
        for event in job.events:
            job.outcomes.append(job._one(event))
            if event["event"] == "exechost_periodic" and event["node"] == "n2":
                seen += 1
                if seen == 1:
                    age()
        swept()
        assert jobs == [[job.events[2]["id"]]]  # the user still has a process there
    finally:
        (site.home("alice") / "run").unlink()
    until(lambda: not site.root("n2", "sh", "-c", "pgrep -u alice -x sh || true").strip())
    job._one({"event": "exechost_periodic", "node": "n2", "jobs": []})
    assert site.job_states("n2") == []


def test_deleted_while_it_is_staged(site: Site, hidden: None) -> None:
    with site.slow(600, "n1"):
        job = play(
            site,
            "deleted while staged",
            "science",
            meanwhile={
                "execjob_preterm n1": lambda: until(
                    lambda: site.root("n1", "sh", "-c", "cat /run/stager/jobs/*/worker || true")
                )
            },
        )
    assert job.runs == []
    assert job.rejected() == [("execjob_prologue", "n1", ["delete"])]


# -- failures


def failing(site: Site, *nodes: str) -> AbstractContextManager[None]:
    code = "def copy(*a, **k):\n    raise NotFoundError('the line is cut')\n"
    return site.patched("transfer", code, *nodes)


def damaged(site: Site, *nodes: str) -> AbstractContextManager[None]:
    return site.patched("hooks/pbs", "raise SystemError('damaged')", *nodes)


def crashing(site: Site, *nodes: str) -> AbstractContextManager[None]:
    code = "def copy(*a, **k):\n    import ctypes\n    ctypes.string_at(0)\n"
    return site.patched("transfer", code, *nodes)


@contextlib.contextmanager
def late(site: Site, *nodes: str) -> Iterator[None]:
    with site.slow(600, *nodes), site.configured("hook: {deadline: 2s}", *nodes):
        yield


@contextlib.contextmanager
def mounted(site: Site, node: str, *options: str) -> Iterator[None]:
    site.root(node, "mount", "-t", "tmpfs", "-o", ",".join((*options, "mode=0755")), "x", STORE)
    try:
        yield
    finally:
        site.root(node, "umount", "-l", STORE)


def full(site: Site, *nodes: str) -> AbstractContextManager[None]:
    return mounted(site, nodes[0], "size=300k")


def read_only(site: Site, *nodes: str) -> AbstractContextManager[None]:
    return mounted(site, nodes[0], "ro")


@contextlib.contextmanager
def gone(site: Site, *nodes: str) -> Iterator[None]:
    command = site.place(nodes[0], "/usr/libexec/stager/bin/stager")
    away = command.with_name("gone")
    command.rename(away)
    try:
        yield
    finally:
        away.rename(command)


@dataclass(frozen=True)
class Case:
    """What happens where, and what the user reads of it."""

    break_it: Callable[..., AbstractContextManager[None]]
    reason: str


CASES = {
    "failing": Case(failing, "the line is cut"),
    "crashing": Case(crashing, "SIGSEGV"),
    "late": Case(late, "longer than 2 s"),
    "full": Case(full, "space"),
    "read_only": Case(read_only, "Read-only file system"),
    "gone": Case(gone, "could not be started"),
    "damaged": Case(damaged, "could not be started"),
}
TELLS_NOTHING = ("gone", "damaged")
"""Where stager is not there, nobody knows the original, and nothing is set."""


@pytest.mark.parametrize("name", CASES)
def test_the_first_node_fails(site: Site, name: str) -> None:
    """The job runs on the original, on every node where it is not staged, and one line says so."""
    script = 'python3 -c "import os, sys; print(0, sys.prefix, os.path.realpath(sys.prefix))"'
    with CASES[name].break_it(site, "n1"):
        job = play(site, "batch3", "science", script=script)
    (line,) = job.output.splitlines()
    assert line.startswith("stager: n1: not staged") and CASES[name].reason in line
    assert job.rejected() == []
    assert all(task.status == 0 for task in job.tasks)
    if name not in TELLS_NOTHING:
        assert job.tasks[0].prefix[1] == ORIGINAL
        assert {task.prefix[1].rpartition("/")[0] for task in job.tasks[1:]} == {ENVS}


@pytest.mark.parametrize("name", CASES)
def test_another_node_fails(site: Site, name: str) -> None:
    script = 'python3 -c "import os, sys; print(0, sys.prefix, os.path.realpath(sys.prefix))"'
    with CASES[name].break_it(site, "n2"):
        job = play(site, "batch3", "science", script=script)
    assert job.rejected() == []
    if name in TELLS_NOTHING:
        assert job.output == ""
    else:
        (line,) = job.output.splitlines()
        assert line.startswith("stager: n2: not staged there: ") and CASES[name].reason in line
    first, second, third = (task.prefix[1] for task in sorted(job.tasks, key=lambda one: one.node))
    assert {first.rpartition("/")[0], third.rpartition("/")[0]} == {ENVS}
    if name not in TELLS_NOTHING:
        assert second == ORIGINAL


@pytest.mark.parametrize("name", CASES)
def test_a_strict_job_ends_before_its_script(site: Site, name: str) -> None:
    with CASES[name].break_it(site, "n1"):
        job = play(site, "rejected by the prologue", "science?strict")
    assert job.runs == []
    assert job.rejected() == [("execjob_prologue", "n1", ["delete"])]
    (line,) = job.output.splitlines()
    assert "this job is strict" in line and CASES[name].reason in line


def test_a_strict_job_on_a_node_that_is_not_the_first(site: Site) -> None:
    with failing(site, "n2"):
        job = play(site, "rejected by the prologue", "science?strict")
    assert job.runs == []
    assert job.output == "stager: n2: not staged there: the line is cut\n"
    assert job.rejected() == [("execjob_prologue", "n1", ["delete"])]


@pytest.mark.parametrize("node", ["n1", "n2"])
def test_a_site_that_wants_all_jobs_strict(site: Site, node: str) -> None:
    with failing(site, node), site.configured("run: {strict: true}"):
        job = play(site, "rejected by the prologue", "science")
    assert job.runs == []
    assert f"stager: {node}: not staged" in job.output and "the line is cut" in job.output
    assert job.rejected() == [("execjob_prologue", "n1", ["delete"])]


@pytest.mark.parametrize("name", ["gone", "damaged"])
def test_a_strict_job_whose_other_node_cannot_tell(site: Site, name: str) -> None:
    """Nothing of ours is left there that could: silence is no consent."""
    with CASES[name].break_it(site, "n2"):
        job = play(site, "rejected by the prologue", "science?strict", domain=".site")
    assert job.runs == []
    assert job.output.startswith("stager: n2.site: did not confirm that it is staged")
    assert job.rejected() == [("execjob_prologue", "n1", ["delete"])]


@pytest.mark.parametrize("recording", ["batch3", "exported"])
def test_a_strict_job_that_is_staged_everywhere(site: Site, hidden: None, recording: str) -> None:
    assert staged(play(site, recording, "science?strict?timeout=5m", domain=".site"))


def test_another_node_whose_configuration_is_malformed(site: Site) -> None:
    with site.configured("stage: {timeout: soon}", "n2"):
        job = play(site, "batch3", "science", script="true")
    (line,) = job.output.splitlines()
    assert line.startswith("stager: n2: not staged there: ") and "stage.timeout" in line


@pytest.mark.parametrize("wish", ["", "?strict"])
def test_variables_that_come_too_late(site: Site, wish: str) -> None:
    """What is packed first is not known when PBS wants to know the job's variables."""
    for name in ("fresh", "more"):
        site.shell(
            "alice", f"rm -rf envs/{name} && /usr/bin/python3 -m venv --without-pip envs/{name}"
        )
    slow = "def pack(*a, **k):\n    import time\n    time.sleep(4)\n    return real(*a, **k)\n"
    refs = f"/home/alice/envs/fresh+/home/alice/envs/more{wish}"
    with site.patched("packing/pack", "real = pack\n" + slow, "n1"):
        job = play(site, "rejected by the prologue" if wish else "batch3", refs)
    assert "only PATH is set for the environment" in job.output
    if wish:
        assert "this job is strict" in job.output
        assert job.rejected() == [("execjob_prologue", "n1", ["delete"])] and job.runs == []
    else:
        assert staged(job), job.tasks


def test_packing_that_is_killed_on_the_first_node(site: Site) -> None:
    """The others do not wait for it until their deadline."""
    site.shell("alice", "rm -rf envs/fresh && /usr/bin/python3 -m venv --without-pip envs/fresh")
    code = "def pack(*a, **k):\n    import os\n    os.kill(os.getpid(), 9)\n"
    with site.patched("packing/pack", code, "n1"):
        job = play(site, "batch3", "/home/alice/envs/fresh")
    assert job.output.count("SIGKILL") == 3
    assert all(task.prefix[1] == "/home/alice/envs/fresh" for task in job.tasks)


def test_a_worker_that_is_killed_on_another_node(site: Site) -> None:
    code = "Worker._listen = lambda self, talk: os.kill(os.getpid(), 9)\n"
    with site.patched("hooks/worker", code, "n2"):
        job = play(site, "batch3", "science", script="true")
    assert "n2: not staged there: the staging worker was killed" in job.output


@pytest.mark.parametrize("wish", ["science", "science?strict"])
def test_a_beginning_that_is_killed(site: Site, wish: str) -> None:
    """What it has started would stage, and the job's variables would not say so."""
    with site.patched("hooks/pbs", "_beforehand = lambda *_: os.kill(os.getpid(), 9)\n", "n1"):
        job = play(site, "rejected by the prologue" if "?" in wish else "batch1", wish)
    assert "stager could not be started on this node" in job.output
    if "?" in wish:
        assert job.runs == [] and job.rejected() == [("execjob_prologue", "n1", ["delete"])]
    else:
        assert job.output.startswith("stager: n1: not staged, running without: ")


def test_a_second_run_that_asks_for_nothing(site: Site) -> None:
    """``qalter -l pyenv=`` of a job that was requeued: PBS has kept what the hook set before."""
    job = Played(site, list(RECORDINGS["requeued"]["events"]), "science", script="env")
    first = [event for event in job.events if event.get("run_count") == 1]
    job.events = first
    job.play()
    assert "STAGER" in job.tasks[0].out
    job.pyenv = ""
    job.events = [
        event for event in RECORDINGS["requeued"]["events"] if event.get("run_count") == 2
    ]
    job.outcomes = []
    job.play()
    for task in job.tasks:
        assert "/run/stager/jobs" not in task.out


def test_a_killed_worker(site: Site) -> None:
    def kill() -> None:
        until(
            lambda: site.root("n1", "sh", "-c", "cat /run/stager/jobs/*/worker 2>/dev/null || true")
        )
        site.root("n1", "sh", "-c", "kill -9 $(cut -d' ' -f1 /run/stager/jobs/*/worker)")

    with site.slow(600, "n1"):
        job = play(site, "batch1", "science", meanwhile={"execjob_prologue n1": kill})
    assert "the staging worker was killed" in job.output
    assert job.tasks[0].prefix[1] == ORIGINAL


def test_nothing_to_fall_back_to(site: Site) -> None:
    job = play(site, "batch1", "no-such-name", script="echo it runs")
    assert job.output.startswith(
        "stager: n1: not staged, running without: environment `no-such-name`"
    )
    assert job.tasks[0].out == "it runs\n"


@pytest.mark.parametrize(
    ("recording", "node", "vnodes"),
    [
        ("broken first node", "n1", ""),
        ("broken other node", "n2", ""),
        ("broken other node", "n2", ".site"),
        ("broken other node", "n2", "[0]"),  # by pbs_cgroups
    ],
)
def test_a_broken_node(site: Site, hidden: None, recording: str, node: str, vnodes: str) -> None:
    """It is set offline and the job runs elsewhere, where the site wants that."""
    with read_only(site, node), site.configured("hook: {on_node_fault: drain}"):
        job = play(site, recording, "science", vnodes=vnodes)
    assert job.rejected() == [("execjob_begin", node, ["rerun"])]
    (rejected,) = [one for one in job.outcomes if not one["accepted"]]
    assert rejected["vnode"]["state"] == "offline"
    assert rejected["vnode"]["comment"].startswith("stager: cannot make the store")
    assert rejected["other"]["state"] == "free"
    assert len(job.runs) == 1 and staged(job)


def test_a_broken_node_that_pbs_calls_otherwise(site: Site) -> None:
    """It cannot be set offline: the job is treated as where the site does not want that."""
    with read_only(site, "n1"), site.configured("hook: {on_node_fault: drain}"):
        job = play(site, "rejected by the prologue", "science?strict", vnodes="-rack7")
    assert job.runs == []
    assert job.rejected() == [("execjob_prologue", "n1", ["delete"])]
    assert "this job is strict" in job.output


def test_a_job_that_found_only_broken_nodes(site: Site) -> None:
    """After two reruns it takes what there is: 21 are what PBS would make of it."""
    events = [{**event} for event in RECORDINGS["batch1"]["events"]]
    for event in events:
        if "run_count" in event:
            event["run_count"] = 3
    with read_only(site, "n1"), site.configured("hook: {on_node_fault: drain}"):
        job = Played(site, events, "science").play()
    assert job.rejected() == []
    assert job.tasks[0].prefix[1] == ORIGINAL


def test_shared_storage_hangs(site: Site) -> None:
    """The first node's begin holds pbs_mom up for no longer than it may."""
    code = "def find(*a, **k):\n    import time\n    time.sleep(600)\n"
    with site.patched("lookup", code, "n1"), site.configured("hook: {deadline: 4s}", "n1"):
        job = Played(site, list(RECORDINGS["batch1"]["events"]), "science", script="echo it runs")
        seen: list[str] = []
        look = "cat /run/stager/jobs/*/status"
        job.meanwhile = {
            "execjob_prologue n1": lambda: seen.append(site.root("n1", "sh", "-c", look))
        }
        job.play()
    assert seen[0].startswith("pending")  # it was not waited for
    assert "longer than 4 s" in job.output
    assert job.tasks[0].out == "it runs\n"


@pytest.mark.parametrize(
    "told",
    [
        "{'trees': [[['/etc', '', True]]]}",
        "{'trees': [[['/var/lib/stager/20001/envs/../../../../../etc', '', True]]]}",
        "{'trees': [[['', 'relative', False]]]}",
        "{'trees': 5}",
        "{'beforehand': {'python': '/bin/sh'}}",
    ],
)
def test_a_process_of_the_users_is_not_believed(site: Site, told: str) -> None:
    """Had a user taken over the process that works for them: no link of root's leads elsewhere."""
    evil = f"def _work(*a):\n    _send(a[1], {told})\n    a[1].recv(1)\n    return {{}}\n"
    seen: list[str] = []
    with site.patched("hooks/forjob", evil, "n1"):
        job = play(
            site,
            "batch1",
            "science",
            script="true",
            meanwhile={
                "execjob_epilogue n1": lambda: seen.append(
                    site.root("n1", "sh", "-c", "readlink /run/stager/jobs/*/env || true")
                )
            },
        )
    assert seen == [""]
    assert "/bin/sh" not in job.variables.values()
    assert "not staged" in job.output


# -- on the server


@pytest.mark.parametrize(
    "wish",
    ["a/b", "x+", "+x", "x?what", "x?strict=1", "x?timeout=soon", "x?format=zip", "-l", "a" * 2000],
)
def test_a_malformed_directive_is_refused(site: Site, wish: str) -> None:
    events = RECORDINGS["batch1"]["events"][:1]
    job = Played(site, events, wish).play()
    (outcome,) = job.outcomes
    assert not outcome["accepted"] and outcome["message"].startswith("stager: ")
    job = Played(site, events, variables={"PYENV": wish}).play()
    assert not job.outcomes[0]["accepted"]


def test_qalter(site: Site) -> None:
    events = RECORDINGS["qalter"]["events"]
    modify = [event for event in events if event["event"] == "modifyjob"]
    assert modify
    for wish, accepted in (("science", True), ("a/b", False), ("", True)):
        job = Played(site, modify[:1], wish).play()
        assert [one["accepted"] for one in job.outcomes] == [accepted]


def test_a_site_without_the_resource(site: Site) -> None:
    """The alias is left to stage-run."""
    job = play(site, "batch1", variables={"PYENV": "science"}, known=False, script="echo $PYENV")
    assert job.rejected() == []
    assert job.tasks[0].out == "science\n"
