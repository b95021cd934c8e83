"""Asking nodes: a verb of stager with ``--json``, on all of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from stager.errors import NODE, StagerError, known
from stager.push import sending
from stager.push.protocol import Outcome, Settings
from stager.push.ssh import Network

_MAX_ANSWER = 64 << 20


def ask(
    nodes: Sequence[str], words: Sequence[str], settings: Settings, network: Network
) -> tuple[dict[str, dict[str, Any]], list[Outcome]]:
    """Run a verb on nodes.

    Args:
        nodes: where.
        words: the verb and its options, without ``--json``.
        settings: how to reach them.
        network: connections.

    Returns:
        The answers of those that answered, and how it went with each of all.
    """
    answers: dict[str, dict[str, Any]] = {}
    outcomes: dict[str, Outcome] = {}

    def work(node: str) -> None:
        try:
            answers[node] = _ask_one(node, words, settings, network)
            outcomes[node] = Outcome(node, how="answered")
        except Exception as error:
            outcomes[node] = Outcome.failed(node, known(error))

    sending.in_parallel(work, nodes, settings.fanout, network)
    found = {node: answers[node] for node in nodes if node in answers}
    return found, [outcomes[node] for node in nodes]


def _ask_one(
    node: str, words: Sequence[str], settings: Settings, network: Network
) -> dict[str, Any]:
    connection = network.connect(node)
    try:
        session = connection.start(sending.command(settings, *words, "--json"))
        session.finish()
        said = session.reader.exactly(_MAX_ANSWER)
        answer = _answer(said)
        if answer is not None:
            return answer
        status, complaint = session.status()
        error = _complaint(complaint)
        if error is not None:
            raise error
        raise sending.not_started(status, complaint, settings, words[0])
    finally:
        network.forget(connection)


def _answer(said: bytes) -> dict[str, Any] | None:
    """The JSON object at the end of what a node has printed; its login shell comes before."""
    start = said.find(b"{")
    while start >= 0:
        if start == 0 or said[start - 1 : start] == b"\n":
            try:
                answer = json.loads(said[start:])
            except (ValueError, RecursionError):
                answer = None
            if isinstance(answer, dict):
                return answer
        start = said.find(b"\n{", start) + 1 or -1
    return None


def _complaint(text: str) -> StagerError | None:
    """The error that a stager has printed."""
    lines = [line.strip() for line in text.splitlines()]
    message = next((one for one in lines if one.startswith("stager: error: ")), "")
    hint = next((one for one in lines if one.startswith("hint: ")), "")
    if not message or "invalid choice" in message:
        return None
    return StagerError(
        message.partition("error: ")[2], hint=hint.partition("hint: ")[2] or None, blame=NODE
    )
