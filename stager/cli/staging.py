"""``stager stage``, ``activate``, ``release``, ``collect`` and ``status``."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterable
from typing import Any

from stager import activate as activation
from stager import envpatch, lookup, schedulers
from stager.cli.common import (
    count,
    load_config,
    options_given,
    print_json,
    printable,
    say,
    size,
    table,
)
from stager.cli.preparing import ask_job, prepare
from stager.config import Config
from stager.errors import StagerError, UsageError
from stager.ref import Ref
from stager.staging import allocation, lease, notes
from stager.staging.sitestore import SiteStore
from stager.staging.store import RECEIVED, Store, holder_name

_SHOWN = 2
"""Names of a tree; a base may be that of hundreds."""
_SHOWN_STRANGERS = 5


def stage(arguments: argparse.Namespace) -> int:
    """Stage and print the prefix, or one for each environment, and nothing else."""
    config = load_config(arguments)
    holder = lease.of_job_or_process(os.getppid())
    found, results = prepare(arguments.ref, config, holder=holder)
    if arguments.ref and not options_given(arguments):
        notes.remember(arguments.ref, found[0], config, holder)
    if arguments.json:
        values = [
            {
                "prefix": result.prefix,
                "how": result.how,
                "layers": result.layers,
                "ref": published.ref,
                "seconds": {key: round(value, 4) for key, value in result.seconds.items()},
            }
            for published, result in zip(found, results)
        ]
        print_json({**values[0], "holder": holder, "environments": values})
    else:
        for result in results:
            print(result.prefix)
    return 0


def activate(arguments: argparse.Namespace) -> int:
    """Print shell code that activates a staged environment, or its original where that fails."""
    try:
        sys.stdout.write(_activation(arguments))
    except BaseException:
        # `eval` of nothing succeeds; a script that goes on must be able to notice.
        print("false")
        raise
    return 0


def _activation(arguments: argparse.Namespace) -> str:
    where = schedulers.allocation(os.environ)
    faults: list[UsageError] = []
    config = load_config(arguments, faults)
    try:
        ask_job(arguments, "ref", config)
        if faults:
            raise faults[0]
        everywhere = where if allocation.needs_every_node(where, []) else None
        with allocation.lasting(where):
            found, results = prepare(
                arguments.ref,
                config,
                holder=lease.of_job_or_process(os.getppid()),
                everywhere=everywhere,
                via=arguments.via,
            )
        name = lookup.called(arguments.ref, found)
        after = activation.staged(results, config, os.environ, ref=name)
        if everywhere is not None:
            after = allocation.also_outside(after, found[0].manifest, everywhere)
    except StagerError as error:
        original = activation.original(arguments.ref, config, os.environ)
        if config["run.strict"] or original is None:
            raise
        say(f"stager: activating the original environment: {error.message}")
        after = original
    return envpatch.RENDERERS[arguments.shell](*envpatch.changes(os.environ, after))


def release(arguments: argparse.Namespace) -> int:
    """Drop claims."""
    config = load_config(arguments)
    holder = holder_name(arguments.holder or lease.of_job_or_process(os.getppid()))
    if not os.path.lexists(config["store"]):
        say(f"stager: {_no_store(config)}")
        return 0
    dropped = Store(config["store"]).release(holder)
    say(f"stager: released {count(dropped, 'tree')} held by {holder}")
    return 0


def collect(arguments: argparse.Namespace) -> int:
    """Evict trees."""
    from stager.staging import collect as collection

    if arguments.nodes:
        return _collect_elsewhere(arguments)
    if arguments.all_users:
        return _collect_all_users(arguments)
    config = load_config(arguments)
    if not os.path.lexists(config["store"]):
        if arguments.json:
            nothing: dict[str, Any] = {"trees": [], "failed": [], "strangers": []}
            print_json({**nothing, "freed": 0, "leases": 0, "claimed": 0})
        else:
            say(f"stager: {_no_store(config)}")
        return 0
    node = Store(config["store"])
    result = collection.collect(
        node,
        max_size=config["collect.max_size"],
        min_free=config["collect.min_free"],
        everything=arguments.all,
        exists=schedulers.job_exists,
    )
    answer = {
        "trees": [*result.trees],
        "freed": result.size,
        "leases": result.leases,
        "failed": [*result.failed],
        "claimed": sum(1 for held in node.held() if held.leases),
        "strangers": node.strangers(),
    }
    if arguments.json:
        print_json(answer)
    else:
        say(f"stager: {_collected(answer)}")
    return 1 if result.failed else 0


def _collected(answer: dict[str, Any]) -> str:
    lines = [f"evicted {count(len(answer['trees']), 'tree')}, freed {size(answer['freed'])}"]
    if answer.get("claimed"):  # an older stager on another node does not tell
        lines[0] += f"; in use, kept: {answer['claimed']}"
    lines += [f"could not be removed: {one}" for one in answer["failed"]]
    return "\n".join([*lines, *_strangers(answer)])


def _strangers(answer: dict[str, Any]) -> Iterable[str]:
    found = answer.get("strangers")  # an older stager does not tell either
    if found:
        yield printable(f"not created by stager, kept: {_few(found, _SHOWN_STRANGERS)}")


def _collect_elsewhere(arguments: argparse.Namespace) -> int:
    from stager.cli import pushing

    words = ["collect"]
    for option in ("--all", "--all-users"):
        words += [option] * getattr(arguments, option[2:].replace("-", "_"))
    for option in ("--max-size", "--min-free"):
        value = getattr(arguments, option[2:].replace("-", "_"))
        words += [option, value] if value is not None else []

    def shown(answer: dict[str, Any]) -> str:
        if "users" in answer:
            return f"evicted {sum(max(0, one) for one in answer['users'].values())} trees"
        return _collected(answer)

    return pushing.everywhere(arguments, words, shown)


def _collect_all_users(arguments: argparse.Namespace) -> int:
    from stager import config as configuration
    from stager.hooks import collecting

    config = configuration.load(trusted_only=True)
    for key, value in (
        ("collect.max_size", arguments.max_size),
        ("collect.min_free", arguments.min_free),
    ):
        if value is not None:
            config.set(key, value, configuration.COMMAND_LINE)
    found = collecting.for_all_users(config, everything=arguments.all)
    if arguments.json:
        print_json({"users": {str(uid): count for uid, count in found.items()}})
    else:
        evicted = sum(count for count in found.values() if count > 0)
        say(f"stager: evicted {evicted} trees in {len(found)} stores")
    return 1 if -1 in found.values() else 0


def status(arguments: argparse.Namespace) -> int:
    """Show what is in the store."""
    if arguments.nodes:
        from stager.cli import pushing

        names = _names(load_config(arguments))  # that the nodes need not read the repository
        return pushing.everywhere(arguments, ["status"], lambda one: "\n".join(_status(one, names)))
    config = load_config(arguments)
    if not os.path.lexists(config["store"]):  # looking makes none
        if arguments.json:
            print_json({"store": config["store"], "free": 0, "trees": [], "strangers": []})
        else:
            print(_no_store(config))
        return 0
    shared = config["store"] == config["site_store"]
    node = SiteStore(config["store"]) if shared else Store(config["store"])
    entries: list[dict[str, Any]] = []
    for held in node.held():
        ready = node.ready(held.id) is not None
        entries.append(
            {
                "id": held.id,
                "how": held.stamp.how if held.stamp else "unfinished",
                "ready": ready,
                "size": held.stamp.size if held.stamp else 0,
                "leases": {
                    holder: lease.is_alive(holder, schedulers.job_exists) for holder in held.leases
                },
                "used": held.used,
                "prefix": node.tree(held.id),
            }
        )
    answer = {"store": node.root, "trees": entries, "strangers": node.strangers()}
    if arguments.json:
        print_json({**answer, "free": node.free()})
        return 0
    print(f"store {node.root}: {size(node.size())} used, {size(node.free())} free")
    for line in (*_trees(entries, _names(config), used=True), *_strangers(answer)):
        print(line)
    return 0


def _names(config: Config) -> dict[str, str]:
    """What layers are called, by their ids: as what is published now and made of them."""
    found: dict[str, dict[str, None]] = {}
    for repository in lookup.repositories(config):
        with contextlib.suppress(StagerError):
            for name in repository.names():
                with contextlib.suppress(StagerError):  # a damaged one has no say
                    published = repository.find(Ref(name=name))
                    for layer in published.manifest.layers if published else ():
                        role = "" if layer.role == "env" else f" ({layer.role})"
                        found.setdefault(layer.id, {})[name + role] = None
    return {one: _few([*names], _SHOWN) for one, names in found.items()}


def _few(names: list[str], most: int) -> str:
    return ", ".join(names[:most]) + (f" +{len(names) - most}" if names[most:] else "")


def _no_store(config: Config) -> str:
    """What is said instead of making one: it may be a slip of the pen."""
    return f"nothing is staged: there is no store {config['store']}"


def _status(answer: dict[str, Any], names: dict[str, str]) -> Iterable[str]:
    """What a node has, without what differs on each: when it was used, how much is free."""
    yield f"store {answer['store']}"
    yield from _trees(answer["trees"], names, used=False)
    yield from _strangers(answer)


def _trees(entries: list[dict[str, Any]], names: dict[str, str], *, used: bool) -> Iterable[str]:
    rows = []
    for one in entries:
        usable = one["ready"] or one["how"] == RECEIVED  # an image for the next stage
        row = [
            names.get(one["id"], "-"),
            one["id"],
            one["how"] + ("" if usable else " (not usable)"),
            size(one["size"]),
            str(sum(one["leases"].values())),
        ]
        if used:
            row.append(time.strftime("%Y-%m-%d %H:%M", time.localtime(one["used"])))
        rows.append(row)
    return table(
        rows, ["NAME", "TREE", "STATE", "SIZE", "CLAIMS", *(["LAST USED"] if used else [])]
    )
