"""Jobs on the test cluster whose ranks import numpy from an environment on metafs.

All of the users' homes lies on metafs, on the nodes of the job: the environment, the repository of
packed ones, the configuration, ``~/.local``, the working directory. The login node has the real
directory; there everything is made and packed. A job is measured from its submission on, as one
whole: what it asks for. (How long each step of a start takes: ``benchmarks/scale/rig.py``.)
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace

from benchmarks.ledger import Ledger
from benchmarks.metafs import Metafs
from benchmarks.settings import NONE, Settings
from environments import VENV, wheels
from slurm.site import BIN, Site

HOME = "/home/alice"
ENVIRONMENT = f"{HOME}/envs/measured"

# Printed in one piece: lines of ranks must not mix.
_IMPORT = """
import time, {modules}
import os, sys
sys.stdout.write(" ".join(
    (os.environ["SLURMD_NODENAME"], sys.prefix, str(time.monotonic()))) + chr(10))
"""


@dataclass(frozen=True)
class Started:
    """What it took until the last rank had imported.

    Attributes:
        submitted: the moment (CLOCK_MONOTONIC).
        seconds: from then on, without the dilation.
        ledger: what was asked meanwhile.
        prefixes: where the ranks' modules came from.
        ranks: how many there were.
    """

    submitted: float
    seconds: float
    ledger: Ledger
    prefixes: frozenset[str]
    ranks: int


def make_environment(site: Site, *requirements: str) -> None:
    """Make an environment of alice's from wheels, and pack it in both formats."""
    install = [f"{VENV}/bin/uv", "pip", "install", "--quiet", "--offline", "--no-cache"]
    found = wheels(*requirements, version=site.cluster.python())
    install += ["--no-index", "--find-links", str(found), "--link-mode=copy"]
    install += ["--compile-bytecode", "--python", ENVIRONMENT, *requirements]
    script = f"""
        /usr/bin/python3 -m venv --without-pip {ENVIRONMENT}
        {shlex.join(install)}
        for format in squashfs tar.zst; do
            {BIN}/stager pack --format $format --name measured-$format {ENVIRONMENT}
        done
    """
    site.shell("alice", script)


@contextlib.contextmanager
def mounted(site: Site, *nodes: str, settings: Settings = NONE) -> Iterator[Metafs]:
    """The homes by way of metafs on these nodes; their clients know nothing yet."""
    pids = {node: site.cluster.pid(node) for node in nodes}
    home = site.cluster.state / "home"
    with Metafs(home, "/home", pids, replace(settings, callers=not settings.delays)) as shared:
        yield shared


def start(
    site: Site,
    shared: Metafs,
    way: str,
    *,
    ref: str = "measured-squashfs",
    ranks: int = 2,
    python: str = "python -P",
    nodes: tuple[str, ...] = (),
) -> Started:
    """Run a job on all nodes that have metafs.

    Args:
        way: ``direct``, ``hook``, ``stage-run`` or ``sbcast``; ``empty`` imports nothing of the
            environment.
        ref: the packed environment.
        ranks: on each node.
        python: with ``-P`` it does not look for modules in the working directory.
        nodes: fewer of the nodes.
    """
    nodes = nodes or shared.nodes
    importing = f"{python} -c {shlex.quote(_IMPORT.format(modules='numpy'))}"
    body = {
        "empty": f"srun /usr/bin/python3 -I -c {shlex.quote(_IMPORT.format(modules='sys'))}",
        "direct": f". {ENVIRONMENT}/bin/activate\nsrun {importing}",
        "hook": f"srun {importing}",
        "sbcast": f'eval "$({BIN}/stager activate --via sbcast {ref})"\nsrun {importing}',
        "stage-run": f"srun {BIN}/stage-run --env {ref} {importing}",
    }[way]
    arguments = [f"-N{len(nodes)}", f"--ntasks-per-node={ranks}", "--exclusive"]
    arguments += ["-w", ",".join(nodes), "-D", HOME, "-o", "/tmp/job.%j"]
    if way == "hook":
        arguments.append(f"--comment=pyenv:{ref}")
    submitted = shared.mark()
    job = site.cluster.sbatch(f"#!/bin/sh\n{body}\n", args=arguments)
    state = site.cluster.wait(job, limit=600)
    output = site.cluster.read_file(nodes[0], f"/tmp/job.{job}")
    lines = [line.split() for line in output.splitlines()]
    if state != "COMPLETED" or len(lines) != len(nodes) * ranks:
        raise AssertionError(f"job {job} is {state}:\n{output}")
    last = max(float(moment) for _, _, moment in lines)
    site.settled()
    return Started(
        submitted=submitted,
        seconds=(last - submitted) / shared.dilation,
        ledger=shared.ledger(submitted).between(submitted, last),
        prefixes=frozenset(prefix for _, prefix, _ in lines),
        ranks=len(lines),
    )
