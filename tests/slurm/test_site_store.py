"""Environments of the site: staged by root, once for all users of a node, mounted by the kernel."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator

import pytest

from .site import APPS, BIN, NODES, READABLE, SHARED, SHOW, STORE, UID, Site, idle, until


@pytest.fixture(scope="module")
def tree(site: Site) -> Iterator[str]:
    """Where the environment is staged."""
    with site.published_for_all("central", *NODES) as tree:
        yield tree


pytestmark = pytest.mark.usefixtures("tree")


def test_two_users_share_one_mount_of_the_kernels(site: Site, tree: str) -> None:
    for user in ("alice", "bob"):
        done = site.batch(f"srun {SHOW}", "-N4", user=user, comment="pyenv:central")
        assert done.prefixes() == {node: {tree} for node in NODES}
        assert done.told() == []
    assert site.settled() == idle()
    for node in NODES:
        ((place, kind, options),) = site.shared_mounts(node)
        assert (place, kind) == (tree, "squashfs")
        assert options >= {"ro", "nosuid", "nodev"}
        assert site.shared_claims(node) == []


def test_several_jobs_at_once_make_it_once(site: Site, tree: str) -> None:
    site.evict_shared("n1")
    site.mark()
    args = ("-w", "n1", "--oversubscribe", "-n1", "-o", "/dev/null", "--comment=pyenv:central")
    jobs = [
        site.cluster.sbatch("#!/bin/sh\nsleep 1\n", user=user, args=args)
        for user in ("alice", "bob", "alice")
    ]
    for job in jobs:
        assert site.cluster.wait(job) == "COMPLETED"
    until(lambda: site.syslog("n1").count("event=release") == 3)
    told = re.findall(r"event=stage .* how=(\w+) seconds=[\d.]+ bytes=(\d+)", site.syslog("n1"))
    made = [int(size) for how, size in told if how == "mounted"]
    assert sorted(how for how, _ in told) == ["hit", "hit", "mounted"]
    assert made[0] > 0
    assert [place for place, *_ in site.shared_mounts("n1")] == [tree]
    assert site.shared_claims("n1") == []


def test_stage_run_in_such_a_job_uses_it(site: Site, tree: str) -> None:
    body = f"{BIN}/stage-run --env central python -c 'import sys; print(\"n1\", sys.prefix)'"
    done = site.batch(body, "-w", "n1", comment="pyenv:central")
    assert done.prefixes() == {"n1": {tree}}
    assert not list(site.place("n1", f"{STORE}/{UID['alice']}/envs").glob("*"))


def test_without_the_hooks_each_user_unpacks_their_own(site: Site, tree: str) -> None:
    """Nobody claims the site's tree for them."""
    with original(site):
        body = f"{BIN}/stage-run --env central python -c 'import sys; print(\"n1\", sys.prefix)'"
        done = site.batch(body, "-w", "n1")
    (prefix,) = done.prefixes()["n1"]
    assert prefix == tree.replace(SHARED, f"{STORE}/{UID['alice']}")
    site.clear_stores()


def test_what_a_job_uses_is_not_evicted(site: Site, tree: str) -> None:
    job = site.cluster.sbatch(
        f"#!/bin/sh\nexec {tree}/bin/python -c 'import time; time.sleep(60)'\n",
        user="alice",
        args=["-w", "n1", "-o", "/dev/null", "--comment=pyenv:central"],
    )
    try:
        until(lambda: site.shared_claims("n1"))
        until(lambda: site.cluster.exec("n1", "root", ["pgrep", "-f", "sleep.60"], check=False))
        site.evict_shared("n1")
        assert [place for place, *_ in site.shared_mounts("n1")] == [tree]
    finally:
        site.run("scancel", str(job))
    site.settled()
    site.evict_shared("n1")
    assert site.shared_mounts("n1") == []
    assert not list(site.place("n1", f"{SHARED}/images").glob("*"))


@contextlib.contextmanager
def original(site: Site) -> Iterator[None]:
    """The original is back in its place."""
    site.root("ctl", "mv", f"{APPS}/away", f"{APPS}/envs")
    try:
        yield
    finally:
        site.root("ctl", "mv", f"{APPS}/envs", f"{APPS}/away")


def refused(site: Site, reason: str, *, comment: str = "pyenv:central", node: str = "n1") -> None:
    """A job runs on the original, the user reads why, and nothing was made in the site's store."""
    site.evict_shared(node)
    with original(site):
        done = site.batch(SHOW, "-w", node, comment=comment)
    (line,) = done.told()
    assert "not staged, running the original" in line
    assert re.search(reason, line), line
    assert done.prefixes() == {node: {f"{APPS}/envs/central"}}
    assert site.settled() == idle()
    assert site.shared_mounts(node) == []
    assert site.shared_claims(node) == []
    assert not list(site.place(node, f"{SHARED}/envs").glob("*"))


@contextlib.contextmanager
def changed(site: Site, change: str, back: str) -> Iterator[None]:
    site.root("ctl", "sh", "-ec", f"cd {APPS}/stager; {change}")
    try:
        yield
    finally:
        site.root("ctl", "sh", "-ec", f"cd {APPS}/stager; {back}")


@pytest.mark.parametrize(
    ("change", "back", "where"),
    [
        ("chown alice images/*", "chown root images/*", "/images/"),
        ("chmod g+w images/*", "chmod g-w images/*", "/images/"),
        ("chown alice refs/*", "chown root refs/*", "/refs/central"),
        ("chmod o+w images", "chmod o-w images", "/images"),
        ("chmod 1777 .", "chmod 755 .", "/stager"),
        ("chown alice ..", "chown root ..", ""),
        (
            "mv images ../images; ln -s ../images images; chown -h alice images",
            "rm images; mv ../images images",
            "/images",
        ),
        (
            "mkdir ../of; chown alice ../of; mv images ../of/images; ln -s ../of/images images",
            "rm images; mv ../of/images images; rmdir ../of",
            "/of",
        ),
    ],
)
def test_what_others_could_have_written_is_not_mounted(
    site: Site, change: str, back: str, where: str
) -> None:
    with changed(site, change, back):
        refused(site, f"{APPS}.*{where}.* is writable by users other than root")


def test_a_pinned_one_whose_manifest_is_not_roots(site: Site) -> None:
    shown = site.root("ctl", f"{BIN}/stager", "inspect", "--json", "central")
    pinned = f"pyenv:central@sha256:{json.loads(shown)['digest']}"
    refused_of_alice = ".*/manifests/[0-9a-f]{64}.json is writable by users other than root"
    # A name is a link to the same file.
    with changed(site, "chown alice manifests/*", "chown root manifests/*"):
        refused(site, refused_of_alice, comment=pinned)
    done = site.batch(SHOW, "-w", "n1", comment=pinned)
    assert done.prefixes()["n1"]
    assert site.shared_mounts("n1")


def test_doctor_tells_what_is_wrong(site: Site) -> None:
    doctor = (f"{BIN}/stager", "doctor")
    told = site.cluster.exec("n1", "root", doctor, check=False).stdout
    assert f"the site's store {SHARED}: trees are mounted by the kernel" in told
    with changed(site, "chmod o+w .", "chmod o-w ."):
        told = site.cluster.exec("n1", "root", doctor, check=False).stdout
    assert f"{APPS}/stager is writable by users other than root" in told


def test_a_damaged_image(site: Site) -> None:
    keep = "cp -p images/* ../image; "
    damage = "printf x | dd of=$(echo images/*) conv=notrunc bs=1 seek=5000 status=none"
    with changed(site, keep + damage, "cp -p ../image $(echo images/*); rm ../image"):
        refused(site, "damaged|checksum")


def test_a_users_environment_for_the_sites_store_is_not_roots_to_stage(site: Site) -> None:
    """They may pack for that path and call their repository the site's: root does not."""
    site.make_environment("alice", "mine")
    site.shell("alice", f"{BIN}/stager pack --store {SHARED} --repository theirs envs/mine")
    keys = (
        f"site_store: {SHARED}\\nrepositories: [/home/alice/theirs]\\nrepository: /home/alice/x\\n"
    )
    with site.users_configuration("alice", f"printf '{keys}' >config.yaml"):
        done = site.batch(SHOW, "-w", "n1", comment="pyenv:mine")
    (prefix,) = done.prefixes()["n1"]
    assert prefix.startswith(f"{STORE}/{UID['alice']}/envs/")
    assert site.shared_mounts("n1") == []
    site.shell("alice", "rm -r theirs")
    site.clear_stores()


def test_a_user_who_claims_that_anything_is_the_sites(site: Site) -> None:
    """Root's side looks for itself: what works as the user may be the user's by then."""
    site.make_environment("alice", "mine")
    code = f"sitestore.of = lambda *_: sitestore.SiteStore('{SHARED}')\n"
    with site.patched("hooks/forjob", code, "n1"):
        done = site.batch(SHOW, "-w", "n1", comment="pyenv:mine")
    (line,) = done.told()
    assert "is no repository of this site" in line
    site.clear_stores()


def test_where_jobs_may_not_see_a_mount_it_is_unpacked(site: Site, tree: str) -> None:
    with site.configured("hook: {mounts: prolog}\n", "n2"):
        site.evict_shared("n2")
        done = site.batch(SHOW, "-w", "n2", comment="pyenv:central")
    assert done.prefixes() == {"n2": {tree}}
    assert site.shared_mounts("n2") == []
    site.evict_shared("n2")
    assert not list(site.place("n2", f"{SHARED}/envs").glob("*"))


def test_where_the_kernel_cannot_mount_it_is_unpacked(site: Site, tree: str) -> None:
    with site.patched(
        "formats/squashfs", "def mount_by_kernel(*_):\n    raise StagerError('no')\n", "n2"
    ):
        site.evict_shared("n2")
        done = site.batch(SHOW, "-w", "n2", comment="pyenv:central")
    assert done.prefixes() == {"n2": {tree}}
    assert done.told() == []
    assert site.shared_mounts("n2") == []
    site.evict_shared("n2")


def test_the_process_is_killed_in_the_middle(site: Site, tree: str) -> None:
    code = "_copy = copy\ndef copy(*_, **__):\n    import os\n    os.kill(os.getpid(), 9)\n"
    with site.patched("transfer", code, "n1"):
        refused(site, "was ended by SIGKILL")
    done = site.batch(SHOW, "-w", "n1", comment="pyenv:central")
    assert done.prefixes() == {"n1": {tree}}


def test_it_takes_too_long(site: Site, tree: str) -> None:
    with site.slow(60, "n1"):
        refused(site, "longer than 2 s", comment="pyenv:central?timeout=2s")
    until(
        lambda: not site.cluster.exec("n1", "root", ["pgrep", "-f", "prolog"], check=False).stdout
    )


def test_a_store_below_a_directory_of_all(site: Site) -> None:
    """A user makes it first, with a link to where root would then remove things."""
    squat = """
        mkdir -p /mnt/local/precious/payroll
        mkdir /tmp/squat; cd /tmp/squat
        mkdir images ready leases locks tmp images/payroll
        ln -s /mnt/local/precious envs
    """
    with site.configured("site_store: /tmp/squat\n", "n3"):
        site.shell("alice", squat, host="n3")
        publish = f"{BIN}/stager pack --store /tmp/squat --repository {APPS}/stager --name squat"
        with original(site):
            site.root("ctl", "sh", "-ec", f"{publish} {APPS}/envs/central; {READABLE}")
            done = site.batch(SHOW, "-w", "n3", comment="pyenv:squat")
        (line,) = done.told()
        assert "/tmp is writable by users other than root" in line
        collect = (f"{BIN}/stager", "collect", "--all", "--all-users", "--json")
        told = site.cluster.exec("n3", "root", collect, check=False)
        assert (told.returncode, json.loads(told.stdout)["users"]["0"]) == (1, -1)
        assert site.place("n3", "/mnt/local/precious/payroll").is_dir()
    site.shell("alice", "rm -r /tmp/squat /mnt/local/precious", host="n3")
    site.root("ctl", f"{BIN}/stager", "remove", "--repository", f"{APPS}/stager", "squat")


def test_what_not_all_may_read_is_not_shown_to_all(site: Site) -> None:
    with changed(site, "chgrp -R alice .; chmod -R o-rwx .", f"chgrp -R root .; {READABLE}"):
        refused(site, f"{APPS}/stager is not readable by everyone")


def test_an_archive_is_unpacked_for_all(site: Site) -> None:
    publish = f"{site.publish} --format tar.zst --name archive {APPS}/envs/central"
    with original(site):
        site.root("ctl", "sh", "-ec", f"{publish}; {READABLE}")
    for user in ("alice", "bob"):
        done = site.batch(SHOW, "-w", "n1", user=user, comment="pyenv:archive")
        (prefix,) = done.prefixes()["n1"]
        assert prefix.startswith(f"{SHARED}/envs/")
    assert prefix not in [place for place, *_ in site.shared_mounts("n1")]
    site.evict_shared("n1")
    site.root("ctl", f"{BIN}/stager", "remove", "--repository", f"{APPS}/stager", "archive")


def test_the_first_jobs_of_a_node_begin_at_once(site: Site, tree: str) -> None:
    for _ in range(3):
        site.evict_shared("n1")
        site.root("n1", "rm", "-r", SHARED)
        args = ("-w", "n1", "--oversubscribe", "-n1", "-o", "/home/alice/array.%a")
        script = f"#!/bin/sh\n{SHOW}\n"
        job = site.cluster.sbatch(script, args=[*args, "-a", "0-7", "--comment=pyenv:central"])
        site.cluster.wait(job)
        site.settled()
        found = [path.read_text() for path in site.home("alice").glob("array.*")]
        assert found == [f"n1 {tree}\n"] * 8
        site.shell("alice", "rm array.*")


@pytest.mark.parametrize(
    "message",
    [
        "{'nothing': True}",
        "{'staged': {}, 'how': 'hit'}",
        "{'shared': {'name': '../x', 'digest': '0' * 64, 'pinned': False, 'repository': '/'}}",
        "{'shared': {'name': ['x'], 'digest': '0' * 64, 'pinned': False, 'repository': '/'}}",
        "{'shared': None}",
    ],
)
@pytest.mark.parametrize("after", [False, True])
def test_what_works_as_the_user_is_the_users(site: Site, message: str, after: bool) -> None:
    """It says what it likes to root, while root copies, and when root has staged."""
    code = (
        "_old = _shared\n"
        "def _shared(wish, published, talk):\n"
        "    class Deaf:\n"
        "        send = talk.send\n"
        "        def recv(self, size):\n"
        '            return b\'{"layers": {"x": "hit"}}\'\n'
        f"    _old(wish, published, {'talk' if after else 'Deaf()'})\n"
        f"    _send(talk, {message})\n"
        "    time.sleep(60)\n"
    )
    site.evict_shared("n1")
    with site.patched("hooks/forjob", code, "n1"), site.slow(1.0, "n1"), original(site):
        done = site.batch(SHOW, "-w", "n1", comment="pyenv:central")
    assert done.prefixes() == {"n1": {f"{APPS}/envs/central"}}
    site.settled()
    assert site.job_states("n1") == []
    assert site.shared_claims("n1") == []
    assert site.cluster.exec("n1", "root", ["pgrep", "-f", "prolog"], check=False).stdout == ""


def test_a_tree_that_others_have_mounted_elsewhere_is_left_to_them(site: Site, tree: str) -> None:
    """As where slurmd has come to another mount namespace while jobs run."""
    body = f"until [ -e shown ]; do sleep 0.1; done; {SHOW}"
    args = ["-w", "n1", "-o", "/home/alice/seen", "--comment=pyenv:central", "-D", "/home/alice"]
    job = site.cluster.sbatch(f"#!/bin/sh\n{body}\n", args=args)
    until(lambda: site.shared_claims("n1"))
    until(lambda: site.home("alice").joinpath("seen").exists())
    stage = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from stager import config; from stager.staging import sitestore\n"
        "from stager.ref import Ref\n"
        "loaded = config.load(trusted_only=True, uid=0)\n"
        "sitestore.stage(sys.argv[2], Ref(name='central'), sys.argv[3], loaded, 'slurm-9-0')\n"
    )
    shown = site.root("ctl", f"{BIN}/stager", "inspect", "--json", "central")
    program = f"/usr/lib/stager/{site.program('n1').name}"
    argv = ["python3", "-I", "-B", "-c", stage, program, f"{APPS}/stager"]
    argv = [*argv, json.loads(shown)["digest"]]
    elsewhere = ["unshare", "-m", "sh", "-ec", f'umount {tree}; "$@"', "sh", *argv]
    tried = site.cluster.exec("n1", "root", elsewhere, check=False)
    assert "is mounted for other jobs" in tried.stderr
    site.shell("alice", "touch shown")
    assert site.cluster.wait(job) == "COMPLETED"
    assert site.home("alice").joinpath("seen").read_text() == f"n1 {tree}\n"
    site.shell("alice", "rm shown seen")


def test_status_shows_it(site: Site, tree: str) -> None:
    site.batch(SHOW, "-w", "n1", comment="pyenv:central")
    shown = site.root("n1", f"{BIN}/stager", "status", "--store", SHARED)
    assert re.search(rf"{tree.rpartition('/')[2]} +mounted", shown), shown
