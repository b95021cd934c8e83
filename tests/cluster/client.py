"""The ``cluster`` command as a Python class. Everything needs root."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

COMMAND = Path(__file__).resolve().parent / "cluster"
STATE = Path("/var/tmp/stager-cluster")
"""Where the command keeps its state when nothing else is said."""

# scontrol(1), "JOB STATE CODES": those that a job never leaves.
FINAL_STATES = frozenset(
    ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY")
    + ("PREEMPTED", "REVOKED", "TIMEOUT")
)


class ClusterError(Exception):
    """A command failed that was expected to succeed; the message has its output."""


class Cluster:
    """One cluster; hosts are called ``ctl`` (controller and login node), ``n1``, ``n2`` ...

    Several clusters may be up on a machine if their state directories differ. Methods raise
    :class:`ClusterError` where the command fails, and :class:`subprocess.TimeoutExpired` where it
    takes longer than `timeout` seconds.
    """

    def __init__(self, state: Path = STATE) -> None:
        self.state = state

    def up(self, **settings: str | int) -> None:
        """Start the cluster; settings as the command has them, but in lower case."""
        self._command("up", *_assignments(settings))

    def down(self) -> None:
        """End all its processes and remove what it made; does nothing if it is not up."""
        self._command("down")

    def reconfigure(self, **settings: str | int) -> None:
        """Change settings of Slurm (an empty string unsets one) and restart its daemons."""
        self._command("reconfigure", *_assignments(settings))

    def stop(self, *hosts: str) -> None:
        """Stop the Slurm daemon of each host."""
        self._command("stop", *hosts)

    def start(self, *hosts: str) -> None:
        """Start the Slurm daemon of each host and wait until it answers."""
        self._command("start", *hosts)

    def reboot(self, *nodes: str, keep: bool = False) -> None:
        """Reboot nodes: no process stays, nothing in /run and /tmp (unless `keep`) and /dev/shm."""
        self._command("reboot", *(["-k"] if keep else []), *nodes)

    def fuse(self, *nodes: str, shown: bool) -> None:
        """Show or hide /dev/fuse on the nodes."""
        self._command("fuse", "on" if shown else "off", *nodes)

    def undrain(self) -> None:
        """Resume all nodes that are drained or down."""
        self._command("undrain")

    def logs(self, *hosts: str) -> str:
        """The last lines of the daemons' logs, of all hosts if none is named."""
        return self._command("logs", *hosts).stdout

    def exec(
        self,
        node: str,
        user: str,
        argv: Sequence[str],
        *,
        input: str | None = None,
        check: bool = True,
        timeout: float = 300,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a host, in the user's home, with a login's plain environment.

        It ends with this call, also when the time is up; what it started in the background stays.
        """
        arguments = ["-n", node, "-u", user, "--", *argv]
        return self._command("exec", *arguments, input=input, check=check, timeout=timeout)

    def pid(self, host: str) -> int:
        """A host's process 1, by the machine's numbers: its namespaces are the host's."""
        return int((self.state / "hosts" / host / "init").read_text().split()[0])

    def python(self, host: str = "ctl") -> str:
        """The version of a host's own Python, as in ``3.11``."""
        code = "import sys; print(*sys.version_info[:2], sep='.')"
        return self.exec(host, "root", ["/usr/bin/python3", "-c", code]).stdout.strip()

    def read_file(self, node: str, path: str | os.PathLike[str]) -> str:
        """The text of a file as root on that host sees it."""
        return self.exec(node, "root", ["cat", "--", os.fspath(path)]).stdout

    def node_states(self) -> dict[str, str]:
        """Node to state, as in ``{"n1": "idle", "n2": "drained"}`` (sinfo's ``%T``)."""
        return self._sinfo("%T")

    def drain_reasons(self) -> dict[str, str]:
        """Node to reason, of the nodes that are drained, draining or down."""
        return self._sinfo("%E", "-t", "drain,down")

    def sbatch(self, script: str, user: str = "alice", args: Sequence[str] = ()) -> int:
        """Submit a batch script given as text; returns the job's id."""
        done = self.exec("ctl", user, ["sbatch", "--parsable", *args], input=script)
        return int(done.stdout.partition(";")[0])

    def wait(self, job: int, *, limit: float = 120) -> str:
        """The state of a job (``COMPLETED``, ``FAILED`` ...) after its last Epilog.

        Raises :class:`TimeoutError`, with what Slurm says about the job, after `limit` seconds.
        """
        end = time.monotonic() + limit
        while True:
            shown = self.exec("ctl", "root", ["scontrol", "show", "job", "-o", str(job)]).stdout
            found = re.search(r" JobState=(\w+)", shown)  # no comment can come before it
            if found and found[1] in FINAL_STATES:
                return found[1]
            if time.monotonic() > end:
                raise TimeoutError(f"job {job} has not ended within {limit:g} s: {shown}")
            time.sleep(0.2)

    def _sinfo(self, column: str, *options: str) -> dict[str, str]:
        argv = ["sinfo", "--noheader", "--Node", "--format", f"%N|{column}", *options]
        lines = self.exec("ctl", "root", argv).stdout.splitlines()
        return {node: value.strip() for node, _, value in (line.partition("|") for line in lines)}

    def _command(
        self,
        *arguments: str,
        input: str | None = None,
        check: bool = True,
        timeout: float = 600,
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [str(COMMAND), *arguments],
            env={**os.environ, "CLUSTER_STATE": str(self.state)},
            input=input or "",  # never the caller's own standard input
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check and done.returncode != 0:
            raise ClusterError(
                f"cluster {' '.join(arguments)}: status {done.returncode}\n"
                f"{done.stdout}{done.stderr}"
            )
        return done


def _assignments(settings: dict[str, str | int]) -> list[str]:
    return [f"{name.upper()}={value}" for name, value in settings.items()]
