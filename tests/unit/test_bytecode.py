"""Bytecode: what the import system would take, the path it carries, and compiling the rest."""

from __future__ import annotations

import importlib.util
import marshal
import os
import py_compile
import random
import struct
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from py_compile import PycInvalidationMode

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from environments import BASE_PYTHON
from stager.rewriting import bytecode
from stager.rewriting.bytecode import HEADER, Compiler

pytestmark = pytest.mark.unit

MAGIC = importlib.util.MAGIC_NUMBER
TAG = sys.implementation.cache_tag
NAME = st.from_regex(r"[A-Za-z_][A-Za-z0-9_é-]*", fullmatch=True)


# Names


@given(
    st.lists(NAME, max_size=3), NAME, st.sampled_from(["cpython-311", "cpython-39.opt-1", "pypy39"])
)
def test_cached_and_split_are_inverse(directories: list[str], module: str, tag: str) -> None:
    source = "/".join([*directories, f"{module}.py"])
    cached = bytecode.cached(source, tag)
    assert bytecode.split(cached) == (source, tag)
    if "." not in tag:  # as Python itself names it
        assert cached == importlib.util.cache_from_source(source).replace(TAG, tag)


@pytest.mark.parametrize(
    "path",
    [
        "a.pyc",
        "pkg/a.cpython-311.pyc",
        "__pycache__/a.pyc",
        "__pycache__/a.cpython-311.py",
        "",
        "__pycache__",
    ]
    + ["x__pycache__/a.cpython-311.pyc", "__pycache__/x/a.cpython-311.pyc"],
)
def test_what_is_no_cached_bytecode(path: str) -> None:
    assert bytecode.split(path) is None


# Validity, as Python's own compiler writes and Python's own importer judges


@pytest.fixture
def module(tmp_path: Path) -> Path:
    path = tmp_path / "some_module.py"
    path.write_text("VALUE = 1\n")
    os.utime(path, (1_700_000_000, 1_700_000_000))
    return path


def compiled(module: Path, mode: PycInvalidationMode) -> bytes:
    path = py_compile.compile(str(module), doraise=True, invalidation_mode=mode)
    return Path(path).read_bytes()


def verdict(module: Path, pyc: bytes, magic: bytes = MAGIC) -> bool:
    info = module.stat()
    return bytecode.is_valid(pyc, magic, int(info.st_mtime), info.st_size)


@pytest.mark.parametrize(
    ("mode", "valid"),
    [
        (PycInvalidationMode.TIMESTAMP, True),
        (PycInvalidationMode.UNCHECKED_HASH, True),
        # Valid as well, but only after reading the source: on every start of every rank.
        (PycInvalidationMode.CHECKED_HASH, False),
    ],
)
def test_bytecode_of_an_unchanged_source(
    module: Path, mode: PycInvalidationMode, valid: bool
) -> None:
    assert verdict(module, compiled(module, mode)) is valid


def test_a_hash_that_is_right_is_not_compared_again(module: Path) -> None:
    pyc, source = compiled(module, PycInvalidationMode.CHECKED_HASH), module.read_bytes()
    after = bytecode.unchecked(pyc, MAGIC, source)
    assert after == compiled(module, PycInvalidationMode.UNCHECKED_HASH)
    for known in (after, pyc[:16], compiled(module, PycInvalidationMode.TIMESTAMP)):
        assert bytecode.unchecked(known, MAGIC, source) == known
    assert bytecode.unchecked(pyc, MAGIC, source + b"#") == pyc
    assert bytecode.unchecked(pyc, b"\x00\x00\r\n", source) == pyc
    other = b"\x00\x00\r\n" + pyc[4:]
    assert bytecode.unchecked(other, other[:4], source) == other


@pytest.mark.parametrize(
    ("mode", "valid"),
    [(PycInvalidationMode.TIMESTAMP, False), (PycInvalidationMode.UNCHECKED_HASH, True)],
)
def test_bytecode_of_a_source_with_another_time(
    module: Path, mode: PycInvalidationMode, valid: bool
) -> None:
    pyc = compiled(module, mode)
    os.utime(module, (1, 1_700_000_001))
    assert verdict(module, pyc) is valid


def test_bytecode_of_a_source_with_another_size(module: Path) -> None:
    pyc = compiled(module, PycInvalidationMode.TIMESTAMP)
    module.write_text("VALUE = 10\n")
    os.utime(module, (1_700_000_000, 1_700_000_000))
    assert not verdict(module, pyc)


def test_times_and_sizes_are_compared_as_32_bits() -> None:
    pyc = MAGIC + struct.pack("<III", 0, 5, 7) + b"code"
    assert bytecode.is_valid(pyc, MAGIC, 5 + 2**32, 7 + 2**32)
    assert not bytecode.is_valid(pyc, MAGIC, 6 + 2**32, 7)


def test_bytecode_of_another_interpreter(module: Path) -> None:
    pyc = compiled(module, PycInvalidationMode.UNCHECKED_HASH)
    assert not verdict(module, pyc, magic=b"\x00\x00\r\n")


@pytest.mark.parametrize("length", [0, 3, 4, 8, 15, 16])
def test_bytecode_that_is_cut_off(module: Path, length: int) -> None:
    assert not verdict(module, compiled(module, PycInvalidationMode.UNCHECKED_HASH)[:length])


# Moving the name it carries

SOURCE = """
import functools

@functools.lru_cache
def outer(argument=(1, "two", None)):
    "documentation"
    class Inner:
        def method(self): return [one for one in (lambda: argument)()]
    return Inner

async def coroutine(): yield f"{outer}"
"""


def code(name: str, source: str = SOURCE) -> types.CodeType:
    return compile(source, name, "exec", dont_inherit=True)


def pyc_of(compiled: types.CodeType) -> bytes:
    return MAGIC + bytes(HEADER - 4) + marshal.dumps(compiled)


def names(compiled: types.CodeType) -> Iterator[str]:
    """The file name of a code object and of all below it."""
    yield compiled.co_filename
    for constant in compiled.co_consts:
        if isinstance(constant, types.CodeType):
            yield from names(constant)


def moved(old: str, new: str) -> types.CodeType:
    data = bytecode.move(pyc_of(code(old)), old, new)
    result = marshal.loads(data[HEADER:])
    assert isinstance(result, types.CodeType)
    return result


KINDS = {
    "short": "/home/ada/env/mod.py",
    "one character": "m",
    "another": "/lustre/projects/p1/ada/environments/torch/lib/python3.11/site-packages/mod.py",
    "255": "/" + "x" * 251 + ".py",
    "256": "/" + "x" * 252 + ".py",
    "300": "/" + "y" * 296 + ".py",
    "not ASCII": "/home/größe/環境/mod.py",
    "not ASCII, long": "/home/" + "é" * 300 + "/mod.py",
    "not text": os.fsdecode(b"/home/caf\xe9/mod.py"),
}


@pytest.mark.parametrize("new", KINDS)
@pytest.mark.parametrize("old", KINDS)
def test_the_name_moves_and_the_code_stays(old: str, new: str) -> None:
    old, new = KINDS[old], KINDS[new]
    result = moved(old, new)
    assert set(names(result)) == {new}
    assert sum(1 for _ in names(result)) >= 5
    # Nothing else has changed: it is the code that compiling at the new place gives.
    assert result == code(new)


def test_a_constant_that_is_the_same_string_moves_with_it_and_a_longer_one_stays() -> None:
    old = KINDS["short"]
    before = code(old, f"CONSTANT = {old!r}\nLONG = {old + ' and more'!r}\n")
    result = marshal.loads(bytecode.move(pyc_of(before), old, KINDS["300"])[HEADER:])
    scope: dict[str, object] = {}
    exec(result, scope)
    assert scope["CONSTANT"] == KINDS["300"]
    assert scope["LONG"] == KINDS["short"] + " and more"


def test_a_string_that_only_contains_the_name_stays() -> None:
    name = KINDS["short"]
    source = f"X = '{name}x'\nY = 'x{name}'\nZ = b'{name}'\nW = ' {name} '\n"
    data = pyc_of(compile(source, "elsewhere.py", "exec"))
    assert bytecode.move(data, name, "/n/mod.py") == data


@pytest.mark.parametrize("type_byte", list(b"zZaAut"))
@pytest.mark.parametrize("flag", [0, 0x80])
def test_every_way_to_marshal_a_string(type_byte: int, flag: int) -> None:
    """Other versions' compilers choose other types; all are found, and stay interned or not."""
    old = "/old/mod.py"
    size = bytes([len(old)]) if type_byte in b"zZ" else struct.pack("<I", len(old))
    # A tuple of two: the string, and a number behind it that a wrong length would shift.
    body = b")\x02" + bytes([type_byte | flag]) + size + old.encode() + b"i" + struct.pack("<i", 77)
    data = bytes(HEADER) + body
    assert marshal.loads(data[HEADER:]) == (old, 77)
    for new in KINDS.values():
        result = bytecode.move(data, old, new)
        assert marshal.loads(result[HEADER:]) == (new, 77)
        assert result[HEADER + 2] & 0x80 == flag
        assert (result[HEADER + 2] & 0x7F in b"ZAt") == (type_byte in b"ZAt")
        assert bytecode.move(result, new, old)[:HEADER] == data[:HEADER]


@given(
    st.text(min_size=1, max_size=400).filter(lambda text: "\0" not in text),
    st.text(min_size=1, max_size=400).filter(lambda text: "\0" not in text),
)
def test_any_name_becomes_any_other(old: str, new: str) -> None:
    # Absolute paths, as sources have: a name of one letter may stand between other bytes as well.
    old, new = f"/origin/{old}.py", f"/{new}"
    plain = "X = 1\ndef f(): return [2 for x in 'abc']\n"
    before = compile(plain, old, "exec", dont_inherit=True)
    data = bytecode.move(pyc_of(before), old, new)
    result = marshal.loads(data[HEADER:])
    assert set(names(result)) == {new}
    assert result.co_code == before.co_code
    assert result.co_names == before.co_names


@given(st.text(max_size=20), st.text(max_size=20))
def test_code_that_does_not_carry_the_name_is_untouched(old: str, new: str) -> None:
    data = pyc_of(code("/some/other/name.py"))
    assume(old not in SOURCE and old not in "/some/other/name.py")
    assert bytecode.move(data, old, new) == data


def test_the_header_is_kept(module: Path) -> None:
    data = compiled(module, PycInvalidationMode.TIMESTAMP)
    result = bytecode.move(data, str(module), "/new/some_module.py")
    assert result[:HEADER] == data[:HEADER]
    assert verdict(module, result)


# Compiling


@pytest.fixture(scope="module")
def compiler() -> Iterator[Compiler]:
    with Compiler(str(BASE_PYTHON), 2) as made:
        yield made


def test_what_is_compiled_is_what_the_interpreter_would_write(
    compiler: Compiler, tmp_path: Path
) -> None:
    source = SOURCE.encode()
    found = compiler.compile(source, "/new/mod.py")
    assert found is not None
    assert found[:4] == MAGIC
    assert bytecode.is_valid(found, MAGIC, 0, 0)  # at any time, for any size
    assert found[8:HEADER] == importlib.util.source_hash(source)
    assert set(names(marshal.loads(found[HEADER:]))) == {"/new/mod.py"}
    path = tmp_path / "mod.py"
    path.write_bytes(source)
    cache = importlib.util.cache_from_source(str(path))
    os.mkdir(os.path.dirname(cache))
    Path(cache).write_bytes(found)
    path.write_bytes(source.replace(b"documentation", b"changed......"))
    said = subprocess.run(
        [BASE_PYTHON, "-B", "-c", "import mod; print(mod.outer.__doc__, mod.__file__)"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert said == f"documentation {path}\n"  # the bytecode was taken, not the source


@pytest.mark.parametrize(
    "source",
    [
        b"def (:\n",
        b"\xff\xfe",
        b"# -*- coding: no-such-encoding -*-\n",
        b"x = 1\0\n",
        b"(" * 1000,
        b"-" * 100_000 + b"1",
        b"{{ cookiecutter.name }}\nimport {{ x }}\n",
        b"print 'two'\n",
        b"return 1\n",
    ],
)
def test_a_source_that_does_not_compile_gives_none_and_ends_nobody(
    compiler: Compiler, source: bytes
) -> None:
    assert compiler.compile(source, "/x.py") is None
    good = compiler.compile(b"x = 1\n", "/x.py")
    assert good is not None
    assert good[HEADER:]


@pytest.mark.parametrize(
    "source", [b"", b"\n", b"\xef\xbb\xbfx = 1\n", b"x = 1\r\ny = 2\r\n", b"x = 1"]
)
def test_unusual_sources_that_do_compile(compiler: Compiler, source: bytes) -> None:
    assert compiler.compile(source, "/x.py") is not None


def test_a_warning_of_the_compiler_goes_nowhere(
    compiler: Compiler, capfd: pytest.CaptureFixture[str]
) -> None:
    assert compiler.compile(b"x = '\\d' is 'y'\nassert (1, 2)\n", "/x.py") is not None
    assert capfd.readouterr() == ("", "")


def test_bytes_do_not_depend_on_the_worker_or_the_order() -> None:
    # Sets of strings among constants: their order depends on the hash seed, unless it is fixed.
    words = [f"word{number}" for number in range(40)]
    sources = [
        f"def f(x): return x in {{{', '.join(map(repr, words[n:]))}}}, {n}\n".encode()
        for n in range(12)
    ]
    results = []
    for seed in range(3):
        order = list(range(len(sources)))
        random.Random(seed).shuffle(order)
        with Compiler(str(BASE_PYTHON), 2) as fresh:
            found = {number: fresh.compile(sources[number], f"/m{number}.py") for number in order}
        results.append([found[number] for number in range(len(sources))])
    assert results[0] == results[1] == results[2]
    assert None not in results[0]


def test_a_module_in_the_current_directory_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("struct", "marshal", "warnings", "importlib", "token"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    with Compiler(str(BASE_PYTHON), 1) as fresh:
        assert fresh.compile(b"x = '\\d'\n", "/x.py") is not None
    assert not (tmp_path / "imported").exists()


def test_an_interpreter_that_finds_its_library_by_a_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needy = tmp_path / "python"
    needy.write_text(f'#!/bin/sh\n[ "$LD_LIBRARY_PATH" = /m/lib ] && exec {BASE_PYTHON} "$@"\n')
    needy.chmod(0o755)
    monkeypatch.setenv("LD_LIBRARY_PATH", "/m/lib")
    with Compiler(str(needy), 1) as fresh:
        assert fresh.compile(b"x = 1", "/x.py") is not None


# An interpreter that some sources end. A real one is ended by little: here it is made sure of.
FRAGILE = """#!/bin/sh
exec {python} -c '
import builtins, os, sys
real = compile
def fragile(source, *rest, **options):
    if b"exit now" in source: os._exit(3)
    if b"close first" in source:
        os.close(1); sys.stdin.buffer.raw.read(1); os._exit(3)
    if b"half" in source: os.write(1, b"\\x40\\0\\0\\0half"); os._exit(3)
    return real(source, *rest, **options)
builtins.compile = fragile
exec(real(sys.argv[-1], "<worker>", "exec"), {{}})
' "$@"
"""


@pytest.fixture
def fragile(tmp_path: Path) -> str:
    path = tmp_path / "python"
    path.write_text(FRAGILE.format(python=BASE_PYTHON))
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("deadly", [b"x = 'exit now'", b"x = 'close first'", b"x = 'half'"])
def test_a_source_that_ends_the_interpreter_costs_only_itself(fragile: str, deadly: bytes) -> None:
    with Compiler(fragile, 1) as fresh:
        for _ in range(3):
            assert fresh.compile(b"x = 1", "/good.py") is not None
            assert fresh.compile(deadly, "/bad.py") is None
        assert fresh.compile(b"x = 2", "/good.py") is not None
        workers = list(fresh._started)
    assert all(worker.returncode is not None for worker in workers)


def test_a_large_source_to_an_interpreter_that_is_gone(fragile: str) -> None:
    with Compiler(fragile, 1) as fresh:
        assert fresh.compile(b"x = 1", "/x.py") is not None
        fresh._started[0].kill()
        fresh._started[0].wait()
        large = b"x = '" + b"y" * (4 << 20) + b"'"
        assert fresh.compile(large, "/x.py") is not None


def test_an_interpreter_that_does_not_start_gives_no_bytecode(tmp_path: Path) -> None:
    path = tmp_path / "python"
    path.write_text("#!/bin/sh\nexit 1\n")
    path.chmod(0o755)
    with Compiler(str(path), 1) as fresh:
        assert fresh.compile(b"x = 1\n" * 100_000, "/x.py") is None


def test_many_threads_at_once_get_each_their_own() -> None:
    def one(number: int) -> bool:
        source = f"VALUE = {number}\n".encode()
        found = fresh.compile(source, f"/m{number}.py")
        assert found is not None
        scope: dict[str, object] = {}
        made = marshal.loads(found[HEADER:])
        exec(made, scope)
        return scope["VALUE"] == number and made.co_filename == f"/m{number}.py"

    with Compiler(str(BASE_PYTHON), 2) as fresh:
        with ThreadPoolExecutor(16) as pool:
            assert all(pool.map(one, range(200)))
        assert len(fresh._started) <= 2


def test_closing_ends_every_worker() -> None:
    fresh = Compiler(str(BASE_PYTHON), 3)
    barrier = threading.Barrier(3)

    def one(_: int) -> None:
        barrier.wait()
        fresh.compile(b"x = 1" + b"\n" * 1_000_000, "/x.py")

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(one, range(3)))
    fresh.close()
    assert fresh._started
    assert all(worker.returncode is not None for worker in fresh._started)
