"""User bases, trees of modules, several together, names: each with its original hidden."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

import environments
import workbench
from environments import BASE_PYTHON, VENV, Environment, clean_environ, run, run_hidden
from workbench import Bench

MODULES = "import six, requests, stager_sample"
PIP = [VENV / "bin" / "pip", "--quiet", "--disable-pip-version-check", "--no-cache-dir"]
OFFLINE = ["--no-index", "--break-system-packages"]


def wheels() -> list[str]:
    sample = environments.sample_wheel(Path(os.environ["TMPDIR"]) / f"sample-{os.getpid()}")
    places = (sample.parent, environments.wheels(*environments.SMALL))
    return [*OFFLINE, *(f"--find-links={place}" for place in places)]


@pytest.fixture
def origin(bench: Bench) -> Path:
    """A directory for originals."""
    path = bench.root / "origin"
    path.mkdir()
    return path


@pytest.fixture
def user_base(origin: Path) -> Path:
    """What ``pip install --user`` makes, beside what others keep in the same place."""
    base = origin / "local"
    (base / "share" / "containers").mkdir(parents=True)
    (base / "share" / "containers" / "layer").write_text("gigabytes\n")
    (base / "bin").mkdir()
    (base / "bin" / "unrelated").write_text("#!/bin/sh\n")
    command = [BASE_PYTHON, "-m", "pip", *PIP[1:], "install", "--user", "--ignore-installed"]
    names = [*environments.SMALL, environments.SAMPLE]
    run([*command, *wheels(), *names], env=clean_environ(PYTHONUSERBASE=str(base)))
    return base


def test_user_base(bench: Bench, origin: Path, user_base: Path) -> None:
    environ = bench.environ(PYTHONUSERBASE=str(user_base))
    said = bench.json("pack", "--user", "--python", BASE_PYTHON, env=environ)
    assert said["name"] == f"user-{BASE_PYTHON.name}"
    staged = bench.stage(name=said["name"], hide=[origin])
    assert sorted(path.name for path in (staged.prefix / "share").iterdir()) == ["stager-sample"]
    assert not (staged.bin / "unrelated").exists()
    assert workbench.traces(staged, [user_base]) == {}
    code = f"{MODULES}, site; print(six.__file__, site.getuserbase())"
    # Python's own name for it, not a path; a user's PYTHONNOUSERSITE is not in the way.
    command = [VENV / "bin" / "stage-run", "--env", said["name"], "--strict", BASE_PYTHON]
    done = run_hidden(
        [*command, "-c", code], hide=[origin], env=bench.environ(PYTHONNOUSERSITE="1")
    )
    run_staged = [*command[:-1], "sample-console"]
    assert run_hidden(run_staged, hide=[origin], env=bench.environ()).stdout.startswith("hello ")
    module, base = done.stdout.split()
    assert base == str(staged.prefix)
    assert module.startswith(f"{staged.prefix}/lib/")
    assert bench.json("verify", said["name"], "--import", "six,requests")["origin"] == []


def test_user_base_without_anything(bench: Bench, origin: Path) -> None:
    environ = bench.environ(PYTHONUSERBASE=str(origin))
    said = bench.expect(10, "pack", "--user", env=environ)
    assert f"nothing is installed for {BASE_PYTHON.name}" in said


def tree(origin: Path, name: str, word: str) -> Path:
    place = origin / name
    place.mkdir()
    (place / f"of_{name}.py").write_text(f"word = '{word}'\n")
    (place / "shared.py").write_text(f"word = '{word}'\n")
    return place


def test_trees_in_order(bench: Bench, origin: Path) -> None:
    first, second = tree(origin, "first", "1"), tree(origin, "second", "2")
    run([*PIP, "install", "--target", first, *wheels(), "six"])
    bench.json("pack", "--tree", first, "--tree", second, "--name", "it")
    bench.stage(hide=[origin])
    code = "import sys, six, shared, of_first, of_second; print(shared.word, six.__file__)"
    command = [VENV / "bin" / "stage-run", "--env", "it", "--strict", BASE_PYTHON, "-c", code]
    environ = bench.environ(PYTHONPATH=f"{first}:{second}:/somewhere")
    word, module = run_hidden(command, hide=[origin], env=environ).stdout.split()
    assert word == "1"
    assert module.startswith(f"{bench.store}/envs/")


def test_several_together(bench: Bench, origin: Path, venv_uv: Environment) -> None:
    """The first has the Python; the modules of later ones come first; conflicts are told."""
    extra = environments.make_venv(origin / "extra")
    (extra.site_packages / "only_extra.py").write_text("word = 'extra'\n")
    (extra.site_packages / "six.py").write_text("word = 'another six'\n")
    bench.pack(venv_uv, name="base")
    bench.pack(extra, name="extra")
    base = bench.stage(name="base")
    code = (
        "import sys, requests, only_extra, six; print(sys.prefix, six.word, requests.__version__)"
    )
    command = [VENV / "bin" / "stage-run", "--env", "base+extra", "--strict", "python", "-c", code]
    hide = [venv_uv.prefix, extra.prefix]
    done = run_hidden(command, hide=hide, env=bench.environ())
    assert done.stdout.split()[:3] == [str(base.prefix), "another", "six"]
    assert "both have six" in done.stderr
    shell = f'eval "$({VENV}/bin/stager activate base+extra)"; python -c "$1"'
    done = run_hidden(["bash", "-c", shell, "bash", code], hide=hide, env=bench.environ())
    assert done.stdout.split()[:3] == [str(base.prefix), "another", "six"]


def test_several_of_different_pythons(bench: Bench, origin: Path, venv_uv: Environment) -> None:
    bench.pack(venv_uv, name="base")
    bench.json("pack", "--tree", tree(origin, "it", "1"), "--name", "it")
    manifest = next((bench.repository / "refs").glob("it*")).resolve()
    other = manifest.read_text().replace(BASE_PYTHON.name, "python3.5")
    manifest.write_text(other)
    done = bench.stager("stage", "base+it", check=False)
    assert done.returncode in (12, 15)  # its checksum no longer fits, or its Python does not
    assert done.stderr.startswith("stager: error: ")


@pytest.mark.parametrize("keeper", ["conda", "virtualenvwrapper", "project"])
def test_names_that_tools_keep(bench: Bench, origin: Path, keeper: str) -> None:
    place = {"conda": "envs/torch", "virtualenvwrapper": "work/torch", "project": "torch/.venv"}
    environment = environments.make_venv(origin / place[keeper])
    (environment.site_packages / "mine.py").write_text("")
    environ = bench.environ(CONDA_ENVS_PATH=f"{origin}/envs", WORKON_HOME=f"{origin}/work")
    cwd = environment.prefix.parent
    stage_run = [VENV / "bin" / "stage-run", "--env", "torch", "--strict", "python", "-c"]
    done = run([*stage_run, "import mine; print(mine.__file__)"], env=environ, cwd=cwd)
    assert done.stdout.startswith(f"{bench.store}/envs/")
    assert bench.json("inspect", "torch")["origin"] == str(environment.prefix)
    said = bench.stager("pack", "-n", "torch", env=environ, cwd=cwd).stderr
    assert "published `torch`" in said


def test_a_name_of_two_environments(bench: Bench, origin: Path) -> None:
    for name in ("envs", "work"):
        environments.make_venv(origin / name / "torch")
    environ = bench.environ(CONDA_ENVS_PATH=f"{origin}/envs", WORKON_HOME=f"{origin}/work")
    said = bench.expect(2, "stage", "torch", env=environ)
    assert f"\n  {origin}/envs/torch\n  {origin}/work/torch" in said
    assert bench.expect(10, "stage", "another", env=environ)


def test_what_modules_add(bench: Bench, origin: Path, venv_uv: Environment) -> None:
    added = tree(origin, "added", "module")
    environ = bench.environ(PYTHONPATH=str(added), LOADEDMODULES="cray-python/3.11")
    said = bench.json("pack", venv_uv.prefix, "--name", "it", env=environ)
    (finding,) = [one for one in said["findings"] if one["code"] == "module-path"]
    assert finding["path"] == str(added)
    assert "cray-python/3.11" in finding["reason"]
    argv = ["pack", venv_uv.prefix, "--name", "it", "--include-module-paths"]
    said = bench.json(*argv, env=environ)
    assert [one["role"] for one in said["layers"]] == ["path", "env"]
    staged = bench.stage(hide=[venv_uv.prefix, origin])
    command = [VENV / "bin" / "stage-run", "--env", "it", "--strict", "python", "-c"]
    code = "import of_added, sys; print(of_added.__file__, sys.prefix)"
    done = run_hidden([*command, code], hide=staged.hide, env=environ)
    module, prefix = done.stdout.split()
    assert prefix == str(staged.prefix)
    assert module.startswith(f"{bench.store}/envs/")


def test_packed_again_as_it_was(bench: Bench, user_base: Path) -> None:
    """A user base that changed is packed again as a user base, wherever that is typed."""
    environ = bench.environ(PYTHONUSERBASE=str(user_base))
    bench.json("pack", "--user", "--name", "mine", env=environ)
    first = bench.json("inspect", "mine")
    (site,) = user_base.glob("lib/python3.*/site-packages")
    shutil.copy(site / "six.py", site / "seven.py")
    again = bench.json("stage", "mine", env=bench.environ())
    second = bench.json("inspect", "mine")
    assert (second["kind"], second["origin"]) == (first["kind"], first["origin"])
    assert (Path(again["prefix"]) / site.relative_to(user_base) / "seven.py").exists()
