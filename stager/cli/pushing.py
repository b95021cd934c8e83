"""``stager push`` and ``receive``, and ``status`` and ``collect`` on other nodes."""

from __future__ import annotations

import argparse
import os
import sys
import time
from importlib.util import find_spec
from typing import Any, Callable

from stager import config as configuration
from stager import lookup
from stager.cli.common import Bars, count, is_terminal, load_config, print_json, say, size
from stager.config import COMMAND_LINE, Config
from stager.errors import StagerError, UsageError
from stager.push import nodes, protocol
from stager.push.protocol import Outcome, Settings


def push(arguments: argparse.Namespace) -> int:
    """Send environments to nodes."""
    from stager.cli.preparing import up_to_date
    from stager.push.sending import Parcel, Pusher
    from stager.push.ssh import Network

    config = load_config(arguments)
    targets = nodes.parse(arguments.nodes)
    needed = nodes.enough(arguments.min_success, len(targets))
    settings = _settings(arguments, config)
    network = Network(settings)
    results, status = [], 0
    bars = Bars()
    for wish in lookup.wanted(arguments.ref, os.environ):
        try:
            published = up_to_date(wish, config, bars)
        finally:
            bars.finish()
        parcel = Parcel.of(published)
        name = published.manifest.name
        said = f"stager: pushing `{name}` ({size(parcel.size)}) to {nodes.folded(targets)}"
        board = _Board(said, parcel.size, len(targets))
        started = time.monotonic()
        try:
            with board:
                Pusher(parcel, settings, network, board).push(targets)
        except KeyboardInterrupt:
            _tell_success(name, board.outcomes, len(targets), time.monotonic() - started)
            raise
        taken = time.monotonic() - started
        outcomes = sorted(board.outcomes, key=lambda one: targets.index(one.node))
        _tell_success(name, outcomes, len(targets), taken)
        tell_failures(outcomes)
        status = status or nodes.exit_code(outcomes, needed=needed)
        results.append(
            {
                "ref": published.ref,
                "nodes": {one.node: _without_node(one) for one in outcomes},
                "failed": _failed(outcomes),
                "sent": sum(one.sent for one in outcomes),
                "seconds": round(taken, 3),
            }
        )
    if arguments.json:
        print_json({**results[0], "environments": results})
    return status


def receive(arguments: argparse.Namespace) -> int:
    """Receive what a pusher sends on standard input."""
    from stager.push.receiving import Receiver

    answers = os.dup(1)
    os.dup2(2, 1)  # nothing else may get between our answers
    try:
        config = load_config(arguments)
    except StagerError as error:
        os.write(answers, protocol.encode(protocol.greeting()))
        os.write(answers, protocol.encode(error.as_data()))
        return error.exit_code
    return Receiver(config, 0, answers).run()


def _settings(arguments: argparse.Namespace, config: Config) -> Settings:
    def seconds(name: str) -> float:
        value, option = getattr(arguments, name), "--" + name.replace("_", "-")
        try:
            found = configuration.parse_duration(value)
        except ValueError as error:
            raise UsageError(f"{option} cannot be {value!r}", hint=str(error)) from error
        if not 0 < found <= protocol.LONGEST_WAIT:
            raise UsageError(
                f"{option} cannot be {value}",
                hint=f"expected more than 0 s, and at most {protocol.LONGEST_WAIT:g} s",
            )
        return found

    # Where the store is, a node's own configuration says, unless this command's line or variable.
    chosen = config.sources["store"] in (COMMAND_LINE, "$STAGER_STORE")
    return Settings(
        remote=arguments.remote_stager,
        store=config.store_template if chosen else "",
        stage=getattr(arguments, "stage", protocol.NOTHING),
        fanout=_positive("--fanout", arguments.fanout),
        tree=_positive("--tree", getattr(arguments, "tree", None) or 0, least=0),
        ssh_config=os.path.abspath(arguments.ssh_config) if arguments.ssh_config else "",
        connect_timeout=seconds("connect_timeout"),
        idle_timeout=seconds("idle_timeout"),
        forward_agent=getattr(arguments, "forward_agent", False),
    )


def _positive(option: str, number: int, *, least: int = 1) -> int:
    if number < least:
        raise UsageError(f"{option} cannot be {number}")
    return number


# -- what is told ------------------------------------------------------------------------------


class _Board:
    """How far a push is: a bar on a terminal, one line elsewhere."""

    def __init__(self, said: str, each: int, total: int) -> None:
        self.outcomes: list[Outcome] = []
        self._said, self._each, self._total = said, each, total
        self._draw = is_terminal() and find_spec("rich") is not None
        self._bar: Any = None
        self._task: Any = None
        self._sent: dict[str, int] = {}
        self._notes: set[str] = set()
        self._drawn = 0.0

    def __enter__(self) -> _Board:
        if not self._draw:
            say(self._said)
            return self
        from rich import progress
        from rich.console import Console

        self._bar = progress.Progress(
            progress.TextColumn("{task.fields[state]}"),
            progress.BarColumn(bar_width=20),
            progress.DownloadColumn(),
            progress.TransferSpeedColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._bar.start()
        self._task = self._bar.add_task("", total=self._each * self._total, state=self._state())
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _state(self) -> str:
        text = f"{len(self.outcomes)}/{self._total} nodes"
        failed = [one.node for one in self.outcomes if not one.ok]
        busy = set(self._sent) - {one.node for one in self.outcomes}
        if busy:
            text += f", sending to {_short(nodes.folded(busy))}"
        if failed:
            text += f", failed: {_short(nodes.folded(failed))}"
        return text

    def _update(self) -> None:
        now = time.monotonic()
        if self._bar is not None and now - self._drawn > 0.1:
            self._drawn = now
            # A node that is done, or will not be, has nothing left to wait for.
            over = {one.node for one in self.outcomes}
            going = sum(each for node, each in self._sent.items() if node not in over)
            done = going + self._each * len(over)
            self._bar.update(self._task, completed=done, state=self._state())

    def sent(self, node: str, count: int) -> None:
        """Bytes went to a node."""
        self._sent[node] = self._sent.get(node, 0) + count
        self._update()

    def done(self, outcome: Outcome) -> None:
        """A node is done, or has failed."""
        self.outcomes.append(outcome)
        self._update()

    def note(self, message: str) -> None:
        """Something the user may want to know, once."""
        if message not in self._notes:
            self._notes.add(message)
            say(f"stager: {message}")


def _short(text: str, limit: int = 40) -> str:
    return text if len(text) <= limit else f"{text[:limit]}..."


def _tell_success(name: str, outcomes: list[Outcome], total: int, seconds: float) -> None:
    have = sum(one.ok for one in outcomes)
    had = sum(one.how == "had" for one in outcomes)
    sent = sum(one.sent for one in outcomes)
    text = f"stager: {have} of {count(total, 'node')} {'has' if have == 1 else 'have'} `{name}`"
    if had:
        text += f", {had} had it"
    if sent:
        text += f"; sent {size(sent)} in {seconds:.1f} s ({size(sent / max(seconds, 0.001))}/s)"
    served = sum(bool(one.via) for one in outcomes)
    if served:
        text += f", {served} served by other nodes"
    say(text)


def tell_failures(outcomes: list[Outcome]) -> None:
    """Say which nodes failed and why, the same reason once."""
    for where, number, one in nodes.failures(outcomes):
        total = count(len(outcomes), "node")
        say(f"stager: error: {number} of {total} failed: {where}: {one.error}")
        if one.hint:
            say(f"hint: {one.hint}")


def _failed(outcomes: list[Outcome]) -> list[dict[str, Any]]:
    return [
        {
            "nodes": where,
            "count": number,
            "error": one.error,
            "hint": one.hint,
            "blame": one.blame,
            "code": one.code,
        }
        for where, number, one in nodes.failures(outcomes)
    ]


def _without_node(outcome: Outcome) -> dict[str, Any]:
    return {key: value for key, value in outcome._asdict().items() if key != "node"}


# -- verbs that nodes are asked to do ------------------------------------------------------------


def everywhere(
    arguments: argparse.Namespace,
    words: list[str],
    shown: Callable[[dict[str, Any]], str],
) -> int:
    """Run a verb with ``--json`` on nodes, and print the same answers together.

    Args:
        arguments: with the options of :func:`push` for reaching nodes.
        words: the verb and its options.
        shown: a node's answer, for people.
    """
    from stager.push import asking
    from stager.push.ssh import Network

    targets = nodes.parse(arguments.nodes)
    needed = nodes.enough(arguments.min_success, len(targets))
    settings = _settings(arguments, load_config(arguments))
    answers, outcomes = asking.ask(targets, words, settings, Network(settings))
    if arguments.json:
        print_json({"nodes": answers, "failed": _failed(outcomes)})
    else:
        texts = []
        for node, answer in answers.items():
            try:
                texts.append((node, shown(answer)))
            except (KeyError, TypeError, ValueError, AttributeError):
                other = StagerError(
                    "its answer could not be understood", hint="is another version of stager there?"
                )
                outcomes = [
                    Outcome.failed(node, other) if one.node == node else one for one in outcomes
                ]
        for where, number, text in nodes.grouped(texts):
            print(f"{where} ({number}):\n{text}")
    sys.stdout.flush()
    tell_failures(outcomes)
    return nodes.exit_code(outcomes, needed=needed)
