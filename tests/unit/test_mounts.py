from __future__ import annotations

import os

from stager import mounts

_MOUNTS = r"""
22 1 0:20 / / rw,relatime shared:1 - ext4 /dev/vda rw,discard
95 22 0:51 / /home/bob rw,nosuid - fuse.squashfuse_ll squashfuse_ll ro,user_id=20002,group_id=1
96 22 0:52 / /cvmfs/soft ro,relatime shared:9 - fuse cvmfs2 ro,user_id=0,group_id=0,allow_other
97 22 0:53 / /x\040y rw shared:9 - fuse.sshfs bob@user_id=0:/ rw,group_id=1,user_id=20002
98 22 0:54 / /net/user_id=7 rw - nfs4 server:/user_id=7 rw,vers=4.2
"""


def test_file_systems_that_a_user_serves() -> None:
    found = mounts.parsed(_MOUNTS.strip().splitlines())
    assert found == {"/home/bob": os.makedev(0, 51), "/x y": os.makedev(0, 53)}
