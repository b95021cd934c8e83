"""What is looked at before the kernel mounts anything: see also tests/slurm/test_site_store.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stager import mounts
from stager.errors import DeniedError
from stager.staging import sitestore


def test_what_a_user_has_mounted_is_the_users_whoever_it_says_owns_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mounts, "of_users", lambda: [mounts.Mount(1, os.stat("/usr").st_dev)])
    with pytest.raises(DeniedError, match="/ is writable by users other than root"):
        sitestore.require_trusted("/usr/bin")


def test_links_that_lead_in_circles(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(DeniedError):
        sitestore.require_trusted(str(tmp_path / "a"))
