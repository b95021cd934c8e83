"""The test cluster is what it claims to be, and goes away without a trace.

With ROOTFS in the environment (see README.md) this tests another Slurm release.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .client import Cluster, ClusterError

pytestmark = pytest.mark.slurm

NODES = ["n1", "n2", "n3", "n4"]
BOOT_ID = "/proc/sys/kernel/random/boot_id"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster") / "state")
    network = machine_interfaces()
    try:
        cluster.up()
        assert machine_interfaces() == network
        yield cluster
    finally:
        cluster.down()


def machine_interfaces() -> set[str]:
    return {path.name for path in Path("/sys/class/net").iterdir()}


def namespaces_of(process: Path) -> set[str]:
    """The namespaces of a process; none if it ended or has only the machine's own."""
    found = set()
    for name in ("mnt", "net", "pid", "uts", "ipc"):
        try:
            link = os.readlink(process / "ns" / name)
        except OSError:
            continue
        if link != os.readlink(f"/proc/self/ns/{name}"):
            found.add(link)
    return found


def namespaces_in_use() -> set[str]:
    return set().union(*map(namespaces_of, Path("/proc").glob("[0-9]*")))


def test_all_nodes_are_idle(cluster: Cluster) -> None:
    assert cluster.node_states() == dict.fromkeys(NODES, "idle")
    assert cluster.drain_reasons() == {}


def test_srun_runs_once_on_every_node(cluster: Cluster) -> None:
    done = cluster.exec("ctl", "alice", ["srun", "-N4", "hostname"])
    assert sorted(done.stdout.split()) == NODES


def test_mpi_ranks_of_all_nodes_are_started(cluster: Cluster) -> None:
    job = cluster.sbatch("#!/bin/sh\nmpirun hostname >ranks\n", args=["-N4"])
    assert cluster.wait(job) == "COMPLETED"
    assert sorted(cluster.read_file("ctl", "/home/alice/ranks").split()) == NODES


def test_sbatch_and_the_state_of_a_job(cluster: Cluster) -> None:
    good = cluster.sbatch("#!/bin/sh\nid -un >who\n", user="bob", args=["-N2"])
    bad = cluster.sbatch("#!/bin/sh\nexit 3\n", user="bob")
    assert cluster.wait(good) == "COMPLETED"
    assert cluster.wait(bad) == "FAILED"
    assert cluster.read_file("n4", "/home/bob/who") == "bob\n"


def test_wait_tells_about_a_job_that_does_not_end(cluster: Cluster) -> None:
    job = cluster.sbatch("#!/bin/sh\nexit\n", args=["--hold"])
    with pytest.raises(TimeoutError, match="JobHeldUser"):
        cluster.wait(job, limit=0)
    cluster.exec("ctl", "alice", ["scancel", str(job)])
    assert cluster.wait(job) == "CANCELLED"


def test_a_job_has_supplementary_groups(cluster: Cluster) -> None:
    done = cluster.exec("ctl", "alice", ["srun", "id", "-nG"])
    assert done.stdout.split() == ["alice", "project"]
    assert cluster.exec("n1", "bob", ["id", "-nG"]).stdout.split() == ["bob"]


@pytest.mark.parametrize("directory", ["/tmp", "/var/tmp", "/dev/shm", "/mnt/local"])
def test_a_users_node_local_directories(cluster: Cluster, directory: str) -> None:
    path = f"{directory}/whose"
    done = cluster.exec("ctl", "alice", ["srun", "-N4", "sh", "-c", f"hostname >{path}"])
    assert done.returncode == 0
    assert [cluster.read_file(node, path).strip() for node in NODES] == NODES
    # The controller is a host of its own, and the machine is none.
    assert cluster.exec("ctl", "alice", ["test", "-e", path], check=False).returncode == 1
    assert not Path(path).exists()


@pytest.mark.parametrize(
    "directory",
    ["/run", "/etc/stager", "/usr/lib/stager", "/usr/libexec/stager", "/var/lib/stager"],
)
def test_roots_node_local_directories(cluster: Cluster, directory: str) -> None:
    path = f"{directory}/only-here"
    cluster.exec("n1", "root", ["touch", path])
    seen = [cluster.exec(node, "bob", ["test", "-e", path], check=False) for node in NODES]
    assert [done.returncode for done in seen] == [0, 1, 1, 1]
    assert cluster.exec("n1", "alice", ["touch", f"{directory}/x"], check=False).returncode != 0
    assert not Path(path).exists()


def test_the_home_is_shared(cluster: Cluster) -> None:
    cluster.exec("n1", "alice", ["sh", "-c", "echo from n1 >note"])
    assert cluster.exec("n2", "alice", ["cat", "note"]).stdout == "from n1\n"


def test_a_node_sees_its_own_processes_and_network(cluster: Cluster) -> None:
    alone = cluster.exec("n1", "root", ["ls", "/sys/class/net"]).stdout.split()
    assert alone == ["eth0", "lo"]
    assert cluster.exec("n1", "root", ["pgrep", "-c", "slurmd"]).stdout == "1\n"


def test_an_unknown_host_user_or_setting_is_an_error(cluster: Cluster) -> None:
    with pytest.raises(ClusterError, match="host n9 is not up"):
        cluster.exec("n9", "root", ["true"])
    with pytest.raises(ClusterError, match="no such user: carol"):
        cluster.exec("n1", "carol", ["true"])
    with pytest.raises(ClusterError, match="not a setting: PROLOGUE"):
        cluster.reconfigure(prologue="/bin/true")


def test_squashfuse_as_a_user_and_without_fuse(cluster: Cluster) -> None:
    script = """
        set -e
        mkdir -p tree /tmp/mnt
        echo inside >tree/file
        mksquashfs tree image -noappend -quiet -no-progress >/dev/null
        squashfuse image /tmp/mnt
        cat /tmp/mnt/file
        fusermount3 -u /tmp/mnt
    """
    on_node = ["srun", "-w", "n2", "sh", "-c", script]
    assert cluster.exec("ctl", "alice", on_node).stdout == "inside\n"

    cluster.fuse("n2", shown=False)
    try:
        assert cluster.exec("ctl", "alice", on_node, check=False).returncode != 0
        assert cluster.exec("n1", "alice", ["sh", "-c", script]).stdout == "inside\n"
        cluster.reboot("n2")
        assert cluster.exec("n2", "alice", ["test", "-e", "/dev/fuse"], check=False).returncode
    finally:
        cluster.fuse("n2", shown=True)
    assert cluster.exec("ctl", "alice", on_node).stdout == "inside\n"


@pytest.mark.parametrize("keep", [False, True])
def test_reboot(cluster: Cluster, keep: bool) -> None:
    boot_ids = {node: cluster.read_file(node, BOOT_ID) for node in NODES}
    assert len(set(boot_ids.values())) == len(NODES)
    for path in ("/tmp/old", "/run/old", "/dev/shm/old", "/var/lib/stager/old"):
        cluster.exec("n3", "root", ["touch", path])
    cluster.exec("n3", "alice", ["sh", "-c", "sleep 600 >/dev/null 2>&1 &"])
    job = cluster.sbatch("#!/bin/sh\nsleep 600\n", args=["-w", "n3", "--no-requeue"])
    until_running = "until pgrep -x slurmstepd; do sleep 0.1; done"
    cluster.exec("n3", "root", ["sh", "-c", until_running], timeout=60)

    cluster.reboot("n3", keep=keep)

    after = cluster.read_file("n3", BOOT_ID)
    assert after not in boot_ids.values()
    assert cluster.exec("n3", "root", ["pgrep", "-u", "alice"], check=False).stdout == ""
    left = cluster.exec("n3", "root", ["find", "/tmp", "/run", "/dev/shm", "-name", "old"])
    assert left.stdout.split() == (["/tmp/old", "/run/old"] if keep else [])
    cluster.read_file("n3", "/var/lib/stager/old")  # a disk outlives a reboot
    assert cluster.wait(job) == "NODE_FAIL"
    assert cluster.exec("ctl", "alice", ["srun", "-w", "n3", "hostname"]).stdout == "n3\n"
    assert {node: cluster.read_file(node, BOOT_ID) for node in NODES} == {**boot_ids, "n3": after}


def test_a_failing_prolog_drains_its_node_until_undrain(cluster: Cluster) -> None:
    cluster.exec("n1", "root", ["sh", "-c", "printf '#!/bin/sh\\nexit 1\\n' >/mnt/local/prolog"])
    for node in NODES[1:]:
        cluster.exec(
            node, "root", ["sh", "-c", "printf '#!/bin/sh\\nexit 0\\n' >/mnt/local/prolog"]
        )
    for node in NODES:
        cluster.exec(node, "root", ["chmod", "755", "/mnt/local/prolog"])
    cluster.reconfigure(prolog="/mnt/local/prolog")
    try:
        job = cluster.sbatch("#!/bin/sh\nexit 0\n", args=["-w", "n1", "--no-requeue"])
        assert cluster.wait(job) == "CANCELLED"
        assert cluster.drain_reasons() == {"n1": "Prolog error"}
        assert cluster.exec("ctl", "alice", ["srun", "-N3", "hostname"]).returncode == 0
    finally:
        cluster.reconfigure(prolog="")
        cluster.undrain()
    assert cluster.exec("ctl", "alice", ["srun", "-w", "n1", "hostname"]).stdout == "n1\n"
    assert cluster.drain_reasons() == {}


def test_a_daemon_can_be_stopped_and_started(cluster: Cluster) -> None:
    cluster.stop("ctl", "n4")
    for host, daemon in (("ctl", "slurmctld"), ("n4", "slurmd")):
        assert cluster.exec(host, "root", ["pgrep", "-x", daemon], check=False).returncode == 1
    cluster.start("ctl", "n4")
    assert cluster.exec("ctl", "alice", ["srun", "-w", "n4", "hostname"]).stdout == "n4\n"


def test_ten_jobs_in_a_row_have_a_private_tmp(cluster: Cluster) -> None:
    cluster.reconfigure(private_tmp=1)
    try:
        for node in NODES:
            cluster.exec(node, "alice", ["touch", "/tmp/of-the-node"])
        script = "#!/bin/sh\ntest ! -e /tmp/of-the-node && touch /tmp/of-the-job\n"
        states = []
        for number in range(10):
            job = cluster.sbatch(script, args=["-w", NODES[number % len(NODES)]])
            states.append(cluster.wait(job))
        assert states == ["COMPLETED"] * 10
        for node in NODES:
            seen = cluster.exec(node, "root", ["ls", "/tmp"]).stdout.split()
            assert "of-the-node" in seen
            assert "of-the-job" not in seen
    finally:
        cluster.reconfigure(private_tmp="")
    cluster.exec("ctl", "alice", ["srun", "-N4", "test", "-e", "/tmp/of-the-node"])


def test_down_leaves_nothing(cluster: Cluster, tmp_path: Path) -> None:
    other = Cluster(tmp_path / "state")
    network = machine_interfaces()
    try:
        other.up(nodes=1, private_tmp=1)
        # In use when it goes down: a job in its own mount namespace, and a mount by a user in it.
        script = """#!/bin/sh
            mkdir tree /tmp/mnt
            mksquashfs tree image -quiet -no-progress
            squashfuse image /tmp/mnt && touch mounted
            sleep 600
        """
        other.sbatch(script)
        until_mounted = "until test -e mounted; do sleep 0.1; done"
        other.exec("ctl", "alice", ["sh", "-c", until_mounted], timeout=60)
        first = [
            Path("/proc") / (other.state / "hosts" / host / "init").read_text().split()[0]
            for host in ("ctl", "n1")
        ]
        hosts = set().union(*map(namespaces_of, first))
        assert len(hosts) == 10
        everyone = map(namespaces_of, Path("/proc").glob("[0-9]*"))
        namespaces = set().union(*(found for found in everyone if found & hosts))
        assert len(namespaces) > 10
    finally:
        other.down()

    # What is left stays. But the kernel gives the numbers of what is gone to whoever makes a
    # namespace next, such as another test run on this machine: those go again.
    until = time.monotonic() + 20
    while (left := namespaces & namespaces_in_use()) and time.monotonic() < until:
        time.sleep(0.1)
    assert not left
    assert str(other.state) not in Path("/proc/self/mountinfo").read_text()
    assert not other.state.exists()
    assert machine_interfaces() == network
    other.down()  # a second time does no harm
    # The first cluster still has what both have mounted their own directories on.
    assert sorted(cluster.exec("ctl", "alice", ["srun", "-N4", "hostname"]).stdout.split()) == NODES
    mounts = cluster.read_file("n1", "/proc/mounts")
    assert " /mnt/local " in mounts
