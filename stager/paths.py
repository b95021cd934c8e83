"""Where paths lie, told by their text alone."""

from __future__ import annotations

import os
from collections.abc import Iterable


def is_within(path: str, directories: Iterable[str]) -> bool:
    """Tell whether a path is one of the directories or below one; all in the same normal form."""
    return os.path.join(path, "").startswith(tuple(os.path.join(one, "") for one in directories))
