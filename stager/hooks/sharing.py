"""Root's staging into the site's store, in a process of its own: shared storage may hang."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Mapping
from typing import Any

from stager import events, jobstate, privilege, sitestore
from stager.config import Config
from stager.hooks.common import detach, explained, how_it_ended
from stager.ref import Ref, is_name


class Sharing:
    """The process; there is something to read from it when it is done.

    Args:
        wanted: ``name``, ``digest`` and ``repository`` of an environment, which a user named;
            ``pinned`` where they did so by the digest.
        config: loaded with ``trusted_only``.
        holder: the job.

    Raises:
        ValueError: these name nothing.
    """

    def __init__(self, wanted: Mapping[str, Any], config: Config, holder: str) -> None:
        repository, digest = str(wanted["repository"]), str(wanted["digest"])
        if not (is_name(wanted["name"]) and re.fullmatch("[0-9a-f]{64}", digest)):
            raise ValueError("not an environment")
        # The node has asked for this file already.
        wish = Ref(name=wanted["name"], digest=digest if wanted["pinned"] is True else "")
        self._reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                signal.pthread_sigmask(signal.SIG_SETMASK, ())
                os.setsid()
                detach(writer)
                os.umask(0o022)
                os.chdir("/")
                os.environ.clear()
                os.environ.update(PATH=privilege.PATH, LC_ALL="C.UTF-8")
                os.write(
                    writer, json.dumps(_stage(repository, wish, digest, config, holder)).encode()
                )
            finally:
                os._exit(0)
        os.close(writer)

    def fileno(self) -> int:
        """For :func:`select.select`."""
        return self._reader

    def answer(self) -> bytes:
        """How each layer came to be, or an error: see :mod:`stager.forjob`. Ends the process."""
        told = os.read(self._reader, jobstate.MAX_MESSAGE)
        os.close(self._reader)
        by = how_it_ended(self.pid)
        if told:
            return told
        how = f"was ended by {by}" if by else "ended without a word"
        reason = f"the process that stages into the site's store {how}"
        return json.dumps({"error": reason, "hint": "tell your administrator"}).encode()


def _stage(repository: str, wish: Ref, digest: str, config: Config, holder: str) -> dict[str, Any]:
    try:
        return {"layers": sitestore.stage(repository, wish, digest, config, holder).layers}
    except BaseException as error:
        reason, hint = explained(error)
        return {"error": events.clean(reason, 600), "hint": events.clean(hint, 300)}
