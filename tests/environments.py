"""Real Python environments for tests, and ways to watch a program use them.

Nothing here is a stand-in: the environments are made by ``venv``, ``virtualenv`` and ``uv`` and
filled from wheels. Wheels come from the registry that this machine's pip is configured for, once
per checkout (they are kept in ``.build/wheels``); everything installed from them lies in the
temporary directory of the session.

An environment made by a fixture belongs to the whole session: tests must not change it. A test
that wants one to change makes its own with the same functions (:func:`make_venv`, ...).
"""

from __future__ import annotations

import ast
import base64
import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
VENV = REPO / ".venv"
"""Where the tests run: the installed wheel and the tools."""

BASE_PYTHON = Path(sys.base_prefix) / "bin" / f"python{sys.version_info[0]}.{sys.version_info[1]}"
"""The interpreter ``.venv`` was made from."""

CALLERS = "TESTING_CALLERS_"
"""Prefix of the variables in which conftest.py keeps what it changed and pip needs as it was."""

SMALL = ("six", "requests")
"""What the small environments hold besides the sample package (requests brings four more)."""
NUMPY = ("numpy",)

SAMPLE = "stager-sample"


@dataclass(frozen=True)
class Environment:
    """An environment on disk.

    Args:
        prefix: its ``sys.prefix``.
        base_prefix: its ``sys.base_prefix``: where the standard library is.
    """

    prefix: Path
    base_prefix: Path

    @property
    def bin(self) -> Path:
        return self.prefix / "bin"

    @property
    def python(self) -> Path:
        return self.bin / "python"

    @property
    def site_packages(self) -> Path:
        return self.prefix / "lib" / BASE_PYTHON.name / "site-packages"

    def eval(self, expression: str, imports: str = "sys") -> str:
        """What `expression` is in this environment's Python, after ``import {imports}``."""
        code = f"import {imports}; print({expression})"
        return run([self.python, "-c", code]).stdout.removesuffix("\n")


def clean_environ(**changes: str | None) -> dict[str, str]:
    """Few variables, none of them from the shell that started the tests; None removes one.

    With these, Python does not write bytecode: running an environment does not change it.
    """
    names = ("HOME", "TMPDIR")
    environ: dict[str, str | None] = {name: os.environ[name] for name in names}
    environ["PATH"] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    environ["LC_ALL"] = "C.UTF-8"
    environ["PYTHONDONTWRITEBYTECODE"] = "1"
    environ.update(changes)
    return {name: value for name, value in environ.items() if value is not None}


def run(
    argv: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | Path = "/",
    check: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Run a program with :func:`clean_environ` from ``/``; an error shows what it printed."""
    done = subprocess.run(
        [str(one) for one in argv],
        env=clean_environ() if env is None else dict(env),
        cwd=cwd,
        check=False,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="surrogateescape",
    )
    if check and done.returncode != 0:
        raise AssertionError(
            f"{argv} ended with status {done.returncode}\n{done.stdout}{done.stderr}"
        )
    return done


# Packages


def wheels(*names: str, version: str = "") -> Path:
    """A directory with the wheels of `names` and of all they require, downloaded at most once.

    Args:
        names: of packages.
        version: of the Python they are for, as in ``3.13``; this one's without.
    """
    version = version or f"{sys.version_info[0]}.{sys.version_info[1]}"
    tag = f"{'-'.join(names)}-cp{version.replace('.', '')}"
    place = REPO / ".build" / "wheels" / tag
    with _locked(place):
        if not place.exists():
            partial = tempfile.mkdtemp(dir=place.parent)
            try:
                _download(names, version, Path(partial))
                os.chmod(partial, 0o755)
                os.rename(partial, place)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return place


def _download(names: Sequence[str], version: str, place: Path) -> None:
    """Registries hiccup: five attempts, each wait longer than the one before."""
    argv = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    argv += ["--only-binary=:all:", "--python-version", version, "--dest", str(place), *names]
    # How to reach the registry may be told by files in the caller's home.
    kept = {name: value for name, value in os.environ.items() if name.startswith(CALLERS)}
    env = {**os.environ, **{name.removeprefix(CALLERS): value for name, value in kept.items()}}
    for pause in (5, 10, 15, 20, None):
        done = run(argv, env=env, cwd=place, check=pause is None)
        if done.returncode == 0 or pause is None:
            return
        time.sleep(pause)


def sample_wheel(directory: Path) -> Path:
    """Write the wheel of a small package with each kind of file an installer rewrites or places.

    A console script, a script with a ``#!python`` line, package data, and a file for
    ``share/`` below the prefix.
    """
    info = "stager_sample-1.0.dist-info"
    data = "stager_sample-1.0.data"
    files = {
        "stager_sample/__init__.py": (
            "import pathlib\nimport sys\n\n\n"
            "def main():\n"
            "    word = (pathlib.Path(__file__).parent / 'word.txt').read_text().strip()\n"
            "    print(word, sys.prefix)\n"
        ),
        "stager_sample/word.txt": "hello\n",
        f"{data}/scripts/sample-script": "#!python\nimport stager_sample\nstager_sample.main()\n",
        f"{data}/data/share/stager-sample/sample.conf": "key = value\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {SAMPLE}\nVersion: 1.0\n",
        f"{info}/WHEEL": (
            "Wheel-Version: 1.0\nGenerator: stager\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        ),
        f"{info}/entry_points.txt": "[console_scripts]\nsample-console = stager_sample:main\n",
    }
    record = [f"{info}/RECORD,,"]
    for name, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=")
        record.append(f"{name},sha256={digest.decode()},{len(text.encode())}")
    files[f"{info}/RECORD"] = "\n".join(record) + "\n"
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "stager_sample-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            entry = zipfile.ZipInfo(name)
            # pip makes a script executable only if it is so in the archive.
            entry.external_attr = (0o100755 if "/scripts/" in name else 0o100644) << 16
            archive.writestr(entry, text)
    return path


def pip_install(
    environment: Environment, *, requirements: Sequence[str] = SMALL, own_pip: bool = False
) -> None:
    """Install `requirements` and the sample package with pip.

    Args:
        environment: need not have a pip of its own.
        requirements: names of packages.
        own_pip: whether to use the environment's pip, which may be much older than ours.
    """
    pip: list[str | Path] = [environment.python, "-m", "pip"]
    if not own_pip:
        pip = [sys.executable, "-m", "pip", "--python", environment.python]
    run(
        [*pip, "--quiet", "--disable-pip-version-check", "--no-cache-dir", "install"]
        + [*_offline(requirements), *requirements, SAMPLE]
    )


def pip_install_to(
    python: Path, *where: str | Path, requirements: Sequence[str] = SMALL, **environ: str
) -> None:
    """Install with pip for an interpreter, but not into it: ``--user``, ``--target``, ..."""
    options = [
        "--quiet",
        "--disable-pip-version-check",
        "--no-cache-dir",
        "--no-warn-script-location",
    ]
    run(
        [sys.executable, "-m", "pip", "--python", python, "install", *options, *where]
        # Debian forbids it for its own Python, wherever to.
        + ["--break-system-packages", "--ignore-installed", "--root-user-action=ignore"]
        + [*_offline(requirements), *requirements, SAMPLE],
        env=clean_environ(**environ),
    )


def uv_install(
    environment: Environment, *options: str, requirements: Sequence[str] = SMALL
) -> None:
    """Install `requirements` and the sample package with uv.

    uv links from its cache, which must lie on the same file system: it does, in the session's
    temporary directory. Without ``--link-mode`` that makes hard links on every file system.
    """
    run(
        [VENV / "bin" / "uv", "pip", "install", "--quiet", "--offline"]
        + [*_offline(requirements), "--python", environment.python, *options]
        + [*requirements, SAMPLE],
        env=_uv_environ(),
    )


def _offline(requirements: Sequence[str]) -> list[str]:
    sample = sample_wheel(Path(os.environ["TMPDIR"]) / f"sample-{os.getpid()}")
    places = (str(sample.parent), str(wheels(*requirements)))
    return ["--no-index", *(f"--find-links={place}" for place in places)]


def _uv_environ() -> dict[str, str]:
    return clean_environ(
        UV_CACHE_DIR=str(Path(os.environ["HOME"]) / "uv-cache"),
        UV_LINK_MODE="hardlink",
        UV_NO_CONFIG="1",
        UV_PYTHON_DOWNLOADS="never",
    )


# Environments


def make_venv(
    prefix: Path, *options: str, python: Path = BASE_PYTHON, pip: bool = False
) -> Environment:
    """An empty environment made by the standard library's venv.

    Args:
        prefix: where; made.
        options: for venv, such as ``--copies``.
        python: the interpreter to make it with.
        pip: whether it gets its own pip (takes some seconds).
    """
    run([python, "-m", "venv", *options, *(() if pip else ("--without-pip",)), prefix])
    return _described(prefix)


def make_small_venv(prefix: Path, *, python: Path = BASE_PYTHON, **modules: str) -> Environment:
    """An environment with modules of one line each, by name."""
    environment = make_venv(prefix, python=python)
    for name, line in modules.items():
        (environment.site_packages / f"{name}.py").write_text(f"{line}\n")
    return environment


def make_virtualenv(prefix: Path, *options: str, python: Path = BASE_PYTHON) -> Environment:
    """An environment with pip made by virtualenv from the wheels it carries."""
    # The directory virtualenv keeps its unpacked wheels in is below HOME: the session's.
    run(
        [VENV / "bin" / "virtualenv", "--quiet", "--no-download", "--no-periodic-update"]
        + ["--python", python, *options, prefix]
    )
    return _described(prefix)


def make_uv_venv(prefix: Path, *options: str, python: Path = BASE_PYTHON) -> Environment:
    """An empty environment made by uv."""
    uv = VENV / "bin" / "uv"
    run(
        [uv, "venv", "--quiet", "--offline", "--python", python, *options, prefix],
        env=_uv_environ(),
    )
    return _described(prefix)


def make_base(prefix: Path) -> Environment:
    """A CPython that lies outside ``/usr``, with its standard library, and finds itself there.

    It stands for every interpreter that a user or a site has put somewhere: pyenv, a module, and
    the standalone builds that uv downloads (those cannot be had from a package registry). It is a
    copy of :data:`BASE_PYTHON`, which looks for its library beside the directory it was started
    from, so ``sys.base_prefix`` is `prefix`. As in Debian's layout, ``ensurepip`` works in
    environments made from it, not in itself. File times are kept, so its bytecode stays valid.
    """
    stdlib = Path(sysconfig.get_path("stdlib", vars={"installed_base": sys.base_prefix}))
    (prefix / "bin").mkdir(parents=True)
    shutil.copy2(BASE_PYTHON.resolve(), prefix / "bin" / BASE_PYTHON.name)
    for name in ("python3", "python"):
        (prefix / "bin" / name).symlink_to(BASE_PYTHON.name)
    # Left out: packages installed into the interpreter, Debian's note that forbids installing,
    # the interpreter's own tests, and what is needed only to link against it.
    unwanted = ("site-packages", "dist-packages", "EXTERNALLY-MANAGED", "test", "config-*")
    shutil.copytree(
        stdlib,
        prefix / "lib" / BASE_PYTHON.name,
        ignore=shutil.ignore_patterns(*unwanted),
        ignore_dangling_symlinks=True,  # links are followed: Debian has one that leads to /etc
    )
    return _described(prefix)


def _described(prefix: Path) -> Environment:
    python = prefix / "bin" / "python"
    code = "import sys, ssl, sqlite3, ctypes; print(sys.prefix); print(sys.base_prefix)"
    own, base = run([python, "-c", code]).stdout.splitlines()
    if Path(own) != prefix:
        raise AssertionError(f"{python} says that its prefix is {own}")
    return Environment(prefix=prefix, base_prefix=Path(base))


class Workshop:
    """Makes each thing once per session, also where several processes run the tests.

    Args:
        root: a directory that all processes of the session share.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(exist_ok=True)

    def once(self, name: str, make: Callable[[Path], Environment]) -> Environment:
        """The environment at ``root/name``; `make` is called with that path if it is not there."""
        prefix = self.root / name
        done = self.root / f"{name}.done"
        with _locked(prefix):
            if not done.exists():
                shutil.rmtree(prefix, ignore_errors=True)  # of an attempt that failed
                make(prefix)
                done.touch()
            return _described(prefix)


@contextlib.contextmanager
def _locked(place: Path) -> Iterator[None]:
    """Hold the lock beside `place`; processes that test at the same time wait for one another."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{place}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# Watching


# $1 is the number of paths that follow, then comes the command. Standard input is a pipe to be
# written to once none of them can be seen any more: a command never runs beside the original.
_HIDE = r"""
set -eu
count=$1
shift
while [ "$count" -gt 0 ]; do
    if [ -d "$1" ]; then
        mount -n -t tmpfs -o ro,size=4k,mode=0555 stager-hidden "$1"
        test -z "$(ls -A "$1")"
    else
        mount -n --bind /dev/null "$1"
        test ! -f "$1"
    fi
    shift
    count=$((count - 1))
done
echo hidden >&0
exec "$@" </dev/null
"""


def run_hidden(
    argv: Sequence[str | Path],
    *,
    hide: Sequence[str | Path],
    env: Mapping[str, str] | None = None,
    cwd: str | Path = "/",
    check: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Run a command for which the paths `hide` do not exist; everybody else still sees them.

    In a mount namespace of its own an empty read-only file system covers each directory (a link
    is followed), and ``/dev/null`` each file. Needs root, or a kernel that lets users make
    namespaces. The command's own mounts end with it.

    Raises:
        AssertionError: a path could not be hidden, or was not there to begin with: the test would
            prove nothing. Also, with `check`, if the command fails.
    """
    paths = [os.path.realpath(path) for path in hide]
    for path in paths:
        if not os.path.exists(path):
            raise AssertionError(f"to be hidden, but not there: {path}")
    # What lies deeper goes first, while it can still be reached.
    paths = sorted(set(paths), key=len, reverse=True)
    unshare = ["unshare", "--mount", "--propagation", "private"]
    if os.geteuid() != 0:
        unshare.append("--map-root-user")
    reading, writing = os.pipe()
    try:
        done = subprocess.run(
            [*unshare, "sh", "-c", _HIDE, "hide", str(len(paths)), *paths]
            + [str(one) for one in argv],
            env=clean_environ() if env is None else dict(env),
            cwd=cwd,
            check=False,
            stdin=writing,
            capture_output=True,
            text=True,
            errors="surrogateescape",
        )
    finally:
        os.close(writing)
        with open(reading) as pipe:
            proof = pipe.read()
    if proof != "hidden\n":
        raise AssertionError(f"could not hide {paths}: {done.stderr}")
    if check and done.returncode != 0:
        raise AssertionError(
            f"{argv} without {paths} ended with status {done.returncode}\n"
            f"{done.stdout}{done.stderr}"
        )
    return done


# strace -y shows a descriptor with the path behind it: openat(3</usr/lib>, "x.so", O_RDONLY) = 4
_CALL = re.compile(
    r"^(\w+)\((?:[\w-]+(?:<((?:[^>\\]|\\.)*)>)?, )?(\"(?:[^\"\\]|\\.)*\")(.*)$", re.MULTILINE
)


def strace_files(
    argv: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | Path = "/",
    found_only: bool = False,
) -> list[str]:
    """The absolute path of every file-name call: open, stat, readlink, exec, ...; also of children.

    One entry per call, in order within each process. A path is shown as it was asked for, links
    not followed. Where a call with a relative path names no directory, it is taken to be below
    the one its process has changed to itself, or else below `cwd`.

    Args:
        argv: the command; it must succeed.
        env: its variables, :func:`clean_environ` if None.
        cwd: where it starts.
        found_only: leave out calls that failed, such as a search that found nothing there.

    Raises:
        AssertionError: the command failed, or strace saw nothing.
    """
    with tempfile.TemporaryDirectory() as directory:
        trace = os.path.join(directory, "trace")
        # A file per process: no line is ever broken in two by another process.
        strace = ["strace", "-ff", "-y", "-qqq", "-s", "4096", "-e", "signal=none"]
        run([*strace, "-e", "trace=%file", "-o", trace, *argv], env=env, cwd=cwd)
        paths = []
        for name in sorted(os.listdir(directory), key=lambda one: int(one.rpartition(".")[2])):
            text = Path(directory, name).read_text()
            here = str(cwd)
            for call, base, quoted, rest in _CALL.findall(text):
                failed = " = -1 " in rest
                path = _unquoted(quoted)
                if not path or (found_only and failed):
                    continue  # an empty path means the descriptor itself
                path = os.path.normpath(os.path.join(_unquoted(f'"{base}"') or here, path))
                paths.append(path)
                if call == "chdir" and not failed:
                    here = path
    if not paths:
        raise AssertionError(f"strace saw no file-name call of {argv}")
    return paths


def _unquoted(literal: str) -> str:
    """A C string as strace prints it; Python's byte literals have the same escapes."""
    return os.fsdecode(ast.literal_eval("b" + literal))
