"""``docs/relocation.md`` says of each row which test shows it; here, that there is such a test."""

from __future__ import annotations

import re

from environments import REPO

ROWS = {"R": 66, "C": 24, "K": 8}
"""How many rows there are of each letter: of all environments, of conda's, of other kinds."""


def test_every_row_names_tests_that_exist() -> None:
    lines = (REPO / "docs" / "relocation.md").read_text().splitlines()
    rows = {line.split("|")[1].strip(): line for line in lines if re.match(r"\| [A-Z]\d+ \|", line)}
    for letter, last in ROWS.items():
        found = [row for row in rows if row.startswith(letter)]
        assert found == [f"{letter}{number}" for number in range(1, last + 1)]
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
