"""Activation: the environment variables that make a staged environment the one that is used."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping

from stager import containers
from stager.config import Config
from stager.envpatch import EnvPatch
from stager.errors import StagerError
from stager.manifest import Manifest
from stager.stage import Staged

CONDA = "conda"
"""The kind of environments whose packages bring scripts."""

ACTIVE, PREFIX, ORIGIN = "STAGER_ACTIVE", "STAGER_PREFIX", "STAGER_ORIGIN"


def staged(
    result: Staged, config: Config, environ: Mapping[str, str], *, ref: str
) -> dict[str, str]:
    """The environment with a staged environment active.

    Args:
        result: what staging gave.
        config: ``run.user_site`` decides whether ``~/.local`` is imported from.
        environ: the environment before.
        ref: what the user called it; ``stage-run`` compares it to stay in ``sh``.

    Raises:
        StagerError: an activation script of it does not come to an end.
    """
    manifest = result.manifest
    origins = dict.fromkeys((manifest.origin, *manifest.spellings), result.prefix)
    # A cache on shared storage would be looked into for every module, and valid for none.
    own = patch(manifest, result.prefix, config, ref=ref)
    if manifest.kind == CONDA or environ.get("CONDA_PREFIX"):
        from stager import sourcing  # a warm start of other kinds does without

        environ = sourcing.leave(environ)
    after = own.apply(environ, origins)
    after.pop("PYTHONPYCACHEPREFIX", None)
    return sourcing.enter(after, result.prefix) if manifest.kind == CONDA else after


def patch(manifest: Manifest, prefix: str, config: Config, *, ref: str) -> EnvPatch:
    """What activating a staged tree changes, whatever the environment is before.

    Args:
        manifest: the environment's.
        prefix: where it is staged.
        config: ``run.user_site`` as above.
        ref: as above.
    """
    own = EnvPatch.from_json(manifest.activation).at(prefix)
    inside = {} if config["run.user_site"] else {"PYTHONNOUSERSITE": "1"}
    store = os.path.dirname(prefix)
    trees = [os.path.join(store, layer.id) for layer in manifest.layers]
    own = containers.reached(EnvPatch({**own.set, **inside}, own.unset, own.prepend), trees)
    extra = {ACTIVE: ref, PREFIX: prefix, ORIGIN: manifest.origin}
    return EnvPatch({**own.set, **extra}, own.unset, own.prepend)


def original(text: str | None, config: Config, environ: Mapping[str, str]) -> dict[str, str] | None:
    """The environment with the original active: what a job runs on where staging failed.

    Args:
        text: the ref the user typed, or None.
        config: where to look for its manifest.
        environ: the environment before.

    Returns:
        None where the original is not to be found from here.
    """
    from stager import lookup

    path, own = "", None
    with contextlib.suppress(StagerError):
        wish = lookup.wanted(text, environ)
        path = wish.path
        manifest = lookup.find(wish, config).manifest
        path, own = manifest.origin, EnvPatch.from_json(manifest.activation)
    if not path or not os.path.isdir(f"{path}/bin"):
        return None
    is_conda = os.path.isdir(f"{path}/conda-meta")
    if own is None:
        variable = "CONDA_PREFIX" if is_conda else "VIRTUAL_ENV"
        own = EnvPatch({variable: "{prefix}"}, (), {"PATH": ("{prefix}/bin",)})
    after = own.at(path).apply(environ)
    if is_conda:
        from stager import sourcing

        with contextlib.suppress(StagerError):  # better without than not at all
            after = sourcing.enter(after, path)
    return after
