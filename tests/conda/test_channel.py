"""The environments are what they claim to be: conda's, with all that makes them hard to move."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from environments import run

from . import channel
from .fixtures import VARIABLES, CondaEnvironment

pytestmark = pytest.mark.environments

MODERN, LEGACY = 255, 32
"""Lengths of placeholders."""


@pytest.fixture(scope="session", params=["conda_env", "conda_clone", "pixi_like_env"])
def environment(request: pytest.FixtureRequest) -> CondaEnvironment:
    made: CondaEnvironment = request.getfixturevalue(request.param)
    return made


def output(*argv: str | Path) -> str:
    """What a program prints; it does not write bytecode."""
    return run(argv).stdout.removesuffix("\n")


def test_python_has_all_it_needs_in_the_prefix(environment: CondaEnvironment) -> None:
    prefix = environment.prefix
    code = """if True:
        import ctypes, json, sqlite3, ssl, sys, sysconfig
        import numpy, requests
        assert numpy.arange(6).reshape(2, 3).sum() == 15
        assert sqlite3.connect(":memory:").execute("select 1 + 1").fetchone() == (2,)
        assert ssl.create_default_context() and ctypes.CDLL(None)
        mapped = {line.split()[-1] for line in open("/proc/self/maps") if ".so" in line}
        mapped = [path for path in mapped if "/libssl." in path or "/libsqlite3." in path]
        modules = [module.__file__ for module in (ssl, ssl._ssl, numpy, requests)]
        paths = [path for path in sys.path if path] + list(sysconfig.get_paths().values())
        values = [sysconfig.get_config_var(name) for name in ("prefix", "LIBDIR", "INCLUDEPY")]
        own = [sys.prefix, sys.exec_prefix, sys.base_prefix, sys.executable]
        print(json.dumps([mapped, modules + paths + values + own]))
    """
    mapped, paths = json.loads(output(environment.python, "-c", code))
    assert len(mapped) == 2
    strangers = [path for path in mapped + paths if not Path(path).is_relative_to(prefix)]
    assert strangers == []


def test_the_interpreter_falls_back_to_the_prefix_baked_into_it(
    conda_env: CondaEnvironment, tmp_path: Path
) -> None:
    """A program with Python in it that lies somewhere else."""
    prefix = conda_env.prefix
    (tmp_path / "main.c").write_text("""
        #include <Python.h>
        int main(int argc, char **argv) { return Py_BytesMain(argc, argv); }
    """)
    flags = output(prefix / "bin" / "python3-config", "--cflags", "--ldflags", "--embed").split()
    program = tmp_path / "program"
    run(["gcc", tmp_path / "main.c", "-o", program, *flags, f"-Wl,-rpath,{prefix}/lib"])
    assert output(program, "-c", "import sys, json; print(sys.prefix)") == str(prefix)


def test_records_tell_of_every_placeholder(environment: CondaEnvironment) -> None:
    prefix = environment.prefix
    modes: dict[tuple[str, int], set[str]] = {}
    for path in environment.paths():
        if "prefix_placeholder" in path:
            kind = (path["file_mode"], len(path["prefix_placeholder"]))
            modes.setdefault(kind, set()).add(path["_path"])
            content = (prefix / path["_path"]).read_bytes()
            assert os.fsencode(prefix) in content
            assert path["prefix_placeholder"].encode() not in content
            assert hashlib.sha256(content).hexdigest() == path["sha256_in_prefix"]
    assert set(modes) == {("text", MODERN), ("binary", MODERN), ("text", LEGACY)}
    python = environment.python.resolve().name
    assert modes["binary", MODERN] == {
        *(f"bin/{python}", f"lib/lib{python}.so.1.0"),
        *("bin/cbaked", "lib/libcbaked.so.1.0"),
    }
    assert modes["text", LEGACY] == {"bin/legacy-config", "lib/liblegacy.la"}
    assert modes["text", MODERN] >= {
        *("bin/qt.conf", "bin/f2py", "bin/noarch-script", f"bin/{python}-config"),
        *("lib/pkgconfig/demo.pc", "lib/cmake/demo/demoConfig.cmake", "lib/R/etc/ldpaths"),
        *("share/jupyter/kernels/python3/kernel.json", "etc/conda/activate.d/02-baked.sh"),
        *("share/prefix-text/utf8.txt", "share/prefix-text/latin1.txt"),
        *("share/prefix-text/with space and ü.txt", "etc/conda/env_vars.d/activate-demo.json"),
    }


def test_prefixes_baked_into_binaries_are_used(environment: CondaEnvironment) -> None:
    prefix = environment.prefix
    assert output(prefix / "bin" / "cbaked") == "hello from the prefix"
    assert output(prefix / "bin" / "cbaked", "tell").splitlines() == [
        f"{prefix}",
        f"{prefix}/share/cbaked/data.txt",
        f"{prefix}/share/cbaked:{prefix}/etc/cbaked",
        f"{prefix}/lib/second",
        f"{MODERN}",
    ]


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("demo-config", "{0}/share/prefix-text"),
        ("demo-config-1", "{0}/share/prefix-text"),
        ("demo-python", "{0}"),
        ("demo-python-option", "True 1"),
        ("R", "{0}/lib/R {0}/lib/R/lib:{0}/lib"),
        ("legacy-config", "{0}/lib"),
        ("noarch-entry", "{0} {0}/lib/python3.11/site-packages/noarch_demo.py"),
        ("noarch-script", "{0} {0}/lib/python3.11/site-packages/noarch_demo.py"),
    ],
)
def test_programs_know_the_prefix(environment: CondaEnvironment, program: str, said: str) -> None:
    said = said.replace("python3.11", environment.python.resolve().name)
    assert output(environment.bin / program) == said.format(environment.prefix)


def test_files_are_hard_links_into_the_cache(environment: CondaEnvironment) -> None:
    linked = 0
    for record in environment.records().values():
        package = environment.cache / f"{record['name']}-{record['version']}-{record['build']}"
        for path in record["paths_data"]["paths"]:
            placed = environment.prefix / path["_path"]
            cached = package / path["_path"]
            if path["path_type"] == "hardlink" and record.get("noarch") != "python":
                # What was changed is a file of its own, or the cache would be spoilt.
                changed = "prefix_placeholder" in path
                assert placed.samefile(cached) == (not changed), placed
                linked += not changed
    assert linked > 1000


def test_copies_share_nothing_with_the_cache(conda_channel: Path, public_path: Path) -> None:
    prefix, cache = public_path / "env", public_path / "pkgs"
    channel.environment(prefix, "cbaked", channel=conda_channel, cache=cache, copy=True)
    assert output(prefix / "bin" / "cbaked") == "hello from the prefix"
    (cached,) = cache.glob("cbaked-*/share/cbaked/data.txt")
    assert not cached.samefile(prefix / "share" / "cbaked" / "data.txt")


def test_activation(environment: CondaEnvironment) -> None:
    prefix = environment.prefix
    conda = prefix / "etc" / "conda"
    source = f'for script in "{conda}"/{{}}.d/*.sh; do . "$script"; done; env'
    environ = {"CONDA_PREFIX": str(prefix), "PATH": "/usr/bin:/bin"}
    printed = run(["sh", "-c", source.format("activate")], env=environ).stdout.splitlines()
    assert {line for line in printed if line.startswith("DEMO")} == {
        "DEMO_BEFORE=",
        f"DEMO_HOME={prefix}/share/activate-demo",
        f"DEMO_BAKED={prefix}/share/activate-demo",
        f"DEMO_ORDER=after {prefix}/share/activate-demo",
    }
    environ["DEMO_BAKED"] = f"{prefix}/share/activate-demo"
    assert "DEMO" not in run(["sh", "-c", source.format("deactivate")], env=environ).stdout
    variables = json.loads((conda / "env_vars.d" / "activate-demo.json").read_text())
    assert variables == {"DEMO_PACKAGE": "from env_vars.d", "DEMO_PATH": f"{prefix}/share"}
    assert {path.suffix for path in (conda / "activate.d").iterdir()} == {".sh", ".csh", ".fish"}


def test_what_conda_keeps_and_pixi_does_not(
    conda_env: CondaEnvironment, pixi_like_env: CondaEnvironment
) -> None:
    meta = conda_env.prefix / "conda-meta"
    state = json.loads((meta / "state").read_text())["env_vars"]
    assert state == {
        name: value.format(prefix=conda_env.prefix) for name, value in VARIABLES.items()
    }
    history = (meta / "history").read_text().splitlines()
    assert len([line for line in history if line.startswith("+file:")]) == len(conda_env.records())

    meta = pixi_like_env.prefix / "conda-meta"
    assert (meta / "history").read_bytes() == b""
    assert not (meta / "state").exists()
    project = pixi_like_env.prefix.parents[2]
    assert json.loads((meta / "pixi").read_text())["manifest_path"] == f"{project}/pixi.toml"


def test_bytecode_of_noarch_packages(
    conda_env: CondaEnvironment, pixi_like_env: CondaEnvironment
) -> None:
    def compiled(environment: CondaEnvironment, package: str) -> tuple[int, int]:
        """How many .pyc there are, and how many the package's record has."""
        found = environment.site_packages.glob(f"{package}/**/*.pyc")
        (record,) = (one for name, one in environment.records().items() if name == package)
        return len(list(found)), sum(name.endswith(".pyc") for name in record["files"])

    files, recorded = compiled(conda_env, "requests")
    assert files == recorded > 10
    assert compiled(pixi_like_env, "requests") == (0, 0)
    files, recorded = compiled(pixi_like_env, "numpy")
    assert files == recorded > 100


def test_files_that_no_package_owns(
    conda_env: CondaEnvironment, conda_clone: CondaEnvironment, pixi_like_env: CondaEnvironment
) -> None:
    old, new = str(conda_env.prefix), str(conda_clone.prefix)
    for prefix, other in ((old, old), (new, old)):
        made = Path(prefix) / "share" / "postlink-demo"
        assert (made / "loaders.cache").read_text() == f'"{prefix}/lib/loaders/one.so"\n'
        assert (made / "latin1.txt").read_text("latin-1") == f"café {other}/share\n"
        # What is not UTF-8 was left as it was.
        assert (made / "utf16.txt").read_text("utf-16") == f"prefix={other}\n"
        assert output(Path(prefix) / "bin" / "sample-console") == f"hello {prefix}"
        assert output(Path(prefix) / "bin" / "sample-script") == f"hello {prefix}"
        (compiled,) = Path(prefix).glob("lib/python3.*/**/stager_sample/**/*.pyc")
        assert f"{other}/lib".encode() in compiled.read_bytes()
    assert set(conda_env.untracked()) == set(conda_clone.untracked())
    assert list(pixi_like_env.untracked()) == [Path("CACHEDIR.TAG")]
