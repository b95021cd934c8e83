"""Images sent ahead: each node once, whole or not at all, and jobs read nothing more."""

from __future__ import annotations

import pytest

from push.conftest import pack
from push.lab import Lab

pytestmark = pytest.mark.push

ALL = "node[1-4]"


def test_a_pushed_image_is_all_that_a_job_needs(lab: Lab) -> None:
    pack(lab)
    # Nothing of the shared repository can be read on the nodes while they receive.
    for node in lab.nodes.values():
        node.run("mount", "-t", "tmpfs", "tmpfs", lab.repository)
    said = lab.push()
    assert {one["how"] for one in said["nodes"].values()} == {"received"}
    sizes = {one["sent"] for one in said["nodes"].values()}
    assert len(sizes) == 1
    assert sizes.pop() > 3 << 20
    assert said["failed"] == []
    for name, node in lab.nodes.items():
        (tree,) = lab.trees(name)
        assert (tree["how"], tree["ready"], tree["leases"]) == ("received", False, {})
        # A job reads the manifest, and then nothing but its node.
        node.run("umount", lab.repository)
        node.run("mount", "-t", "tmpfs", "tmpfs", lab.repository / "images")
        prefix = lab.on(name, "stage", "it").stdout.strip()
        ran = node.run(f"{prefix}/bin/tiny").stdout
        assert ran.strip() == prefix
    again = lab.push()
    assert {(one["how"], one["sent"]) for one in again["nodes"].values()} == {("had", 0)}
