"""Hostile users on a real cluster: root gains them nothing, and no node is lost to them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from .site import BIN, HOOKS, SHOW, STORE, UID, Site, idle, until

REPOSITORY = ".local/share/stager"
VARIABLES = [
    "SLURM_JOB_ID=900002", "SLURM_JOB_UID=20001", "SLURM_JOB_GID=20001", "SLURMD_NODENAME=n1",
    "SLURM_JOB_WORK_DIR=/home/alice/work", "SLURM_NODELIST=n1", "SLURM_CONF=/etc/slurm/slurm.conf",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def environments(site: Site) -> Iterator[None]:
    for user in ("alice", "bob"):
        site.make_environment(user, "mine")
    yield
    site.clear_stores()


@pytest.fixture(autouse=True)
def _nodes_are_as_before(site: Site) -> Iterator[None]:
    site.clear_stores()
    site.mark()
    yield
    assert site.settled() == idle()


def only(site: Site, comment: str, *, user: str = "alice") -> tuple[str, list[str]]:
    """What a job on n1 printed, and what of it is ours; it must run in any case."""
    done = site.batch("echo ran", "-w", "n1", comment=comment, user=user)
    assert done.output.endswith("ran\n")
    return done.output, done.told()


# -- root opens nothing of theirs


def traced(site: Site, hook: str, comment: str) -> dict[str, list[str]]:
    """For each process of a hook the file-name calls it made while it was root."""
    site.root("n1", "sh", "-c", "rm -rf /var/tmp/trace && mkdir /var/tmp/trace")
    # strace in the background: it follows the FUSE server, too, and that does not end.
    site.root(
        "n1", "env", "-i", *VARIABLES, f"SLURM_JOB_COMMENT={comment}",
        "sh", "-c", 'exec "$@" >/dev/null 2>&1', "sh", "strace", "-D", "-I", "2", "-ff", "-y",
        "-qq", "-s", "4096", "-o", "/var/tmp/trace/of",
        "-e", "trace=%file,setresuid,connect,clone,clone3,fork,vfork", f"{HOOKS}/{hook}",
    )  # fmt: skip
    state = site.place("n1", "/run/stager/jobs/900002")
    until(lambda: not state.exists() or "pending" not in (state / "status").read_text())
    site.cluster.exec("n1", "root", ["sh", "-c", "kill $(pidof strace)"], check=False)
    until(lambda: site.cluster.exec("n1", "root", ["pidof", "strace"], check=False).returncode == 1)
    found: dict[str, list[str]] = {}
    users: set[str] = set()  # what a process starts once it is the user's is the user's as well
    for path in site.place("n1", "/var/tmp/trace").iterdir():
        as_root, dropped, as_user = path.read_text().partition("setresuid(20001, 20001, 20001")
        pid = path.name.rpartition(".")[2]
        found[pid] = [*as_root.splitlines(), *(["dropped"] if dropped else [])]
        users.update(_STARTED.findall(as_user))
    while (
        more := {
            child
            for pid in users & found.keys()
            for child in _STARTED.findall("\n".join(found[pid]))
        }
        - users
    ):
        users |= more
    return {pid: calls for pid, calls in found.items() if pid not in users}


_STARTED = re.compile(r"^(?:clone3?|v?fork)\(.* = (\d+)$", re.MULTILINE)


@pytest.mark.parametrize("comment", ["pyenv:mine", "pyenv:~/envs/mine", "pyenv:./x+/home/bob/y"])
def test_root_opens_no_path_of_a_user(site: Site, comment: str) -> None:
    (site.home("alice") / "work").mkdir(exist_ok=True)
    for hook in ("prolog", "epilog"):
        processes = traced(site, hook, comment)
        assert any(calls[-1:] == ["dropped"] for calls in processes.values())
        everything = [call for calls in processes.values() for call in calls]
        assert any("/etc/stager/config.yaml" in call for call in everything)
        for call in everything:
            assert "/home" not in call, call
            assert "connect(" not in call or "/dev/log" in call or "nscd" in call, call
            # Below the store of the user root makes the directory itself, and opens that.
            assert f"{STORE}/20001/" not in call, call
            if '"20001"' in call:
                assert re.match(rf"(mkdirat|openat)\(\d+<{STORE}>, \"20001\", .*", call), call
                assert "mkdirat" in call or "O_NOFOLLOW" in call, call


# -- the store


@pytest.fixture
def fresh_store(site: Site) -> Iterator[Path]:
    """The place of alice's store on n1, not there."""
    place = site.place("n1", f"{STORE}/20001")
    subprocess.run(["rm", "-rf", str(place)], check=True)
    yield place
    subprocess.run(["rm", "-rf", str(place)], check=True)


def test_nobody_can_make_anything_beside_the_stores(site: Site, fresh_store: Path) -> None:
    done = site.cluster.exec("n1", "bob", ["mkdir", f"{STORE}/20001"], check=False)
    assert "Permission denied" in done.stderr


@pytest.mark.parametrize("planted", ["directory", "link", "file", "fifo"])
def test_a_store_that_somebody_else_made(site: Site, fresh_store: Path, planted: str) -> None:
    """As if its parent had been open to all for a while."""
    if planted == "directory":
        fresh_store.mkdir(0o777)
        os.chown(fresh_store, UID["bob"], UID["bob"])
    elif planted == "link":
        fresh_store.symlink_to("/home/bob")
    elif planted == "fifo":
        os.mkfifo(fresh_store)
    else:
        fresh_store.touch()
    _, (line,) = only(site, "pyenv:mine")
    assert re.search(rf"the store {STORE}/20001 (belongs to uid 20002|is a link or a file)", line)
    assert not (site.home("bob") / "envs" / "20001").exists()
    assert not list(site.home("bob").glob("images"))
    assert re.search(r"event=fail .* blame=site reason=\"the store", site.syslog("n1"))


def test_a_store_that_another_prolog_has_just_made(site: Site, fresh_store: Path) -> None:
    """Root makes it and hands it over: two steps, and two jobs of a user may start at once."""
    fresh_store.mkdir(0o700)
    assert only(site, "pyenv:mine")[1] == []
    assert fresh_store.stat().st_uid == UID["alice"]


@pytest.mark.parametrize("planted", ["directory", "link"])
def test_a_store_in_a_directory_of_everybody(site: Site, planted: str) -> None:
    path = "/mnt/local/stager-20001"
    with site.configured("store: /mnt/local/stager-{uid}", "n1"):
        command = {
            "directory": ["mkdir", "-m", "777", path],
            "link": ["ln", "-s", "/home/bob", path],
        }
        site.cluster.exec("n1", "bob", command[planted])
        try:
            _, (line,) = only(site, "pyenv:mine")
        finally:
            site.root("n1", "rm", "-rf", path)
    assert re.search(rf"the store {path} (belongs to uid 20002|is a symbolic link)", line), line


@pytest.fixture
def silent_server(site: Site) -> Iterator[None]:
    """Alice has mounted a file system on her store whose server does not answer, for all to ask."""
    path = f"{STORE}/20001"
    allow = "echo user_allow_other >/run/fuse.conf; mount --bind /run/fuse.conf /etc/fuse.conf"
    site.root("n1", "sh", "-ec", allow)
    only(site, "")  # makes the store
    script = f"""
        mksquashfs . image -noappend -quiet -no-progress -e .local >/dev/null
        squashfuse -o allow_other image {path}
        kill -STOP $(pidof squashfuse)
    """
    try:
        site.cluster.exec(
            "n1", "alice", ["sh", "-ec", "mkdir -p /tmp/mine; cd /tmp/mine;" + script]
        )
        yield
    finally:
        site.root(
            "n1", "sh", "-c", f"kill -9 $(pidof squashfuse); umount -l {path}; rm -r /tmp/mine"
        )
        site.root("n1", "umount", "/etc/fuse.conf")


def test_root_does_not_wait_for_a_users_file_system(site: Site, silent_server: None) -> None:
    looked = ["timeout", "1", "stat", f"{STORE}/20001"]
    assert site.cluster.exec("n1", "root", looked, check=False).returncode != 0  # it would wait
    assert only(site, "")[1] == []
    _, (line,) = only(site, "pyenv:mine")
    assert f"something is mounted on the store {STORE}/20001" in line
    assert only(site, "pyenv:mine", user="bob")[1] == []
    done = site.cluster.exec(
        "n1", "root", [f"{BIN}/stager", "collect", "--all", "--all-users", "--json"], check=False
    )
    assert json.loads(done.stdout)["users"] == {"20001": -1, "20002": 1}
    assert done.returncode == 1


@pytest.mark.parametrize("fails", [False, True])
def test_what_runs_for_a_user_leaves_nothing_running(site: Site, *, fails: bool) -> None:
    """Such as an environment's own Python, in a session of its own: it is in no job's cgroup."""
    evil = (
        "_before = _work\n"
        "def _work(*arguments):\n"
        "    import subprocess\n"
        "    subprocess.Popen(['sh', '-c', 'touch /tmp/ran; exec sleep 4242'],\n"
        "                     start_new_session=True, close_fds=True)\n"
        "    while not os.path.exists('/tmp/ran'):\n"
        "        time.sleep(0.01)\n"
        f"    return {'1 / 0' if fails else '_before(*arguments)'}\n"
    )
    with site.patched("hooks/forjob", evil, "n1"):
        told = only(site, "pyenv:mine")[1]
    site.settled()
    running = site.root("n1", "ps", "-eo", "args")
    site.root("n1", "rm", "/tmp/ran")
    site.cluster.exec("n1", "root", ["pkill", "-f", "sleep 4242"], check=False)
    assert len(told) == fails
    assert "sleep 4242" not in running
    assert ("squashfuse" in running) is not fails


# -- the comment


@pytest.mark.parametrize(
    "comment",
    [
        "pyenv:$(touch /tmp/evil)",
        "pyenv:`touch /tmp/evil`",
        "pyenv:x;touch${IFS}/tmp/evil",
        "pyenv:x'\"; touch /tmp/evil #",
        "pyenv:mine\nexport LD_PRELOAD=/tmp/evil.so\nprint owned",
        "pyenv:\x1b]0;owned\x07",
        "pyenv:../../../../etc/passwd%00",
        "pyenv:" + "a" * 1000,
        "pyenv:" + "+".join("a" * 500),
        '{"pyenv": "' + "[" * 1000,
        '{"pyenv": "x\\u000aexport LD_PRELOAD=/tmp/evil.so"}',
        "pyenv:mine?strict=$(touch /tmp/evil)&" + "x" * 800,
        "pyenv:-rf",
        "pyenv:*",
    ],
)
def test_comments(site: Site, comment: str) -> None:
    body = 'echo "<$LD_PRELOAD>"; echo ran'
    done = site.batch(body, "-w", "n1", comment=comment[:1024])
    assert done.output.endswith("<>\nran\n"), done.output
    assert "owned\n" not in done.output.replace("print owned", "")
    assert "\x1b" not in done.output
    assert len(done.told()) <= 1
    assert not site.place("n1", "/tmp/evil").exists()
    assert "\x1b" not in site.syslog("n1")
    for line in site.syslog("n1").splitlines():
        assert re.match(r"<\d+>\w{3} +\d+ [\d:]+ stager\[\d+\]: event=", line), line


def test_a_comment_that_slurm_itself_refuses(site: Site) -> None:
    done = site.run("sbatch", "--comment=pyenv:" + "a" * 10240, "--wrap=true", check=False)
    assert done.returncode != 0


def test_a_comment_changed_while_the_job_runs(site: Site) -> None:
    """The Epilog goes by what the Prolog left."""
    change = "scontrol update JobId=$SLURM_JOB_ID Comment=nothing"
    site.batch(change, "-w", "n1", comment="pyenv:mine")
    site.settled()
    assert site.job_states("n1") == []
    assert not list(site.place("n1", f"{STORE}/20001/leases").glob("*/*"))


# -- repositories and images


def test_a_repository_that_is_a_fifo(site: Site) -> None:
    site.shell("alice", "mkdir -p fifo/refs && mkfifo fifo/refs/mine")
    try:
        with site.users_configuration("alice", "echo 'repository: ~/fifo' >config.yaml"):
            _, (line,) = only(site, "pyenv:mine")
    finally:
        site.shell("alice", "rm -r fifo")
    assert "is not a file" in line or "not published" in line, line


def test_a_configuration_of_the_users_that_is_a_fifo(site: Site) -> None:
    with site.users_configuration("alice", "mkfifo config.yaml"):
        only(site, "pyenv:mine")


def test_a_user_cannot_choose_the_store_or_the_hooks_keys(site: Site) -> None:
    text = "store: /tmp/mine\\nhook: {prolog_wait: 1h, on_node_fault: drain, log: /tmp/log}\\n"
    with site.users_configuration("alice", f"printf '{text}' >config.yaml"):
        done = site.batch(SHOW, "-w", "n1", comment="pyenv:mine")
    (prefix,) = done.prefixes()["n1"]
    assert prefix.startswith(f"{STORE}/20001/envs/")
    assert not site.place("n1", "/tmp/log").exists()


def test_one_user_naming_anothers_environment(site: Site) -> None:
    private = site.home("alice") / ".local"
    private.chmod(0o700)
    own = f"{REPOSITORY}/refs"
    theirs = f"/home/alice/{REPOSITORY}"
    site.shell("bob", f"mv {own} {own}.away")
    try:
        with site.users_configuration("bob", f"echo 'repositories: [{theirs}]' >config.yaml"):
            for name in ("/home/alice/envs/mine", f"{theirs}/refs/mine", "mine"):
                _, (line,) = only(site, f"pyenv:{name}", user="bob")
                assert re.search(r"not published|Permission denied", line), line
        assert not list(site.place("n1", f"{STORE}/20002/envs").glob("*"))
    finally:
        site.shell("bob", f"rm -rf {own}; mv {own}.away {own}")
        private.chmod(0o755)


def test_an_image_with_what_none_should_have(site: Site) -> None:
    """A squashfs with a setuid program, a device and links out: nosuid, nodev, and theirs alone."""
    home = site.home("alice")
    # As root, for only root can make devices; a user could write the same bytes by hand.
    tree = home / "evil"
    subprocess.run(["cp", "-a", str(home / "envs/mine"), str(tree)], check=True)
    subprocess.run(["cp", "/usr/bin/id", str(tree / "bin/id")], check=True)
    os.chown(tree / "bin/id", 0, 0)
    (tree / "bin/id").chmod(0o6755)
    os.mknod(tree / "bin/null", 0o600 | 0o020000, os.makedev(1, 3))
    (tree / "bin/null").chmod(0o666)
    (tree / "out").symlink_to("../../../../../../etc/shadow")
    manifest = (home / REPOSITORY / "refs/mine").resolve()
    before = manifest.read_bytes()
    (layer,) = json.loads(before)["layers"]
    (image,) = (home / REPOSITORY / "images").glob(f"{layer['id']}-*")
    forged = home / "forged"
    subprocess.run(
        ["mksquashfs", str(tree), str(forged), "-noappend", "-quiet", "-no-progress"],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        value = json.loads(before)
        crc32 = zlib.crc32(forged.read_bytes())
        for layer in value["layers"]:
            layer["image"].update(size=forged.stat().st_size, crc32=crc32)
        manifest.write_text(json.dumps(value))
        other = image.with_name(re.sub(r"-[0-9a-f]+", f"-{crc32:08x}", image.name))
        other.write_bytes(forged.read_bytes())
        body = """
            prefix=$(dirname $(dirname $(command -v python)))
            grep " $prefix " /proc/self/mounts
            "$prefix/bin/id" -u
            cat "$prefix/bin/null" || echo no device
            cat "$prefix/out" || echo no shadow
        """
        done = site.batch(body, "-w", "n1", comment="pyenv:mine")
        assert "nosuid,nodev" in done.output
        assert "\n20001\n" in done.output
        assert "no device" in done.output
        assert "no shadow" in done.output
        site.settled()
        # Another user does not even see it.
        seen = site.cluster.exec("n1", "bob", ["sh", "-c", f"ls {STORE}/20001"], check=False)
        assert "Permission denied" in seen.stderr
    finally:
        manifest.write_bytes(before)
        other.unlink()
        subprocess.run(["rm", "-rf", str(tree), str(forged)], check=True)


def test_a_message_of_the_users_process_is_not_believed(site: Site) -> None:
    """Had a user taken over the process that works for them: root checks every word."""
    false = (
        "def _work(*a):\n"
        "    return {'how': 'x\\nevent=fake', 'staged': {'python': '/bin/sh', 'prefix': '/etc',\n"
        "        'leave': [], 'set': {'A': 'x\\nexport B=1'}, 'unset': [], 'prepend': {}}}\n"
    )
    # Neither ends by itself: it has to be ended.
    says = (
        "def _work(*a):\n    for _ in range({}): a[1].send({})\n    import time; time.sleep(600)\n"
    )
    for code, told in (
        (false, "a path outside"),
        (says.format(1, "b'x' * 70000"), "too long a message"),
        (says.format(9999, "b'{\"trees\": []}'"), "more questions, and no answer read"),
    ):
        with site.patched("hooks/forjob", code, "n1"):
            _, (line,) = only(site, "pyenv:mine")
        assert told in line
    node = "def _work(*a):\n    raise StagerError('disk!', blame='node')\n"
    with (
        site.patched("hooks/forjob", node, "n1"),
        site.configured("hook: {on_node_fault: drain}", "n1"),
    ):
        only(site, "pyenv:mine")
    assert site.settled() == idle()
    assert "event=fake" not in site.syslog("n1")


def test_only_root_collects_for_all(site: Site) -> None:
    argv = [f"{BIN}/stager", "collect", "--all-users"]
    done = site.cluster.exec("n1", "alice", argv, check=False)
    assert done.returncode != 0
    assert "only root" in done.stderr
