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

    ended_by = _end_in_order()
    status = cli.main(sys.argv[1:])
    if ended_by:
        _die_of(ended_by[0])
    _leave(status)


def _end_in_order() -> list[int]:
    """Have signals that would end us do what Ctrl-C does: what is half made is cleared away.

    Returns:
        A list that gets the number of the signal that came.
    """
    import signal

    told: list[int] = []

    def end(number: int, frame: object) -> None:
        told.append(number)
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup has us ignore one
            signal.signal(number, end)
    return told


def _die_of(number: int) -> NoReturn:
    """End by a signal, for whoever sent it looks at that."""
    import signal

    _flush()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    _leave(128 + number)


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
    _flush()
    os._exit(status)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:  # noqa: SIM105 - contextlib is not needed for it
            stream.flush()
        except (AttributeError, OSError, ValueError):
            pass  # closed, or nobody reads any more: what can be said was said


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
