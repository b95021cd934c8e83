"""What is below a directory."""

from __future__ import annotations

from pathlib import Path

import pytest

import tiny
from stager import environments, paths


@pytest.mark.parametrize(
    ("path", "directories", "within"),
    [
        ("/a/b", ["/a"], True),
        ("/a", ["/a"], True),
        ("/a", ["/a/"], True),
        ("/ab", ["/a"], False),
        ("/a", ["/a/b"], False),
        ("/a/b", ["/c", "/a"], True),
        ("/a", ["/"], True),
        ("/", ["/"], True),
        ("/", ["/a"], False),
        ("/a", [], False),
    ],
)
def test_what_is_within(path: str, directories: list[str], within: bool) -> None:
    assert paths.is_within(path, directories) is within


def test_a_node_may_have_all_of_its_disk_for_itself() -> None:
    config = tiny.configured(Path("/x"), local_prefixes=("/",))
    assert environments.is_local("/opt/python", config)
