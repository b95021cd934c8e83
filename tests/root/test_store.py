"""One copy for all of a node, whoever is killed on the way to it."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import environments
import workbench
from environments import VENV, Environment, run
from stager import privilege
from workbench import NOBODY, Bench, until

STAGE_RUN = VENV / "bin" / "stage-run"
SAYS_PREFIX = "import sys; print(sys.prefix)"

IN_OPEN = 0x20  # linux/inotify.h


class Opens:
    """Counts how often a file is opened, by anybody: inotify(7)."""

    def __init__(self, path: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.inotify_init1(os.O_NONBLOCK)
        if self._fd < 0 or libc.inotify_add_watch(self._fd, os.fsencode(path), IN_OPEN) < 0:
            raise OSError(ctypes.get_errno(), "inotify")
        self.count = 0

    def read(self) -> int:
        """How often so far."""
        try:
            data = os.read(self._fd, 1 << 16)
        except BlockingIOError:
            data = b""
        while data:
            (length,) = struct.unpack_from("=12xI", data)
            self.count += 1
            data = data[16 + length :]
        return self.count

    def close(self) -> None:
        os.close(self._fd)


@pytest.fixture(params=["mount", "extract", "archive"])
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def packed(bench: Bench, venv_uv: Environment, way: str) -> Environment:
    bench.pack(venv_uv, *(["--format", "tar.zst"] if way == "archive" else []))
    bench.settings["STAGER_STAGE_HOW"] = "extract" if way == "archive" else way
    return venv_uv


@pytest.fixture
def opens(bench: Bench, packed: Environment) -> Iterator[Opens]:
    (image,) = bench.repository.glob("images/*")
    opens = Opens(image)
    yield opens
    opens.close()


def start(bench: Bench, **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [STAGE_RUN, "--strict", "--env", "it", "python", "-c", SAYS_PREFIX],
        env=bench.environ(**more),
        cwd="/",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    said, complained = process.communicate(timeout=workbench.LIMIT)
    return process.returncode, said, complained


def prefix_of(bench: Bench) -> str:
    return str(bench.json("inspect", "it")["layers"][-1]["destination"])


# Many at once


def test_ten_at_once_copy_once(bench: Bench, packed: Environment, opens: Opens) -> None:
    """Ten ranks on a cold node: one of them makes it, all of them run in it."""
    results = [ended(one) for one in [start(bench) for _ in range(10)]]
    assert results == [(0, f"{prefix_of(bench)}\n", "")] * 10
    assert opens.read() == 1
    again = ended(start(bench))
    assert again == (0, f"{prefix_of(bench)}\n", "")
    assert opens.read() == 1
    assert len(list(bench.store.glob("envs/*"))) == 1
    assert list(bench.store.glob("tmp/*")) == []


class SlowTool:
    """Programs that stand still when they are started, until they are let go or killed.

    The maker of a tree starts one of them in the middle of its work.
    """

    NAMES = ("squashfuse_ll", "squashfuse", "unsquashfs")

    def __init__(self, bench: Bench) -> None:
        self.directory = bench.root / "tools"
        self.directory.mkdir()
        self.go = bench.root / "go"
        for name in self.NAMES:
            script = self.directory / name
            script.write_text(
                "#!/bin/sh\n"
                f'echo "$PPID $$" >{bench.root}/$$.at-work.new\n'
                f"mv {bench.root}/$$.at-work.new {bench.root}/$$.at-work\n"
                f"while [ ! -e {self.go} ]; do sleep 0.01; done\n"
                f'exec {shutil.which(name)} "$@"\n'
            )
            script.chmod(0o755)
        self.root = bench.root
        self.path = f"{self.directory}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

    def at_work(self) -> list[list[int]]:
        """The makers and the tools they have started."""
        files = self.root.glob("*.at-work")
        return [[int(word) for word in file.read_text().split()] for file in files]


@pytest.mark.parametrize("way", ["mount", "extract"], indirect=True)
def test_killed_maker_is_replaced(bench: Bench, packed: Environment, opens: Opens) -> None:
    """Of ten at once the one that works is killed in the middle: all others succeed."""
    tool = SlowTool(bench)
    processes = [start(bench, PATH=tool.path) for _ in range(10)]
    ((maker, program),) = until("a maker is in the middle", tool.at_work)
    (killed,) = [one for one in processes if one.pid == maker]
    os.kill(program, signal.SIGKILL)
    killed.kill()
    tool.go.touch()
    results = {one.pid: ended(one) for one in processes}
    assert results.pop(maker)[0] == -signal.SIGKILL
    assert set(results.values()) == {(0, f"{prefix_of(bench)}\n", "")}
    assert len(results) == 9
    assert list(bench.store.glob("tmp/*")) == []
    assert len(workbench.servers(bench.root)) <= 1


def test_root_makes_stores_below_its_own_directory_in_a_sticky_one(tmp_path: Path) -> None:
    """As /local/stager in a /local that is as open as /tmp: nobody else can replace it."""
    local = tmp_path / "local"
    for path, mode in ((tmp_path, 0o755), (local, 0o1777), (local / "stager", 0o755)):
        path.mkdir(exist_ok=True)
        path.chmod(mode)
    store = local / "stager" / str(NOBODY)
    assert privilege.private_directory(str(store), NOBODY)
    assert (store.stat().st_uid, store.stat().st_mode & 0o7777) == (NOBODY, 0o700)
    assert not privilege.private_directory(str(local / str(NOBODY)), NOBODY)
    os.chown(local / "stager", NOBODY, NOBODY)
    assert not privilege.private_directory(str(store), NOBODY)
    os.chown(local / "stager", 0, 0)
    local.chmod(0o777)
    assert not privilege.private_directory(str(store), NOBODY)


@pytest.mark.parametrize("way", ["mount"], indirect=True)
def test_waiter_that_waits_too_long(bench: Bench, packed: Environment) -> None:
    tool = SlowTool(bench)
    maker = start(bench, PATH=tool.path)
    until("the maker is in the middle", tool.at_work)
    said = bench.expect(11, "stage", "it", "--timeout", "0.2s")
    assert "stage.timeout" in said
    tool.go.touch()
    assert ended(maker)[0] == 0
    assert bench.stage().how == "hit"


@pytest.mark.parametrize("way", ["mount", "extract"], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_stage(bench: Bench, packed: Environment, number: signal.Signals) -> None:
    tool = SlowTool(bench)
    maker = start(bench, PATH=tool.path)
    until("the maker is in the middle", tool.at_work)
    maker.send_signal(number)
    tool.go.touch()
    status, said, complained = ended(maker)
    assert status == (130 if number == signal.SIGINT else -number) and said == ""
    assert complained.splitlines()[-1] == "stager: interrupted"
    assert not list(bench.store.glob("envs/*")) and not list(bench.store.glob("tmp/*/*"))
    assert bench.stage().eval("requests.__name__", "requests") == "requests"
    assert list(bench.store.glob("tmp/*")) == []
    assert len(workbench.servers(bench.root)) <= 1


@pytest.mark.parametrize("way", ["extract"], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_activation_that_is_interrupted_fails(
    bench: Bench, packed: Environment, number: signal.Signals
) -> None:
    """``eval`` of nothing would succeed, and the script go on with another Python."""
    tool = SlowTool(bench)
    activating = subprocess.Popen(
        [VENV / "bin" / "stager", "activate", "it", "--how", "extract"],
        env=bench.environ(PATH=tool.path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until("it is in the middle", tool.at_work)
    activating.send_signal(number)
    tool.go.touch()
    assert ended(activating)[1] == "false\n"


def test_a_command_has_the_signals_that_it_would_have_without(
    bench: Bench, packed: Environment
) -> None:
    """Python ignores two, and who inherits that goes on writing when nobody reads any more."""
    look = ["grep", "SigIgn", "/proc/self/status"]
    before = subprocess.run(look, stdout=subprocess.PIPE, text=True, check=True).stdout
    done = run([STAGE_RUN, "--strict", "--env", "it", *look], env=bench.environ())
    assert done.stdout == before


@pytest.mark.parametrize("way", ["extract"], indirect=True)
def test_what_a_killed_maker_has_started_unpacks_elsewhere(
    bench: Bench, packed: Environment
) -> None:
    tool = SlowTool(bench)
    killed = start(bench, PATH=tool.path)
    until("the maker is in the middle", tool.at_work)
    killed.kill()
    ended(killed)
    maker = start(bench, PATH=tool.path)
    until("the next one is in the middle", lambda: len(tool.at_work()) == 2)
    targets = set()
    for _, pid in tool.at_work():
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        targets.add(words[words.index(b"-d") + 1])
    tool.go.touch()
    assert ended(maker)[0] == 0
    assert len(targets) == 2
    assert bench.stage().how == "hit"
    assert list(bench.store.glob("tmp/*")) == []


# Killed anywhere. strace kills the process at the n-th of the calls that change something: twenty
# points, spread over all there are.

CHANGING = (
    "mkdir,rename,unlink,unlinkat,rmdir,chmod,fchmod,utimensat,flock,symlink,symlinkat,"
    "linkat,ftruncate,fsync,write,vfork,clone,clone3,wait4,preadv,pwrite64,execve,mkdirat"
)
POINTS = {"mount": 8, "extract": 6, "archive": 6}


def test_killed_at_any_point(bench: Bench, way: str, tmp_path: Path) -> None:
    environment = environments.make_venv(bench.root / "origin" / "env")
    (environment.site_packages / "mod.py").write_text("WORD = 'whole'\n")
    (environment.site_packages / "data").write_bytes(os.urandom(9 << 20))  # several pieces, frames
    bench.pack(environment, *(["--format", "tar.zst"] if way == "archive" else []))
    bench.settings["STAGER_STAGE_HOW"] = "extract" if way == "archive" else way
    log = tmp_path / "log"
    # Children are not traced: a FUSE server would hold on to strace.
    strace = ["strace", "-qqq", "-o", log, "-e", f"trace={CHANGING}", "-e", "signal=none"]
    stage = [VENV / "bin" / "stager", "stage", "it"]
    prefix = run([*strace, *stage], env=bench.environ()).stdout.strip()
    # Which of the calls of a kind it is to die at is counted by kind.
    calls = re.findall(r"^(\w+)\(", log.read_text(), re.MULTILINE)
    numbered = [(name, calls[: at + 1].count(name)) for at, name in enumerate(calls)]
    # The first of them are those of the start of Python.
    first = next(at for at, (name, _) in enumerate(numbered) if name == "mkdir")
    numbered = numbered[first:]
    number = POINTS[way]
    assert len(numbered) >= number, numbered
    points = [numbered[at * (len(numbered) - 1) // (number - 1)] for at in range(number)]
    killed = 0
    for name, count in points:
        _forget(bench)
        inject = ["strace", "-qqq", "-o", "/dev/null", "-e", f"trace={name}"]
        inject += ["-e", f"inject={name}:signal=KILL:when={count}"]
        done = run([*inject, *stage], env=bench.environ(), check=False)
        # It may come out differently this time, but for most it does not.
        killed += done.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL)
        assert run(stage, env=bench.environ()).stdout.strip() == prefix, (name, count)
        code = "import mod; print(mod.WORD)"
        said = environments.run_hidden(
            [f"{prefix}/bin/python", "-c", code], hide=[environment.prefix]
        )
        assert said.stdout == "whole\n", (name, count)
        data = "lib/python3.*/site-packages/data"
        (copy,), (original,) = Path(prefix).glob(data), environment.prefix.glob(data)
        assert copy.read_bytes() == original.read_bytes(), (name, count)
        assert list(bench.store.glob("tmp/*")) == [], (name, count)
        assert len(workbench.servers(bench.root)) <= 1, (name, count)
        assert len(workbench.mounts_below(bench.root)) <= 1, (name, count)
    assert killed >= number * 3 // 4


def _forget(bench: Bench) -> None:
    """A node on which nothing was ever staged."""
    bench.close()
    shutil.rmtree(bench.store)


# Where FUSE is closed


# As on a machine with a device that is for root only, with one that is there and does not work,
# and without any.
_NODE = '[ -e "$1/fuse" ] || mknod -m {mode} "$1/fuse" c {device}; mount --bind "$1/fuse" /dev/fuse'
CLOSED = {
    "closed": _NODE.format(mode=600, device="10 229"),
    "broken": _NODE.format(mode=666, device="1 3"),
    "missing": "mount -t tmpfs stager-test /dev; mknod -m 666 /dev/null c 1 3;"
    " mknod -m 666 /dev/urandom c 1 9",
}


@pytest.mark.parametrize("fuse", CLOSED)
@pytest.mark.parametrize("way", ["mount"], indirect=True)
def test_user_without_fuse(bench: Bench, packed: Environment, fuse: str) -> None:
    """A user's stage extracts instead, says so, and fails only where mounting was asked for."""
    del bench.settings["STAGER_STAGE_HOW"]
    run(["chown", "-R", f"{NOBODY}:{NOBODY}", bench.root])
    script = (
        f'{CLOSED[fuse]}; shift; exec setpriv --reuid={NOBODY} --regid={NOBODY} --clear-groups "$@"'
    )
    inside = ["unshare", "--mount", "--propagation", "private", "sh", "-euc", script, "sh"]
    environ = bench.environ(HOME=str(bench.root), TMPDIR=str(bench.root))
    done = bench.stager("stage", "it", env=environ, prefix=[*inside, bench.root])
    prefix = Path(done.stdout.strip())
    assert "extracting instead of mounting: " in done.stderr
    assert prefix.stat().st_uid == NOBODY
    hidden = [packed.prefix]
    said = environments.run_hidden([prefix / "bin" / "python", "-c", SAYS_PREFIX], hide=hidden)
    assert said.stdout.strip() == str(prefix)
    assert list(bench.store.glob("images/*")) == []  # its space is of use to others
    for command in (["release"], ["collect", "--all"]):
        bench.stager(*command, env=environ, prefix=[*inside, bench.root])
    done = bench.stager(
        "stage", "it", "--how", "mount", env=environ, check=False, prefix=[*inside, bench.root]
    )
    assert done.returncode in (1, 15)
    assert "stager: error: " in done.stderr
    assert bench.unfinished() == [] and list(bench.store.glob("ready/*")) == []


@pytest.mark.parametrize("way", ["extract"], indirect=True)
def test_what_another_pid_namespace_uses_stays(bench: Bench, packed: Environment) -> None:
    """As a container's that has the same store: its processes have other numbers here."""
    stager = VENV / "bin" / "stager"
    script = '"$@" stage it; echo staged; read -r line'
    inside = ["unshare", "--pid", "--fork", "--mount-proc", "sh", "-euc", script, "sh", stager]
    with subprocess.Popen(
        inside, env=bench.environ(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as container:
        assert container.stdin is not None and container.stdout is not None
        tree = Path(container.stdout.readline().strip())
        assert container.stdout.readline() == "staged\n"
        bench.stager("collect", "--all")
        assert tree.is_dir()
        # From another one nobody can tell whether the first still runs.
        apart = ["unshare", "--pid", "--fork", "--mount-proc"]
        bench.stager("collect", "--all", prefix=apart)
        assert tree.is_dir()
        container.stdin.write("\n")
    bench.stager("collect", "--all", prefix=apart)
    assert tree.is_dir()
    bench.stager("collect", "--all")
    assert not tree.exists()


@pytest.mark.parametrize("way", ["extract"], indirect=True)
def test_a_parent_that_cannot_be_looked_at_has_a_claim(bench: Bench, packed: Environment) -> None:
    """`sudo -u somebody stager stage` where /proc hides what is not one's own."""
    run(["chown", "-R", f"{NOBODY}:{NOBODY}", bench.root])
    drop = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    script = 'mount -o remount,hidepid=2 /proc; "$@" stage it; "$@" collect --all; "$@" status'
    hidden = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "sh", "-euc", script, "sh"]
    environ = bench.environ(HOME=str(bench.root), TMPDIR=str(bench.root))
    done = run([*hidden, *drop, VENV / "bin" / "stager"], env=environ)
    tree = Path(done.stdout.splitlines()[0])
    assert tree.is_dir(), done.stdout + done.stderr
