"""A cluster with stager installed by ``deploy/install``, as an administrator would.

Tests change a node (its configuration, program, disks) and put it back; what belongs to a node
lies in a directory of the machine, see :meth:`Site.place`.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cluster.client import Cluster
from environments import REPO, VENV

HOOKS = "/usr/libexec/stager/slurm"
BIN = "/usr/libexec/stager/bin"
STORE = "/var/lib/stager"
SHARED = f"{STORE}/site"
"""The site's own store."""
APPS = "/home/apps"
"""What the site publishes, and its repository: root's."""
READABLE = f"cd {APPS}/stager; chmod a+rx .; chmod -R a+rX refs origins manifests layers images"
NODES = ("n1", "n2", "n3", "n4")
UID = {"alice": 20001, "bob": 20002}
(PACKAGES,) = VENV.glob("lib/python3.*/site-packages")
"""PyYAML and zstandard for hosts whose Python has none; they have no network to get them from."""
LIMIT = 90.0
"""Seconds that anything may take on a busy machine before it counts as hanging."""

# Takes the place of a node's syslog daemon: what arrives at /dev/log, one line each.
_SYSLOG = """
import os, socket
with open("/run/syslog.pid", "w") as file:
    print(os.getpid(), file=file)
server = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
server.bind("/dev/log")
os.chmod("/dev/log", 0o666)
with open("/var/log/slurm/syslog", "ab", buffering=0) as log:
    while True:
        log.write(server.recv(65536).rstrip(b"\\0\\n") + b"\\n")
"""

SHOW = "python -c 'import os, sys; print(os.environ[\"SLURMD_NODENAME\"], sys.prefix)'"
"""A command that tells its node and which Python it is."""


@dataclass(frozen=True)
class Ended:
    """A job that has ended."""

    id: int
    state: str
    exit: str
    output: str

    def prefixes(self) -> dict[str, set[str]]:
        """For each node the prefixes that :data:`SHOW` printed there."""
        found: dict[str, set[str]] = {}
        for line in self.output.splitlines():
            node, _, prefix = line.partition(" ")
            if node in NODES and prefix.startswith("/"):
                found.setdefault(node, set()).add(prefix)
        return found

    def told(self) -> list[str]:
        """The lines that are ours."""
        return [line for line in self.output.splitlines() if line.startswith("stager: ")]


class Site:
    """The installed cluster."""

    publish = f"{BIN}/stager pack --store {SHARED} --repository {APPS}/stager"
    """Root's command to publish an environment for all users."""
    options: tuple[str, ...] = ()
    """More of deploy/install."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._marks: dict[str, int] = {}
        self._configured = 0

    # -- making it

    def install(self) -> None:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(self._install, ("ctl", *NODES)))
        for node in NODES:
            self._start_syslog(node)

    def _install(self, host: str) -> None:
        self.root(
            host, f"{REPO}/deploy/install", "--packages", str(PACKAGES),
            "--bindir", BIN, "--unitdir", "", *self.options,
        )  # fmt: skip

    def _start_syslog(self, node: str) -> None:
        detached = 'rm -f /dev/log; setsid -f python3 -c "$1" </dev/null >/dev/null 2>&1'
        self.root(node, "sh", "-c", detached, "sh", _SYSLOG)
        until(lambda: self.cluster.exec(node, "root", ["test", "-S", "/dev/log"], check=False))

    # -- nodes

    def root(self, host: str, *argv: str) -> str:
        """Run something as root; returns what it printed."""
        return self.cluster.exec(host, "root", argv).stdout

    def shell(self, user: str, script: str, host: str = "ctl") -> str:
        """Run a script as a user in their home; returns what it printed."""
        return self.cluster.exec(host, user, ["sh", "-ec", script]).stdout

    def place(self, host: str, path: str) -> Path:
        """Where a file of a host's own is on this machine."""
        return self.cluster.state / "hosts" / host / "fs" / path.lstrip("/")

    def home(self, user: str) -> Path:
        """A home on this machine."""
        return self.cluster.state / "home" / user

    def program(self, node: str) -> Path:
        """The installed program of a node, on this machine."""
        command = self.place(node, f"{BIN}/stager").read_text()
        (found,) = re.findall(r" -B (/\S+) ", command)
        return self.place(node, found)

    def job_states(self, node: str) -> list[str]:
        """The jobs that a node has a state of."""
        directory = self.place(node, "/run/stager/jobs")
        return sorted(path.name for path in directory.iterdir()) if directory.exists() else []

    @contextlib.contextmanager
    def configured(self, text: str, *nodes: str) -> Iterator[None]:
        """Add lines to the configuration of nodes (all, where none is named)."""
        self._configured += 1
        name = f"/etc/stager/config.d/{self._configured:03}-test.yaml"
        places = [self.place(node, name) for node in nodes or NODES]
        for place in places:
            place.write_text(text)
            place.chmod(0o644)
        try:
            yield
        finally:
            for place in places:
                place.unlink()

    @contextlib.contextmanager
    def users_configuration(self, user: str, make: str) -> Iterator[None]:
        """Run a script that makes ``config.yaml``, in the directory where stager looks for it."""
        try:
            self.shell(user, f"mkdir -p .config/stager && cd .config/stager && {make}")
            yield
        finally:
            # All of it: most users have no such directory, and the ledger counts who looks there.
            self.shell(user, "rm -r .config")

    @contextlib.contextmanager
    def patched(self, module: str, code: str, *nodes: str) -> Iterator[None]:
        """Append code to a module of the program that is installed on nodes."""
        with contextlib.ExitStack() as stack:
            for node in nodes or NODES:
                source = self.program(node) / "stager" / f"{module}.py"
                before = source.read_text()
                caches = {
                    path: path.read_bytes()
                    for path in (source.parent / "__pycache__").glob(f"{source.stem}.*.pyc")
                }
                assert caches, "the installed program is not compiled"
                for path in caches:
                    path.unlink()
                source.write_text(before + "\n" + code)
                stack.callback(source.write_text, before)
                for path, data in caches.items():
                    stack.callback(path.write_bytes, data)
            yield

    def slow(self, seconds: float, *nodes: str) -> contextlib.AbstractContextManager[None]:
        """Make shared storage slow on nodes: every copy from it takes so long."""
        code = (
            "_copy = copy\n"
            "def copy(*args, **kwargs):\n"
            "    import time\n"
            f"    time.sleep({seconds})\n"
            "    return _copy(*args, **kwargs)\n"
        )
        return self.patched("transfer", code, *nodes)

    @contextlib.contextmanager
    def published_for_all(self, name: str, *nodes: str) -> Iterator[str]:
        """Root publishes an environment for the site's store; yields where it will be staged.

        Nobody can run the original by mistake: it is in ``APPS/away``.
        """
        script = f"""
            umask 022
            mkdir -p {APPS}/envs
            /usr/bin/python3 -m venv --without-pip {APPS}/envs/{name}
            site=$(echo {APPS}/envs/{name}/lib/python3*/site-packages)
            echo "name = '{name}'" >"$site/{name}.py"
            {self.publish} {APPS}/envs/{name} >/dev/null
            {READABLE}
            mv {APPS}/envs {APPS}/away
            {BIN}/stager inspect --repository {APPS}/stager --json {name}
        """
        (layer,) = json.loads(self.root("ctl", "sh", "-ec", script))["layers"]
        keys = f"site_store: {SHARED}\nrepositories: [{APPS}/stager]\n"
        with self.configured(keys, "ctl", *nodes):
            try:
                yield f"{SHARED}/envs/{layer['id']}"
            finally:
                for node in nodes:
                    self.evict_shared(node)
                self.root("ctl", "rm", "-r", APPS)
            assert [one for node in nodes for one in self.shared_mounts(node)] == []

    def evict_shared(self, node: str) -> None:
        """Evict everything on a node that no job claims, from the site's store too."""
        self.root(node, f"{BIN}/stager", "collect", "--all", "--all-users")

    def shared_mounts(self, node: str) -> list[tuple[str, str, set[str]]]:
        """What is mounted in the site's store: where, as what, with which options."""
        rows = [line.split() for line in self.root(node, "cat", "/proc/self/mounts").splitlines()]
        return [(row[1], row[2], {*row[3].split(",")}) for row in rows if row[1].startswith(SHARED)]

    def shared_claims(self, node: str) -> list[str]:
        """Who claims trees in the site's store."""
        return [path.name for path in self.place(node, f"{SHARED}/leases").glob("*/*")]

    def clear_stores(self) -> None:
        """Evict everything on every node."""
        for node in NODES:
            for path in self.place(node, STORE).glob("[0-9]*"):
                user = next(name for name, uid in UID.items() if str(uid) == path.name)
                self.cluster.exec(node, user, [f"{BIN}/stager", "collect", "--all"])

    def syslog(self, *nodes: str) -> str:
        """What the hooks of nodes said since the last :meth:`mark`."""
        text = ""
        for node in nodes or NODES:
            path = self.place(node, "/var/log/slurm/syslog")
            if path.exists():
                text += path.read_bytes()[self._marks.get(node, 0) :].decode(errors="replace")
        # slurmd writes there as well.
        return "".join(x for x in text.splitlines(keepends=True) if " slurmd[" not in x)

    def mark(self) -> None:
        """From here on :meth:`syslog` counts."""
        for node in NODES:
            path = self.place(node, "/var/log/slurm/syslog")
            self._marks[node] = path.stat().st_size if path.exists() else 0

    # -- users

    def make_environment(self, user: str, name: str, *, size: int = 1 << 20) -> str:
        """Make and pack an environment with a module of its name; returns its prefix."""
        script = f"""
            set -e
            /usr/bin/python3 -m venv --without-pip envs/{name}
            site=$(echo envs/{name}/lib/python3*/site-packages)
            echo "name = '{name}'" >"$site/{name}.py"
            head -c {size} /dev/urandom >"$site/data"
            {BIN}/stager pack envs/{name}
        """
        self.cluster.exec("ctl", user, ["sh", "-c", script])
        return f"/home/{user}/envs/{name}"

    def batch(
        self,
        body: str,
        *args: str,
        comment: str = "",
        user: str = "alice",
        check: str = "COMPLETED",
        limit: float = LIMIT,
    ) -> Ended:
        """Run a batch job to its end.

        Args:
            body: the script without its first line.
            args: for sbatch, such as ``-N2``.
            comment: the job's comment.
            check: the state it must end in.
        """
        output = f"/home/{user}/job.%j"
        argv = ["-o", output, *args]
        if comment:
            argv.append(f"--comment={comment}")
        job = self.cluster.sbatch(f"#!/bin/sh\n{body}\n", user=user, args=argv)
        return self.ended(job, user=user, check=check, limit=limit)

    def ended(
        self, job: int, *, user: str = "alice", check: str = "COMPLETED", limit: float = LIMIT
    ) -> Ended:
        """Wait for a job that was submitted by :meth:`batch` or with its output file."""
        state = self.cluster.wait(job, limit=limit)
        path = self.home(user) / f"job.{job}"
        text = path.read_text() if path.exists() else ""
        shown = self.root("ctl", "scontrol", "show", "job", "-o", str(job))
        found = re.search(r" ExitCode=(\S+)", shown)
        assert not check or state == check, f"job {job} is {state}:\n{text}\n{shown}"
        return Ended(job, state, found[1] if found else "", text)

    def run(
        self, *argv: str, user: str = "alice", check: bool = True, timeout: float = LIMIT
    ) -> subprocess.CompletedProcess[str]:
        """Run ``srun`` or ``salloc`` on the login node."""
        return self.cluster.exec("ctl", user, argv, check=check, timeout=timeout)

    def settled(self) -> dict[str, str]:
        """The states of the nodes once no job is completing."""
        until(lambda: not self.root("ctl", "squeue", "-h", "-o", "%i %T").strip())
        return self.cluster.node_states()


def until(true: Callable[[], object], *, limit: float = LIMIT) -> None:
    """Wait until a condition holds (a completed process: until it succeeds)."""
    end = time.monotonic() + limit
    while True:
        value = true()
        if isinstance(value, subprocess.CompletedProcess):
            value = value.returncode == 0
        if value:
            return
        if time.monotonic() > end:
            raise TimeoutError(f"not within {limit:g} s")
        time.sleep(0.1)


def idle(*nodes: str) -> dict[str, str]:
    """All nodes idle but those named, which are drained."""
    return {node: "drained" if node in nodes else "idle" for node in NODES}


def lines(items: Sequence[str]) -> str:
    """Sorted lines, for comparisons."""
    return "\n".join(sorted(items))
