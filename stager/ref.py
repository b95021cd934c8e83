"""The names users type, and where they may write them.

Grammar (one parser for the command line, job comments, and PBS resources)::

    ref       = name [ "@sha256:" hex ] | path
    name      = [A-Za-z0-9][A-Za-z0-9._-]{0,127}
    path      = "/..." | "./..." | "../..." | "~/..."
    directive = "pyenv:" ref { "+" ref } [ "?" option { ( "&" | "?" ) option } ]

A directive is one token of a job comment that other tools share: tokens are split at white space,
commas and semicolons, and a JSON object with the key ``pyenv`` is accepted too. It is user input
read by root: bounded in length, matched whole, never evaluated.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from stager.errors import UsageError

MAX_DIRECTIVE = 1024
"""Bytes of a directive; Slurm's own limit for a comment is 1024 characters."""

KEYS = {"format": "pack.format", "on_stale": "stage.on_stale", "timeout": "stage.timeout"}
"""Options of a directive that set a key of the configuration, for its job."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")
_PINNED = re.compile(r"(?P<name>[^@]+)@sha256:(?P<digest>[0-9a-f]{12,64})\Z")
_TOKEN_SEPARATORS = re.compile(r"[\s,;]+")
_PREFIX = "pyenv:"


class Ref(NamedTuple):
    """One environment, by published name or by the path it was packed from.

    Attributes:
        name: the published name, or empty for a path.
        path: the absolute path, or empty for a name.
        digest: hex digits of the manifest's sha256 the name is pinned to (at least 12), or empty.
    """

    name: str = ""
    path: str = ""
    digest: str = ""

    def __str__(self) -> str:
        pinned = f"@sha256:{self.digest}" if self.digest else ""
        return (self.path or self.name) + pinned


class Directive(NamedTuple):
    """What a job asks for: the environments, and options such as ``strict``."""

    refs: tuple[Ref, ...]
    options: Mapping[str, str] = MappingProxyType({})


def is_name(text: str) -> bool:
    """Tell whether ``text`` may be a published name."""
    return bool(_NAME.match(text))


def is_path(text: str) -> bool:
    """Tell whether a ref is a path, and not a name."""
    return text.startswith(("/", "./", "../", "~")) or text in (".", "..")


def _is_odd(char: str) -> bool:
    """Tell whether this is a control character, or a surrogate for no byte, which JSON may have."""
    surrogate = "\ud800" <= char <= "\udfff" and not "\udc80" <= char <= "\udcff"
    return ord(char) < 32 or ord(char) == 127 or surrogate


def parse(text: str, *, cwd: str | None = None) -> Ref:
    """Parse one ref.

    Args:
        text: what the user typed.
        cwd: directory that relative paths start from; None is the current one.

    Raises:
        UsageError: it is neither a name nor a path.
    """
    if not text:
        raise UsageError("the environment's name is empty", hint="see `stager list`")
    if any(map(_is_odd, text)):
        raise UsageError(f"the environment's name has control characters: {text!r}")
    if is_path(text):
        path = os.path.abspath(os.path.join(cwd or os.getcwd(), os.path.expanduser(text)))
        if any(map(_is_odd, path)):
            raise UsageError(f"the environment's path has control characters: {path!r}")
        return Ref(path=path)
    pinned = _PINNED.match(text)
    name, digest = (pinned["name"], pinned["digest"]) if pinned else (text, "")
    if is_name(name):
        return Ref(name=name, digest=digest)
    hint = "a name has letters, digits, '.', '_' and '-', and begins with a letter or digit"
    if "/" in text:
        hint = f"for a path, begin with '/', './' or '~/': ./{text}"
    elif "@" in text:
        hint = (
            "a pinned one is NAME@sha256:DIGITS: 12 or more, as `stager inspect NAME` prints them"
        )
    elif "+" in text:
        hint = "one environment is wanted here, not several"
    raise UsageError(f"{text!r} is not an environment's name", hint=hint)


def parse_directive(text: str, *, cwd: str | None = None) -> Directive:
    """Parse ``REF[+REF...][?option&option=value]``, the part after ``pyenv:``.

    Raises:
        UsageError: it is too long or malformed.
    """
    if len(text.encode(errors="surrogatepass")) > MAX_DIRECTIVE:
        raise UsageError(f"the pyenv directive is longer than {MAX_DIRECTIVE} bytes")
    names, _, query = text.partition("?")
    refs = tuple(parse(part, cwd=cwd) for part in names.split("+"))
    options: dict[str, str] = {}
    for item in _options(query):
        key, _, value = item.partition("=")
        if not re.match(r"[a-z][a-z_-]*\Z", key):
            raise UsageError(
                f"{item!r} is not an option of the pyenv directive",
                hint="options look like ?strict or ?format=squashfs&timeout=5m",
            )
        options[key] = value
    return Directive(refs, options)


def _options(query: str) -> list[str]:
    return [item for item in re.split("[&?]", query) if item]


def is_strict(text: str) -> bool:
    """Tell whether a directive has the option ``strict``, even where all the rest is malformed."""
    return any(item.partition("=")[0] == "strict" for item in _options(text.partition("?")[2]))


def find_directive(comment: str, *, cwd: str | None = None) -> Directive | None:
    """Find the one ``pyenv:`` token of a job comment.

    Returns:
        The directive, or None where the comment has none.

    Raises:
        UsageError: the directive is malformed, or there are two.
    """
    found = _directives(comment)
    if not found:
        return None
    if len(found) > 1:
        raise UsageError(
            "the job's comment has more than one pyenv: directive",
            hint="several environments together are written pyenv:base+extra",
        )
    if not isinstance(found[0], str):
        raise UsageError("the key pyenv of the job's JSON comment is not a string")
    return parse_directive(found[0], cwd=cwd)


def asks_strict(comment: str) -> bool:
    """Tell whether a job comment asks for ``strict``, even where its directive is malformed."""
    return any(isinstance(found, str) and is_strict(found) for found in _directives(comment))


def _directives(comment: str) -> list[Any]:
    """What a job comment has behind each ``pyenv:``; in JSON that may be anything."""
    if "pyenv" not in comment:
        return []
    stripped = comment.strip()
    if not stripped.startswith("{"):
        tokens = _TOKEN_SEPARATORS.split(stripped)
        return [token[len(_PREFIX) :] for token in tokens if token.startswith(_PREFIX)]
    import json

    try:
        value = json.loads(stripped).get("pyenv")
    except (ValueError, AttributeError, RecursionError):
        return []  # somebody else's field, and not ours to judge
    return [] if value is None else [value]
