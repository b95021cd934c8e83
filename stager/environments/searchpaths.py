"""The directories that variables add to where Python and the dynamic loader search.

``module load`` sets them to directories on shared disk, and so do users; what is imported or
linked from there is not in the environment.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping

from stager.config import Config
from stager.environments import PATH, Environment, Tree, is_local, spellings
from stager.errors import UsageError
from stager.manifest import Finding
from stager.paths import is_within

_LIBRARIES = "LD_LIBRARY_PATH"
VARIABLES = ("PYTHONPATH", _LIBRARIES)


def settle(environment: Environment, variables: Mapping[str, str], config: Config) -> Environment:
    """Report the directories that an environment is used with, or take them in as layers.

    By the key ``pack.module_paths``. The variables that activation prepends to are set according
    to the final order of the layers.

    Args:
        environment: what was described.
        variables: where it was packed.
        config: ``local_prefixes`` and the store are on the node.
    """
    trees = tuple(_with_libraries(tree, variables) for tree in environment.trees)
    environment = environment._replace(trees=trees)
    found = _beside(environment, variables, config)
    if config["pack.module_paths"] != "include":
        loaded = variables.get("LOADEDMODULES", "").replace(":", ", ")
        findings = tuple(_finding(path, names, loaded) for path, names in found.items())
        environment = environment._replace(findings=(*environment.findings, *findings))
    else:
        own = [spelling for tree in environment.trees for spelling in tree.spellings]
        for path, names in found.items():
            _require_modules(path, names, (*own, config["repository"], os.path.expanduser("~")))
        taken = [_tree(path, names) for path, names in found.items()]
        base = [tree for tree in environment.trees if tree.role == "base"]
        above = environment.trees[len(base) :]
        environment = environment._replace(
            # The first one to be searched is the upper one.
            trees=(*base, *taken[::-1], *above),
            watched=(*environment.watched, *found),
        )
    return _searched(environment)


def _with_libraries(tree: Tree, variables: Mapping[str, str]) -> Tree:
    """A base, searched for libraries where the loader is told to search the original.

    A Python that was linked without a search path of its own finds its libpython by that alone.
    """
    if tree.role != "base":
        return tree
    search = [
        (_LIBRARIES, os.path.relpath(item, spelling))
        for item in variables.get(_LIBRARIES, "").split(":")
        for spelling in tree.spellings
        if os.path.isdir(item) and is_within(os.path.normpath(item), [spelling])
    ]
    return tree._replace(search=(*tree.search, *dict.fromkeys(search)))


def _beside(
    environment: Environment, variables: Mapping[str, str], config: Config
) -> dict[str, list[str]]:
    """The directories that are not on the node, and the variables that name each."""
    own = [spelling for tree in environment.trees for spelling in tree.spellings]
    known = [os.path.realpath(one) for one in (*own, config["store"])]
    found: dict[str, list[str]] = defaultdict(list)
    for variable in VARIABLES:
        for item in variables.get(variable, "").split(":"):
            path, real = os.path.normpath(item), os.path.realpath(item)
            if not item.startswith("/") or not os.path.isdir(item) or variable in found[path]:
                continue
            if is_local(real, config) or is_within(real, known):
                continue
            found[path].append(variable)
    return {path: names for path, names in found.items() if names}


def _require_modules(path: str, names: list[str], within: Iterable[str]) -> None:
    """Refuse to take in a directory that holds much more than modules.

    Raises:
        UsageError: it is a home, or one that the environment or the repository is in.
    """
    for one in within:
        if is_within(one if os.path.isabs(one) else "/", [os.path.realpath(path)]):
            raise UsageError(
                f"{path}, which {' and '.join(names)} names, cannot be included: it contains {one}",
                hint="name a directory that has nothing but modules, or leave it out",
            )


def _finding(path: str, names: list[str], loaded: str) -> Finding:
    modules = f" (loaded: {loaded})" if loaded else ""
    return Finding(
        path,
        "module-path",
        f"in {' and '.join(names)}, set by a module or by you{modules}: not on the node;"
        " --include-module-paths includes it",
        "warning",
    )


def _tree(path: str, names: list[str]) -> Tree:
    return Tree(
        role=PATH,
        root=path,
        spellings=spellings([path]),
        exclude=(),
        python_directories=("",),
        search=tuple((name, "") for name in names),
    )


def _searched(environment: Environment) -> Environment:
    """Let activation prepend the directories that trees are searched by, the uppermost first."""
    activation = environment.activation
    prepend = {name: list(items) for name, items in activation.prepend.items()}
    for number, tree in reversed(list(enumerate(environment.trees))):
        for variable, directory in tree.search:
            path = f"{{layer{number}}}" + (f"/{directory}" if directory else "")
            prepend.setdefault(variable, []).append(path)
    items = {name: tuple(paths) for name, paths in prepend.items()}
    return environment._replace(activation=activation._replace(prepend=items))
