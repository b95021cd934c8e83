"""Editable installs: each of the ways in which an environment imports from outside of itself."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Callable

import pytest

from stager.environments import editables
from stager.environments.editables import Rebuilding, Source
from stager.paths import is_within

pytestmark = pytest.mark.unit


class Project:
    """An environment's site-packages, and source trees beside the environment."""

    def __init__(self, tmp: Path) -> None:
        self.tmp = tmp
        self.env = tmp / "env"
        self.site = self.env / "lib" / "python3.11" / "site-packages"
        self.site.mkdir(parents=True)
        self.source = self.package("src", "proj")

    def package(self, *parts: str) -> Path:
        directory = self.tmp.joinpath(*parts)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "__init__.py").touch()
        return directory

    def write(self, name: str, text: str | bytes) -> str:
        data = text if isinstance(text, bytes) else text.replace("{}", str(self.tmp)).encode()
        (self.site / name).write_bytes(data)
        return str(self.site / name)

    def find(self, *inside: str) -> tuple[list[Source], list[Rebuilding]]:
        return editables.find(str(self.site), below(str(self.env), *inside))

    def sources(self, *inside: str) -> list[Source]:
        found, rebuilding = self.find(*inside)
        assert rebuilding == []
        return found


def below(*directories: str) -> Callable[[str], bool]:
    return lambda path: is_within(path, directories)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path.resolve())


# 1. A line of a path file: pip's easy-install.pth, setuptools' __editable__, hatch, flit, maturin


@pytest.mark.parametrize("name", ["__editable__.proj-1.pth", "easy-install.pth", "_proj.pth"])
def test_a_directory_in_a_path_file(project: Project, name: str) -> None:
    path = project.write(name, "{}/src\n")
    assert project.sources() == [Source(str(project.tmp / "src"), path, ("proj",))]


@pytest.mark.parametrize(
    "line",
    ["{}/src/", "  {}/src  ", "{}/other/../src", "../../../../src", "{}/src\r", "\ufeff{}/src"],
)
def test_spellings_of_the_directory(project: Project, line: str) -> None:
    project.write("a.pth", f"{line}\n")
    assert [one.path for one in project.sources()] == [str(project.tmp / "src")]


@pytest.mark.parametrize(
    "line",
    ["", "# {}/src", "import sys; sys.path.insert(0, '{}/src')", "import\t{}/src", "{}/nowhere"]
    + ["{}/src/proj/__init__.py", "./inside", "../../../share", "{}/env/src", "\0{}/src"],
)
def test_lines_that_name_no_directory_outside(project: Project, line: str) -> None:
    project.package("env", "src")
    project.package("env", "share")
    (project.site / "inside").mkdir()
    project.write("a.pth", f"{line}\n")
    assert project.sources() == []


def test_every_line_counts_and_each_directory_once(project: Project) -> None:
    project.package("two", "pkg")
    first = project.write("a.pth", "{}/src\n\n{}/two\n{}/src\n")
    project.write("b.pth", "{}/two\n")
    assert [(one.path, one.named_by) for one in project.sources()] == [
        (str(project.tmp / "src"), first),
        (str(project.tmp / "two"), first),
    ]


def test_what_is_copied_of_a_directory_is_what_python_could_import(project: Project) -> None:
    root = project.tmp / "repo"
    project.package("repo", "pkg")
    project.package("repo", "pkg", "sub")
    (project.package("repo", "namespace", "deep") / "x.py").touch()
    for name in ("build", "dist", "node_modules", "__pycache__", ".git", ".venv", "not-a-name"):
        project.package("repo", name)
    project.package("repo", "venv")
    (root / "venv" / "pyvenv.cfg").touch()
    for directory in ("data", "proj.egg-info", "proj-1.dist-info", "proj.libs"):
        (root / directory).mkdir()
    for name in ("mod.py", "ext.cpython-311.so", "setup.cfg", "README.md", ".hidden.py", "big.bin"):
        (root / name).touch()
    project.write("a.pth", "{}/repo\n")
    (found,) = project.sources()
    assert found.items == (
        "ext.cpython-311.so", "mod.py", "namespace", "pkg", "proj-1.dist-info", "proj.egg-info",
        "proj.libs",
    )  # fmt: skip


def test_what_is_packed_anyway_is_no_source(project: Project) -> None:
    project.package("base", "lib")
    project.write("a.pth", "{}/base/lib\n{}/src\n")
    assert len(project.sources()) == 2
    assert [one.path for one in project.sources(f"{project.tmp}/base")] == [f"{project.tmp}/src"]
    assert len(project.sources(f"{project.tmp}/bas")) == 2  # part of a name is not a parent
    assert project.sources("/", f"{project.tmp}") == []


def test_a_directory_that_is_packed_without_what_it_holds_is_one(project: Project) -> None:
    packages = str(project.package("base", "site-packages", "pkg").parent)
    path = project.write("a.pth", "{}/base/site-packages\n{}/src\n")
    found, _ = editables.find(str(project.site), lambda one: one == packages or "/src" in one)
    assert found == [Source(packages, path, ("pkg",))]


def test_a_link_to_what_is_packed_anyway_is_no_source(project: Project) -> None:
    project.package("env", "src", "pkg")
    (project.tmp / "alias").symlink_to(project.env)
    project.write("a.pth", "{}/alias/src\n")
    assert project.sources() == []


# 2. setup.py develop


def test_an_egg_link_names_the_same_as_its_path_file(project: Project) -> None:
    project.write("proj.egg-link", "{}/src\n../\n")
    project.write("easy-install.pth", "{}/src\n")
    assert [one.path for one in project.sources()] == [str(project.tmp / "src")]


def test_only_the_first_line_of_an_egg_link_counts(project: Project) -> None:
    project.package("other", "pkg")
    project.write("proj.egg-link", "{}/src\n{}/other\n")
    assert [one.path for one in project.sources()] == [str(project.tmp / "src")]


LAUNCHER = """#!{}/env/bin/python
# EASY-INSTALL-DEV-SCRIPT: 'proj==1','run'
__requires__ = 'proj==1'
__import__('pkg_resources').require('proj==1')
__file__ = NAMED
with open(__file__) as f:
    exec(compile(f.read(), __file__, 'exec'))
"""


def launcher(project: Project, script: str, text: str = LAUNCHER) -> str:
    directory = project.env / "bin"
    directory.mkdir(exist_ok=True)
    text = text.replace("NAMED", script).replace("{}", str(project.tmp))
    (directory / "run").write_text(text)
    return str(directory)


def test_a_script_that_is_run_where_it_lies(project: Project) -> None:
    script = project.tmp / "tools" / "run"
    script.parent.mkdir()
    script.write_text("#!/usr/bin/env python\n")
    directory = launcher(project, "'{}/tools/run'")
    (project.env / "bin" / "binary").write_bytes(b"\x7fELF\0")
    (project.env / "bin" / "nowhere").symlink_to("none")
    assert editables.scripts(directory, below(str(project.env))) == [
        Source(str(script), f"{directory}/run", module=str(script))
    ]
    assert editables.scripts(directory, below(str(project.tmp))) == []


@pytest.mark.parametrize("script", ["'{}/none'", "'{}'", "'run'", "7", "name", "'", "b'{}'"])
def test_a_launcher_that_names_no_script(project: Project, script: str) -> None:
    assert editables.scripts(launcher(project, script), below()) == []


def test_a_program_that_only_reads_a_file(project: Project) -> None:
    directory = launcher(project, "'{}/src/proj/__init__.py'", "__file__ = NAMED\n")
    assert editables.scripts(directory, below()) == []


# 3. setuptools' finder


FINDER = """from __future__ import annotations
import sys
MAPPING: dict[str, str] = {'proj': '{}/src/proj', 'single': '{}/src/single'}
NAMESPACES: dict[str, list[str]] = {'space': ['{}/space', '{}/more/space']}
PATH_PLACEHOLDER = '__editable__.proj-1.finder' + ".__path_hook__"
OTHER = '{}/other'
raise SystemExit('a finder must not be run to be read')
"""


def test_the_mapping_of_a_finder(project: Project) -> None:
    for parts in (("space",), ("more", "space"), ("other",)):
        project.package(*parts)
    (project.tmp / "src" / "single.py").touch()
    path = project.write("__editable___proj_1_finder.py", FINDER)
    project.write(
        "__editable__.proj-1.pth",
        "import __editable___proj_1_finder; __editable___proj_1_finder.install()",
    )
    tmp = project.tmp
    assert project.sources() == [
        Source(f"{tmp}/src/proj", path),
        Source(f"{tmp}/src/single", path, module=f"{tmp}/src/single.py"),
        Source(f"{tmp}/space", path),
        Source(f"{tmp}/more/space", path),
    ]


def test_a_module_that_is_mapped_with_its_suffix(project: Project) -> None:
    module = project.tmp / "src" / "ext.so"
    module.touch()
    path = project.write("__editable___x_finder.py", "MAPPING = {'ext': '{}/src/ext.so'}\n")
    assert project.sources() == [Source(str(module), path, module=str(module))]


def test_the_calls_of_a_finder(project: Project) -> None:
    (project.tmp / "src" / "proj" / "__init__.py").touch()
    (project.tmp / "src" / "single.py").touch()
    text = """from editables.redirector import RedirectingFinder as F
F.install()
F.map_module('proj', '{}/src/proj/__init__.py')
F.map_module('single', '{}/src/single.py')
F.map_module('builtin')
raise SystemExit('a finder must not be run to be read')
"""
    path = project.write("_editable_impl_proj.py", text)
    module = f"{project.tmp}/src/single.py"
    assert project.sources() == [
        Source(f"{project.tmp}/src/proj", path),
        Source(module, path, module=module),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "def broken(", b"\xff\xfe", "MAPPING = {}\n", "MAPPING = {'a': 'relative'}\n",
        "MAPPING = {'a': '{}/nowhere'}\n", "MAPPING = make()\n", "x = {'a': '{}/src/proj'}\n",
        "MAPPING = {'a': 1, 'b': None, 'c': b'{}/src/proj'}\n", "", "MAPPING: dict[str, str]\n",
        "MAPPING = {'/usr/lib': 'x'}\n",
    ],
)  # fmt: skip
def test_a_finder_that_maps_nothing_outside(project: Project, text: str | bytes) -> None:
    project.write("__editable___proj_finder.py", text)
    assert project.sources("/usr") == []


# 4. Loaders that rebuild


@pytest.mark.parametrize("name", ["_proj_editable_loader.py", "_my_proj_editable.py"])
def test_an_install_that_rebuilds_on_import(project: Project, name: str) -> None:
    path = project.write(name, "raise SystemExit('not to be run')\n")
    project.write("proj-editable.pth", f"import {name[:-3]}\n")
    assert project.find() == ([], [Rebuilding(path)])


REDIRECT = "def install(*arguments):\n    pass\n\n\n{call}\n"


@pytest.mark.parametrize(
    "call",
    [
        "install({'p': '/s'}, {'p._c': 'p/_c.so'}, {'p': []}, [], '/b', True, True, [], [], '')",
        # Not on import, but it leaves what it has built in the build tree.
        "install({'p': '/s'}, {'p._c': '/b/p/_c.so'}, {'p': []}, [], '/b', False, True, [], [])",
        "install_inplace(['p'], ['/s'], '/s', True, True, [])",
        # From Python 3.15 on it is in a function that a .start file names.
        "def entrypoint() -> None:\n    install_inplace(['p'], ['/s'], '/s', True, True, [])",
    ],
)
def test_a_redirect_that_needs_its_build(project: Project, call: str) -> None:
    path = project.write("_editable_skbc_proj.py", REDIRECT.replace("{call}", call))
    assert project.find() == ([], [Rebuilding(path)])


@pytest.mark.parametrize(
    "call",
    [
        "install({'p': '/s'}, {'p._c': 'p/_c.so'}, {'p': []}, [], None, False, True, [], [], '')",
        "install_inplace(['p'], ['/s'], '/s', False, True, [])",
        "install(one, two)",
        "install({[]: 1}, {'p._c': '/b/p/_c.so'})",
        "",
        "no python",
    ],
)
def test_a_redirect_that_does_not(project: Project, call: str) -> None:
    project.write("_editable_skbc_proj.py", REDIRECT.replace("{call}", call))
    path = project.write("_editable_skbc_proj.pth", "import _editable_skbc_proj\n{}/src\n")
    assert project.sources() == [Source(str(project.tmp / "src"), path, ("proj",))]


@pytest.mark.parametrize(
    "name", ["editable.py", "proj_editable.py", "_proj_editable.txt", "_editable.py"]
)
def test_a_module_that_only_sounds_like_one(project: Project, name: str) -> None:
    project.write(name, "")
    assert project.find() == ([], [])


# What is no editable install


@pytest.mark.parametrize("editable", [False, True])
def test_the_file_that_tells_of_the_origin_is_not_the_evidence(
    project: Project, editable: bool
) -> None:
    """A package installed from a local directory has the same file, and imports from here."""
    info = project.site / "proj-1.dist-info"
    info.mkdir()
    told = {"dir_info": {"editable": editable}, "url": f"file://{project.tmp}/src"}
    (info / "direct_url.json").write_text(json.dumps(told))
    project.package("env", "lib", "python3.11", "site-packages", "proj")
    assert project.find() == ([], [])


def test_a_directory_that_is_not_there() -> None:
    assert editables.find("/no/such/place", below()) == ([], [])


@pytest.mark.parametrize(
    "name",
    [
        "{}.pth",
        "{}.egg-link",
        "__editable___{}_finder.py",
        "_editable_impl_{}.py",
        "_{}_editable.py",
    ],
)
def test_files_of_other_kinds_with_such_a_name(project: Project, name: str) -> None:
    (project.site / name.format("a")).mkdir()
    (project.site / name.format("b")).symlink_to("/no/such/place")
    os.mkfifo(project.site / name.format("c"))  # must not make us wait
    found, _ = project.find()
    assert found == []


def test_a_path_file_that_may_not_be_read_is_left_to_the_packer(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.write("a.pth", "{}/src\n")
    real = open

    def refuse(path: str, *rest: object, **options: object) -> object:
        if str(path).endswith("a.pth"):
            raise PermissionError(13, "Permission denied", path)
        return real(path, *rest, **options)  # type: ignore[call-overload]

    monkeypatch.setattr("builtins.open", refuse)
    assert project.find() == ([], [])


def test_names_that_are_no_text(project: Project) -> None:
    project.package("src", "größe", "pkg")
    project.write("a.pth", os.fsencode(project.tmp) + "/src/größe\n".encode())
    project.write("b.pth", b"/no/\xff\n")
    assert [one.path for one in project.sources()] == [f"{project.tmp}/src/größe"]
