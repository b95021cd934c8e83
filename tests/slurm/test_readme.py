"""The README's words for a site and for its users, as they are written there, on a cluster."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator

import pytest

from cluster.client import Cluster
from environments import REPO

from .site import NODES

HOSTS = ("ctl", *NODES)
STORE = "/local/stager"

# On the cluster, what a package manager or an administrator changes is each host's own.
_OWN = """
for place in /usr/bin /usr/lib/systemd/system /usr/lib/tmpfiles.d; do
    mkdir -p "/run/own$place/upper" "/run/own$place/work"
    mount -t overlay own -o "lowerdir=$place,upperdir=/run/own$place/upper" \\
        -o "workdir=/run/own$place/work" "$place"
done
"""
_TRAIN = "import os, sys, torch\nprint(os.environ['SLURMD_NODENAME'], sys.prefix, torch.__file__)\n"


def blocks(heading: str) -> list[str]:
    """The blocks of code in a section of the README."""
    (section,) = re.findall(
        rf"^## {heading}\n(.*?)^## ", (REPO / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    found = re.findall(r"(?:^    .*\n|^\n(?=    ))+", section, re.MULTILINE)
    return [textwrap.dedent(block).strip() + "\n" for block in found]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster where only what the README says has been done."""
    cluster = Cluster(tmp_path_factory.mktemp("readme") / "state")
    try:
        cluster.up(prolog_flags="", local_dirs="/local")
        for host in HOSTS:
            cluster.exec(host, "root", ["sh", "-ec", _OWN])
        everywhere, once = (block.splitlines(keepends=True) for block in blocks("For a site"))
        assert everywhere.pop(0).startswith("apt install ")  # they are there, and so is no network
        assert once.pop().startswith("stager doctor ")
        for host in HOSTS:
            cluster.exec(host, "root", ["sh", "-ec", f"cd {REPO}\n{''.join(everywhere)}"])
        cluster.exec("ctl", "root", ["sh", "-ec", "".join(once)])
        yield cluster
    finally:
        cluster.down()


@pytest.fixture(scope="module")
def packed(cluster: Cluster) -> str:
    """What the README says is done once; returns what was printed."""
    script = f"""
        python3 -m venv --without-pip ~/envs/torch
        site=$(echo ~/envs/torch/lib/python3*/site-packages)
        echo >"$site/torch.py"
        printf %s "{_TRAIN}" >~/train.py
    """
    cluster.exec("ctl", "alice", ["sh", "-ec", script])
    done = cluster.exec("ctl", "alice", ["sh", "-ec", blocks("In a job")[0]])
    cluster.exec("ctl", "alice", ["mv", "envs/torch", "envs/away"])
    return done.stdout + done.stderr


def test_doctor_is_content(cluster: Cluster) -> None:
    said = cluster.exec("n1", "root", ["stager", "doctor"]).stdout
    assert STORE in said


def test_the_packed_environment_verifies(packed: str) -> None:
    assert "published `torch`" in packed


def test_the_job_script(cluster: Cluster, packed: str) -> None:
    script = blocks("In a job")[1]
    assert "--nodes=16 --ntasks-per-node=8" in script
    script = script.replace("--nodes=16 --ntasks-per-node=8", "--nodes=4 --ntasks-per-node=2")
    _runs_staged(cluster, script)


def test_a_step(cluster: Cluster, packed: str) -> None:
    text = " ".join((REPO / "README.md").read_text().split())
    (command,) = re.findall(r"`(srun stage-run .*?)`", text)
    _runs_staged(cluster, f"#!/bin/sh\n#SBATCH --nodes=4 --ntasks-per-node=2\n{command}\n")


def test_the_directive(cluster: Cluster, packed: str) -> None:
    line = blocks("In a job")[2].strip()
    script = f"#!/bin/sh\n#SBATCH --nodes=4 --ntasks-per-node=2\n{line}\nsrun python train.py\n"
    _runs_staged(cluster, script)


def test_what_slurm_would_miss_is_not_uninstalled(cluster: Cluster) -> None:
    uninstall = [f"{REPO}/deploy/install", "--uninstall"]
    refused = cluster.exec("n4", "root", uninstall, check=False)
    assert refused.returncode == 1
    assert "Slurm drains a node whose Prolog is not there" in refused.stderr
    cluster.exec("n4", "root", ["test", "-x", "/usr/libexec/stager/slurm/prolog"])


def _runs_staged(cluster: Cluster, script: str) -> None:
    job = cluster.sbatch(script, "alice", ["--output=/home/alice/job.out"])
    state = cluster.wait(job)
    output = (cluster.state / "home" / "alice" / "job.out").read_text()
    assert state == "COMPLETED", output
    lines = [line.split() for line in output.splitlines()]
    assert sorted(line[0] for line in lines) == sorted([*NODES, *NODES]), output
    for _, prefix, module in lines:
        assert prefix.startswith(f"{STORE}/20001/envs/")
        assert module.startswith(f"{prefix}/lib/")
