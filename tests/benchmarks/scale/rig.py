"""The test cluster with an environment on a file system that is as slow as a site's.

All nodes are on this machine, whose processors they share. So that a node has what a real one has,
time is dilated: while so many processes work on so many processors, all delays of the file system
are longer by their ratio, and what is measured is divided by it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.ledger import DATA, Ledger
from benchmarks.measuring import forget, read_all, touch_memory
from benchmarks.metafs import Metafs
from benchmarks.settings import Settings
from cluster.client import Cluster
from environments import REPO, VENV
from slurm.site import BIN, HOOKS, PACKAGES, STORE

from .strategies import (
    ARCHIVE_NAME,
    IMAGE_NAME,
    LOCAL,
    PFS,
    RANKS,
    SITE_NAME,
    Phase,
    Strategy,
)

USER = "alice"
SITE_STORE = f"{STORE}/site"
_FREED = 300.0
"""Seconds for which ext4 may remember that an inode was freed: RECENTCY_DIRTY, fs/ext4/ialloc.c."""

LONGEST = 7200.0
"""Seconds that one phase may take, dilated."""

_RSYNCD = """
[bench]
path = /tmp/bench
use chroot = no
read only = yes
"""


@dataclass(frozen=True)
class Start:
    """One measured start.

    Attributes:
        strategy: its name.
        setting: of the file system.
        nodes: how many.
        seconds: from the job's start to the last rank's import, for each phase.
        dilation: what each phase's time was divided by.
        operations: of the node that asked for most, metadata operations.
        total: metadata operations of all nodes.
        kinds: of that node, how many of each kind.
        reads: of that node, reads of data.
        read: bytes of all nodes.
    """

    strategy: str
    setting: str
    nodes: int
    seconds: dict[str, float]
    dilation: dict[str, float]
    operations: int
    total: int
    kinds: dict[str, int]
    reads: int
    read: int

    @property
    def whole(self) -> float:
        """Seconds of all phases."""
        return sum(self.seconds.values())

    @property
    def tag(self) -> str:
        """Whether any of its phases was dilated."""
        return "dilated" if max(self.dilation.values()) > 1 else "real"


class Rig:
    """The cluster, its user's environment, and one start after the other."""

    def __init__(self, state: Path, nodes: int, *, binds: str) -> None:
        self.cluster = Cluster(state)
        self.binds = binds
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self.processors = len(os.sched_getaffinity(0))
        self._size = 0

    # -- making it

    @contextlib.contextmanager
    def up(self) -> Iterator[None]:
        """Start it; end it again."""
        try:
            self.cluster.up(
                nodes=len(self.nodes), cpus=RANKS, prolog=self._prolog(),
                epilog=f"{HOOKS}/epilog", task_prolog=f"{HOOKS}/task_prolog",
                # The batch script waits for the Prologs of all nodes, not of the first.
                prolog_flags="Alloc,DeferBatch",
                binds=self.binds, extra_conf="SchedulerParameters=batch_sched_delay=0",
            )  # fmt: skip
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(self._install, ("ctl", *self.nodes)))
            yield
        finally:
            self.cluster.down()

    def _prolog(self) -> str:
        """The hook, after noting when the job started here: Slurm's own scheduling is not ours."""
        path = Path(self.binds) / "prolog"
        path.write_text(f'#!/bin/sh\ndate +%s.%N >/run/bench-started\nexec {HOOKS}/prolog "$@"\n')
        path.chmod(0o755)
        return str(path)

    def _started(self, nodes: list[str]) -> float:
        places = [self.cluster.state / "hosts" / node / "fs/run/bench-started" for node in nodes]
        return min(float(place.read_text()) for place in places)

    def _install(self, host: str) -> None:
        install = [f"{REPO}/deploy/install", "--packages", str(PACKAGES), "--bindir", BIN]
        self.cluster.exec(host, "root", [*install, "--unitdir", ""])
        configured = f"repository: {PFS}/repository\n"
        configured += f"repositories: [{PFS}/site]\nsite_store: {SITE_STORE}\n"
        script = "mkdir -p /etc/stager/config.d; cat >/etc/stager/config.d/bench.yaml"
        self.cluster.exec(host, "root", ["sh", "-c", script], input=configured)

    def make(self, wheels: Path, modules: str, channel: Path | None = None) -> dict[str, int]:
        """Make the environment, its archives and images on the (not yet slow) shared directory.

        Returns its files and bytes.

        Args:
            wheels: what is installed.
            modules: what each rank imports. The first import is made here: it may leave something
                in the home for those that follow, as matplotlib does.
            channel: of conda packages; without one it is a venv.
        """
        if channel is not None:
            made = f"/usr/bin/python3 -B {REPO}/tests/conda/channel.py env --pyc python pip"
            made += f" --channel {channel} --prefix {PFS}/env --cache ~/pkgs"
            packed = "conda-pack"
        else:
            made, packed = "/usr/bin/python3 -m venv env", "venv-pack"
        script = f"""
            cd {PFS}
            {made}
            env/bin/python -m pip install -q --no-index --find-links {wheels} -r {wheels}/names
            env/bin/python -B -c 'import {modules}'
            {BIN}/stager pack env --name {IMAGE_NAME}
            {BIN}/stager pack env --name {ARCHIVE_NAME} --format tar.zst
            {VENV}/bin/{packed} -q -p env -o env.tar.gz
            mksquashfs env env.squashfs -quiet -no-progress -comp zstd -Xcompression-level 3
        """
        self.cluster.exec("ctl", "root", ["install", "-d", "-o", USER, PFS])
        self.cluster.exec("ctl", USER, ["sh", "-ec", script], timeout=1800)
        # The kernel mounts nothing from below a directory that is a user's.
        script = f"""
            chown root {PFS}
            cd {PFS}
            {BIN}/stager pack env --name {SITE_NAME} --store {SITE_STORE} --repository {PFS}/site
            chmod a+rx site
            chmod -R a+rX site/*
        """
        self.cluster.exec("ctl", "root", ["sh", "-ec", script], timeout=1800)
        made = self._made()
        self._size = made["size"] + made["image"]
        return made

    def _made(self) -> dict[str, int]:
        found = [path for path in (self.shared / "env").rglob("*") if not path.is_dir()]
        images = self.shared / "repository" / "images"
        return {
            "files": len(found),
            "size": sum(path.lstat().st_size for path in found),
            "image": sum(path.stat().st_size for path in images.glob("*.squashfs")),
            "archive": (self.shared / "env.tar.gz").stat().st_size,
        }

    @property
    def shared(self) -> Path:
        """The shared directory as this machine sees it."""
        return self.cluster.state / PFS.lstrip("/")

    @property
    def home(self) -> Path:
        """The user's home as this machine sees it."""
        return self.cluster.state / "home" / USER

    def link(self) -> float:
        """Bytes a second that a node sends the login node, over one connection."""
        port, size = 8731, 256 << 20
        serve = f"import socket; s = socket.create_server(('', {port})); print(flush=True);"
        serve += f" s.accept()[0].sendall(bytes({size}))"
        take = "import socket, time; a = time.monotonic();"
        take += f" s = socket.create_connection(('{self.nodes[0]}', {port}));"
        take += " b = bytearray(1 << 20)\nwhile s.recv_into(b): pass\nprint(time.monotonic() - a)"
        python = ["/usr/bin/python3", "-I", "-c"]
        with ThreadPoolExecutor(1) as pool:
            served = pool.submit(self.cluster.exec, self.nodes[0], USER, [*python, serve])
            listening = f"until grep -q :{port:04X} /proc/net/tcp; do sleep 0.05; done"
            self.cluster.exec(self.nodes[0], USER, ["sh", "-c", listening], timeout=30)
            done = self.cluster.exec("ctl", USER, [*python, take])
            served.result()
        return size / float(done.stdout)

    # -- one start

    def start(self, strategy: Strategy, setting: Settings, count: int) -> tuple[Start, Ledger]:
        """Start a job and all its ranks once, with nothing known on any node."""
        nodes = self.nodes[:count]
        seconds: dict[str, float] = {}
        dilation: dict[str, float] = {}

        def dilated(name: str, processes: int) -> float:
            dilation[name] = max(1.0, processes / self.processors)
            shared.dilate(dilation[name])
            return dilation[name]

        if strategy.warm:
            with self._job(nodes, strategy.comment) as job:
                self._step(job, nodes, Phase("stage", "true"))
        wide = replace(setting, wide=("*/images/*", "*.tar.gz", "*.squashfs"))
        pids = {node: self.cluster.pid(node) for node in nodes}
        self._make_room(count)
        os.sync()  # what others left to be written is not this one's
        forget(str(self.shared))  # together it may be more than there is memory
        touch_memory(2 * count * self._size)  # an archive beside what was unpacked, or cached
        read_all(self.shared / strategy.data)
        with Metafs(self.shared, PFS, pids, wide) as shared:
            factor = dilated("job", count)
            with self._job(nodes, strategy.comment) as job:
                seconds["job"] = (time.time() - self._started(nodes)) / factor
                for phase in strategy.phases:
                    where = {"first": nodes[:1], "others": nodes[1:]}.get(phase.nodes, nodes)
                    if not where:
                        continue
                    factor = dilated(phase.name, phase.processes(len(where)))
                    with self._served(nodes[0], strategy.daemon and phase.nodes == "others"):
                        started = time.time()
                        ended = self._step(job, where, phase, first=nodes[0])
                    seconds[phase.name] = (ended - started) / factor
            ledger = shared.ledger()  # with the Epilog's, which asks for nothing there
        self._clean(nodes)
        operations = [ledger.of(node).requests() for node in nodes]
        busiest = nodes[operations.index(max(operations))]
        kinds = ledger.of(busiest).kinds()
        start = Start(
            strategy.name, setting.name, count, seconds, dilation,
            max(operations), sum(operations), dict(kinds), kinds[DATA], ledger.bytes(),
        )  # fmt: skip
        return start, ledger

    def _make_room(self, count: int) -> None:
        """Remove what starts have left where the disk would fill up, and wait."""
        if shutil.disk_usage(self.cluster.state).free > 3 * count * self._size:
            return
        script = f"rm -rf {LOCAL}.*"
        for node in self.nodes:
            self.cluster.exec(node, "root", ["sh", "-c", script], timeout=LONGEST)
        time.sleep(_FREED)

    @contextlib.contextmanager
    def _job(self, nodes: list[str], comment: str) -> Iterator[str]:
        """A batch job whose script has started: its Prologs have run."""
        argv = ["-w", ",".join(nodes), f"-N{len(nodes)}", f"--ntasks-per-node={RANKS}"]
        argv += ["--exclusive", "-o", "/dev/null", *([f"--comment={comment}"] if comment else [])]
        mark = self.home / "started"
        mark.unlink(missing_ok=True)
        script = "#!/bin/sh\n: >~/started\nexec sleep 7200\n"
        job = self.cluster.sbatch(script, user=USER, args=argv)
        try:
            until = time.monotonic() + LONGEST
            while not mark.exists():
                if time.monotonic() > until:
                    raise RuntimeError(f"job {job} does not start")
                time.sleep(0.01)
            yield str(job)
        finally:
            self.cluster.exec("ctl", "root", ["scancel", str(job)])
            self.cluster.wait(job)

    def _step(self, job: str, nodes: list[str], phase: Phase, *, first: str = "") -> float:
        """Run one phase; returns when it had ended, by this machine's clock."""
        listed = ",".join(nodes)
        environ = [f"SLURM_JOB_ID={job}", f"SLURM_JOBID={job}", f"SLURM_NNODES={len(nodes)}"]
        environ += [f"SLURM_JOB_NUM_NODES={len(nodes)}", f"SLURM_JOB_NODELIST={listed}"]
        environ += [f"SLURM_JOB_UID={self._uid()}", f"SLURM_CPUS_ON_NODE={RANKS}"]
        script = f"FIRST={first}; {phase.command}"
        if phase.ranks:
            argv = ["srun", f"--jobid={job}", "--overlap", "-w", listed, f"-N{len(nodes)}"]
            argv += [f"--ntasks-per-node={phase.ranks}", "-D/", "bash", "-ec", script]
            done = self.cluster.exec("ctl", USER, argv, timeout=LONGEST, check=False)
        else:
            argv = ["env", *environ, "bash", "-ec", script]
            done = self.cluster.exec(nodes[0], USER, argv, timeout=LONGEST, check=False)
        ended = time.time()
        if done.returncode != 0:
            raise RuntimeError(f"{phase.command}: {done.returncode}\n{done.stdout}{done.stderr}")
        if phase.name == "import":
            times = re.findall(r"^imported (\S+)", done.stdout, re.M)
            if len(times) != len(nodes) * phase.ranks:
                raise RuntimeError(f"not all ranks imported:\n{done.stdout}{done.stderr}")
            ended = max(map(float, times))
        return ended

    def _uid(self) -> int:
        return os.stat(self.home).st_uid

    @contextlib.contextmanager
    def _served(self, node: str, wanted: bool) -> Iterator[None]:
        if not wanted:
            yield
            return
        start = "cat >/tmp/rsyncd.conf; rsync --daemon --port 8730 --config /tmp/rsyncd.conf"
        options = "--dparam=pidfile=/tmp/rsyncd.pid"
        self.cluster.exec(node, USER, ["sh", "-c", f"{start} {options}"], input=_RSYNCD)
        try:
            yield
        finally:
            self.cluster.exec(node, USER, ["sh", "-c", "kill $(cat /tmp/rsyncd.pid)"])

    def _clean(self, nodes: list[str]) -> None:
        script = f"""
            # The server of a mount ended with its step.
            fusermount3 -qzu {LOCAL} || :
            rm -f /tmp/bench.tar.gz /tmp/rsyncd.conf
            # ext4 looks at each inode that was freed in the last minutes before it makes a file.
            [ ! -e {LOCAL} ] || mv {LOCAL} {LOCAL}.$(date +%s%N)
            {BIN}/stager release >/dev/null 2>&1 || :
            {BIN}/stager collect --all
        """

        def clean(node: str) -> None:
            self.cluster.exec(node, USER, ["sh", "-c", script])
            self.cluster.exec(node, "root", [f"{BIN}/stager", "collect", "--all", "--all-users"])

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(clean, nodes))


def summary(starts: list[Start]) -> str:
    """One line of a table for runs of the same start."""
    times = sorted(one.whole for one in starts)
    first = starts[0]
    operations = max(one.operations for one in starts)
    phases = ", ".join(
        f"{name} {statistics.median(one.seconds[name] for one in starts):.2f}"
        for name in first.seconds
    )
    return (
        f"{first.strategy:<20} {first.nodes:>3} {times[0]:8.2f} {statistics.median(times):8.2f}"
        f" {times[-1]:8.2f} {len(times):>2} {operations:>9,} {first.total:>10,}"
        f" {first.read / 1e6:>9,.0f}  [{first.tag}] {phases}"
    )


def pip_download(names: Sequence[str], target: Path) -> None:
    """Get wheels for the hosts, which have no network."""
    argv = [str(VENV / "bin" / "pip"), "download", "-q", "-d", str(target), *names]
    subprocess.run(argv, check=True)
    (target / "names").write_text("\n".join(names) + "\n")
