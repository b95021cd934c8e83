"""ELF files: what they ask for is read right, a run path moves, and no damage is a crash.

The samples are made here byte by byte, as a linker would (there may be no compiler), next to the
machine's own programs.
"""

from __future__ import annotations

import os
import platform
import struct
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from environments import BASE_PYTHON
from stager.rewriting import elf
from stager.rewriting.elf import Elf, MalformedError

pytestmark = pytest.mark.unit

RPATH, RUNPATH = 15, 29
NEEDED, STRTAB, SONAME, VERNEED, VERNEEDNUM = 1, 5, 14, 0x6FFFFFFE, 0x6FFFFFFF
LOAD, DYNAMIC, INTERP = 1, 2, 3
DYNSYM = 11
ADDRESS = 0x400000
"""Where the sample is loaded: addresses in it are not offsets in the file."""


class Strings:
    """A string table; what is the tail of another string is stored once, as linkers do."""

    def __init__(self) -> None:
        self.data = b"\0"

    def add(self, text: str) -> int:
        encoded = os.fsencode(text) + b"\0"
        at = self.data.find(encoded)
        if at < 0:
            at = len(self.data)
            self.data += encoded
        return at


def build(
    *,
    runpath: str = "",
    tag: int = RUNPATH,
    needed: Sequence[str] = ("libc.so.6",),
    soname: str = "",
    symbols: Sequence[str] = ("first_symbol", "second"),
    versions: Sequence[Sequence[str]] = (("libc.so.6", "GLIBC_2.2.5", "GLIBC_2.17"),),
    interpreter: str = "",
    dynamic: bool = True,
    sections: bool = True,
) -> bytes:
    """The bytes of a shared library for x86-64."""
    strings = Strings()
    entries = []
    if runpath:  # first, so that the tails of the run path are those that others share
        entries.append((tag, strings.add(runpath)))
    entries += [(NEEDED, strings.add(name)) for name in needed]
    if soname:
        entries.append((SONAME, strings.add(soname)))
    symbol_table = bytes(24)
    for name in symbols:
        symbol_table += struct.pack("<IBBHQQ", strings.add(name), 0x12, 0, 1, 0, 0)
    needs = b""
    for number, (library, *names) in enumerate(versions):
        following = 16 + 16 * len(names) if number + 1 < len(versions) else 0
        needs += struct.pack("<HHIII", 1, len(names), strings.add(library), 16, following)
        for index, name in enumerate(names):
            step = 16 if index + 1 < len(names) else 0
            needs += struct.pack("<IHHII", 0, 0, index + 2, strings.add(name), step)

    at = 64 + 3 * 56  # behind the headers
    places = []
    body = b""
    for part in (os.fsencode(interpreter) + b"\0", strings.data, symbol_table, needs):
        body += bytes(-(at + len(body)) % 8)
        places.append(at + len(body))
        body += part
    body += bytes(-(at + len(body)) % 8)
    interpreter_at, strings_at, symbols_at, needs_at = places
    entries.append((STRTAB, ADDRESS + strings_at))
    if versions:
        entries += [(VERNEED, ADDRESS + needs_at), (VERNEEDNUM, len(versions))]
    table = b"".join(struct.pack("<QQ", *entry) for entry in [*entries, (0, 0)])
    table_at = at + len(body)
    body += table
    sections_at = at + len(body)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\x02\x01\x01" + bytes(9), 3, 62, 1, 0, 64, sections_at if sections else 0,
        0, 64, 56, 3, 64, 2 if sections else 0, 0,
    )  # fmt: skip
    end = sections_at + 2 * 64

    def segment(kind: int, start: int, size: int) -> bytes:
        return struct.pack("<IIQQQQQQ", kind, 4, start, ADDRESS + start, 0, size, size, 8)

    segments = segment(LOAD, 0, end)
    segments += segment(INTERP if interpreter else 0, interpreter_at, len(interpreter) + 1)
    segments += segment(DYNAMIC if dynamic else 0, table_at, len(table))
    if sections:
        body += bytes(64)
        body += struct.pack(
            "<IIQQQQIIQQ", 0, DYNSYM, 2, 0, symbols_at, len(symbol_table), 0, 1, 8, 24
        )
    return header + segments + body


def read_of(data: bytes) -> elf.Read:
    return lambda offset, length: data[offset : offset + length]


def inspect(data: bytes) -> Elf:
    found = elf.inspect(read_of(data))
    assert found is not None
    return found


# Reading


@pytest.mark.parametrize("tag", [RPATH, RUNPATH])
def test_a_library_with_everything(tag: int) -> None:
    data = build(
        runpath="/old/lib:$ORIGIN/../x", tag=tag, soname="libme.so", interpreter="/lib/ld.so.2"
    )
    found = inspect(data)
    assert found.interpreter == "/lib/ld.so.2"
    assert found.runpath == "/old/lib:$ORIGIN/../x"
    assert found.glibc == (2, 17)
    start = found.runpath_offset
    assert data[start : start + len(found.runpath) + 1] == b"/old/lib:$ORIGIN/../x\0"


def test_a_library_without_anything() -> None:
    assert inspect(build(versions=())) == Elf("", "", 0, None)
    assert inspect(build(dynamic=False, runpath="/x")) == Elf("", "", 0, None)


@pytest.mark.parametrize(
    ("names", "highest"),
    [
        (["GLIBC_2.9", "GLIBC_2.34", "GLIBC_2.4"], (2, 34)),
        (["GLIBC_2.3.4"], (2, 3)),
        (["GLIBC_PRIVATE", "GLIBC_2.2.5"], (2, 2)),
        (["GLIBC_PRIVATE"], None),
        (["GLIBC_2.", "GLIBC_2.x", "GLIBC_2.-9", "GLIBC_2.1²"], None),
        (["GLIBCXX_3.4.32", "CXXABI_1.3", "GCC_3.0"], None),
        ([], None),
    ],
)
def test_the_highest_version_of_the_c_library(
    names: list[str], highest: tuple[int, int] | None
) -> None:
    versions = [["libstdc++.so.6", "GLIBCXX_3.4.99"], ["libc.so.6", *names]]
    assert inspect(build(versions=versions)).glibc == highest
    assert inspect(build(versions=versions[::-1])).glibc == highest


def test_a_run_path_that_is_no_text() -> None:
    assert inspect(build(runpath="/caf\udce9/lib")).runpath == "/caf\udce9/lib"


@pytest.mark.parametrize(
    ("runpath", "expected"),
    [
        ("", []),
        ("relative:/x/../y", ["/y"]),
        ("$ORIGIN/../lib:${ORIGIN}", ["/home/ada/5$/lib", "/home/ada/5$/numpy"]),
        ("$ORIGIN/$LIB", []),
        ("/$LIB:/opt/${PLATFORM}", []),  # also where the directory's own path is longer
    ],
)
def test_the_directories_that_the_loader_searches(runpath: str, expected: list[str]) -> None:
    found = elf.search_paths(Elf("", runpath, 0, None), "/home/ada/5$/numpy")
    assert list(found) == expected


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x7fELF",
        b"\x7fELF\x01\x01" + bytes(60),
        b"\x7fELF\x02\x02" + bytes(60),
        b"#!/bin/sh\n",
    ],
)
def test_what_is_no_elf_file_of_a_kind_that_is_parsed(data: bytes) -> None:
    assert elf.inspect(read_of(data)) is None


def test_the_machines_own_python() -> None:
    path = os.path.realpath(BASE_PYTHON)
    with open(path, "rb") as file:
        found = elf.inspect(elf.reader(file.fileno()))
    assert found is not None
    assert os.path.exists(found.interpreter)
    running = tuple(int(part) for part in platform.libc_ver()[1].split("."))
    assert found.glibc is not None
    assert (2, 2) < found.glibc <= running
    assert inspect(Path(path).read_bytes()) == found


def test_every_extension_module_of_the_machines_python() -> None:
    directory = Path(sysconfig.get_path("stdlib", vars={"installed_base": sys.base_prefix}))
    paths = sorted((directory / "lib-dynload").glob("*.so"))
    assert paths
    for path in paths:
        found = inspect(path.read_bytes())
        assert found.interpreter == ""  # a library has none
        assert found.glibc is None or found.glibc >= (2, 2)


# Damage


FULL = build(runpath="/old/prefix/lib:/x", soname="libme.so", interpreter="/lib64/ld.so")


def survives(data: bytes) -> Elf | None:
    try:
        return elf.inspect(read_of(data))
    except MalformedError:
        return None


def test_truncation_at_every_byte_is_malformed_or_still_readable() -> None:
    whole = inspect(FULL)
    dynamic_end = len(FULL) - 2 * 64
    outcomes = set()
    for length in range(len(FULL)):
        found = survives(FULL[:length])
        outcomes.add(found is None)
        if found is not None and found.runpath and found.glibc:
            assert found.runpath == whole.runpath
        if length >= dynamic_end:
            assert found == whole  # only the section table is missing
        # Replacing in what is cut off must neither crash nor break a name that cannot be seen.
        replaced = elf.replace_runpath(FULL[:length], whole, "/n")
        assert replaced is None or length >= len(FULL) - 24  # the rest of the last one is not read
    assert outcomes == {True, False}


@given(st.integers(0, len(FULL) - 1), st.binary(min_size=1, max_size=8))
def test_any_bytes_overwritten_are_malformed_or_still_readable(at: int, junk: bytes) -> None:
    data = FULL[:at] + junk + FULL[at + len(junk) :]
    found = survives(data)
    if found is not None and found.runpath:
        replaced = elf.replace_runpath(data, found, "/n")
        assert replaced is None or len(replaced) == len(data)


@pytest.mark.parametrize("value", [2**63 - 1, 2**63, 2**64 - 1])
@pytest.mark.parametrize("field", [32, 64 + 56 + 8, 64 + 2 * 56 + 8])
def test_an_offset_beyond_what_the_system_can_seek_to(
    tmp_path: Path, value: int, field: int
) -> None:
    path = tmp_path / "hostile"
    path.write_bytes(FULL[:field] + struct.pack("<Q", value) + FULL[field + 8 :])
    with open(path, "rb") as file:
        try:
            found = elf.inspect(elf.reader(file.fileno()))
        except MalformedError:
            return
    assert found is not None
    assert found.runpath in ("", "/old/prefix/lib:/x")


def test_a_string_without_an_end() -> None:
    data = build(runpath="/x" * 3000)
    with pytest.raises(MalformedError, match="no end"):
        elf.inspect(read_of(data))


def test_an_address_in_no_segment() -> None:
    load = 64 + 16  # the address of the first segment
    data = FULL[:load] + struct.pack("<Q", ADDRESS + 2**32) + FULL[load + 8 :]
    with pytest.raises(MalformedError, match="no segment"):
        elf.inspect(read_of(data))


# Moving


def move(path: str) -> str | None:
    for old, new in (("/old/env", "/s/envs/1"), ("/old/base", "/s/envs/2")):
        if path == old or path.startswith(f"{old}/"):
            return new + path[len(old) :]
    return None


@pytest.mark.parametrize(
    ("runpath", "directory", "expected"),
    [
        ("/old/env/lib", "/s/envs/1/lib", "$ORIGIN"),
        ("/old/env/lib", "/s/envs/1/lib/python3/lib-dynload", "$ORIGIN/../.."),
        ("/old/env/lib/sub", "/s/envs/1/lib", "$ORIGIN/sub"),
        ("/old/env", "/s/envs/1", "$ORIGIN"),
        ("/old/env/lib:/usr/lib:$ORIGIN/x", "/s/envs/1/lib", "$ORIGIN:/usr/lib:$ORIGIN/x"),
        ("/usr/lib:/old/env", "/s/envs/1/lib", "/usr/lib:$ORIGIN/.."),
        ("/old/base/lib", "/s/envs/1/lib", "/s/envs/2/lib"),
        ("/old/env2/lib", "/s/envs/1/lib", None),
        ("$ORIGIN/../lib", "/s/envs/1/lib", None),
        ("old/env/lib", "/s/envs/1/lib", None),
        ("", "/s/envs/1/lib", None),
        (":/usr/lib:", "/s/envs/1/lib", None),
    ],
)  # fmt: skip
def test_a_run_path_follows(runpath: str, directory: str, expected: str | None) -> None:
    found = Elf("", runpath, 0, None)
    assert elf.move_runpath(found, move, directory, "/s/envs/1") == expected


@pytest.mark.parametrize("new", ["$ORIGIN", "", "/old/env/lic"])
def test_a_run_path_is_replaced_in_place(new: str) -> None:
    data = build(runpath="/old/env/lib", symbols=("lib", "sym"), needed=("libz.so",))
    # "lib" is the end of the run path: the linker would store it there.
    data_unshared = build(runpath="/old/env/lib", symbols=("sym",), needed=("libz.so",))
    assert elf.replace_runpath(data, inspect(data), new) is None
    replaced = elf.replace_runpath(data_unshared, inspect(data_unshared), new)
    assert replaced is not None
    assert len(replaced) == len(data_unshared)
    assert inspect(replaced).runpath == new
    start = inspect(data_unshared).runpath_offset
    assert replaced[:start] == data_unshared[:start]
    assert replaced[start + len("/old/env/lib") :] == data_unshared[start + len("/old/env/lib") :]


def test_a_run_path_that_does_not_fit_is_not_replaced() -> None:
    data = build(runpath="/old/lib")
    assert elf.replace_runpath(data, inspect(data), "/longer/lib") is None


@pytest.mark.parametrize(
    "shared",
    [
        {"symbols": ("env/lib",)},
        {"symbols": ("/old/env/lib",)},
        {"needed": ("lib",)},
        {"soname": "ib"},
        {"versions": (("lib", "GLIBC_2.4"),)},
        {"versions": (("libc.so.6", "lib"),)},
    ],
)
def test_a_run_path_whose_bytes_are_part_of_another_name_is_not_replaced(
    shared: dict[str, Sequence[str]],
) -> None:
    data = build(runpath="/old/env/lib", **shared)  # type: ignore[arg-type]
    assert elf.replace_runpath(data, inspect(data), "$ORIGIN") is None


def test_without_a_table_of_symbols_nothing_is_known_to_share_the_bytes() -> None:
    data = build(runpath="/old/env/lib", sections=False)
    assert elf.replace_runpath(data, inspect(data), "$ORIGIN") is None
