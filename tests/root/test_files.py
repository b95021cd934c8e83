"""Files as they are found in real environments: links, modes, names, special files, times."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import tarfile
from pathlib import Path

import pytest

import environments
import workbench
from environments import Environment, run
from workbench import NOBODY, Bench, Staged

WAYS = ("mount", "extract", "archive")
MADE = 1_600_000_000
"""A modification time, in seconds."""


@pytest.fixture
def environment(bench: Bench) -> Environment:
    return environments.make_venv(bench.root / "origin" / "env")


def staged_by(bench: Bench, environment: Environment, way: str, **more: object) -> Staged:
    options = ["--format", "tar.zst"] if way == "archive" else []
    how = "extract" if way == "archive" else way
    return bench.packed_and_staged(environment, *options, how=how, **more)  # type: ignore[arg-type]


every_way = pytest.mark.parametrize("way", WAYS)


def content_of(tree: Path) -> dict[str, tuple[object, ...]]:
    """Everything below a directory: kind, mode, time, and content or target."""
    found: dict[str, tuple[object, ...]] = {}
    root = os.fsencode(tree)
    for parent, directories, files in os.walk(root):
        for name in [*directories, *files]:
            path = os.path.join(parent, name)
            relative = os.fsdecode(os.path.relpath(path, root))
            info = os.lstat(path)
            mode, time = stat.S_IMODE(info.st_mode), int(info.st_mtime)
            if stat.S_ISLNK(info.st_mode):
                found[relative] = ("link", os.readlink(path))
            elif stat.S_ISDIR(info.st_mode):
                found[relative] = ("directory", mode, time)
            else:
                with open(path, "rb") as file:
                    found[relative] = ("file", mode, time, file.read())
    return found


@every_way
def test_links(bench: Bench, environment: Environment, way: str) -> None:
    share = environment.prefix / "share"
    (share / "deep" / "er").mkdir(parents=True)
    (share / "file").write_text("content")
    data = bench.root / "data"
    data.mkdir()
    (data / "set").write_text("large")
    links = {
        "relative": "file",
        "through": "deep/../file",
        "absolute": share / "file",
        "directory": "deep",
        "deep/up": "../file",
        "deep/er/out-and-in": environment.prefix / "pyvenv.cfg",
        "by-another-name": f"../../{environment.prefix.name}/pyvenv.cfg",
        "node": "/usr/share",
        "node-relative": os.path.relpath("/usr/bin/env", share),
        "dangling": "nowhere",
        "dangling-absolute": environment.prefix / "nowhere",
        "dangling-outside": "/nowhere/at/all",
        "dangling-up": "../../../../no-such-thing",
        "loop": "pool",
        "pool": "loop",
        "self": "self",
        "parent": "..",
        "data": data,
        "data-file": data / "set",
    }
    for name, target in links.items():
        (share / name).symlink_to(target)
    staged = staged_by(bench, environment, way)
    new = staged.prefix / "share"
    found = {name: os.readlink(new / name) for name in links}
    assert found == {
        "relative": "file",
        "through": "deep/../file",
        "absolute": "file",
        "directory": "deep",
        "deep/up": "../file",
        "deep/er/out-and-in": "../../../pyvenv.cfg",
        "by-another-name": "../pyvenv.cfg",
        "node": "/usr/share",
        "node-relative": "/usr/bin/env",
        "dangling": "nowhere",
        "dangling-absolute": "../nowhere",
        "dangling-outside": "/nowhere/at/all",
        "dangling-up": os.path.normpath(share / "../../../../no-such-thing"),
        "loop": "pool",
        "pool": "loop",
        "self": "self",
        "parent": "..",
        "data": str(data),
        "data-file": str(data / "set"),
    }
    for name in ("relative", "through", "absolute", "deep/up"):
        assert (new / name).read_text() == "content"
    told = staged.told("dangling")
    assert {f"share/{name}" for name in links if "dangling" in name} <= set(told)
    assert {"share/loop", "share/pool", "share/self"} <= set(told)
    # To data elsewhere they go on leading, which is told: data may be larger than any node's disk.
    assert set(staged.told("link")) == {"share/data", "share/data-file"}


def test_links_out_of_python_directories(bench: Bench, environment: Environment) -> None:
    """Modules and packages that are linked in are included, or refused, or left, as is asked."""
    outside = bench.root / "outside"
    (outside / "package").mkdir(parents=True)
    (outside / "package" / "__init__.py").write_text("from .inner import WORD\n")
    (outside / "package" / "inner.py").symlink_to("real.py")
    (outside / "package" / "real.py").write_text("from .up import WORD\n")
    (outside / "package" / "up.py").symlink_to("../module.py")
    (outside / "module.py").write_text("WORD = 'linked'\n")
    site = environment.site_packages
    (site / "package").symlink_to(outside / "package")
    (site / "module.py").symlink_to(outside / "module.py")
    (environment.bin / "tool").symlink_to(outside / "tool")
    (outside / "tool").write_text(f"#!{environment.python}\nimport package; print(package.WORD)\n")
    (outside / "tool").chmod(0o755)
    staged = bench.packed_and_staged(environment, hide=[outside])
    assert staged.eval("module.WORD, package.WORD", "module, package") == "linked linked"
    assert staged.run(staged.bin / "tool").stdout == "linked\n"
    assert workbench.links_out(staged) == {}
    assert workbench.modules_from_source(staged, "module", "package") == []
    said = bench.expect(1, "pack", environment.prefix, "--links", "refuse", "--name", "no")
    for name in ("bin/tool", "site-packages/module.py", "site-packages/package"):
        assert name in said
    bench.pack(environment, "--links", "keep", name="kept")
    kept = bench.stage("--how", "extract", name="kept")
    assert kept.site_packages.joinpath("module.py").readlink() == outside / "module.py"
    assert len(kept.told("link")) == 3


@pytest.mark.parametrize("path", ["lib", "lib/python", "lib/python/site-packages", "bin"])
def test_python_directories_that_are_links(
    bench: Bench, environment: Environment, path: str
) -> None:
    """To a disk with more space: they were told of, and left where they are."""
    (environment.site_packages / "mine.py").write_text("x = 1\n")
    directory = environment.prefix / path.replace("python", environments.BASE_PYTHON.name)
    outside = bench.root / "outside"
    shutil.move(directory, outside)
    directory.symlink_to(outside)
    staged = bench.packed_and_staged(environment, hide=[outside])
    assert staged.eval("mine.x", "mine") == "1"
    assert workbench.links_out(staged) == {}
    assert workbench.modules_from_source(staged, "mine") == []


def test_link_to_a_project_that_the_environment_is_in(
    bench: Bench, environment: Environment
) -> None:
    """What the link leads to is included, but for the environment: it was in there once more."""
    project = environment.prefix.parent
    (project / "code.py").write_text("WORD = 'linked'\n")
    (environment.site_packages / "project").symlink_to("../../../..")
    staged = bench.packed_and_staged(environment, hide=[project])
    assert staged.eval("project.code.WORD", "project.code") == "linked"
    found = {path.name for path in (staged.site_packages / "project").iterdir()}
    assert found - {"__pycache__"} == {"code.py"}


@every_way
def test_hard_links(bench: Bench, environment: Environment, way: str) -> None:
    """All names are there with the content of each; no name of the original is written to."""
    share = environment.prefix / "share"
    share.mkdir()
    cache = bench.root / "cache"
    text = f"prefix = {environment.prefix}\n"
    cache.write_text(text)
    for name in ("a", "b", "z"):
        (share / name).hardlink_to(cache)
    before = cache.stat()
    staged = staged_by(bench, environment, way)
    for name in ("a", "b", "z"):
        assert (staged.prefix / "share" / name).read_text() == f"prefix = {staged.prefix}\n"
    after = cache.stat()
    assert cache.read_text() == text
    kept = ("st_ino", "st_nlink", "st_mode", "st_mtime_ns", "st_ctime_ns", "st_size")
    assert {name: getattr(before, name) for name in kept} == {
        name: getattr(after, name) for name in kept
    }


@every_way
def test_modes(bench: Bench, environment: Environment, way: str) -> None:
    """What the owner may read everybody may, what he may run everybody may, nobody may more."""
    share = environment.prefix / "share"
    share.mkdir()
    modes = {0o600: 0o644, 0o644: 0o644, 0o444: 0o444, 0o755: 0o755, 0o700: 0o755, 0o555: 0o555}
    modes.update({0o400: 0o444, 0o666: 0o644, 0o777: 0o755})
    modes.update({0o4755: 0o755, 0o2755: 0o755, 0o6711: 0o755, 0o1644: 0o644})
    for mode in modes:
        path = share / f"file-{mode:o}"
        path.write_text("content")
        path.chmod(mode)
    closed = share / "closed"
    closed.mkdir()
    (closed / "inside").write_text("content")
    closed.chmod(0o555)
    sticky = share / "sticky"
    sticky.mkdir()
    sticky.chmod(0o3777)
    staged = staged_by(bench, environment, way)
    new = staged.prefix / "share"
    found = {mode: stat.S_IMODE((new / f"file-{mode:o}").stat().st_mode) for mode in modes}
    assert {f"{mode:o}": f"{value:o}" for mode, value in found.items()} == {
        f"{mode:o}": f"{value:o}" for mode, value in modes.items()
    }
    assert (new / "closed" / "inside").read_text() == "content"
    for name in ("closed", "sticky"):
        assert stat.S_IMODE((new / name).stat().st_mode) == 0o755
    assert {path.owner() for path in new.iterdir()} == {"root"}  # ours, and we are root


@every_way
def test_odd_names(bench: Bench, environment: Environment, way: str) -> None:
    share = environment.prefix / "share"
    share.mkdir()
    names = [
        "new\nline",
        " blanks  ",
        "tab\t",
        "quote'\"`$(x)",
        "-rf",
        "back\\slash",
        "é\u0301\U0001f40d",
        os.fsdecode(b"not-utf8-\xff\xfe"),
        "UPPER",
        "upper",
        "a" * 255,
        "*?[x]",
        "#comment",
        "name=value",
    ]
    for name in names:
        (share / name).write_text(f"{name!r} {environment.prefix}")
        (share / f"{name[:250]}.d").mkdir()
    deep = Path(*[f"directory-number-{number:02}" for number in range(17)])
    assert 300 <= len(str(deep)) <= 400
    (share / deep).mkdir(parents=True)
    (share / deep / "leaf").write_text("deep")
    (share / "long-link").symlink_to(deep / "leaf")
    (share / os.fsdecode(b"link-\xff")).symlink_to(os.fsdecode(b"not-utf8-\xff\xfe"))
    staged = staged_by(bench, environment, way)
    new = staged.prefix / "share"
    for name in names:
        assert (new / name).read_text() == f"{name!r} {staged.prefix}"
        assert (new / f"{name[:250]}.d").is_dir()
    assert (new / "long-link").read_text() == (new / deep / "leaf").read_text() == "deep"
    assert sorted(os.listdir(os.fsencode(new))) == sorted(os.listdir(os.fsencode(share)))


def test_odd_names_are_shown(bench: Bench, environment: Environment) -> None:
    """Whatever is told of them, on any terminal: no name is a reason for an error of ours."""
    os.mkfifo(environment.prefix / os.fsdecode(b"pipe-\xff\n"))
    environ = bench.environ(PYTHONIOENCODING="ascii:strict")
    bench.stager("pack", environment.prefix, "--name", "it", env=environ)
    for command in (["inspect", "it"], ["inspect", "it", "--json"], ["list"], ["stage", "it"]):
        assert bench.stager(*command, env=environ).stdout.strip()


@every_way
def test_special_files_are_left_out(bench: Bench, environment: Environment, way: str) -> None:
    """A pipe does not hang the pack; none of them is in the copy, and the report says so."""
    site = environment.site_packages
    os.mkfifo(environment.prefix / "pipe")
    os.mkfifo(site / "pipe.py")
    os.mkfifo(environment.bin / "pipe")
    # Those that are looked into for what they say of the environment:
    (environment.bin / "activate").unlink()
    os.mkfifo(environment.bin / "activate")
    kernel = environment.prefix / "share/jupyter/kernels/one/kernel.json"
    kernel.parent.mkdir(parents=True)
    os.mkfifo(kernel)
    os.mknod(environment.prefix / "device", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    with socket.socket(socket.AF_UNIX) as listening:
        # Bound through a short name: a socket's path may have 107 bytes.
        os.symlink(environment.prefix, bench.root / "s")
        listening.bind(str(bench.root / "s" / "socket"))
        staged = staged_by(bench, environment, way)
    paths = {"pipe", f"{site.relative_to(environment.prefix)}/pipe.py", "bin/pipe", "device"}
    paths |= {"bin/activate", str(kernel.relative_to(environment.prefix))}
    assert set(staged.told("special")) == {*paths, "socket"}
    for path in paths | {"socket"}:
        assert not os.path.lexists(staged.prefix / path)


@every_way
def test_extended_attributes_stay_behind(bench: Bench, environment: Environment, way: str) -> None:
    """Neither a user's, nor capabilities, nor an access list comes along."""
    path = environment.prefix / "marked"
    path.write_text("content")
    os.setxattr(path, "user.note", b"x" * 100)
    # cap_net_raw, effective and permitted: linux/capability.h, revision 2.
    os.setxattr(path, "security.capability", bytes.fromhex("0100000200200000" + "00" * 12))
    assert set(os.listxattr(path)) == {"user.note", "security.capability"}
    staged = staged_by(bench, environment, way)
    assert (staged.prefix / "marked").read_text() == "content"
    assert os.listxattr(staged.prefix / "marked") == []


@every_way
def test_times(bench: Bench, environment: Environment, way: str) -> None:
    """Whole seconds, which bytecode is checked against; what an image cannot hold is clamped."""
    times = {"fraction": MADE + 0.999, "old": -5.0, "epoch": 0.0, "future": 2.0**32 + 5}
    for name, time in times.items():
        path = environment.prefix / name
        path.write_text("content")
        os.utime(path, ns=(int(time * 1e9), int(time * 1e9)))
    directory = environment.prefix / "share"
    directory.mkdir()
    os.utime(directory, (MADE, MADE))
    staged = staged_by(bench, environment, way)
    found = {name: (staged.prefix / name).stat().st_mtime for name in (*times, "share")}
    limit = 2**32 - 1
    assert found == {"fraction": MADE, "old": 0, "epoch": 0, "future": limit, "share": MADE}


@every_way
def test_large_files(bench: Bench, environment: Environment, way: str) -> None:
    """Sparse, and larger than what is held in memory; one has the prefix across two reads."""
    share = environment.prefix / "share"
    share.mkdir()
    with open(share / "sparse", "wb") as file:
        file.truncate(200 << 20)
        file.seek(100 << 20)
        file.write(b"middle")
    prefix = os.fsencode(environment.prefix)
    half = len(prefix) // 2
    (share / "binary").write_bytes(bytes((5 << 20) - half) + prefix + bytes(1 << 20))
    line = prefix + b"/some/file of a long list\n"
    (share / "text").write_bytes(line * ((6 << 20) // len(line)))
    staged = staged_by(bench, environment, way)
    new = staged.prefix / "share"
    assert run(["cmp", share / "sparse", new / "sparse"]).stdout == ""
    assert set(staged.told("leftover")) == {"share/binary"}
    assert (new / "binary").read_bytes() == (share / "binary").read_bytes()
    text = (share / "text").read_bytes().replace(prefix, os.fsencode(staged.prefix))
    assert (new / "text").read_bytes() == text


def test_more_files_than_a_short_number_can_count(bench: Bench, environment: Environment) -> None:
    """More than 65,536: some archive formats end there."""
    many = environment.prefix / "many"
    for directory in range(260):
        (many / f"{directory}").mkdir(parents=True)
        for number in range(256):
            os.close(os.open(f"{many}/{directory}/{number}", os.O_WRONLY | os.O_CREAT, 0o644))
    (many / "259" / "255").write_text("last")
    staged = bench.packed_and_staged(environment)
    assert staged.manifest["layers"][0]["files"] > 260 * 256
    assert sum(len(files) for _, _, files in os.walk(staged.prefix / "many")) == 260 * 256
    assert (staged.prefix / "many" / "259" / "255").read_text() == "last"


def test_ignore_files_are_not_obeyed(bench: Bench, environment: Environment) -> None:
    """uv and venv write ``.gitignore`` with ``*``; backup programs have a tag of their own."""
    (environment.prefix / ".gitignore").write_text("*\n")
    (environment.prefix / "CACHEDIR.TAG").write_text("Signature: 8a477f597d28d172789f06886806bc55")
    (environment.site_packages / "mod.py").write_text("WORD = 'there'\n")
    staged = bench.packed_and_staged(environment)
    assert staged.eval("mod.WORD", "mod") == "there"
    assert (staged.prefix / ".gitignore").read_text() == "*\n"


def test_exclude(bench: Bench, environment: Environment) -> None:
    site = environment.site_packages
    for path in ("pkg/tests/test_it.py", "pkg/__init__.py", "pkg/data.bin", "tests/kept.py"):
        (site / path).parent.mkdir(exist_ok=True, parents=True)
        (site / path).write_text("")
    options = ["--exclude", "*/pkg/tests", "--exclude", "*.bin"]
    staged = bench.packed_and_staged(environment, *options)
    left = {
        str(path.relative_to(staged.site_packages))
        for path in staged.site_packages.rglob("*")
        if "__pycache__" not in path.parts
    }
    assert left == {"pkg", "pkg/__init__.py", "tests", "tests/kept.py"}


def test_unreadable_files_are_named(bench: Bench, environment: Environment) -> None:
    """As a user: nothing is published, and every kind of file and place says which one it is."""
    site = environment.site_packages
    (site / "thing.dist-info").mkdir()
    (environment.prefix / "share").mkdir()
    for parent in (bench.root, environment.prefix):
        run(["chown", "-R", f"{NOBODY}:{NOBODY}", parent])
    as_nobody = _as_nobody()
    places = ("share/file", "bin/script", "bin/activate", "pyvenv.cfg")
    places += tuple(
        str((site / name).relative_to(environment.prefix))
        for name in (
            "module.py",
            "line.pth",
            "thing.egg-link",
            "thing.dist-info/RECORD",
            "__editable___x_finder.py",
        )
    )
    for place in places:
        path = environment.prefix / place
        before = path.read_bytes() if path.exists() else None
        path.write_bytes(before or b"content\n")
        os.chown(path, NOBODY, NOBODY)
        path.chmod(0)
        said = bench.expect(14, "pack", environment.prefix, prefix=as_nobody, env=_home(bench))
        assert str(path) in said, said
        assert not list(bench.root.glob("repository/*/*"))
        path.chmod(0o644)
        if before is None:
            path.unlink()
    directory = environment.prefix / "share"
    directory.chmod(0)
    said = bench.expect(14, "pack", environment.prefix, prefix=as_nobody, env=_home(bench))
    assert str(directory) in said
    directory.chmod(0o755)
    bench.stager("pack", environment.prefix, prefix=as_nobody, env=_home(bench))


def _as_nobody() -> list[str]:
    return ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]


def _home(bench: Bench) -> dict[str, str]:
    return bench.environ(HOME=str(bench.root), TMPDIR=str(bench.root))


@every_way
def test_another_user_owns_what_he_stages(bench: Bench, environment: Environment, way: str) -> None:
    """Not root, who made the environment, nor whoever packed it."""
    os.chown(bench.root, NOBODY, NOBODY)
    format_ = "tar.zst" if way == "archive" else "squashfs"
    options = ["--how", "extract"] if way != "mount" else ["--how", "mount"]
    script = (
        # /dev/fuse is for everybody on a real node; here for whoever is in this namespace.
        'mknod -m 666 "$1/fuse" c 10 229 && mount --bind "$1/fuse" /dev/fuse && shift && '
        f"exec {workbench.shell_words(*_as_nobody())} sh -euc "
        '\'umask 077; stager=$1; shift; "$stager" pack "$1" --name it --format "$2" >/dev/null;'
        ' p=$("$stager" stage it --how "$3"); "$p/bin/python" -c "import sys; print(sys.prefix)";'
        ' stat -c "%u %a" "$p/pyvenv.cfg" "$p/bin";'
        ' test "$3" = extract || fusermount3 -u "$p"\' sh "$@"'
    )
    argv = ["unshare", "--mount", "--propagation", "private", "sh", "-euc", script, "sh"]
    argv += [str(bench.root), str(environments.VENV / "bin" / "stager"), str(environment.prefix)]
    said = run([*argv, format_, options[1]], env=_home(bench)).stdout.splitlines()
    assert said[0].startswith(f"{bench.store}/envs/")
    owner = 0 if way == "mount" else NOBODY  # a mounted image shows root; nobody can write to it
    assert said[1:] == [f"{owner} 644", f"{owner} 755"]
    for path in [bench.store, bench.repository]:
        assert (path.stat().st_uid, stat.S_IMODE(path.stat().st_mode)) == (NOBODY, 0o700)
    (image,) = bench.repository.glob("images/*")
    assert stat.S_IMODE(image.stat().st_mode) == 0o600  # what the umask leaves


@pytest.mark.parametrize("umask", ["022", "027"])
def test_modes_of_published_files_follow_the_umask(
    bench: Bench, environment: Environment, umask: str
) -> None:
    """The directory is private; a site that opens it shares what is in it."""
    program = environments.VENV / "bin" / "stager"
    code = f"umask {umask}; {workbench.shell_words(program, 'pack', environment.prefix)}"
    run(["sh", "-euc", code], env=bench.environ())
    assert stat.S_IMODE(bench.repository.stat().st_mode) == 0o700
    files = [*bench.repository.glob("images/*"), *bench.repository.glob("manifests/*")]
    assert len(files) == 2
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~int(umask, 8)}


def test_every_way_gives_the_same_tree(bench: Bench, venv_stdlib: Environment) -> None:
    """Mounted, unpacked, or from an archive: the same paths, bytes, modes and times."""
    trees = []
    for name, format_, how in (
        ("squashfs", "squashfs", "mount"),
        ("squashfs", "squashfs", "extract"),
        ("archive", "tar.zst", "extract"),
    ):
        bench.pack(venv_stdlib, "--format", format_, name=name)
        bench.stager("release")
        bench.stager("collect", "--all")
        assert list(bench.store.glob("envs/*")) == []
        staged = bench.stage("--how", how, name=name)
        assert staged.how == ("mounted" if how == "mount" else "extracted")
        trees.append(content_of(staged.prefix))
    first, *others = trees
    assert len(first) > 1000
    for other in others:
        assert other.keys() == first.keys()
        assert {path for path in first if first[path] != other[path]} == set()


def test_image_is_what_other_tools_read(bench: Bench, environment: Environment) -> None:
    """``zstd``, GNU tar and Python read an archive, and see the same members in it."""
    (environment.prefix / "a").write_text("content")
    (environment.prefix / "b").hardlink_to(environment.prefix / "a")
    bench.pack(environment, "--format", "tar.zst")
    (image,) = bench.repository.glob("images/*.tar.zst")
    listed = run(["tar", "--zstd", "-tf", image]).stdout.splitlines()
    assert {"./", "a", "b", "bin/", "bin/python", "pyvenv.cfg"} <= set(listed)
    assert len(listed) == bench.json("inspect", "it")["layers"][0]["files"]
    assert "XXH64" in run(["zstd", "-lv", image]).stdout
    plain = bench.root / "plain.tar"
    run(["zstd", "-dq", image, "-o", plain])
    with tarfile.open(plain) as archive:
        members = archive.getmembers()
    assert [member.name for member in members] == [name.rstrip("/") for name in listed]
    contents = {member.name: (member.isreg(), member.size) for member in members}
    assert contents["a"] == contents["b"] == (True, len("content"))
