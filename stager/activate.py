"""Activation: the environment variables that make a staged environment the one that is used."""

from __future__ import annotations

import os
from collections.abc import Mapping

from stager.config import Config
from stager.envpatch import EnvPatch
from stager.manifest import Manifest
from stager.stage import Staged

ACTIVE, PREFIX = "STAGER_ACTIVE", "STAGER_PREFIX"


def staged(
    result: Staged, config: Config, environ: Mapping[str, str], *, ref: str
) -> dict[str, str]:
    """The environment with a staged environment active.

    Args:
        result: what staging gave.
        config: ``run.user_site`` decides whether ``~/.local`` is imported from.
        environ: the environment before.
        ref: what the user called it; ``stage-run`` compares it to stay in ``sh``.
    """
    manifest = result.manifest
    patch = EnvPatch.from_json(manifest.activation).at(result.prefix)
    extra = {ACTIVE: ref, PREFIX: result.prefix}
    if not config["run.user_site"]:
        extra["PYTHONNOUSERSITE"] = "1"
    patch = EnvPatch({**patch.set, **extra}, patch.unset, patch.prepend)
    origins = dict.fromkeys((manifest.origin, *manifest.spellings), result.prefix)
    # A cache on shared storage would be looked into for every module, and valid for none.
    after = patch.apply(environ, origins)
    after.pop("PYTHONPYCACHEPREFIX", None)
    return after


def original(manifest: Manifest, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment with the original active: what a job runs on where staging failed."""
    if not os.path.isdir(manifest.origin):
        return dict(environ)
    patch = EnvPatch.from_json(manifest.activation).at(manifest.origin)
    return patch.apply(environ)
