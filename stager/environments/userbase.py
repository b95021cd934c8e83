"""What ``pip install --user`` has installed: ``PYTHONUSERBASE``, or ``~/.local``.

Others keep their things below ``~/.local``, too, containers of many gigabytes among them. Python's
are its library, the scripts that it runs, and the files that installed packages list as theirs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from stager.config import Config
from stager.environments import (
    Environment,
    Interpreter,
    Request,
    Tree,
    base_of,
    records,
    spellings,
)
from stager.envpatch import EnvPatch
from stager.errors import NotFoundError
from stager.manifest import USER
from stager.rewriting import relocate


def of_user(environ: Mapping[str, str]) -> str:
    """Where ``pip install --user`` installs."""
    return os.path.expanduser(environ.get("PYTHONUSERBASE") or "~/.local")


def describe(request: Request, config: Config) -> Environment:
    """Describe a user base.

    Raises:
        NotFoundError: nothing is installed in it for this Python.
        IncompatibleError: the Python does not start.
    """
    path = os.path.abspath(request.paths[0])
    interpreter, trees, findings = base_of(request.python, config)
    name = os.path.basename(interpreter.library)
    libraries = [f"lib/{name}", f"lib64/{name}"]
    libraries = [
        one for one in libraries if os.path.isdir(os.path.join(path, one, "site-packages"))
    ]
    if not libraries:
        raise NotFoundError(
            f"nothing is installed for {name} in {path}",
            hint="name the Python that `pip install --user` was run with: --python python3.X",
        )
    only = {*libraries, *_scripts(path, interpreter)}
    for library in libraries:
        only.update(_recorded(path, f"{library}/site-packages"))
    own = Tree(
        role="env",
        root=path,
        spellings=spellings([path]),
        exclude=(),
        python_directories=tuple(libraries),
        only=tuple(sorted(only)),
    )
    return Environment(
        kind=USER,
        prefix=path,
        name=f"user-{name}",
        interpreter=interpreter,
        trees=(*trees, own),
        activation=EnvPatch(
            set={"PYTHONUSERBASE": "{prefix}"},
            unset=("PYTHONNOUSERSITE",),
            prepend={"PATH": ("{prefix}/bin",)},
        ),
        watched=(
            *(os.path.join(path, one, "site-packages") for one in libraries),
            interpreter.base_executable,
        ),
        findings=tuple(findings),
    )


def _scripts(path: str, interpreter: Interpreter) -> Iterator[str]:
    """The scripts in ``bin`` that this Python runs, whoever put them there."""
    directory = os.path.join(path, "bin")
    for name in os.listdir(directory) if os.path.isdir(directory) else ():
        script = os.path.join(directory, name)
        if os.path.islink(script) or not os.path.isfile(script):
            continue
        try:
            with open(script, "rb") as file:
                python = relocate.shebang(file.read(4096))
        except OSError:
            continue  # what its owner cannot read is not Python's
        if python and os.path.realpath(python) == interpreter.base_executable:
            yield f"bin/{name}"


def _recorded(path: str, site: str) -> Iterator[str]:
    """The files outside of site-packages that installed packages list as theirs."""
    directory = os.path.join(path, site)
    for name in os.listdir(directory):
        if not name.endswith(".dist-info"):
            continue
        for one in records.read(os.path.join(directory, name, "RECORD")):
            found = os.path.normpath(os.path.join(site, one))
            if not one.startswith("../") or found.startswith(("../", "/", f"{site}/")):
                continue
            listed = os.path.join(path, found)
            if os.path.isfile(listed) or os.path.islink(listed):  # no row stands for a directory
                yield found
