"""Sets of nodes: what users type, and answers folded back into them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from stager.errors import SITE, IncompatibleError, UsageError
from stager.push.protocol import Outcome


def missing(error: ImportError) -> IncompatibleError:
    """The error where the optional packages are not installed."""
    return IncompatibleError(
        f"reaching other nodes needs a package that is not installed: {error.name}",
        hint="install the extra `ssh` beside stager: pip install ClusterShell paramiko; one that a"
        " site installed for its hooks cannot use it: get one by pip",
        blame=SITE,
    )


def _library() -> Any:
    try:
        from ClusterShell import NodeSet
    except ImportError as error:
        raise missing(error) from error
    return NodeSet


_MOST = 100_000


def parse(text: str) -> list[str]:
    """The nodes of a set such as ``node[01-64]``, ``a,b``, ``@compute`` or ``@compute!node07``.

    Args:
        text: what the user typed, see nodeset(1) of ClusterShell.

    Raises:
        UsageError: it is malformed, empty, or names a group that is not there.
        IncompatibleError: ClusterShell is not installed.
    """
    library = _library()
    from ClusterShell.NodeUtils import GroupResolverError, GroupSourceError

    hint = "as in -w node[01-64], -w a,b or -w @group; `nodeset -L` lists the groups"
    if any(_size(word) > _MOST for word in re.findall(r"(?:\[[^]]*\]|[^][,!&^\s])+", text)):
        raise UsageError(f"{text!r} is more than {_MOST} nodes", hint=hint)
    try:
        found = list(library.NodeSet(text))
    except (library.NodeSetException, GroupResolverError, GroupSourceError) as error:
        raise UsageError(f"{text!r} is not a set of nodes: {error}", hint=hint) from error
    if not found:
        # A group that is not there is an empty set to ClusterShell.
        what = "a group in it is unknown or empty" if "@" in text else "it is empty"
        raise UsageError(f"there are no nodes in {text!r}: {what}", hint=hint)
    for name in found:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.:-]*", name):
            raise UsageError(f"{name!r} is not a node's name", hint=hint)
    return found


def _size(word: str) -> int:
    """How many nodes the ranges of one word make; the library would make all of them to see it."""
    size = 1
    for ranges in re.findall(r"\[([^]]*)\]", word):
        ends = re.findall(r"(\d{1,18})-(\d{1,18})(?:/0*([1-9]\d{0,8}))?", ranges)
        size *= sum((int(b) - int(a)) // int(step or 1) + 1 for a, b, step in ends) or 1
    return size


def folded(names: Iterable[str]) -> str:
    """The short form of a set: ``node[01-64]``."""
    return str(_library().NodeSet.fromlist(list(names)))


def grouped(answers: Iterable[tuple[str, str]]) -> list[tuple[str, int, str]]:
    """Nodes with the same answer together: the set, its size, the answer; the largest first.

    Args:
        answers: pairs of a node and what it said.
    """
    library = _library()
    from ClusterShell.MsgTree import MsgTree

    tree = MsgTree()
    for node, answer in answers:
        for line in answer.splitlines() or [""]:
            tree.add(node, line.encode(errors="surrogateescape"))
    found = []
    for message, keys in tree.walk():
        names = library.NodeSet.fromlist(list(keys))
        text = bytes(message).decode(errors="surrogateescape")
        found.append((str(names), len(names), text))
    return sorted(found, key=lambda one: (-one[1], one[0]))


def failures(outcomes: Iterable[Outcome]) -> list[tuple[str, int, Outcome]]:
    """The nodes that failed, those for the same reason together: the set, its size, one of them.

    Reasons that differ in numbers only (bytes that are free) are the same.
    """
    reasons: dict[tuple[int, str], list[Outcome]] = {}
    for one in outcomes:
        if not one.ok:
            key = (one.code, re.sub(r"\d+(\.\d+)?", "0", one.error))
            reasons.setdefault(key, []).append(one)
    found = [
        (folded(one.node for one in those), len(those), those[0]) for those in reasons.values()
    ]
    return sorted(found, key=lambda one: (-one[1], one[0]))


def enough(text: str, total: int) -> int:
    """How many nodes must succeed.

    Args:
        text: a number, or a part such as ``90%``, which is rounded up.
        total: the number of nodes.

    Raises:
        UsageError: it is neither, or more than there are.
    """
    match = re.fullmatch(r"(\d+)(%?)", text.strip())
    number = int(match[1]) if match else -1
    if match and match[2]:
        number = -(-total * number // 100) if number <= 100 else -1
    if not 0 <= number <= total:
        raise UsageError(
            f"--min-success cannot be {text!r} of {total} nodes",
            hint="a number of nodes such as 60, or a part of them such as 95%",
        )
    return number


def exit_code(outcomes: Sequence[Outcome], *, needed: int) -> int:
    """The status of a command that went to many nodes.

    Returns:
        0 where enough succeeded; 3 where some did; else what all failed with, or 1.
    """
    succeeded = sum(one.ok for one in outcomes)
    if succeeded >= needed:
        return 0
    if succeeded:
        return PARTIAL
    codes = {one.code for one in outcomes}
    return codes.pop() if len(codes) == 1 else 1


PARTIAL = 3
"""Exit code: some nodes failed, others did not."""
