"""``stage-run --same-path``: hard-coded paths lead to the staged tree, for the command alone."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from environments import VENV, Environment, make_venv, run, run_hidden
from workbench import NOBODY, Bench, shell_words

pytestmark = pytest.mark.environments

STAGE_RUN = VENV / "bin" / "stage-run"
AS_NOBODY = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
USERS = {"root": [], "nobody": AS_NOBODY}

# /dev/fuse is for everybody on a real node; here for whoever is in this namespace.
_FUSE = 'mknod -m 666 "$0/fuse" c 10 229; mount --bind "$0/fuse" /dev/fuse; exec "$@"'

every_user = pytest.mark.parametrize("user", USERS)


@dataclass
class Moved:
    """An environment that is packed, and where its users stage it."""

    bench: Bench
    environment: Environment

    @property
    def origin(self) -> Path:
        return self.environment.prefix

    def run(
        self,
        *argv: str | Path,
        user: str = "root",
        hide: Sequence[Path] | None = None,
        check: bool = True,
        cwd: str | Path = "/",
        how: str = "extract",
    ) -> subprocess.CompletedProcess[str]:
        """Run a command for which the original is an empty directory."""
        hidden = [self.origin] if hide is None else hide
        env = self.bench.environ(STAGER_STAGE_HOW=how, TMPDIR=str(self.bench.root))
        if user != "root":
            run(["chown", "-R", f"{NOBODY}:{NOBODY}", self.bench.root])
        argv = (*USERS[user], *argv)
        if how == "mount":
            argv = ("sh", "-euc", _FUSE, self.bench.root, *argv)
        return run_hidden(argv, hide=hidden, env=env, check=check, cwd=cwd)

    def same_path(self, *argv: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
        return self.run(STAGE_RUN, "--strict", "--env", "it", "--same-path", *argv, **options)


@pytest.fixture
def moved(bench: Bench, new_directory: Callable[[], Path]) -> Iterator[Moved]:
    above = new_directory() / "above"
    above.mkdir()
    environment = make_venv(above / "env")
    (environment.site_packages / "word.py").write_text("WORD = 'there'\n")
    script = environment.bin / "tell"
    script.write_text(f"#!{environment.python}\nimport sys, word\nprint(word.WORD, sys.prefix)\n")
    script.chmod(0o755)
    bench.pack(environment)
    yield Moved(bench, environment)
    shutil.rmtree(above.parent)


SHOW = """
import os, sys, word
print(word.__file__, sys.prefix)
print(os.path.samefile(sys.argv[1], os.environ["STAGER_PREFIX"]), os.getuid(), os.getgid())
print(open("/proc/self/status").read().split("CapEff:")[1].split()[0])
"""


@every_user
@pytest.mark.parametrize("how", ["mount", "extract"])
def test_hard_coded_paths_lead_to_the_staged_tree(moved: Moved, user: str, how: str) -> None:
    """Nothing of the original is there: what is read at its path can only be the staged tree."""
    origin = moved.origin
    assert moved.run("ls", "-A", origin).stdout == ""
    done = moved.same_path(origin / "bin" / "python", "-c", SHOW, origin, user=user, how=how)
    where, identity, capabilities = done.stdout.splitlines()
    module = moved.environment.site_packages / "word.py"
    assert (where.split(), done.stderr) == ([str(module), str(origin)], "")
    expected = (0, 0) if user == "root" else (NOBODY, NOBODY)
    assert identity == "True {} {}".format(*expected)
    assert (int(capabilities, 16) == 0) is (user != "root")  # the namespace's rights are gone
    # By name it is the staged tree under its own path, as without the option.
    said = moved.same_path("tell", user=user).stdout.split()
    assert said[0] == "there"
    assert said[1].startswith(f"{moved.bench.store}/envs/")


@every_user
def test_nobody_else_sees_it(moved: Moved, user: str) -> None:
    """Neither during nor after: what the command sees, the shell that started it does not."""
    command = shell_words(STAGE_RUN, "--strict", "--env", "it", "--same-path", "ls", moved.origin)
    listing = shell_words("ls", "-A", moved.origin)
    # On most systems mounts are shared: what one namespace does happens in the others.
    code = "mount --make-rshared /;" if user == "root" else ""
    code += (
        "cat /proc/self/mountinfo >before; mkfifo go seen;"
        f" {shell_words(STAGE_RUN, '--strict', '--env', 'it', '--same-path')}"
        f" sh -c '{listing}; echo >seen; read -r line <go' & read -r line <seen;"
        f" {listing}; echo >go; wait $!; cat /proc/self/mountinfo >after; cmp before after;"
        f" {listing}; {command}"
    )
    done = moved.run("sh", "-euc", code, user=user, cwd=moved.bench.root)
    content = sorted(os.listdir(moved.origin))
    said = done.stdout.splitlines()
    first, second = said[: len(content)], said[len(content) :]
    assert sorted(first) == sorted(second) == content


@every_user
def test_status_signals_and_directory(moved: Moved, user: str) -> None:
    done = moved.same_path("sh", "-c", "exit 7", user=user, check=False)
    assert done.returncode == 7
    done = moved.same_path("sh", "-c", "kill -TERM $$", user=user, check=False)
    assert done.returncode == -signal.SIGTERM
    assert moved.same_path("no-such-command", user=user, check=False).returncode == 127
    # From the original's directory, which is the staged one's then.
    code = f'cd {moved.origin}; test -z "$(ls)"; exec {shell_words(STAGE_RUN)} "$@"'
    argv = ["sh", "-euc", code, "sh", "--strict", "--env", "it", "--same-path", "ls"]
    done = moved.run(*argv, user=user)
    assert done.stdout.split() == sorted(os.listdir(moved.origin))


@every_user
def test_inside_of_it_nothing_is_packed_again(moved: Moved, user: str) -> None:
    """What is at the original's path is not the original with changes."""
    ref = moved.run(VENV / "bin" / "stager", "inspect", "it", user=user).stdout
    nested = shell_words(STAGE_RUN, "--strict", "--env", moved.origin, "--same-path", "tell")
    code = f"{nested}; {shell_words(VENV / 'bin' / 'stager', 'inspect', 'it')}"
    done = moved.same_path("sh", "-c", code, user=user)
    said, _, inspected = done.stdout.partition("\n")
    assert (said.split()[0], done.stderr) == ("there", "")
    assert inspected == ref


@pytest.mark.parametrize("strict", [True, False])
def test_where_the_kernel_does_not_allow_it(moved: Moved, strict: bool) -> None:
    """In another root directory nobody may make a user namespace (user_namespaces(7))."""
    root = moved.bench.root / "root"
    root.mkdir()
    stage_run = [STAGE_RUN, *(["--strict"] if strict else []), "--env", "it", "--same-path"]
    code = 'mount --rbind / "$0" && exec chroot "$0" "$@"'
    argv = ["sh", "-euc", code, root, *AS_NOBODY, *stage_run, "tell"]
    run(["chown", "-R", f"{NOBODY}:{NOBODY}", moved.bench.root])
    done = moved.run(*argv, check=False)
    first, hint = done.stderr.splitlines()
    refused = f"cannot be mounted over {moved.origin}: Operation not permitted"
    assert f"the staged tree {refused}" in first
    assert hint.startswith("hint: --same-path needs user namespaces")
    if strict:
        assert (done.returncode, done.stdout) == (125, "")
        assert first.startswith("stager: error: ")
    else:
        assert (done.returncode, done.stdout.split()[0]) == (0, "there")
        assert first.startswith("stage-run: running without --same-path: ")


@every_user
def test_where_the_original_has_no_directory(moved: Moved, user: str) -> None:
    hide = [moved.origin.parent]  # as on a node that has not mounted its file system
    done = moved.same_path("tell", user=user, hide=hide, check=False)
    assert (done.returncode, done.stdout) == (125, "")
    assert f"the staged tree cannot be mounted over {moved.origin}" in done.stderr
    assert "\nhint: " in done.stderr
    options = ["--env", "it", "--same-path"]
    done = moved.run(STAGE_RUN, *options, "tell", user=user, hide=hide)
    assert done.stdout.split()[0] == "there"
    assert done.stderr.startswith("stage-run: running without --same-path: ")


def test_a_launcher_is_told_apart(moved: Moved) -> None:
    """What srun starts has another parent, on this node too."""
    done = moved.same_path("srun", "true", check=False)
    assert done.returncode == 125
    assert "--same-path does not reach what srun starts" in done.stderr
    assert "srun stage-run --same-path CMD" in done.stderr


def test_a_base_that_is_a_layer(
    bench: Bench,
    new_directory: Callable[[], Path],
    pyenv_like_base: Environment,
    venv_on_base: Environment,
) -> None:
    """The links to its Python lead from tree to tree, which lie beside each other elsewhere."""
    bench.pack(venv_on_base)
    command = [STAGE_RUN, "--strict", "--env", "it", "--same-path"]
    hide = [venv_on_base.prefix, pyenv_like_base.prefix]
    for program in ("python", "sample-console"):
        argv = ["-c", "import six, sys; print(six.__file__, sys.base_prefix)"]
        argv = [venv_on_base.bin / program, *(argv if program == "python" else [])]
        said = run_hidden([*command, *argv], hide=hide, env=bench.environ()).stdout.split()
        if program == "python":
            assert said[0] == f"{venv_on_base.site_packages}/six.py"
            assert said[1].startswith(f"{bench.store}/envs/")
        else:
            assert said[0] == "hello"


@pytest.mark.parametrize("kind", ["user", "tree"])
def test_other_kinds(
    bench: Bench, new_directory: Callable[[], Path], pyenv_like_base: Environment, kind: str
) -> None:
    place = new_directory() / "place"
    library = Path(next(pyenv_like_base.prefix.glob("lib/python3.*")).name)
    site = place if kind == "tree" else place / "lib" / library / "site-packages"
    site.mkdir(parents=True)
    (site / "mine.py").write_text("word = 'copy'\n")
    (place / "other").write_text("of somebody else")
    options = ["--tree", place] if kind == "tree" else ["--user"]
    env = bench.environ(PYTHONUSERBASE=str(place))
    python = pyenv_like_base.python
    bench.stager("pack", *options, "--python", python, "--name", "it", env=env)
    (site / "mine.py").write_text("raise SystemExit('the original is used')\n")
    code = f"exec(open({str(site / 'mine.py')!r}).read()); print(word)"
    code += f"; print(open({str(place / 'other')!r}).read())"
    command = [STAGE_RUN, "--same-path", "--strict", "--env", "it", "python", "-c", code]
    env = bench.environ(STAGER_STAGE_ON_STALE="warn")
    # What is not Python's below a user base is there as before.
    assert run(command, env=env).stdout == "copy\nof somebody else\n"


def test_several_together(bench: Bench, new_directory: Callable[[], Path]) -> None:
    above = new_directory()
    codes = []
    for name in ("one", "other"):
        environment = make_venv(above / name)
        (environment.site_packages / f"{name}.py").write_text(f"print('{name}')\n")
        bench.pack(environment, name=name)
        codes.append(f"exec(open({str(environment.site_packages / name)!r} + '.py').read())")
    command = [STAGE_RUN, "--same-path", "--strict", "--env", "one+other", above / "one/bin/python"]
    hide = [above / "one", above / "other"]
    done = run_hidden([*command, "-c", "\n".join(codes)], hide=hide, env=bench.environ())
    assert done.stdout == "one\nother\n"
