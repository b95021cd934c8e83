"""Activation of a conda environment: variables and scripts, in every shell and for every rank."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from environments import REPO, VENV, run
from stager import activate, config, jobstate, ref
from stager.hooks import jobactivation
from stager.repository import Repository
from stager.staging import stage
from workbench import Staged

from .fixtures import VARIABLES, CondaEnvironment

pytestmark = pytest.mark.environments

STAGER, STAGE_RUN = VENV / "bin" / "stager", VENV / "bin" / "stage-run"
SHOWN = ("CONDA", "DEMO", "VIRTUAL_ENV", "_CE_")


@pytest.fixture
def one(staged: Callable[[str, str], Staged]) -> Staged:
    return staged("conda", "mounted")


def expected(prefix: Path) -> dict[str, str]:
    return {
        "CONDA_PREFIX": f"{prefix}",
        "CONDA_DEFAULT_ENV": "everything",
        "CONDA_SHLVL": "1",
        # from env_vars.d, then conda-meta/state
        "DEMO_PACKAGE": "from env_vars.d",
        "DEMO_PATH": f"{prefix}/share",
        **{name: value.format(prefix=prefix) for name, value in VARIABLES.items()},
        # from activate.d: the first one reads what is not set, the second what the first has set
        "DEMO_BEFORE": "",
        "DEMO_HOME": f"{prefix}/share/activate-demo",
        "DEMO_BAKED": f"{prefix}/share/activate-demo",
        "DEMO_ORDER": f"after {prefix}/share/activate-demo",
    }


def shown(environment: str) -> dict[str, str]:
    pairs = (line.partition("=") for line in environment.splitlines())
    return {name: value for name, _, value in pairs if name.startswith(SHOWN)}


def test_stage_run(one: Staged) -> None:
    argv = [STAGE_RUN, "--env", "conda", "env"]
    said = one.run(*argv, env=one.bench.environ()).stdout
    assert shown(said) == expected(one.prefix)
    assert f"PATH={one.bin}:/usr" in said


@pytest.mark.parametrize(
    ("shell", "words"),
    [
        (["bash", "--norc", "-euc"], "sh"),
        (["dash", "-euc"], "sh"),
        (["zsh", "-f", "-o", "shwordsplit", "-euc"], "sh"),
        (["csh", "-fc"], "csh"),
        (["fish", "--no-config", "-c"], "fish"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_every_shell_under_strict_options(one: Staged, shell: list[str], words: str) -> None:
    code = {
        "sh": f'eval "$({STAGER} activate conda)"; env',
        "csh": f'eval "`{STAGER} activate --shell csh conda`"; env',
        "fish": f"{STAGER} activate --shell fish conda | source; env",
    }[words]
    said = one.run(*shell, code, env=one.bench.environ()).stdout
    assert shown(said) == expected(one.prefix)
    assert f"\nPATH={one.bin}:/usr" in f"\n{said}"


def test_inherited_activations_are_taken_back(one: Staged, conda_env: CondaEnvironment) -> None:
    """Of another conda environment, with base below it; its scripts clear up after themselves."""
    other = one.bench.root / "other"
    (other / "etc" / "conda" / "deactivate.d").mkdir(parents=True, exist_ok=True)
    script = other / "etc" / "conda" / "deactivate.d" / "other.sh"
    script.write_text('unset OTHER_DATA; export DEMO_LEFT="$CONDA_PREFIX"\n')
    inherited = {
        "CONDA_PREFIX": str(other),
        "CONDA_PREFIX_1": "/opt/conda",
        "CONDA_PREFIX_2": "/opt/conda/envs/x",
        "CONDA_SHLVL": "3",
        "CONDA_DEFAULT_ENV": "other",
        "CONDA_PROMPT_MODIFIER": "(other) ",
        "_CE_CONDA": "",
        "VIRTUAL_ENV": "/some/venv",
        "OTHER_DATA": f"{other}/share",
        "PATH": f"{other}/bin:/some/venv/bin:/usr/bin:/bin",
    }
    argv = [STAGE_RUN, "--env", "conda", "env"]
    said = one.run(*argv, env=one.bench.environ(**inherited)).stdout
    assert shown(said) == {**expected(one.prefix), "DEMO_LEFT": str(other)}
    assert "OTHER_DATA" not in said
    assert f"\nPATH={one.bin}:/usr/bin:/bin\n" in said


def test_activated_twice_and_replaced(one: Staged, staged: Callable[[str, str], Staged]) -> None:
    """Its own scripts of deactivate.d are run when another environment takes its place."""
    code = f'eval "$({STAGER} activate conda)"; eval "$({STAGER} activate conda)"; env'
    said = one.run("bash", "-euc", code, env=one.bench.environ()).stdout
    assert shown(said) == expected(one.prefix)
    clone = staged("clone", "mounted")
    code = f'eval "$({STAGER} activate conda)"; eval "$({STAGER} activate clone)"; env'
    said = clone.run("bash", "-euc", code, env=clone.bench.environ()).stdout
    assert shown(said) == {**expected(clone.prefix), "CONDA_DEFAULT_ENV": "clone"}
    assert f"{one.prefix}/" not in said


def test_without_a_name_it_is_the_active_one(one: Staged, conda_env: CondaEnvironment) -> None:
    env = one.bench.environ(CONDA_PREFIX=str(conda_env.prefix))
    said = one.run(STAGE_RUN, "sh", "-c", "echo $CONDA_PREFIX", env=env).stdout
    assert said == f"{one.prefix}\n"


def test_where_staging_fails_the_original_is_activated(
    one: Staged, conda_env: CondaEnvironment
) -> None:
    blocked = one.bench.root / "file"
    blocked.write_text("")
    env = one.bench.environ(STAGER_STORE=f"{blocked}/store")
    done = run([STAGE_RUN, "--env", "conda", "env"], env=env)
    assert "running the original environment" in done.stderr
    assert shown(done.stdout) == expected(conda_env.prefix)


def test_a_task_of_slurm(one: Staged, tmp_path: Path) -> None:
    """What TaskProlog prints, on top of what the task has, is the same environment."""
    published = Repository(str(one.bench.repository)).find(ref.parse("conda"))
    assert published is not None
    directive = ref.find_directive("pyenv:conda", cwd="/")
    assert directive is not None
    made = {layer.id: stage.HIT for layer in published.manifest.layers}
    result = stage.Staged(str(one.prefix), stage.HIT, published.manifest, made)
    described = jobactivation.of_staged(directive, [activate.Part.staged(result)], config.load())
    checked = jobstate.Activation.checked(described.value, (str(one.prefix.parent),))
    state = tmp_path / "jobs" / "7"
    state.mkdir(parents=True)
    (state / "status").write_text("ready\n")
    (state / "staged").write_text(checked.lines())
    script = (REPO / "hooks" / "slurm" / "task_prolog").read_text()
    (tmp_path / "task_prolog").write_text(script.replace("@STATEDIR@", str(tmp_path)))
    before = {
        "SLURM_JOB_ID": "7",
        "SLURMD_NODENAME": "n1",
        "PATH": "/opt/other/bin:/usr/bin:/bin",
        "CONDA_PREFIX": "/opt/other",
        "CONDA_PREFIX_3": "/opt/conda",
        "CONDA_SHLVL": "4",
    }
    printed = run(["sh", tmp_path / "task_prolog"], env=before).stdout
    after = applied(before, printed)
    assert {k: v for k, v in after.items() if k.startswith(SHOWN)} == expected(one.prefix)
    assert after["PATH"] == f"{one.bin}:/usr/bin:/bin"
    assert activate.ACTIVE in after


def applied(before: Mapping[str, str], printed: str) -> dict[str, str]:
    """What slurmstepd makes of a TaskProlog's lines."""
    after = dict(before)
    for line in printed.splitlines():
        if match := re.fullmatch(r"export (\w+)=(.*)", line):
            after[match[1]] = match[2]
        elif match := re.fullmatch(r"unset (\w+)", line):
            after.pop(match[1], None)
    return after
