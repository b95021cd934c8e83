"""Virtual environments: stdlib ``venv``, ``virtualenv`` and ``uv venv``."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shlex
from collections.abc import Iterator

from stager import fsutil
from stager.config import Config
from stager.environments import (
    Environment,
    Tree,
    ask,
    base_tree,
    default_name,
    is_local,
    names,
    of_the_node,
    spellings,
)
from stager.envpatch import EnvPatch
from stager.errors import IncompatibleError

CONFIG = "pyvenv.cfg"
_ACTIVATE = re.compile(rb"^\s*(?:export )?VIRTUAL_ENV=(.*)$", re.M)


def detect(path: str, config: Config) -> Environment | None:
    """Describe the virtual environment at ``path``, or return None where there is none.

    Raises:
        IncompatibleError: its Python is missing or does not start.
    """
    settings = read_config(os.path.join(path, CONFIG))
    if settings is None:
        return None
    executable = os.path.join(path, "bin", "python")
    if not os.path.exists(executable):
        broken = os.path.islink(executable)
        raise IncompatibleError(
            f"the environment's Python is missing: {executable}"
            + (f" leads to {os.readlink(executable)}, which does not exist" if broken else ""),
            hint="the Python it was made from was removed or moved; make the environment again",
        )
    interpreter = ask(executable)
    major_minor = ".".join(interpreter.version.split(".")[:2])
    system_site = settings.get("include-system-site-packages", "").lower() == "true"
    library = f"lib/{os.path.basename(interpreter.library)}"
    if not os.path.isdir(os.path.join(path, library)):
        library = f"lib/python{major_minor}"
    candidates = itertools.chain(_in_activate(path), names.in_scripts(path), names.in_kernels(path))
    found, findings = names.judge(path, candidates, marker=CONFIG)
    own = Tree(
        role="env",
        root=path,
        spellings=spellings([path, *found]),
        exclude=(),
        python_directories=(library,),
    )
    trees = [own]
    if not is_local(interpreter.base_prefix, config):
        trees.insert(0, base_tree(interpreter, with_packages=system_site))
    elif system_site:
        findings.append(of_the_node(CONFIG, interpreter))
    site = os.path.join(path, library, "site-packages")
    return Environment(
        kind="venv",
        prefix=path,
        name=default_name(path),
        interpreter=interpreter,
        trees=tuple(trees),
        activation=EnvPatch(
            set={"VIRTUAL_ENV": "{prefix}"},
            prepend={"PATH": ("{prefix}/bin",)},
        ),
        watched=(
            os.path.join(path, CONFIG),
            os.path.join(path, "bin"),
            site,
            interpreter.base_executable,
        ),
        findings=tuple(findings),
    )


def read_config(path: str) -> dict[str, str] | None:
    """Read a ``pyvenv.cfg``: lower-case keys, the value after the first ``=``; None if missing."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape", opener=fsutil.regular) as file:
            lines = file.read().splitlines()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    pairs = (line.partition("=") for line in lines if "=" in line)
    return {key.strip().lower(): value.strip() for key, _, value in pairs}


def _in_activate(path: str) -> Iterator[str]:
    with (
        contextlib.suppress(OSError),
        open(os.path.join(path, "bin", "activate"), "rb", opener=fsutil.regular) as file,
    ):
        for match in _ACTIVATE.finditer(file.read()):
            word = _shell_word(os.fsdecode(match[1]))
            if word.startswith("/"):
                yield os.path.normpath(word.rstrip())


def _shell_word(text: str) -> str:
    """The first word of shell code, quotes taken away; empty where there is none."""
    try:
        return next(iter(shlex.split(text, comments=True)), "")
    except ValueError:
        return ""
