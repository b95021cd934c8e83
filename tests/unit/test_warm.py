"""A stage that finds nothing changed: what it imports and asks for, and what it must not overlook.

Nothing here is timed. What a start costs is what it imports and the calls it makes, and those can
be counted; ``make bench-starts`` says what that comes to.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import stager
import tiny
from environments import VENV, clean_environ, strace_files
from stager import warm
from stager.environments import Request
from stager.packing import pack
from stager.staging.store import Store

pytestmark = pytest.mark.unit

STAGER = VENV / "bin" / "stager"
PYTHON = VENV / "bin" / "python"


@dataclass
class Machine:
    """A user's environment, published as ``tiny``, on a machine that has staged it."""

    root: Path
    environ: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.prefix = self.root / "environment"
        tiny.environment(self.prefix)
        self.pack()
        self.environ = {
            **clean_environ(),
            "STAGER_STORE": f"{self.root}/store",
            "STAGER_REPOSITORY": f"{self.root}/repository",
            "STAGER_STAGE_HOW": "extract",
            "XDG_CONFIG_HOME": f"{self.root}/config",
            "PYTHONPROFILEIMPORTTIME": "1",
        }
        self.tree = self.stage()[0]

    def pack(self, repository: str = "repository") -> None:
        config = tiny.configured(self.root, repository=f"{self.root}/{repository}")
        pack.pack(Request((str(self.prefix),)), config, name="tiny")

    @property
    def node(self) -> Store:
        return Store(f"{self.root}/store")

    @property
    def layer(self) -> str:
        return os.path.basename(self.tree)

    @property
    def note(self) -> Path:
        return self.root / "store" / "warm" / "tiny"

    def run(self, *options: str, **changes: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [STAGER, "stage", *options],
            env={**self.environ, **changes},
            cwd="/",
            text=True,
            capture_output=True,
            check=False,
        )

    def stage(self, *options: str, **changes: str) -> tuple[str, bool]:
        """Stage; returns the prefix, and whether that was all there was to do."""
        done = self.run(*(options or ("tiny",)), **changes)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip(), "argparse" not in imported(done.stderr)


def imported(stderr: str) -> set[str]:
    """The modules that Python says it has imported."""
    lines = [line for line in stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip() for line in lines} - {"imported package"}


@pytest.fixture
def machine() -> Iterator[Machine]:
    root = Path(tempfile.mkdtemp())  # short: the path of a store has a limit
    yield Machine(root)
    shutil.rmtree(root)


# What it costs


def test_a_hit_imports_next_to_nothing(machine: Machine) -> None:
    nothing = subprocess.run(
        [PYTHON, "-c", "import os, sys"],
        env=machine.environ,
        capture_output=True,
        text=True,
        check=True,
    )
    done = machine.run("tiny")
    assert done.stdout == f"{machine.tree}\n"
    # Whoever adds to these adds to every start on every node.
    assert imported(done.stderr) - imported(nothing.stderr) == {
        "__future__", "stager", "stager.__main__", "stager.warm"
    }  # fmt: skip


def test_an_epilog_loads_nothing_that_stages() -> None:
    code = "import sys, stager.hooks.slurm; print(*sys.modules)"
    done = subprocess.run([PYTHON, "-I", "-c", code], capture_output=True, text=True, check=True)
    ours = {name for name in done.stdout.split() if name.startswith("stager.")}
    assert "stager.hooks.worker" in ours
    assert not ours & {
        "stager.hooks.forjob",
        "stager.hooks.sharing",
        "stager.repository",
        "stager.staging.trees",
    }


def test_a_prolog_imports_what_it_needs_and_no_more() -> None:
    """Each module that is named here costs every job on every node 1 to 15 ms."""
    code = "import os, sys; {}import stager.hooks.slurm, stager.hooks.forjob, stager.lookup"
    found = []
    for before in ("sys.exit(); ", ""):
        argv = [PYTHON, "-I", "-X", "importtime", "-c", code.format(before)]
        done = subprocess.run(argv, capture_output=True, text=True, check=True)
        found.append(imported(done.stderr))
    nothing, all_of_them = found
    assert {"stager.hooks.worker", "stager.freshness", "json"} <= all_of_them
    assert not (all_of_them - nothing) & {
        "argparse", "dataclasses", "difflib", "hashlib", "inspect", "platform", "random", "shutil",
        "subprocess", "tempfile", "threading", "yaml", "zstandard",
    }  # fmt: skip


def test_what_every_node_does_loads_neither_openssl_nor_compressors() -> None:
    code = """
import sys
from stager import manifest
from stager.formats import squashfs
squashfs.why_not_mount()
print(manifest.digest(b"x"), *sys.modules)
"""
    done = subprocess.run([PYTHON, "-I", "-c", code], capture_output=True, text=True, check=True)
    digest, *modules = done.stdout.split()
    assert digest == hashlib.sha256(b"x").hexdigest()
    assert "stager.formats.squashfs" in modules
    assert not {"hashlib", "_hashlib", "shutil", "lzma"} & set(modules)


@pytest.mark.parametrize("words", [["--help"], ["stage", "--help"], ["--version"]], ids=" ".join)
def test_help_imports_no_verb(words: list[str]) -> None:
    environ = {**clean_environ(), "PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run([STAGER, *words], env=environ, capture_output=True, text=True, check=True)
    found = imported(done.stderr)
    ours = {"stager", "stager.__main__", "stager.cli", "stager.cli.arguments", "stager.errors"}
    assert {one for one in found if one.split(".")[0] == "stager"} == ours
    assert not found & {"dataclasses", "inspect", "json", "subprocess", "yaml", "zstandard"}


def test_a_hit_asks_the_repository_once_and_of_the_original_what_is_watched(
    machine: Machine,
) -> None:
    asked = strace_files([STAGER, "stage", "tiny"], env=machine.environ)
    of = [path for path in asked if path.startswith(f"{machine.root}/repository")]
    assert of == [f"{machine.root}/repository/refs/tiny"]
    (manifest,) = (machine.root / "repository" / "manifests").iterdir()
    watched = {one["path"] for one in json.loads(manifest.read_text())["watches"]}
    of = [path for path in asked if path.startswith(str(machine.prefix))]
    assert sorted(of) == sorted(path for path in watched if path.startswith(str(machine.prefix)))


def test_a_hit_makes_few_system_calls(machine: Machine, tmp_path: Path) -> None:
    script = tmp_path / "nothing"
    script.write_text(f"#!{PYTHON}\nimport os, sys\n")
    script.chmod(0o755)

    def calls(*argv: object) -> int:
        trace = tmp_path / "trace"
        subprocess.run(
            ["strace", "-f", "-qqq", "-o", trace, *map(str, argv)],
            env=machine.environ,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=True,
        )
        return len(trace.read_text().splitlines())

    # What the imports of four modules and the comparison make, and no walk through /proc: 125.
    more = calls(STAGER, "stage", "tiny") - calls(script)
    print(f"{more} system calls more than an empty script")
    assert more < 200


# What it answers


def test_a_hit_is_claimed_as_any_stage_is(machine: Machine) -> None:
    holder = warm.holder_of(os.getpid(), warm.boot_id())
    assert machine.node.leases(machine.layer) == (holder,)
    machine.node.release(holder)
    os.utime(machine.root / "store" / "leases" / machine.layer, (1, 1))
    assert machine.stage() == (machine.tree, True)
    assert machine.node.leases(machine.layer) == (holder,)
    (held,) = machine.node.held()
    assert held.used > 1  # a collector sees that it is used


def test_a_job_claims_for_itself(machine: Machine) -> None:
    job = {"SLURM_JOB_ID": "71", "SLURM_STEP_ID": "0"}
    assert [machine.stage(**job)[1] for _ in range(2)] == [False, True]
    assert machine.stage(**{**job, "SLURM_STEP_ID": "1"})[1] is False
    assert machine.stage() == (machine.tree, True)
    assert f"slurm-71-{warm.boot_id()[:8]}" in machine.node.leases(machine.layer)


def test_a_script_that_reads_nothing_is_told_nothing_else(machine: Machine) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    done = subprocess.run(
        [STAGER, "stage", "tiny"],
        env={**machine.environ, "PYTHONPROFILEIMPORTTIME": ""},
        stdout=full,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(full)
    assert done.returncode == 13
    assert done.stderr.startswith("stager: error: ")


def again(machine: Machine) -> None:
    """Pack a changed environment; the name stands for another manifest."""
    (machine.prefix / tiny.SITE / "more.py").touch()
    machine.pack()


def changed(machine: Machine) -> None:
    """Install something into the original."""
    (machine.prefix / tiny.SITE / "more.py").touch()


def configured(machine: Machine) -> None:
    (machine.root / "config" / "stager").mkdir(parents=True)
    (machine.root / "config" / "stager" / "config.yaml").write_text("collect: {min_free: 1G}\n")


def evicted(machine: Machine) -> None:
    machine.node.forget(machine.layer)


def emptied(machine: Machine) -> None:
    shutil.rmtree(machine.tree)


def made_again(machine: Machine) -> None:
    stamp = machine.node.stamp(machine.layer)
    assert stamp is not None
    machine.node.set_ready(machine.layer, stamp)


def rebooted(machine: Machine) -> None:
    """The boot that is running is another than the one when the note was written."""
    note = machine.note.read_text()
    other = "00000000-0000-0000-0000-000000000000"
    assert warm.boot_id() in note
    machine.note.write_text(note.replace(warm.boot_id(), other))


def upgraded(machine: Machine) -> None:
    note = machine.note.read_text()
    assert note.count(stager.__version__) == 1
    machine.note.write_text(note.replace(stager.__version__, "99.0"))


def cut_short(machine: Machine) -> None:
    machine.note.write_bytes(machine.note.read_bytes()[: len(machine.note.read_bytes()) // 2])


def no_text(machine: Machine) -> None:
    machine.note.write_bytes(b"\0\n\xff" * 100)


def a_link(machine: Machine) -> None:
    machine.note.rename(machine.root / "elsewhere")
    machine.note.symlink_to(machine.root / "elsewhere")


def a_directory(machine: Machine) -> None:
    machine.note.unlink()
    (machine.note / "x").mkdir(parents=True)


CHANGES = (
    again, changed, configured, evicted, emptied, made_again, rebooted, upgraded,
    cut_short, no_text, a_link, a_directory,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda one: one.__name__)
def test_whatever_has_changed_is_looked_into(
    machine: Machine, change: Callable[[Machine], None]
) -> None:
    change(machine)
    prefix, noted = machine.stage()
    assert not noted
    assert (prefix == machine.tree) is (change not in (again, changed))
    assert (Path(prefix) / "bin" / "tiny").exists()
    if change is not a_directory:
        assert machine.stage() == (prefix, True)


@pytest.mark.parametrize(
    "changes",
    [
        {"STAGER_STAGE_HOW": "auto"},
        {"STAGER_NEW": "1"},
        {"HOME": "/nowhere"},
        {"PBS_JOBID": "12.server"},
    ],
    ids=lambda one: next(iter(one)),
)
def test_other_variables_may_mean_another_answer(
    machine: Machine, changes: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**machine.environ, **changes}.items():
        monkeypatch.setenv(name, value)
    assert warm.hit("tiny") == ""
    monkeypatch.undo()
    for name, value in machine.environ.items():
        monkeypatch.setenv(name, value)
    assert warm.hit("tiny") == machine.tree


def test_no_note_where_a_directory_has_to_be_looked_into(machine: Machine) -> None:
    """Its time is another one, its modules are the same: an edit of one would not be seen by it."""
    library = machine.prefix / tiny.SITE
    machine.note.unlink()
    os.utime(library, (1, 1))
    assert [machine.stage()[1] for _ in range(2)] == [False, False]
    assert not machine.note.exists()


def test_options_are_not_for_a_note(machine: Machine) -> None:
    machine.note.unlink()
    for options in (("--how", "extract"), ("--on-stale", "warn")):
        assert machine.stage("tiny", *options)[1] is False
    assert machine.stage("tiny", f"--repository={machine.root}/repository")[1] is False
    assert not machine.note.exists()
    assert machine.stage("tiny", "--json")[1] is False
    for wish in (str(machine.prefix), "tiny+tiny"):
        assert [machine.stage(wish)[1] for _ in range(2)] == [False, False]


def test_a_name_that_was_taken_back_is_not_found(machine: Machine) -> None:
    shutil.rmtree(machine.root / "repository" / "refs")
    done = machine.run("tiny")
    assert done.returncode == 10
    assert "is not published" in done.stderr


def test_a_name_in_an_earlier_repository_wins(machine: Machine) -> None:
    where = {
        "STAGER_REPOSITORY": f"{machine.root}/own",
        "STAGER_REPOSITORIES": f"{machine.root}/repository",
    }
    assert [machine.stage(**where)[1] for _ in range(2)] == [False, True]
    changed(machine)
    machine.pack("own")
    prefix, noted = machine.stage(**where)
    assert prefix != machine.tree
    assert not noted


def test_a_store_that_others_may_enter_is_refused(machine: Machine) -> None:
    (machine.root / "store").chmod(0o755)
    done = machine.run("tiny")
    assert done.returncode == 14
    assert "is open to others" in done.stderr


def test_sources_are_walked_each_time(machine: Machine) -> None:
    source = machine.root / "src" / "mine"
    source.mkdir(parents=True)
    (source / "__init__.py").touch()
    (machine.prefix / tiny.SITE / "mine.pth").write_text(f"{machine.root}/src\n")
    machine.pack()
    prefix = machine.stage()[0]
    (source / "__init__.py").write_text("NEW = 1\n")
    assert machine.stage()[0] != prefix


def test_nothing_is_claimed_where_it_comes_to_nothing(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in machine.environ.items():
        monkeypatch.setenv(name, value)
    machine.node.release(warm.holder_of(os.getpid(), warm.boot_id()))
    emptied(machine)
    assert warm.hit("tiny") == ""
    assert machine.node.leases(machine.layer) == ()


def test_old_notes_go(machine: Machine) -> None:
    old = machine.note.parent / "old"
    old.touch()
    os.utime(old, (1, 1))
    machine.note.unlink()
    machine.stage()
    assert [one.name for one in machine.note.parent.iterdir()] == ["tiny"]
