"""The command ``stager``: ``python -m stager`` and the installed script."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line and return its exit status."""
    from stager import cli

    return cli.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
