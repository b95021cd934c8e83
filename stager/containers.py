"""Containers: what makes an activation reach into those that Apptainer and Singularity start."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from stager.envpatch import CONTAINERS, EnvPatch
from stager.manifest import Manifest

_PROGRAMS = frozenset(name.lower() for name in CONTAINERS)


def reached(patch: EnvPatch, trees: Iterable[str]) -> EnvPatch:
    """Let an activation hold inside a container too, also where it is started with a clean one.

    Args:
        patch: the activation.
        trees: the staged trees it needs; they are bound at their own paths.
    """
    inside = {
        "PREPEND_PATH" if key == "PATH" else key: items for key, items in patch.prepend.items()
    }
    set_, prepend = dict(patch.set), dict(patch.prepend)
    for runtime in CONTAINERS:
        prepend[f"{runtime}_BIND"] = tuple(trees)
        # These win over what the image sets itself; PATH has a name of its own.
        set_.update({f"{runtime}ENV_{key}": value for key, value in patch.set.items()})
        prepend.update({f"{runtime}ENV_{key}": items for key, items in inside.items()})
    return EnvPatch(set_, patch.unset, prepend)


def warning(command: Sequence[str], manifest: Manifest) -> str:
    """What to say before a container runs an environment whose Python is the node's; or nothing."""
    base = manifest.local_base
    if not base or os.path.basename(command[0]) not in _PROGRAMS:
        return ""
    return (
        f"the environment's Python is this node's own, in {os.path.dirname(base)}, and is not"
        " staged: it works in a container whose image has the same one there; else use an"
        " environment whose Python is packed with it: of conda, uv or a module, in no directory of"
        " the key `local_prefixes`"
    )
