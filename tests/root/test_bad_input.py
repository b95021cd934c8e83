"""What users get wrong and what breaks under them: the status, a message, a hint, nothing left.

Every row goes through the installed program; `Bench.expect` insists on the status of
``docs/exit-codes.md``, on the message and the hint, and on there being no traceback.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import environments
import workbench
from environments import VENV, Environment, run
from workbench import NOBODY, Bench


@pytest.fixture
def environment(bench: Bench) -> Environment:
    return environments.make_venv(bench.root / "origin" / "env")


@pytest.fixture(scope="module")
def small(workshop: environments.Workshop) -> Environment:
    """With nothing in it, and not to be changed."""
    return workshop.once("empty", environments.make_venv)


@pytest.fixture(params=["squashfs", "tar.zst"])
def packed(request: pytest.FixtureRequest, bench: Bench, small: Environment) -> Path:
    """The image of a packed environment, in each format."""
    bench.pack(small, "--format", request.param)
    (image,) = bench.repository.glob("images/*")
    return image


def untouched(bench: Bench) -> None:
    """Nothing is staged, nothing is claimed, and nothing half-made is left."""
    assert bench.unfinished() == []
    for room in ("envs", "images", "ready"):
        assert list(bench.store.glob(f"{room}/*")) == []
    assert workbench.mounts_below(bench.root) in ([], [str(bench.root / "small")])


# What to pack


def test_nothing_there(bench: Bench) -> None:
    said = bench.expect(10, "pack", bench.root / "nowhere")
    assert f"there is no environment at {bench.root}/nowhere" in said
    assert not bench.repository.exists()


def test_no_environment(bench: Bench) -> None:
    (bench.root / "plain").mkdir()
    assert "pyvenv.cfg" in bench.expect(10, "pack", bench.root / "plain")
    (bench.root / "file").write_text("")
    bench.expect(10, "pack", bench.root / "file")
    (bench.root / "link").symlink_to("link")
    bench.expect(10, "pack", bench.root / "link")
    assert not bench.repository.exists()


def test_python_that_is_installed_in_a_home(bench: Bench) -> None:
    """``--prefix=$HOME``: the base would be all that its user has, keys included."""
    base = environments.make_base(bench.root / "home")
    small = environments.make_small_venv(bench.root / "origin" / "env", python=base.bin / "python3")
    for option in ([], ["--check"]):
        said = bench.expect(2, "pack", small.prefix, *option)
        assert f"the home directory {base.prefix} is in it" in said
    assert not bench.repository.exists()


def test_repository_in_what_is_packed(bench: Bench, environment: Environment) -> None:
    """It changes while it is packed, which is nobody's who is still installing."""
    inside = environment.prefix / "share" / "images"
    for what in ([environment.prefix], ["--tree", environment.prefix]):
        said = bench.expect(2, "pack", *what, "--repository", inside)
        assert f"the repository {inside} is in it" in said
        assert not inside.exists()
    inside.parent.mkdir()
    bench.stager("pack", environment.prefix, "--repository", inside, "--exclude", "/share")


def test_nothing_named(bench: Bench) -> None:
    bench.expect(2, "pack")
    bench.expect(2, "stage")
    done = bench.stager("pack", env=bench.environ(VIRTUAL_ENV="/nowhere"), check=False)
    assert done.returncode == 10


@pytest.mark.parametrize("way", ["missing", "dangling", "not-executable", "no-program", "fails"])
def test_python_that_does_not_start(bench: Bench, environment: Environment, way: str) -> None:
    python = environment.bin / "python"
    for path in environment.bin.glob("python*"):
        path.unlink()
    if way == "dangling":
        python.symlink_to("/opt/gone/bin/python3")
    elif way != "missing":
        python.write_text("" if way == "no-program" else "#!/bin/sh\necho broken >&2; exit 3\n")
        python.chmod(0o644 if way == "not-executable" else 0o755)
    said = bench.expect(15, "pack", environment.prefix)
    assert str(python) in said
    if way == "fails":
        assert "broken" in said
    assert not bench.repository.exists()


def test_environment_without_a_configuration_value(bench: Bench, environment: Environment) -> None:
    (environment.prefix / "pyvenv.cfg").write_bytes(b"rubbish\n\xc3\xa9 = \n= = =\n\n===")
    bench.pack(environment)
    assert bench.stage(hide=[environment.prefix]).eval("sys.version_info[0]") == "3"


@pytest.mark.parametrize(
    "name",
    ["a/b", "..", "", ".hidden", "a b", "é", "-x", "a" * 129, "x@sha256:0", "a\nb", "../../x"],
)
def test_name_that_cannot_be_one(bench: Bench, small: Environment, name: str) -> None:
    said = bench.expect(2, "pack", small.prefix, f"--name={name}")
    assert "letters, digits" in said
    assert not bench.repository.exists()


@pytest.mark.parametrize("name", ["a/b", "a b", "é", "x@sha256:0", "a\nb", "a" * 129, "@", "a@b"])
def test_reference_that_cannot_be_one(bench: Bench, name: str) -> None:
    for verb in (
        ("stage", "remove") if name != "a/b" else ("stage", "inspect", "activate", "verify")
    ):
        done = bench.stager(verb, name, check=False)
        assert done.returncode == 2, (verb, done.stderr)
        assert "stager: error: " in done.stderr


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc", "..", "."])
def test_reference_that_leads_elsewhere(bench: Bench, name: str) -> None:
    """A path names an environment to pack, never a file of the repository."""
    said = bench.expect(10, "inspect", name)
    assert "is not published" in said


def test_unknown_name(bench: Bench, small: Environment) -> None:
    bench.pack(small, name="torch-2")
    assert "did you mean `torch-2`?" in bench.expect(10, "stage", "torch2")
    assert "stager list" in bench.expect(10, "stage", "something-else")
    assert "stager list" in bench.expect(10, "remove", "something-else")
    assert f"stager pack {small.prefix}2" not in bench.expect(10, "stage", "x")
    other = environments.make_venv(bench.root / "other")
    said = bench.expect(10, "stage", other.prefix, "--on-stale", "warn")
    assert f"pack it first: stager pack {other.prefix}" in said


@pytest.mark.parametrize(
    "options",
    [
        ["--level", "many"],
        ["--threads", "-x"],
        ["--format", "zip"],
        ["--editables", "perhaps"],
        ["--store", "/tmp/with space"],
        ["--store", "/tmp/" + "x" * 80],
        ["--no-such-option"],
    ],
    ids=" ".join,
)
def test_option_that_cannot_be_one(bench: Bench, small: Environment, options: list[str]) -> None:
    bench.expect(2, "pack", small.prefix, *options)
    assert not bench.repository.exists()


def test_two_environments_of_one_name(bench: Bench) -> None:
    """Without a name it is the directory's; another one's is not taken over."""
    one, two = (environments.make_venv(bench.root / parent / "env") for parent in "ab")
    bench.stager("pack", one.prefix, "--name", "env")
    (bench.root / "c").mkdir()
    three = environments.make_venv(bench.root / "c" / "same")
    other = environments.make_venv(bench.root / "d" / "same")
    bench.stager("pack", three.prefix)
    assert str(three.prefix) in bench.expect(1, "pack", other.prefix)
    assert bench.json("inspect", "same")["origin"] == str(three.prefix)
    bench.stager("pack", two.prefix, "--name", "env")
    assert bench.json("inspect", "env")["origin"] == str(two.prefix)


def test_paths_with_spaces_and_more(bench: Bench) -> None:
    """Of the environment and of the repository: any path will do."""
    odd = bench.root / "a b" / 'it\'s "é" $x \U0001f40d'
    environment = environments.make_venv(odd / "env")
    bench.settings["STAGER_REPOSITORY"] = str(odd / "repository")
    said = bench.pack(environment)
    assert list((odd / "repository" / "images").iterdir())
    staged = bench.stage(hide=[environment.prefix])
    assert staged.eval("sys.prefix") == said["prefix"]


# Images


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "one byte short": lambda data: data[:-1],
    "one byte long": lambda data: data + b"\0",
    "first byte": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "last byte": lambda data: data[:-1] + bytes([data[-1] ^ 128]),
    "middle byte": lambda data: (
        data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1 :]
    ),
    "zeros": lambda data: bytes(len(data)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_image(bench: Bench, packed: Path, damage: str) -> None:
    good = packed.read_bytes()
    packed.write_bytes(DAMAGE[damage](good))
    for how in ("mount", "extract") if packed.suffix == ".squashfs" else ("extract",):
        said = bench.expect(12, "stage", "it", "--how", how)
        assert packed.name in said
        untouched(bench)
    if damage == "last byte":
        packed.write_bytes(good)
        assert bench.stage().eval("sys.version_info[0]") == "3"


def test_truncated_image(bench: Bench, packed: Path) -> None:
    """Cut off anywhere: none of it is ever taken for ready."""
    good = packed.read_bytes()
    for part in range(10):
        packed.write_bytes(good[: len(good) * part // 10])
        bench.expect(12, "stage", "it")
        untouched(bench)


def test_missing_image(bench: Bench, packed: Path) -> None:
    packed.unlink()
    assert "pack the environment again" in bench.expect(10, "stage", "it")
    untouched(bench)


@pytest.mark.parametrize("kind", ["directory", "pipe", "unreadable"])
def test_image_that_is_no_file(bench: Bench, packed: Path, kind: str) -> None:
    """None of them makes it wait, or is read."""
    data = packed.read_bytes()
    packed.unlink()
    if kind == "directory":
        packed.mkdir()
    elif kind == "pipe":
        os.mkfifo(packed)
    else:
        packed.write_bytes(data)
        packed.chmod(0)
        run(["chown", "-R", f"{NOBODY}:{NOBODY}", bench.root])
    command = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    done = bench.stager(
        "stage",
        "it",
        check=False,
        prefix=command if kind == "unreadable" else [],
        env=bench.environ(HOME=str(bench.root)),
    )
    assert done.returncode == {"directory": 12, "pipe": 12, "unreadable": 14}[kind], done.stderr
    assert packed.name in done.stderr and "hint: " in done.stderr


# Manifests


def rewrite_manifest(bench: Bench, change: Callable[[bytes], bytes]) -> None:
    path = (bench.repository / "refs" / "it").resolve()
    path.write_bytes(change(path.read_bytes()))


def edited(**changes: object) -> Callable[[bytes], bytes]:
    return lambda data: json.dumps({**json.loads(data), **changes}).encode()


def layer_edited(**changes: object) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        value = json.loads(data)
        value["layers"][-1].update(changes)
        return json.dumps(value).encode()

    return change


MANIFESTS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut off": lambda data: data[: len(data) // 2],
    "not JSON": lambda data: b"\x7fELF" + data,
    "not an object": lambda data: b"[1, 2]",
    "deep": lambda data: b"[" * 100_000,
    "a key missing": lambda data: data.replace(b'"layers"', b'"players"'),
    "an unknown key": edited(surprise=1),
    "no layers": edited(layers=[]),
    "text for a number": layer_edited(files="many"),
    "id with a path": layer_edited(id="../../../../x"),
    "id too short": layer_edited(id="abc"),
    "relative destination": layer_edited(destination="tmp/x"),
    "name with a path": edited(name="../../x"),
}


@pytest.mark.parametrize("damage", MANIFESTS)
def test_damaged_manifest(bench: Bench, small: Environment, damage: str) -> None:
    bench.pack(small)
    rewrite_manifest(bench, MANIFESTS[damage])
    said = bench.expect(12, "stage", "it")
    assert "damaged" in said and str(bench.repository) in said
    untouched(bench)
    if damage == "cut off":
        assert "damaged" in bench.stager("list").stdout
        bench.pack(small)
        assert bench.stage().eval("sys.version_info[0]") == "3"


def test_manifest_of_a_newer_stager(bench: Bench, small: Environment) -> None:
    bench.pack(small)
    rewrite_manifest(bench, edited(schema=99))
    said = bench.expect(15, "stage", "it")
    assert "format 99" in said and "newer stager" in said
    untouched(bench)


def test_environment_for_another_machine(bench: Bench, small: Environment) -> None:
    bench.pack(small)
    rewrite_manifest(bench, edited(platform={"machine": "vax", "glibc": ""}))
    assert "packed on vax" in bench.expect(15, "stage", "it")
    untouched(bench)
    bench.pack(small)
    rewrite_manifest(bench, edited(platform={"machine": os.uname().machine, "glibc": "99.1"}))
    assert "needs glibc 99.1" in bench.expect(15, "stage", "it")
    untouched(bench)


# Disks


def small_disk(bench: Bench, size: str, *options: str) -> Path:
    place = bench.root / "small"
    place.mkdir()
    run(
        [
            "mount",
            "-t",
            "tmpfs",
            "-o",
            ",".join([f"size={size}", "mode=0755", *options]),
            "stager-test",
            place,
        ]
    )
    return place


@pytest.mark.parametrize("format_", ["squashfs", "tar.zst"])
def test_full_disk_under_the_repository(
    bench: Bench, environment: Environment, format_: str
) -> None:
    (environment.prefix / "random").write_bytes(os.urandom(4 << 20))
    place = small_disk(bench, "2m")
    bench.settings["STAGER_REPOSITORY"] = str(place / "repository")
    said = bench.expect(13, "pack", environment.prefix, "--format", format_)
    told = re.search(
        f"no space is left on {place}, where the repository {place}/repository is: the image of"
        rf" {environment.prefix} takes up to (\d+) MiB, (\d+) MiB are free\n",
        said,
    )
    assert told is not None
    assert int(told[1]) > 4 and int(told[2]) <= 2
    assert "--repository" in said and "repository/tmp" not in said
    files = [path for path in place.rglob("*") if path.is_file() and path.name != "lock"]
    assert [path for path in files if path.stat().st_size] == []
    assert list(place.glob("repository/tmp/*")) == []


def test_full_disk_before_anything_is_packed(bench: Bench, small: Environment) -> None:
    place = small_disk(bench, "64k", "nr_inodes=3")
    bench.settings["STAGER_REPOSITORY"] = str(place / "repository")
    bench.expect(13, "pack", small.prefix)


@pytest.mark.parametrize("how", ["mount", "extract", "archive"])
def test_full_disk_under_the_store(bench: Bench, environment: Environment, how: str) -> None:
    """Told before anything is written: what is needed, and what there is."""
    (environment.prefix / "random").write_bytes(os.urandom(4 << 20))
    place = small_disk(bench, "18m")
    bench.settings["STAGER_STORE"] = str(place / "store")
    bench.pack(environment, *(["--format", "tar.zst"] if how == "archive" else []))
    wanted = "extract" if how == "archive" else how
    said = bench.expect(13, "stage", "it", "--how", wanted)
    assert f"not enough space in the store {place}/store" in said
    untouched(bench)


@pytest.mark.parametrize("how", ["mount", "extract", "archive"])
def test_disk_that_fills_while_staging(bench: Bench, environment: Environment, how: str) -> None:
    """The check cannot know what others write: a file size limit stands for them."""
    (environment.prefix / "random").write_bytes(os.urandom(4 << 20))
    bench.pack(environment, *(["--format", "tar.zst"] if how == "archive" else []))
    wanted = "extract" if how == "archive" else how
    done = bench.stager(
        "stage", "it", "--how", wanted, check=False, prefix=["prlimit", f"--fsize={2 << 20}"]
    )
    assert done.returncode != 0
    assert "stager: error: " in done.stderr
    bench.stager("release")
    untouched(bench)
    assert bench.stage("--how", wanted).eval("sys.version_info[0]") == "3"


def test_no_inodes_under_the_store(bench: Bench, venv_uv: Environment) -> None:
    place = small_disk(bench, "200m", "nr_inodes=200")
    bench.settings["STAGER_STORE"] = str(place / "store")
    bench.pack(venv_uv)
    assert "not enough inodes" in bench.expect(13, "stage", "it", "--how", "extract")
    untouched(bench)


def test_job_runs_on_a_node_with_a_full_disk(bench: Bench, small: Environment) -> None:
    place = small_disk(bench, "1m")
    bench.settings["STAGER_STORE"] = str(place / "store")
    bench.pack(small)
    command = [VENV / "bin" / "stage-run", "--env", "it", "python"]
    done = run([*command, "-c", "import sys; print(sys.prefix)"], env=bench.environ())
    assert done.stdout == f"{small.prefix}\n"
    assert "running the original environment: not enough space" in done.stderr


# Stores


STORES: dict[str, Callable[[Path], object]] = {
    "of another user": lambda store: (store.mkdir(0o700), os.chown(store, NOBODY, NOBODY)),
    "a link": lambda store: (_made(store.parent / "real"), store.symlink_to("real")),
    "a link to nothing": lambda store: store.symlink_to("nowhere"),
    "open to the group": lambda store: (store.mkdir(), store.chmod(0o770)),
    "open to all": lambda store: (store.mkdir(), store.chmod(0o777)),
    "readable": lambda store: (store.mkdir(), store.chmod(0o755)),
    "a file": lambda store: store.write_text(""),
    "a pipe": os.mkfifo,
}


def _made(directory: Path) -> Path:
    directory.mkdir(0o700)
    return directory


@pytest.mark.parametrize("kind", STORES)
def test_store_that_is_not_ours(bench: Bench, small: Environment, kind: str) -> None:
    """Somebody may have made the predictable path first: neither used nor changed."""
    bench.pack(small)
    STORES[kind](bench.store)
    before = [(path, path.lstat().st_mtime_ns) for path in bench.root.glob("*")]
    strict = ["activate", "it", "--strict"]
    others = [["status"], ["collect"], ["release"]] if kind == "a link" else []
    for verb in (["stage", "it"], strict, *others):
        said = bench.expect(14, *verb)
        assert str(bench.store) in said
    assert [(path, path.lstat().st_mtime_ns) for path in bench.root.glob("*")] == before


def test_store_below_a_file(bench: Bench, small: Environment) -> None:
    bench.pack(small)
    (bench.root / "file").write_text("")
    done = bench.stager("stage", "it", "--store", bench.root / "file" / "store", check=False)
    assert done.returncode in (1, 14)
    assert f"{bench.root}/file" in done.stderr and "hint: " in done.stderr


def test_read_only_store(bench: Bench, small: Environment) -> None:
    place = small_disk(bench, "100m")
    bench.settings["STAGER_STORE"] = str(place / "store")
    bench.pack(small)
    run(["mount", "-o", "remount,ro", place])
    assert "Read-only file system" in bench.expect(14, "stage", "it")
    run(["mount", "-o", "remount,rw", place])
    bench.stage("--how", "extract")
    run(["mount", "-o", "remount,ro", place])
    bench.expect(14, "stage", "it")  # a claim cannot be recorded either
    run(["mount", "-o", "remount,rw", place])
    assert bench.stage().how == "hit"


def test_store_on_a_disk_that_runs_nothing(bench: Bench, small: Environment) -> None:
    """Mounted ``noexec``: an image may be mounted on it, a tree cannot be extracted to it."""
    place = small_disk(bench, "100m", "noexec")
    bench.settings["STAGER_STORE"] = str(place / "store")
    bench.pack(small)
    assert "noexec" in bench.expect(15, "stage", "it", "--how", "extract")
    untouched(bench)
    bench.pack(small, "--format", "tar.zst", name="archive")
    assert "noexec" in bench.expect(15, "stage", "archive")
    untouched(bench)
    command = [VENV / "bin" / "stage-run", "--env", "archive", "python"]
    done = run([*command, "-c", "import sys; print(sys.prefix)"], env=bench.environ())
    assert done.stdout == f"{small.prefix}\n"
    assert "running the original environment" in done.stderr
    staged = bench.stage(hide=[small.prefix])
    assert staged.how == "mounted"
    assert staged.eval("sys.prefix") == str(staged.prefix)


def test_repository_of_another_user(bench: Bench, small: Environment) -> None:
    """What is in it may be read where a site offers it; it is never written to."""
    bench.repository.mkdir()
    os.chown(bench.repository, NOBODY, NOBODY)
    assert str(bench.repository) in bench.expect(14, "pack", small.prefix)
    assert [path for path in bench.repository.rglob("*") if path.is_file()] == []


def test_programs_that_are_missing(bench: Bench, small: Environment) -> None:
    """Without squashfs-tools only squashfs images cannot be written, and the hint says so."""
    empty = bench.root / "empty"
    empty.mkdir()
    for program in ("python3", "sh", "env"):
        (empty / program).symlink_to(shutil.which(program) or "")
    hidden = [
        "unshare",
        "--mount",
        "--propagation",
        "private",
        "sh",
        "-euc",
        "for p in mksquashfs unsquashfs squashfuse squashfuse_ll fusermount3 fusermount; do"
        " for d in /usr/bin /usr/sbin /bin /sbin /usr/local/bin; do"
        ' [ ! -e $d/$p ] || mount --bind /dev/null $d/$p; done; done; exec "$@"',
        "sh",
    ]
    said = bench.expect(15, "pack", small.prefix, prefix=hidden)
    assert "mksquashfs" in said and "--format tar.zst" in said
    assert bench.unfinished() == []
    archive = ["pack", small.prefix, "--name", "it", "--format", "tar.zst"]
    bench.stager(*archive, prefix=hidden)
    prefix = bench.stager("stage", "it", prefix=hidden).stdout.strip()
    assert (
        run([f"{prefix}/bin/python", "-c", "import sys; print(sys.prefix)"]).stdout.strip()
        == prefix
    )
    bench.pack(small, name="image")
    bench.stager("release")
    bench.stager("collect", "--all")
    assert "unsquashfs" in bench.expect(15, "stage", "image", prefix=hidden)
