"""``stager config``."""

from __future__ import annotations

import argparse

from stager.cli.common import load_config, print_json, table
from stager.config import KEYS, as_text


def config(arguments: argparse.Namespace) -> int:
    """Show every value and where it came from."""
    values = load_config(arguments)
    if arguments.json:
        print_json(
            {"values": {key: {"value": values[key], "source": values.sources[key]} for key in KEYS}}
        )
        return 0
    rows = []
    for key, entry in KEYS.items():
        text = as_text(key, values[key])
        rows.append([key, text or "-", values.sources[key], entry.help])
    for line in table(rows, ["KEY", "VALUE", "FROM", "MEANING"]):
        print(line)
    return 0
