"""User bases, directories of modules and what modules set: they work with the original hidden."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import workbench
from environments import BASE_PYTHON, VENV, Environment, make_venv, pip_install_to, run, run_hidden
from workbench import Bench

pytestmark = pytest.mark.environments

STAGE_RUN = VENV / "bin" / "stage-run"
LIBRARY = Path("lib") / BASE_PYTHON.name


@dataclass(frozen=True)
class Case:
    """A Python that is to import things, and what must be hidden to prove that a copy is used."""

    python: Path
    base: Path | None
    bench: Bench
    new: Path

    def hidden(
        self, *argv: str | Path, hide: tuple[Path, ...], env: dict[str, str] | None = None
    ) -> str:
        """What a command prints without the originals."""
        originals = [*hide, *([self.base] if self.base else [])]
        # A directory of modules that is hidden is an empty one: it changed.
        environ = self.bench.environ(STAGER_STAGE_ON_STALE="warn", **(env or {}))
        return run_hidden(argv, hide=originals, env=environ).stdout


@pytest.fixture(params=["node", "packed"])
def case(
    request: pytest.FixtureRequest,
    bench: Bench,
    new_directory: Callable[[], Path],
) -> Case:
    """On the node's own Python, and on one that is packed with it."""
    if request.param == "node":
        return Case(BASE_PYTHON, None, bench, new_directory())
    base: Environment = request.getfixturevalue("pyenv_like_base")
    return Case(base.python, base.prefix, bench, new_directory())


def leaks(bench: Bench, *ref: str) -> tuple[list[str], list[str]]:
    """What the imports of an environment open of the original, and elsewhere but on the node."""
    said = bench.json("verify", *ref)
    assert said["method"] == "strace"
    assert said["failed"] == {}
    assert said["modules"]
    return said["origin"], said["outside"]


# -- the user base


@pytest.fixture
def user(case: Case) -> Iterator[tuple[Case, Path]]:
    base = case.new / "local"
    pip_install_to(case.python, "--user", PYTHONUSERBASE=str(base))
    (base / "share" / "containers").mkdir(parents=True)
    (base / "share" / "containers" / "large").write_text("nothing of Python's\n")
    (base / "bin" / "other-program").write_text("#!/bin/sh\necho other\n")
    (base / "bin" / "other-program").chmod(0o755)
    (base / "bin" / "by-hand").write_text(f"#!{case.python}\nimport six; print(six.__file__)\n")
    (base / "bin" / "by-hand").chmod(0o755)
    case.bench.settings["PYTHONUSERBASE"] = str(base)
    case.bench.stager("pack", "--user", "--python", case.python, "--name", "it")
    del case.bench.settings["PYTHONUSERBASE"]
    yield case, base


def test_what_is_odd_in_a_user_base(user: tuple[Case, Path]) -> None:
    """A record's stale row, and rows of directories, take nothing in that is not Python's."""
    case, base = user
    (record,) = (base / LIBRARY / "site-packages").glob("stager_sample-*.dist-info/RECORD")
    rows = "../../../share/containers/large/gone,,\n../../../share/,,\n../../..,,\n"
    record.write_text(record.read_text() + rows)
    case.bench.settings["PYTHONUSERBASE"] = str(base)
    case.bench.stager("pack", "--user", "--python", case.python, "--name", "it")
    del case.bench.settings["PYTHONUSERBASE"]
    staged = case.bench.stage()
    assert not (staged.prefix / "share/containers").exists()
    assert (staged.prefix / "share/stager-sample/sample.conf").exists()


def test_user_base(user: tuple[Case, Path]) -> None:
    case, base = user
    staged = case.bench.stage(hide=[base])
    code = (
        "import requests, six, stager_sample, os, ssl; "
        "print(requests.__file__, ssl.__file__, os.environ['PYTHONUSERBASE'],"
        " os.environ.get('PYTHONNOUSERSITE'))"
    )
    # A shell of another environment may have switched the user's packages off.
    said = case.hidden(
        STAGE_RUN, "--strict", "--env", "it", "python", "-c", code,
        hide=(base,), env={"PYTHONNOUSERSITE": "1", "PYTHONUSERBASE": str(base)},
    ).split()  # fmt: skip
    site = staged.prefix / LIBRARY / "site-packages"
    assert said[0] == f"{site}/requests/__init__.py"
    assert said[1].startswith(f"{staged.trees[0]}/" if case.base else "/usr/")
    assert said[2:] == [str(staged.prefix), "None"]
    # Only what is Python's.
    assert (staged.prefix / "share/stager-sample/sample.conf").read_text() == "key = value\n"
    assert not (staged.prefix / "share/containers").exists()
    assert sorted(os.listdir(staged.prefix / "bin")) == [
        "by-hand", "idna", "normalizer", "python", "python3", BASE_PYTHON.name,
        "sample-console", "sample-script",
    ]  # fmt: skip


def test_scripts_of_a_user_base(user: tuple[Case, Path]) -> None:
    case, base = user
    staged = case.bench.stage()
    for script in ("sample-console", "sample-script"):
        said = case.hidden(STAGE_RUN, "--strict", "--env", "it", script, hide=(base,))
        assert said.startswith("hello ")
    said = case.hidden(STAGE_RUN, "--strict", "--env", "it", "by-hand", hide=(base,))
    assert said == f"{staged.prefix}/{LIBRARY}/site-packages/six.py\n"


def test_a_user_base_leaves_the_users_other_programs(user: tuple[Case, Path]) -> None:
    case, base = user
    path = f"{base}/bin:/usr/bin:/bin"
    env = case.bench.environ(PATH=path)
    done = run([STAGE_RUN, "--strict", "--env", "it", "other-program"], env=env)
    assert done.stdout == "other\n"


def test_a_user_base_is_not_looked_for(user: tuple[Case, Path]) -> None:
    case, _ = user
    assert leaks(case.bench, "it") == ([], [])


def test_a_user_base_is_packed_again_when_it_changed(user: tuple[Case, Path]) -> None:
    case, base = user
    before = case.bench.stage().prefix
    (base / "share" / "containers" / "more").write_text("no change of Python's\n")
    assert case.bench.stage().prefix == before
    (base / LIBRARY / "site-packages" / "new_module.py").write_text("value = 7\n")
    after = case.bench.stage()
    assert after.prefix != before
    code = "import new_module; print(new_module.value)"
    command = (STAGE_RUN, "--strict", "--env", "it", "python", "-c", code)
    assert case.hidden(*command, hide=(base,)) == "7\n"
    assert after.manifest["kind"] == "user"
    assert not (after.prefix / "share/containers").exists()


@pytest.mark.parametrize("image_format", ["squashfs", "tar.zst"])
def test_a_user_base_of_links(case: Case, image_format: str) -> None:
    """``~/.local/bin`` may be ``~/bin``, and ``~/.local/lib`` where there is more space."""
    base, outside = case.new / "local", case.new / "outside"
    pip_install_to(case.python, "--user", PYTHONUSERBASE=str(base))
    (base / "bin" / "by-hand").write_text(f"#!{case.python}\nimport six; print(six.__file__)\n")
    (base / "bin" / "by-hand").chmod(0o755)
    (base / "bin" / "another").write_text("")
    outside.mkdir()
    for name in ("bin", "lib"):
        (base / name).rename(outside / name)
        (base / name).symlink_to(outside / name)
    case.bench.settings["PYTHONUSERBASE"] = str(base)
    options = ["--python", case.python, "--name", "it", "--format", image_format]
    case.bench.stager("pack", "--user", *options)
    said = case.hidden(STAGE_RUN, "--env", "it", "by-hand", hide=(base, outside))
    prefix = Path(case.bench.json("stage", "it")["prefix"])
    assert said.startswith(f"{prefix}/lib/")
    assert not (prefix / "bin" / "another").exists()


@pytest.mark.parametrize("what", ["file", "link"])
def test_a_tree_whose_bin_is_no_directory(case: Case, what: str) -> None:
    tree = case.new / "tree"
    (tree / "programs").mkdir(parents=True)
    (tree / "programs" / "tool").write_text("")
    (tree / "mine.py").write_text("x = 1\n")
    (tree / "bin").symlink_to("programs") if what == "link" else (tree / "bin").touch()
    case.bench.stager("pack", "--tree", tree, "--python", case.python, "--name", "it")
    code = "import mine; print(mine.x)"
    assert case.hidden(STAGE_RUN, "--env", "it", "python3", "-c", code, hide=(tree,)) == "1\n"
    prefix = Path(case.bench.json("stage", "it")["prefix"])
    assert (prefix / "bin" / "tool").exists() is (what == "link")


def test_a_user_base_without_packages_is_refused(case: Case) -> None:
    (case.new / "local").mkdir()
    env = case.bench.environ(PYTHONUSERBASE=str(case.new / "local"))
    said = case.bench.expect(10, "pack", "--user", "--python", str(case.python), env=env)
    assert f"nothing is installed for {BASE_PYTHON.name}" in said


# -- directories of modules


def test_trees_in_their_order(case: Case) -> None:
    first, second = case.new / "first", case.new / "second"
    pip_install_to(case.python, "--target", second)
    first.mkdir()
    (first / "six.py").write_text("name = 'mine'\n")
    case.bench.stager(
        "pack", "--tree", first, "--tree", second, "--python", case.python, "--name", "it"
    )
    staged = case.bench.stage()
    code = (
        "import six, requests, os, sys; print(six.__file__, requests.__file__,"
        " os.environ['PYTHONPATH'], sys.dont_write_bytecode)"
    )
    inherited = f"{second}:/nowhere"
    said = case.hidden(
        STAGE_RUN, "--strict", "--env", "it", "python", "-c", code,
        hide=(first, second), env={"PYTHONPATH": inherited},
    ).split()  # fmt: skip
    upper, lower = staged.trees[-1], staged.trees[-2]
    assert staged.prefix == upper
    assert said[:2] == [f"{upper}/six.py", f"{lower}/requests/__init__.py"]
    assert said[2] == f"{upper}:{lower}:/nowhere"
    assert case.hidden(
        STAGE_RUN, "--strict", "--env", "it", "sample-console", hide=(first, second)
    ).startswith("hello ")
    assert leaks(case.bench, "it") == ([], [])
    assert all(list(tree.rglob("*.pyc")) for tree in (upper, lower))


def test_a_prefix_as_a_tree(case: Case) -> None:
    prefix = case.new / "prefix"
    pip_install_to(case.python, "--prefix", prefix)
    case.bench.stager("pack", "--tree", prefix, "--python", case.python, "--name", "it")
    staged = case.bench.stage()
    staged_in = (STAGE_RUN, "--strict", "--env", "it")
    code = "import requests; print(requests.__file__)"
    (said,) = case.hidden(*staged_in, "python", "-c", code, hide=(prefix,)).split()
    assert said.startswith(f"{staged.prefix}/")
    assert said.endswith("-packages/requests/__init__.py")
    assert case.hidden(*staged_in, "sample-console", hide=(prefix,)).startswith("hello ")


def test_trees_are_packed_again_in_their_order(case: Case) -> None:
    first, second = case.new / "first", case.new / "second"
    for place in (first, second):
        place.mkdir()
        (place / "same.py").write_text(f"name = '{place.name}'\n")
    case.bench.stager(
        "pack", "--tree", first, "--tree", second, "--python", case.python, "--name", "it"
    )
    (second / "added.py").write_text("name = 'added'\n")
    said = case.bench.stage()  # packs again
    assert [layer["origin"] for layer in said.manifest["layers"]][-2:] == [str(second), str(first)]
    code = "import same, added; print(same.name, added.name)"
    told = case.hidden(
        STAGE_RUN, "--strict", "--env", "it", "python", "-c", code, hide=(first, second)
    )
    assert told == "first added\n"


def test_a_directory_of_modules_is_no_environment(bench: Bench, tmp_path: Path) -> None:
    said = bench.expect(10, "pack", str(tmp_path))
    assert "--tree" in said


@pytest.mark.parametrize("kind", ["user", "tree"])
def test_staged_in_another_store(case: Case, kind: str) -> None:
    """What was packed for one store is rewritten for another."""
    place = case.new / "place"
    where = ("--user",) if kind == "user" else ("--target", place)
    pip_install_to(case.python, *where, PYTHONUSERBASE=str(place))
    options = ("--user",) if kind == "user" else ("--tree", place)
    env = case.bench.environ(PYTHONUSERBASE=str(place))
    pack = ("pack", *options, "--python", case.python, "--name", "it")
    case.bench.stager(*pack, "--store", case.bench.root / "of-others", env=env)
    staged = case.bench.stage(hide=[place])
    said = case.hidden(
        STAGE_RUN, "--strict", "--env", "it", "python", "-c",
        "import six, ssl, sys; print(six.__file__, sys.executable, ssl.__file__)", hide=(place,),
    ).split()  # fmt: skip
    assert said[0].startswith(f"{staged.prefix}/")
    assert said[1] == f"{staged.prefix}/bin/python"
    assert said[2].startswith(f"{staged.trees[0]}/" if case.base else "/usr/")
    command = (STAGE_RUN, "--strict", "--env", "it", "sample-console")
    assert case.hidden(*command, hide=(place,)).startswith("hello ")
    assert workbench.traces(staged, [place, case.bench.root / "of-others"]) == {}


@pytest.mark.parametrize("kind", ["user", "tree"])
def test_by_a_links_name(case: Case, kind: str) -> None:
    """Many have ``~/.local`` as a link to where there is more room."""
    real, link = case.new / "real", case.new / "link"
    site = real / LIBRARY / "site-packages" if kind == "user" else real
    site.mkdir(parents=True)
    (site / "mine.py").write_text("")
    link.symlink_to("real")
    options = ("--user",) if kind == "user" else ("--tree", link)
    env = case.bench.environ(PYTHONUSERBASE=str(link))
    case.bench.stager("pack", *options, "--python", case.python, "--name", "it", env=env)
    staged = case.bench.stage()
    code = "import mine, os; print(mine.__file__, os.environ.get('PYTHONPATH'))"
    command = (STAGE_RUN, "--strict", "--env", "it", "python", "-c", code)
    inherited = {"PYTHONPATH": str(real)} if kind == "tree" else {}
    said = case.hidden(*command, hide=(real,), env=inherited).split()
    assert said[0].startswith(f"{staged.prefix}/")
    assert said[1] == (str(staged.prefix) if kind == "tree" else "None")


# -- what modules set


@pytest.fixture
def modules(bench: Bench, new_directory: Callable[[], Path]) -> tuple[Bench, Environment, Path]:
    """A venv that needs a library and a module that two variables lead to."""
    place = new_directory()
    (place / "lib64").mkdir()
    (library,) = Path("/usr/lib/x86_64-linux-gnu").glob("libz.so.1")
    shutil.copy(library.resolve(), place / "real-demo.so")
    (place / "lib64" / "libmodule-demo.so").symlink_to("../real-demo.so")  # out of the directory
    (place / "python").mkdir()
    (place / "python" / "of_a_module.py").write_text("name = 'of a module'\n")
    environment = make_venv(place / "env")
    (environment.site_packages / "user_of_both.py").write_text(
        "import ctypes, of_a_module\n"
        "ctypes.CDLL('libmodule-demo.so')\n"
        "def where():\n"
        "    lines = open('/proc/self/maps').read().split()\n"
        "    print(of_a_module.__file__, next(x for x in lines if x.endswith('demo.so')))\n"
    )
    bench.settings["PYTHONPATH"] = f"{place}/python:/usr/lib/python3"
    bench.settings["LD_LIBRARY_PATH"] = f"{place}/lib64"
    bench.settings["LOADEDMODULES"] = "gcc/12.2:zlib/1.2"
    return bench, environment, place


def test_what_modules_set_is_reported(modules: tuple[Bench, Environment, Path]) -> None:
    bench, environment, place = modules
    said = bench.pack(environment)
    told = {one["path"]: one for one in said["findings"] if one["code"] == "module-path"}
    assert list(told) == [f"{place}/python", f"{place}/lib64"]
    assert "in PYTHONPATH" in told[f"{place}/python"]["reason"]
    assert "in LD_LIBRARY_PATH" in told[f"{place}/lib64"]["reason"]
    assert all("gcc/12.2, zlib/1.2" in one["reason"] for one in told.values())
    assert {one["severity"] for one in told.values()} == {"warning"}
    assert len(said["layers"]) == 1


@pytest.mark.parametrize("which", ["home", "above", "repository", "root"])
def test_a_directory_of_more_than_modules_is_not_included(
    modules: tuple[Bench, Environment, Path], which: str
) -> None:
    bench, environment, place = modules
    bench.repository.mkdir(mode=0o700)
    named = {
        "home": bench.environ()["HOME"],
        "above": str(place),
        "repository": str(bench.repository),
        "root": "/",
    }[which]
    bench.settings["PYTHONPATH"] = named
    done = run(
        [VENV / "bin" / "stager", "pack", environment.prefix, "--include-module-paths"],
        env=bench.environ(),
        check=False,
    )
    assert done.returncode == 2
    assert f"{named}, which PYTHONPATH names, cannot be included" in done.stderr


def test_what_modules_set_is_included(modules: tuple[Bench, Environment, Path]) -> None:
    bench, environment, place = modules
    bench.pack(environment, "--include-module-paths")
    bench.settings.clear()  # the job loads no modules
    staged = bench.stage()
    assert [layer["role"] for layer in staged.manifest["layers"]] == ["path", "path", "env"]
    hide = (environment.prefix, place / "lib64", place / "python", place / "real-demo.so")
    command = [STAGE_RUN, "--strict", "--env", "it", "python", "-c"]
    command += ["import user_of_both; user_of_both.where()"]
    env = bench.environ(STAGER_STAGE_ON_STALE="warn")
    python, library = run_hidden(command, hide=hide, env=env).stdout.split()
    trees = [str(tree) for tree in staged.trees]
    assert os.path.dirname(python) in trees
    assert os.path.dirname(library) in trees
    # ... and also when the environment is packed again, in a job that has no modules loaded.
    (environment.site_packages / "one_more.py").write_text("")
    again = bench.stage()
    assert again.prefix != staged.prefix
    assert again.trees[:2] == staged.trees[:2]
    assert run_hidden(command, hide=hide, env=env).stdout.split()[0] == python
