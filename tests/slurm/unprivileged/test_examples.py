"""The examples, as they are, with the original out of sight on the nodes."""

from __future__ import annotations

import os
import shutil

import pytest

from environments import REPO

from .login import HOME, NODES, STORE, Login, assert_staged, ranks

EXAMPLES = REPO / "examples" / "slurm"


@pytest.fixture(scope="module")
def user(login: Login) -> Login:
    """Alice with the examples, and with her tools on PATH."""
    place = login.home / "slurm"
    shutil.copytree(EXAMPLES, place)
    os.chown(place, 20001, 20001)  # the jobs' output goes there
    return login


@pytest.fixture(autouse=True)
def _cold(user: Login) -> None:
    user.forget()


def submit(user: Login, name: str, *options: str) -> str:
    """What all tasks of an example wrote, after it has ended well."""
    script = f"""
        cd slurm
        PATH={HOME}/tools/bin:$PATH
        rm -f {name}.*.out
        sbatch --wait --output={name}.%j.out {" ".join(options)} {name}
    """
    status, said = user.status("sh", "-c", script)
    outputs = sorted((user.home / "slurm").glob(f"{name}.*.out"))
    text = "".join(path.read_text() for path in outputs)
    assert status == 0, said + text
    return text


@pytest.mark.parametrize("name", ["wrapper.sh", "activate.sh", "mpi4py.sh"])
def test_all_ranks_of_all_nodes(user: Login, name: str) -> None:
    output = submit(user, name)
    before = 1 if name == "activate.sh" else 0
    assert_staged(output, before + 8)
    if name == "mpi4py.sh":
        (world,) = [line.split() for line in output.splitlines() if line.startswith("world")]
        assert world[1] == "8"
        assert len(world) == 3  # one prefix, the same everywhere


def test_array(user: Login) -> None:
    output = submit(user, "array.sh", "--nodelist=n2")
    assert_staged(output, 8, ["n2"])
    assert sorted(line.split()[4] for line in output.splitlines()) == list("01234567")


def test_heterogeneous_job(user: Login) -> None:
    output = submit(user, "hetjob.sh")
    assert len(ranks(output)) == 5
    nodes = {node for node, _, _ in ranks(output)}
    assert len(nodes) == 3
    assert_staged(output, 5, sorted(nodes))
    assert [user.mounts(node) for node in NODES] == [0, 0, 0, 0]


def test_mpi_ranks_stage_for_themselves(user: Login) -> None:
    # mpirun starts the ranks of its own node without Slurm, the others through one task of a step.
    script = f"mpirun {HOME}/tools/bin/stage-run --env science python slurm/mpi.py"
    output = user.batch(script, "-N4", "-n8", "--ntasks-per-node=2")
    assert_staged(output, 8)
    assert "world 8 " in output


def test_torchrun_as_far_as_it_goes_without_torch(user: Login) -> None:
    # torch is too large to install for a test; its launcher is looked for by the staged Python.
    script = f"cd slurm; PATH={HOME}/tools/bin:$PATH; sbatch --wait --output=torch.out torchrun.sh"
    status, _ = user.status("sh", "-c", script)
    assert status == 1
    lines = (user.home / "slurm" / "torch.out").read_text().splitlines()
    missing = "Error while finding module specification for 'torch.distributed.run'"
    pythons = [line.partition(":")[0] for line in lines if missing in line]
    assert len(pythons) == 2
    assert all(path.startswith(f"{STORE}/envs/") for path in pythons)
