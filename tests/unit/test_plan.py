"""From entries to items: where links will lead, what modes become, which bytecode is kept."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from stager import walk
from stager.manifest import Finding
from stager.packing import plan
from stager.packing.plan import Item, Place
from stager.rewriting.relocate import Move, Relocation
from stager.walk import DIRECTORY, FILE, LINK, SPECIAL, Entry, Excluder

pytestmark = pytest.mark.unit

LIBRARY = "lib/python3.11"
TAG = "cpython-311"


def make_place(tmp: Path, **changes: object) -> Place:
    """An environment, known by two names, on a base; both will lie in a store."""
    root, alias, base, store = (f"{tmp}/{name}" for name in ("env", "alias", "base", "store"))
    moves = [
        Move(root, f"{store}/1111"),
        Move(alias, f"{store}/1111"),
        Move(base, f"{store}/2222"),
    ]
    values: dict[str, object] = {
        "root": root,
        "destination": f"{store}/1111",
        "relocation": Relocation(moves),
        "python_directories": (LIBRARY,),
        "tag": TAG,
        "interpreter": f"{store}/2222/bin/python3.11",
        "base_executable": f"{base}/bin/python3.11",
        "local": (f"{tmp}/local",),
    }
    return Place(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    tmp = tmp_path.resolve()
    for path in (
        "env/lib/x", f"env/{LIBRARY}/site-packages/mod.py", "env/bin/script", "base/bin/python3.11",
        "base/lib/y", "local/z", "elsewhere/file", "elsewhere/dir/file",
    ):  # fmt: skip
        (tmp / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp / path).write_text(path)
    (tmp / "alias").symlink_to("env")
    (tmp / "unknown").symlink_to("env")
    (tmp / "base/bin/python").symlink_to("python3.11")
    (tmp / "elsewhere/to-local").symlink_to(tmp / "local/z")
    (tmp / "elsewhere/to-env").symlink_to(tmp / "env/lib/x")
    return make_place(tmp)


def link(place: Place, path: str, target: str) -> tuple[str, list[Finding]]:
    """Where a link in the environment will lead, and what is told of it."""
    tmp = os.path.dirname(place.root)
    source = os.path.join(place.root, path)
    os.makedirs(os.path.dirname(source), exist_ok=True)
    os.symlink(target.replace("{}", tmp), source)
    items, findings = plan.make(place, [walk.entry(path, source)], compile_all=False)
    assert [(item.path, item.kind, item.mode) for item in items] == [(path, "symlink", 0o777)]
    return items[0].target.replace(tmp, "{}"), findings


INSIDE = [
    # path of the link, where it leads, where it will lead
    ("lib/same", "x", "x"),
    ("bin/relative", "../lib/x", "../lib/x"),
    ("bin/absolute", "{}/env/lib/x", "../lib/x"),
    ("lib/absolute", "{}/env/lib/x", "x"),
    ("absolute", "{}/env/lib/x", "lib/x"),
    ("bin/by-its-other-name", "{}/alias/lib/x", "../lib/x"),
    ("bin/by-an-unknown-name", "{}/unknown/lib/x", "../lib/x"),
    ("bin/through-a-link", "{}/elsewhere/to-env", "../lib/x"),
    ("bin/out-and-in-again", "../../env/lib/x", "../lib/x"),
    ("bin/out-and-in-by-its-other-name", "../../alias/lib/x", "../lib/x"),
    ("bin/around", "../lib/../lib/./x", "../lib/../lib/./x"),
    ("lib64", "lib", "lib"),
    ("lib/directory", "{}/env/lib", "."),
    ("lib/up", "..", ".."),
    ("root", "{}/env", "."),
    ("bin/root", "{}/alias", ".."),
    ("bin/base", "{}/base/lib/y", "../../2222/lib/y"),
    ("bin/base-relative", "../../base/lib/y", "../../2222/lib/y"),
    ("base-root", "{}/base", "../2222"),
    ("bin/python", "{}/base/bin/python3.11", "../../2222/bin/python3.11"),
    ("bin/python3", "{}/base/bin/python", "../../2222/bin/python3.11"),
    ("bin/python3.11", "../../base/bin/python", "../../2222/bin/python3.11"),
    ("bin/tool", "{}/base/bin/python", "../../2222/bin/python"),
]


@pytest.mark.parametrize(("path", "target", "expected"), INSIDE)
def test_a_link_to_what_is_packed_becomes_relative(
    place: Place, path: str, target: str, expected: str
) -> None:
    assert link(place, path, target) == (expected, [])


def test_links_lead_to_the_same_with_the_originals_gone(place: Place) -> None:
    tmp = Path(place.root).parent
    for path, target, _ in INSIDE:
        os.symlink(target.replace("{}", str(tmp)), os.path.join(place.root, path))
    before = {path: os.path.realpath(f"{place.root}/{path}") for path, *_ in INSIDE}
    items, _ = plan.make(place, walk.walk(place.root, Excluder(())), compile_all=False)
    shutil.copytree(place.root, place.destination, symlinks=True)
    for item in items:
        if item.kind == "symlink":
            os.unlink(f"{place.destination}/{item.path}")
            os.symlink(item.target, f"{place.destination}/{item.path}")
    os.rename(place.root, tmp / "gone")
    os.rename(tmp / "base", tmp / "store" / "2222")
    for name in ("alias", "unknown"):
        os.unlink(tmp / name)
    for path, target in before.items():
        after = os.path.realpath(f"{place.destination}/{path}")
        assert os.path.exists(after), path
        assert after == place.relocation.path(target), path


def test_a_link_to_another_link_of_the_interpreter_stays_beside_it(place: Place) -> None:
    os.symlink(place.base_executable, f"{place.root}/bin/python")
    assert link(place, "bin/python3", "python") == ("python", [])
    assert link(place, "bin/python3.11", f"{place.root}/bin/python3") == ("python3", [])


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("{}/local/z", "{}/local/z"),
        ("../../local/z", "{}/local/z"),
        ("{}/local/not-here", "{}/local/not-here"),
        ("{}/elsewhere/to-local", "{}/local/z"),
        ("{}/local", "{}/local"),
    ],
)
def test_a_link_to_the_nodes_own_disk_becomes_absolute(
    place: Place, target: str, expected: str
) -> None:
    assert link(place, "bin/x", target) == (expected, [])


def test_an_interpreter_of_the_nodes_own_stays(tmp_path: Path) -> None:
    tmp = tmp_path.resolve()
    (tmp / "env" / "bin").mkdir(parents=True)
    (tmp / "local").mkdir()
    python = tmp / "local" / "python3.11"
    python.touch()
    own = make_place(tmp, interpreter=str(python), base_executable=str(python))
    (tmp / "local" / "python3").symlink_to("python3.11")
    assert link(own, "bin/python", "{}/local/python3") == ("{}/local/python3.11", [])


@pytest.mark.parametrize(
    "target", ["{}/elsewhere/file", "../../elsewhere/file", "{}/elsewhere/dir"]
)
def test_a_link_that_leads_away_is_kept_and_told(place: Place, target: str) -> None:
    found, findings = link(place, "share/x", target)
    assert found.startswith("{}/elsewhere/")
    assert [(one.path, one.code, one.severity) for one in findings] == [
        ("share/x", "link", "warning")
    ]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("{}/env/lib/none", "../lib/none"),
        ("../lib/none", "../lib/none"),
        ("{}/base/none", "../../2222/none"),
        ("/no/such/place", "/no/such/place"),
        ("x", "x"),
        ("{}/env/bin/x", "x"),
    ],
)
def test_a_link_to_nothing_is_kept_and_told(place: Place, target: str, expected: str) -> None:
    found, findings = link(place, "bin/x", target)
    assert found == expected
    assert [(one.path, one.code, one.severity) for one in findings] == [
        ("bin/x", "dangling", "note")
    ]


def test_links_in_a_circle(place: Place) -> None:
    os.symlink("two", f"{place.root}/bin/one")
    found, findings = link(place, "bin/two", "{}/env/bin/one")
    assert (found, [one.code for one in findings]) == ("one", ["dangling"])


@pytest.mark.parametrize(
    ("target", "leaves"),
    [
        ("{}/elsewhere/file", True),
        ("../../elsewhere/dir", True),
        ("{}/elsewhere/to-local", False),
        ("{}/elsewhere/to-env", False),
        ("{}/local/z", False),
        ("{}/env/lib/x", False),
        ("{}/alias/lib/x", False),
        ("{}/unknown/lib/x", False),
        ("{}/base/lib/y", False),
        ("{}/base/bin/python", False),
        ("/no/such/place", False),
        ("x", False),
    ],
)
def test_what_leaves_is_what_would_be_taken_in(place: Place, target: str, leaves: bool) -> None:
    source = f"{place.root}/bin/x"
    os.symlink(target.replace("{}", os.path.dirname(place.root)), source)
    assert plan.leaves(place, walk.entry("bin/x", source)) is leaves
    assert not plan.leaves(place, walk.entry("lib/x", f"{place.root}/lib/x"))


# Without links: entries need not exist


def entry(path: str, kind: str = FILE, mode: int = 0o644, seconds: float = 1000) -> Entry:
    return Entry(path, f"/src/{path}", kind, mode, 1, int(seconds * 10**9), 1)


def make(
    entries: Sequence[Entry | str], *, compile_all: bool = True, **changes: object
) -> tuple[dict[str, Item], list[Finding]]:
    found = [entry(one) if isinstance(one, str) else one for one in entries]
    items, findings = plan.make(make_place(Path("/x/y"), **changes), found, compile_all=compile_all)
    assert len({item.path for item in items}) == len(items)
    return {item.path: item for item in items}, findings


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (0o644, 0o644),
        (0o600, 0o644),
        (0o400, 0o444),
        (0o000, 0o444),
        (0o664, 0o644),
        (0o666, 0o644),
        (0o755, 0o755),
        (0o700, 0o755),
        (0o500, 0o555),
        (0o777, 0o755),
        (0o4755, 0o755),
        (0o2711, 0o755),
        (0o1777, 0o755),
        (0o610, 0o755),
    ],
)
def test_modes(before: int, after: int) -> None:
    items, _ = make([entry("f", mode=before), entry("d", DIRECTORY, before)])
    assert items["f"].mode == after
    assert items["d"].mode == 0o755


@pytest.mark.parametrize(
    ("seconds", "kept"),
    [
        (1.999999999, 1),
        (0, 0),
        (-5, 0),
        (2**32 - 1, 2**32 - 1),
        (2**32, 2**32 - 1),
        (2**40, 2**32 - 1),
    ],
)
def test_times_are_whole_seconds_of_32_bits(seconds: float, kept: int) -> None:
    items, _ = make([entry("f", seconds=seconds), entry("d", DIRECTORY, seconds=seconds)])
    assert (items["f"].mtime, items["d"].mtime) == (kept, kept)


def test_special_files_are_left_out_and_told() -> None:
    items, findings = make([entry("bin/pipe", SPECIAL), "bin/x"])
    assert list(items) == ["bin/x"]
    assert [(one.path, one.code, one.severity) for one in findings] == [
        ("bin/pipe", "special", "note")
    ]


def test_copies_of_the_interpreter_become_links() -> None:
    items, _ = make(["bin/python", "bin/other"], copies_of_python=frozenset({"bin/python"}))
    assert (items["bin/python"].kind, items["bin/python"].target) == (
        "symlink",
        "../../2222/bin/python3.11",
    )
    assert items["bin/other"].kind == "file"


SITE = f"{LIBRARY}/site-packages"


def test_bytecode_goes_with_its_source() -> None:
    items, findings = make([f"{SITE}/a.py", f"{SITE}/__pycache__/a.{TAG}.pyc"], compile_all=False)
    item = items[f"{SITE}/a.py"]
    assert item.tag == TAG
    assert item.pyc is not None
    assert item.pyc.path == f"{SITE}/__pycache__/a.{TAG}.pyc"
    assert f"{SITE}/__pycache__/a.{TAG}.pyc" not in items  # made from the source's item
    assert not findings


def test_bytecode_that_nobody_would_load_is_dropped_and_counted() -> None:
    cache = f"{SITE}/__pycache__"
    items, findings = make(
        [f"{SITE}/a.py", f"{cache}/a.{TAG}.pyc", f"{cache}/a.cpython-39.pyc"]
        + [f"{cache}/a.{TAG}.opt-1.pyc", f"{cache}/gone.{TAG}.pyc", f"{SITE}/without_source.pyc"]
        + [entry(cache, DIRECTORY), f"{cache}/notes.txt"]
    )
    assert set(items) == {f"{SITE}/a.py", f"{SITE}/without_source.pyc", cache, f"{cache}/notes.txt"}
    assert [(one.code, one.severity) for one in findings] == [("bytecode", "note")]
    assert findings[0].reason.startswith("3 ")


def test_bytecode_of_a_module_that_is_a_link_is_not_paired(tmp_path: Path) -> None:
    module = entry(f"{SITE}/a.py", LINK)._replace(target="b.py")
    items, _ = make([module, f"{SITE}/b.py", f"{SITE}/__pycache__/a.{TAG}.pyc"])
    assert items[f"{SITE}/a.py"].kind == "symlink"
    assert items[f"{SITE}/b.py"].pyc is None


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        (f"{SITE}/a.py", True),
        (f"{SITE}/pkg/__init__.py", True),
        (f"{LIBRARY}/abc.py", True),
        (f"{SITE}/not-a-module.py", False),
        (f"{SITE}/a.b.py", False),
        (f"{SITE}/a.pyi", False),
        (f"{SITE}/a.so", False),
        ("share/doc/example.py", False),
        ("bin/script.py", False),
        (f"{LIBRARY}2/a.py", False),
    ],
)
def test_what_is_compiled(path: str, wanted: bool) -> None:
    assert make([path])[0][path].tag == (TAG if wanted else "")
    assert make([path], compile_all=False)[0][path].tag == ""
    cache = os.path.dirname(path) + "/__pycache__"
    assert (cache in make([path])[0]) is wanted


def test_a_new_directory_for_bytecode_is_made_once() -> None:
    items, _ = make(
        ["share/a.py", f"{SITE}/a.py", f"{SITE}/b.py", "a.py", f"__pycache__/a.{TAG}.pyc"]
    )
    new = {path: item for path, item in items.items() if item.kind == "dir"}
    assert set(new) == {f"{SITE}/__pycache__", "__pycache__"}
    assert all((item.entry, item.mode, item.mtime) == (None, 0o755, 1000) for item in new.values())


@pytest.mark.parametrize("kind", [FILE, LINK])
def test_what_keeps_bytecode_away_gives_way_to_it(kind: str) -> None:
    """A file, or a link to nothing: no image can have both it and a directory of its name."""
    cache = f"{SITE}/__pycache__"
    other = entry(cache, kind)._replace(target="/dev/null" if kind == LINK else "")
    module = f"{SITE}/a.py"
    items, _ = make([other, module])
    assert (len(items), items[cache].kind) == (2, "dir")
    assert make([other, module], compile_all=False)[0][cache].kind != "dir"


def test_the_order_of_writing() -> None:
    directories = (".", "a", "a/b", "a-b", "a/x.dist-info", "a/__pycache__")
    entries = [
        *[entry(one, DIRECTORY) for one in directories],
        *[entry(one) for one in ("z", "a/f", "a/b/g", "a-b/h", "a.py", "a/x.dist-info/METADATA")],
        entry("a/x.dist-info/RECORD"), entry("a/RECORD"), entry("b.dist-info/RECORD"),
        entry(f"a/__pycache__/m.{TAG}.pyc"), entry("a/m.py"),
    ]  # fmt: skip
    expected = [
        ".", "a.py", "z", "a", "a/RECORD", "a/f", "a/m.py", "a/__pycache__", "a/b", "a/b/g",
        "a/x.dist-info", "a/x.dist-info/METADATA", "a-b", "a-b/h",
        "a/x.dist-info/RECORD", "b.dist-info/RECORD",
    ]  # fmt: skip
    for seed in range(5):
        random.Random(seed).shuffle(entries)
        items, _ = plan.make(make_place(Path("/x/y")), entries, compile_all=False)
        assert [item.path for item in items] == expected
    assert [item.path for item in items if item.kind == "record"] == expected[-2:]


def test_a_directory_comes_before_everything_in_it() -> None:
    names = ["a", "b", "a.b", "a-b", "A", "__pycache__"]
    entries = [entry(".", DIRECTORY)]
    for one in names:
        entries.append(entry(one, DIRECTORY))
        for two in names:
            entries += [entry(f"{one}/{two}", DIRECTORY), entry(f"{one}/{two}/file")]
    random.Random(1).shuffle(entries)
    items, _ = plan.make(make_place(Path("/x/y")), entries, compile_all=False)
    seen = {""}
    for item in items:
        assert item.path == "." or os.path.dirname(item.path) in seen
        if item.kind == "dir":
            seen.add(item.path)
