"""What goes wrong: a cause, and then what the node is, how the job ends, what user and admin read.

Every cause is made on the real cluster; none may drain a node but the one a site asked for.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import pytest

from .conftest import SETTINGS
from .site import BIN, HOOKS, LIMIT, NODES, SHOW, STORE, Ended, Site, idle, until

ORIGINAL = "/home/alice/envs/demo"
REPOSITORY = "/home/alice/.local/share/stager"


@pytest.fixture(scope="module", autouse=True)
def environments(site: Site) -> Iterator[None]:
    site.make_environment("alice", "demo", size=6 << 20)
    yield
    site.clear_stores()


@pytest.fixture(autouse=True)
def _nodes_are_as_before(site: Site) -> Iterator[None]:
    site.clear_stores()
    site.mark()
    yield
    site.settled()
    site.cluster.undrain()
    until(lambda: site.cluster.node_states() == idle())


# Causes, all on n2


@contextlib.contextmanager
def python_missing(site: Site) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for hook in ("prolog", "epilog"):
            shim = site.place("n2", f"{HOOKS}/{hook}")
            text = shim.read_text()
            stack.callback(shim.write_text, text)
            shim.write_text(text.replace("/usr/bin/python3", "/usr/bin/python-gone"))
        yield


def program_damaged(site: Site) -> AbstractContextManager[None]:
    return site.patched("hooks/slurm", "raise SystemError('damaged')", "n2")


def prolog_segfault(site: Site) -> AbstractContextManager[None]:
    return site.patched("hooks/slurm", f"def prolog(*arguments):\n{CRASH}", "n2")


def prolog_traceback(site: Site) -> AbstractContextManager[None]:
    return site.patched("hooks/worker", "def start(*arguments):\n    return 1 / 0", "n2")


def prolog_killed(site: Site) -> AbstractContextManager[None]:
    code = "def _wait_for(*arguments):\n    os.kill(os.getpid(), 9)"
    return site.patched("hooks/slurm", code, "n2")


def worker_traceback(site: Site) -> AbstractContextManager[None]:
    return site.patched("hooks/worker", "Worker._listen = lambda self, talk: {}['x']", "n2")


def staging_traceback(site: Site) -> AbstractContextManager[None]:
    return site.patched(
        "staging/store", "def boot_id():\n    raise ValueError('no \\x1b[31mboot')", "n2"
    )


def staging_segfault(site: Site) -> AbstractContextManager[None]:
    return site.patched("transfer", f"def copy(*arguments, **more):\n{CRASH}", "n2")


CRASH = "    import ctypes\n    ctypes.string_at(0)"


@contextlib.contextmanager
def deadline(site: Site) -> Iterator[None]:
    with site.slow(600, "n2"), site.configured("hook: {deadline: 2s, prolog_wait: 1s}", "n2"):
        yield


@contextlib.contextmanager
def full_disk(site: Site) -> Iterator[None]:
    with mounted(site, "-t", "tmpfs", "-o", "size=2m,mode=0755", "stager-test", STORE):
        yield


@contextlib.contextmanager
def broken_disk(site: Site) -> Iterator[None]:
    """Read-only, as the kernel makes a file system that it can no longer write."""
    with mounted(site, "-t", "tmpfs", "-o", "ro,size=2m,mode=0755", "stager-test", STORE):
        yield


@contextlib.contextmanager
def mounted(site: Site, *arguments: str) -> Iterator[None]:
    site.root("n2", "mount", *arguments)
    try:
        yield
    finally:
        site.root("n2", "umount", "-l", arguments[-1])


@contextlib.contextmanager
def unreadable_home(site: Site) -> Iterator[None]:
    share = site.home("alice") / ".local"
    share.chmod(0)
    try:
        yield
    finally:
        share.chmod(0o755)


def unknown_key(site: Site) -> AbstractContextManager[None]:
    return site.configured("hook: {prolog_weight: 3s}", "n2")


@contextlib.contextmanager
def anybodys_configuration(site: Site) -> Iterator[None]:
    with site.configured("stage: {how: mount}", "n2"):
        (file,) = site.place("n2", "/etc/stager/config.d").iterdir()
        file.chmod(0o666)
        yield


def no_yaml(site: Site) -> AbstractContextManager[None]:
    return site.configured("hook: [", "n2")


@contextlib.contextmanager
def damaged_image(site: Site) -> Iterator[None]:
    shown = site.cluster.exec("ctl", "alice", [f"{BIN}/stager", "inspect", "--json", "demo"]).stdout
    (layer,) = json.loads(shown)["layers"]
    (image,) = (site.home("alice") / ".local/share/stager/images").glob(f"{layer['id']}-*")
    data = image.read_bytes()
    image.write_bytes(data[:-5000] + bytes(5000))
    try:
        yield
    finally:
        image.write_bytes(data)


@dataclass(frozen=True)
class Case:
    """One row of the matrix.

    Args:
        user: what the user reads, after the node's name and whatever Python it runs instead.
        admin: what the log has.
        original: whether the job runs on the original environment then; else on the system's.
        nodes: where it happens.
    """

    cause: Callable[[Site], AbstractContextManager[None]]
    user: str
    admin: str
    original: bool = True
    nodes: tuple[str, ...] = ("n2",)


MATRIX = [
    Case(
        python_missing,
        r"stager's Python \(/usr/bin/python-gone\) cannot be started on this node; tell .*",
        r"blame=site reason=\"stager's Python \(/usr/bin/python-gone\)",
    ),
    Case(program_damaged, r"stager's prolog ended with status 1; .*", "status 1"),
    Case(prolog_segfault, r"stager's prolog ended with status 139.*", "status 139"),
    Case(
        prolog_traceback,
        r"a bug in stager: ZeroDivisionError: division by zero; tell your administrator",
        r"blame=site reason=\"a bug in stager: ZeroDivisionError",
    ),
    Case(
        worker_traceback,
        r"a bug in stager: KeyError: 'x'; tell your administrator",
        r"blame=site reason=\"a bug in stager: KeyError",
    ),
    Case(
        staging_traceback,
        r"a bug in stager: ValueError: no \\x1b\[31mboot \(store\.py:\d+\); .*",
        r"blame=site reason=\"a bug in stager: ValueError: no \\\\x1b",
    ),
    Case(
        staging_segfault,
        r"the staging process was ended by SIGSEGV; tell your administrator",
        r"blame=site reason=\"the staging process was ended by SIGSEGV",
    ),
    Case(
        deadline,
        r"staging took longer than 2 s; is shared storage slow\? .*",
        r"seconds=\d.* blame=site reason=\"staging took longer than 2 s",
    ),
    Case(full_disk, r".*(space|No space left).*; .*", r"blame=\w+ reason=\".*[Ss]pace"),
    Case(
        broken_disk,
        r"cannot make the store .*: Read-only file system.*",
        r"blame=node reason=\"cannot make the store .*Read-only",
    ),
    Case(
        unreadable_home,
        r"cannot .*: Permission denied .*",
        r"blame=job reason=\"cannot .* Permission denied",
        original=False,
        nodes=NODES,
    ),
    Case(
        unknown_key,
        r"unknown configuration key `hook.prolog_weight` .*; did you mean `hook.prolog_wait`\?",
        r"blame=site reason=\"unknown configuration key",
    ),
    Case(
        anybodys_configuration,
        r"the configuration file /etc/stager/config.d/.*.yaml is writable by users.*",
        r"blame=site reason=\"the configuration file",
    ),
    Case(no_yaml, r"/etc/stager/.* is not YAML: .*", r"blame=site reason=\".*not YAML"),
    Case(
        damaged_image,
        r"the image .* is damaged: .*; pack the environment again",
        r"blame=job reason=\"the image .* is damaged",
        nodes=NODES,
    ),
]


@pytest.mark.parametrize("case", MATRIX, ids=lambda case: case.cause.__name__)
def test_the_job_runs_on_and_the_node_stays(site: Site, case: Case) -> None:
    with case.cause(site):
        done = site.batch(f"srun -N4 sh -c '{SYSTEM}'", "-N4", comment="pyenv:demo")
        site.settled()
    assert site.settled() == idle()
    assert done.exit == "0:0"
    where = f"running the original {ORIGINAL}" if case.original else "running without"
    told = sorted(set(done.told()))
    assert len(told) == len(done.told()) == len(case.nodes), done.output
    for node, line in zip(case.nodes, told):
        assert re.fullmatch(f"stager: {node}: not staged, {where}: {case.user}", line), line
    prefixes = done.prefixes()
    for node in NODES:
        (prefix,) = prefixes[node]
        if node not in case.nodes:
            assert prefix.startswith(f"{STORE}/20001/envs/")
        else:
            assert prefix == (ORIGINAL if case.original else "/usr")
    assert re.search(case.admin, site.syslog(case.nodes[0])), site.syslog()
    if case.nodes == ("n2",):
        assert "event=fail" not in site.syslog("n1", "n3", "n4")
    assert [site.job_states(node) for node in NODES] == [[]] * 4


@pytest.mark.parametrize("case", MATRIX, ids=lambda case: case.cause.__name__)
def test_a_strict_job_fails_and_the_node_stays(site: Site, case: Case) -> None:
    with case.cause(site):
        done = site.batch(
            "echo ran", "-w", "n2", comment="pyenv:demo?strict&timeout=5m", check="FAILED"
        )
        site.settled()
    assert site.settled() == idle()
    refused(done, case.user)


def refused(done: Ended, reason: str) -> None:
    """A job that asked for strict has not run, and says why."""
    assert done.exit == "1:0"
    (line,) = done.told()
    said = f"stager: n2: not staged, and this job is strict: {reason}"
    assert re.fullmatch(said, line), line
    assert "ran\n" not in done.output


# The Python that a task finds: Debian has no `python` of its own.
SYSTEM = (
    "echo $SLURMD_NODENAME $("
    '$(command -v python || echo python3) -c "import sys; print(sys.prefix)")'
)


@pytest.mark.parametrize("strict", ["", "?strict"], ids=["", "strict"])
@pytest.mark.parametrize("wait", ["60s", "1s"], ids=["prolog-waits", "prolog-has-gone"])
def test_the_worker_is_killed(site: Site, wait: str, strict: str) -> None:
    """The Prolog notices, or else the tasks: nobody counts up any more."""
    with site.slow(600, "n2"), site.configured(f"hook: {{prolog_wait: {wait}}}", "n2"):
        argv = ["-w", "n2", f"--comment=pyenv:demo{strict}", "-o", "/home/alice/job.%j"]
        job = site.cluster.sbatch(f"#!/bin/sh\necho ran\n{SYSTEM}\n", args=argv)
        state = site.place("n2", f"/run/stager/jobs/{job}")
        until(lambda: (state / "status").exists() and "pending 3" in (state / "status").read_text())
        worker, _, staging, _ = (state / "worker").read_text().split()
        site.root("n2", "kill", "-9", worker)
        done = site.ended(job, check="FAILED" if strict else "COMPLETED")
        site.settled()
    reason = "the staging worker was killed; tell your administrator"
    if strict:
        refused(done, reason)
    else:
        assert done.prefixes() == {"n2": {ORIGINAL}}
        (line,) = done.told()
        assert line.endswith(f": {reason}")
    # The Epilog has ended what the worker had started.
    assert site.cluster.exec("n2", "root", ["kill", "-0", staging], check=False).returncode != 0
    assert site.settled() == idle()


def test_the_prolog_is_killed(site: Site) -> None:
    """The worker goes on without it, and all tasks have the environment, the first one too."""
    with prolog_killed(site), site.slow(2, "n2"):
        done = site.batch(f"{SHOW}\nsleep 3\nsrun {SHOW}", "-w", "n2", comment="pyenv:demo")
    assert site.settled() == idle()
    assert done.exit == "0:0"
    assert done.told() == []
    (prefix,) = done.prefixes()["n2"]
    assert prefix.startswith(f"{STORE}/20001/envs/")


@pytest.mark.parametrize("asked", ["ignore", "drain"])
def test_a_broken_disk_drains_a_node_only_where_the_site_wants_it(site: Site, asked: str) -> None:
    with broken_disk(site), site.configured(f"hook: {{on_node_fault: {asked}}}"):
        argv = ["-w", "n2", "-o", "/home/alice/job.%j", "--comment=pyenv:demo"]
        job = site.cluster.sbatch("#!/bin/sh\ntrue\n", args=argv)
        if asked == "ignore":
            assert site.ended(job).exit == "0:0"
            assert site.settled() == idle()
            return
        until(lambda: site.cluster.node_states()["n2"] == "drained")
        assert "Prolog error" in site.cluster.drain_reasons()["n2"]
        site.cluster.exec("ctl", "alice", ["scancel", str(job)])
    assert site.settled() == idle("n2")


def test_a_disk_that_is_full_of_what_others_have_left(site: Site) -> None:
    """Of what no job claims the least recently used goes, whoever's it is, and no more."""
    for name in ("old", "new"):
        site.make_environment("bob", name, size=6 << 20)
    # 16 MiB are to be left to jobs: with one of bob's there is room for alice's, with both not.
    with mounted(site, "-t", "tmpfs", "-o", "size=32m,mode=0755", "stager-test", STORE):
        for name in ("old", "new"):
            site.batch(SHOW, "-w", "n2", comment=f"pyenv:{name}", user="bob")
            site.settled()
        before = ready(site, "20002")
        done = site.batch(SHOW, "-w", "n2", comment="pyenv:demo")
        left, mine = ready(site, "20002"), ready(site, "20001")
        print(done.output, site.root("n2", "df", "-k", STORE), site.syslog("n2"))
    assert len(before) == 2
    assert len(left) == len(mine) == 1
    assert done.prefixes() == {"n2": {f"{STORE}/20001/envs/{mine[0]}"}}
    again = site.batch(SHOW, "-w", "n1", comment="pyenv:new", user="bob")
    assert again.prefixes() == {"n1": {f"{STORE}/20002/envs/{left[0]}"}}


def ready(site: Site, uid: str) -> list[str]:
    """The trees of a user on n2; by the node, for what is mounted there is not seen from here."""
    return site.root("n2", "ls", f"{STORE}/{uid}/ready").split()


def test_the_store_of_a_user_who_has_left(site: Site) -> None:
    script = f"""
        mkdir -p {STORE}/29999/envs/0123456789abcdef
        touch {STORE}/29999/envs/0123456789abcdef/file
        chown -R 29999:29999 {STORE}/29999
        chmod 700 {STORE}/29999
        {BIN}/stager collect --all-users --json
    """
    told = site.root("n2", "sh", "-ec", script)
    left = site.root("n2", "ls", f"{STORE}/29999/envs")
    site.root("n2", "rm", "-r", f"{STORE}/29999")
    assert json.loads(told)["users"]["29999"] == 1
    assert left == ""


@pytest.mark.parametrize("cause", [full_disk, staging_segfault, unknown_key, damaged_image])
def test_nothing_else_drains_a_node_even_there(
    site: Site, cause: Callable[[Site], AbstractContextManager[None]]
) -> None:
    with site.configured("hook: {on_node_fault: drain}"), cause(site):
        assert site.batch("true", "-w", "n2", comment="pyenv:demo").exit == "0:0"
    assert site.settled() == idle()


@pytest.mark.parametrize("way", ["batch", "srun", "salloc"])
def test_strict(site: Site, way: str) -> None:
    """The one failure that a job may ask for."""
    message = "stager: n2: not staged, and this job is strict: environment `none` is not"
    if way == "batch":
        done: Ended = site.batch(
            "echo ran", "-w", "n2", comment="pyenv:none?strict", check="FAILED"
        )
        assert done.exit == "1:0"
        output = done.output
    else:
        step = ["sh", "-c", "echo ran"]
        inner = step if way == "srun" else ["srun", *step]
        run = site.run(way, "-w", "n2", "--comment=pyenv:none?strict", *inner, check=False)
        assert run.returncode != 0
        output = run.stdout + run.stderr
    assert message in output
    assert "ran\n" not in output
    assert site.settled() == idle()


@pytest.mark.parametrize(
    ("comment", "reason"),
    [
        ("pyenv:demoo", "environment `demoo` is not published; did you mean `demo`?"),
        ("pyenv:", "the environment's name is empty; see `stager list`"),
        ("pyenv:../demo/../../x", "environment `/x` is not published"),
        ("pyenv:demo pyenv:demo", "the job's comment has more than one pyenv: directive"),
        ("pyenv:demo?strikt", "`strikt` is not an option of the pyenv directive"),
        ("pyenv:demo?timeout=soon", "the directive's timeout: expected a duration such as 30s"),
        ('{"pyenv": 3}', "the key pyenv of the job's JSON comment is not a string"),
    ],
)
def test_a_wrong_directive(site: Site, comment: str, reason: str) -> None:
    done = site.batch("echo ran", "-D", "/home/alice", comment=comment)
    assert done.told()[0].partition(": not staged, ")[2].partition(": ")[2].startswith(reason)
    assert done.output.endswith("ran\n")
    assert site.settled() == idle()
    assert "blame=job" in site.syslog()


@pytest.mark.parametrize(
    ("comment", "reason"),
    [
        ("pyenv:demo?strict&strikt", "`strikt` is not an option .*"),
        ("pyenv:demo?strict&timeout=soon", "the directive's timeout: .*"),
    ],
)
def test_a_wrong_directive_that_asks_for_strict(site: Site, comment: str, reason: str) -> None:
    refused(site.batch("echo ran", "-w", "n2", comment=comment, check="FAILED"), reason)
    assert site.settled() == idle()


def test_a_comment_that_only_looks_like_a_directive(site: Site) -> None:
    done = site.batch("echo ran", comment="see-pyenv:demo")
    assert done.output == "ran\n"
    assert "event" not in site.syslog()


def test_the_failure_is_told_once_for_each_node(site: Site) -> None:
    done = site.batch("srun -n8 true; srun -n8 true", "-n8", "-w", "n2", comment="pyenv:none")
    assert len(done.told()) == 1


def test_packing_that_fails_is_told_by_all_nodes_at_once(site: Site) -> None:
    site.cluster.exec("ctl", "alice", ["mkdir", "-p", "envs/nothing"])
    began = time.monotonic()
    done = site.batch("srun -N4 true", "-N4", comment="pyenv:~/envs/nothing")
    assert len(done.told()) == 4
    assert len({line.partition(": not staged")[2] for line in done.told()}) == 1, done.output
    assert time.monotonic() - began < LIMIT  # not the deadline of 300 s


def test_a_job_that_is_cancelled_while_it_stages(site: Site) -> None:
    with site.slow(600, "n2"), site.configured("hook: {prolog_wait: 1s}"):
        job = site.cluster.sbatch("#!/bin/sh\ntrue\n", args=["-w", "n2", "--comment=pyenv:demo"])
        worker = site.place("n2", f"/run/stager/jobs/{job}/worker")
        until(worker.exists)
        pids = worker.read_text().split()[::2]
        site.cluster.exec("ctl", "alice", ["scancel", str(job)])
        assert site.cluster.wait(job) == "CANCELLED"
        site.settled()
    for pid in pids:
        assert site.cluster.exec("n2", "root", ["kill", "-0", pid], check=False).returncode != 0
    assert site.job_states("n2") == []
    assert not list(site.place("n2", f"{STORE}/20001/leases").glob("*/*"))
    assert site.settled() == idle()


def test_users_are_told_at_submit_time(site: Site) -> None:
    conf = site.cluster.state / "slurm"
    settings = slurm_settings()
    extra = f"{settings['extra_conf']}\\nCliFilterPlugins=cli_filter/lua"
    plugin = site.place("ctl", f"{HOOKS}/cli_filter.lua").read_text()
    (conf / "cli_filter.lua").write_text(plugin)
    site.cluster.reconfigure(**{**settings, "extra_conf": extra})

    def submit(comment: str) -> str:
        command = f"PATH={BIN}:$PATH sbatch --wrap=true -o none '--comment={comment}' 2>&1"
        return site.shell("alice", command)

    try:
        assert "stager" not in submit("pyenv:demo?strict")
        assert "stager" not in submit("anything")
        for comment, kept in (
            ("a=1,pyenv:demo;b", "a=1,pyenv:demo?on_stale=ignore;b"),
            ("pyenv:demo?strict", "pyenv:demo?strict&on_stale=ignore"),
            ("pyenv:demo?on_stale=warn", "pyenv:demo?on_stale=warn"),
            ('{"pyenv": "demo", "x": 1}', '{"pyenv": "demo?on_stale=ignore", "x": 1}'),
            ("pyenv:no-such+demo", "pyenv:no-such+demo"),
        ):
            job = re.findall(r"Submitted batch job (\d+)", submit(comment))[0]
            told = site.root("ctl", "scontrol", "show", "job", job)
            assert f"Comment={kept} \n" in told, told
        text = submit("pyenv:demoo")
        assert "stager: warning: environment `demoo` is not published" in text
        assert "stager: hint: did you mean `demo`?" in text
        assert "Submitted batch job" in text
        assert "not published" in submit('{"pyenv": "no-such"}')
        assert "touched" not in submit("pyenv:$(echo touched >&2)")
        site.shell("alice", "touch $(echo envs/demo/lib/python3*/site-packages)/x.py")
        assert "`demo` changed since it was packed" in submit("pyenv:demo")
    finally:
        site.shell("alice", f"rm -f envs/demo/lib/*/*/x.py; {BIN}/stager pack envs/demo")
        site.settled()
        (conf / "cli_filter.lua").unlink()
        site.cluster.reconfigure(**settings)


# -- what Slurm may be configured to do

CONFIGURATIONS = {
    "Contain": {"prolog_flags": "Contain"},
    "DeferBatch": {"prolog_flags": "Alloc,DeferBatch"},
    "Serial": {"prolog_flags": "Alloc,Serial"},
    "private-tmp": {"private_tmp": "1"},
    "private-tmp-shared": {"private_tmp": "1", "jc_extra": "Shared=true"},
    "RunInJob": {"prolog_flags": "RunInJob"},
    "RunInJob-private-tmp": {"prolog_flags": "RunInJob", "private_tmp": "1"},
}


def known_here(site: Site) -> list[str]:
    version = site.root("ctl", "scontrol", "--version").split()[1]
    release = tuple(int(part) for part in version.split(".")[:2])
    unknown = set()
    if release < (24, 5):
        unknown |= {"RunInJob", "RunInJob-private-tmp"}  # the flag came with 24.05
    if release < (23, 2):
        unknown |= {"private-tmp-shared"}  # so did Shared= with 23.02
    return [name for name in CONFIGURATIONS if name not in unknown]


@pytest.fixture
def reconfigured(site: Site) -> Iterator[Callable[[str], None]]:
    def reconfigure(name: str) -> None:
        site.cluster.reconfigure(**{**slurm_settings(), **CONFIGURATIONS[name]})

    yield reconfigure
    site.settled()
    site.cluster.reconfigure(**slurm_settings())


def slurm_settings() -> dict[str, str | int]:
    return {key: value for key, value in SETTINGS.items() if key != "cpus"}


def test_every_configuration_of_slurm(site: Site, reconfigured: Callable[[str], None]) -> None:
    """Quick staging and one that outlasts the Prolog; the job sees the tree in both."""
    for name in known_here(site):
        reconfigured(name)
        for wait, slow in (("10s", 0.0), ("1s", 3.0)):
            site.clear_stores()
            with site.configured(f"hook: {{prolog_wait: {wait}}}"), site.slow(slow, "n2"):
                body = f"{SHOW}; srun -N2 {SHOW}"
                done = site.batch(body, "-w", "n[1-2]", comment="pyenv:demo")
            found = {name: (done.told(), sorted(done.prefixes()))}
            assert found == {name: ([], ["n1", "n2"])}, done.output
            for prefixes in done.prefixes().values():
                (prefix,) = prefixes
                assert prefix.startswith(f"{STORE}/20001/envs/"), name
            assert site.settled() == idle(), name


@pytest.mark.parametrize("private", ["", "1"], ids=["shared-tmp", "private-tmp"])
def test_sixty_seconds_of_staging_on_one_node(
    site: Site, reconfigured: Callable[[str], None], private: str
) -> None:
    """At Slurm's and our own default timeouts, for every kind of job at once."""
    if private:
        reconfigured("private-tmp")
    site.clear_stores()
    step = ["srun", "-N4", "sh", "-c", SHOW]
    with site.slow(60, "n3"):
        script = f"#!/bin/sh\n{SHOW}\nsrun -N4 {SHOW}\n"
        argv = ["-N4", "--comment=pyenv:demo", "-o", "/home/alice/job.%j"]
        job = site.cluster.sbatch(script, args=argv)
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(2) as pool:
            srun = pool.submit(
                site.run, "srun", "-N4", "--comment=pyenv:demo", *step[2:], timeout=200
            )
            salloc = pool.submit(
                site.run, "salloc", "-N4", "--comment=pyenv:demo", *step, timeout=200
            )
            done = site.ended(job, limit=200)
            outputs = [done.output, srun.result().stdout, salloc.result().stdout]
    for output in outputs:
        prefixes = Ended(0, "", "", output).prefixes()
        assert sorted(prefixes) == list(NODES), output
        assert all(p.startswith(STORE) for found in prefixes.values() for p in found), output
        assert "stager: " not in output
    assert site.settled() == idle()


def test_a_store_in_the_jobs_own_tmp_is_told(
    site: Site, reconfigured: Callable[[str], None]
) -> None:
    reconfigured("private-tmp")
    with site.configured("store: /tmp/stager-{uid}"):
        done = site.batch(SHOW, "-w", "n2", comment="pyenv:demo")
        strict = site.batch("echo ran", "-w", "n2", comment="pyenv:demo?strict", check="FAILED")
        doctor = site.cluster.exec("n2", "root", [f"{BIN}/stager", "doctor"], check=False)
    (line,) = done.told()
    reason = (
        r"/tmp/stager-20001/envs/\w+ cannot be seen in this job \(private /tmp\?\);"
        r" your administrator: stager doctor"
    )
    said = f"stager: n2: not staged, running the original {ORIGINAL}: {reason}"
    assert re.fullmatch(said, line), line
    refused(strict, reason)
    assert done.prefixes() == {"n2": {ORIGINAL}}
    assert "/var/lib/stager/{uid}" in doctor.stdout
    assert site.settled() == idle()
