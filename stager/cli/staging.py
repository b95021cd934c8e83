"""``stager stage``, ``activate``, ``release``, ``collect`` and ``status``."""

from __future__ import annotations

import argparse
import os
import sys
import time

from stager import activate as activation
from stager import envpatch, lease, lookup
from stager import stage as staging
from stager.cli.common import Bars, load_config, print_json, say, size, table
from stager.config import Config
from stager.errors import StagerError
from stager.repository import Published
from stager.store import Store


def prepare(
    text: str | None, config: Config, *, holder: str, quiet: bool = False
) -> tuple[Published, staging.Staged]:
    """Find, bring up to date and stage an environment.

    Args:
        text: the ref the user typed, or None.
        config: see :mod:`stager.config`.
        holder: who claims it.
        quiet: no progress and no warnings.

    Raises:
        StagerError: any of it failed.
    """
    bars = Bars(quiet=quiet)
    try:
        published, changes = lookup.fresh(lookup.wanted(text, os.environ), config, progress=bars)
        if changes and config["stage.on_stale"] == "fallback":
            raise StagerError(
                f"`{published.manifest.name}` changed since it was packed ({changes[0]})",
                hint="pack it again, or choose another policy with --on-stale",
                blame="job",
            )
        if changes and not quiet:
            name = published.manifest.name
            say(f"stager: warning: `{name}` changed since it was packed ({changes[0]})")
        node = Store(config["store"])
        return published, staging.stage(published, node, config, holder=holder, progress=bars)
    finally:
        bars.finish()


def stage(arguments: argparse.Namespace) -> int:
    """Stage and print the prefix, nothing else, on standard output."""
    config = load_config(arguments)
    holder = lease.of_job_or_process(os.getppid())
    published, result = prepare(arguments.ref, config, holder=holder)
    if arguments.json:
        print_json(
            {
                "prefix": result.prefix,
                "how": result.how,
                "layers": result.layers,
                "ref": published.ref,
                "holder": holder,
                "seconds": {key: round(value, 4) for key, value in result.seconds.items()},
            }
        )
    else:
        print(result.prefix)
    return 0


def activate(arguments: argparse.Namespace) -> int:
    """Print shell code that activates a staged environment, or its original where that fails."""
    config = load_config(arguments)
    try:
        holder = lease.of_job_or_process(os.getppid())
        published, result = prepare(arguments.ref, config, holder=holder)
        after = activation.staged(result, config, os.environ, ref=published.manifest.name)
    except StagerError as error:
        original = activation.original(arguments.ref, config, os.environ)
        if config["run.strict"] or original is None:
            # `eval` of nothing succeeds; a script that goes on must be able to notice.
            print("false")
            raise
        say(f"stager: activating the original environment: {error.message}")
        after = original
    changed, unset = envpatch.changes(os.environ, after)
    sys.stdout.write(envpatch.RENDERERS[arguments.shell](changed, unset))
    return 0


def release(arguments: argparse.Namespace) -> int:
    """Drop claims."""
    config = load_config(arguments)
    holder = arguments.holder or lease.of_job_or_process(os.getppid())
    count = Store(config["store"]).release(holder)
    say(f"stager: released {count} trees held by {holder}")
    return 0


def collect(arguments: argparse.Namespace) -> int:
    """Evict trees."""
    from stager import collect as collection

    config = load_config(arguments)
    result = collection.collect(
        Store(config["store"]),
        max_size=config["collect.max_size"],
        min_free=config["collect.min_free"],
        everything=arguments.all,
    )
    if arguments.json:
        print_json({"trees": [*result.trees], "freed": result.size, "leases": result.leases})
    else:
        say(f"stager: evicted {len(result.trees)} trees, freed {size(result.size)}")
    return 0


def status(arguments: argparse.Namespace) -> int:
    """Show what is in the store."""
    config = load_config(arguments)
    node = Store(config["store"])
    entries = []
    for held in node.held():
        ready = held.stamp is not None and node.ready(held.id, held.stamp.image) is not None
        entries.append(
            {
                "id": held.id,
                "how": held.stamp.how if held.stamp else "unfinished",
                "ready": ready,
                "size": held.stamp.size if held.stamp else 0,
                "leases": {holder: lease.is_alive(holder) for holder in held.leases},
                "used": held.used,
                "prefix": node.tree(held.id),
            }
        )
    if arguments.json:
        print_json({"store": node.root, "free": node.free(), "trees": entries})
        return 0
    print(f"store {node.root}: {size(node.size())} used, {size(node.free())} free")
    rows = [
        [
            str(one["id"]),
            str(one["how"]) + ("" if one["ready"] else " (not usable)"),
            size(int(str(one["size"]))),
            str(sum(held[1] for held in dict(one["leases"]).items())),  # type: ignore[call-overload]
            time.strftime("%Y-%m-%d %H:%M", time.localtime(float(str(one["used"])))),
        ]
        for one in entries
    ]
    for line in table(rows, ["TREE", "STATE", "SIZE", "CLAIMS", "LAST USED"]):
        print(line)
    return 0
