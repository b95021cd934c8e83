"""Several environments together, and environments by the name that a tool keeps them under."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from environments import BASE_PYTHON, VENV, Environment, make_small_venv, run, run_hidden
from workbench import Bench

pytestmark = pytest.mark.environments

STAGER, STAGE_RUN = VENV / "bin" / "stager", VENV / "bin" / "stage-run"


def program(environment: Environment, name: str, code: str) -> None:
    path = environment.bin / name
    path.write_text(f"#!{environment.python}\n{code}\n")
    path.chmod(0o755)


# -- several together


@pytest.fixture
def three(bench: Bench, new_directory: Callable[[], Path]) -> tuple[Bench, list[Path]]:
    """`base`, `extra` and the directory of modules `tree`, packed."""
    place = new_directory()
    name = "name = 'base'"
    base = make_small_venv(place / "base", of_base="x = 1", both=name, three=name)
    name = "name = 'extra'"
    extra = make_small_venv(place / "extra", of_extra="x = 1", both=name, three=name)
    program(extra, "tool-of-extra", "import of_extra; print('tool', of_extra.x)")
    # The code of an editable install lies in a directory that a .pth file names.
    (place / "source").mkdir()
    (place / "source" / "editable_one.py").write_text("x = 1\n")
    (extra.site_packages / "__editable__.demo.pth").write_text(f"{place}/source\n")
    tree = place / "tree"
    tree.mkdir()
    (tree / "of_tree.py").write_text("x = 1\n")
    (tree / "three.py").write_text("name = 'tree'\n")
    bench.pack(base, name="base")
    bench.pack(extra, name="extra")
    bench.stager("pack", "--tree", tree, "--python", BASE_PYTHON)
    bench.settings["STAGER_STAGE_ON_STALE"] = "warn"
    return bench, [base.prefix, extra.prefix, tree, place / "source"]


ALL = (
    "import sys, of_base, of_extra, of_tree, editable_one, both, three;"
    " print(sys.prefix, both.name, three.name)"
)


def test_the_first_runs_and_later_ones_come_first(three: tuple[Bench, list[Path]]) -> None:
    bench, hide = three
    base = bench.stage(name="base").prefix
    for ref, expected in (("base+extra+tree", "extra tree"), ("base+tree+extra", "extra extra")):
        command = [STAGE_RUN, "--strict", "--env", ref, "python", "-c", ALL]
        done = run_hidden(command, hide=hide, env=bench.environ())
        assert done.stdout == f"{base} {expected}\n"


def test_programs_of_all(three: tuple[Bench, list[Path]]) -> None:
    bench, hide = three
    command = [STAGE_RUN, "--strict", "--env", "base+extra", "tool-of-extra"]
    assert run_hidden(command, hide=hide, env=bench.environ()).stdout == "tool 1\n"


def test_activate_several_and_stay(three: tuple[Bench, list[Path]]) -> None:
    bench, hide = three
    script = f"""
        eval "$({STAGER} activate base+extra+tree)"
        echo "$STAGER_ACTIVE"
        python -c {ALL!r}
        # From here on nothing but sh has to run.
        rm -rf "$STAGER_REPOSITORY"
        {STAGE_RUN} --env base+extra+tree python -c {ALL!r}
    """
    done = run_hidden(["sh", "-c", script], hide=hide, env=bench.environ())
    ref, first, second = done.stdout.splitlines()
    assert ref == "base+extra+tree"
    assert first == second
    assert first.endswith(" extra tree")


def test_stage_and_verify_several(three: tuple[Bench, list[Path]]) -> None:
    bench, _ = three
    lines = bench.stager("stage", "base+extra").stdout.split()
    assert lines == [str(bench.stage(name=name).prefix) for name in ("base", "extra")]
    said = bench.json("verify", "base+extra+tree")
    assert (said["origin"], said["outside"], said["failed"]) == ([], [], {})
    assert {"of_base", "of_extra", "of_tree"} <= set(said["modules"])


def test_conflicts_are_reported(three: tuple[Bench, list[Path]]) -> None:
    bench, _ = three
    said = bench.stager("stage", "base+extra+tree").stderr
    assert "`base` and `extra` both have both, three: those of `extra` are used" in said
    assert "`extra` and `tree` both have three: those of `tree` are used" in said
    assert "of_base" not in said


def test_a_plus_in_a_path_is_a_path(bench: Bench, new_directory: Callable[[], Path]) -> None:
    environment = make_small_venv(new_directory() / "a+b", mine="x = 1")
    said = bench.stager("stage", environment.prefix).stdout
    assert run([Path(said.strip()) / "bin/python", "-c", "import mine"]).returncode == 0


def test_the_originals_of_several(three: tuple[Bench, list[Path]]) -> None:
    bench, (base, *_) = three
    env = bench.environ(STAGER_STORE="/proc/no-store")
    done = run([STAGE_RUN, "--env", "base+extra+tree", "python", "-c", ALL], env=env)
    assert done.stdout == f"{base} extra tree\n"
    assert "running the original environment" in done.stderr


# -- by name


def test_a_name_that_a_tool_keeps(bench: Bench, new_directory: Callable[[], Path]) -> None:
    place = new_directory()
    environment = make_small_venv(place / "kept", mine="x = 1")
    env = bench.environ(WORKON_HOME=str(place))
    command = [
        STAGE_RUN,
        "--strict",
        "--env",
        "kept",
        "python",
        "-c",
        "import mine, sys; print(sys.prefix)",
    ]
    said = run(command, env=env)
    assert said.stdout.startswith(f"{bench.store}/envs/")
    assert "never packed" in said.stderr
    # A name that is published is what was published, wherever it may be kept now.
    assert run(command, env=bench.environ()).stdout == said.stdout
    bench.stager("remove", "kept")
    packed = bench.stager("pack", "-n", "kept", env=env)
    assert str(environment.prefix) in packed.stderr
    bench.stager("pack", "-n", "kept")
    bench.expect(10, "pack", "-n", "unheard-of")


def test_a_name_of_several_environments(bench: Bench, new_directory: Callable[[], Path]) -> None:
    one, other = new_directory(), new_directory()
    for place in (one, other):
        make_small_venv(place / "kept")
    (other / ".conda").mkdir()
    (other / ".conda" / "environments.txt").write_text(f"{other}/kept\n/gone/kept\n")
    env = bench.environ(WORKON_HOME=str(one), HOME=str(other))
    for verb in (("pack", "-n"), ("stage",), ("activate",)):
        said = bench.expect(2, *verb, "kept", env=env)
        assert f"\n  {other}/kept\n  {one}/kept\n" in said
