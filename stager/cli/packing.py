"""``stager pack``."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Iterable

from stager import lookup, ref
from stager.cli.common import Bars, load_config, print_json, printable, say, size
from stager.config import Config
from stager.environments import Request, userbase
from stager.errors import NotFoundError, UsageError
from stager.manifest import TREE, USER, Finding, plain
from stager.packing import pack as packer

_SHOWN = 8


def pack(arguments: argparse.Namespace) -> int:
    """Pack an environment; the exit status of a check is 1 where the pack would be refused."""
    config = load_config(arguments)
    request = _request(arguments, config)
    quiet = arguments.json
    if not quiet:
        named = " and ".join(request.paths)
        say(f"stager: {'checking' if arguments.check else 'packing'} {printable(named)}")
    bars = Bars(quiet=quiet)
    try:
        result = packer.pack(
            request, config, name=arguments.name, check=arguments.check, progress=bars
        )
    finally:
        bars.finish()
    refused = any(one.severity == "error" for one in result.findings)
    if arguments.json:
        print_json(_as_json(result))
        return 1 if refused else 0
    for line in _report(result.findings):
        say(f"  {line}")
    if arguments.check:
        verdict = "would be refused" if refused else "can be packed"
        say(f"stager: {result.environment.prefix} {verdict} ({result.seconds:.1f} s)")
        return 1 if refused else 0
    say(f"stager: {_summary(result)}")
    return 0


def _request(arguments: argparse.Namespace, config: Config) -> Request:
    """What the command line asks for."""
    if arguments.environment and (arguments.named or arguments.user or arguments.tree):
        raise UsageError(
            "more than one environment was given", hint="a directory, -n, --user, or --tree"
        )
    if arguments.python and not (arguments.user or arguments.tree):
        raise UsageError(
            "--python can only be used with --user or --tree",
            hint="environments have their own Python",
        )
    if "" in (arguments.tree or ()) or arguments.named == "":
        raise UsageError(
            "an empty name was given", hint="a directory, or the name of an environment"
        )
    python = arguments.python or ""
    if arguments.user:
        return Request.here([os.path.abspath(userbase.of_user(os.environ))], USER, python)
    if arguments.tree:
        return Request.here(map(os.path.abspath, arguments.tree), TREE, python)
    if arguments.named:
        return _named(arguments.named, config)
    active = os.environ.get("VIRTUAL_ENV") or os.environ.get("CONDA_PREFIX")
    if not arguments.environment and active and active == os.environ.get("STAGER_PREFIX"):
        raise UsageError(
            "the active environment is a staged copy",
            hint="name the original: stager pack DIRECTORY",
        )
    path = arguments.environment or active or _default()
    if ref.is_name(path) and not os.path.exists(path):
        raise NotFoundError(
            f"there is no environment at {os.path.abspath(path)}",
            hint=f"give its directory; or what is known by that name: stager pack -n {path}",
        )
    return Request.here([os.path.abspath(path)])


def _named(name: str, config: Config) -> Request:
    wish = ref.parse(name)
    if wish.path:
        return Request.here([wish.path])
    try:
        known = lookup.find(wish, config).manifest
        return Request.again(known)._replace(search=dict(os.environ))
    except NotFoundError:
        path = lookup.located(wish, os.environ).path
        if not path:
            raise
        return Request.here([path])


def _default() -> str:
    if os.path.exists(os.path.join(".venv", "pyvenv.cfg")):
        return ".venv"
    raise UsageError(
        "no environment was given, none is active, and there is no ./.venv",
        hint="stager pack DIRECTORY",
    )


def _summary(result: packer.Packed) -> str:
    published = result.published
    assert published is not None
    manifest = published.manifest
    images = sum(layer.image.size for layer in manifest.layers)
    files = sum(layer.files for layer in manifest.layers)
    content = sum(layer.size for layer in manifest.layers)
    parts = [
        f"published `{manifest.name}`: {files} files, {size(content)} in"
        f" {size(images)} {manifest.top.image.format}, {result.seconds:.1f} s"
    ]
    if result.reused:
        parts.append("unchanged since the last pack: " + " and ".join(result.reused))
    if result.rewritten or result.compiled:
        parts.append(f"{result.rewritten} files rewritten, {result.compiled} modules compiled")
    return "; ".join(parts)


def _report(findings: Iterable[Finding]) -> Iterable[str]:
    """What the user should know: everything serious, and of each kind of note the first few."""
    seen: Counter[str] = Counter()
    left: Counter[str] = Counter()
    for one in findings:
        if one.severity == "note" and seen[one.code] >= _SHOWN:
            left[one.code] += 1
            continue
        seen[one.code] += 1
        yield printable(f"{one.severity}: {one.path}: {one.reason}")
    for code, count in left.items():
        yield f"note: {count} more of the kind `{code}`; `stager inspect` lists them"


def _as_json(result: packer.Packed) -> dict[str, object]:
    value: dict[str, object] = {
        "environment": result.environment.prefix,
        "kind": result.environment.kind,
        "findings": plain(result.findings),
        "reused": list(result.reused),
        "seconds": round(result.seconds, 3),
        "rewritten": result.rewritten,
        "compiled": result.compiled,
    }
    if result.published is not None:
        manifest = result.published.manifest
        value["name"] = manifest.name
        value["ref"] = result.published.ref
        value["prefix"] = manifest.prefix
        value["layers"] = plain(manifest.layers)
    return value
