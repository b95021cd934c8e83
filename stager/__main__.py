"""The command ``stager``: ``python -m stager`` and the installed script."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line, or a scheduler's hook, and return its exit status."""
    if sys.argv[1:2] == ["hook"]:
        from stager import hooks

        return hooks.main(sys.argv[2:])
    from stager import cli

    return cli.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
