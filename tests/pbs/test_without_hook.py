"""``stage-run`` in PBS jobs that no hook has prepared, on several hosts.

What stands in is PBS: the variables and the list of nodes of a job, as recorded, and ``pbsdsh``,
which hands on no variables and lets its tasks end with the job.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cluster.client import ClusterError
from slurm.site import BIN, Site, until

from .mom import SHOW

pytestmark = pytest.mark.usefixtures("nothing_is_left", "hidden")

TREES = "/var/lib/stager/20001/envs/"
NODES = ("n1", "n2", "n3")

# Asks whoever has this job to run a command on the node of a line, and waits until it has ended.
PBSDSH = """#!/bin/sh
[ "$1" = -n ] && [ "$3" = -- ] || exit 2
line=$2
shift 3
request=$(mktemp "$HOME/tm/XXXXXX")
{ echo "$line"; for word; do printf '%s\\n' "$word"; done; } >"$request.new"
mv "$request.new" "$request.task"
until [ -e "$request.over" ]; do sleep 0.1; done
"""


@dataclass
class Job:
    """A job of one line for each node; its first node is ``n1``."""

    site: Site
    nodes: Sequence[str]
    id: str = "5.head"
    threads: list[threading.Thread] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def directory(self) -> Path:
        return self.site.home("alice") / "tm"

    def environ(self, line: int, task: str) -> dict[str, str]:
        environ = {
            "PATH": f"{BIN}:/home/alice/tm/bin:/usr/bin:/bin",
            "HOME": "/home/alice",
            "PBS_JOBID": self.id,
            "PBS_TASKNUM": task,
            "PBS_NODENUM": str(line),
            "PBS_ENVIRONMENT": "PBS_BATCH",
        }
        if line == 0:
            environ["PBS_NODEFILE"] = "/home/alice/tm/nodes"
        return environ

    def task(self, line: int, command: Sequence[str], number: str = "00000001", **more: str) -> str:
        """Run something in the job as pbs_mom would: in a session that ends with it."""
        environ = {**self.environ(line, number), **more}
        pairs = [f"{key}={value}" for key, value in environ.items()]
        argv = ["setsid", "-w", "env", "-i", *pairs, *command]
        return self.site.cluster.exec(self.nodes[line], "alice", argv).stdout

    def serve(self) -> None:
        """Do what tm does for pbsdsh."""
        while not self.stop.wait(0.1):
            for request in self.directory.glob("*.task"):
                line, *command = request.read_text().splitlines()
                request.unlink()
                thread = threading.Thread(target=self._run, args=(request, int(line), command))
                thread.start()
                self.threads.append(thread)

    def _run(self, request: Path, line: int, command: list[str]) -> None:
        pidfile = f"/home/alice/tm/{request.stem}.{self.nodes[line]}"
        script = f'echo $$ >{pidfile}; exec "$@"'
        with suppress(ClusterError):  # it was ended with the job
            self.task(line, ["sh", "-c", script, "sh", *command], f"{line}0000002")
        request.with_suffix(".over").touch()

    def end(self) -> None:
        """What pbs_mom does when the script has ended: kill every task's session."""
        self.stop.set()
        for node in set(self.nodes):
            script = "for one in *.$(hostname); do read -r p <$one && kill -9 -$p; done || :"
            self.site.shell("alice", f"cd tm; {script}", node)
        for thread in self.threads:
            thread.join()


@pytest.fixture
def _directory(site: Site) -> Iterator[None]:
    directory = site.home("alice") / "tm"
    site.shell("alice", "mkdir -p tm/bin")
    command = directory / "bin/pbsdsh"
    command.write_text(PBSDSH)
    command.chmod(0o755)
    for node in NODES:  # the hook makes it where there is one, an administrator where there is none
        site.root(node, "install", "-d", "-m", "0700", "-o", "alice", "/var/lib/stager/20001")
    yield
    site.shell("alice", "rm -rf tm")


@contextmanager
def job(site: Site, nodes: Sequence[str]) -> Iterator[Job]:
    found = Job(site, nodes)
    (found.directory / "nodes").write_text("".join(f"{node}\n" for node in nodes))
    serving = threading.Thread(target=found.serve)
    serving.start()
    try:
        yield found
    finally:
        found.end()
        serving.join()
        # The watchers see that, unmount, and give up what the job held.
        for node in set(nodes):
            until(lambda node=node: not mounts(site, node) and not site.claims(node))  # type: ignore[misc]


def mounts(site: Site, node: str) -> str:
    return site.root(
        node, "sh", "-c", "grep squashfuse /proc/mounts | grep /var/lib/stager/ || true"
    )


@pytest.mark.usefixtures("_directory")
def test_a_script_of_three_nodes(site: Site) -> None:
    """It is staged on all of them before the command starts, once for each."""
    with job(site, ("n1", "n1", "n2", "n3")) as mine:
        shown = mine.task(0, ["stage-run", "--env", "science", "python", "-c", SHOW])
        node, prefix, _ = shown.split()
        assert node == "n1" and prefix.startswith(TREES)
        for line in (2, 3):
            path = f"{prefix}/bin/python"
            assert mine.task(line, [path, "-c", SHOW], "20000003").split()[1] == prefix
        # A second command finds all that; nothing is asked of pbsdsh again.
        before = len(mine.threads)
        mine.task(0, ["stage-run", "--env", "science", "mpirun", "--version"], PATH=f"{BIN}:/bin")
        assert len(mine.threads) == before == 3


@pytest.mark.usefixtures("_directory")
def test_tasks_stage_where_they_run(site: Site) -> None:
    with job(site, ("n1", "n2")) as mine:
        for line in (0, 1):
            for number in ("0000002", "0000003"):
                command = ["stage-run", "--env", "science", "python", "-c", SHOW]
                shown = mine.task(line, command, f"{line}{number}")
                assert shown.split()[1].startswith(TREES)


@pytest.mark.usefixtures("_directory")
def test_the_alias_names_the_environment(site: Site) -> None:
    with job(site, ("n1",)) as mine:
        shown = mine.task(0, ["stage-run", "python", "-c", SHOW], PYENV="science")
        assert shown.split()[1].startswith(TREES)


@pytest.mark.usefixtures("_directory")
def test_one_of_three_nodes_cannot(site: Site) -> None:
    """Then none is used; there is no original here, so that is an error."""
    site.root("n3", "chmod", "0770", "/var/lib/stager/20001")
    try:
        with job(site, ("n1", "n2", "n3")) as mine, pytest.raises(ClusterError) as raised:
            mine.task(0, ["stage-run", "--env", "science", "python", "-c", SHOW])
        assert "1 of 3 nodes cannot stage: n3" in str(raised.value)
    finally:
        site.root("n3", "chmod", "0700", "/var/lib/stager/20001")


@pytest.mark.usefixtures("_directory")
def test_a_node_where_nobody_could_clear_up_says_so(site: Site) -> None:
    """The others would wait for its answer until the limit, which is minutes."""
    site.root("n3", "mount", "-t", "tmpfs", "-o", "ro,size=4k", "full", "/tmp")
    try:
        with job(site, ("n1", "n2", "n3")) as mine, pytest.raises(ClusterError) as raised:
            mine.task(0, ["stage-run", "--env", "science", "python", "-c", SHOW])
        said = "1 of 3 nodes cannot stage: n3: cannot leave somebody here who clears up after the"
        assert f"{said} job: Read-only file system" in str(raised.value)
    finally:
        site.root("n3", "umount", "/tmp")


@pytest.mark.usefixtures("_directory")
def test_nothing_is_left_by_ten_jobs(site: Site) -> None:
    for _ in range(10):
        with job(site, ("n1",)) as mine:
            mine.task(0, ["stage-run", "--env", "science", "python", "-c", "import science"])


@pytest.mark.usefixtures("_directory")
def test_what_status_tells(site: Site) -> None:
    with job(site, ("n1",)) as mine:
        script = f"stage-run --env science python -c 'pass'; {BIN}/stager status --json"
        (tree,) = json.loads(mine.task(0, ["sh", "-c", script]))["trees"]
        assert list(tree["leases"]) == [next(one for one in tree["leases"] if "pbs-5.head" in one)]
