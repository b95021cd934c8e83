"""By which paths an environment is called in its own files.

An environment that was made through a link, moved or copied, has another path in its scripts than
where it lies; a packer that does not look there leaves them pointing at the old place.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
from collections.abc import Iterable, Iterator

from stager import fsutil
from stager.manifest import Finding
from stager.rewriting import relocate


def in_scripts(path: str) -> Iterator[str]:
    """The prefixes of the Pythons that the scripts of an environment are run by."""
    directory = os.path.join(path, "bin")
    for name in sorted(os.listdir(directory)):
        script = os.path.join(directory, name)
        if os.path.islink(script) or not os.path.isfile(script):
            continue
        with open(script, "rb") as file:
            interpreter = relocate.shebang(file.read(4096))
        if re.fullmatch(r"/.*/bin/python[\d.]*t?", interpreter):
            prefix = os.path.dirname(os.path.dirname(interpreter))
            # As it is written first: `../env/bin/python -m pip` writes /project/../env/bin/python.
            yield prefix
            yield os.path.normpath(prefix)


def in_kernels(path: str) -> Iterator[str]:
    """How the Jupyter kernels of an environment call it, which ``ipykernel install`` decides.

    A kernel may well be another environment's: those are left alone.
    """
    for kernel in sorted(glob.glob(f"{glob.escape(path)}/share/jupyter/kernels/*/kernel.json")):
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            with open(kernel, "rb", opener=fsutil.regular) as file:
                python = json.load(file)["argv"][0]
            prefix = os.path.dirname(os.path.dirname(python))
            if prefix.startswith("/") and os.path.realpath(prefix) == os.path.realpath(path):
                yield prefix


def judge(path: str, candidates: Iterable[str], *, marker: str) -> tuple[list[str], list[Finding]]:
    """Tell which of the paths found are names of an environment.

    Args:
        path: where it lies.
        candidates: absolute paths.
        marker: what lies in the prefix of each environment of the kind.
    """
    names, findings = [], []
    real = os.path.realpath(path)
    for candidate in dict.fromkeys(candidates):
        if os.path.realpath(candidate) == real:
            names.append(candidate)
        elif not os.path.exists(os.path.join(candidate, marker)) and os.path.exists(
            os.path.join(candidate, "bin")
        ):
            continue  # a plain interpreter such as /usr/bin/python: not an environment's name
        elif len([part for part in candidate.split("/") if part]) >= relocate.MIN_COMPONENTS:
            names.append(candidate)
            if candidate != os.path.normpath(candidate):
                continue  # told by its plain spelling
            findings.append(
                Finding(
                    candidate,
                    "copied",
                    "scripts name this path: the environment was moved or copied from there;"
                    " they are rewritten too",
                    "warning",
                )
            )
    return names, findings
