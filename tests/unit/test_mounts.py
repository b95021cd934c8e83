from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from stager import mounts
from stager.mounts import Mount

_MOUNTS = """\
22 1 0:20 / / rw,relatime shared:1 - ext4 /dev/vda rw,discard
95 22 0:51 / /home/bob rw,nosuid - fuse.squashfuse_ll squashfuse_ll ro,user_id=20002,group_id=1
96 22 0:52 / /cvmfs/soft ro,relatime shared:9 - fuse cvmfs2 ro,user_id=0,group_id=0,allow_other
97 22 0:53 / /x\\040y rw shared:9 - fuse.sshfs bob@user_id=0:/ rw,group_id=1,user_id=20002
98 22 0:54 / /net/user_id=7 rw - nfs4 server:/user_id=7 rw,vers=4.2
99 22 0:55 / /a\r1\x0c2\x851 0 0:20 / /b rw - fuse.x x rw,user_id=20002
"""


def test_file_systems_that_a_user_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = {95: 51, 97: 53, 99: 55}
    expected = [Mount(number, os.makedev(0, minor)) for number, minor in devices.items()]

    def opened(path: str, **how: str) -> io.TextIOWrapper:
        assert path == "/proc/self/mountinfo"
        return io.TextIOWrapper(io.BytesIO(_MOUNTS.encode()), **how)  # type: ignore[arg-type]

    monkeypatch.setattr(mounts, "open", opened, raising=False)
    assert [*mounts.of_users()] == expected


def test_whose_a_descriptor_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fd = os.open(tmp_path, os.O_PATH)
    try:
        assert not mounts.is_users(fd)
        fields = Path(f"/proc/self/fdinfo/{fd}").read_text().split()
        own = int(fields[fields.index("mnt_id:") + 1])
        monkeypatch.setattr(mounts, "of_users", lambda: iter([Mount(own, 1)]))
        assert mounts.is_users(fd)
    finally:
        os.close(fd)
