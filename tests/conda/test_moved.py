"""Conda environments, packed and staged, with the originals and the package cache hidden."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import workbench
from environments import run, strace_files
from workbench import Bench, Staged

from . import channel
from .fixtures import CondaEnvironment, install
from .test_channel import MODERN

pytestmark = pytest.mark.environments

WAYS = (("conda", "mounted"), ("conda", "archive"), ("conda", "elsewhere"))
WAYS += (("clone", "mounted"), ("pixi", "archive"))
MODULES = ("numpy", "requests", "ssl", "sqlite3", "ctypes", "click", "noarch_demo")


@pytest.fixture(params=WAYS, ids="-".join)
def one(request: pytest.FixtureRequest, staged: Callable[[str, str], Staged]) -> Staged:
    return staged(*request.param)


def records(prefix: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(prefix.glob("conda-meta/*.json")):
        yield json.loads(path.read_text())


def test_imports(one: Staged) -> None:
    code = f"import {', '.join(MODULES)}; import sys; print(numpy.__file__, ssl.__file__)"
    said = one.run(one.python, "-c", code).stdout.split()
    assert said == [
        f"{one.site_packages}/numpy/__init__.py",
        f"{one.site_packages.parent}/ssl.py",
    ]
    code = "import sys; print(sys.prefix, sys.base_prefix, sys.executable)"
    said = one.run("./bin/python", "-c", code, cwd=one.prefix).stdout.split()
    assert said == [str(one.prefix), str(one.prefix), str(one.python)]
    assert one.manifest["kind"] == "conda"


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("cbaked", "hello from the prefix"),
        ("demo-config", "{0}/share/prefix-text"),
        ("demo-config-1", "{0}/share/prefix-text"),
        ("demo-python", "{0}"),
        ("demo-python-option", "True 1"),
        ("R", "{0}/lib/R {0}/lib/R/lib:{0}/lib"),
        ("legacy-config", "{0}/lib"),
        ("noarch-entry", "{0} {1}/noarch_demo.py"),
        ("noarch-script", "{0} {1}/noarch_demo.py"),
    ],
)
def test_programs(one: Staged, program: str, said: str) -> None:
    expected = said.format(one.prefix, one.site_packages)
    assert one.run(one.bin / program).stdout.removesuffix("\n") == expected


def test_prefixes_in_compiled_files(one: Staged) -> None:
    """Alone, with more behind it, twice in one string, in a table."""
    assert one.run(one.bin / "cbaked", "tell").stdout.splitlines() == [
        f"{one.prefix}",
        f"{one.prefix}/share/cbaked/data.txt",
        f"{one.prefix}/share/cbaked:{one.prefix}/etc/cbaked",
        f"{one.prefix}/lib/second",
        f"{MODERN}",
    ]


def test_no_trace_of_the_original(one: Staged) -> None:
    old = {*one.hide, *one.manifest["spellings"]}
    if one.prefix != Path(one.manifest["layers"][-1]["destination"]):
        old.add(one.manifest["layers"][-1]["destination"])
    # Where a package came from is kept: nothing looks for it there.
    old = {str(path) for path in old if "conda/channel" not in str(path)}
    assert workbench.traces(one, old) == {}
    assert workbench.links_out(one) == {}
    assert one.told("leftover") == {}


def test_nothing_else_is_asked_for(one: Staged) -> None:
    """With the original in its place, so that whoever asks for it finds it."""
    for argv in (
        [one.python, "-c", f"import {', '.join(MODULES)}; ssl.create_default_context()"],
        [one.bin / "noarch-entry"],
        [one.bin / "cbaked"],
    ):
        asked = strace_files(argv)
        assert any(path.startswith(f"{one.prefix}/") for path in asked)
        origins = tuple(f"{path}/" for path in one.hide)
        assert [path for path in asked if f"{path}/".startswith(origins)] == []


def test_verify_finds_nothing(one: Staged) -> None:
    name = next(name for name in ("conda", "clone", "pixi") if one.manifest["name"] == name)
    said = one.bench.json("verify", name, "--import", ",".join(MODULES))
    assert (said["origin"], said["outside"], said["failed"]) == ([], [], {})


def test_nothing_is_compiled(one: Staged) -> None:
    """Also not noarch packages, that pixi leaves without bytecode."""
    modules = ("numpy", "requests", "click", "idna", "noarch_demo", "json", "decimal")
    assert workbench.modules_from_source(one, *modules) == []


def test_records_of_conda_are_right(one: Staged) -> None:
    """What ``conda list`` and ``conda doctor`` look at: names, files and their checksums."""
    checked = 0
    for record in records(one.prefix):
        assert {"name", "version", "build", "files"} <= set(record)
        for key in ("extracted_package_dir", "package_tarball_full_path"):
            assert not record.get(key)
        assert not (record.get("link") or {}).get("source")
        for path in record["paths_data"]["paths"]:
            file = one.prefix / path["_path"]
            assert os.path.lexists(file), file
            if path.get("sha256_in_prefix") and not file.is_symlink():
                found = hashlib.sha256(file.read_bytes()).hexdigest()
                assert found == path["sha256_in_prefix"], file
                checked += 1
    assert checked > 30


def test_conda_s_own_library_reads_the_records(one: Staged) -> None:
    """rattler, as pixi lists what is installed."""
    code = (
        "import sys; from rattler import PrefixRecord\n"
        "for path in sys.argv[1:]: print(PrefixRecord.from_path(path).name.normalized)"
    )
    paths = sorted(one.prefix.glob("conda-meta/*.json"))
    said = run([channel.WORK / "tools" / "bin" / "python", "-I", "-c", code, *paths]).stdout
    assert said.split() == [record["name"] for record in records(one.prefix)]
    assert len(paths) >= 15


def test_records_of_pip_are_right(one: Staged) -> None:
    wrong = workbench.broken_records(one.site_packages)
    # As in the packages: who builds one with pip writes another name into this file.
    assert [line for line in wrong if "/INSTALLER has" not in line] == []


def test_what_build_systems_read(one: Staged, tmp_path: Path) -> None:
    """``_sysconfigdata``, Makefile, ``*-config``, pkg-config, CMake, libtool: and a build."""
    prefix, config = one.prefix, one.bin / "python3-config"
    old = tuple(str(path) for path in one.hide)
    for argv in (
        [one.python, "-m", "sysconfig"],
        [config, "--prefix", "--includes", "--ldflags"],
        [config, "--embed", "--libs", "--cflags"],
    ):
        said = one.run(*argv).stdout
        assert str(prefix) in said or "--libs" in argv
        assert not any(path in said for path in old)
    assert one.run(config, "--prefix").stdout == f"{prefix}\n"
    for path, line in (
        ("lib/pkgconfig/demo.pc", f"Libs: -L{prefix}/lib -ldemo"),
        ("lib/cmake/demo/demoConfig.cmake", f'set(demo_ROOT "{prefix}")'),
        ("lib/liblegacy.la", f"libdir='{prefix}/lib'"),
        ("lib/R/etc/Makeconf", f"R_HOME = {prefix}/lib/R"),
        ("bin/qt.conf", f"Plugins = {prefix}/lib/qt/plugins"),
    ):
        assert line in (prefix / path).read_text().splitlines()
    (kernel,) = prefix.glob("share/jupyter/kernels/*/kernel.json")
    assert json.loads(kernel.read_text())["argv"][0] == str(one.python)
    # A module in C, built with what the staged Python says.
    (tmp_path / "built.c").write_text(
        "#include <Python.h>\n"
        'static struct PyModuleDef def = {PyModuleDef_HEAD_INIT, "built"};\n'
        "PyMODINIT_FUNC PyInit_built(void) { return PyModule_Create(&def); }\n"
    )
    flags = one.run(config, "--includes").stdout.split()
    target = tmp_path / "built.so"
    one.run("gcc", "-shared", "-fPIC", *flags, "-o", target, tmp_path / "built.c")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import built; print(built.__name__)"
    assert one.run(one.python, "-c", code).stdout == "built\n"


def test_it_is_what_a_direct_install_would_have_been(
    bench: Bench, conda_env: CondaEnvironment, conda_channel: Path
) -> None:
    """Byte for byte; whatever differs is of a kind that has a reason."""
    bench.pack(conda_env)
    (layer,) = bench.json("inspect", "it")["layers"]
    destination, direct = Path(layer["destination"]), bench.root / "direct"
    install(destination, bench.root / "pkgs", conda_channel)
    destination.rename(direct)
    shutil.rmtree(bench.store)
    staged = bench.stage("--how", "extract")
    assert staged.prefix == destination
    ours, theirs = _files(staged.prefix), _files(direct)
    # Directories are there for what is in them.
    assert {path for path in theirs if path not in ours} == set()
    assert {path for path in ours if path not in theirs and not path.endswith(".pyc")} == set()
    different = {path for path in theirs if ours[path] != theirs[path]}
    reasons: dict[str, set[str]] = {"bytecode": set(), "record": set(), "conda": set()}
    for path in different:
        reasons[_reason(path, staged.prefix, direct)].add(path)
    # Modules whose bytecode was valid as it was are not compiled anew.
    assert len(reasons["bytecode"]) > 100
    assert "conda-meta/history" in reasons["conda"]


def _files(prefix: Path) -> dict[str, tuple[str, bytes]]:
    """Links with their targets; files with their content and whether they can be run."""
    found = {}
    for parent, directories, files in os.walk(prefix):
        for name in [*directories, *files]:
            path = Path(parent, name)
            if path.is_symlink():
                content = ("link", os.fsencode(path.readlink()))
            elif path.is_file():
                content = (str(os.access(path, os.X_OK)), path.read_bytes())
            else:
                continue
            found[str(path.relative_to(prefix))] = content
    return found


def _reason(path: str, ours: Path, theirs: Path) -> str:
    """Why a file differs. An assertion fails where there is no reason."""
    one, other = (ours / path).read_bytes(), (theirs / path).read_bytes()
    if path.endswith(".pyc"):
        # Valid whatever the times and contents of sources are: nobody can compile in the store.
        assert one[4] == 1 or one[16:] == other[16:], path
        return "bytecode"
    if path.endswith(".dist-info/RECORD"):
        # No checksums of bytecode, which may be left out (PEP 376); true ones of what the prefix is
        # in, where conda leaves those of the files that the package was built with.
        lines = list(zip(one.splitlines(), other.splitlines()))
        assert len(lines) == len(other.splitlines())
        for line, installed_line in lines:
            assert line.split(b",")[0] == installed_line.split(b",")[0], path
            if line != installed_line:
                assert b".pyc," in line or line.startswith(b"../../../bin/"), path
        return "record"
    if path == "conda-meta/history":
        # When it was made, and what was typed.
        lines = [
            [line for line in text.splitlines() if not line.startswith((b"==>", b"# cmd"))]
            for text in (one, other)
        ]
        assert lines[0] == lines[1]
        return "conda"
    assert path.startswith("conda-meta/") and path.endswith(".json"), path
    record, installed = json.loads(one), json.loads(other)
    for value in (record, installed):
        # The package cache is not part of the environment.
        value.pop("extracted_package_dir", None)
        value.pop("link", None)
        for entry in value["paths_data"]["paths"]:
            if entry["_path"].endswith((".pyc", ".dist-info/RECORD")):
                entry.pop("sha256_in_prefix", None)
                entry.pop("size_in_bytes", None)
    entries, others = (value.pop("paths_data")["paths"] for value in (record, installed))
    assert record == installed, path
    for entry, other_entry in zip(entries, others):
        assert entry == other_entry, path
    assert len(entries) == len(others)
    return "conda"


def test_neither_the_environment_nor_its_cache_is_written_to(
    bench: Bench, conda_env: CondaEnvironment
) -> None:
    """The files are hard links: who writes to one writes to all environments."""

    def state() -> dict[str, tuple[int, ...]]:
        found = {}
        for root in (conda_env.prefix, conda_env.cache):
            for parent, _, files in os.walk(root):
                for name in files:
                    info = os.lstat(os.path.join(parent, name))
                    found[os.path.join(parent, name)] = (
                        *(info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_nlink),
                    )
        return found

    before = state()
    bench.pack(conda_env)
    bench.stage()
    assert state() == before
    assert sum(item[3] > 1 for item in before.values()) > 1000
