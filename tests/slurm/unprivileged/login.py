"""What a user without rights does on a cluster, and what the tests look at."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Callable

from cluster import Cluster
from environments import REPO, VENV, wheels

USER, HOME = "alice", "/home/alice"
NODES = ("n1", "n2", "n3", "n4")
ORIGINAL = f"{HOME}/envs/science"
STAGE_RUN, STAGER = f"{HOME}/tools/bin/stage-run", f"{HOME}/tools/bin/stager"
STORE = "/tmp/stager-20001"  # the default, with the uid that the cluster gives alice
SHOW = f"{HOME}/show.py"

_SHOW = """\
import os, sys
import numpy
job = [os.environ.get(name, "-") for name in ("SLURMD_NODENAME", "SLURM_PROCID")]
print("rank", *job, sys.prefix, numpy.__file__.startswith(sys.prefix + "/"), flush=True)
"""
# examples/slurm/where.py prints the same, and its arguments where we tell about numpy.
_RANK = re.compile(r"^rank (\S+) (\S+) (/\S+)(?: (.*))?$", re.MULTILINE)


class Login:
    """Alice, logged in on ``ctl``: her tools and her environment are in the shared home.

    The environment's original can only be seen on the login node, unless a test shows it.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.home = cluster.state / "home" / USER

    # -- her commands

    def run(self, *argv: str, check: bool = True, on: str = "ctl", limit: float = 120) -> str:
        """Standard output of a command, then its standard error."""
        done = self.cluster.exec(on, USER, argv, check=check, timeout=limit)
        return done.stdout + done.stderr

    def status(self, *argv: str) -> tuple[int, str]:
        """Exit status and output."""
        done = self.cluster.exec("ctl", USER, argv, check=False, timeout=120)
        return done.returncode, done.stdout + done.stderr

    def batch(
        self, script: str, *options: str, expect: str = "COMPLETED", limit: float = 120
    ) -> str:
        """What a batch job wrote, after it has ended in the state `expect`."""
        job = self.submit(script, *options)
        state = self.cluster.wait(job, limit=limit)
        text = self.output(job)
        assert state == expect, f"{state}\n{text}"
        return text

    def submit(self, script: str, *options: str) -> int:
        text = script if script.startswith("#!") else f"#!/bin/bash\n{script}"
        args = ["--output=job-%j.out", *options]
        return self.cluster.sbatch(text, USER, args)

    def output(self, job: int) -> str:
        return (self.home / f"job-{job}.out").read_text()

    def sh(self, node: str, script: str, *, root: bool = False) -> str:
        """Standard output of a shell script on a node, outside of any job."""
        who = "root" if root else USER
        return self.cluster.exec(node, who, ["sh", "-c", script]).stdout

    # -- what is there

    def forget(self, *nodes: str) -> None:
        """Make the nodes cold: no store, no mount, no session."""
        script = f"""
            pkill -KILL -u {USER} squashfuse
            grep -o '{STORE}/envs/[0-9a-f]*' /proc/mounts | xargs -r -n 1 umount -l
            rm -rf --one-file-system {STORE}
        """
        for node in nodes or NODES:
            self.sh(node, script, root=True)

    def hide_original(self, *, hidden: bool = True, nodes: Sequence[str] = NODES) -> None:
        """Cover the original on the nodes with an empty file system, or take that away."""
        action = (
            f"mount -t tmpfs -o ro,size=4k hidden {ORIGINAL}" if hidden else f"umount {ORIGINAL}"
        )
        for node in nodes:
            self.sh(node, action, root=True)

    def count(self, pattern: str, node: str) -> int:
        """How many processes on a node have a command line that matches."""
        done = self.cluster.exec(node, "root", ["pgrep", "-c", "-f", pattern], check=False)
        return int(done.stdout)

    def mounts(self, node: str) -> int:
        return int(self.sh(node, f"grep -c ' {STORE}/envs/' /proc/mounts || true"))

    def kill_servers(self, *nodes: str) -> None:
        """What a cgroup does to the FUSE servers of a step that ends."""
        for node in nodes or NODES:
            self.sh(node, f"pkill -KILL -u {USER} squashfuse; true", root=True)

    def install(self) -> None:
        """Put stager, a Python with numpy and mpi4py, and the test program into the home."""
        names = ("numpy", "mpi4py", "PyYAML", "zstandard", "rich", "isal")
        shutil.copytree(wheels(*names, version=self.cluster.python()), self.home / "wheels")
        (built,) = (REPO / ".build" / "wheel").glob("*.whl")
        shutil.copy(built, self.home / "wheels")
        shutil.copy(VENV / "bin" / "uv", self.home / "uv")
        (self.home / "show.py").write_text(_SHOW)
        uv = f"{HOME}/uv pip install --quiet --offline --no-index --find-links {HOME}/wheels"
        uv += f" --cache-dir {HOME}/cache --link-mode copy --compile-bytecode"
        self.sh("ctl", f"python3 -m venv --without-pip {HOME}/tools")
        self.sh("ctl", f"{uv} --python {HOME}/tools stager")
        self.sh("ctl", f"python3 -m venv --without-pip {ORIGINAL}")
        self.sh("ctl", f"{uv} --python {ORIGINAL} numpy mpi4py")
        self.sh("ctl", f"{STAGER} pack {ORIGINAL}")
        self.hide_original()

    # -- watching

    def trace(self, node: str) -> Trace:
        """Follow everything that slurmd starts on a node, from now on."""
        return Trace(self, node)


class Trace:
    """Programs started and files renamed by a node's jobs: strace attached to its slurmd.

    (A user's own strace would take the set-user-id bit from fusermount3.)
    """

    def __init__(self, login: Login, node: str) -> None:
        self.place = login.cluster.state / "trace"
        self.place.mkdir()
        slurmd = _slurmd(login, node)
        argv = ["strace", "-ff", "-qq", "-s", "400", "-e", "signal=none", "-p", str(slurmd)]
        argv += ["-e", "trace=execve,rename,renameat,renameat2", "-o", str(self.place / "t")]
        self.strace = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
        status, wanted = Path(f"/proc/{slurmd}/status"), f"TracerPid:\t{self.strace.pid}\n"
        until("strace", lambda: wanted in status.read_text())

    def end(self) -> list[str]:
        """Detach; the calls that succeeded, one line each."""
        self.strace.send_signal(signal.SIGINT)
        self.strace.wait()
        calls = "".join(path.read_text() for path in self.place.iterdir())
        shutil.rmtree(self.place)
        return [line for line in calls.splitlines() if line.endswith(" = 0")]


def _slurmd(login: Login, node: str) -> int:
    """The slurmd of a node, by the number it has on this machine."""
    init = (login.cluster.state / "hosts" / node / "init").read_text().split()[0]
    namespace = os.readlink(f"/proc/{init}/ns/pid")
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            own = os.readlink(process / "ns" / "pid") == namespace
            if own and (process / "comm").read_text() == "slurmd\n":
                found.append(int(process.name))
    return min(found)


def ranks(output: str) -> list[tuple[str, str, str]]:
    """Node, rank and ``sys.prefix`` that each rank has shown, sorted.

    Raises:
        AssertionError: a rank imported numpy from somewhere else than its prefix.
    """
    found = _RANK.findall(output)
    assert "False" not in [own for *_, own in found], output
    return sorted((node, rank, prefix) for node, rank, prefix, _ in found)


def assert_staged(output: str, expected: int, nodes: Sequence[str] = NODES) -> None:
    """Every rank ran from the store, and they were so many, on all of these nodes."""
    found = ranks(output)
    assert len(found) == expected, output
    assert {node for node, _, _ in found} == set(nodes), output
    assert all(prefix.startswith(f"{STORE}/envs/") for _, _, prefix in found), output


def until(what: str, condition: Callable[[], bool], limit: float = 60) -> None:
    """Wait for a condition; AssertionError when it takes too long."""
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, f"gave up waiting: {what}"
        time.sleep(0.1)


def quote(*argv: str) -> str:
    return shlex.join(argv)
