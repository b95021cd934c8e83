"""Images sent ahead: to each node once, whole or not at all, and jobs read nothing more."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import environments
from environments import Environment
from push.conftest import BALLAST, pack
from push.lab import Lab
from workbench import until

pytestmark = pytest.mark.push


def size(lab: Lab, name: str = "it") -> int:
    """Bytes of an environment's images."""
    layers = json.loads(lab.stager("inspect", name, "--json").stdout)["layers"]
    return sum(layer["image"]["size"] for layer in layers)


def hide_images(lab: Lab, node: str) -> None:
    """The manifests can be read on the node, the images cannot."""
    lab.nodes[node].run("mount", "-t", "tmpfs", "tmpfs", lab.repository / "images")


def how(said: dict[str, Any]) -> dict[str, tuple[str, int]]:
    """For each node what was done, and how many bytes went there."""
    return {node: (one["how"], one["sent"]) for node, one in said["nodes"].items()}


def has_image(lab: Lab, node: str) -> bool:
    return any(lab.store(node).glob("images/*"))


def start(lab: Lab, *argv: str, nodes: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        lab.command(*lab.push_words(*argv, nodes=nodes)),
        env=lab.environ(),
        cwd="/",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def in_the_middle(lab: Lab, node: str) -> None:
    """Wait until some of an image has arrived on a node whose link is slow."""
    until("some bytes arrive", lambda: lab.arriving(node) > 100_000)


# What a job finds


def test_a_pushed_image_is_all_that_a_job_needs(lab: Lab) -> None:
    # Nothing of the shared repository can be read on the nodes while they receive.
    for node in lab.nodes.values():
        node.run("mount", "-t", "tmpfs", "tmpfs", lab.repository)
    said = lab.push()
    assert how(said) == dict.fromkeys(lab.nodes, ("received", size(lab)))
    assert said["failed"] == []
    for name, node in lab.nodes.items():
        (tree,) = lab.trees(name)
        assert (tree["how"], tree["ready"], tree["leases"]) == ("received", False, {})
        node.run("umount", lab.repository)
        hide_images(lab, name)
        prefix = lab.on(name, "stage", "it").stdout.strip()
        assert node.run(f"{prefix}/bin/tiny").stdout.strip() == prefix
    assert how(lab.push()) == dict.fromkeys(lab.nodes, ("had", 0))


def test_a_collector_keeps_it_within_bounds(lab: Lab) -> None:
    lab.push(nodes="node1")
    lab.on("node1", "collect")
    assert has_image(lab, "node1")
    lab.on("node1", "collect", "--all")
    assert not has_image(lab, "node1")


def test_an_archive_is_extracted_at_once(lab: Lab) -> None:
    pack(lab, "--format", "tar.zst", name="archive")
    said = lab.push(nodes="node1", ref="archive")
    assert how(said) == {"node1": ("extracted", size(lab, "archive"))}
    assert not has_image(lab, "node1")
    hide_images(lab, "node1")
    staged = json.loads(lab.on("node1", "stage", "archive", "--json").stdout)
    assert staged["how"] == "hit"


def test_an_archive_is_extracted_by_the_job(lab: Lab) -> None:
    pack(lab, "--format", "tar.zst", name="archive")
    said = lab.push("--no-stage", nodes="node1", ref="archive")
    assert how(said) == {"node1": ("received", size(lab, "archive"))}
    hide_images(lab, "node1")
    staged = json.loads(lab.on("node1", "stage", "archive", "--json").stdout)
    assert staged["how"] == "extracted"
    assert not has_image(lab, "node1")


def test_a_mount_can_be_made_at_once(lab: Lab) -> None:
    assert how(lab.push("--stage", nodes="node1"))["node1"][0] == "mounted"
    staged = json.loads(lab.on("node1", "stage", "it", "--json").stdout)
    assert staged["how"] == "hit"


def test_another_store_is_extracted_and_rewritten_at_once(lab: Lab) -> None:
    said = lab.push("--store", "/tmp/another", nodes="node1")
    assert how(said)["node1"][0] == "extracted"
    hide_images(lab, "node1")
    prefix = lab.on("node1", "stage", "it", "--store", "/tmp/another").stdout.strip()
    assert prefix.startswith("/tmp/another/")
    assert lab.nodes["node1"].run(f"{prefix}/bin/tiny").stdout.strip() == prefix


def test_a_base_that_is_there_is_not_sent_again(lab: Lab, pyenv_like_base: Environment) -> None:
    python = pyenv_like_base.bin / "python3"
    for name in ("one", "two"):
        made = environments.make_small_venv(lab.home / name, python=python, **{name: "X = 1"})
        lab.stager("pack", made.prefix, "--name", name)
    layers = json.loads(lab.stager("inspect", "two", "--json").stdout)["layers"]
    base, own = (layer["image"]["size"] for layer in layers)
    assert how(lab.push(nodes="node1", ref="one"))["node1"][1] > base
    assert how(lab.push(nodes="node1", ref="two")) == {"node1": ("received", own)}
    hide_images(lab, "node1")
    prefix = lab.on("node1", "stage", "two").stdout.strip()
    code = "import two, sys; print(two.X, sys.base_prefix)"
    said = lab.nodes["node1"].run(f"{prefix}/bin/python", "-c", code).stdout
    assert said.startswith(f"1 {Path(prefix).parent}/")


# Failures of nodes


def test_each_failure_is_told_and_the_second_push_sends_the_rest(
    new_lab: Callable[[int], Lab],
) -> None:
    lab = new_lab(7)
    pack(lab)
    down, other_key, full, killed = "node3", "node4", "node5", "node6"
    lab.nodes[down].end()
    lab.switch.run("ip", "link", "set", f"to-{down}", "down", check=False)
    known = (lab.home / ".ssh" / "known_hosts").read_text().splitlines()
    right = next(line for line in known if line.startswith(lab.nodes[other_key].address + " "))
    wrong = right.replace(right.split()[2], known[0].split()[2])
    path = lab.home / ".ssh" / "known_hosts"
    path.write_text("\n".join([*(line for line in known if line != right), wrong, ""]))
    store = f"/tmp/stager-{os.getuid()}"
    lab.nodes[full].run("mkdir", "-m", "700", store)
    lab.nodes[full].run("mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "tmpfs", store)
    lab.limit("10mbit", killed)

    push = start(lab, "--connect-timeout", "2s", nodes="node[1-7]")
    in_the_middle(lab, killed)
    for process in lab.receivers(killed):
        os.kill(process, signal.SIGKILL)
    out, err = push.communicate()
    assert push.returncode == 3, err
    said = json.loads(out)
    found = {one["nodes"]: (one["count"], one["code"], one["blame"]) for one in said["failed"]}
    assert found == {
        down: (1, 11, "node"),
        other_key: (1, 14, "site"),
        full: (1, 13, "site"),
        killed: (1, 1, "node"),
    }
    assert f"1 of 7 nodes failed: {full}: not enough space in the store {store}" in err
    assert f"1 of 7 nodes failed: {other_key}: its host key is not the one in known_hosts" in err
    assert f"1 of 7 nodes failed: {killed}: it ended before it was done" in err
    assert f"1 of 7 nodes failed: {down}: no answer on port 22" in err or "cannot connect" in err
    assert "3 of 7 nodes have `it`" in err
    good = ["node1", "node2", "node7"]
    assert [one for one in said["nodes"] if said["nodes"][one]["how"]] == good
    for name in (full, killed, other_key):
        assert not has_image(lab, name), f"half an image is published on {name}"
        assert not any(lab.store(name).glob("ready/*"))
    assert lab.arriving(full) == 0

    arrived = lab.arriving(killed)
    assert 0 < arrived < size(lab)
    path.write_text("\n".join([*known, ""]))
    lab.nodes[full].run("umount", store)
    lab.start(down, lab.nodes[down].address)
    again = lab.push(nodes="node[1-7]")
    assert how(again) == {
        **dict.fromkeys(good, ("had", 0)),
        **dict.fromkeys((down, other_key, full), ("received", size(lab))),
        killed: ("received", size(lab) - arrived),
    }
    for name in lab.nodes:
        lab.on(name, "stage", "it")


def test_a_node_that_falls_silent_is_given_up(lab: Lab) -> None:
    lab.limit("10mbit", "node1")
    push = start(lab, "--idle-timeout", "2s", nodes="node[1-2]")
    in_the_middle(lab, "node1")
    lab.switch.run("ip", "link", "set", "to-node1", "down")
    out, err = push.communicate()
    assert push.returncode == 3, err
    assert "1 of 2 nodes failed: node1: the node sent nothing for 2 s" in err
    assert how(json.loads(out))["node2"] == ("received", size(lab))


def test_a_receiver_whose_pusher_falls_silent_gives_up_the_lock(lab: Lab) -> None:
    """A job that waits for the same image must not wait for ever."""
    lab.limit("10mbit", "node1")
    push = start(lab, "--idle-timeout", "1s", nodes="node1")
    in_the_middle(lab, "node1")
    os.kill(push.pid, signal.SIGSTOP)
    try:
        until("the receiver ends", lambda: not lab.receivers("node1"))
    finally:
        os.kill(push.pid, signal.SIGCONT)
    assert push.wait() == 11
    push.communicate()
    assert not has_image(lab, "node1")


def test_an_interruption_ends_all_and_what_arrived_is_kept(lab: Lab) -> None:
    lab.limit("2mbit", *lab.nodes)
    push = start(lab, nodes="node[1-4]")
    for name in lab.nodes:
        in_the_middle(lab, name)
    push.send_signal(signal.SIGINT)
    out, err = push.communicate()
    assert (push.returncode, out) == (130, "")
    assert err.endswith("stager: interrupted\n")
    assert "Traceback" not in err
    for name in lab.nodes:
        until("the receiver ends", lambda name=name: not lab.receivers(name))
        assert not has_image(lab, name)
        assert lab.arriving(name) > 0
    lab.limit("1gbit", *lab.nodes)
    arrived = {name: lab.arriving(name) for name in lab.nodes}
    expected = {name: ("received", size(lab) - arrived[name]) for name in lab.nodes}
    assert how(lab.push()) == expected


def test_an_interruption_ends_those_who_hand_on(lab: Lab) -> None:
    lab.limit("2mbit", "node4")  # the last one
    push = start(lab, "--tree=1", nodes="node[1-4]")
    in_the_middle(lab, "node4")
    until("node3 has it and only hands it on", lambda: has_image(lab, "node3"))
    push.send_signal(signal.SIGINT)
    assert push.communicate()[0] == ""
    assert push.returncode == 130
    for name in lab.nodes:
        until("the receiver ends", lambda name=name: not lab.receivers(name))
    assert not has_image(lab, "node4")


def test_a_terminal_shows_how_far_it_is(lab: Lab) -> None:
    lab.limit("20mbit", "login")
    ours, theirs = os.openpty()
    push = subprocess.Popen(
        lab.command(*lab.push_words(nodes="node[1-2]")),
        env=lab.environ(TERM="xterm", COLUMNS="120"),
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # EIO: the other end is closed
        while piece := os.read(ours, 1 << 16):
            shown += piece
    os.close(ours)
    assert push.wait() == 0
    assert b"sending to node" in shown  # both, or one where the other has not greeted yet
    assert b"/6.3 MB" in shown
    assert b"2 of 2 nodes have `it`" in shown


def test_two_pushes_at_once_send_it_once(lab: Lab) -> None:
    lab.limit("20mbit", "node1")
    first = start(lab, nodes="node1")
    in_the_middle(lab, "node1")
    second = lab.push(nodes="node1")
    out, err = first.communicate()
    assert first.returncode == 0, err
    assert how(json.loads(out)) == {"node1": ("received", size(lab))}
    assert how(second) == {"node1": ("had", 0)}


def test_a_job_that_stages_meanwhile_waits_and_has_it(lab: Lab) -> None:
    lab.limit("20mbit", "node1")
    hide_images(lab, "node1")
    push = start(lab, nodes="node1")
    in_the_middle(lab, "node1")
    prefix = lab.on("node1", "stage", "it").stdout.strip()
    assert lab.nodes["node1"].run(f"{prefix}/bin/tiny").stdout.strip() == prefix
    assert push.communicate()[1] is not None
    assert push.returncode == 0


def test_a_damaged_image_is_published_nowhere(lab: Lab) -> None:
    (image,) = lab.repository.glob("images/*")
    with image.open("r+b") as file:
        file.seek(BALLAST // 2)
        byte = file.read(1)
        file.seek(BALLAST // 2)
        file.write(bytes([byte[0] ^ 1]))
    said = lab.push(status=12)
    ((where, count, code),) = [(one["nodes"], one["count"], one["code"]) for one in said["failed"]]
    assert (where, count, code) == ("node[1-4]", 4, 12)
    assert "4 of 4 nodes failed: node[1-4]: the image arrived damaged" in said["said"]
    for name in lab.nodes:
        assert not has_image(lab, name)
        assert lab.arriving(name) == 0


def test_enough_may_be_fewer_than_all(lab: Lab) -> None:
    lab.nodes["node4"].end()
    for needed, status in (("3", 0), ("75%", 0), ("76%", 3), ("4", 3)):
        words = ("--connect-timeout", "1s", "--min-success", needed)
        said = lab.push(*words, status=status)
        assert "1 of 4 nodes failed: node4: " in said["said"]


# Trees


def sent_by_login(lab: Lab) -> int:
    """Bytes that the login host's network has sent; /sys shows this machine's own."""
    (link,) = json.loads(lab.login.run("ip", "-s", "-j", "link", "show", "eth0").stdout)
    return int(link["stats64"]["tx"]["bytes"])


def test_nodes_serve_each_other(lab: Lab) -> None:
    before = sent_by_login(lab)
    said = lab.push("--tree")
    assert how(said) == dict.fromkeys(lab.nodes, ("received", size(lab)))
    via = {node: one["via"] for node, one in said["nodes"].items()}
    assert via == {"node1": "", "node2": "node1", "node3": "", "node4": "node3"}
    assert "2 served by other nodes" in said["said"]
    # Two of four were served by the login host, which sends each no more than the image.
    assert 2 * size(lab) < sent_by_login(lab) - before < 2.5 * size(lab)
    for name in lab.nodes:
        hide_images(lab, name)
        lab.on(name, "stage", "it")


def test_a_chain_of_nodes(lab: Lab) -> None:
    pack(lab, "--format", "tar.zst", name="archive")
    said = lab.push("--tree=1", ref="archive")
    assert how(said) == dict.fromkeys(lab.nodes, ("extracted", size(lab, "archive")))
    via = [one["via"] for one in said["nodes"].values()]
    assert via == ["", "node1", "node2", "node3"]


def test_whoever_cannot_be_reached_through_others_is_reached_directly(lab: Lab) -> None:
    lab.nodes["node1"].run("ip", "route", "add", "blackhole", lab.nodes["node2"].address)
    lab.nodes["node3"].end()
    said = lab.push("--tree", "--connect-timeout", "2s", status=3)
    via = {node: (one["how"], one["via"]) for node, one in said["nodes"].items()}
    assert via == {
        "node1": ("received", ""),
        "node2": ("received", ""),
        "node3": ("", ""),
        "node4": ("received", ""),
    }
    assert [one["nodes"] for one in said["failed"]] == ["node3"]


def test_a_node_that_fails_while_it_serves_others_is_gone_on_without(lab: Lab) -> None:
    """It, and whom it served, get from others what they have not got yet."""
    lab.limit("10mbit", "login")
    push = start(lab, "--tree=1", nodes="node[1-3]")
    in_the_middle(lab, "node2")
    for process in lab.receivers("node1"):
        os.kill(process, signal.SIGKILL)
    out, err = push.communicate()
    assert push.returncode == 0, err
    said = json.loads(out)
    assert {one["how"] for one in said["nodes"].values()} == {"received"}
    via = {node: one["via"] for node, one in said["nodes"].items()}
    assert via == {"node1": "", "node2": "", "node3": "node2"}
    assert all(said["nodes"][node]["sent"] < size(lab) for node in ("node1", "node2"))


def test_a_node_that_has_only_the_tree_serves_nobody(lab: Lab) -> None:
    pack(lab, "--format", "tar.zst", name="archive")
    lab.push(nodes="node1", ref="archive")
    said = lab.push("--tree=1", ref="archive")
    assert how(said) == {
        "node1": ("had", 0),
        **dict.fromkeys(("node2", "node3", "node4"), ("extracted", size(lab, "archive"))),
    }
    assert {one["via"] for one in said["nodes"].values()} == {""}


# Other verbs on nodes


def test_same_answers_are_told_once(lab: Lab) -> None:
    lab.push(nodes="node[1-3]")
    lab.on("node3", "collect", "--all")
    remote = ["--remote-stager", f"{environments.VENV}/bin/stager", "-w", "node[1-4]"]
    said = lab.stager("status", *remote).stdout
    assert said.count("store /tmp/stager-") == 2
    assert "node[1-2] (2):\n" in said
    assert "node[3-4] (2):\n" in said
    assert said.count(" received ") == 1
    lab.nodes["node4"].end()
    done = lab.stager("collect", "--all", "--connect-timeout", "1s", *remote, status=3)
    assert "node[1-2] (2):\nevicted 1 tree" in done.stdout
    assert "node3 (1):\nevicted 0 trees" in done.stdout
    assert "1 of 4 nodes failed: node4: " in done.stderr
    value = json.loads(
        lab.stager("status", "--json", "--connect-timeout", "1s", *remote, status=3).stdout
    )
    assert [value["nodes"][node]["trees"] for node in ("node1", "node2", "node3")] == [[], [], []]
    assert value["failed"][0]["nodes"] == "node4"
