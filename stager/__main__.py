"""The command ``stager``: ``python -m stager`` and the installed script."""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # the module typing is not needed for it
    from typing import NoReturn


def main() -> int:
    """Run the command line, or a scheduler's hook; returns only where next to nothing was done."""
    try:
        return _main()
    except KeyboardInterrupt:  # while a module was loaded, or an error told
        os.write(2, b"stager: interrupted\n")
        _leave(130)


def _main() -> int:
    _speak_utf8()
    if sys.argv[1:2] == ["hook"]:
        import gc

        gc.disable()  # a search for cycles at each import: a twelfth of a warm Prolog's CPU
        from stager import hooks

        _leave(hooks.main(sys.argv[2:]))
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

        gc.disable()  # for all of it: see stager/packing/pack.py
    from stager import cli

    _leave(cli.main(sys.argv[1:]))


def _speak_utf8() -> None:
    """Begin anew in Python's UTF-8 mode where the locale has another encoding.

    The text of a manifest is UTF-8. Elsewhere a path in it would be that of another file, or none:
    an original would not be found, and so never have changed.
    """
    if sys.getfilesystemencoding() == "utf-8" or not sys.executable:
        return
    try:
        with open("/proc/self/cmdline", "rb") as file:
            words = file.read().split(b"\0")[1:-1]
        # An option, and not the variable: that would be handed on to what stage-run starts.
        os.execv(sys.executable, [os.fsencode(sys.executable), b"-X", b"utf8", *words])  # noqa: S606
    except OSError:
        pass  # most paths are ASCII


def _leave(status: int) -> NoReturn:
    """End at once.

    A thread that closes a file aside (:func:`stager.fsutil.close_aside`) may only be starting. If
    Python takes itself apart meanwhile, it crashes (seen under load: 36 of 780 packs that found
    nothing to do). That takes 6 ms, besides.
    """
    for stream in (sys.stdout, sys.stderr):
        try:  # noqa: SIM105 - contextlib is not needed for it
            stream.flush()
        except (AttributeError, OSError, ValueError):
            pass  # closed, or nobody reads any more: what can be said was said
    os._exit(status)


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
