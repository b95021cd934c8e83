"""The manifest: what is written comes back, and nothing else is believed."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stager import manifest
from stager.errors import IncompatibleError, IntegrityError, StagerError
from stager.manifest import (
    Finding,
    Image,
    Layer,
    Manifest,
    Platform,
    Python,
    Watch,
    canonical,
    decode,
)

pytestmark = pytest.mark.unit

BASE = Layer(
    id="00112233445566aa",
    role="base",
    origin="/opt/python",
    destination="/tmp/s/envs/00112233445566aa",
    image=Image("squashfs", 1000, 0xAB),
    files=10,
    size=5000,
)
OWN = Layer(
    id="ffeeddccbbaa9988",
    role="env",
    origin="/home/ada/env",
    destination="/tmp/s/envs/ffeeddccbbaa9988",
    image=Image("tar.zst", 2000, 0x12345678),
    files=20,
    size=6000,
)
SAMPLE = Manifest(
    name="torch",
    kind="venv",
    origin="/home/ada/env",
    spellings=("/home/ada/env", "/lustre/ada/env"),
    layers=(BASE, OWN),
    python=Python("bin/python", "3.11.2", "cpython-311", f"{BASE.destination}/bin/python3.11"),
    platform=Platform("x86_64", "2.34"),
    activation={"set": {"VIRTUAL_ENV": "{prefix}"}, "unset": [], "prepend": {}},
    watches=(Watch("/home/ada/env/pyvenv.cfg", "1:2-1"), Watch("/src", "tree:0", tree=True)),
    modules=("torch",),
    options={"pack.editables": "snapshot", "pack.exclude": ["*.a"]},
    packed="2030-01-01T00:00:00Z",
    packer="0.1.0",
    findings=(Finding("lib/\udcff.so", "leftover", "a compiled file", "note"),),
)


def value() -> dict[str, Any]:
    return json.loads(SAMPLE.encode())  # type: ignore[no-any-return]


def test_what_is_written_comes_back() -> None:
    assert decode(SAMPLE.encode(), "here") == SAMPLE


def test_it_is_one_line_of_ascii_in_canonical_form() -> None:
    data = SAMPLE.encode()
    assert data.isascii()
    assert data.count(b"\n") == 1
    assert data.endswith(b"}\n")
    assert data == canonical(dict(reversed(list(json.loads(data).items()))))


def test_the_digest_is_that_of_the_bytes() -> None:
    # sha256 of the empty string, as everybody knows it
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert manifest.digest(b"") == empty
    assert manifest.digest(SAMPLE.encode()) != manifest.digest(SAMPLE.encode() + b" ")


def test_the_environments_own_layer_is_on_top() -> None:
    assert SAMPLE.top == OWN
    assert SAMPLE.prefix == OWN.destination


def test_a_base_is_the_nodes_own_or_packed() -> None:
    assert SAMPLE.local_base == ""
    python = SAMPLE.python._replace(base="/usr/bin/python3.11")
    assert SAMPLE._replace(python=python).local_base == "/usr/bin/python3.11"
    beside = SAMPLE.python._replace(base=f"{BASE.destination}2/bin/python")
    assert SAMPLE._replace(python=beside).local_base == beside.base


@pytest.mark.parametrize("name", ["python3.13", "python3.13t"])
def test_a_free_threaded_python_has_modules_of_its_own(name: str) -> None:
    python = SAMPLE.python._replace(version="3.13.1", base=f"/opt/bin/{name}")
    assert SAMPLE._replace(python=python).library == f"lib/{name}"


def test_an_image_is_named_by_what_went_in_and_what_came_out() -> None:
    assert OWN.filename == "ffeeddccbbaa9988-12345678.tar.zst"
    assert BASE.filename == "00112233445566aa-000000ab.squashfs"


def test_a_newer_format_is_refused_by_name() -> None:
    newer = canonical({**value(), "schema": manifest.SCHEMA + 1, "surprise": 1})
    with pytest.raises(IncompatibleError, match="/the/manifest") as error:
        decode(newer, "/the/manifest")
    assert "newer stager" in str(error.value.hint)


@pytest.mark.parametrize("schema", ["1", None, [1], 1.5])
def test_a_format_that_is_no_number_is_refused(schema: object) -> None:
    with pytest.raises(StagerError):
        decode(canonical({**value(), "schema": schema}), "here")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        b"{",
        b"[]",
        b"null",
        b"7",
        b'"x"',
        b"{}",
        b'{"schema": 1}',
        b"\xff",
        b"[" * 100_000,
    ],
)
def test_bytes_that_are_no_manifest(data: bytes) -> None:
    with pytest.raises(IntegrityError, match="/the/manifest") as error:
        decode(data, "/the/manifest")
    assert error.value.exit_code == 12


@given(st.integers(0, len(SAMPLE.encode()) - 2))
def test_a_truncated_manifest_is_damaged(length: int) -> None:
    with pytest.raises(IntegrityError):
        decode(SAMPLE.encode()[:length], "here")


@pytest.mark.parametrize("key", Manifest._fields)
def test_every_key_is_needed(key: str) -> None:
    less = value()
    del less[key]
    with pytest.raises(IntegrityError):
        decode(canonical(less), "here")


def hostile_layers() -> Iterator[tuple[str, object]]:
    for text in ("", "..", "../../../../etc", "/etc/passwd", "0" * 15, "0" * 17, "G" * 16, None, 7):
        yield "id", text
    yield "id", "00112233445566AA"
    yield "id", "001122334455667\n"
    for text in ("relative", "", "/a\0b", None, ["/a"]):
        yield "destination", text
    for number in (-1, "5", None, 1.5, True):
        yield "files", number
        yield "size", number


@pytest.mark.parametrize(("key", "bad"), list(hostile_layers()))
def test_nothing_of_a_layer_that_becomes_a_path_or_a_limit_is_believed(
    key: str, bad: object
) -> None:
    changed = value()
    changed["layers"][1][key] = bad
    with pytest.raises(IntegrityError):
        decode(canonical(changed), "here")


@pytest.mark.parametrize(
    ("key", "bad"),
    [
        ("format", "zip"),
        ("format", "squashfs/../../x"),
        ("format", None),
        ("size", -1),
        ("size", "1000"),
        ("size", True),
        ("crc32", None),
        ("crc32", "../../x"),
        ("crc32", -1),
        ("crc32", 2**32),
    ],
)
def test_nothing_of_an_image_that_becomes_a_path_or_a_limit_is_believed(
    key: str, bad: object
) -> None:
    changed = value()
    changed["layers"][1]["image"][key] = bad
    with pytest.raises(IntegrityError):
        decode(canonical(changed), "here")


def test_an_environment_has_a_layer() -> None:
    with pytest.raises(IntegrityError):
        decode(canonical({**value(), "layers": []}), "here")


def places(tree: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, below in items if isinstance(tree, (dict, list)) else ():
        if isinstance(below, (dict, list)):
            yield from places(below, (*at, key))
        else:
            yield (*at, key)


JUNK = st.sampled_from([None, True, -1, 1.5, "", "x", [], {}, [None], {"x": 1}, [[]], 10**400])


@given(st.sampled_from([one for one in places(value()) if one]), JUNK)
def test_no_junk_in_any_place_makes_it_fail_in_another_way(at: tuple[Any, ...], junk: Any) -> None:
    changed = value()
    holder = changed
    for key in at[:-1]:
        holder = holder[key]
    holder[at[-1]] = copy.deepcopy(junk)
    try:
        found = decode(canonical(changed), "here")
    except (IntegrityError, IncompatibleError):
        return
    # What is let through can be worked with.
    assert found.prefix.startswith("/")
    assert isinstance(found.local_base, str)
    assert found.encode()
