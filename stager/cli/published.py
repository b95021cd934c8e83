"""``stager list``, ``inspect`` and ``remove``."""

from __future__ import annotations

import argparse
import os

from stager import freshness, lookup, ref
from stager.cli.common import count, load_config, print_json, printable, say, size, table
from stager.config import COMMAND_LINE, Config
from stager.errors import NotFoundError, StagerError
from stager.manifest import plain
from stager.ref import Ref
from stager.repository import Repository


def list(arguments: argparse.Namespace) -> int:
    """List what is published."""
    config = load_config(arguments)
    entries: dict[str, dict[str, object]] = {}
    for repository in lookup.repositories(config):
        if not os.path.isdir(repository.root):
            _tell_missing(repository, config)
        for name in repository.names():
            if name in entries:
                continue  # the user's own comes first
            entry: dict[str, object] = {"repository": repository.root, "name": name}
            try:
                published = repository.find(Ref(name=name))
            except StagerError as error:
                entries[name] = {**entry, "error": error.message}
                continue
            if published is None:
                continue
            manifest = published.manifest
            entries[name] = {
                **entry,
                "digest": published.digest,
                "kind": manifest.kind,
                "origin": manifest.origin,
                "python": manifest.python.version,
                "packed": manifest.packed,
                "size": sum(layer.image.size for layer in manifest.layers),
            }
    if arguments.json:
        print_json({"environments": [*entries.values()]})
        return 0
    rows = []
    for name, one in entries.items():
        if "error" in one:
            rows.append([name, "-", "-", "-", "-", str(one["error"])])
        else:
            rows.append(
                [
                    name,
                    str(one["kind"]),
                    str(one["python"]),
                    size(int(str(one["size"]))),
                    str(one["packed"])[:10],
                    str(one["origin"]),
                ]
            )
    if not rows:
        say(f"stager: nothing is published in {config['repository']}; `stager pack` publishes")
        return 0
    for line in table(rows, ["NAME", "KIND", "PYTHON", "IMAGES", "PACKED", "ORIGIN"]):
        print(line)
    return 0


def _tell_missing(repository: Repository, config: Config) -> None:
    """Tell of a repository that somebody has named and that is not there.

    Raises:
        NotFoundError: it was named for this command alone.
    """
    if repository.root != config["repository"]:
        say(f"stager: there is no repository {repository.root} (key `repositories`)")
    elif config.sources["repository"] == COMMAND_LINE:
        raise NotFoundError(
            f"there is no repository {repository.root}", hint="`stager pack` makes it"
        )


def inspect(arguments: argparse.Namespace) -> int:
    """Show a manifest."""
    config = load_config(arguments)
    published = lookup.find(ref.parse(arguments.ref), config)
    manifest = published.manifest
    if arguments.json:
        layers = []
        for layer in manifest.layers:
            record = published.repository.layer(layer.id, layer.image.format) or {}
            layers.append({**plain(layer), "rewritten": record.get("rewritten", [])})
        changed = freshness.changed(manifest)
        value = {"digest": published.digest, **plain(manifest), "layers": layers}
        print_json({**value, "changed": changed})
        return 0
    print(f"name         {manifest.name}")
    print(f"ref          {published.ref}")
    print(f"kind         {manifest.kind}")
    print(printable(f"origin       {manifest.origin}"))
    print(f"prefix       {manifest.prefix}")
    print(f"python       {manifest.python.version} ({manifest.python.base})")
    needs = f"{manifest.platform.machine}, glibc {manifest.platform.glibc or 'any'}"
    print(f"needs        {needs}")
    print(f"packed       {manifest.packed} by stager {manifest.packer}")
    print(f"repository   {published.repository.root}")
    for layer in manifest.layers:
        image = layer.image
        print(
            f"layer        {layer.role}: {layer.files} files, {size(layer.size)} in"
            f" {size(image.size)} {image.format}, {layer.filename}"
        )
    for finding in manifest.findings:
        print(printable(f"{finding.severity:<12} {finding.path}: {finding.reason}"))
    return 0


def remove(arguments: argparse.Namespace) -> int:
    """Take a name back."""
    config = load_config(arguments)
    wish = ref.parse(arguments.ref)
    removed = Repository(config["repository"]).remove(wish)
    say(f"stager: removed `{wish}` and {count(len(removed), 'image')} that nothing else uses")
    return 0
