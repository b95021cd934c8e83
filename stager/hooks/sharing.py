"""Root's staging into the site's store, for a job."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Callable

from stager.config import Config
from stager.ref import Ref, is_name
from stager.staging import sitestore


def ordered(wanted: Mapping[str, Any], config: Config, holder: str) -> Callable[[], dict[str, Any]]:
    """What has to be done for an environment that a user named: see :mod:`stager.hooks.forjob`.

    Args:
        wanted: ``name``, ``digest`` and ``repository``; ``pinned`` where they named it by the
            digest.
        config: loaded with ``trusted_only``.
        holder: the job.

    Raises:
        ValueError: these name nothing.
    """
    repository, digest = str(wanted["repository"]), str(wanted["digest"])
    if not (is_name(wanted["name"]) and re.fullmatch("[0-9a-f]{64}", digest)):
        raise ValueError("not an environment")
    # The node has asked for this file already.
    wish = Ref(name=wanted["name"], digest=digest if wanted["pinned"] is True else "")

    def work() -> dict[str, Any]:
        return {"layers": sitestore.stage(repository, wish, digest, config, holder).layers}

    return work
