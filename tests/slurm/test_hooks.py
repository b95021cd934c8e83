"""The directive on a real cluster: what users get, and what is shared by whom."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

import pytest

from .site import BIN, HOOKS, NODES, SHOW, STORE, UID, Site, idle, until

# Runs a program as the root of a process tree; prints what all of it took, even the processes that
# detached themselves, once they have ended.
USERS = ["alice", "bob"]
_TIMED = """
import ctypes, os, resource, subprocess, sys
assert ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) == 0  # PR_SET_CHILD_SUBREAPER
status = subprocess.run(sys.argv[1:], stdin=subprocess.DEVNULL).returncode
try:
    while True:
        os.wait()
except ChildProcessError:
    pass
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(status, used.ru_utime + used.ru_stime)
"""


@pytest.fixture(scope="module", autouse=True)
def environments(site: Site) -> Iterator[None]:
    for user in ("alice", "bob"):
        site.make_environment(user, "demo")
        site.make_environment(user, "other")
        # Nobody can run the original by mistake: it is gone.
        site.cluster.exec("ctl", user, ["mv", "envs/demo", "envs/away"])
    yield
    site.clear_stores()


@pytest.fixture
def prefix(site: Site) -> str:
    """Where alice's environment is staged on every node."""
    return tree_of(site, "alice", "demo")


def tree_of(site: Site, user: str, name: str) -> str:
    shown = site.cluster.exec("ctl", user, [f"{BIN}/stager", "inspect", "--json", name]).stdout
    (layer,) = re.findall(r'"id": "([0-9a-f]{16})"', shown)
    return f"{STORE}/{UID[user]}/envs/{layer}"


def mounts(site: Site, node: str) -> list[str]:
    text = site.root(node, "cat", "/proc/self/mounts")
    return [line.split()[1] for line in text.splitlines() if f" {STORE}/" in line]


def leases(site: Site, node: str, user: str = "alice") -> list[str]:
    rooms = site.place(node, f"{STORE}/{UID[user]}/leases")
    return sorted(path.name for path in rooms.glob("*/*"))


def test_batch_and_its_steps_on_every_node(site: Site, prefix: str) -> None:
    site.mark()
    done = site.batch(f"{SHOW}\nsrun {SHOW}", "-N4", "--ntasks-per-node=2", comment="pyenv:demo")
    assert done.prefixes() == {node: {prefix} for node in NODES}
    assert len(done.output.splitlines()) == 1 + 8
    assert done.told() == []
    until(lambda: site.syslog().count("event=release") == 4)
    events = [line for line in site.syslog().splitlines() if "event=stage" in line]
    assert len(events) == 4
    for line in events:
        assert re.search(
            rf" stager\[\d+\]: event=stage job={done.id} uid=20001 node=n\d"
            r" ref=demo@sha256:[0-9a-f]{64} how=\w+ seconds=[\d.]+ bytes=\d+$",
            line,
        ), line
    assert site.settled() == idle()


def test_nothing_is_left_of_a_job_but_the_tree(site: Site, prefix: str) -> None:
    site.batch("true", "-N4", comment="pyenv:demo")
    site.settled()
    for node in NODES:
        assert site.job_states(node) == []
        assert leases(site, node) == []
        assert mounts(site, node) == [prefix]


def test_sbcast_into_stores_that_only_root_makes(site: Site, prefix: str) -> None:
    """The other nodes cannot read the images, so they can have them only from sbcast."""
    site.clear_stores()
    images = "/home/alice/.local/share/stager/images"
    for node in NODES[1:]:
        site.root(node, "mount", "-t", "tmpfs", "-o", "ro,size=4k", "hidden", images)
    try:
        run = f"{BIN}/stage-run --env demo --strict --via sbcast"
        done = site.batch(f"{run} srun {SHOW}", "-N4", "--ntasks-per-node=1")
    finally:
        for node in NODES[1:]:
            site.root(node, "umount", images)
    assert done.prefixes() == {node: {prefix} for node in NODES}, done.output
    for node in NODES:
        assert list(site.place(node, f"{STORE}/{UID['alice']}").glob(".*")) == []


def test_srun_and_salloc(site: Site, prefix: str) -> None:
    done = site.run("srun", "-N4", "--comment=pyenv:demo", "sh", "-c", SHOW)
    assert sorted(done.stdout.split("\n")) == ["", *(f"{node} {prefix}" for node in NODES)]
    assert "stager" not in done.stderr
    inside = f"srun -N4 sh -c {shlex.quote(SHOW)}"
    done = site.run("salloc", "-N4", "--comment=x,pyenv:demo;y", "sh", "-c", inside)
    assert sorted(done.stdout.split("\n")) == ["", *(f"{node} {prefix}" for node in NODES)]


@pytest.mark.parametrize(
    "comment",
    [
        "billing=x pyenv:demo other",
        "pyenv:demo?format=squashfs&timeout=5m",
        '{"project": "x", "pyenv": "demo"}',
        "pyenv:/home/alice/envs/demo",
        "pyenv:~/envs/demo",
        "pyenv:./envs/demo",
    ],
)
def test_ways_to_write_it(site: Site, prefix: str, comment: str) -> None:
    done = site.batch(SHOW, "-D", "/home/alice", comment=comment)
    assert list(done.prefixes().values()) == [{prefix}], done.output


def test_arrays_and_heterogeneous_jobs(site: Site, prefix: str) -> None:
    done = site.batch(SHOW, "--array=0-3", "-W", "-o", "/home/alice/array.%a", comment="pyenv:demo")
    site.settled()
    for task in range(4):
        text = (site.home("alice") / f"array.{task}").read_text()
        assert text.split() == [text.split()[0], prefix]
    assert done.state == "COMPLETED"

    body = f"#SBATCH hetjob\n#SBATCH -N2 --comment=pyenv:demo\nsrun --het-group=0,1 {SHOW}"
    done = site.batch(f"#SBATCH -N1 --exclusive --comment=pyenv:demo\n{body}")
    assert set(map(tuple, done.prefixes().values())) == {(prefix,)}, done.output
    assert len(done.prefixes()) == 3
    site.settled()
    assert [site.job_states(node) for node in NODES] == [[]] * 4


def test_components_of_one_job_on_one_node(site: Site, prefix: str) -> None:
    """They have one state; the last of them to end takes it away.

    The scheduler here does not put them on one node, so this runs their hooks as slurmd would.
    """
    site.mark()
    state = site.place("n2", "/run/stager/jobs/900001")
    for job in ("900001", "900002"):
        run_hook(site, "prolog", "n2", SLURM_JOB_ID=job, SLURM_HET_JOB_ID="900001")
        assert (state / "status").read_text() == "ready\n"
    assert site.syslog("n2").count("event=stage") == 1
    for job in ("900001", "900001", "900002"):
        assert state.exists() and len(leases(site, "n2")) == 1
        run_hook(site, "epilog", "n2", SLURM_JOB_ID=job, SLURM_HET_JOB_ID="900001")
    assert not state.exists() and leases(site, "n2") == []
    assert site.syslog("n2").count("event=release") == 1


def test_a_run_whose_epilog_never_came(site: Site, prefix: str) -> None:
    """As where slurmd is killed, and the job starts again on the node: only the new worker writes.

    Slurm's own way to that takes minutes, so this runs the hooks as slurmd would.
    """
    site.clear_stores()
    state = site.place("n2", "/run/stager/jobs/900001")
    try:
        with site.slow(600, "n2"), site.configured("hook: {prolog_wait: 1s}", "n2"):
            run_hook(site, "prolog", "n2")
            assert (state / "status").read_text().startswith("pending")
            earlier = (state / "worker").read_text().split()[::2]
        run_hook(site, "prolog", "n2", SLURM_JOB_RESTART_COUNT="1")
        assert (state / "status").read_text() == "ready\n"
        for pid in earlier:
            assert site.cluster.exec("n2", "root", ["kill", "-0", pid], check=False).returncode != 0
    finally:
        run_hook(site, "epilog", "n2")
    assert not state.exists() and leases(site, "n2") == []


def run_hook(site: Site, hook: str, node: str, *, timed: bool = False, **changes: str) -> str:
    """Run a hook as slurmd does; returns its status and the CPU seconds it took, if `timed`."""
    variables = {
        "SLURM_JOB_ID": "900001",
        "SLURM_JOB_UID": "20001",
        "SLURM_JOB_GID": "20001",
        "SLURM_JOB_COMMENT": "pyenv:demo",
        "SLURM_JOB_WORK_DIR": "/home/alice",
        "SLURM_NODELIST": node,
        "SLURMD_NODENAME": node,
        **changes,
    }
    argv = [f"{name}={value}" for name, value in variables.items()]
    timer = ["python3", "-c", _TIMED] if timed else []
    return site.root(node, "env", "-i", *argv, *timer, f"{HOOKS}/{hook}")


def test_a_requeued_job(site: Site, prefix: str) -> None:
    body = (
        f'{SHOW}\n[ -n "$SLURM_RESTART_COUNT" ] || {{ scontrol requeue $SLURM_JOB_ID; sleep 60; }}'
    )
    job = site.cluster.sbatch(
        f"#!/bin/sh\n{body}\n",
        args=[
            "--comment=pyenv:demo",
            "--requeue",
            "--open-mode=append",
            "-o",
            "/home/alice/job.%j",
        ],
    )
    # Slurm lets a requeued job wait for two minutes, of which a few seconds are needed: slurmd
    # refuses credentials of the second in which it revoked the job's.
    hurry = """
        until scontrol show job $1 | grep -q Restarts=1; do sleep 0.2; done
        until scontrol show job $1 | grep -qE 'JobState=(RUNNING|COMPLETED)'; do
            sleep 3
            scontrol update JobId=$1 StartTime=now 2>/dev/null || :
        done
    """
    site.root("ctl", "sh", "-c", hurry, "sh", str(job))
    done = site.ended(job, limit=180)
    assert [set(found) for found in done.prefixes().values()] in ([{prefix}], [{prefix}] * 2)
    assert done.output.count(prefix) == 2
    assert site.settled() == idle()


def test_what_a_job_inherits_does_not_matter(site: Site, prefix: str) -> None:
    origin = "/home/alice/envs"
    script = f"""
        export VIRTUAL_ENV={origin}/other CONDA_PREFIX=/opt/conda CONDA_SHLVL=1 PYTHONHOME=/x
        export PATH={origin}/demo/bin:{origin}/other/bin:/opt/conda/bin:/a*b:$PATH
        export PYTHONPATH={origin}/demo/lib:/somewhere/else
        export SSL_CERT_FILE={origin}/demo/cert.pem
        cd /home/alice
        sbatch -W -o inherited --comment=pyenv:demo <<'END'
#!/bin/sh
printenv PATH VIRTUAL_ENV PYTHONPATH SSL_CERT_FILE
printenv CONDA_PREFIX CONDA_SHLVL PYTHONHOME
{SHOW}
END
    """
    site.cluster.exec("ctl", "alice", ["sh", "-c", script])
    told = (site.home("alice") / "inherited").read_text().splitlines()
    path = told[0].split(":")
    assert path[0] == f"{prefix}/bin"
    assert "/a*b" in path
    assert not [one for one in path if one.startswith((origin, "/opt/conda"))]
    assert told[1:4] == [prefix, f"{prefix}/lib:/somewhere/else", f"{prefix}/cert.pem"]
    assert len(told) == 5  # the others are gone
    assert told[4].endswith(f" {prefix}")


def test_export_none_and_a_program_of_the_environment(site: Site, prefix: str) -> None:
    done = site.batch(f"srun --export=NONE {SHOW}", "-N2", comment="pyenv:demo")
    assert list(done.prefixes().values()) == [{prefix}] * 2


def test_two_environments_together(site: Site) -> None:
    code = "import sys, demo, other; print(sys.prefix, demo.name, other.name)"
    done = site.batch(f'python -c "{code}"', comment="pyenv:demo+other")
    assert done.output.split() == [tree_of(site, "alice", "demo"), "demo", "other"]


def test_verbose(site: Site) -> None:
    done = site.batch("true", comment="pyenv:demo?verbose")
    (line,) = done.told()
    assert re.fullmatch(
        r"stager: n\d: staged demo@sha256:[0-9a-f]{64} \((hit|mounted), [\d.]+ s\)", line
    ), line


def test_nobody_else_reads_what_an_environment_sets(site: Site) -> None:
    """Its variables may be tokens: ``conda env config vars`` keeps such, for its owner alone."""
    run_hook(site, "prolog", "n2")
    try:
        for name, readers in (("staged", ["alice"]), ("record.json", []), ("status", USERS)):
            for user in USERS:
                argv = ["cat", f"/run/stager/jobs/900001/{name}"]
                done = site.cluster.exec("n2", user, argv, check=False)
                assert (done.returncode == 0) == (user in readers), (name, user, done.stderr)
    finally:
        run_hook(site, "epilog", "n2")


def test_that_an_environment_changed_is_told_by_one_node(site: Site) -> None:
    site.make_environment("alice", "staying")
    tree = tree_of(site, "alice", "staying")
    script = "echo v=2 >$(echo envs/staying/lib/*/site-packages)/new.py"
    site.cluster.exec("ctl", "alice", ["sh", "-c", script])
    done = site.batch(f"srun -N2 {SHOW}", "-N2", "-wn1,n2", comment="pyenv:staying?on_stale=warn")
    assert done.prefixes() == {"n1": {tree}, "n2": {tree}}
    (line,) = done.told()
    assert re.fullmatch(
        r"stager: n1: warning: `staying` changed since it was packed \(/\S+\)", line
    ), line


def test_an_environment_that_changed_is_packed_by_one_node(site: Site) -> None:
    site.make_environment("alice", "moving")
    before = tree_of(site, "alice", "moving")
    site.cluster.exec(
        "ctl", "alice", ["sh", "-c", "echo v=2 >$(echo envs/moving/lib/*/site-packages)/new.py"]
    )
    done = site.batch(f"srun -N4 {SHOW}\npython -c 'import new'", "-N4", comment="pyenv:moving")
    after = tree_of(site, "alice", "moving")
    assert after != before
    assert done.prefixes() == {node: {after} for node in NODES}


def test_jobs_at_once_pack_an_environment_once(site: Site) -> None:
    site.make_environment("alice", "array")
    script = "echo v=2 >$(echo envs/array/lib/*/site-packages)/new.py"
    site.cluster.exec("ctl", "alice", ["sh", "-c", script])
    code = (
        "_pack = pack\n"
        "def pack(*args, **kwargs):\n"
        "    with open('/home/alice/packs', 'a') as file:\n"
        "        file.write('x')\n"
        "    time.sleep(3)\n"  # all jobs are there meanwhile
        "    return _pack(*args, **kwargs)\n"
    )
    with site.patched("packing/pack", code):
        jobs = [
            site.cluster.sbatch(
                f"#!/bin/sh\nsrun {SHOW}\n",
                args=["-o", "/home/alice/job.%j", "-w", node, "--comment=pyenv:array"],
            )
            for node in NODES
        ]
        ended = [site.ended(job) for job in jobs]
    assert (site.home("alice") / "packs").read_text() == "x"
    after = tree_of(site, "alice", "array")
    assert [done.prefixes() for done in ended] == [{node: {after}} for node in NODES]


def test_an_environment_that_was_never_packed(site: Site) -> None:
    site.cluster.exec("ctl", "alice", ["python3", "-m", "venv", "--without-pip", "envs/raw"])
    done = site.batch(f"srun -N4 {SHOW}", "-N4", comment="pyenv:~/envs/raw")
    assert done.prefixes() == {node: {tree_of(site, "alice", "raw")} for node in NODES}


# -- sharing


def test_jobs_of_one_user_share_a_tree_and_users_never_do(site: Site, prefix: str) -> None:
    site.clear_stores()
    body = f"{SHOW}\nwhile [ ! -e /home/alice/go ]; do sleep 0.1; done"
    (site.home("alice") / "go").unlink(missing_ok=True)
    argv = ["-w", "n1", "--comment=pyenv:demo", "-o"]
    jobs = [
        site.cluster.sbatch(f"#!/bin/sh\n{body}\n", user=user, args=[*argv, f"/home/{user}/job.%j"])
        for user in ("alice", "alice", "bob")
    ]
    theirs = tree_of(site, "bob", "demo")
    until(lambda: len(leases(site, "n1")) == 2 and len(leases(site, "n1", "bob")) == 1)
    assert sorted(mounts(site, "n1")) == sorted([prefix, theirs])
    # Claimed trees stay; others may not even look.
    site.cluster.exec("n1", "alice", [f"{BIN}/stager", "collect", "--all"])
    assert prefix in mounts(site, "n1")
    refused = site.cluster.exec("n1", "bob", ["ls", f"{STORE}/20001"], check=False)
    assert "Permission denied" in refused.stderr
    (site.home("alice") / "go").touch()
    ended = [site.ended(job, user=user) for job, user in zip(jobs, ("alice", "alice", "bob"))]
    assert [one.prefixes()["n1"] for one in ended] == [{prefix}, {prefix}, {theirs}]
    # The last one gone leaves the tree for the next job, until it is collected.
    site.settled()
    assert sorted(mounts(site, "n1")) == sorted([prefix, theirs])
    until(lambda: not leases(site, "n1"))
    site.root("n1", f"{BIN}/stager", "collect", "--all-users", "--all")
    assert mounts(site, "n1") == []
    assert "squashfuse" not in site.root("n1", "ps", "-eo", "comm")


def test_many_tasks_on_a_cold_store(site: Site, prefix: str) -> None:
    site.clear_stores()
    site.mark()
    done = site.batch(f"srun -n64 -O {SHOW}", "-N1", "-w", "n1", "-n8", comment="pyenv:demo")
    assert done.output.split("\n") == [*[f"n1 {prefix}"] * 64, ""]
    assert mounts(site, "n1") == [prefix]
    assert site.syslog().count("event=stage") == 1


def test_squashfuse_outlives_the_prolog_and_the_job(site: Site, prefix: str) -> None:
    site.clear_stores()
    where = "ps -eo pid,ppid,comm | grep squashfuse"
    done = site.batch(where, "-w", "n1", comment="pyenv:demo")
    pid, parent = done.output.split()[:2]
    assert parent == "1"  # no process of the job is above it, so neither are its limits
    site.settled()
    assert site.root("n1", "cat", f"/proc/{pid}/comm").startswith("squashfuse")
    done = site.batch(where, "-w", "n1", comment="pyenv:demo")
    assert done.output.split()[0] == pid


def test_a_warm_prolog_is_cheap(site: Site, prefix: str) -> None:
    """The CPU time of the Prolog, its worker and the process of the user together."""
    site.batch("true", "-w", "n1", comment="pyenv:demo")
    # A Prolog may take 0.15 s. How slow or busy a machine is, tells a Python that does nothing,
    # right before: 0.01 to 0.015 s where idle; where it takes longer, ten of these are as much.
    empty = ["python3", "-c", _TIMED, "/usr/bin/python3", "-I", "-S", "-B", "-c", "pass"]
    ratios = []
    for _ in range(7):
        nothing = float(site.root("n1", *empty).split()[1])
        status, seconds = run_hook(site, "prolog", "n1", timed=True).split()
        assert status == "0"
        assert site.place("n1", "/run/stager/jobs/900001/status").read_text() == "ready\n"
        ratios.append(float(seconds) / max(0.015, nothing))
        print(f"warm prolog: {seconds} s of CPU, an empty Python {nothing:.3f} s")
        assert run_hook(site, "epilog", "n1", timed=True).split()[0] == "0"
    assert leases(site, "n1") == []
    assert min(ratios) < 10.0, ratios


def test_after_a_reboot_nothing_stale_is_trusted(site: Site, prefix: str) -> None:
    job = site.cluster.sbatch("#!/bin/sh\nsleep 600\n", args=["-w", "n4", "--comment=pyenv:demo"])
    stamp = site.place("n4", f"{STORE}/20001/ready") / prefix.rpartition("/")[2]
    try:
        until(lambda: leases(site, "n4") and stamp.is_file())
        before = stamp.read_text()
        site.cluster.reboot("n4")
        site._start_syslog("n4")
    finally:  # others wait for an empty queue
        site.cluster.exec("ctl", "root", ["scancel", str(job)])
        site.cluster.undrain()
        site.settled()
    assert mounts(site, "n4") == []
    assert site.job_states("n4") == []
    done = site.batch(SHOW, "-w", "n4", comment="pyenv:demo")
    assert done.prefixes() == {"n4": {prefix}}
    assert stamp.read_text() != before
    # The dead job's claim goes with the next collection: it is of another boot.
    site.cluster.exec("n4", "alice", [f"{BIN}/stager", "collect"])
    assert leases(site, "n4") == []
