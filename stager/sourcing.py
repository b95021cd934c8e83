"""The scripts that conda packages bring for activation, and what they do to the environment.

``etc/conda/activate.d/*.sh`` of a prefix are sourced in the order of their names, with the prefix
active; those of ``deactivate.d`` in the reverse order when another environment takes its place.
They are sourced once, in a shell of their own, and what counts is the variables that they leave
behind: so they do the same in every shell, also in one that ends at the first error, for the ranks
that never start a shell, and for tasks that Slurm hands no more than variables
(``docs/adr/0010-activation-scripts.md``).
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterable, Mapping

from stager import fsutil
from stager.envpatch import SEARCH_PATHS, EnvPatch
from stager.errors import JOB, StagerError

ACTIVATE, DEACTIVATE = "etc/conda/activate.d", "etc/conda/deactivate.d"
LIMIT = 30.0
"""Seconds that all scripts together may take."""

# A shell's own, or what makes it read files of the user's before anything else.
_SHELLS_OWN = ("_", "SHLVL", "PWD", "OLDPWD", "BASH_ENV", "ENV")
_LISTS = (
    *SEARCH_PATHS,
    *("XDG_DATA_DIRS", "ACLOCAL_PATH", "INFOPATH", "PERL5LIB", "GI_TYPELIB_PATH", "QT_PLUGIN_PATH"),
)
_INHERITED = "/.stager-inherited"
"""Stands for what a task has in a list that is not known yet."""
_LONGEST = 4096
"""A scheduler passes variables on as lines, and not longer ones."""
_COMPLETE = "/complete"
"""No variable is told like this."""
_SYSTEM = "/usr/local/bin:/usr/bin:/bin"


def enter(environ: Mapping[str, str], prefix: str) -> dict[str, str]:
    """The environment after the activation scripts of ``prefix``, which is active in ``environ``.

    Raises:
        StagerError: they do not come to an end.
    """
    return _source(environ, _scripts(prefix, ACTIVATE))


def leave(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment after the deactivation scripts of the conda environment active in it.

    Where they do not come to an end it is left as it is: another environment is wanted.
    """
    prefix = environ.get("CONDA_PREFIX", "")
    scripts = _scripts(prefix, DEACTIVATE) if prefix.startswith("/") else []
    try:
        return _source(environ, reversed(scripts))
    except StagerError:
        return dict(environ)


def known_beforehand(patch: EnvPatch, prefix: str, user: Mapping[str, str]) -> EnvPatch:
    """A patch together with what activation scripts do, whatever the environment is before.

    What a script puts before or behind a list is told by a mark in the place of the list's content.

    Args:
        patch: the activation without them.
        prefix: the prefix that it activates.
        user: ``HOME`` and the like, for the scripts to look at.

    Raises:
        StagerError: they do not come to an end.
    """
    if not _scripts(prefix, ACTIVATE):
        return patch
    before = {**user, **dict.fromkeys(_LISTS, _INHERITED), "PATH": f"{_INHERITED}:{_SYSTEM}"}
    activated = patch.apply(before)
    after = enter(activated, prefix)
    new = {name: value for name, value in patch.set.items() if name in after}
    prepend = dict(patch.prepend)
    unset = [*patch.unset, *(name for name in activated if name not in after)]
    for name, value in after.items():
        if value == activated.get(name):
            continue
        items = value.split(":")
        if _INHERITED in items:
            own = [one for one in items if one not in (_INHERITED, *_SYSTEM.split(":"))]
            prepend[name] = tuple(os.path.normpath(one) for one in own if one.startswith("/"))
        elif value.isprintable() and len(value) <= _LONGEST:
            new[name] = value
    return EnvPatch(new, tuple(one for one in unset if one not in new), prepend)


def _scripts(prefix: str, directory: str) -> list[str]:
    try:
        names = sorted(os.listdir(os.path.join(prefix, directory)))
    except OSError:
        return []
    return [os.path.join(prefix, directory, name) for name in names if name.endswith(".sh")]


def _source(environ: Mapping[str, str], scripts: Iterable[str]) -> dict[str, str]:
    scripts = list(scripts)
    if not scripts:
        return dict(environ)
    # Packages' scripts are written for bash, whatever their name says. They may set traps, write
    # to any descriptor, start programs that go on: what counts is what is in the file at the end.
    shell = shutil.which("bash", path=_SYSTEM) or "/bin/sh"
    given = {name: value for name, value in environ.items() if name not in _SHELLS_OWN}
    with fsutil.nameless() as file:
        code = "".join(f". {shlex.quote(script)}\n" for script in scripts)
        code += (
            f"{{ command -p env -0; printf '{_COMPLETE}\\0'; }} >/proc/self/fd/{file.fileno()}\n"
        )
        _run([shell, "-c", code], given, os.path.dirname(scripts[0]), file.fileno())
        file.seek(0)
        *entries, last, _ = ["", *os.fsdecode(file.read()).split("\0")]
    if last != _COMPLETE:
        raise StagerError(
            f"one of the scripts in {os.path.dirname(scripts[0])} exits the shell",
            hint="`bash -c '. SCRIPT; echo good'` shows which",
            blame=JOB,
        )
    pairs = (entry.partition("=") for entry in entries if "=" in entry)
    after = {name: value for name, _, value in pairs if name not in _SHELLS_OWN}
    kept = {name: environ[name] for name in _SHELLS_OWN if name in environ}
    return {**after, **kept}


def _run(command: list[str], environ: Mapping[str, str], where: str, variables: int) -> None:
    shell = subprocess.Popen(
        command,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=2,  # what they print is for people
        start_new_session=True,
        pass_fds=(variables,),
    )
    try:
        shell.wait(LIMIT)
    except subprocess.TimeoutExpired as error:
        raise StagerError(
            f"the scripts in {where} did not finish within {LIMIT:.0f} s", blame=JOB
        ) from error
    finally:
        with contextlib.suppress(ProcessLookupError):  # what they have left running, too
            os.killpg(shell.pid, signal.SIGKILL)
        shell.wait()
