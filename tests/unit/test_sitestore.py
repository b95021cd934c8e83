"""What is looked at before the kernel mounts anything: see also tests/slurm/test_site_store.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stager import sitestore
from stager.errors import DeniedError

_MOUNTS = """\
22 1 0:20 / / rw,relatime shared:1 - ext4 /dev/vda rw,discard
95 22 0:51 / /home/bob rw,nosuid - fuse.squashfuse_ll squashfuse_ll ro,user_id=20002,group_id=1
96 22 0:52 / /cvmfs/soft ro,relatime shared:9 - fuse cvmfs2 ro,user_id=0,group_id=0,allow_other
97 22 0:53 / /x rw shared:9 - fuse.sshfs bob@user_id=0:/ rw,group_id=1,user_id=20002
98 22 0:54 / /net/user_id=7 rw - nfs4 server:/user_id=7 rw,vers=4.2
"""


def test_file_systems_that_a_user_serves() -> None:
    found = sitestore.mounted_by_users(_MOUNTS.splitlines())
    assert found == {os.makedev(0, 51), os.makedev(0, 53)}


def test_what_a_user_has_mounted_is_the_users_whoever_it_says_owns_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sitestore, "mounted_by_users", lambda _: {os.stat("/usr").st_dev})
    with pytest.raises(DeniedError, match="others than root can write /"):
        sitestore.require_trusted("/usr/bin")


def test_links_that_lead_in_circles(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(DeniedError):
        sitestore.require_trusted(str(tmp_path / "a"))
