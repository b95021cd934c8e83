"""The command ``stager``: ``python -m stager`` and the installed script."""

from __future__ import annotations

import os
import sys


def main() -> int:
    """Run the command line, or a scheduler's hook, and return its exit status."""
    if sys.argv[1:2] == ["hook"]:
        import gc

        gc.disable()  # a search for cycles at each import: a twelfth of a warm Prolog's CPU
        from stager import hooks

        status = hooks.main(sys.argv[2:])
        if sys.stdout is not None:  # as where it is closed
            sys.stdout.flush()
        os._exit(status)  # taking all modules apart takes 6 ms
    words = sys.argv[1:]
    if (
        len(words) == 2
        and words[0] == "stage"
        and words[1][:1] != "-"
        and _nothing_changed(words[1])
    ):
        return 0
    if words[:1] == ["pack"]:
        import gc

        gc.disable()  # for all of it: see stager/pack.py
    from stager import cli

    return cli.main(sys.argv[1:])


def _nothing_changed(wish: str) -> bool:
    """Stage and print the prefix, where that needs next to nothing; or leave all of it undone."""
    from stager import warm

    prefix = os.fsencode(warm.hit(wish) + "\n")
    try:
        return len(prefix) > 1 and os.write(1, prefix) == len(prefix)
    except OSError:
        return False  # to be said by who says all errors


if __name__ == "__main__":
    sys.exit(main())
