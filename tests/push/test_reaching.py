"""How nodes are reached, and what is said where they cannot be, or the input is wrong."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from environments import VENV, run
from push.conftest import pack
from push.lab import Lab

pytestmark = pytest.mark.push


@pytest.fixture(scope="module")
def shared(new_lab: Callable[[int], Lab]) -> Lab:
    """Two nodes for all tests here, which use different stores."""
    lab = new_lab(2)
    pack(lab, ballast=1 << 16)
    return lab


@pytest.fixture
def one(shared: Lab) -> Iterator[Lab]:
    """The same, with the ssh configuration and the keys as they were afterwards."""
    saved = shared.root / "saved"
    shutil.copytree(shared.home / ".ssh", saved)
    yield shared
    shutil.rmtree(shared.home / ".ssh")
    saved.rename(shared.home / ".ssh")
    for node in shared.nodes.values():
        node.run("rm", "-rf", f"/tmp/stager-{os.getuid()}")


def failure(lab: Lab, *argv: str, status: int, nodes: str = "node1", **more: str) -> str:
    """What a push says that fails on the only node, without the summary."""
    done = lab.stager(*lab.push_words(*argv, nodes=nodes), status=status, **more)
    return done.stderr


def refused(lab: Lab, *argv: str, status: int) -> str:
    """What a command says that does not even begin."""
    done = lab.stager(*argv, status=status)
    lines = done.stderr.splitlines()
    assert done.stdout == ""
    assert lines[0].startswith("stager: error: "), lines
    assert len(lines) == 1 or lines[1].startswith("hint: "), lines
    return done.stderr


# Wrong input


def test_node_sets(one: Lab) -> None:
    groups = one.root / "clustershell"
    groups.mkdir()
    (groups / "groups.conf").write_text(
        "[Main]\ndefault: file\n[file]\nmap: sed -n 's/^$GROUP://p' $CFGDIR/all\nlist: true\n"
    )
    (groups / "all").write_text("compute:node[1-2]\n")
    where = str(groups)
    said = one.push(nodes="@compute", CLUSTERSHELL_CFGDIR=where)
    assert list(said["nodes"]) == ["node1", "node2"]
    said = one.push(nodes="@compute!node1", CLUSTERSHELL_CFGDIR=where)
    assert list(said["nodes"]) == ["node2"]
    done = one.stager("push", "-w", "@nope", "it", status=2, CLUSTERSHELL_CFGDIR=where)
    assert "there are no nodes in '@nope': a group in it is unknown or empty" in done.stderr
    for text in ("", "node[1-", "node1!node1", "-oProxyCommand=x"):
        assert (
            "nodes" in refused(one, "push", f"-w{text}" if text else "-w=", "it", status=2) or text
        )


def test_what_is_not_published_reaches_no_node(one: Lab) -> None:
    assert "`nope` is not published" in refused(one, "push", "-w", "node1", "nope", status=10)


def test_a_missing_image_reaches_no_node(one: Lab) -> None:
    (image,) = one.repository.glob("images/*")
    aside = image.rename(one.root / "aside")
    try:
        said = one.stager(*one.push_words(nodes="node1"), status=10).stderr
        assert f"the image {image} is missing" in said
    finally:
        aside.rename(image)
    assert not one.store("node1").exists()


@pytest.mark.parametrize("words", [
    ("--min-success", "3"), ("--min-success", "101%"), ("--min-success", "most"),
    ("--fanout", "0"), ("--tree=-1",), ("--connect-timeout", "soon"), ("--idle-timeout", "0s"),
    ("--ssh-config", "/nonexistent"),
])  # fmt: skip
def test_options_that_make_no_sense(one: Lab, words: tuple[str, ...]) -> None:
    refused(one, "push", "-w", "node[1-2]", "it", *words, status=2)


# Host keys and logins


def test_an_unknown_host_is_refused(one: Lab) -> None:
    (one.home / ".ssh" / "known_hosts").unlink()
    said = failure(one, status=14)
    assert "1 of 1 node failed: node1: its host key is not known\nhint: ssh NODE once" in said


def test_a_host_may_be_accepted_by_configuration(one: Lab) -> None:
    (one.home / ".ssh" / "known_hosts").unlink()
    with (one.home / ".ssh" / "config").open("a") as file:
        file.write("Host *\nStrictHostKeyChecking accept-new\n")
    one.push(nodes="node1")
    assert not (one.home / ".ssh" / "known_hosts").exists()


def test_hashed_names_and_ports_are_known(one: Lab) -> None:
    known = one.home / ".ssh" / "known_hosts"
    run(["ssh-keygen", "-q", "-H", "-f", known])
    assert one.nodes["node1"].address not in known.read_text()
    one.push(nodes="node1")


def test_lines_of_others_in_known_hosts_are_no_hindrance(one: Lab) -> None:
    known = one.home / ".ssh" / "known_hosts"
    name, kind, key = known.read_text().splitlines()[0].split()
    short, negative = "AAAAC3NzaC1lZDI1NTE5AAAA", "AAAAB3NzaC1yc2EAAAABAwAAAAH/"
    lines = [
        f"@cert-authority *.example.org {kind} {key} the site's",
        f"@unheard-of other {kind} {key}", "@revoked", "# a comment", "", "other",
        f"other {kind} =", f"other {kind} {short}", f"other ssh-rsa {negative}",
        f"other ssh-rsa {key}", f"other ssh-unheard-of {key}",
        f"|1|sal|hash {kind} {key}", f"|1|c2FsdA==|aGFzaA== {kind} {key}",
        f"other  {kind}  {key}  M\N{LATIN SMALL LETTER U WITH DIAERESIS}ller",
        f" {name}\t\t{kind}   {key}",
    ]  # fmt: skip
    known.write_text("\n".join([*lines, ""]), encoding="latin-1")
    one.push(nodes="node1")


@pytest.mark.parametrize("name", ["*", "other"])
def test_a_revoked_key_is_refused_in_any_case(one: Lab, name: str) -> None:
    known = one.home / ".ssh" / "known_hosts"
    line, other = known.read_text().splitlines()[:2]
    address, kind, key = line.split()
    replaced = f"{address} {kind} {other.split()[2]}"
    with (one.home / ".ssh" / "config").open("a") as file:
        file.write("Host *\nStrictHostKeyChecking accept-new\n")
    for known_too in ("", line, replaced):
        known.write_text(f"{known_too}\n@revoked {name} {kind} {key}\n")
        said = failure(one, status=14)
        assert "1 of 1 node failed: node1: its host key is revoked in known_hosts" in said


def test_a_refused_login(one: Lab) -> None:
    (one.home / ".ssh" / "id_ed25519").unlink()
    said = failure(one, status=14)
    assert "1 of 1 node failed: node1: the login as root was refused" in said
    assert "ssh-add" in said


def test_a_key_with_a_passphrase_works_through_the_agent(one: Lab) -> None:
    key = one.home / ".ssh" / "id_ed25519"
    socket = str(one.root / "agent")
    agent = run(["ssh-agent", "-s", "-a", socket]).stdout
    found = re.search(r"SSH_AGENT_PID=(\d+)", agent)
    assert found is not None
    try:
        run(["ssh-add", key], env={"PATH": "/usr/bin", "SSH_AUTH_SOCK": socket})
        run(["ssh-keygen", "-q", "-p", "-P", "", "-N", "secret", "-f", key])
        assert "was refused" in failure(one, status=14)
        one.push(nodes="node1", SSH_AUTH_SOCK=socket)
        # The agent may be lent to a node that serves others.
        said = one.push("--tree=1", "--forward-agent", "--no-stage", SSH_AUTH_SOCK=socket)
        assert said["nodes"]["node2"]["via"] == "node1"
    finally:
        os.kill(int(found[1]), signal.SIGTERM)


def test_a_host_behind_another(one: Lab) -> None:
    address = one.nodes["node2"].address
    one.login.run("ip", "route", "add", "blackhole", address)
    try:
        assert "cannot connect" in failure(one, nodes="node2", status=1)
        config = one.home / ".ssh" / "config"
        plain = config.read_text()
        config.write_text(f"Include jump\n{plain}")
        (one.home / ".ssh" / "jump").write_text("Host node2\nProxyJump root@node1:22\n")
        assert one.push(nodes="node2")["nodes"]["node2"]["how"] == "received"
        key, known = one.home / ".ssh" / "id_ed25519", one.home / ".ssh" / "known_hosts"
        through = f"ssh -i {key} -o UserKnownHostsFile={known} -F {config} -W %h:%p node1"
        config.write_text(f"Host node2\n ProxyCommand {through}\n{plain}")
        assert one.push(nodes="node2")["nodes"]["node2"]["how"] == "had"
        config.write_text(f"Host node2\nProxyJump node2\n{plain}")
        assert "failed: node2: " in failure(one, nodes="node2", status=1)
    finally:
        one.login.run("ip", "route", "del", "blackhole", address)


def test_another_configuration_file(one: Lab) -> None:
    config = one.home / ".ssh" / "config"
    moved = config.rename(one.root / "config")
    assert "its name is not known" in failure(one, status=1)
    one.push("--ssh-config", str(moved), nodes="node1")


# The stager of a node


def program(lab: Lab, text: str) -> str:
    path = lab.root / "program"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_no_stager_there(one: Lab) -> None:
    said = failure(one, "--remote-stager", "/nonexistent/stager", status=10)
    assert "node1: `/nonexistent/stager` cannot be started there: " in said
    assert "hint: install stager on the nodes, or say where it is: --remote-stager" in said


def test_an_older_stager_there(one: Lab) -> None:
    text = "echo \"stager: error: argument VERB: invalid choice: 'receive'\" >&2; exit 2"
    said = failure(one, "--remote-stager", program(one, text), status=15)
    assert "is too old there: it has no verb `receive`" in said


def test_a_stager_of_another_protocol_there(one: Lab) -> None:
    text = 'echo \'{"stager-push":99,"stager":"9.0"}\'; cat >/dev/null'
    said = failure(one, "--remote-stager", program(one, text), status=15)
    assert "node1: the node's stager 9.0 speaks version 99 of the protocol" in said


@pytest.mark.parametrize("text", [
    "exit 0", "echo hello; exit 7", "yes | head -c 3000000", "kill -9 $$",
    "echo '{\"stager-push\":1}'; echo nonsense", "echo '{\"stager-push\":1}'; echo '[1]'",
    'echo \'{"stager-push":1}\'; echo \'{"send":1,"layer":"x"}\'; sleep 5',
])  # fmt: skip
def test_programs_that_are_no_stager(one: Lab, text: str) -> None:
    said = failure(one, "--remote-stager", program(one, text), status=1)
    assert "1 of 1 node failed: node1: " in said


def test_what_a_login_shell_prints_is_passed_over(one: Lab) -> None:
    text = f'echo "Welcome to {{node1}}"; echo; exec {VENV}/bin/stager "$@"'
    said = one.push("--remote-stager", program(one, text), nodes="node1")
    assert said["nodes"]["node1"]["how"] == "received"
    done = one.stager("status", "--json", "-w", "node1", "--remote-stager", program(one, text))
    assert '"how": "received"' in done.stdout


# The store of a node


@pytest.mark.parametrize("spoil", ["chown 12345 {}", "chmod 755 {}", "rmdir {}; ln -s /tmp {}"])
def test_a_store_that_is_not_ours(one: Lab, spoil: str) -> None:
    store = f"/tmp/stager-{os.getuid()}"
    node = one.nodes["node1"]
    node.run("sh", "-c", f"mkdir -m 700 {store}; {spoil.format(store, store)}")
    said = failure(one, status=14)
    assert f"node1: the store {store} " in said


def test_a_node_that_cannot_run_it(one: Lab) -> None:
    """Told before a byte is sent."""
    manifest = one.repository / "refs" / "it"
    text = manifest.read_text()
    aside = Path(one.root / "manifest.json")
    aside.write_text(text)
    try:
        manifest.write_text(text.replace('"glibc":"', '"glibc":"99.'))
        said = one.stager(*one.push_words(nodes="node1"), status=15)
        assert "node1: the environment needs glibc 99." in said.stderr
        assert '"sent": 0' in said.stdout
    finally:
        manifest.write_text(aside.read_text())
