"""Pushing without a network: node sets, the protocol, and a receiver at the other end of a pipe."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny
from stager import manifest, transfer
from stager.errors import IncompatibleError, NoSpaceError, StagerError, UsageError
from stager.manifest import Manifest
from stager.push import asking, nodes, protocol, sending, ssh
from stager.push.protocol import Outcome, Reader, Request, Settings
from stager.push.receiving import Receiver
from stager.staging.store import MOUNTED, RECEIVED, Stamp, boot_id

pytestmark = pytest.mark.unit

A, B = (tiny.layer(number, content=bytes([number]) * 1000) for number in (1, 2))
IMAGES = {A.id: b"\1" * 1000, B.id: b"\2" * 1000}


# Sets of nodes


def test_sets_are_expanded_and_folded() -> None:
    assert nodes.parse("n[1-3,9]") == ["n1", "n2", "n3", "n9"]
    assert nodes.parse("n[1-3]!n2") == ["n1", "n3"]
    assert nodes.folded(["n3", "n1", "n2"]) == "n[1-3]"


@pytest.mark.parametrize("text", ["", "n[1-", "n1!n1", "@nope", "-o", "a;b", "a/b", "@x:y"])
def test_sets_that_are_none(text: str) -> None:
    with pytest.raises(UsageError):
        nodes.parse(text)


def test_more_nodes_than_there_are() -> None:
    with pytest.raises(UsageError, match="more than"):
        nodes.parse("n[1-99999999]")


# What the other side may say


def test_only_the_greeting_is_one() -> None:
    lines = [b'{"stager-pushing hello":1}\n', protocol.encode(protocol.greeting())]
    found = Reader(lambda count: lines.pop(0) if lines else b"").greeting()
    assert found == protocol.greeting()


@pytest.mark.parametrize(
    "changed",
    [
        {"size": 1e999}, {"size": -1}, {"size": "1"}, {"size": 2**60}, {"settings": []},
        {"settings": {"idle_timeout": "x"}}, {"settings": {"idle_timeout": -1}},
        {"settings": {"idle_timeout": float("nan")}}, {"settings": {"idle_timeout": None}},
        {"settings": {"ssh_config": []}}, {"settings": {"tree": "x"}},
        {"settings": {"stage": "bogus"}}, {"settings": {"other": 1}}, {"share": 5},
    ],
)  # fmt: skip
def test_requests_of_other_types(changed: dict[str, Any]) -> None:
    value = protocol.request(Request(10, "0" * 64, Settings()))
    assert protocol.read_request(value) == Request(10, "0" * 64, Settings())
    with pytest.raises(StagerError, match="protocol"):
        protocol.read_request({**value, **changed})


@pytest.mark.parametrize(
    "message", [{"node": "n", "sent": "abc"}, {"node": 1}, {"x": 1}, {}, {"node": "n", "code": 1.5}]
)
def test_outcomes_that_are_none(message: dict[str, Any]) -> None:
    with pytest.raises(StagerError, match="protocol"):
        protocol.outcome(message)


@pytest.mark.parametrize("how", ["", "else", None, {"a": [1]}, 1])
def test_ends_that_are_none(how: object) -> None:
    assert protocol.done({"done": "received"}) == "received"
    with pytest.raises(StagerError, match="protocol"):
        protocol.done({"done": how})


def test_answers_behind_what_a_login_shell_says() -> None:
    assert asking._answer(b'welcome {\n{ \n{"a": 1}\n') == {"a": 1}
    assert asking._answer(b'{\n "a": [1]\n}\n') == {"a": [1]}
    for said in (b"", b"[" * 900000, b"{" * 2000, b"[1]", b"no"):
        assert asking._answer(said) is None


def test_reasons_that_differ_in_numbers_are_one() -> None:
    def failed(node: str, text: str, code: type[StagerError] = NoSpaceError) -> Outcome:
        return Outcome.failed(node, code(text))

    found = nodes.failures([
        failed("n1", "12 MiB are free"), Outcome("n2", "had"), failed("n3", "3 MiB are free"),
        failed("n4", "3 MiB are free", StagerError),
    ])  # fmt: skip
    assert [(where, count, one.error) for where, count, one in found] == [
        ("n[1,3]", 2, "12 MiB are free"),
        ("n4", 1, "3 MiB are free"),
    ]


def test_same_answers_are_together() -> None:
    said = nodes.grouped([("n1", "a\nb"), ("n2", "a"), ("n3", "a\nb"), ("n4", "")])
    assert said == [("n[1,3]", 2, "a\nb"), ("n2", 1, "a"), ("n4", 1, "")]


@pytest.mark.parametrize(("text", "total", "needed"), [
    ("3", 4, 3), ("0", 4, 0), ("100%", 4, 4), ("75%", 4, 3), ("76%", 4, 4), ("1%", 64, 1),
    ("0%", 4, 0),
])  # fmt: skip
def test_how_many_are_enough(text: str, total: int, needed: int) -> None:
    assert nodes.enough(text, total) == needed


@pytest.mark.parametrize("text", ["5", "101%", "-1", "most", "", "1.5"])
def test_what_is_no_number_of_nodes(text: str) -> None:
    with pytest.raises(UsageError):
        nodes.enough(text, 4)


def test_the_status_of_many() -> None:
    good, full = Outcome("a", "had"), Outcome.failed("b", NoSpaceError("x"))
    other = Outcome.failed("c", StagerError("y"))
    assert nodes.exit_code([good, good], needed=2) == 0
    assert nodes.exit_code([good, full], needed=1) == 0
    assert nodes.exit_code([good, full], needed=2) == 3
    assert nodes.exit_code([full, full], needed=2) == 13
    assert nodes.exit_code([full, other], needed=2) == 1


def test_shares_are_even_and_together() -> None:
    assert sending.split("abcdefg", 3) == [["a", "b"], ["c", "d"], ["e", "f", "g"]]
    assert sending.split("ab", 5) == [["a"], ["b"]]
    assert sending.split("", 2) == []


@pytest.mark.parametrize("name", ["paramiko", "ClusterShell"])
def test_what_is_not_installed_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for known in [one for one in sys.modules if one.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, known)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(IncompatibleError) as error:
        if name == "paramiko":
            ssh.Network(Settings())
        else:
            nodes.parse("n1")
    assert name in error.value.message
    assert "pip install ClusterShell paramiko" in error.value.hint


@pytest.mark.parametrize("name", ["node1..site", "n" * 64])
def test_what_cannot_be_a_name_is_not_known(name: str) -> None:
    with pytest.raises(StagerError, match="its name is not known"):
        ssh.Network(Settings())._socket({"hostname": name}, 22, None)


# What is said


def reader(*pieces: bytes) -> Reader:
    left = list(pieces)
    return Reader(lambda count: left.pop(0) if left else b"")


def test_lines_and_bytes_between_them() -> None:
    source = reader(b'{"a":', b"1}\nxy", b"z", b'{"b":2}\n{"c"', b":3}")
    assert protocol.decode(source.line()) == {"a": 1}
    assert source.exactly(3) == b"xyz"
    assert protocol.decode(source.line()) == {"b": 2}
    assert source.line() == b""  # half a line is none


def test_a_line_without_end_is_none() -> None:
    with pytest.raises(StagerError, match="does not speak the protocol"):
        Reader(lambda count: b"x" * count).line()


@pytest.mark.parametrize("line", [b"hello\n", b"[1]\n", b"\xff\n", b"[" * 100_000])
def test_nonsense(line: bytes) -> None:
    with pytest.raises(StagerError, match="does not speak the protocol"):
        protocol.decode(line)


def test_messages_survive_the_way() -> None:
    request = Request(3, "ab", Settings(tree=2, store="/s {uid}"), ("n1", "n2"))
    line = protocol.encode(protocol.request(request))
    assert line.count(b"\n") == 1
    assert protocol.read_request(protocol.decode(line)) == request


@pytest.mark.parametrize("change", [
    {"size": 0}, {"size": 1 << 40}, {"size": "x"}, {"settings": {"nope": 1}}, {"share": None},
])  # fmt: skip
def test_requests_that_are_none(change: dict[str, object]) -> None:
    message = {**protocol.request(Request(3, "ab", Settings())), **change}
    with pytest.raises(StagerError, match="does not speak the protocol"):
        protocol.read_request(message)


def test_included_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "a").write_text("Host x\nInclude ~/.ssh/a b*\n")  # itself, too
    (tmp_path / ".ssh" / "b1").write_text("Port 7\n")
    text = ssh.with_includes(str(tmp_path / ".ssh" / "a"))
    assert text.startswith("Host x\n")
    assert "Port 7\n" in text
    assert ssh.with_includes("/nonexistent") == ""
    with pytest.raises(UsageError, match="/dev/zero is no configuration of ssh"):
        ssh.with_includes("/dev/zero")


# A receiver


class Node:
    """A receiver in a thread, and our end of its streams."""

    def __init__(self, root: Path) -> None:
        self.config = tiny.configured(root, stage_how="auto")
        self.store = tiny.store(self.config)
        theirs, self._to = os.pipe()
        self._from, answers = os.pipe()
        self.status = -1

        def run() -> None:
            self.status = Receiver(self.config, theirs, answers).run()
            os.close(theirs)
            os.close(answers)

        self._thread = threading.Thread(target=run)
        self._thread.start()
        self._reader = Reader(lambda count: os.read(self._from, count))
        assert self._reader.greeting() == protocol.greeting()

    def send(self, data: bytes) -> None:
        os.write(self._to, data)

    def ask(self, value: Manifest, **settings: Any) -> None:
        data = value.encode()
        wanted = Settings(stage=protocol.NOTHING, **settings)
        request = Request(len(data), manifest.digest(data), wanted)
        self.send(protocol.encode(protocol.request(request)) + data)

    def answer(self) -> dict[str, Any]:
        """The next answer that is not a sign of life."""
        while True:
            message = protocol.decode(self._reader.line())
            if "alive" not in message:
                return message

    def hang_up(self) -> None:
        if self._to >= 0:
            os.close(self._to)
            self._to = -1

    def end(self) -> int:
        self.hang_up()
        self._thread.join()
        return self.status

    def close(self) -> None:
        self.end()
        os.close(self._from)


@pytest.fixture
def new_node(public_path: Path) -> Iterator[Callable[[], Node]]:
    made: list[Node] = []

    def make() -> Node:
        made.append(Node(public_path))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_layers_arrive_one_after_the_other(new_node: Callable[[], Node]) -> None:
    node = new_node()
    node.ask(tiny.described(layers=(A, B)))
    for layer in (A, B):
        assert node.answer() == {"layer": layer.id, "send": 0}
        node.send(IMAGES[layer.id])
        assert node.answer() == {"layer": layer.id, "has": True}
        assert node.store.stamp(layer.id) == Stamp(layer.filename, RECEIVED, boot_id(), 1000)
        assert node.store.ready(layer.id) is None  # there is no tree yet
    assert node.answer() == {"done": "received"}
    assert node.end() == 0
    assert [held.leases for held in node.store.held()] == [(), ()]
    assert os.listdir(f"{node.store.root}/tmp") == []
    again = new_node()
    again.ask(tiny.described(layers=(A, B)))
    assert [again.answer() for _ in range(3)][-1] == {"done": "had"}


def test_what_has_arrived_is_kept(new_node: Callable[[], Node]) -> None:
    node = new_node()
    node.ask(tiny.described(layers=(A,)))
    assert node.answer() == {"layer": A.id, "send": 0}
    node.send(IMAGES[A.id][:300])
    node.hang_up()
    assert "after 300 of 1000 bytes" in node.answer()["error"]
    assert node.end() == 1
    assert not os.path.exists(node.store.image(A.id))
    assert node.store.stamp(A.id) is None
    again = new_node()
    again.ask(tiny.described(layers=(A,)))
    assert again.answer() == {"layer": A.id, "send": 300}
    again.send(IMAGES[A.id][300:])
    assert [again.answer() for _ in range(2)][-1] == {"done": "received"}
    assert transfer.is_image(again.store.image(A.id), A.image)


def test_wrong_bytes_are_not_kept(new_node: Callable[[], Node]) -> None:
    node = new_node()
    node.ask(tiny.described(layers=(A,)))
    node.answer()
    node.send(IMAGES[B.id])
    message = node.answer()
    assert (message["code"], "damaged" in message["error"]) == (12, True)
    assert node.end() == 12
    assert not os.path.exists(node.store.image(A.id))
    assert os.listdir(f"{node.store.root}/tmp/{A.id}") == []


def test_a_manifest_that_was_changed_on_the_way(new_node: Callable[[], Node]) -> None:
    node = new_node()
    data = tiny.described(layers=(A,)).encode()
    request = Request(len(data), manifest.digest(data), Settings())
    node.send(protocol.encode(protocol.request(request)) + data.replace(b"/home", b"/hame"))
    assert "did not arrive whole" in node.answer()["error"]


def test_a_pusher_that_says_nothing(new_node: Callable[[], Node]) -> None:
    node = new_node()
    node.ask(tiny.described(layers=(A,)), idle_timeout=0.2)
    assert node.answer() == {"layer": A.id, "send": 0}
    message = node.answer()
    assert (message["code"], message["error"]) == (11, "nothing came from the pusher for 0.2 s")


def test_a_node_that_waits_says_that_it_lives(new_node: Callable[[], Node]) -> None:
    node = new_node()
    with node.store.lock(A.id, timeout=1):
        node.ask(tiny.described(layers=(A,)), idle_timeout=1.0)
        assert "alive" in protocol.decode(node._reader.line())
    assert node.answer() == {"layer": A.id, "send": 0}
    node.send(IMAGES[A.id])
    assert [node.answer() for _ in range(2)][-1] == {"done": "received"}


def test_an_image_of_another_boot_is_verified_again(new_node: Callable[[], Node]) -> None:
    node = new_node()
    for layer, content in ((A, IMAGES[A.id]), (B, IMAGES[A.id])):
        Path(node.store.image(layer.id)).write_bytes(content)
        node.store.set_ready(layer.id, Stamp(layer.filename, MOUNTED, "another", 1000))
    node.ask(tiny.described(layers=(A, B)))
    assert node.answer() == {"layer": A.id, "has": True}
    assert node.answer() == {"layer": B.id, "send": 0}
    node.send(IMAGES[B.id])
    assert [node.answer() for _ in range(2)][-1] == {"done": "received"}


def test_a_node_of_another_kind_is_told_before_a_byte(new_node: Callable[[], Node]) -> None:
    value = tiny.described(layers=(A,))
    node = new_node()
    node.ask(value._replace(platform=value.platform._replace(machine="vax")))
    message = node.answer()
    assert (message["code"], message["blame"]) == (15, "job")
    assert "vax" in message["error"]
