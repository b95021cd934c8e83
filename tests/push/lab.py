"""Nodes on this machine: each has its network, mounts, processes, ``/tmp`` and a real sshd.

::

    login --+-- switch --+-- node1
                         +-- node2 ...

All are namespaces that live as long as one process each: nothing has a name on this machine, and
when that process ends, the kernel ends whatever was started there, unmounts and unplugs it. The
home directory is shared by all, as on clusters.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from environments import REPO, VENV, clean_environ, run
from workbench import until

_WITH_US = ("setpriv", "--pdeathsig=KILL")
"""A host ends when its tests are killed."""

# $1 work directory, $2 address, $3... directories to keep when /tmp and /run are the node's own
_NODE = """
set -eu
work=$1 address=$2; shift 2
mount -t proc proc /proc
mount -t tmpfs -o mode=1777 tmpfs "$work/tmp"
for keep; do
    case $keep in (/tmp/*)
        mkdir -p "$work/tmp${keep#/tmp}"; mount --rbind "$keep" "$work/tmp${keep#/tmp}" ;;
    esac
done
mount --move "$work/tmp" /tmp
mount -t tmpfs tmpfs /run
mkdir /run/sshd
ip link set lo up
until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
ip address add "$address/24" dev eth0
ip link set eth0 up
exec /usr/sbin/sshd -D -e -f "$work/sshd_config"
"""


@dataclass
class Host:
    """One of them.

    Attributes:
        name: as in the ssh configuration.
        address: on the lab's network.
        process: when it ends, the host is gone.
        pid: a process inside, to enter by.
        work: its files outside of the lab.
    """

    name: str
    address: str
    process: subprocess.Popen[bytes]
    pid: int
    work: Path

    def enter(self, *argv: str | Path, mount: bool = True) -> list[str]:
        """The command line that runs something here."""
        which = ["--net", "--mount", "--pid"] if mount else ["--net"]
        return ["nsenter", f"--target={self.pid}", *which, "--", *map(str, argv)]

    def run(
        self, *argv: str | Path, env: dict[str, str] | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run something here."""
        return run(self.enter(*argv, mount=self.work.is_dir()), env=env, cwd="/", check=check)

    def end(self) -> None:
        """End it with everything in it."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self.process.wait()


@dataclass
class Lab:
    """Some nodes, and a login host to push from.

    Args:
        root: an empty directory; short.
        count: how many nodes.
    """

    root: Path
    count: int = 4
    hosts: dict[str, Host] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.home = self.root / "home"
        (self.home / ".ssh").mkdir(parents=True, mode=0o700)
        self._key(self.home / ".ssh" / "id_ed25519")
        public = (self.home / ".ssh" / "id_ed25519.pub").read_text()
        (self.home / ".ssh" / "authorized_keys").write_text(public)
        self.switch = self._bare("switch")
        self.switch.run("sh", "-ec", "ip link add br0 type bridge; ip link set br0 up")
        self.login = self._bare("login")
        self._plug(self.login)
        self.login.run("sh", "-ec", "ip addr add 10.77.0.1/24 dev eth0; ip link set eth0 up")
        config = ""
        for number in range(1, self.count + 1):
            name, address = f"node{number}", f"10.77.0.{number + 10}"
            config += f"Host {name}\n  HostName {address}\n"
            self.start(name, address)
        (self.home / ".ssh" / "config").write_text(config)
        known = ""
        for host in self.nodes.values():
            kind, key, *_ = (host.work / "key.pub").read_text().split()
            known += f"{host.address} {kind} {key}\n"
        (self.home / ".ssh" / "known_hosts").write_text(known)

    @property
    def nodes(self) -> dict[str, Host]:
        """The nodes by name."""
        return {name: one for name, one in self.hosts.items() if name.startswith("node")}

    @property
    def repository(self) -> Path:
        return self.home / "repository"

    def _key(self, path: Path, *options: str) -> None:
        run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", path, *options])

    def _bare(self, name: str) -> Host:
        """A host that has only a network of its own."""
        process = subprocess.Popen(
            [*_WITH_US, "unshare", "--net", "--fork", "--kill-child", "sleep", "infinity"],
            env=clean_environ(),
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        host = Host(name, "", process, self._inner(process), Path("/nonexistent"))
        self.hosts[name] = host
        return host

    def _inner(self, process: subprocess.Popen[bytes]) -> int:
        path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        return int(until("the host's first process", lambda: path.read_text().split())[0])

    def start(self, name: str, address: str) -> Host:
        """Start a node, or start it again: its /tmp is empty then."""
        work = self.root / name
        if not work.exists():
            (work / "tmp").mkdir(parents=True)
            self._key(work / "key")
        (work / "sshd_config").write_text(
            f"ListenAddress {address}\nHostKey {work}/key\nUsePAM no\nStrictModes no\n"
            f"PidFile none\nPermitRootLogin yes\nPasswordAuthentication no\n"
            f"AuthorizedKeysFile {self.home}/.ssh/authorized_keys\n"
            f"SetEnv HOME={self.home} {' '.join(self._variables())}\n"
        )
        log = (work / "log").open("ab")
        keep = [str(REPO), str(self.root), sys.base_prefix]
        process = subprocess.Popen(
            [*_WITH_US, "unshare", "--net", "--mount", "--propagation=private", "--pid", "--fork",
             "--kill-child", "sh", "-c", _NODE, "sh", work, address, *keep],
            env=clean_environ(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )  # fmt: skip
        log.close()
        host = Host(name, address, process, self._inner(process), work)
        self.hosts[name] = host
        self._plug(host)
        until(f"sshd on {name}", lambda: "listening" in (work / "log").read_text())
        return host

    def _variables(self) -> list[str]:
        """What tells whose processes these are, for the leftovers that conftest looks for."""
        name = "TESTING_DIRECTORY"
        return [f"{name}={os.environ[name]}"] if name in os.environ else []

    def _plug(self, host: Host) -> None:
        """Connect a host with the switch."""
        port = f"to-{host.name}"
        self.switch.run("sh", "-ec", f"""
            ip link delete {port} 2>/dev/null || :
            ip link add {port} type veth peer name eth0 netns /proc/{host.pid}/ns/net
            ip link set {port} master br0 up""")  # fmt: skip

    def limit(self, rate: str, *names: str) -> None:
        """Limit links in both directions, with tc-tbf(8).

        Args:
            rate: as in ``200mbit``.
            names: hosts; without any, all of them.
        """
        shape = f"root tbf rate {rate} burst 256k latency 50ms"
        chosen = names or ["login", *self.nodes]
        for host in [self.hosts[name] for name in chosen]:
            host.run("tc", "qdisc", "replace", "dev", "eth0", *shape.split())
            self.switch.run("tc", "qdisc", "replace", "dev", f"to-{host.name}", *shape.split())

    # -- commands of the user on the login host ----------------------------------------------

    def environ(self, **more: str) -> dict[str, str]:
        settings = {"STAGER_REPOSITORY": str(self.repository), "HOME": str(self.home)}
        return clean_environ(**{**settings, **more})

    def command(self, *argv: str | Path) -> list[str]:
        """The command line of ``stager`` on the login host."""
        return self.login.enter(VENV / "bin" / "stager", *argv, mount=False)

    def stager(
        self, *argv: str | Path, status: int = 0, **more: str
    ) -> subprocess.CompletedProcess[str]:
        """Run ``stager`` on the login host.

        Raises:
            AssertionError: its status is another one, or it met a bug.
        """
        done = run(self.command(*argv), env=self.environ(**more), cwd="/", check=False)
        assert "Traceback" not in done.stderr, done.stderr
        assert "bug in stager" not in done.stderr, done.stderr
        assert done.returncode == status, (done.returncode, done.stdout, done.stderr)
        return done

    def push(
        self, *argv: str | Path, nodes: str = "", status: int = 0, ref: str = "it", **more: str
    ) -> dict[str, Any]:
        """Push and return what ``--json`` prints, with what was said in ``said``."""
        done = self.stager(*self.push_words(*argv, nodes=nodes, ref=ref), status=status, **more)
        return {**json.loads(done.stdout), "said": done.stderr}

    def push_words(self, *argv: str | Path, nodes: str = "", ref: str = "it") -> Sequence[str]:
        where = nodes or f"node[1-{self.count}]"
        remote = shlex.quote(f"{VENV}/bin/stager")
        return ["push", "-w", where, "--remote-stager", remote, "--json", ref, *map(str, argv)]

    def on(self, node: str, *argv: str | Path, status: int = 0) -> subprocess.CompletedProcess[str]:
        """Run ``stager`` on a node, as a job there would."""
        command = self.nodes[node].enter(VENV / "bin" / "stager", *argv)
        done = run(command, env=self.environ(), cwd="/", check=False)
        assert done.returncode == status, (done.returncode, done.stdout, done.stderr)
        return done

    def store(self, node: str) -> Path:
        """A node's store, seen from outside."""
        return Path(f"/proc/{self.nodes[node].pid}/root/tmp/stager-{os.getuid()}")

    def arriving(self, node: str) -> int:
        """How many bytes there are of images that are not complete."""
        return sum(path.stat().st_size for path in self.store(node).glob("tmp/*/*"))

    def receivers(self, node: str) -> list[int]:
        """The processes that receive on a node, by their numbers here."""
        space = os.readlink(f"/proc/{self.nodes[node].pid}/ns/pid")
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (process / "cmdline").read_bytes().split(b"\0")
                if os.readlink(process / "ns/pid") == space and b"receive" in words:
                    found.append(int(process.name))
        return found

    def trees(self, node: str) -> list[dict[str, Any]]:
        """What a node's store has."""
        found: list[dict[str, Any]] = json.loads(self.on(node, "status", "--json").stdout)["trees"]
        return found

    def close(self) -> None:
        """End all hosts; again does nothing."""
        for host in self.hosts.values():
            host.end()
