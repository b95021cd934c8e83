"""Directories of modules that are put on ``PYTHONPATH``, and what installs such.

Either the directory itself is searched (``pip install --target``), or it is a prefix, and the
``site-packages`` in it are (``pip install --prefix``, the modules of a site).
"""

from __future__ import annotations

import os

from stager.config import Config
from stager.environments import Environment, Request, Tree, base_of, default_name, spellings
from stager.envpatch import EnvPatch
from stager.manifest import TREE


def describe(request: Request, config: Config) -> Environment:
    """Describe directories of modules, the first one searched first.

    Raises:
        NotFoundError: there is no such Python.
        IncompatibleError: the Python does not start.
    """
    interpreter, trees, findings = base_of(request.python, config)
    paths = list(dict.fromkeys(map(os.path.abspath, request.paths)))
    own = [_tree(path, os.path.basename(interpreter.library)) for path in paths]
    # The first one is on top: what is found first hides what is found later.
    trees += own[::-1]
    return Environment(
        kind=TREE,
        prefix=paths[0],
        name=default_name(paths[0]),
        interpreter=interpreter,
        trees=tuple(trees),
        activation=EnvPatch(),
        watched=(
            *(os.path.normpath(f"{tree.root}/{one}") for tree in own for _, one in tree.search),
            interpreter.base_executable,
        ),
        findings=tuple(findings),
    )


def _tree(path: str, library: str) -> Tree:
    places = {
        f"lib/{library}": f"lib/{library}/site-packages",
        f"lib64/{library}": f"lib64/{library}/site-packages",
        # Debian's pip: everything else there is Debian's own.
        f"local/lib/{library}": f"local/lib/{library}/dist-packages",
    }
    found = {
        directory: site
        for directory, site in places.items()
        if os.path.isdir(os.path.join(path, site))
    }
    sites = list(found.values()) or [""]
    return Tree(
        role=TREE,
        root=path,
        spellings=spellings([path]),
        exclude=(),
        python_directories=tuple(found) or ("",),
        search=(("PATH", "bin"), *(("PYTHONPATH", site) for site in sites)),
    )
