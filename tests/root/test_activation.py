"""A shell that activates a staged environment uses it, however it got there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from environments import BASE_PYTHON, VENV, run, strace_files
from workbench import Staged

SHELLS = {
    "bash": ["bash", "--norc"],
    "dash": ["dash"],
    "zsh": ["zsh", "-f"],
    "csh": ["csh", "-f"],
    "fish": ["fish", "--no-config"],
}
STAGER = VENV / "bin" / "stager"

# How the syntax of `stager activate` is asked for, and what users type.
EVAL = {
    "bash": f'eval "$({STAGER} activate {{ref}})"',
    "dash": f'eval "$({STAGER} activate {{ref}})"',
    "zsh": f'eval "$({STAGER} activate {{ref}})"',
    "csh": f'eval "`{STAGER} activate --shell csh {{ref}}`"',
    "fish": f"eval ({STAGER} activate --shell fish {{ref}})",
}

every_shell = pytest.mark.parametrize("shell", SHELLS)


def in_shell(
    staged: Staged,
    shell: str,
    *lines: str,
    env: Mapping[str, str] | None = None,
    check: bool = True,
) -> str:
    """Run a script of these lines with the original hidden, and return what it prints."""
    script = staged.bench.root / f"script.{shell}"
    script.write_text("\n".join(lines) + "\n")
    env = staged.bench.environ() if env is None else env
    return staged.run(*SHELLS[shell], script, env=env, check=check).stdout


def source(staged: Staged, shell: str) -> str:
    """The line that sources the environment's own script."""
    suffix = {"csh": ".csh", "fish": ".fish"}.get(shell, "")
    verb = "source" if suffix else "."
    # Scripts for csh expect an interactive shell, which has a prompt.
    prompt = "set prompt='%'\n" if shell == "csh" else ""
    return f"{prompt}{verb} {staged.bin}/activate{suffix}"


@every_shell
@pytest.mark.parametrize("kind", ["venv", "virtualenv", "uv", "uv-relocatable", "on-base"])
def test_own_script_activates_and_deactivates(
    staged: Callable[[str, str], Staged], kind: str, shell: str
) -> None:
    if (kind, shell) in {("uv-relocatable", "dash"), ("uv-relocatable", "csh")}:
        kind = "uv"  # a relocatable script asks its shell where it lies; these two cannot tell
    one = staged(kind, "mounted")
    said = in_shell(
        one,
        shell,
        "printenv PATH",
        source(one, shell),
        "printenv VIRTUAL_ENV",
        "python -c 'import sys; print(sys.prefix)'",
        "sample-console",
        "deactivate",
        "printenv PATH",
        "sh -c 'echo \"${VIRTUAL_ENV-unset}\"'",
    ).splitlines()
    before, after = said.pop(0), said.pop(-2)
    assert said == [str(one.prefix), str(one.prefix), f"hello {one.prefix}", "unset"]
    assert after == before


@pytest.mark.parametrize("kind", ["virtualenv", "uv"])
def test_activate_this(staged: Callable[[str, str], Staged], kind: str) -> None:
    """For a Python that is embedded, and for those who have another one already."""
    one = staged(kind, "mounted")
    code = (
        "import os, runpy, sys; runpy.run_path(sys.argv[1]); import six;"
        " print(os.environ['VIRTUAL_ENV'], sys.prefix, six.__file__, os.environ['PATH'])"
    )
    said = one.run(BASE_PYTHON, "-S", "-c", code, one.bin / "activate_this.py").stdout.split()
    assert said[:3] == [str(one.prefix), str(one.prefix), f"{one.site_packages}/six.py"]
    assert said[3].startswith(f"{one.bin}:")


@pytest.mark.parametrize("kind", ["venv", "virtualenv", "uv"])
@pytest.mark.parametrize(
    "shell", [["bash", "-euc"], ["dash", "-euc"], ["zsh", "-f", "-o", "shwordsplit", "-euc"]]
)
def test_own_script_in_a_strict_shell_with_arguments(
    staged: Callable[[str, str], Staged], kind: str, shell: list[str]
) -> None:
    """What a batch script does: errors and unset variables end it, and it has arguments."""
    one = staged(kind, "mounted")
    code = f'. {one.bin}/activate; echo "$1 $2 $VIRTUAL_ENV"; deactivate; echo "$#"'
    said = one.run(*shell, code, "script", "first", "second").stdout
    assert said == f"first second {one.prefix}\n2\n"


@every_shell
@pytest.mark.parametrize("kind", ["venv", "on-base"])
def test_eval_activates(staged: Callable[[str, str], Staged], kind: str, shell: str) -> None:
    """By the published name, in a shell that knows nothing of the environment."""
    one = staged(kind, "mounted")
    after = activated(one, shell, kind, one.bench.environ(HOME="/nowhere"))
    assert after["VIRTUAL_ENV"] == after["STAGER_PREFIX"] == str(one.prefix)
    assert after["PATH"].split(":")[0] == str(one.bin)
    assert after["PYTHONNOUSERSITE"] == "1"


def activated(one: Staged, shell: str, ref: str, env: Mapping[str, str]) -> dict[str, str]:
    """The variables after ``stager activate``, as the Python that is found then sees them."""
    said = in_shell(
        one,
        shell,
        EVAL[shell].format(ref=ref),
        "python -c 'import os, json, sys; print(json.dumps([sys.prefix, dict(os.environ)]))'",
        env=env,
    )
    prefix, variables = json.loads(said)
    assert prefix == str(one.prefix)
    return dict(variables)


@every_shell
def test_eval_replaces_an_inherited_activation(
    staged: Callable[[str, str], Staged], shell: str
) -> None:
    """``sbatch --export=ALL`` from a shell in which the original is active, on top of conda."""
    one = staged("venv", "mounted")
    old, new = str(one.hide[0]), str(one.prefix)
    odd = "/data/a b'c$d!e\\f\"g*"
    path = os.defpath
    before = one.bench.environ(
        VIRTUAL_ENV=old,
        VIRTUAL_ENV_PROMPT="(venv) ",
        PATH=f"{old}/bin:/opt/conda/bin:{old}/bin/:{path}",
        PYTHONPATH=f"{old}/src:/shared/lib",
        LD_LIBRARY_PATH=f"{old}/lib:{odd}",
        SSL_CERT_FILE=f"{old}/cacert.pem",
        PYTHONPYCACHEPREFIX="/shared/cache",
        CONDA_PREFIX="/opt/conda",
        CONDA_DEFAULT_ENV="base",
        CONDA_SHLVL="1",
        _CE_CONDA="",
    )
    after = activated(one, shell, "venv", before)
    assert [item for item in after["PATH"].split(":") if item.startswith((old, "/opt"))] == []
    assert after["PATH"] == f"{new}/bin:{path}"
    assert after["PYTHONPATH"] == f"{new}/src:/shared/lib"
    assert after["LD_LIBRARY_PATH"] == f"{new}/lib:{odd}"
    assert after["SSL_CERT_FILE"] == f"{new}/cacert.pem"
    gone = ("VIRTUAL_ENV_PROMPT", "PYTHONPYCACHEPREFIX", "CONDA_", "_CE_")
    assert [name for name in after if name.startswith(gone)] == []
    # Ours, which says where the original is: what falls back to it must know.
    assert [name for name, value in after.items() if old in value] == ["STAGER_ORIGIN"]


@every_shell
def test_eval_again_changes_nothing(staged: Callable[[str, str], Staged], shell: str) -> None:
    one = staged("venv", "mounted")
    once = activated(one, shell, "venv", one.bench.environ())
    twice = activated(one, shell, "venv", once)
    ignored = {"SHLVL", "_", "PWD", "OLDPWD"}  # the shells' own
    assert {key: twice.get(key) for key in {*once, *twice} - ignored} == {
        key: once.get(key) for key in {*once, *twice} - ignored
    }


@every_shell
def test_eval_of_a_failure_fails(staged: Callable[[str, str], Staged], shell: str) -> None:
    """A job that goes on in the wrong environment is worse than one that stops."""
    one = staged("venv", "mounted")
    status = "$status" if shell in ("csh", "fish") else "$?"
    said = in_shell(
        one, shell, EVAL[shell].format(ref="nosuch"), f"echo {status}", env=one.bench.environ()
    )
    assert said == "1\n"


def test_eval_in_a_strict_shell(staged: Callable[[str, str], Staged]) -> None:
    one = staged("venv", "mounted")
    code = f'eval "$({STAGER} activate venv)"; python -c "import sys; print(sys.prefix)"'
    for shell in ("bash", "dash", "zsh"):
        said = one.run(shell, "-euc", code, env=one.bench.environ()).stdout
        assert said == f"{one.prefix}\n"


def test_user_site_stays_out(staged: Callable[[str, str], Staged], tmp_path: Path) -> None:
    """A package in ``~/.local`` neither shadows an installed one nor is looked for."""
    one = staged("venv", "mounted")
    version = one.eval("'%d.%d' % sys.version_info[:2]")
    local = tmp_path / ".local" / "lib" / f"python{version}" / "site-packages"
    local.mkdir(parents=True)
    (local / "six.py").write_text("raise SystemExit('the wrong six')\n")
    code = f'eval "$({STAGER} activate venv)"; python -c "import six; print(six.__file__)"'
    environ = one.bench.environ(HOME=str(tmp_path), XDG_CONFIG_HOME="/nowhere")
    assert one.run("sh", "-euc", code, env=environ).stdout == f"{one.site_packages}/six.py\n"
    asked = strace_files(["sh", "-euc", code], env=environ)
    assert [path for path in asked if path.startswith(f"{tmp_path}/.local/lib")] == []
    wanted = one.bench.environ(STAGER_RUN_USER_SITE="yes")
    assert "PYTHONNOUSERSITE" not in activated(one, "bash", "venv", wanted)


def test_stage_run(staged: Callable[[str, str], Staged]) -> None:
    one = staged("venv", "mounted")
    stage_run = VENV / "bin" / "stage-run"
    code = "import sys, os; print(sys.prefix, os.getpid())"
    said = one.run(stage_run, "--env", "venv", "python", "-c", code, env=one.bench.environ())
    assert said.stdout.split()[0] == str(one.prefix)
    for status in (0, 3):
        command = ["--env", "venv", "sh", "-c", f"exit {status}"]
        assert (
            one.run(stage_run, *command, env=one.bench.environ(), check=False).returncode == status
        )


def test_stage_run_with_the_variables_of_another_python(
    staged: Callable[[str, str], Staged],
) -> None:
    """``PYTHONHOME`` would keep stager's own Python from starting, and then the job."""
    one = staged("venv", "mounted")
    environ = one.bench.environ(PYTHONHOME=str(one.hide[0]), PYTHONPATH="/nowhere")
    code = "import os, sys; print(sys.prefix, os.environ.get('PYTHONHOME'))"
    command = [VENV / "bin" / "stage-run", "--strict", "--env", "venv", "python", "-c", code]
    assert one.run(*command, env=environ).stdout == f"{one.prefix} None\n"


def test_stage_run_falls_back_to_the_original(staged: Callable[[str, str], Staged]) -> None:
    """Without the option the job runs, on the original and with one line that says so."""
    one = staged("venv", "mounted")
    stage_run = VENV / "bin" / "stage-run"
    blocked = one.bench.root / "blocked"
    blocked.write_text("not a directory")
    environ = one.bench.environ(STAGER_STORE=str(blocked))
    command = [stage_run, "--env", "venv", "python", "-c", "import sys; print(sys.prefix)"]
    done = run(command, env=environ)
    assert done.stdout == f"{one.hide[0]}\n"
    assert len(done.stderr.splitlines()) == 1
    assert "running the original environment" in done.stderr
    done = run([stage_run, "--strict", *command[1:]], env=environ, check=False)
    assert (done.returncode, done.stdout) == (125, "")
    assert "hint: " in done.stderr
