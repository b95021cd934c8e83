"""What is below a directory."""

from __future__ import annotations

from pathlib import Path

import pytest

import tiny
from stager import environments, paths
from stager.walk import Excluder


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


@pytest.mark.parametrize("own", ["python3.13", "python3.13t"])
def test_a_base_has_the_modules_of_one_python(tmp_path: Path, own: str) -> None:
    names = ("python3.12", "python3.13", "python3.13t", "pythonic")
    for name in names:
        (tmp_path / "lib" / name).mkdir(parents=True)
    executable = str(tmp_path / "bin" / own)
    python = environments.Interpreter(
        executable, "3.13.1", "cpython-313", b"", str(tmp_path), executable, f"lib/{own}"
    )
    left_out = Excluder(environments.base_tree(python, with_packages=False).exclude)
    assert [name for name in names if not left_out(f"lib/{name}")] == [own, "pythonic"]


def test_lines_of_pth_files() -> None:
    lines = {
        "/x/y\n": "/x/y", "\ufeffsource\r\n": "source", "  z ": "z",
        "# no": "", "import os": "", "import\tos": "", "\n": "", "imported/x": "imported/x",
    }  # fmt: skip
    assert {line: paths.of_pth_line(line) for line in lines} == lines
