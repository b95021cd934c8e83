"""What every test can count on, and what none may leave behind.

- ``stager`` is the wheel installed in ``.venv``, never the source tree.
- The working directory, HOME and TMPDIR lie in one directory of the session in the machine's
  temporary directory; no variable of the caller's own environment, job or configuration is set.
- A test belongs to the tier that its directory below ``tests/`` names, unless it says otherwise.
- After the last test no mount, process or file of the tests may be left: that fails the session.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import hypothesis
import pytest

import environments
import stager
from environments import REPO, VENV, Environment, Workshop

TIERS = ("unit", "hook", "root", "environments", "slurm", "pbs", "push", "benchmarks")
SESSIONS = "stager-tests-"
"""How the directory of a session is named; another session may be running beside this one."""
SESSION_VARIABLE = "TESTING_DIRECTORY"
"""Tells the processes of pytest-xdist, and whoever looks for leftovers, which session it is."""

# Variables that change what Python or stager do. The rest (PATH, locale) is as the caller has it.
UNWANTED = ("STAGER_", "PYTHON", "VIRTUAL_ENV", "CONDA", "UV_", "XDG_", "SLURM_", "PBS_")

# How long a test takes is no property of the code under test: machines are shared.
hypothesis.settings.register_profile("stager", deadline=None)
hypothesis.settings.load_profile("stager")

_session = pytest.StashKey[Path]()
_before = pytest.StashKey["set[str]"]()


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if not Path(stager.__file__).resolve().is_relative_to(VENV.resolve()):
        raise pytest.UsageError(
            f"the tests must run against the wheel installed in {VENV}, not {stager.__file__}: "
            "use `make test-unit`, or .venv/bin/pytest after `make setup`"
        )

    # A shell starts what runs in the background with ^C ignored, nohup with SIGHUP ignored, and
    # every process that a test starts would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)

    if _is_worker(config):
        session = Path(os.environ[SESSION_VARIABLE])
    else:
        config.stash[_before] = _leftovers()
        for name in ("HOME", "XDG_CONFIG_HOME"):
            if name in os.environ:
                os.environ[environments.CALLERS + name] = os.environ[name]
        session = Path(tempfile.mkdtemp(prefix=SESSIONS)).resolve()
        session.chmod(0o755)  # tests of other users' rights must be able to pass through
        for name, mode in (("home", 0o755), ("tmp", 0o1777), ("cwd", 0o755), ("public", 0o755)):
            (session / name).mkdir()
            (session / name).chmod(mode)
        if config.option.basetemp is None:
            config.option.basetemp = str(session / "pytest")
    config.stash[_session] = session

    for name in [name for name in os.environ if name.startswith(UNWANTED)]:
        del os.environ[name]
    os.environ[SESSION_VARIABLE] = str(session)
    os.environ["HOME"] = str(session / "home")
    os.environ["TMPDIR"] = tempfile.tempdir = str(session / "tmp")


def pytest_report_header(config: pytest.Config) -> list[str]:
    lines = [f"stager {stager.__version__} from {Path(stager.__file__).parent}"]
    if changed := _not_installed():
        lines.append(f"NOTE: the source has changed since `make setup`: {', '.join(changed)}")
    return lines


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if any(item.get_closest_marker(tier) for tier in TIERS):
            continue
        tier = item.path.relative_to(REPO / "tests").parts[0]
        if tier not in TIERS:
            raise pytest.UsageError(
                f"{item.nodeid} would never run: put it below tests/{{{','.join(TIERS)}}}"
            )
        item.add_marker(tier)


def pytest_runtest_setup(item: pytest.Item) -> None:
    needs_root = item.get_closest_marker("root") or item.get_closest_marker("push")
    if needs_root and os.geteuid() != 0:
        pytest.fail("this tier needs root", pytrace=False)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None, None, None]:
    yield  # the processes of pytest-xdist end in here
    config = session.config
    if _is_worker(config):
        return
    directory = config.stash[_session]
    limit = time.monotonic() + 10  # a process that was told to end may need a moment
    while (left := _leftovers(directory) - config.stash[_before]) and time.monotonic() < limit:
        time.sleep(0.1)
    if not any(line.startswith("mount") for line in left):  # never delete through a mount
        _remove(directory)
        if directory.exists():
            left.add(f"file that cannot be removed: {directory}")
    if left:
        print("The tests left behind:", *sorted(left), sep="\n  ", file=sys.stderr)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _is_worker(config: pytest.Config) -> bool:
    """Whether this is one of the processes that pytest-xdist runs tests in."""
    return hasattr(config, "workerinput")


def _not_installed() -> list[str]:
    """Source files that differ from the ones installed, relative to the repository."""
    installed = Path(stager.__file__).parent
    return [
        str(path.relative_to(REPO))
        for path in sorted((REPO / "stager").rglob("*.py"))
        if not (other := installed / path.relative_to(REPO / "stager")).exists()
        or other.read_bytes() != path.read_bytes()
    ]


def _leftovers(directory: Path | None = None) -> set[str]:
    """Mounts, processes and files there are now that look like ours; one line each.

    Others use the machine at the same time, so a mount counts if it lies in `directory` or where
    stager would make one if nobody told it a place; what belongs to another session never counts.
    A process counts if `directory` is in its variables (TMPDIR at least, unless a test scrubbed
    them), its arguments, or the path of its working directory.
    """
    own = str(directory)
    found = set()
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        if own in line or ("stager" in line.split()[4] and SESSIONS not in line):
            found.add(f"mount {line}")
    for place in {"/tmp", "/var/tmp", "/dev/shm", "/run", tempfile.gettempdir()}:
        for path in Path(place).glob("stager*"):
            # A cluster that somebody tries stager on may come and go meanwhile; that the tests' own
            # leaves nothing is a test of its own.
            if not path.name.startswith((SESSIONS, "stager-cluster")):
                found.add(f"file {path}")
    if directory is not None:
        for process in Path("/proc").glob("[0-9]*"):
            try:
                arguments = (process / "cmdline").read_bytes()
                about = arguments + (process / "environ").read_bytes()
                about += os.readlink(process / "cwd").encode(errors="surrogateescape")
            except OSError:  # ended meanwhile, or somebody else's
                continue
            if int(process.name) != os.getpid() and own.encode() in about:
                shown = arguments.replace(b"\0", b" ").decode(errors="replace")
                found.add(f"process {process.name}: {shown}")
    return found


def _remove(directory: Path) -> None:
    """Remove a tree, also where tests took away the right to change a directory."""
    for parent, names, _files in os.walk(directory):
        for name in names:
            path = os.path.join(parent, name)
            if not os.path.islink(path):
                os.chmod(path, 0o700)
    shutil.rmtree(directory, ignore_errors=True)


# Places


@pytest.fixture(scope="session", autouse=True)
def _not_in_checkout(request: pytest.FixtureRequest) -> Iterator[None]:
    """Programs must not find the source tree: ``python -m`` and ``-c`` look where they start."""
    before = Path.cwd()
    os.chdir(request.config.stash[_session] / "cwd")
    yield
    os.chdir(before)


@pytest.fixture
def public_path(request: pytest.FixtureRequest) -> Iterator[Path]:
    """Like tmp_path, but other users can reach it (pytest's own directories are mode 0700)."""
    directory = request.config.stash[_session] / "public"
    path = Path(tempfile.mkdtemp(dir=directory, prefix=""))
    path.chmod(0o755)
    yield path


# Environments: see environments.py. They belong to the session; tests do not change them.


@pytest.fixture(scope="session")
def workshop(request: pytest.FixtureRequest) -> Workshop:
    return Workshop(request.config.stash[_session] / "envs")


@pytest.fixture(scope="session")
def pyenv_like_base(workshop: Workshop) -> Environment:
    """A CPython outside /usr: see :func:`environments.make_base`."""
    return workshop.once("base", environments.make_base)


@pytest.fixture(scope="session")
def venv_stdlib(workshop: Workshop) -> Environment:
    """``python -m venv``, filled by the pip that came with it."""

    def make(prefix: Path) -> Environment:
        environment = environments.make_venv(prefix, pip=True)
        environments.pip_install(environment, own_pip=True)
        return environment

    return workshop.once("venv", make)


@pytest.fixture(scope="session")
def venv_on_base(workshop: Workshop, pyenv_like_base: Environment) -> Environment:
    """A venv whose base is outside /usr, as it is with pyenv, modules and uv's interpreters."""

    def make(prefix: Path) -> Environment:
        python = pyenv_like_base.bin / "python3"
        environment = environments.make_venv(prefix, python=python)
        environments.pip_install(environment)
        return environment

    return workshop.once("venv-on-base", make)


@pytest.fixture(scope="session")
def venv_copies(workshop: Workshop) -> Environment:
    """``venv --copies``: the interpreter is a file, not a link."""

    def make(prefix: Path) -> Environment:
        environment = environments.make_venv(prefix, "--copies")
        environments.pip_install(environment)
        return environment

    return workshop.once("venv-copies", make)


@pytest.fixture(scope="session")
def venv_nested(workshop: Workshop, venv_stdlib: Environment) -> Environment:
    """A venv made by the Python of another venv."""

    def make(prefix: Path) -> Environment:
        environment = environments.make_venv(prefix, python=venv_stdlib.python)
        environments.pip_install(environment)
        return environment

    return workshop.once("venv-nested", make)


@pytest.fixture(scope="session")
def venv_virtualenv(workshop: Workshop) -> Environment:
    """Made by virtualenv, with its own pip."""

    def make(prefix: Path) -> Environment:
        environment = environments.make_virtualenv(prefix)
        environments.pip_install(environment, own_pip=True)
        return environment

    return workshop.once("virtualenv", make)


@pytest.fixture(scope="session")
def venv_uv(workshop: Workshop) -> Environment:
    """Made and filled by uv: hard links into its cache, no bytecode."""

    def make(prefix: Path) -> Environment:
        environment = environments.make_uv_venv(prefix)
        environments.uv_install(environment)
        return environment

    return workshop.once("uv", make)


@pytest.fixture(scope="session")
def venv_uv_relocatable(workshop: Workshop) -> Environment:
    """``uv venv --relocatable``: scripts find their interpreter beside themselves."""

    def make(prefix: Path) -> Environment:
        environment = environments.make_uv_venv(prefix, "--relocatable")
        environments.uv_install(environment)
        return environment

    return workshop.once("uv-relocatable", make)


@pytest.fixture(scope="session")
def venv_uv_symlink(workshop: Workshop) -> Environment:
    """Filled by uv with symbolic links that lead into its cache, out of the environment."""

    def make(prefix: Path) -> Environment:
        environment = environments.make_uv_venv(prefix)
        environments.uv_install(environment, "--link-mode=symlink")
        return environment

    return workshop.once("uv-symlink", make)


@pytest.fixture(scope="session")
def venv_numpy(workshop: Workshop) -> Environment:
    """numpy: compiled modules, and shared libraries that come in the wheel.

    As pip would leave it (copies, bytecode), filled by uv because that is quicker.
    """

    def make(prefix: Path) -> Environment:
        environment = environments.make_venv(prefix)
        options = ("--link-mode=copy", "--compile-bytecode")
        environments.uv_install(environment, *options, requirements=environments.NUMPY)
        return environment

    return workshop.once("venv-numpy", make)
