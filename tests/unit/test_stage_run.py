"""``stage-run``: the command and nothing but the command, and no Python where none is needed."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import tiny
from environments import BASE_PYTHON, REPO, VENV, clean_environ
from stager import containers
from stager.staging import allocation

pytestmark = pytest.mark.unit

STAGE_RUN = VENV / "bin" / "stage-run"
SHELLS = ["dash", "bash", "busybox sh"]
"""What ``/bin/sh`` may be."""


def test_programs_that_start_others_elsewhere_are_the_same_ones() -> None:
    script = (REPO / "stager/scripts/stage-run").read_text()
    (found,) = re.findall(r"case \$\{command##\*/\} in (srun [^)]*)\)", script)
    assert {*found.split(" | ")} == allocation.LAUNCHERS


@dataclass
class Done:
    """How a run of stage-run went."""

    status: int
    out: str
    err: str
    programs: list[str]
    """Every program that was executed, by its path, stage-run itself first."""


def run(argv: list[str | Path], environ: dict[str, str], **options: object) -> Done:
    """Run a command and see which programs it executes."""
    with tempfile.NamedTemporaryFile("r") as trace:
        strace = ["strace", "-f", "-qq", "-s", "4096", "-e", "trace=execve", "-o", trace.name]
        done = subprocess.run(
            [*strace, *argv], env=environ, capture_output=True, text=True, check=False, **options
        )  # type: ignore[call-overload]
        programs = re.findall(r'execve\("((?:[^"\\]|\\.)*)".* = 0$', trace.read(), re.MULTILINE)
    return Done(done.returncode, done.stdout, done.stderr, programs)


# The fast path, with something beside it that only tells how it was called


@dataclass
class Copy:
    """A copy of stage-run beside a ``stager`` that prints its arguments."""

    program: Path
    prefix: Path
    active: dict[str, str]

    def __call__(self, *argv: str, shell: str = "dash", **changes: str | None) -> Done:
        environ = clean_environ(**{**self.active, **changes})
        return run([*shell.split(), self.program, *argv], environ)

    def to_python(self, *argv: str, **changes: str | None) -> bool:
        """Whether this was handed on to Python, with the very same arguments."""
        done = self(*argv, **changes)
        told = done.out.split("\0")
        if told[0] != "stager":
            assert done.status == 0, done
            return False
        assert told[1:-1] == ["run", *argv]
        return True


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    program = tmp_path / "bin" / "stage-run"
    program.parent.mkdir()
    shutil.copy(STAGE_RUN, program)
    told = program.with_name("stager")
    told.write_text("#!/bin/sh\nprintf '%s\\0' stager \"$@\"\n")
    told.chmod(0o755)
    prefix = tmp_path / "staged tree"
    (prefix / "bin").mkdir(parents=True)
    active = {
        "STAGER_ACTIVE": "torch",
        "STAGER_PREFIX": str(prefix),
        "PATH": f"{prefix}/bin:{os.environ['PATH']}",
    }
    return Copy(program, prefix, active)


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    "options",
    [[], ["--env", "torch"], ["--env=torch"], ["--strict"], ["--strict", "--env", "torch", "--"]],
)
def test_where_it_is_active_only_the_command_is_started(
    copy: Copy, shell: str, options: list[str]
) -> None:
    done = copy(*options, "printf", "%s|", "a b", "", "--env", "*", shell=shell)
    assert (done.status, done.out, done.err) == (0, "a b||--env|*|", "")
    assert [os.path.basename(one) for one in done.programs] == [
        shell.split(maxsplit=1)[0],
        "printf",
    ]


def test_what_the_environment_says_counts_as_if_it_were_typed(copy: Copy) -> None:
    assert not copy.to_python("true", STAGER_ENV="torch")
    assert copy.to_python("true", STAGER_ENV="other")
    assert not copy.to_python("--env", "torch", "true", STAGER_ENV="other")


@pytest.mark.parametrize(
    ("argv", "changes"),
    [
        (["--env", "other", "true"], {}),
        (["--env=other", "true"], {}),
        (["--env", "torc", "true"], {}),
        (["--env", "", "true"], {}),
        (["--env=", "true"], {}),
        (["true"], {"STAGER_ACTIVE": None, "STAGER_PREFIX": None}),
        (["true"], {"STAGER_PREFIX": ""}),
        (["true"], {"STAGER_PREFIX": "/no/such/tree"}),
        (["true"], {"PATH": "/usr/bin:/bin"}),
        (["--how", "extract", "true"], {}),
        (["--store", "/x", "true"], {}),
        (["--no-such-option", "true"], {}),
        (["--same-path", "true"], {}),
        (["--help"], {}),
        (["--env"], {}),
        (["--env", "torch"], {}),
        (["--"], {}),
        ([], {}),
    ],
)
def test_everything_else_is_for_python(
    copy: Copy, argv: list[str], changes: dict[str, str | None]
) -> None:
    assert copy.to_python(*argv, **changes)


def test_arguments_reach_python_as_they_are(copy: Copy) -> None:
    argv = ["--env", "other", "sh", "-c", "a b", "", "*", "$HOME", "--", "--env", "x\ny"]
    assert copy.to_python(*argv)


def test_a_tree_that_went_away_is_staged_again(copy: Copy) -> None:
    shutil.rmtree(copy.prefix)
    assert copy.to_python("true")


@pytest.mark.parametrize("shell", SHELLS)
def test_the_status_is_the_commands(copy: Copy, shell: str) -> None:
    assert copy("sh", "-c", "exit 7", shell=shell).status == 7
    assert copy("sh", "-c", "kill -9 $$", shell=shell).status in (137, -9)
    assert copy("no-such-command", shell=shell).status == 127
    assert copy("/dev/null", shell=shell).status == 126


def test_what_is_first_on_the_path_is_run(copy: Copy) -> None:
    own = copy.prefix / "bin" / "python"
    own.write_text("#!/bin/sh\necho staged\n")
    own.chmod(0o755)
    assert copy("python").out == "staged\n"


def test_standard_streams_and_directory_are_the_commands(copy: Copy, tmp_path: Path) -> None:
    done = run(
        ["dash", copy.program, "sh", "-c", "cat; pwd; echo error >&2"],
        clean_environ(**copy.active), input="from outside\n", cwd=tmp_path,
    )  # fmt: skip
    assert done.out == f"from outside\n{tmp_path}\n"
    assert done.err == "error\n"


def test_it_is_found_by_its_name_alone_too(copy: Copy) -> None:
    environ = clean_environ(**copy.active)
    environ["PATH"] = f"{copy.program.parent}:{environ['PATH']}"
    assert run(["sh", "-c", "stage-run echo hello"], environ).out == "hello\n"
    told = run(["sh", "-c", "exec stage-run --env other true"], environ)
    assert told.out.split("\0")[:2] == ["stager", "run"]


def test_nothing_is_left_or_exported_by_the_fast_path(copy: Copy) -> None:
    before = clean_environ(**copy.active)
    done = copy("env", "-0")
    after = dict(item.split("=", 1) for item in done.out.split("\0") if item)
    for name in ("_", "PWD", "OLDPWD", "SHLVL"):  # a shell's own
        after.pop(name, None)
    assert after == before


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("program", ["apptainer", "singularity"])
def test_a_container_may_lack_the_nodes_python(copy: Copy, shell: str, program: str) -> None:
    """One line per node, without starting Python; what Python says where it starts."""
    container = copy.prefix / "bin" / program
    container.write_text("#!/bin/sh\necho $*\n")
    container.chmod(0o755)
    config = copy.prefix / "pyvenv.cfg"
    variables = {"home": "as it was", "key": "too"}
    for home, said in (
        (copy.prefix.parent / "layer" / "bin", False),  # a layer of its own
        (BASE_PYTHON.parent, True),
    ):
        config.write_text(f"home = {home}\ninclude-system-site-packages = false\n")
        done = copy(program, "exec", "img.sif", shell=shell, **variables)
        assert (done.status, done.out) == (0, "exec img.sif\n")
        expected = containers.warning([program], tiny.described())
        assert done.err == (f"stage-run: {expected}\n" if said else "")
        assert copy("env", shell=shell, **variables).err == ""
        assert copy(program, shell=shell, SLURM_LOCALID="1").err == ""
    assert "/python" not in "".join(done.programs)
    config.unlink()  # of a kind that brings its Python
    assert copy(program, shell=shell).err == ""
    container.write_text("#!/bin/sh\nprintenv home key\n")
    assert copy(program, shell=shell, **variables).out == "as it was\ntoo\n"


# With the real thing behind it


@dataclass
class Site:
    root: Path

    @property
    def prefix(self) -> Path:
        return self.root / "environments" / "tiny"

    def run(self, *argv: str, **changes: str | None) -> Done:
        variables: dict[str, str | None] = {
            "STAGER_STORE": f"{self.root}/store",
            "STAGER_REPOSITORY": f"{self.root}/repository",
            "STAGER_LOCAL_PREFIXES": f"{tiny.BASE_PREFIX}:/usr",
            "STAGER_STAGE_HOW": "extract",
        }
        return run([STAGE_RUN, *argv], clean_environ(**{**variables, **changes}), cwd=self.root)


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    site = Site(Path(tempfile.mkdtemp()))
    tiny.environment(site.prefix)
    tiny.packed(site.prefix, tiny.configured(site.root))
    yield site
    shutil.rmtree(site.root)


@pytest.fixture
def blocked(site: Site) -> Iterator[str]:
    """A store that cannot be used: staging fails."""
    path = site.root / "blocked"
    path.mkdir(exist_ok=True)
    path.chmod(0o755)
    yield str(path)
    assert os.listdir(path) == []


SHOW = """
import os, sys, tiny
print(sys.prefix, os.environ['STAGER_ACTIVE'], os.environ['VIRTUAL_ENV'])
"""


def test_a_command_runs_from_the_staged_tree(site: Site) -> None:
    for name in ("tiny", "./environments/tiny", str(site.prefix)):
        done = site.run("--env", name, "python", "-c", SHOW)
        assert (done.status, done.err) == (0, "")
        prefix, active, virtual = done.out.split()
        assert prefix == virtual
        assert os.path.dirname(prefix) == f"{site.root}/store/envs"
        assert active == (name if name == "tiny" else str(site.prefix))


def test_inside_of_it_another_is_a_shell_and_the_command(site: Site) -> None:
    done = site.run("--env", "tiny", str(STAGE_RUN), "--env", "tiny", "tiny")
    assert done.status == 0
    at = done.programs.index(str(STAGE_RUN), 1)
    names = [os.path.basename(one) for one in done.programs[at:]]
    # The command is a script that is run by the staged Python.
    assert names == ["stage-run", "tiny"]


def test_the_same_relative_name_elsewhere_is_another_environment(site: Site) -> None:
    """What is active is remembered by where it is, not by how it was called from there."""
    inner = f"cd /; {STAGE_RUN} --env ./environments/tiny true"
    done = site.run("--env", "./environments/tiny", "sh", "-c", inner)
    assert done.status != 0
    assert "/environments/tiny" in done.err


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (["sh", "-c", "exit 7"], 7),
        (["true"], 0),
        (["no-such-command"], 127),
        (["/dev/null"], 126),
        (["/"], 126),
        ([""], 127),
        (["--", "sh", "-c", "exit 3"], 3),
    ],
)
def test_the_status_is_the_commands_there_too(site: Site, command: list[str], status: int) -> None:
    done = site.run("--env", "tiny", *command)
    assert done.status == status
    assert "Traceback" not in done.err
    assert (done.err == "") is (status not in (126, 127))


def test_a_script_without_an_interpreters_line_is_run_by_sh_in_every_rank(site: Site) -> None:
    script = site.root / "script"
    script.write_text("echo $0 $#; exit 5\n")
    script.chmod(0o755)
    for command in (["./script", "a b"], [str(STAGE_RUN), "./script", "a b"]):  # a leader, others
        done = site.run("--env", "tiny", *command)
        assert (done.status, done.out, done.err) == (5, "./script 1\n", "")


def test_an_option_behind_the_command_is_the_commands(site: Site) -> None:
    done = site.run("--env", "tiny", "echo", "--env", "x", "--strict", "--help", "--")
    assert (done.status, done.out) == (0, "--env x --strict --help --\n")


def test_where_staging_fails_the_original_runs_and_that_is_told(site: Site, blocked: str) -> None:
    done = site.run(
        "--env", "tiny", "python", "-c", "import sys; print(sys.prefix)", STAGER_STORE=blocked
    )
    assert (done.status, done.out) == (0, f"{site.prefix}\n")
    (line,) = done.err.splitlines()
    assert line.startswith("stage-run: running the original environment: ")
    assert blocked in line


WRONG = ["pack: {fromat: x}\n", "pack: [\n", "collect.max_size: much\n"]


@pytest.mark.parametrize("text", WRONG)
@pytest.mark.parametrize("name", ["tiny", "./environments/tiny"])
def test_a_wrong_configuration_keeps_no_job_from_the_original(
    site: Site, tmp_path: Path, name: str, text: str
) -> None:
    code = "import sys; print(sys.prefix)"
    path = wrong(tmp_path, text)
    done = site.run("--env", name, "python", "-c", code, XDG_CONFIG_HOME=str(tmp_path))
    assert (done.status, done.out) == (0, f"{site.prefix}\n")
    (line,) = done.err.splitlines()
    assert line.startswith("stage-run: running the original environment: ")
    assert path in line
    done = site.run("--env", name, "python", "-c", code, STAGER_PACK_LEVEL="high")
    assert (done.status, done.out) == (0, f"{site.prefix}\n")
    assert "$STAGER_PACK_LEVEL" in done.err


@pytest.mark.parametrize("text", ["run.strict: yes\npack: {fromat: x}\n", *WRONG])
def test_where_it_must_not_a_wrong_configuration_is_125(
    site: Site, tmp_path: Path, text: str
) -> None:
    wrong(tmp_path, text)
    options = [] if "strict" in text else ["--strict"]
    done = site.run(*options, "--env", "tiny", "echo", "ran", XDG_CONFIG_HOME=str(tmp_path))
    assert (done.status, done.out) == (125, "")
    done = site.run("--env", "nope", "echo", "ran", XDG_CONFIG_HOME=str(tmp_path))
    assert (done.status, done.out) == (125, "")


def wrong(home: Path, text: str) -> str:
    """Write a user's configuration, and tell where it is."""
    (home / "stager").mkdir()
    (home / "stager" / "config.yaml").write_text(text)
    return f"{home}/stager/config.yaml"


@pytest.mark.parametrize("how", ["--strict", "variable"])
def test_where_it_must_not_it_fails_with_125(site: Site, blocked: str, how: str) -> None:
    options = ["--strict"] if how == "--strict" else []
    variable = None if how == "--strict" else "yes"
    done = site.run(
        *options, "--env", "tiny", "echo", "ran", STAGER_STORE=blocked, STAGER_RUN_STRICT=variable
    )
    assert (done.status, done.out) == (125, "")
    assert done.err.splitlines()[0].startswith("stager: error: ")
    assert "echo" not in [os.path.basename(one) for one in done.programs]


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--"],
        ["--env", "tiny"],
        ["--no-such-option", "true"],
        ["--timeout", "soon", "--env", "tiny", "true"],
        ["--env", "nope", "true"],
    ],
)
def test_mistakes_are_125_and_run_nothing(site: Site, argv: list[str]) -> None:
    done = site.run(*argv)
    assert (done.status, done.out) == (125, "")
    assert done.err.startswith("stager: error: ")
    assert "Traceback" not in done.err
    assert not any(one.endswith("/true") for one in done.programs)


@pytest.mark.parametrize("option", ["--timeout=soon", "--store=relative\ty"])
def test_a_mistake_in_an_option_runs_nothing_in_an_active_environment(
    site: Site, option: str
) -> None:
    done = site.run(option, "echo", "ran", VIRTUAL_ENV=site.prefix)
    assert (done.status, done.out) == (125, "")
    assert "(command line)" in done.err


def test_a_bug_of_ours_is_no_reason_for_a_job_not_to_run(site: Site, tmp_path: Path) -> None:
    """Anything that goes wrong in staging, foreseen or not, ends in the original environment."""
    done = site.run(
        "--env", "tiny", "python", "-c", "import sys; print(sys.prefix)",
        STAGER_STORE=f"{site.root}/cold", PYTHONPATH=str(spoil(tmp_path)),
    )  # fmt: skip
    assert (done.status, done.out) == (0, f"{site.prefix}\n")
    assert "a bug in stager: ZeroDivisionError" in done.err


def spoil(directory: Path) -> Path:
    """A ``sitecustomize`` with which staging fails as only a bug would make it."""
    (directory / "sitecustomize.py").write_text(
        "import sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'stager.transfer':\n"
        "            1 / 0\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    return directory


def test_the_program_is_installed_and_can_be_run() -> None:
    assert stat.S_IMODE(STAGE_RUN.stat().st_mode) & 0o111 == 0o111
    assert STAGE_RUN.read_text().startswith("#!/bin/sh\n")
