"""Looking at a tree: every entry once, in order, without following a link."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from stager import walk
from stager.walk import DIRECTORY, FILE, LINK, SPECIAL, Entry, Excluder

pytestmark = pytest.mark.unit

NOTHING = Excluder(())


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    for path in ("a/b/c", "a-b", "z/.hidden", "empty"):
        (root / path).mkdir(parents=True)
    for path in ("a/file", "a/b/c/deep", "a.py", "z/.hidden/x"):
        (root / path).write_text(path)
    (root / "a" / "up").symlink_to("../z")
    (root / "loop").symlink_to(".")
    (root / "gone").symlink_to("/no/such/place")
    return root


def test_every_entry_once_sorted_by_path(tree: Path) -> None:
    found = walk.walk(str(tree), NOTHING)
    expected = {".": str(tree)}
    for parent, directories, files in os.walk(tree):
        for name in (*directories, *files):
            path = os.path.join(parent, name)
            expected[os.path.relpath(path, tree)] = path
    assert {entry.path: entry.source for entry in found} == expected
    assert [entry.path for entry in found] == sorted(expected)


def test_what_is_known_of_an_entry(tree: Path) -> None:
    os.chmod(tree / "a.py", 0o4751)
    os.utime(tree / "a.py", ns=(1, 1_234_567_890_123_456_789))
    info = (tree / "a.py").stat()
    assert walk.entry("x/a.py", str(tree / "a.py")) == Entry(
        path="x/a.py",
        source=str(tree / "a.py"),
        kind=FILE,
        mode=0o4751,
        size=4,
        mtime_ns=1_234_567_890_123_456_789,
        inode=info.st_ino,
    )


def test_kinds(tree: Path) -> None:
    os.mkfifo(tree / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        here = os.getcwd()
        os.chdir(tree)  # the path of a socket is short
        try:
            listening.bind("socket")
        finally:
            os.chdir(here)
    found = {entry.path: entry for entry in walk.walk(str(tree), NOTHING)}
    assert found["pipe"].kind == found["socket"].kind == SPECIAL
    assert found["empty"].kind == DIRECTORY
    assert found["a/up"].kind == LINK
    assert (found["a/up"].target, found["loop"].target) == ("../z", ".")
    assert found["gone"].target == "/no/such/place"
    assert not any(entry.size for entry in found.values() if entry.kind != FILE)


def test_a_root_that_is_a_link_is_told_as_one(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(tree)
    assert walk.walk(f"{tmp_path}/alias/.", NOTHING)[0].kind == DIRECTORY


def test_a_subtree_takes_its_place(tree: Path) -> None:
    found = walk.walk(str(tree / "a"), Excluder(("x/y/b",)), at="x/y")
    assert [entry.path for entry in found] == ["x/y", "x/y/file", "x/y/up"]
    assert found[1].source == str(tree / "a" / "file")


@pytest.mark.parametrize(
    ("patterns", "path", "out"),
    [
        (["*.a"], "lib/x.a", True),
        (["*.a"], "lib/x.ab", False),
        (["test"], "lib/test", True),
        (["test"], "lib/tests", False),
        (["test"], "test/x", False),  # its directory is left out, so nobody asks
        (["lib/test"], "lib/test", True),
        (["lib/test"], "other/lib/test", False),
        (["lib/*"], "lib/a/b", True),
        (["A*"], "a", False),
        ([".git"], "x/.git", True),
        (["[ab]"], "b", True),
        (["docs", "*.md"], "x.md", True),
        ([], "anything", False),
    ],
)
def test_what_is_left_out(patterns: list[str], path: str, out: bool) -> None:
    assert Excluder(patterns)(path) is out


def test_what_is_left_out_with_its_directory() -> None:
    assert Excluder(("/share",)).leaves_out("share/stager/images")
    assert not Excluder(("stager",)).leaves_out("share/stagers")
    assert not Excluder((), ("lib",)).leaves_out("lib/a/b")
    assert Excluder((), ("lib",)).leaves_out("share")
    assert not Excluder(("share",)).leaves_out(".")


@pytest.mark.parametrize(
    ("path", "out"),
    [
        (".", False), ("lib", False), ("lib/python3.11", False), ("lib/python3.11/x/y.py", False),
        ("lib/python3.12", True), ("lib/python3.11x", True), ("bin", False), ("bin/tool", False),
        ("bin/tool2", True), ("share", True), ("lib/python3.11/left-out", True),
    ],
)  # fmt: skip
def test_only_what_is_named_and_the_way_to_it(path: str, out: bool) -> None:
    kept = Excluder(("left-out",), ("lib/python3.11", "bin/tool"))
    assert kept(path) is out
    assert kept.partial == {".", "lib", "bin"}


def test_nothing_below_what_is_left_out_is_looked_at(tree: Path) -> None:
    found = {entry.path for entry in walk.walk(str(tree), Excluder(("b", "z")))}
    assert found == {".", "a", "a/file", "a/up", "a-b", "a.py", "empty", "loop", "gone"}


def test_names_that_are_no_text(tree: Path) -> None:
    (tree / os.fsdecode(b"\xff\xfe")).write_text("x")
    (tree / "new\nline").write_text("x")
    paths = [entry.path for entry in walk.walk(str(tree), NOTHING)]
    assert "\udcff\udcfe" in paths
    assert "new\nline" in paths
    assert walk.fingerprint(walk.walk(str(tree), NOTHING))


def test_many_threads_find_the_same(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(40):
        (tree / f"d{number}" / "sub").mkdir(parents=True)
        (tree / f"d{number}" / "sub" / "file").write_text("x")
    alone = walk.walk(str(tree), NOTHING)
    monkeypatch.setattr(walk, "_SLOW_STAT", 0.0)
    assert walk.walk(str(tree), NOTHING) == alone


@pytest.mark.parametrize("slow", [False, True])
def test_a_directory_that_cannot_be_listed_is_an_error(
    tree: Path, monkeypatch: pytest.MonkeyPatch, slow: bool
) -> None:
    if slow:
        monkeypatch.setattr(walk, "_SLOW_STAT", 0.0)
    real = os.scandir

    def scandir(path: str) -> object:
        if path.endswith("/c"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError):
        walk.walk(str(tree), NOTHING)


# The fingerprint


def first(change: Callable[[Path], object], tree: Path) -> tuple[str, str]:
    before = walk.fingerprint(walk.walk(str(tree), NOTHING))
    change(tree)
    return before, walk.fingerprint(walk.walk(str(tree), NOTHING))


def keeping_times(change: Callable[[Path], object]) -> Callable[[Path], object]:
    def changed(tree: Path) -> None:
        times = [(path, path.lstat().st_mtime_ns) for path in (tree, *tree.rglob("*"))]
        change(tree)
        for path, at in times:
            if path.exists() and not path.is_symlink():
                os.utime(path, ns=(at, at))

    return changed


def replace_link(tree: Path) -> None:
    info = (tree / "a" / "up").lstat()
    (tree / "a" / "up").unlink()
    (tree / "a" / "up").symlink_to("../y")
    os.utime(tree / "a" / "up", ns=(info.st_mtime_ns, info.st_mtime_ns), follow_symlinks=False)


CHANGES: dict[str, Callable[[Path], object]] = {
    "a time": lambda tree: os.utime(tree / "a.py", ns=(5, 5)),
    "a size": keeping_times(lambda tree: (tree / "a.py").write_text("longer than before")),
    "a mode": lambda tree: (tree / "a.py").chmod(0o600),
    "a link": keeping_times(replace_link),
    "a name": keeping_times(lambda tree: (tree / "a.py").rename(tree / "b.py")),
    "a new file": keeping_times(lambda tree: (tree / "new").touch()),
    "one file less": keeping_times(lambda tree: (tree / "a.py").unlink()),
    "a time by a nanosecond": lambda tree: os.utime(
        tree / "a.py", ns=(0, (tree / "a.py").stat().st_mtime_ns + 1)
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_changes_the_fingerprint(tree: Path, change: str) -> None:
    before, after = first(CHANGES[change], tree)
    assert before != after


def test_reading_and_copying_elsewhere_do_not_change_it(tree: Path, tmp_path: Path) -> None:
    before, after = first(lambda tree: (tree / "a.py").read_bytes(), tree)
    assert before == after
    tree.rename(tmp_path / "moved")
    assert walk.fingerprint(walk.walk(str(tmp_path / "moved"), NOTHING)) == before


def test_a_fingerprint_is_16_hex_digits_and_holds_more_than_the_entries() -> None:
    plain = walk.fingerprint([])
    assert len(plain) == 16
    assert int(plain, 16) >= 0
    assert (
        len({plain, walk.fingerprint([], 1), walk.fingerprint([], "1"), walk.fingerprint([], 1, 1)})
        == 4
    )


def test_names_with_newlines_do_not_run_into_each_other() -> None:
    def tree(target: str, name: str) -> list[Entry]:
        return [Entry("a", "", LINK, 0, 0, 0, 0, target), Entry(name, "", FILE, 0, 0, 0, 0)]

    assert walk.fingerprint(tree("x", "b\nc")) != walk.fingerprint(tree("x\nb", "c"))


@pytest.mark.parametrize(("seconds", "slow"), [(0.02, True), (0.0001, False)])
def test_a_slow_file_system_is_told_by_the_time_of_an_entry(
    tree: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, slow: bool
) -> None:
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += seconds
        return now

    monkeypatch.setattr(walk.time, "monotonic", clock)
    assert walk.timed(str(tree), NOTHING)[1] is slow


def test_a_large_directory_is_shared_by_the_threads_of_a_slow_file_system(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(walk.SLOW_WORKERS):
        (tree / "empty" / str(number)).touch()
    monkeypatch.setattr(walk, "_SLOW_STAT", 0.0)
    monkeypatch.setattr(walk, "_TOGETHER", 1)
    together = threading.Barrier(walk.SLOW_WORKERS, timeout=30)
    real = walk._entries

    def entries(children: list[walk._Child]) -> list[Entry]:
        if children[0].path.startswith("empty/"):
            together.wait()  # no thread goes on before all of them have one entry to look at
        return real(children)

    monkeypatch.setattr(walk, "_entries", entries)
    assert len(walk.walk(f"{tree}", NOTHING)) == len(list(tree.rglob("*"))) + 1
