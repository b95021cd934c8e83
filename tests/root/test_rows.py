"""``docs/relocation.md`` says of each row which test shows it; here, that there is such a test."""

from __future__ import annotations

import re

from environments import REPO


def test_every_row_names_tests_that_exist() -> None:
    lines = (REPO / "docs" / "relocation.md").read_text().splitlines()
    rows = {line.split("|")[1].strip(): line for line in lines if line.startswith("| R")}
    assert list(rows) == [f"R{number}" for number in range(1, len(rows) + 1)]
    assert len(rows) >= 66
    for row, line in rows.items():
        file, named = None, 0
        for text in re.findall(r"`([^`]+)`", line.split("|")[4]):
            match = re.fullmatch(r"(tests/\w+/)?(test_\w+\.py)(?:: (\S+))?", text)
            if match:
                file = REPO / (match[1] or "tests/root") / match[2]
                assert file.is_file(), (row, text)
            assert file is not None, (row, text)
            name = (match[3] if match else text) or ""
            if name and not name.startswith("*"):
                assert f"def {name.partition('[')[0]}(" in file.read_text(), (row, text)
            named += 1
        assert named, row
