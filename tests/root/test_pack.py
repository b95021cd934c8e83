"""Packing the same gives the same, packing what changes fails, and what changed is noticed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import environments
import workbench
from environments import VENV, Environment, run, strace_files
from workbench import Bench


@pytest.fixture
def environment(bench: Bench) -> Environment:
    return environments.make_venv(bench.root / "origin" / "env")


def images(bench: Bench) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in bench.repository.glob("images/*")}


@pytest.mark.parametrize("format_", ["squashfs", "tar.zst"])
@pytest.mark.parametrize("kind", ["venv_uv", "venv_on_base"])
def test_same_environment_same_bytes(
    bench: Bench, request: pytest.FixtureRequest, kind: str, format_: str
) -> None:
    """Also after it was read, and where many processes compile in no certain order."""
    environment: Environment = request.getfixturevalue(kind)
    found = []
    for number, threads in enumerate(["1", "4"]):
        bench.settings["STAGER_REPOSITORY"] = str(bench.root / f"repository-{number}")
        said = bench.json(
            "pack",
            environment.prefix,
            "--format",
            format_,
            "--threads",
            threads,
            env=bench.environ(SOURCE_DATE_EPOCH=str(number), TZ=f"UTC{number}", LANG="C"),
        )
        assert said["reused"] == []
        directory = bench.root / f"repository-{number}" / "images"
        found.append({path.name: path.read_bytes() for path in directory.iterdir()})
        assert len(found[-1]) == len(said["layers"])
        for path in environment.site_packages.rglob("*.py"):
            os.utime(path, ns=(1, path.stat().st_mtime_ns))  # read long ago: what a read changes
    assert found[0].keys() == found[1].keys()
    assert found[0] == found[1]


def test_packing_again_writes_nothing(bench: Bench, venv_on_base: Environment) -> None:
    first = bench.pack(venv_on_base)
    before = {path: path.stat().st_mtime_ns for path in bench.repository.glob("images/*")}
    again = bench.pack(venv_on_base)
    assert (first["reused"], again["reused"]) == ([], ["base", "env"])
    assert again["prefix"] == first["prefix"]
    assert {path: path.stat().st_mtime_ns for path in bench.repository.glob("images/*")} == before


def test_a_name_that_is_taken_over_is_told(
    bench: Bench, venv_uv: Environment, venv_uv_relocatable: Environment
) -> None:
    bench.pack(venv_uv)
    assert "until now" not in bench.stager("pack", venv_uv.prefix, "--name", "it").stderr
    said = bench.stager("pack", venv_uv_relocatable.prefix, "--name", "it").stderr
    assert f"stager: `it` previously referred to {venv_uv.prefix}\n" in said


def test_base_is_packed_once_for_all(bench: Bench, venv_on_base: Environment) -> None:
    base = venv_on_base.base_prefix
    other = environments.make_venv(bench.root / "other", python=base / "bin" / "python3")
    bench.pack(venv_on_base, name="one")
    said = bench.pack(other, name="two")
    assert said["reused"] == ["base"]
    one, two = bench.json("inspect", "one"), bench.json("inspect", "two")
    assert one["layers"][0] == two["layers"][0]
    assert len(list(bench.repository.glob("images/*"))) == 3
    staged = bench.stage(name="two", hide=[base, other.prefix])
    assert staged.eval("sys.base_prefix") == str(staged.trees[0])


@pytest.mark.parametrize("beside", [[], ["a-file"]])
def test_environments_in_a_base_are_no_part_of_it(bench: Bench, beside: list[str]) -> None:
    """As pyenv-virtualenv makes them: all that are there would be in the base of each."""
    base = environments.make_base(bench.root / "origin" / "base")
    envs = base.prefix / "envs"
    one, two = (
        environments.make_small_venv(envs / name, python=base.bin / "python3", mine="x = 1")
        for name in ("one", "two")
    )
    for name in beside:
        (envs / name).touch()
    bench.pack(one, name="one")
    (two.site_packages / "mine.py").write_text("x = 22\n")
    if not beside:  # a directory of nothing else may get more
        environments.make_small_venv(envs / "three", python=base.bin / "python3")
    assert bench.pack(two, name="two")["reused"] == ["base"]
    staged = bench.stage(name="two", hide=[base.prefix])
    assert staged.eval("sys.base_prefix, mine.x", "sys, mine") == f"{staged.trees[0]} 22"
    assert [path.name for path in staged.trees[0].glob("envs/*")] == beside


def test_a_base_that_the_site_has_packed(
    bench: Bench, venv_on_base: Environment, new_directory: Callable[[], Path]
) -> None:
    """Users' environments over it refer to the site's image, whatever else they hold."""
    base = venv_on_base.base_prefix
    site = Bench(new_directory(), {"STAGER_STORE": str(bench.store)})
    of_site = environments.make_venv(site.root / "any", python=base / "bin" / "python3")
    site.pack(of_site, name="site-python")
    bench.settings["STAGER_REPOSITORIES"] = str(site.repository)
    said = bench.pack(venv_on_base)
    assert said["reused"] == ["base"]
    links = [path for path in bench.repository.glob("images/*") if path.is_symlink()]
    assert [path.resolve().parent for path in links] == [site.repository / "images"]
    staged = bench.stage(hide=[base, venv_on_base.prefix, of_site.prefix])
    assert staged.eval("sys.base_prefix") == str(staged.trees[0])
    bench.stager("remove", "it")
    assert list(bench.repository.glob("images/*")) == []
    assert len(list(site.repository.glob("images/*"))) == 2


def test_check_writes_nothing(bench: Bench, venv_stdlib: Environment) -> None:
    said = bench.json("pack", venv_stdlib.prefix, "--check")
    assert said["rewritten"] > 10
    assert not bench.repository.exists() and not bench.store.exists()
    assert "name" not in said and "ref" not in said


def test_environment_is_not_written_to(bench: Bench, venv_uv: Environment) -> None:
    """Nor is uv's cache, which it is hard-linked to."""
    places = [venv_uv.prefix, Path(os.environ["HOME"]) / "uv-cache"]

    def state() -> dict[str, tuple[int, ...]]:
        paths = [path for place in places for path in [place, *place.rglob("*")]]
        infos = {str(path): path.lstat() for path in paths}
        return {
            path: (
                info.st_ino,
                info.st_nlink,
                info.st_mode,
                info.st_size,
                info.st_mtime_ns,
                info.st_ctime_ns,
            )
            for path, info in infos.items()
        }

    before = state()
    assert any(info[1] > 1 for info in before.values())
    bench.pack(venv_uv)
    bench.stage("--how", "extract")
    assert state() == before


# Changes while packing. A debugger's stop would be exact; a pipe that nobody reads is, too: it is
# what the packed bytes go through, so the packer stands still after so many of them.


class Paused:
    """A pack that stands still in the middle: ``mksquashfs`` is a program that waits."""

    def __init__(self, bench: Bench, environment: Environment) -> None:
        self.go = bench.root / "go"
        self.at_work = bench.root / "at-work"
        tools = bench.root / "tools"
        tools.mkdir()
        (tools / "mksquashfs").write_text(
            "#!/bin/sh\n"
            f"touch {self.at_work}\n"
            f"while [ ! -e {self.go} ]; do sleep 0.01; done\n"
            'exec /usr/bin/mksquashfs "$@"\n'
        )
        (tools / "mksquashfs").chmod(0o755)
        environ = bench.environ(PATH=f"{tools}:/usr/sbin:/usr/bin:/sbin:/bin")
        self.process = subprocess.Popen(
            [VENV / "bin" / "stager", "pack", environment.prefix, "--name", "it"],
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        workbench.until("the pack is at work", self.at_work.exists)

    def finish(self) -> tuple[int, str]:
        self.go.touch()
        _, said = self.process.communicate(timeout=workbench.LIMIT)
        return self.process.returncode, said


@pytest.fixture
def large(environment: Environment) -> Environment:
    """More than what fits into the pipe and the buffers before it, so that a pack is paused."""
    share = environment.prefix / "share"
    share.mkdir()
    for number in range(40):
        (share / f"file-{number:02}").write_bytes(os.urandom(1 << 20))
    return environment


CHANGES = {
    "content": lambda path: path.write_bytes(os.urandom(1 << 20)),
    "size": lambda path: os.truncate(path, 3 << 20),
    "replaced": lambda path: os.replace(_copy(path), path),
    "removed": lambda path: path.unlink(),
    "added": lambda path: (path.parent / "new").write_text("new"),
}


def _copy(path: Path) -> Path:
    copy = path.parent.parent / "copy"
    copy.write_bytes(path.read_bytes())
    os.utime(copy, ns=(0, path.stat().st_mtime_ns))
    return copy


@pytest.mark.parametrize("change", CHANGES)
def test_change_while_packing(bench: Bench, large: Environment, change: str) -> None:
    """It fails, and names the file or the directory; what was published before stays."""
    paused = Paused(bench, large)
    last = large.prefix / "share" / "file-39"
    CHANGES[change](last)
    status, said = paused.finish()
    assert status == 12, said
    named = last.parent if change == "added" else last
    assert f"{named} changed while it was being packed" in said
    assert "hint: " in said and "Traceback" not in said
    assert images(bench) == {} and bench.unfinished() == []
    bench.expect(10, "stage", "it")


def test_writer_beside_a_pack(bench: Bench, large: Environment) -> None:
    """An installer at work in another thread: whatever is published is whole."""
    stop = threading.Event()
    share = large.prefix / "share"

    def install() -> None:
        number = 0
        while not stop.is_set():
            (share / f"file-{number % 40:02}").write_bytes(os.urandom(1 << 20))
            number += 1

    writer = threading.Thread(target=install)
    writer.start()
    try:
        said = bench.expect(12, "pack", large.prefix)
    finally:
        stop.set()
        writer.join()
    assert "changed while it was being packed" in said
    assert f"{share}/file-" in said
    assert bench.unfinished() == []
    bench.pack(large)


@pytest.mark.parametrize("way", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_pack_that_is_ended(bench: Bench, large: Environment, way: signal.Signals) -> None:
    """Nothing is published, and the next pack clears away what a killed one has left."""
    paused = Paused(bench, large)
    paused.process.send_signal(way)
    status, said = paused.finish()
    assert status in (130, 143, -way), said
    assert "Traceback" not in said
    assert list(bench.repository.glob("refs/*")) == []
    bench.pack(large)
    assert bench.unfinished() == []
    assert bench.stage().eval("sys.prefix").startswith(str(bench.store))


def test_two_packs_at_once(bench: Bench, venv_uv: Environment) -> None:
    commands = [
        subprocess.Popen(
            [VENV / "bin" / "stager", "pack", venv_uv.prefix, "--name", "it", "--json"],
            env=bench.environ(),
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    said = [json.loads(command.communicate(timeout=workbench.LIMIT)[0]) for command in commands]
    assert [command.returncode for command in commands] == [0] * 4
    assert len({one["prefix"] for one in said}) == 1
    assert bench.unfinished() == []
    assert bench.stage().eval("requests.__name__", "requests") == "requests"


# Changes after packing


@pytest.fixture
def stale(bench: Bench, environment: Environment) -> Iterator[Environment]:
    """Packed, then a module was installed into it."""
    (environment.site_packages / "first.py").write_text("")
    bench.pack(environment, name="it")
    (environment.site_packages / "second.py").write_text("")
    yield environment


def has_second(prefix: Path) -> bool:
    return any(path.name == "second.py" for path in prefix.rglob("*.py"))


def test_stale_environment_is_packed_again(bench: Bench, stale: Environment) -> None:
    staged = bench.stage(hide=[stale.prefix])
    assert staged.eval("second.__name__", "second") == "second"


def test_only_one_packs_what_all_need(bench: Bench, stale: Environment) -> None:
    """The nodes of a job and the jobs of an array begin at the same time."""
    stages = [
        subprocess.Popen(
            [VENV / "bin" / "stager", "stage", "it"],
            env=bench.environ(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    said = [stage.communicate(timeout=workbench.LIMIT) for stage in stages]
    assert [stage.returncode for stage in stages] == [0] * 4
    assert len({out for out, _ in said}) == 1
    assert sum("packing `it` again" in err for _, err in said) == 1


def test_stale_environment_is_not_looked_at(bench: Bench, stale: Environment) -> None:
    argv = [VENV / "bin" / "stager", "stage", "it", "--on-stale", "ignore", "--how=extract"]
    asked = strace_files(argv, env=bench.environ())
    assert not [path for path in asked if path.startswith(str(stale.prefix))]
    (staged,) = (bench.store / "envs").iterdir()
    assert not has_second(staged)


def test_stale_environment_is_warned_of(bench: Bench, stale: Environment) -> None:
    done = bench.stager("stage", "it", "--on-stale", "warn")
    assert not has_second(Path(done.stdout.strip()))
    assert "warning: `it` changed since it was packed" in done.stderr
    assert str(stale.site_packages) in done.stderr


def test_stale_environment_falls_back(bench: Bench, stale: Environment) -> None:
    assert "changed since it was packed" in bench.expect(1, "stage", "it", "--on-stale", "fallback")
    command = [VENV / "bin" / "stage-run", "--env", "it", "--on-stale", "fallback"]
    done = run(
        [*command, "python", "-c", "import second, sys; print(sys.prefix)"], env=bench.environ()
    )
    assert done.stdout == f"{stale.prefix}\n"
    assert "running the original environment" in done.stderr


STALE = {
    "upgraded": lambda env: _touch(env.site_packages / "thing-2.dist-info"),
    "removed": lambda env: (env.site_packages / "first.py").unlink(),
    "script": lambda env: _touch(env.bin / "new-script"),
    "configuration": lambda env: os.utime(env.prefix / "pyvenv.cfg", (1, 1)),
    "line": lambda env: (env.site_packages / "a.pth").write_text("x\n"),
}


def _touch(path: Path) -> None:
    path.mkdir() if path.suffix else path.touch()


@pytest.mark.parametrize("change", STALE)
def test_what_makes_it_stale(bench: Bench, environment: Environment, change: str) -> None:
    (environment.site_packages / "first.py").write_text("")
    first = bench.pack(environment)
    assert "warning" not in bench.stager("stage", "it", "--on-stale", "warn").stderr
    STALE[change](environment)
    assert "changed since" in bench.stager("stage", "it", "--on-stale", "warn").stderr
    assert bench.stage().prefix != Path(first["prefix"])


def test_edited_in_place(bench: Bench, environment: Environment) -> None:
    """A handful of stats cannot see into every file; the next pack sees it."""
    module = environment.site_packages / "first.py"
    module.write_text("WORD = 'old'\n")
    bench.pack(environment)
    module.write_text("WORD = 'newer'\n")
    assert bench.stage().eval("first.WORD", "first") == "old"
    bench.pack(environment)
    assert bench.stage().eval("first.WORD", "first") == "newer"


def test_what_does_not_make_it_stale(bench: Bench, environment: Environment) -> None:
    """Running it compiles modules, and reading it changes times of access."""
    (environment.site_packages / "first.py").write_text("")
    bench.pack(environment)
    run(
        [environment.python, "-c", "import first"],
        env=environments.clean_environ(PYTHONDONTWRITEBYTECODE=None),
    )
    assert list(environment.site_packages.glob("__pycache__/first.*"))
    done = bench.stager("stage", "it", "--on-stale", "warn")
    assert "changed" not in done.stderr


def test_editable_source_that_changed(bench: Bench, environment: Environment) -> None:
    source = bench.root / "src"
    (source / "pkg" / "deep").mkdir(parents=True)
    (source / "pkg" / "__init__.py").write_text("")
    (source / "pkg" / "deep" / "mod.py").write_text("WORD = 'old'\n")
    (environment.site_packages / "pkg.pth").write_text(f"{source}\n")
    bench.pack(environment)
    (source / "pkg" / "deep" / "mod.py").write_text("WORD = 'newer'\n")
    staged = bench.stage(hide=[environment.prefix, source])
    assert staged.eval("pkg.deep.mod.WORD", "pkg.deep.mod") == "newer"


def test_a_copy_of_a_staged_environment_gets_more_sources(
    bench: Bench, environment: Environment
) -> None:
    """It has copies of sources where a pack puts them: those that are new lie beside them."""
    source = bench.root / "src"
    source.mkdir()
    (source / "mod.py").write_text("WORD = 'old'\n")
    line = environment.site_packages.relative_to(environment.prefix) / "mod.pth"
    (environment.prefix / line).write_text(f"{source}\n")
    bench.pack(environment)
    copy = bench.root / "copy"
    shutil.copytree(bench.stage("--how", "extract").prefix, copy, symlinks=True)
    (source / "mod.py").write_text("WORD = 'newer'\n")
    (copy / line).write_text(f"{source}\n")
    bench.pack(copy, name="copy")
    staged = bench.stage(name="copy", hide=[copy, source])
    assert staged.eval("mod.WORD", "mod") == "newer"
    assert [
        one.read_text() for one in sorted(staged.prefix.glob(".stager/editable/*/src/mod.py"))
    ] == [
        "WORD = 'old'\n",
        "WORD = 'newer'\n",
    ]


def test_hidden_original_is_not_stale(bench: Bench, environment: Environment) -> None:
    """On a node that cannot see it, nothing can be packed again, and what is there is used."""
    bench.pack(environment)
    hidden = workbench.run_hidden
    done = hidden(
        [VENV / "bin" / "stager", "stage", "it", "--how", "extract"],
        hide=[environment.prefix],
        env=bench.environ(),
    )
    assert Path(done.stdout.strip()).is_dir()
    assert done.stderr == ""


def test_pinned_reference_is_what_was_packed(bench: Bench, stale: Environment) -> None:
    first = bench.json("inspect", "it")
    bench.stager("pack", stale.prefix, "--name", "it")
    assert bench.json("inspect", "it")["digest"] != first["digest"]
