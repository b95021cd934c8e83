"""The command line: what a user reads, what a script gets, and that neither is ever a traceback."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import tiny
from environments import VENV, clean_environ, strace_files
from stager import cli, estimate, fsutil, lookup, timings
from stager import config as configuration
from stager.cli import doctor
from stager.ref import Ref
from stager.staging.store import Stamp, Store, boot_id

pytestmark = pytest.mark.unit

STAGER = VENV / "bin" / "stager"


@dataclass
class Result:
    """What a command printed, and its status."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, object]:
        value = json.loads(self.out)
        assert value["schema"] == 1
        return value  # type: ignore[no-any-return]

    @property
    def error(self) -> str:
        """The message of an error: one line, then perhaps a hint."""
        assert self.out == ""
        lines = [line for line in self.err.splitlines() if not line.startswith("stager: packing")]
        assert lines[0].startswith("stager: error: ")
        assert len(lines) == 1 or (len(lines) == 2 and lines[1].startswith("hint: "))
        assert "a bug" not in lines[0]
        return lines[0].removeprefix("stager: error: ")


@dataclass
class Machine:
    """A user on a machine: an environment, a repository and a store."""

    root: Path
    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]
    prefix: Path = field(init=False)

    def __post_init__(self) -> None:
        self.prefix = self.root / "environments" / "tiny"
        for name, value in self.variables.items():
            self.monkeypatch.setenv(name, value)
        self.monkeypatch.chdir(self.root)

    @property
    def variables(self) -> dict[str, str]:
        return {
            "STAGER_STORE": f"{self.root}/store",
            "STAGER_REPOSITORY": f"{self.root}/repository",
            "STAGER_LOCAL_PREFIXES": f"{tiny.BASE_PREFIX}:/usr",
            "STAGER_STAGE_HOW": "extract",
            "STAGER_PACK_THREADS": "1",
        }

    @property
    def environ(self) -> dict[str, str]:
        return clean_environ(**self.variables)

    def __call__(self, *argv: str) -> Result:
        """Run a command in this process."""
        self.capsys.readouterr()
        try:
            status = cli.main(argv)
        except SystemExit as error:
            assert isinstance(error.code, int)
            status = error.code
        return Result(status, *self.capsys.readouterr())

    def run(self, *argv: str, **options: object) -> subprocess.CompletedProcess[str]:
        """Run the installed program; tests say where its output goes."""
        command = [STAGER, *argv]
        return subprocess.run(
            command, env=self.environ, cwd=self.root, text=True, check=False, **options
        )  # type: ignore[call-overload,no-any-return]


@pytest.fixture
def bare(
    public_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Machine:
    """With nothing packed yet."""
    machine = Machine(public_path, monkeypatch, capsys)
    tiny.environment(machine.prefix)
    return machine


@pytest.fixture(scope="module")
def packed_once() -> Iterator[Path]:
    """A place where the environment is packed; a copy of it would name other paths."""
    root = Path(tempfile.mkdtemp())
    prefix = tiny.environment(root / "environments" / "tiny")
    tiny.packed(prefix, tiny.configured(root))
    yield root
    shutil.rmtree(root)


@pytest.fixture
def machine(
    packed_once: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Machine]:
    """With an environment that is published as ``tiny``; the store is empty."""
    yield Machine(packed_once, monkeypatch, capsys)
    shutil.rmtree(packed_once / "store", ignore_errors=True)


# What it usually does


def test_packing_listing_and_removing(bare: Machine) -> None:
    packed = bare("pack", "environments/tiny")
    assert (packed.status, packed.out) == (0, "")
    assert "published `tiny`" in packed.err
    listed = bare("list")
    assert listed.err == ""
    heading, row = listed.out.splitlines()
    assert heading.split() == ["NAME", "KIND", "PYTHON", "IMAGES", "PACKED", "ORIGIN"]
    assert row.split()[0] == "tiny"
    assert row.endswith(str(bare.prefix))
    assert "unchanged since the last pack" in bare("pack", "environments/tiny").err
    removed = bare("remove", "tiny")
    assert (removed.status, removed.out) == (0, "")
    assert bare("list").out == ""


def test_a_name_that_is_taken_is_told_before_anything_is_packed(bare: Machine) -> None:
    bare("pack", "environments/tiny")
    other = bare.root / "others" / "tiny"
    tiny.environment(other)
    images = os.listdir(bare.root / "repository" / "images")
    for argv in (["pack", str(other)], ["pack", "--check", str(other)]):
        found = bare(*argv)
        assert found.status == 1
        assert "the name `tiny` is already used for" in found.err and "--name" in found.err
    assert os.listdir(bare.root / "repository" / "images") == images
    assert bare("pack", "--check", str(other), "--name", "another").status == 0


def test_packing_what_is_active_or_here(bare: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    (bare.root / ".venv").symlink_to(bare.prefix)
    assert bare("pack", "--check").status == 0
    monkeypatch.setenv("VIRTUAL_ENV", str(bare.prefix))
    assert "published `tiny`" in bare("pack").err


def test_a_check_writes_nothing(bare: Machine) -> None:
    found = bare("pack", "--check", "environments/tiny")
    assert (found.status, found.out) == (0, "")
    assert "can be packed" in found.err
    assert not (bare.root / "repository").exists()


def test_an_environment_without_its_python_is_refused(bare: Machine) -> None:
    refused = bare("pack", "--exclude", "*", "environments/tiny")
    assert refused.status == 1
    assert "bin/python: the environment's Python is left out: see --exclude" in refused.err
    assert bare("list").out == ""


def test_a_check_of_what_would_be_refused_fails(bare: Machine) -> None:
    (bare.root / "src").mkdir()
    (bare.root / "src" / "mod.py").touch()
    (bare.prefix / tiny.SITE / "e.pth").write_text(f"{bare.root}/src\n")
    found = bare("pack", "--check", "--editables", "refuse", "environments/tiny")
    assert found.status == 1
    assert "would be refused" in found.err
    refused = bare("pack", "--editables", "refuse", "environments/tiny", "--json")
    assert refused.status == 1
    assert "e.pth" in refused.err
    assert not (bare.root / "repository").exists()
    assert bare("pack", "environments/tiny").status == 0  # a copy is included


def test_staging_prints_the_prefix_and_nothing_else(machine: Machine) -> None:
    for _ in range(2):
        found = machine("stage", "tiny")
        assert (found.status, found.err) == (0, "")
        prefix = found.out.removesuffix("\n")
        assert os.path.dirname(prefix) == f"{machine.root}/store/envs"
        assert os.path.exists(f"{prefix}/bin/tiny")


def test_activating_prints_code_for_a_shell(machine: Machine) -> None:
    prefix = machine("stage", "tiny").out.strip()
    found = machine("activate", "tiny")
    assert (found.status, found.err) == (0, "")
    code = f"eval '{found.out}'; echo $VIRTUAL_ENV; echo $STAGER_ACTIVE; tiny"
    said = subprocess.run(
        ["sh", "-euc", code.replace("'" + found.out + "'", '"$CODE"')],
        env={**clean_environ(), "CODE": found.out}, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert said == f"{prefix}\ntiny\n{prefix}\n"
    variables = json.loads(machine("activate", "tiny", "--shell", "json").out)
    assert variables["VIRTUAL_ENV"] == prefix


@pytest.mark.parametrize(
    "arguments",
    [
        ["nope"],
        [],
        ["tiny", "--timeout", "abc"],
        ["tiny", "--store", "/with space"],
        ["tiny", "--how", "mount"],
        ["tiny", "--shell", "no-such-shell"],
        ["tiny", "--no-such-option"],
        [""],
    ],
)
def test_activation_that_fails_fails_in_the_shell_too(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    """``eval "$(stager activate X)"`` of nothing would succeed."""
    monkeypatch.setenv("STAGER_RUN_STRICT", "yes")
    monkeypatch.setenv("PATH", "/nonexistent")  # nothing to mount with
    found = machine("activate", *arguments)
    assert found.status != 0
    assert found.out == "false\n"
    assert found.err.startswith("stager: error: ")


def test_activating_under_a_wrong_configuration_activates_the_original(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAGER_PACK_LEVEL", "high")
    found = machine("activate", "tiny", "--shell", "json")
    assert json.loads(found.out)["VIRTUAL_ENV"] == str(machine.prefix)
    assert found.err.startswith("stager: activating the original environment: `pack.level` cannot")
    monkeypatch.setenv("STAGER_RUN_STRICT", "yes")
    assert machine("activate", "tiny").out == "false\n"


def test_a_staged_environment_is_found_again_by_what_it_is_called(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = json.loads(machine("activate", "./environments/tiny", "--shell", "json").out)
    assert variables["STAGER_ACTIVE"] == str(machine.prefix)  # good in every directory
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir("/")
    assert machine("stage").out.strip() == variables["VIRTUAL_ENV"]
    refused = machine("pack")
    assert refused.status == 2
    assert "staged copy" in refused.error
    assert machine("list").out.count("tiny") == 2  # the name and the origin: nothing new


def test_the_state_of_the_store(machine: Machine) -> None:
    prefix = machine("stage", "tiny").out.strip()
    shown = machine("status")
    assert shown.err == ""
    heading, row = shown.out.splitlines()[1:]
    assert heading.split()[:2] == ["NAME", "TREE"]
    assert row.split()[:2] == ["tiny", os.path.basename(prefix)]
    elsewhere = machine("status", "--repository", "/no/where").out.splitlines()[-1]
    assert elsewhere.split()[:2] == ["-", os.path.basename(prefix)]
    assert machine("collect", "--all").status == 0
    assert os.path.exists(prefix)  # this process claims it
    assert "released 1 tree" in machine("release").err
    assert "evicted 1 tree" in machine("collect", "--all").err
    assert not os.path.exists(prefix)


def test_the_state_of_a_store_that_is_not_there(machine: Machine) -> None:
    path = machine.root / "mistyped"
    assert f"there is no store {path}" in machine("status", "--store", str(path)).out
    found = machine("status", "--store", str(path), "--json").json
    assert (found["trees"], found["strangers"]) == ([], [])
    assert not path.exists()


@pytest.mark.parametrize("verb", ["collect", "release"])
def test_clearing_a_store_that_is_not_there_makes_none(machine: Machine, verb: str) -> None:
    path = machine.root / "mistyped"
    found = machine(verb, "--store", str(path))
    assert (found.status, found.out) == (0, "")
    assert found.err == f"stager: nothing is staged: there is no store {path}\n"
    assert not path.exists()
    if verb == "collect":
        told = machine(verb, "--store", str(path), "--json").json
        assert (told["trees"], told["strangers"]) == ([], [])
        assert not path.exists()


def test_what_is_claimed_is_told_where_it_is_not_evicted(machine: Machine) -> None:
    machine("stage", "tiny")
    found = machine("collect", "--all")
    assert found.err.startswith("stager: evicted 0 trees, ")
    assert found.err.endswith("; in use, kept: 1\n")


def test_collecting_keeps_to_the_given_bounds(machine: Machine) -> None:
    node = Store(f"{machine.root}/store")
    for name in ("a" * 16, "b" * 16):
        node.lease(name, "x")
        os.mkdir(node.tree(name))
        node.set_ready(name, Stamp("i", "extracted", boot_id(), 1 << 20))
        node.release("x")
    assert machine("collect", "--max-size", "1MiB").err.startswith("stager: evicted 1 tree,")
    assert machine("collect", "--max-size", "1MiB").err.startswith("stager: evicted 0 trees,")


def test_what_is_not_ours_is_told_and_left_alone(machine: Machine) -> None:
    """A store may be a private directory that has other uses, be it by mistake."""
    machine("stage", "tiny")
    machine("release")
    store = machine.root / "store"
    told = [".bashrc", "data", "envs/mine", "images/.hidden", "images/x.sqfs", "tmp/a\nb"]
    for name in told:
        (store / name).mkdir(mode=0o700)
    (store / ".bashrc").rmdir()
    (store / ".bashrc").write_text("keep me")
    ours = [store / f".stager-{os.getuid()}-abc", store / "ready" / f".{'a' * 16}.{'b' * 12}.new"]
    for path in ours:
        path.touch()
    for path in (store / ".bashrc", store / "envs" / "mine", *ours):
        os.utime(path, (1, 1))
    (store / "sessions").mkdir()
    line = f"not created by stager, kept: {', '.join(told[:5])} +1"
    assert machine("status").out.splitlines()[-1] == line
    assert machine("status", "--json").json["strangers"] == told
    collected = machine("collect", "--all")
    assert collected.err.splitlines()[-1] == line
    assert [path.exists() for path in ours] == [False, False]
    assert all((store / name).exists() for name in told)
    assert machine("status", "--json").json["trees"] == []


def test_what_could_not_be_removed_is_told(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = os.path.basename(machine("stage", "tiny").out.strip())
    machine("release")

    def fail(path: str) -> None:
        raise OSError(errno.EIO, "Input/output error", path)

    monkeypatch.setattr(fsutil, "remove_tree", fail)
    found = machine("collect", "--all")
    assert found.status == 1
    assert f"could not be removed: {tree}: [Errno 5] Input/output error" in found.err
    found = machine("collect", "--all", "--json")
    assert (found.status, json.loads(found.out)["trees"]) == (1, [])
    assert len(json.loads(found.out)["failed"]) == 1


def test_verification(machine: Machine) -> None:
    found = machine("verify", "tiny", "--import", "tiny")
    assert (found.status, found.out) == (0, "")
    assert "imported 1 module" in found.err
    assert " paths accessed, none of the original, traced with " in found.err
    for names in (
        ["--import", "tiny,no_such_module"],
        ["--import", "no_such_module", "--import", "tiny"],
    ):
        missing = machine("verify", "tiny", *names)
        assert missing.status == 1
        assert "no_such_module" in missing.err


# JSON: one object, with a schema, and nothing else on standard output


@pytest.mark.parametrize(
    ("argv", "keys"),
    [
        (["list"], {"environments"}),
        (["inspect", "tiny"], {"digest", "layers", "origin", "python", "findings"}),
        (["plan", "tiny"], {"ref", "nodes", "advice", "direct", "staged", "site", "layers"}),
        (["stage", "tiny"], {"prefix", "how", "layers", "ref", "holder", "seconds"}),
        (["collect"], {"trees", "freed", "leases"}),
        (["status"], {"store", "free", "trees"}),
        (
            ["verify", "tiny", "--import", "tiny"],
            {"prefix", "modules", "method", "origin", "failed"},
        ),
        (["doctor"], {"checks"}),
        (["config", "show"], {"values"}),
        (["pack", "--check", "environments/tiny"], {"environment", "kind", "findings"}),
        (["pack", "environments/tiny"], {"name", "ref", "prefix", "layers", "findings"}),
    ],
)
def test_json(machine: Machine, argv: list[str], keys: set[str]) -> None:
    found = machine(*argv, "--json")
    assert found.status == 0
    assert found.err == ""
    assert keys <= set(found.json)


def test_plan(bare: Machine) -> None:
    bare("pack", "environments/tiny")
    found = bare("plan", "tiny", "-N", "64")
    assert found.status == 0
    first, direct, staged, advice = found.out.splitlines()
    assert first == "tiny on 64 nodes, until all ranks have imported (estimated):"
    assert direct.split()[0] == "direct"
    assert staged.split()[0] == "staged"
    assert " 1,152 metadata operations" in staged
    assert advice.startswith(("either: ", "stage it: ", "run it directly: "))
    assert "names looked for here" in found.err
    bare("stage", "tiny")
    assert "staged on this node already" in bare("plan", "tiny").out
    shutil.rmtree(bare.prefix)
    assert "(assumed: the original is not here)" in bare("plan", "tiny").err


@pytest.mark.parametrize("nodes", ["0", "-1"])
def test_plan_for_no_nodes(machine: Machine, nodes: str) -> None:
    found = machine("plan", "tiny", "-N", nodes)
    assert (found.status, found.error) == (2, f"-N cannot be {nodes}")


def test_plan_for_more_nodes_than_there_are(machine: Machine) -> None:
    assert machine("plan", "tiny", "-N", "1000000").status == 0
    found = machine("plan", "tiny", "-N", "9" * 400)
    assert (found.status, found.error) == (2, "-N cannot be more than 1,000,000")


def test_plan_where_there_is_no_place_for_the_store(machine: Machine) -> None:
    """A login node has no local disk, and it is where one plans."""
    store = machine.root / "environments" / "tiny" / "pyvenv.cfg" / "store"
    found = machine("plan", "tiny", "--store", str(store))
    assert found.status == 0
    there = store.parent
    assert f"writes 953.7 MiB/s (assumed: cannot write into {there}: Not a directory" in found.err
    site = machine("plan", "tiny", "--store", str(store), "--json").json["site"]
    assert (site["write"], site["write_timed"]) == (estimate.WRITE, False)  # type: ignore[index]
    timed = machine("plan", "tiny", "--json").json["site"]
    assert timed["write_timed"] is True  # type: ignore[index]


def test_plan_makes_no_store(machine: Machine) -> None:
    store = machine.root / "mistyped" / "7"
    found = machine("plan", "tiny", "--store", str(store), "--json")
    assert found.json["site"]["write_timed"] is True  # type: ignore[index]
    assert sorted(os.listdir(machine.root)) == ["environments", "repository"]


def test_a_look_at_what_has_changed_makes_no_store(bare: Machine) -> None:
    """``stager push`` takes it, on a login node that may have no place for one."""
    bare("pack", "environments/tiny")
    shutil.copy(bare.prefix / "bin" / "tiny", bare.prefix / "bin" / "another")
    config = configuration.load(overrides={"stage.on_stale": "warn"})
    _, changes = lookup.fresh(Ref(name="tiny"), config)
    assert changes == [str(bare.prefix / "bin")]
    assert not (bare.root / "store").exists()


def test_plan_where_the_store_cannot_be_written(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(directory: str) -> float:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), directory)

    machine("stage", "tiny")
    monkeypatch.setattr(timings, "writing", refuse)
    found = machine("plan", "tiny")
    assert found.status == 0
    there = f"{machine.root}/store/tmp"
    assert f"(assumed: cannot write into {there}: Read-only file system" in found.err
    assert "staged on this node already" in found.out


@pytest.mark.parametrize("kind", ["truncated", "empty", "pipe"])
def test_plan_of_an_image_that_is_none(bare: Machine, kind: str) -> None:
    bare("pack", "environments/tiny")
    image = max((bare.root / "repository" / "images").iterdir(), key=lambda one: one.stat().st_size)
    size = image.stat().st_size
    if kind == "pipe":
        image.unlink()
        os.mkfifo(image)
    else:
        os.chmod(image, 0o600)
        os.truncate(image, size - 1 if kind == "truncated" else 0)
    found = bare("plan", "tiny")
    left = size - 1 if kind == "truncated" else 0
    assert found.status == 12
    assert found.error == f"the image {image} has {left} bytes instead of {size}"
    assert "hint: it is truncated or damaged" in found.err


def test_plan_of_a_repository_that_lost_an_image(bare: Machine) -> None:
    bare("pack", "environments/tiny")
    for image in (bare.root / "repository" / "images").iterdir():
        image.unlink()
    found = bare("plan", "tiny")
    assert found.status == 10
    assert found.error.endswith(" is missing")


def test_json_holds_what_the_text_says(machine: Machine) -> None:
    (environment,) = machine("list", "--json").json["environments"]  # type: ignore[misc]
    assert environment["origin"] == str(machine.prefix)
    manifest = machine("inspect", "tiny", "--json").json
    assert manifest["digest"] == environment["digest"]
    pinned = f"tiny@sha256:{manifest['digest']}"
    staged = machine("stage", pinned, "--json").json
    assert staged["ref"] == pinned
    (tree,) = machine("status", "--json").json["trees"]  # type: ignore[misc]
    assert tree["prefix"] == staged["prefix"]
    assert tree["leases"] == {staged["holder"]: True}
    values = machine("config", "show", "--json", "--store", "elsewhere").json["values"]
    assert values["store"] == {"value": f"{machine.root}/elsewhere", "source": "command line"}  # type: ignore[index]
    assert values["repository"]["source"] == "$STAGER_REPOSITORY"  # type: ignore[index]


# Where it is run


@pytest.mark.parametrize("width", [40, 79, 80, 99, 100])
def test_progress_is_one_line_on_a_narrow_terminal(width: int) -> None:
    code = (
        "from stager.cli.common import Bars\n"
        "bars = Bars()\n"
        "bars.start('base', 34348, 3_700_000_000)\n"
        "bars.advance(12345, 2_100_000_000)\n"
        "bars._bar.refresh()\n"
        "bars.finish()\n"
    )
    environ = {**clean_environ(), "TERM": "xterm", "COLUMNS": str(width), "PYTHONUTF8": "1"}
    ours, theirs = os.openpty()
    subprocess.run([VENV / "bin" / "python", "-c", code], env=environ, stderr=theirs, check=True)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # a terminal that nobody has open any more ends so
        while piece := os.read(ours, 1 << 16):
            shown += piece
    os.close(ours)
    assert b"packing base Python" in shown
    assert b"\xe2\x80\xa6" not in shown  # nothing is cut off
    assert b"\x1b[1A" not in shown.partition(b"packing base Python")[2].rpartition(b"\r")[0]


@pytest.mark.parametrize(
    ("argv", "status"),
    [
        (["stager", "pack", "environments/tiny"], 0),
        (["stager", "stage", "nope"], 10),
        (["stage-run", "--env", "nope", "true"], 125),
        (["stage-run", "--env", "tiny", "--store", "/proc/no", "--strict", "true"], 125),
        (["stage-run", "--env", "tiny", "--store", "/proc/no", "true"], 0),  # the original
    ],
)
def test_a_log_on_a_full_disk(machine: Machine, argv: list[str], status: int) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [VENV / "bin" / argv[0], *argv[1:]],
            env=machine.environ, cwd=machine.root, stderr=full, check=False,
        )  # fmt: skip
    assert done.returncode == status


@pytest.mark.parametrize("argv", [["list"], ["--help"], ["stage", "tiny"]])
def test_output_to_a_full_disk(machine: Machine, argv: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = machine.run(*argv, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 13
    first, hint = done.stderr.splitlines()
    assert first == "stager: error: cannot write to standard output: No space left on device"
    assert "hint: " in hint and "collect" not in hint


@pytest.mark.parametrize("how", ["pack", "list", "stage", "stage-run"])
def test_paths_are_the_same_in_every_locale(bare: Machine, how: str) -> None:
    """Where the locale is not UTF-8, an original with an umlaut in its path was never found."""
    prefix = tiny.environment(bare.root / "ümläut" / "env")
    argv = ["pack", "--name", "u", str(prefix)]
    assert bare.run(*argv, capture_output=True).returncode == 0
    environ = {**bare.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    probe = [STAGER.with_name("python"), "-c", "import sys; print(sys.getfilesystemencoding())"]
    said = subprocess.run(probe, env=environ, capture_output=True, check=True, text=True).stdout
    assert said != "utf-8\n"
    argv = {
        "pack": ["stager", *argv],
        "list": ["stager", "list"],
        "stage": ["stager", "stage", str(prefix)],
        "stage-run": ["stage-run", "--env", "u", "--strict", "env"],
    }[how]
    done = subprocess.run(
        [VENV / "bin" / argv[0], *argv[1:]],
        env=environ, check=False, capture_output=True, encoding="utf-8",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    if how == "pack":
        assert "unchanged since the last pack: env" in done.stderr
    elif how == "list":
        assert done.stdout.splitlines()[1].endswith(str(prefix))
    elif how == "stage-run":
        lines = done.stdout.splitlines()
        assert f"STAGER_ORIGIN={prefix}" in lines
        assert "PYTHONUTF8=0" in lines  # it is the user's own still


# Mistakes


ERRORS: list[tuple[list[str], int, str]] = [
    (["pack", "nowhere"], 10, "no environment at"),
    (["pack", "environments"], 10, "not a Python environment"),
    (["pack", "environments/tiny/pyvenv.cfg"], 10, "no environment at"),
    (["pack"], 2, "no environment was given"),
    (["pack", "--name", "../x", "environments/tiny"], 2, "'../x'"),
    (["pack", "--name", "", "environments/tiny"], 2, "''"),
    (["pack", "--name", "a/b", "environments/tiny"], 2, "'a/b'"),
    (["pack", "--level", "99", "environments/tiny"], 2, "pack.level"),
    (["pack", "--threads", "x", "environments/tiny"], 2, "pack.threads"),
    (["pack", "--format", "zip"], 2, "zip"),
    (["stage", "nope"], 10, "`nope` is not published"),
    (["stage", "/no/where"], 10, "`/no/where` is not published"),
    (["stage", ".."], 10, "not a Python environment"),
    (["stage", "a/b"], 2, "'a/b'"),
    (["stage", "a\nb"], 2, "control characters"),
    (["stage", "\ud800"], 2, ""),
    (["stage", "tiny@sha256:000000000000"], 10, "not published"),
    (["stage", "tiny@sha256:xyz"], 2, ""),
    (["stage"], 2, "no environment is named"),
    (["stage", "tiny", "--timeout", "soon"], 2, "'soon'"),
    (["stage", "tiny", "--store", "/with space"], 2, "/with space"),
    (["stage", "tiny", "--store", "/" + "x" * 100], 2, "xxx"),
    (["stage", "tiny", "--store", "/proc/x"], 1, "/proc/x"),
    (["stage", "tiny", "--store", "/"], 14, "the store / "),
    (["inspect", "nope"], 10, "nope"),
    (["inspect"], 2, "REF"),
    (["remove", "nope"], 10, "nope"),
    (["remove", "/no/where"], 10, "/no/where"),
    (["remove", ".."], 10, ""),
    (["verify", "nope"], 10, "nope"),
    (["release", "--holder", "../../x"], 2, "'../../x'"),
    (["collect", "--max-size", "-5"], 2, "'-5'"),
    (["config", "hide"], 2, "hide"),
    (["no-such-verb"], 2, "no-such-verb"),
    (["list", "--no-such-option"], 2, "--no-such-option"),
    ([], 2, "VERB"),
]  # fmt: skip


@pytest.mark.parametrize(("argv", "status", "message"), ERRORS)
def test_a_mistake_has_its_status_and_a_line_that_names_it(
    machine: Machine, argv: list[str], status: int, message: str
) -> None:
    found = machine(*argv)
    assert message in found.error
    assert found.status == status


@pytest.mark.parametrize(
    ("argv", "status", "name"),
    [
        (["pack", ""], 2, "ENV"),
        (["pack", "--repository", ""], 2, "--repository"),
        (["pack", "--user", "--python", ""], 2, "--python"),
        (["stage", ""], 2, "REF"),
        (["stage", "tiny", "--store="], 2, "--store"),
        (["activate", ""], 2, "REF"),
        (["run", "--env", "", "false"], 125, "--env"),
        (["collect", "--all", "-w", ""], 2, "-w/--nodes"),
    ],
)
def test_a_variable_that_is_not_set_stands_for_nothing_else(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, argv: list[str], status: int, name: str
) -> None:
    """``stager pack "$ENV"`` packed what was active, ``collect -w "$NODES"`` this node's store."""
    monkeypatch.setenv("VIRTUAL_ENV", str(machine.prefix))
    found = machine(*argv)
    assert found.status == status
    assert f"error: {name} is empty" in found.err


@pytest.mark.parametrize("argv", [["stag"], ["--help"]])
def test_verbs_that_only_others_start_are_in_no_list(machine: Machine, argv: list[str]) -> None:
    found = machine(*argv)
    assert "verify" in found.out + found.err
    assert not re.search(r"\b(keep|watch|receive)\b", found.out + found.err)


def test_choices_are_those_of_the_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    """The command line has copies, for reading the table of keys takes long."""
    for verb, options in {
        "stage": {"--how": "stage.how", "--on-stale": "stage.on_stale"},
        "pack": {
            "--format": "pack.format",
            "--editables": "pack.editables",
            "--links": "pack.links",
        },
    }.items():
        for option, key in options.items():
            with pytest.raises(SystemExit):
                cli.main([verb, option, "?"])
            (offered,) = re.findall(r"choose from (.*)\)", capsys.readouterr().err)
            for choice in re.findall(r"'(.*?)'", offered):
                configuration.KEYS[key].parse(choice)


def test_a_name_that_is_almost_right_is_suggested(machine: Machine) -> None:
    assert "hint: did you mean `tiny`?" in machine("stage", "tini").err


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["stage"], "hint: name one (`stager list` shows which), set STAGER_ENV"),
        (["stage", "tiny@sha256:000000000000"], "hint: that pack is gone: `stager inspect tiny`"),
        (["stage", "tini@sha256:000000000000"], "hint: did you mean `tiny`?"),
        (["stage", "tiny@sha256:0000"], "hint: a pinned one is NAME@sha256:DIGITS: 12 or more"),
        (["stage", "/no/where"], "hint: there is no such directory, nor was"),
        (["inspect", "tiny+tiny"], "hint: one environment is wanted here, not several"),
        (["pack", "tiny"], "stager pack -n tiny"),
    ],
)
def test_a_hint_is_about_what_was_typed(machine: Machine, argv: list[str], hint: str) -> None:
    assert hint in machine(*argv).err.splitlines()[-1]


def test_stores_of_all_users_are_roots_to_collect(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1)
    found = machine("collect", "--all-users")
    assert (found.status, found.error) == (14, "only root can collect for all users")


def test_a_repository_that_is_not_there(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(machine.root / "mistyped")
    found = machine("list", "--repository", path)
    assert (found.status, found.error) == (10, f"there is no repository {path}")
    monkeypatch.setenv("STAGER_REPOSITORIES", path)
    found = machine("list")
    assert found.status == 0
    assert found.err == f"stager: there is no repository {path} (key `repositories`)\n"
    monkeypatch.setenv("STAGER_REPOSITORY", path)  # before the first pack
    monkeypatch.delenv("STAGER_REPOSITORIES")
    found = machine("list")
    assert (found.status, found.out) == (0, "")
    assert f"nothing is published in {path}" in found.err


def test_what_is_said_of_each_layer_and_each_try_is_said_once(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAGER_STAGE_HOW", "auto")
    disk = os.statvfs(machine.root)

    class Full:
        f_flag, f_bavail, f_frsize, f_favail, f_files = 0, 0, 4096, disk.f_favail, disk.f_files

    monkeypatch.setattr(os, "statvfs", lambda _: Full)
    found = machine("stage", "tiny", "--store", f"{machine.root}/elsewhere")
    shutil.rmtree(machine.root / "elsewhere")
    assert found.status == 13
    assert found.err.count("extracting instead of mounting: it was packed for another store") == 1


def test_an_environment_whose_python_is_gone(bare: Machine) -> None:
    (bare.prefix / "bin" / "python").unlink()
    (bare.prefix / "bin" / "python").symlink_to("/no/such/python3")
    found = bare("pack", "environments/tiny")
    assert found.status == 15
    assert "/no/such/python3" in found.error


def test_an_environment_that_may_not_be_read(
    bare: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("site-packages"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found = bare("pack", "environments/tiny")
    assert found.status == 14
    assert "site-packages" in found.error


def test_a_check_refuses_what_a_pack_refuses(bare: Machine) -> None:
    deep = bare.prefix / "share" / "/".join("d" * 128)
    deep.mkdir(parents=True)
    for options in ([], ["--check"]):
        found = bare("pack", "environments/tiny", *options)
        assert found.status == 2
        assert "it is deeper than 128 directories" in found.err


def test_a_damaged_manifest(machine: Machine) -> None:
    path = machine.root / "repository" / "refs" / "tiny"
    good = path.read_bytes()
    path.write_text("{")
    try:
        for verb in ("stage", "inspect"):
            found = machine(verb, "tiny")
            assert found.status == 12
            assert "refs/tiny" in found.error
        assert "damaged" in machine("list").out  # and the others would be listed
    finally:
        path.write_bytes(good)


def test_a_store_that_is_open_to_others(machine: Machine) -> None:
    (machine.root / "store").mkdir()
    (machine.root / "store").chmod(0o755)
    for argv in (["stage", "tiny"], ["status"], ["collect"], ["release"]):
        found = machine(*argv)
        assert found.status == 14
        assert "open to others" in found.error


def test_nobody_stages_into_the_sites_store_by_hand(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = machine.root / "all"
    monkeypatch.setenv("STAGER_SITE_STORE", str(store))
    done = machine("stage", "tiny", "--store", str(store))
    assert done.status == 2
    assert done.error == f"{store} is the site's own store"
    assert not store.exists()


def test_the_doctor_fails_where_staging_cannot_work_at_all(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = machine("doctor", "--json")
    assert good.status == 0
    assert {one["verdict"] for one in good.json["checks"]} <= {"ok", "warning"}  # type: ignore[attr-defined]
    monkeypatch.setenv("STAGER_STORE", "/proc/no-store-here/{uid}")
    bad = machine("doctor", "--json")
    assert bad.status == 1
    assert "error" in {one["verdict"] for one in bad.json["checks"]}  # type: ignore[attr-defined]


def test_the_doctor_knows_that_a_store_may_be_made_for_us(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a login node, where no hook makes it."""
    path = str(machine.root / "made-by-root" / "7")
    monkeypatch.setattr(os, "access", lambda *_: False)
    os.mkdir(os.path.dirname(path))
    ((verdict, what, advice),) = doctor._store(path)
    assert (verdict, os.path.exists(path)) == ("warning", False)
    assert path in what and "hooks make it" in advice


def test_the_doctor_makes_no_store(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    path = machine.root / "local" / "7"
    ((verdict, what, _), *_) = doctor._store(str(path))
    assert verdict == "ok" and f"store {path} is made by the first stage" in what
    assert not path.parent.exists()
    monkeypatch.setattr(os, "access", lambda *_: False)
    ((verdict, what, _),) = doctor._store(str(path))  # hooks make no parents
    assert verdict == "error" and str(path) in what


@pytest.mark.parametrize(("why", "verdict"), [("", "warning"), ("there is no FUSE", "error")])
def test_the_doctor_fails_where_nothing_can_be_run_from_the_store(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, why: str, verdict: str
) -> None:
    class Noexec:
        f_flag, f_bavail, f_frsize = os.ST_NOEXEC, 1, 1

    monkeypatch.setattr(os, "statvfs", lambda _: Noexec)
    monkeypatch.setattr(doctor.squashfs, "why_not_mount", lambda: why)
    checks = doctor._store(f"{machine.root}/store")
    assert [one for one, what, _ in checks if "noexec" in what] == [verdict]


@pytest.mark.parametrize(
    ("mode", "told"), [(0o644, ""), (0o666, "hooks refuse it"), (0o600, "users cannot read")]
)
def test_the_doctor_of_root_reads_the_configuration_as_hooks_do(
    tmp_path: Path, mode: int, told: str
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("stage.timeout: 5m\n")
    path.chmod(mode)
    if os.geteuid() != 0:
        told = "hooks refuse it"  # the file is not root's
    found = doctor._configuration(str(tmp_path))
    assert len(found) == bool(told)
    assert all(told in what and str(path) in what for _, what, _ in found)
    assert all(verdict == "error" for verdict, _, _ in found)


@pytest.mark.parametrize(
    ("rule", "cleared"),
    [
        ("", ["10d"]),
        ("x /scratch/stager-[0-9]*", []),
        ("x /scratch/stager-8", ["10d"]),
        ("d /scratch/stager-7 0755 root root", []),
        ("d /scratch/stager-7 0755 root root 5d", ["5d"]),
    ],
)
def test_the_doctor_tells_what_clears_a_store_by_age(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str, cleared: list[str]
) -> None:
    stand_in = tmp_path / "systemd-tmpfiles"
    rules = f"# /x\nq /scratch 1777 root root 10d\n{rule}"
    stand_in.write_text(f"#!/bin/sh\ncat <<END\n{rules}\nEND\n")
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    told = [what for _, what, _ in doctor._cleared("/scratch/stager-7")]
    assert [what.split()[-1] for what in told] == cleared
    assert doctor._cleared("/elsewhere/stager-7") == []


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ("PrologEpilogTimeout = 65534", ""),
        ("PrologEpilogTimeout = 30 sec", ""),
        ("PrologEpilogTimeout = 19 sec", "ends an Epilog after 19 s"),
        ("PrologTimeout = 30 sec\nEpilogTimeout = 8 sec", "ends an Epilog after 8 s"),
        ("PrologTimeout = 8 sec\nEpilogTimeout = 30 sec", "ends a Prolog after 8 s"),
    ],
)
def test_the_doctor_tells_which_limits_drain_nodes(settings: str, told: str) -> None:
    found = doctor._timing(doctor.slurm_settings(settings), configuration.load())
    assert len(found) == bool(told)
    assert all(verdict == "error" and told in what for verdict, what, _ in found)


def test_a_repository_that_cannot_be_made(bare: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    (bare.root / "file").touch()
    monkeypatch.setenv("STAGER_REPOSITORY", f"{bare.root}/file/repository")
    found = bare("pack", "environments/tiny")
    assert found.status == 1
    assert f"{bare.root}/file" in found.error
    assert bare("list").status == 0


@pytest.mark.parametrize(
    ("writes", "path"),
    [("fsutil.write_atomic", "/repository/manifests/x"), ("transfer.identify", None)],
)
def test_a_repository_on_a_full_disk(
    bare: Machine, monkeypatch: pytest.MonkeyPatch, writes: str, path: str | None
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", path)

    monkeypatch.setattr(f"stager.{writes}", full)
    found = bare("pack", "environments/tiny")
    assert found.status == 13
    assert f"{bare.root}/repository: No space left" in found.error
    assert (path or "") in found.error
    assert os.listdir(bare.root / "repository" / "tmp") == []


@pytest.mark.parametrize("format", ["squashfs", "tar.zst"])
def test_a_limit_on_the_size_of_files(bare: Machine, format: str) -> None:
    (bare.prefix / "random").write_bytes(os.urandom(1 << 20))
    done = subprocess.run(
        ["prlimit", f"--fsize={1 << 18}", STAGER, "pack", "environments/tiny", "--format", format],
        env=bare.environ, cwd=bare.root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 13
    assert f"{bare.root}/repository" in done.stderr
    assert "hint: a limit on the size of a file is in force: see `ulimit -f`" in done.stderr
    assert list((bare.root / "repository" / "tmp").iterdir()) == []


@pytest.mark.parametrize(
    "text", ["pack: {fromat: x}", "[", "a", "store: relative", "pack: 7", "run: {strict: maybe}"]
)
def test_a_wrong_configuration_file_is_named(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str
) -> None:
    (tmp_path / "stager").mkdir()
    (tmp_path / "stager" / "config.yaml").write_text(text)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for argv in (["list"], ["stage", "tiny"], ["config", "show"]):
        found = machine(*argv)
        assert found.status == 2
        assert str(tmp_path / "stager" / "config.yaml") in found.err
        assert "a bug" not in found.err


# Never a traceback


def test_a_bug_of_ours_is_said_to_be_one(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr(lookup, "find", fail)
    found = machine("inspect", "tiny")
    assert found.status == 1
    assert "a bug in stager: KeyError: 'surprise'" in found.err
    assert "STAGER_DEBUG=1" in found.err
    assert "Traceback" not in found.err
    monkeypatch.setenv("STAGER_DEBUG", "1")
    with pytest.raises(KeyError, match="surprise"):
        machine("inspect", "tiny")


@pytest.mark.parametrize("problem", [MemoryError(), RuntimeError("can't start new thread")])
def test_what_the_machine_lacks_is_no_bug(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, problem: Exception
) -> None:
    def fail(*_: object) -> None:
        raise problem

    monkeypatch.setattr(lookup, "find", fail)
    found = machine("inspect", "tiny")
    assert found.status == 1
    assert "memory" in found.error or "thread" in found.error
    assert "`ulimit -a`" in found.err


def test_a_compressor_without_threads_is_not_helped_by_another_format(
    bare: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = bare.root / "mksquashfs"
    program.write_text("#!/bin/sh\necho 'FATAL ERROR: Failed to create thread'\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{bare.root}:{os.environ['PATH']}")
    found = bare("pack", "environments/tiny")
    assert "Failed to create thread" in found.error
    assert "`ulimit -a`" in found.err and "tar.zst" not in found.err


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_compressor_on_a_full_disk(
    bare: Machine, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    program = bare.root / "mksquashfs"
    program.write_text(f"#!/bin/sh\necho 'Write failed because {os.strerror(number)}'\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{bare.root}:{os.environ['PATH']}")
    found = bare("pack", "environments/tiny")
    assert found.status == 13
    left = "no space is left" if number == errno.ENOSPC else "your quota is used up"
    on = fsutil.mount_point(str(bare.root))
    assert found.error.startswith(f"{left} on {on}, where the repository {bare.root}/repository is")
    assert f"the image of {bare.prefix} takes up to 1 MiB" in found.error
    assert ("MiB are free" in found.error) is (number == errno.ENOSPC)
    assert "--repository" in found.err


def test_an_interrupt(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(lookup, "find", interrupt)
    found = machine("inspect", "tiny")
    assert (found.status, found.out, found.err) == (130, "", "stager: interrupted\n")


@pytest.mark.parametrize("module", ["stager.warm", "stager.cli", "stager.cli.staging"])
def test_an_interrupt_while_modules_are_loaded(
    machine: Machine, tmp_path: Path, module: str
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}:\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    done = subprocess.run(
        [STAGER, "stage", "tiny"], env={**machine.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "stager: interrupted\n"


OUTPUTS = [["list"], ["inspect", "tiny"], ["config", "show"], ["--help"], ["--version"]]


@pytest.mark.parametrize("argv", OUTPUTS)
def test_a_reader_that_is_gone_is_nobodys_fault(machine: Machine, argv: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = machine.run(*argv, stdout=writing, stderr=subprocess.PIPE)
    finally:
        os.close(writing)
    assert done.returncode == 1
    assert done.stderr == ""


@pytest.mark.parametrize("argv", OUTPUTS)
def test_output_that_cannot_be_written_is_an_error(machine: Machine, argv: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = machine.run(*argv, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 13
    assert done.stderr.startswith("stager: error: ")
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr
    assert "a bug" not in done.stderr


@pytest.mark.parametrize(
    ("redirection", "expected"),
    [("2>&-", True), (">&-", False), ("<&-", True), ("<&- >&- 2>&-", False)],
)
def test_closed_descriptors_lose_what_was_for_them_and_nothing_else(
    machine: Machine, redirection: str, expected: bool
) -> None:
    for argv in ("stage tiny", "list", "pack environments/tiny"):
        done = subprocess.run(
            ["sh", "-c", f'exec "$0" {argv} {redirection}', STAGER],
            env=machine.environ, cwd=machine.root, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0
        assert (done.stdout != "") is (expected and not argv.startswith("pack"))
        assert "stager:" not in done.stdout
        assert done.stderr == "" or argv.startswith("pack")
    # No file that was opened in place of a closed descriptor got the output.
    assert machine("inspect", "tiny").status == 0


def test_names_that_are_no_text_come_out_as_they_are(bare: Machine) -> None:
    path = os.fsencode(bare.root) + b"/caf\xe9"
    os.mkdir(path)
    bare.prefix.rename(os.fsdecode(path) + "/tiny")
    done = subprocess.run(
        [STAGER, "pack", path + b"/tiny"], env=bare.environ, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    listed = subprocess.run(
        [STAGER, "list", "--json"], env=bare.environ, capture_output=True, check=True
    )
    origin = json.loads(listed.stdout)["environments"][0]["origin"]
    assert os.fsencode(origin) == path + b"/tiny"


def test_what_would_move_the_cursor_is_not_printed(bare: Machine) -> None:
    done = bare("stage", "/tmp/\x1b[2Jgone")
    assert "\x1b" not in done.err
    (bare.prefix / "share").mkdir()
    (bare.prefix / "share" / "\x1b[31mred\n").symlink_to("/no/such")
    found = bare("pack", "environments/tiny")
    assert found.status == 0
    assert "\x1b" not in found.err
    assert "red" in found.err


# How much it does before it does anything


def extra_paths(argv: list[str], machine: Machine) -> list[str]:
    """Paths on a disk that a command asks for, beyond those that its Python does in any case."""
    python = STAGER.read_text().partition("\n")[0].removeprefix("#!")
    start = [python, "-c", "import argparse, importlib"]
    before = set(strace_files(start, env=machine.environ, cwd=machine.root))
    paths = strace_files([str(STAGER), *argv], env=machine.environ, cwd=machine.root)
    return [path for path in paths if path not in before and not path.startswith("/proc/")]


HEAVY = (
    "/yaml/",
    "/rich/",
    "/zstandard/",
    "/stager/packing/pack.",
    "/stager/packing/layers.",
    "/stager/packing/produce.",
    "/asyncio/",
)


@pytest.mark.parametrize(
    ("argv", "most"),
    [
        (["--help"], 170),
        (["--version"], 170),
        (["stage", "--help"], 170),
        (["stage", "tiny"], 550),
        (["list"], 400),
    ],
)
def test_starting_asks_for_little(machine: Machine, argv: list[str], most: int) -> None:
    """Where the file system is shared each of these is a question to a server.

    The limits are half as much again as it was when they were set, on Python 3.11.
    """
    machine("stage", "tiny")
    paths = extra_paths(argv, machine)
    heavy = [path for path in paths if any(one in path for one in HEAVY)]
    assert heavy == []
    assert len(paths) <= most, paths


@pytest.mark.parametrize(
    "verb",
    [
        "pack",
        "list",
        "inspect",
        "remove",
        "plan",
        "stage",
        "activate",
        "run",
        "release",
        "collect",
        "status",
        "verify",
        "doctor",
        "config",
    ],
)
def test_every_verb_explains_itself(machine: Machine, verb: str) -> None:
    found = machine(verb, "--help")
    assert (found.status, found.err) == (0, "")
    assert "usage:" in found.out


@pytest.mark.parametrize(
    "call", [lambda machine: machine("--help"), lambda machine: machine("doctor")]
)
def test_lines_fit_a_terminal(machine: Machine, call: Callable[[Machine], Result]) -> None:
    assert all(len(line) <= 100 for line in call(machine).out.splitlines())
