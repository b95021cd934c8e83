"""The bytes of an image: rewritten on the way, consistent, and never of a file that changed."""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib.util
import io
import marshal
import os
import py_compile
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from py_compile import PycInvalidationMode

import pytest

from environments import BASE_PYTHON, run
from stager import walk
from stager.errors import DeniedError, IntegrityError
from stager.formats.tarstream import Member
from stager.packing import plan, produce, reading
from stager.packing.plan import Place
from stager.packing.produce import SMALL, Outcome, Producer
from stager.rewriting import bytecode
from stager.rewriting.bytecode import Compiler
from stager.rewriting.relocate import Move, Relocation
from stager.walk import Excluder

pytestmark = pytest.mark.unit

TAG = sys.implementation.cache_tag
LIBRARY = "lib/python3"
SITE = f"{LIBRARY}/site-packages"
NEW = "/tmp/s/envs/0123456789abcdef"
BASE = "/tmp/s/envs/fedcba9876543210"
SECONDS = 1_700_000_000


@dataclass
class Collected:
    """A sink that keeps everything; what it is given must be what was announced."""

    content: dict[str, bytes] = field(default_factory=dict)
    members: dict[str, Member] = field(default_factory=dict)

    def write_member(self, member: Member, data: produce.Data = b"") -> None:
        # A piece is good until the next one is asked for.
        whole = data if isinstance(data, bytes) else b"".join(map(bytes, data))
        assert member.path not in self.members
        assert len(whole) == member.size
        self.content[member.path] = whole
        self.members[member.path] = member


@pytest.fixture(scope="module")
def compiler() -> Iterator[Compiler]:
    with Compiler(str(BASE_PYTHON), 2) as made:
        yield made


class Tree:
    """A small environment, and what producing it gives."""

    def __init__(self, root: Path, compiler: Compiler) -> None:
        self.root = root
        self.alias = str(root.parent / "other-name")
        root.mkdir()
        self._compiler = compiler
        self.outcome = Outcome()

    def write(self, path: str, content: str | bytes, *, mode: int = 0o644) -> Path:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            content = content.replace("{}", str(self.root)).encode("utf-8", "surrogateescape")
        target.write_bytes(content)
        target.chmod(mode)
        os.utime(target, (SECONDS, SECONDS))
        return target

    @property
    def place(self) -> Place:
        return Place(
            root=str(self.root),
            destination=NEW,
            relocation=Relocation(
                [Move(str(self.root), NEW), Move(self.alias, NEW), Move("/opt/base-python", BASE)]
            ),
            python_directories=(LIBRARY, ".stager/editable"),
            tag=TAG,
            interpreter=f"{BASE}/bin/python3",
            base_executable="/opt/base-python/bin/python3",
            local=("/usr",),
        )

    def produce(
        self,
        *,
        slow: bool = False,
        compile_all: bool = False,
        meanwhile: Callable[[], object] = lambda: None,
        place: Place | None = None,
    ) -> Collected:
        entries = walk.walk(str(self.root), Excluder(()))
        meanwhile()
        place = place or self.place
        items, _ = plan.make(place, entries, compile_all=compile_all)
        sink = Collected()
        magic = importlib.util.MAGIC_NUMBER
        producer = Producer(place, (str(self.root), self.alias), magic, self._compiler)
        written = list(producer.write(items, sink, slow=slow))
        assert written == items
        self.outcome = producer.outcome
        assert self.outcome.files == len(sink.members)
        assert self.outcome.bytes == sum(map(len, sink.content.values()))
        return sink

    def after(self, path: str, content: str | bytes, **options: bool) -> bytes:
        self.write(path, content)
        return self.produce(**options).content[path]  # type: ignore[arg-type]

    def codes(self) -> dict[str, str]:
        return {one.path: one.code for one in self.outcome.findings}


@pytest.fixture
def tree(tmp_path: Path, compiler: Compiler) -> Tree:
    return Tree(tmp_path.resolve() / "environment", compiler)


# Contents


@pytest.mark.parametrize("slow", [False, True])
def test_everything_is_written_as_planned(tree: Tree, slow: bool) -> None:
    for number in range(600):  # more than are read ahead
        tree.write(f"share/d{number % 7}/f{number}", f"{number} at {{}}/x\n", mode=0o600)
    (tree.root / "link").symlink_to("share")
    found = tree.produce(slow=slow)
    assert found.content["share/d5/f5"] == f"5 at {NEW}/x\n".encode()
    assert len(found.members) == 600 + 7 + 3
    assert found.members["link"] == Member(
        "link", "symlink", 0o777, found.members["link"].mtime, 0, "share"
    )
    assert found.members["share/d0/f0"].mode == 0o644
    assert found.members["share/d0/f0"].mtime == SECONDS
    assert len(tree.outcome.rewritten) == 600
    assert tree.outcome.findings == []


def test_a_file_without_the_path_is_handed_on_as_it_is(tree: Tree) -> None:
    content = bytes(range(256)) * 3
    assert tree.after("data", content) == content
    assert tree.outcome.rewritten == {}


def test_an_empty_file(tree: Tree) -> None:
    assert tree.after("empty", b"") == b""


def test_a_script_that_is_run_by_the_environment(tree: Tree) -> None:
    tree.write("bin/tool", "#!{}/bin/python -I\nX = '{}'\n", mode=0o775)
    found = tree.produce()
    assert found.content["bin/tool"] == f"#!{NEW}/bin/python -I\nX = '{NEW}'\n".encode()
    assert found.members["bin/tool"].mode == 0o755


def test_the_configuration_of_the_environment(tree: Tree) -> None:
    found = tree.after(
        "pyvenv.cfg",
        "home = /opt/base-python/bin\nversion = 3.11.2\n"
        "executable = /opt/base-python/bin/python3.11\n"
        "command = /opt/base-python/bin/python3 -m venv --prompt=a=b {}\nprompt = a=b\n",
    )
    assert found.decode() == (
        f"home = {BASE}/bin\nversion = 3.11.2\nexecutable = {BASE}/bin/python3\n"
        f"command = {BASE}/bin/python3 -m venv --prompt=a=b {NEW}\nprompt = a=b\n"
    )


def test_the_python_that_made_the_environment_may_be_anothers(tree: Tree) -> None:
    found = tree.after("pyvenv.cfg", "command = /home/x/y/bin/python -m venv --prompt=-m {}\n")
    assert found.decode() == f"command = {BASE}/bin/python3 -m venv --prompt=-m {NEW}\n"


def test_a_program_in_a_zip_is_run_by_the_environment(tree: Tree) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("__main__.py", "print('ran', 6 * 7)\n")
    tree.write("bin/app", b"#!" + os.fsencode(tree.root) + b"/bin/python\n" + archive.getvalue())
    found = tree.produce().content["bin/app"]
    assert found == f"#!{NEW}/bin/python\n".encode() + archive.getvalue()
    staged = tree.root / "app"
    staged.write_bytes(found)
    assert run([BASE_PYTHON, staged]).stdout == "ran 42\n"


def test_another_file_of_that_name_is_a_text_like_any(tree: Tree) -> None:
    assert tree.after("share/pyvenv.cfg", "home = /somewhere\n") == b"home = /somewhere\n"


def test_path_files(tree: Tree) -> None:
    before = "{}/src\n../../../share\n../../../../outside\nimport x; x = '{}/y'\n"
    parent = tree.root.parent
    expected = f"{NEW}/src\n../../../share\n{parent}/outside\nimport x; x = '{NEW}/y'\n"
    assert tree.after(f"{SITE}/a.pth", before).decode() == expected
    assert tree.after(f"{SITE}/a.egg-link", "{}/src\n.\n").decode() == f"{NEW}/src\n.\n"


def test_a_path_file_where_python_does_not_look_is_a_text_like_any(tree: Tree) -> None:
    assert tree.after("share/a.pth", "../../../../../outside\n") == b"../../../../../outside\n"


def test_a_binary_file_keeps_the_path_and_is_told(tree: Tree) -> None:
    content = b"\0" + os.fsencode(tree.root) + b"/x\0"
    assert tree.after("lib/data.bin", content) == content
    assert tree.codes() == {"lib/data.bin": "leftover"}
    assert tree.outcome.rewritten == {}


def test_a_damaged_compiled_file_is_kept_and_told(tree: Tree) -> None:
    content = b"\x7fELF\x02\x01" + b"\xff" * 100
    assert tree.after("lib/x.so", content) == content
    assert tree.codes() == {"lib/x.so": "elf"}


def test_the_highest_c_library_of_all_is_known(tree: Tree) -> None:
    tree.write("bin/python", Path(BASE_PYTHON).resolve().read_bytes())
    tree.produce()
    assert tree.outcome.glibc is not None
    assert tree.outcome.glibc > (2, 2)


# RECORD: what pip and others check an installation by


def recorded(found: Collected, record: str) -> dict[str, tuple[str, str]]:
    rows = csv.reader(found.content[record].decode("utf-8", "surrogateescape").splitlines())
    return {name: (checksum, size) for name, checksum, size in rows}


def checksum(content: bytes) -> str:
    return (
        "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    )


RECORD = f"{SITE}/pkg-1.dist-info/RECORD"


@pytest.mark.parametrize("slow", [False, True])
def test_every_file_is_opened_once(tree: Tree, slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tree.write(f"{SITE}/text.py", "here = '{}'\n")  # rewritten: its old bytecode is not looked at
    for number in range(20):
        module = tree.write(f"{SITE}/m{number}.py", f"x = {number}\n")
        py_compile.compile(str(module))
    tree.write(f"{SITE}/a-1.dist-info/RECORD", "text.py,sha256=x,1\n")
    opened: list[str] = []
    real = os.open

    def count(path: str, *arguments: int) -> int:
        opened.append(path)
        return real(path, *arguments)

    monkeypatch.setattr(os, "open", count)
    tree.produce(slow=slow, compile_all=True)
    files = [str(path) for path in tree.root.rglob("*") if path.is_file()]
    assert sorted(path for path in opened if path.startswith(f"{tree.root}/")) == sorted(files)


def test_records_of_a_slow_file_system_are_read_ahead(
    tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(8):
        tree.write(f"{SITE}/p{number}-1.dist-info/RECORD", f"m{number}.py,,\n")
    together = threading.Barrier(8, timeout=30)
    real = reading.read

    def read(entry: walk.Entry) -> bytes:
        if entry.path.endswith("/RECORD"):
            together.wait()  # none is read before all have begun to be
        return real(entry)

    monkeypatch.setattr(reading, "read", read)
    found = tree.produce(slow=True)
    assert sum(path.endswith("/RECORD") for path in found.content) == 8


@pytest.mark.parametrize("slow", [False, True])
def test_every_line_of_a_record_is_right_afterwards(tree: Tree, slow: bool) -> None:
    names = {
        "pkg/__init__.py": "X = 1\n",
        "pkg/where.py": "X = '{}'\n",
        "pkg/a, b.txt": "{}/x",
        "pkg/größe.txt": "{}/x",
        "pkg/plain.txt": "nothing",
        "../../../bin/tool": "#!{}/bin/python\n",
        "../../../share/conf": "at = {}/share\n",
        "pkg-1.dist-info/METADATA": "Name: pkg\n",
        "pkg-1.dist-info/direct_url.json": '{"url": "file://{}/src"}'.replace("{}/", "{}/"),
    }
    lines = []
    for name, content in names.items():
        path = tree.write(os.path.normpath(f"{SITE}/{name}"), content)
        quoted = f'"{name}"' if "," in name else name
        data = path.read_bytes()
        lines.append(f"{quoted},{checksum(data)},{len(data)}")
    lines += [
        "pkg/__pycache__/where.x.pyc,sha256=abc,17",
        "pkg-1.dist-info/RECORD,,",
        "pkg/gone.py,,",
    ]
    tree.write(RECORD, "\n".join(lines) + "\n")
    found = tree.produce(slow=slow)
    rows = recorded(found, RECORD)
    assert list(rows) == [
        *names,
        "pkg/__pycache__/where.x.pyc",
        "pkg-1.dist-info/RECORD",
        "pkg/gone.py",
    ]
    for name in names:
        content = found.content[os.path.normpath(f"{SITE}/{name}")]
        assert rows[name] == (checksum(content), str(len(content))), name
        assert str(tree.root).encode() not in content
    assert rows["pkg/__pycache__/where.x.pyc"] == ("", "")
    assert rows["pkg-1.dist-info/RECORD"] == ("", "")


def test_a_record_of_which_nothing_changes_is_untouched(tree: Tree) -> None:
    content = b'pkg/a.py,sha256=xyz,3\r\n\n"odd, name",sha256=abc,1\nno comma\n,,\n'
    tree.write(f"{SITE}/pkg/a.py", "X=1")
    assert tree.after(RECORD, content) == content


def test_a_record_with_a_quoted_name(tree: Tree) -> None:
    tree.write(f'{SITE}/"x".txt', "{}")
    found = tree.after(RECORD, b'"""x"".txt",sha256=abc,1\n')
    assert found.decode() == f'"""x"".txt",{checksum(NEW.encode())},{len(NEW)}\n'


# Bytecode


def compiled(
    path: Path, name: str | None = None, mode: PycInvalidationMode = PycInvalidationMode.TIMESTAMP
) -> Path:
    written = py_compile.compile(str(path), dfile=name, doraise=True, invalidation_mode=mode)
    return Path(written)


def name_in(pyc: bytes) -> str:
    return marshal.loads(pyc[bytecode.HEADER :]).co_filename  # type: ignore[no-any-return]


def cached(path: str) -> str:
    return bytecode.cached(path, TAG)


def test_valid_bytecode_is_moved_and_stays_valid(tree: Tree) -> None:
    source = tree.write(f"{SITE}/mod.py", "def f(): return 1\n")
    before = compiled(source).read_bytes()
    found = tree.produce()
    after = found.content[cached(f"{SITE}/mod.py")]
    assert after[: bytecode.HEADER] == before[: bytecode.HEADER]
    assert name_in(after) == f"{NEW}/{SITE}/mod.py"
    assert tree.outcome.compiled == 0
    assert tree.outcome.findings == []


def test_bytecode_that_knows_its_source_by_another_name(tree: Tree) -> None:
    source = tree.write(f"{SITE}/mod.py", "X = 1\n")
    compiled(source, f"{tree.alias}/{SITE}/mod.py")
    assert name_in(tree.produce().content[cached(f"{SITE}/mod.py")]) == f"{NEW}/{SITE}/mod.py"


def test_a_constant_in_bytecode_that_names_the_place_is_never_used(tree: Tree) -> None:
    """Here the new path is as long as the old: the source's size and time say nothing."""
    source = tree.write(f"{SITE}/mod.py", "PREFIX = '{}'\n")
    compiled(source)
    new = "/n".ljust(len(str(tree.root)), "n")
    relocation = Relocation([Move(str(tree.root), new)])
    place = tree.place._replace(destination=new, relocation=relocation)
    found = tree.produce(place=place)
    assert len(found.content[f"{SITE}/mod.py"]) == source.stat().st_size
    scope: dict[str, object] = {}
    exec(marshal.loads(found.content[cached(f"{SITE}/mod.py")][bytecode.HEADER :]), scope)
    assert scope["PREFIX"] == new
    assert tree.outcome.compiled == 1


def test_stale_bytecode_is_compiled_again(tree: Tree) -> None:
    source = tree.write(f"{SITE}/mod.py", "X = 1\n")
    compiled(source)
    tree.write(f"{SITE}/mod.py", "X = 22\n")
    after = tree.produce().content[cached(f"{SITE}/mod.py")]
    assert bytecode.is_valid(after, importlib.util.MAGIC_NUMBER, 0, 0)
    assert tree.outcome.compiled == 1


def test_bytecode_with_the_hash_of_its_source_is_kept(tree: Tree) -> None:
    source = tree.write(f"{SITE}/mod.py", "X = 1\n")
    compiled(source, mode=PycInvalidationMode.CHECKED_HASH)
    after = tree.produce().content[cached(f"{SITE}/mod.py")]
    assert bytecode.is_valid(after, importlib.util.MAGIC_NUMBER, 0, 0)
    assert name_in(after) == f"{NEW}/{SITE}/mod.py"
    assert tree.outcome.compiled == 0


def test_bytecode_with_the_hash_of_another_source_is_compiled_again(tree: Tree) -> None:
    compiled(tree.write(f"{SITE}/mod.py", "X = 1\n"), mode=PycInvalidationMode.CHECKED_HASH)
    tree.write(f"{SITE}/mod.py", "X = 2\n")
    after = tree.produce().content[cached(f"{SITE}/mod.py")]
    scope: dict[str, object] = {}
    exec(marshal.loads(after[bytecode.HEADER :]), scope)
    assert (scope["X"], tree.outcome.compiled) == (2, 1)


def test_much_stale_bytecode_is_compiled_by_all_processes(
    tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(20):
        compiled(tree.write(f"{SITE}/m{number}.py", "X = 1\n"))
        tree.write(f"{SITE}/m{number}.py", f"X = {100 + number}\n")
    threads = []
    compile_one = Compiler.compile

    def noted(self: Compiler, source: bytes, filename: str) -> bytes | None:
        threads.append(threading.current_thread())
        return compile_one(self, source, filename)

    monkeypatch.setattr(Compiler, "compile", noted)
    tree.produce()
    assert tree.outcome.compiled == len(threads) == 20
    assert threads.count(threading.main_thread()) == 1  # which found out


@pytest.mark.parametrize("slow", [False, True])
def test_modules_without_bytecode_get_it_where_that_is_wanted(tree: Tree, slow: bool) -> None:
    for number in range(20):
        tree.write(f"{SITE}/m{number}.py", f"X = {number}\n")
    tree.write(f"{SITE}/broken.py", "def (\n")
    tree.write("share/other.py", "X = 1\n")
    assert not [path for path in tree.produce(slow=slow).content if path.endswith(".pyc")]
    found = tree.produce(slow=slow, compile_all=True)
    assert {path for path in found.content if path.endswith(".pyc")} == {
        cached(f"{SITE}/m{number}.py") for number in range(20)
    }
    assert name_in(found.content[cached(f"{SITE}/m7.py")]) == f"{NEW}/{SITE}/m7.py"
    assert tree.outcome.compiled == 20


def test_the_mode_and_time_of_bytecode_are_its_sources(tree: Tree) -> None:
    tree.write(f"{SITE}/mod.py", "X = 1\n", mode=0o755)
    member = tree.produce(compile_all=True).members[cached(f"{SITE}/mod.py")]
    assert (member.mode, member.mtime) == (0o644, SECONDS)


def test_a_module_without_source_is_moved(tree: Tree) -> None:
    source = tree.write(f"{SITE}/mod.py", "X = 1\n")
    os.rename(compiled(source), f"{tree.root}/{SITE}/mod.pyc")
    source.unlink()
    assert name_in(tree.produce().content[f"{SITE}/mod.pyc"]) == f"{NEW}/{SITE}/mod.py"
    assert tree.outcome.findings == []


def test_a_large_module_keeps_its_bytecode(tree: Tree) -> None:
    source = tree.write(f"{SITE}/tables.py", "X = 1\n" + "# a comment\n" * (SMALL // 12 + 1))
    assert source.stat().st_size > SMALL
    compiled(source)
    found = tree.produce()
    assert name_in(found.content[cached(f"{SITE}/tables.py")]) == f"{NEW}/{SITE}/tables.py"
    assert found.content[f"{SITE}/tables.py"] == source.read_bytes()


# Large files pass through in pieces


def large(tree: Tree, *parts: tuple[int, bytes], size: int = SMALL + 12345) -> bytes:
    """Bytes without text in them, and the given ones at some places."""
    content = bytearray(b"\0\xff" * (size // 2 + 1))[:size]
    for at, part in parts:
        content[at : at + len(part)] = part
    return bytes(content)


def test_a_large_binary_file_is_handed_on_as_it_is(tree: Tree) -> None:
    content = large(tree)
    assert tree.after("lib/big.bin", content) == content
    assert tree.outcome.findings == []


def borders() -> Iterator[int]:
    piece = 1 << 20
    for border in (piece // 4, piece, 2 * piece, 4 * piece):
        yield from (border - 100, border - 20, border - 1, border, border + 1)
    yield SMALL + 12345 - 200  # in a last piece that is short


@pytest.mark.parametrize("at", list(borders()))
def test_the_path_in_a_large_binary_file_is_found_wherever_it_stands(tree: Tree, at: int) -> None:
    content = large(tree, (at, os.fsencode(tree.root) + b"\0"))
    assert tree.after("lib/big.bin", content) == content
    assert tree.codes() == {"lib/big.bin": "leftover"}


def test_half_a_path_is_no_path(tree: Tree) -> None:
    whole = os.fsencode(tree.root)
    content = large(tree, (100, whole[:-1] + b"\0"), (2 << 20, whole[1:]))
    tree.after("lib/big.bin", content)
    assert tree.outcome.findings == []


def test_a_large_text_is_rewritten_like_a_small_one(tree: Tree) -> None:
    line = "{}/share " + "and text " * 100 + "\n"
    content = line * (SMALL // len(line) + 10)
    found = tree.after("share/big.txt", content)
    assert found == content.replace("{}", NEW).encode()
    assert tree.outcome.rewritten["share/big.txt"][1] == len(found)


# Files that change while they are read


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes()[::-1])
    os.utime(other, (SECONDS, SECONDS))
    os.rename(other, path)


MEANWHILE: dict[str, Callable[[Path], object]] = {
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "shorter": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "another time": lambda path: os.utime(path, (SECONDS, SECONDS + 1)),
    "gone": lambda path: path.unlink(),
    "another file": replace,
}


@pytest.mark.parametrize("change", MEANWHILE)
@pytest.mark.parametrize("size", [5, SMALL + 5])
@pytest.mark.parametrize("slow", [False, True])
def test_a_file_that_changed_since_it_was_looked_at(
    tree: Tree, change: str, size: int, slow: bool
) -> None:
    path = tree.write("share/file", large(tree, size=size))
    with pytest.raises(IntegrityError, match="changed while") as error:
        tree.produce(slow=slow, meanwhile=lambda: MEANWHILE[change](path))
    assert str(path) in error.value.message


def test_a_file_that_became_a_link_is_not_followed(tree: Tree) -> None:
    path = tree.write("share/file", b"x")

    def swap() -> None:
        path.unlink()
        path.symlink_to("/etc/passwd")

    with pytest.raises(Exception, match="share/file") as error:
        tree.produce(meanwhile=swap)
    assert getattr(error.value, "exit_code", None) is not None


@pytest.mark.parametrize("size", [5, SMALL + 5])
def test_a_file_that_changes_between_two_reads(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    path = tree.write("share/file", large(tree, size=size))

    def changing(real: Callable[..., object]) -> Callable[..., object]:
        def read(*arguments: object) -> object:
            result = real(*arguments)
            with open(path, "r+b") as file:
                file.write(b"!")
            return result

        return read

    for name in ("read", "readv"):
        monkeypatch.setattr(produce.os, name, changing(getattr(os, name)))
    with pytest.raises(IntegrityError, match="changed while"):
        tree.produce()


def test_a_file_that_may_not_be_read(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    tree.write("share/secret", b"x")
    real = os.open

    def refuse(path: str, flags: int, *rest: int, **options: int) -> int:
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", path)
        return real(path, flags, *rest, **options)

    monkeypatch.setattr(produce.os, "open", refuse)
    with pytest.raises(DeniedError, match="secret") as error:
        tree.produce()
    assert "--exclude" in str(error.value.hint)


def test_after_an_error_no_thread_goes_on(tree: Tree) -> None:
    for number in range(300):
        tree.write(f"share/f{number}", b"x")
    before = threading.active_count()
    with pytest.raises(IntegrityError):
        tree.produce(slow=True, meanwhile=(tree.root / "share/f7").unlink)
    assert threading.active_count() == before


# The same again gives the same bytes


def test_producing_twice_gives_the_same_in_the_same_order(tree: Tree) -> None:
    for number in range(50):
        tree.write(f"{SITE}/m{number}.py", f"X = {{'a', 'b', 'c', {number}}}, '{{}}'\n")
    once = tree.produce(compile_all=True)
    again = tree.produce(compile_all=True, slow=True)
    assert list(once.members.items()) == list(again.members.items())
    assert once.content == again.content


def test_what_was_moved_can_be_moved_again(tree: Tree) -> None:
    """A node that must use another place applies the same steps to the packed tree."""
    source = tree.write(f"{SITE}/mod.py", "X = 1\n")
    compiled(source)
    tree.write("bin/tool", "#!{}/bin/python\n")
    first = tree.produce()
    second = Tree(tree.root.parent / "again", tree._compiler)
    for path, member in first.members.items():
        if member.kind == "file":
            second.write(path, first.content[path])
    target = "/var/tmp/elsewhere/envs/0123456789abcdef"
    relocation = Relocation([Move(NEW, target)])
    place = second.place._replace(root=NEW, destination=target, relocation=relocation)
    found = second.produce(place=place)
    assert found.content["bin/tool"] == f"#!{target}/bin/python\n".encode()
