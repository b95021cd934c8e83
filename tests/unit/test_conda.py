"""What a conda prefix says of itself; and its records, brought up to date."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import struct
from pathlib import Path

import pytest

from stager.environments import conda
from stager.rewriting import condameta

pytestmark = pytest.mark.unit

LIBRARY = "lib/python3.11"


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    made = tmp_path / "conda" / "envs" / "mine"
    (made / "conda-meta").mkdir(parents=True)
    (made / "bin").mkdir()
    return made


@pytest.mark.parametrize(
    ("options", "original"),
    [
        ("--clone /opt/site/torch", "/opt/site/torch"),
        ("--clone=/opt/site/torch/", "/opt/site/torch"),
        ("--clone base", "{conda}"),
        ("--clone other", "{conda}/envs/other"),
        ("--clone nowhere", None),
        ("python", None),
        ("'unfinished", None),
    ],
)
def test_a_clone_tells_of_its_original(prefix: Path, options: str, original: str | None) -> None:
    root = prefix.parent.parent
    for one in (root, root / "envs" / "other"):
        (one / "conda-meta").mkdir(parents=True)
        (one / "conda-meta" / "history").touch()
    command = f"{root}/bin/conda create -n mine {options}"
    (prefix / "conda-meta" / "history").write_text(f"==> 2026 <==\n# cmd: {command}\n")
    names, findings = conda.called(str(prefix), LIBRARY)
    expected = [original.format(conda=root)] if original else []
    assert names == expected
    assert [one.code for one in findings] == ["copied"] * len(expected)


@pytest.mark.parametrize("kind", ["short", "long"])
def test_bytecode_tells_of_the_original(prefix: Path, kind: str) -> None:
    site = prefix / LIBRARY / "site-packages"
    info = site / "x-1.dist-info"
    (site / "x" / "__pycache__").mkdir(parents=True)
    info.mkdir()
    name = f"/opt/first/{LIBRARY}/site-packages/x/y.py".encode()
    length = bytes([len(name)]) if kind == "short" else struct.pack("<I", len(name))
    code = bytes(16) + b"/no/slashes/of/it/z" + length + name + b"\0tail"
    (site / "x" / "__pycache__" / "y.cpython-311.pyc").write_bytes(code)
    (info / "RECORD").write_text("x/y.py,,\nx/__pycache__/y.cpython-311.pyc,,\n")
    (info / "INSTALLER").write_text("pip\n")
    assert conda.called(str(prefix), LIBRARY)[0] == ["/opt/first"]
    (info / "INSTALLER").write_text("conda\n")
    assert conda.called(str(prefix), LIBRARY)[0] == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[activation.env]\nA = '1'\n", True),
        ("[feature.gpu.activation]\nscripts = ['a.sh']\n", True),
        ("[tasks]\nrun = 'echo activation'\n", False),
    ],
)
def test_what_only_pixi_knows(prefix: Path, text: str, told: bool) -> None:
    manifest = prefix / "pixi.toml"
    manifest.write_text(text)
    note = {"manifest_path": str(manifest)}
    (prefix / "conda-meta" / "pixi").write_text(json.dumps(note))
    assert [one.code for one in conda._pixi(str(prefix))] == (["activation"] if told else [])


def record(**paths: dict[str, object]) -> bytes:
    entries = [{"_path": path.replace("_", "/"), **values} for path, values in paths.items()]
    value = {"name": "p", "paths_data": {"paths": entries}, "link": {"source": "/c", "type": 1}}
    return json.dumps({**value, "extracted_package_dir": "/cache/p"}).encode()


def test_records_are_brought_up_to_date() -> None:
    old, new = hashlib.sha256(b"old").hexdigest(), hashlib.sha256(b"newer")
    sums = (base64.urlsafe_b64encode(new.digest()).rstrip(b"=").decode(), 5)
    data = record(
        bin_a={"sha256": "p", "sha256_in_prefix": old, "size_in_bytes": 3},
        bin_link={"path_type": "softlink", "sha256_in_prefix": old},
        bin_entry={"path_type": "unix_python_entry_point", "sha256": old, "size_in_bytes": 3},
        bin_edited={"sha256_in_prefix": old, "size_in_bytes": 3},
        bin_conda={"sha256_in_prefix": old, "size_in_bytes": 255},
    )
    names = ("bin/a", "bin/entry", "bin/edited", "bin/conda")
    installed = dict.fromkeys(("bin/a", "bin/entry", "bin/conda"), 3)
    after = json.loads(condameta.update(data, dict.fromkeys(names, sums), installed))
    assert after["extracted_package_dir"] == "" == after["link"]["source"]
    found = {one.pop("_path"): one for one in after["paths_data"]["paths"]}
    checksum = new.hexdigest()
    assert found["bin/a"] == {"sha256": "p", "sha256_in_prefix": checksum, "size_in_bytes": 5}
    assert found["bin/link"]["sha256_in_prefix"] == checksum
    assert found["bin/entry"]["sha256"] == checksum and found["bin/entry"]["size_in_bytes"] == 5
    assert found["bin/edited"] == {"sha256_in_prefix": old, "size_in_bytes": 3}
    assert found["bin/conda"] == {"sha256_in_prefix": checksum, "size_in_bytes": 255}


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b'{"paths_data": 3}', b"\xff"])
def test_what_is_no_record_stays(data: bytes, prefix: Path) -> None:
    assert condameta.update(data, {}, {}) == data
    (prefix / "conda-meta" / "x.json").write_bytes(data)
    assert condameta.read(str(prefix)) == {}


def test_records_that_are_pipes_say_nothing(tmp_path: Path) -> None:
    """And nobody waits for who would write to them."""
    directory = tmp_path / condameta.DIRECTORY
    directory.mkdir()
    for name in ("history", "state", "pixi", "package-1.json"):
        os.mkfifo(directory / name)
    assert condameta.read(str(tmp_path)) == {}
    assert list(conda._in_history(str(tmp_path))) == []
    assert list(conda._pixi(str(tmp_path))) == []
