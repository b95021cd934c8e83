"""Rewriting a tree in place: what is in it already is in nobody's way."""

from __future__ import annotations

from pathlib import Path

import pytest

from stager.formats.tarstream import Member
from stager.staging import retarget

pytestmark = pytest.mark.unit


def test_a_large_file_changes_beside_one_of_nearly_its_name(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "large").write_bytes(b"same" + b"old")
    (tree / "large.new").write_bytes(b"of the environment")
    member = Member("large", "file", 0o644, 1, 7)
    retarget._InPlace(str(tree)).write_member(member, iter([b"same", b"new"]))
    found = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {"large": b"samenew", "large.new": b"of the environment"}
