"""Staged in another store than it was packed for: unpacked, and rewritten once more."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import environments
import workbench
from environments import BASE_PYTHON, Environment, run, strace_files
from workbench import Bench, Staged


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> tuple[Environment, Path]:
    """Scripts, editables, constants, data and a base of its own; and the source of the editable."""
    root = tmp_path_factory.mktemp("rich")
    base = environments.make_base(root / "base")
    environment = environments.make_venv(root / "env", python=base.bin / "python3")
    environments.pip_install(environment, requirements=["six"])
    site, prefix = environment.site_packages, environment.prefix
    source = root / "source"
    source.mkdir()
    (source / "edited.py").write_text("WORD = __file__\n")
    (site / "edited.pth").write_text(f"{source}\n")
    (site / "where.py").write_text(f"PREFIX = {str(prefix)!r}\n")
    (site / "inside.pth").write_text(f"{prefix}/lib/inside\n")
    (prefix / "lib" / "inside").mkdir()
    (prefix / "lib" / "inside" / "deeper.py").write_text("WORD = __file__\n")
    (prefix / "lib" / "inside" / "linked.py").symlink_to(prefix / "lib" / "inside" / "deeper.py")
    (prefix / "share" / "long.txt").write_text(f"{prefix}/share\n" * 100_000)  # > 4 MiB
    script = environment.bin / "trampoline"
    script.write_text(
        f"#!/bin/sh\n'''exec' \"{environment.python}\" \"$0\" \"$@\"\n' '''\n"
        "import sys; print(sys.prefix)\n"
    )
    script.chmod(0o555)
    run([environment.python, "-m", "compileall", "-q", prefix / "lib"])
    return environment, source


@pytest.fixture(
    scope="module",
    params=[("squashfs", "short"), ("squashfs", "of equal length"), ("tar.zst", "far longer")],
    ids=" ".join,
)
def moved(
    request: pytest.FixtureRequest,
    rich: tuple[Environment, Path],
    new_directory: Callable[[], Path],
) -> Iterator[Staged]:
    format_, length = request.param
    environment, source = rich
    bench = Bench(new_directory())
    packed_for = {
        "short": "/tmp/s",
        "of equal length": f"{bench.store.parent}/STORE",
        "far longer": "/local/scratch/with/a/path/of/some/length",
    }[length]
    bench.pack(environment, "--format", format_, "--store", packed_for)
    staged = bench.stage(hide=[environment.prefix, environment.base_prefix, source])
    assert staged.how == "extracted"
    assert not Path(packed_for).exists()
    yield staged
    bench.close()


def test_everything_is_rewritten(moved: Staged, rich: tuple[Environment, Path]) -> None:
    environment, source = rich
    destinations = [layer["destination"] for layer in moved.manifest["layers"]]
    old = [environment.prefix, environment.base_prefix, source, *destinations]
    assert workbench.traces(moved, old) == {}
    assert workbench.links_out(moved) == {}
    said = moved.run(moved.bin / "trampoline").stdout
    assert said == moved.run(moved.bin / "sample-console").stdout.removeprefix("hello ")
    assert said == f"{moved.prefix}\n"
    assert moved.eval("where.PREFIX", "where") == str(moved.prefix)
    assert moved.eval("sys.base_prefix") == str(moved.trees[0])
    for module in ("edited", "deeper", "linked"):
        file = moved.eval(f"{module}.__file__", module)
        assert file.startswith(f"{moved.prefix}/")
        code = f"marshal.loads(open({module}.__cached__, 'rb').read()[16:]).co_filename"
        assert moved.eval(code, f"marshal, {module}") == file
    text = (moved.prefix / "share" / "long.txt").read_text()
    assert text == f"{moved.prefix}/share\n" * 100_000


def test_it_is_as_good_as_packed_for_it(
    bench: Bench, moved: Staged, rich: tuple[Environment, Path]
) -> None:
    """Rewriting twice gives the same bytes as rewriting once, for a store of equal length."""
    bench.pack(rich[0])
    direct = bench.stage("--how", "extract")
    assert len(str(direct.prefix)) == len(str(moved.prefix))
    assert [tree.name for tree in direct.trees] != [tree.name for tree in moved.trees]
    for once, twice in zip(_contents(direct), _contents(moved)):
        assert once.keys() == twice.keys()
        different = {path for path in once if once[path] != twice[path]}
        # The hash of a rewritten file is over the path of the tree, which is another.
        assert {path for path in different if not path.endswith("/RECORD")} == set()


def _contents(staged: Staged) -> list[dict[str, tuple[object, ...]]]:
    """For each tree, what is in it: the paths of the trees, of equal length, are taken out."""
    found = []
    for tree in staged.trees:
        content: dict[str, tuple[object, ...]] = {}
        for path in sorted(tree.rglob("*")):
            info = path.lstat()
            if path.is_symlink():
                kind: tuple[object, ...] = (_unnamed(os.fsencode(path.readlink()), staged),)
            elif path.is_file():
                data = _unnamed(path.read_bytes(), staged)
                if path.suffix == ".pyc":
                    data = data[:8] + data[16:]  # not the hash of its source, which names the tree
                kind = (info.st_mode, int(info.st_mtime), data)
            else:
                kind = (info.st_mode,)
            content[str(path.relative_to(tree))] = kind
        found.append(content)
    return found


def _unnamed(data: bytes, staged: Staged) -> bytes:
    for tree in staged.trees:
        data = data.replace(tree.name.encode(), b"TREE")
    return data.replace(os.fsencode(staged.bench.store), b"STORE")


def test_modules_and_records(moved: Staged) -> None:
    modules = ("where", "edited", "deeper", "linked", "six", "stager_sample")
    assert workbench.modules_from_source(moved, *modules) == []
    assert workbench.broken_records(moved.site_packages) == []
    said = moved.bench.json("verify", "it")
    assert (said["origin"], said["outside"], said["failed"]) == ([], [], {})


def test_the_other_store_is_not_looked_for(moved: Staged) -> None:
    asked = strace_files([moved.python, "-c", "import edited, where, six, ssl"])
    destinations = tuple(f"{layer['destination']}/" for layer in moved.manifest["layers"])
    assert [path for path in asked if f"{path}/".startswith(destinations)] == []


def test_staged_again_it_is_a_hit(moved: Staged) -> None:
    again = moved.bench.stage()
    assert (again.how, again.prefix) == ("hit", moved.prefix)


def test_mounting_is_refused(bench: Bench, rich: tuple[Environment, Path]) -> None:
    bench.pack(rich[0], "--store", "/tmp/s")
    said = bench.expect(15, "stage", "it", "--how", "mount")
    assert "packed for another store" in said and "--how extract" in said
    assert bench.unfinished() == []


def test_options_of_the_interpreter_survive(bench: Bench) -> None:
    environment = environments.make_venv(bench.root / "origin" / "env")
    script = environment.bin / "isolated"
    script.write_text(f"#!{environment.python} -I\nimport sys; print(sys.flags.isolated)\n")
    script.chmod(0o755)
    bench.pack(environment, "--store", "/tmp/s")
    staged = bench.stage(hide=[environment.prefix])
    starter = "import os, sys; os.execv(sys.argv[1], sys.argv[1:])"
    assert staged.run(BASE_PYTHON, "-I", "-c", starter, staged.bin / "isolated").stdout == "1\n"
