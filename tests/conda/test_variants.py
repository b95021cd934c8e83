"""Conda environments as users have them: edited, cloned, a whole installation, below a venv."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import workbench
from environments import VENV, Environment, run, strace_files
from workbench import Bench, Staged

from . import channel
from .fixtures import CondaEnvironment

pytestmark = pytest.mark.environments


@pytest.fixture
def small(bench: Bench, conda_channel: Path) -> CondaEnvironment:
    """An environment of its own, to be changed."""
    prefix, cache = bench.root / "conda" / "envs" / "small", bench.root / "conda" / "pkgs"
    packages = ("python", "pip", "cbaked", "prefix-text")
    channel.environment(prefix, *packages, channel=conda_channel, cache=cache, copy=True)
    for script in prefix.glob("bin/pip3.*"):  # runs the Python that made the package of pip's wheel
        script.unlink()
    return CondaEnvironment(prefix, prefix, cache)


def staged_without(bench: Bench, environment: CondaEnvironment, *options: str) -> Staged:
    bench.pack(environment, *options)
    return bench.stage(hide=[environment.prefix, environment.cache])


def test_what_a_user_changed_is_kept(bench: Bench, small: CondaEnvironment) -> None:
    prefix = small.prefix
    edited = prefix / "share" / "prefix-text" / "config.json"
    edited.write_text(json.dumps({"root": str(prefix), "other": f"{prefix}2/bin"}))
    (prefix / "bin" / "demo-python").unlink()
    (prefix / "share" / "mine.txt").write_text(f"{prefix}/share\n")
    record = prefix / "conda-meta" / "broken-1.0-0.json"
    record.write_text("{")
    staged = staged_without(bench, small)
    found = json.loads((staged.prefix / "share" / "prefix-text" / "config.json").read_text())
    # In an edited file not everything that begins like the prefix is the prefix.
    assert found == {"root": str(staged.prefix), "other": f"{prefix}2/bin"}
    assert set(staged.told("leftover")) == {"share/prefix-text/config.json"}
    assert not (staged.bin / "demo-python").exists()
    assert (staged.prefix / "share" / "mine.txt").read_text() == f"{staged.prefix}/share\n"
    assert (staged.prefix / "conda-meta" / record.name).read_text() == "{"
    # That it was edited can still be seen, as `conda doctor` does.
    (record,) = staged.prefix.glob("conda-meta/prefix-text-*.json")
    (path,) = (
        path
        for path in json.loads(record.read_text())["paths_data"]["paths"]
        if path["_path"] == "share/prefix-text/config.json"
    )
    content = (staged.prefix / "share" / "prefix-text" / "config.json").read_bytes()
    assert path["sha256_in_prefix"] != hashlib.sha256(content).hexdigest()


def test_compiled_files_that_no_record_tells_of(bench: Bench, small: CondaEnvironment) -> None:
    """Replaced where it fits in place; what does not fit is told."""
    program = small.prefix / "bin" / "mine"
    source = bench.root / "mine.c"
    source.write_text(f'#include <stdio.h>\nint main(void) {{ puts("{small.prefix}/share"); }}\n')
    run(["gcc", "-o", program, source])
    content = program.read_bytes()
    bench.pack(small, "--store", "/tmp/s")  # shorter
    assert bench.json("inspect", "it")["findings"] == []
    staged = bench.stage(hide=[small.prefix, small.cache])
    # Rewritten for a shorter path, and in the store for a longer one: which does not fit any more.
    destination = bench.json("inspect", "it")["layers"][0]["destination"]
    assert staged.run(staged.bin / "mine").stdout == f"{destination}/share\n"
    assert os.fsencode(small.prefix) not in (staged.bin / "mine").read_bytes()
    long = str(bench.root / "a-store-of-a-longer-path")
    packed = bench.pack(small, "--store", long, name="long")
    assert [one["path"] for one in packed["findings"] if one["code"] == "leftover"] == ["bin/mine"]
    assert program.read_bytes() == content


def test_room_is_checked_before_anything_is_written(bench: Bench, small: CondaEnvironment) -> None:
    """As packages of ten years ago: a placeholder of 80 characters in a compiled file."""
    (record,) = small.prefix.glob("conda-meta/cbaked-*.json")
    value = json.loads(record.read_text())
    for path in value["paths_data"]["paths"]:
        if path.get("file_mode") == "binary":
            path["prefix_placeholder"] = path["prefix_placeholder"][:80]
    record.write_text(json.dumps(value))
    store = "/tmp/" + "s" * 54  # and 22 behind it make 81
    said = bench.expect(1, "pack", small.prefix, "--name", "it", "--store", store)
    assert "has room for a path of 80 bytes" in said and "at most 58 bytes" in said
    assert "cbaked" in said
    assert list(bench.repository.glob("images/*")) == []
    check = bench.stager("pack", small.prefix, "--check", "--store", store, check=False)
    assert check.returncode == 1 and "room for a path of 80 bytes" in check.stderr
    # One byte less, and it fits. A node whose store is longer says so before it is rewritten.
    bench.pack(small, "--store", store[:-1])
    said = bench.expect(15, "stage", "it", "--store", f"{bench.root}/{'s' * 30}")
    assert "room for a path of 80 bytes" in said
    assert bench.unfinished() == []


def test_large_files_are_not_held(bench: Bench, small: CondaEnvironment) -> None:
    """A library of a hundred megabytes with the prefix in it, declared; and rewritten twice."""
    library = small.prefix / "lib" / "libcbaked.so.1.0"
    content = library.read_bytes() + bytes(100 << 20) + b"\1" + os.fsencode(small.prefix) + b"/end"
    content += b"\0" * 300
    library.write_bytes(content)
    (record,) = small.prefix.glob("conda-meta/cbaked-*.json")
    value = json.loads(record.read_text())
    for path in value["paths_data"]["paths"]:
        if path["_path"] == "lib/libcbaked.so.1.0":
            path["sha256_in_prefix"] = hashlib.sha256(content).hexdigest()
    record.write_text(json.dumps(value))
    (bench.root / "time").write_text("")
    measured = ["/usr/bin/env", "python3", "-c", _PEAK, bench.root / "time"]
    bench.stager("pack", small.prefix, "--name", "it", "--store", "/tmp/s", prefix=measured)
    assert int((bench.root / "time").read_text()) < 100 << 10  # KiB
    staged = bench.stage(hide=[small.prefix, small.cache])
    found = (staged.prefix / "lib" / "libcbaked.so.1.0").read_bytes()
    assert len(found) == len(content)
    assert found.rstrip(b"\0").endswith(b"\1" + os.fsencode(staged.prefix) + b"/end")
    records = CondaEnvironment(staged.prefix, staged.prefix, small.cache).records()
    recorded = {path["_path"]: path for path in records["cbaked"]["paths_data"]["paths"]}
    checksum = recorded["lib/libcbaked.so.1.0"]["sha256_in_prefix"]
    assert checksum == hashlib.sha256(found).hexdigest()
    assert staged.run(staged.bin / "cbaked").stdout == "hello from the prefix\n"


_PEAK = """
import os, resource, subprocess, sys
done = subprocess.run(sys.argv[2:])
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
open(sys.argv[1], "w").write(str(peak))
sys.exit(done.returncode)
"""


def test_a_whole_installation(bench: Bench, small: CondaEnvironment, conda_channel: Path) -> None:
    """Its base is packed without the cache and the other environments; a package `envs` stays."""
    base = bench.root / "conda"
    packages = ("python", "cbaked", "prefix-text", "six")
    channel.environment(base, *packages, channel=conda_channel, cache=base / "pkgs", copy=True)
    (base / "condabin").mkdir()
    (base / "condabin" / "conda").write_text(f"#!{base}/bin/python\nprint('conda')\n")
    (base / "condabin" / "conda").chmod(0o755)
    (site,) = base.glob("lib/python3.*/site-packages")
    (site / "gym" / "envs").mkdir(parents=True)
    (site / "gym" / "envs" / "__init__.py").write_text("")
    bench.pack(base)
    staged = bench.stage(hide=[base])
    assert set(staged.told("installation")) == {"pkgs", "envs"}
    assert not (staged.prefix / "pkgs").exists() and not (staged.prefix / "envs").exists()
    assert staged.eval("gym.envs.__file__", "gym.envs").startswith(str(staged.prefix))
    assert staged.run(staged.bin / "cbaked").stdout == "hello from the prefix\n"
    assert staged.run(staged.prefix / "condabin" / "conda").stdout == "conda\n"
    assert workbench.traces(staged, [base]) == {}
    assert staged.manifest["activation"]["set"]["CONDA_DEFAULT_ENV"] == "base"


def test_without_a_python(bench: Bench, small: CondaEnvironment) -> None:
    for name in (small.prefix / "bin").glob("python*"):
        name.unlink()
    said = bench.expect(15, "pack", small.prefix)
    assert "has no Python" in said and "conda install" in said


def test_a_link_as_name(bench: Bench, small: CondaEnvironment) -> None:
    """Made by one name and packed by another: nothing of either is left."""
    link = bench.root / "link"
    link.symlink_to(small.prefix.parent)
    bench.pack(link / "small")
    staged = bench.stage(hide=[small.prefix, small.cache])
    assert workbench.traces(staged, [small.prefix, link]) == {}
    moved = bench.root / "moved" / "elsewhere"
    moved.parent.mkdir()
    shutil.move(small.prefix, moved)
    bench.pack(moved, name="moved")
    staged = bench.stage(name="moved", hide=[moved])
    assert set(staged.told("copied")) == {str(small.prefix)}
    assert workbench.traces(staged, [small.prefix, moved]) == {}
    assert staged.run(staged.bin / "cbaked").stdout == "hello from the prefix\n"


def test_a_change_makes_it_stale(bench: Bench, small: CondaEnvironment) -> None:
    bench.pack(small)
    said = bench.stager("stage", "it", "--on-stale", "warn").stderr
    assert "changed" not in said
    (small.prefix / "conda-meta" / "state").write_text('{"env_vars": {"NEW": "1"}}')
    said = bench.stager("stage", "it", "--on-stale", "warn").stderr
    assert "changed since it was packed" in said


def test_what_no_variable_can_hold_is_left_out(bench: Bench, small: CondaEnvironment) -> None:
    state = '{"env_vars": {"BAD": "\\ud800", "WORSE": "a\\u0000", "GOOD": "\\udc80"}}'
    (small.prefix / "conda-meta" / "state").write_text(state)
    bench.pack(small)
    said = bench.stager("inspect", "--json", "it").stdout
    assert '"GOOD"' in said
    assert '"BAD"' not in said and '"WORSE"' not in said


def test_a_search_path_out_of_everything_is_told(bench: Bench, small: CondaEnvironment) -> None:
    """One that exists somewhere on shared storage, one that does not, and a loader of its own."""
    shared = bench.root / "shared" / "lib"
    shared.mkdir(parents=True)
    shutil.copy2(Path("/lib64/ld-linux-x86-64.so.2").resolve(), shared / "loader")
    source = bench.root / "mine.c"
    source.write_text("int main(void) { return 0; }\n")
    options = [f"-Wl,-rpath,{shared}:/no/such/place:$ORIGIN/../lib:/usr/lib"]
    for name in ("one", "two"):
        run(["gcc", "-o", small.prefix / "bin" / name, source, *options])
    loader = f"-Wl,--dynamic-linker={shared}/loader"
    run(["gcc", "-o", small.prefix / "bin" / "three", source, loader])
    findings = bench.pack(small)["findings"]
    told = {(one["code"], one["path"], one["severity"]): one["reason"] for one in findings}
    assert told.keys() == {
        ("runpath", "bin/one", "warning"),
        ("runpath", "bin/one", "note"),
        ("interpreter", "bin/three", "warning"),
    }
    assert (
        f"{shared}, which is not on the node (and 1 more)" in told["runpath", "bin/one", "warning"]
    )
    assert "/no/such/place" in told["runpath", "bin/one", "note"]


# -- a venv over it -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def over_conda(
    tmp_path_factory: pytest.TempPathFactory, conda_env: CondaEnvironment
) -> Environment:
    """A venv that sees the packages of a conda environment, and has another six of its own."""
    prefix = tmp_path_factory.mktemp("over") / "venv"
    run([conda_env.python, "-m", "venv", "--system-site-packages", "--without-pip", prefix])
    environment = Environment(prefix, conda_env.prefix)
    (site,) = prefix.glob("lib/python3.*/site-packages")
    (site / "six.py").write_text("__version__ = 'shadows'\n")
    (site / "only_here.py").write_text("import numpy\n")
    return environment


@pytest.fixture(scope="module", params=["squashfs", "tar.zst"])
def above(
    request: pytest.FixtureRequest, over_conda: Environment, conda_env: CondaEnvironment
) -> Iterator[Staged]:
    public = Path(os.environ["TESTING_DIRECTORY"]) / "public"
    bench = Bench(Path(tempfile.mkdtemp(dir=public, prefix="")))
    bench.pack(over_conda, "--format", request.param)
    yield bench.stage(hide=[over_conda.prefix, conda_env.prefix, conda_env.cache])
    bench.close()


def test_venv_over_conda(
    above: Staged, over_conda: Environment, conda_env: CondaEnvironment
) -> None:
    base, venv = above.trees
    assert [one["role"] for one in above.manifest["layers"]] == ["base", "env"]
    code = (
        "import json, sys, six, only_here, numpy, requests, stager_sample;"
        "print(json.dumps([sys.path, six.__version__, numpy.__file__, requests.__file__]))"
    )
    before = json.loads(run([over_conda.python, "-c", code]).stdout)
    after = json.loads(above.run(above.python, "-c", code).stdout)
    text = json.dumps(before).replace(str(over_conda.prefix), str(venv))
    assert after == json.loads(text.replace(str(conda_env.prefix), str(base)))
    assert after[1] == "shadows"
    # The base is conda's, and moved as such.
    assert above.run(base / "bin" / "cbaked").stdout == "hello from the prefix\n"
    for record in CondaEnvironment(base, base, base).records().values():
        for path in record["paths_data"]["paths"]:
            file = base / path["_path"]
            if path.get("sha256_in_prefix") and file.is_file() and not file.is_symlink():
                checksum = hashlib.sha256(file.read_bytes()).hexdigest()
                assert checksum == path["sha256_in_prefix"], file
    assert workbench.traces(above, [over_conda.prefix, conda_env.prefix, conda_env.cache]) == {}
    assert workbench.modules_from_source(above, "numpy", "requests", "only_here") == []


def test_libraries_are_searched_for_in_the_base_that_was_moved(
    bench: Bench, over_conda: Environment, conda_env: CondaEnvironment
) -> None:
    """A module's Python may find its own libpython by ``LD_LIBRARY_PATH`` alone."""
    bench.settings["LD_LIBRARY_PATH"] = f"{conda_env.prefix}/lib"
    bench.pack(over_conda)
    bench.settings.clear()  # the job loads no modules
    code = "import os; print(os.environ['LD_LIBRARY_PATH'])"
    command = [VENV / "bin" / "stage-run", "--strict", "--env", "it"]
    new = over_conda.site_packages / "one_more.py"
    try:
        for change in (lambda: None, lambda: new.write_text("")):  # packed again there
            change()
            staged = bench.stage()
            said = run([*command, "python", "-c", code], env=bench.environ()).stdout
            assert said == f"{staged.trees[0]}/lib\n"
    finally:
        new.unlink(missing_ok=True)


def test_venv_over_conda_looks_nowhere_else(
    above: Staged, over_conda: Environment, conda_env: CondaEnvironment
) -> None:
    asked = strace_files([above.python, "-c", "import only_here, requests, ssl, sqlite3"])
    origins = tuple(f"{path}/" for path in above.hide)
    assert [path for path in asked if f"{path}/".startswith(origins)] == []
    said = above.bench.json("verify", "it", "--import", "only_here,six,requests,numpy")
    assert (said["origin"], said["outside"], said["failed"]) == ([], [], {})
