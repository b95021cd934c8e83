"""The example for a cluster with hooks. It comes last: other tests count what alice has."""

from __future__ import annotations

import os
import shutil

from environments import REPO

from .site import NODES, STORE, Site


def test_the_directive_alone(site: Site) -> None:
    site.make_environment("alice", "science")
    place = site.home("alice") / "slurm"
    shutil.copytree(REPO / "examples" / "slurm", place)
    os.chown(place, 20001, 20001)  # the job's output goes there
    site.shell("alice", "cd slurm; sbatch --wait --output=directive.out directive.sh")
    lines = (place / "directive.out").read_text().splitlines()
    found = sorted((node, rank, prefix) for _, node, rank, prefix in map(str.split, lines))
    assert [rank for _, rank, _ in sorted(found, key=lambda one: int(one[1]))] == list("01234567")
    assert {node for node, _, _ in found} == set(NODES)
    assert all(prefix.startswith(f"{STORE}/20001/envs/") for _, _, prefix in found)
