"""What comes before a staged environment is used: find it, bring it up to date, stage it."""

from __future__ import annotations

import argparse
import os

from stager import activate as activation
from stager import fsutil, lookup, together
from stager.cli.common import Bars, say
from stager.config import Config
from stager.errors import JOB, StagerError, UsageError
from stager.ref import KEYS, Ref
from stager.repository import Published
from stager.schedulers import Allocation
from stager.staging import allocation
from stager.staging import stage as staging


def prepare(
    text: str | None,
    config: Config,
    *,
    holder: str,
    quiet: bool = False,
    everywhere: Allocation | None = None,
    via: str = "auto",
) -> tuple[list[Published], list[staging.Staged]]:
    """Find, bring up to date and stage one or several environments.

    Args:
        text: what the user typed, ``REF[+REF...]``, or None.
        config: see :mod:`stager.config`.
        holder: who claims it.
        quiet: no progress and no warnings.
        everywhere: stage on all nodes of this allocation, instead of here.
        via: how it gets there, see :func:`stager.staging.keeper.stage_everywhere`.

    Raises:
        UsageError: the store is the site's.
        StagerError: any of it failed.
    """
    if config["store"] == config["site_store"]:
        raise UsageError(
            f"{config['store']} is the site's own store",
            hint="the hooks stage into it, for jobs that name the environment; leave out --store",
        )
    bars = Bars(quiet=quiet)
    try:
        wishes = lookup.wanted(text, os.environ)
        found = [up_to_date(wish, config, bars, quiet=quiet) for wish in wishes]
        together.require([published.manifest for published in found])
        if everywhere is not None:
            from stager.staging import keeper

            results = [
                keeper.stage_everywhere(published, config, everywhere, via=via, progress=bars)
                for published in found
            ]
        else:
            results = [
                allocation.stage_with_room(published, config, holder=holder, progress=bars)
                for published in found
            ]
            if not quiet:
                _warn_of_shared(config["store"], results)
                for conflict in together.conflicts(list(map(activation.Part.staged, results))):
                    say(f"stager: warning: {conflict}")
        return found, results
    finally:
        bars.finish()


def _warn_of_shared(store: str, results: list[staging.Staged]) -> None:
    if all(result.how == staging.HIT for result in results) or not fsutil.is_shared(store):
        return
    say(
        f"stager: warning: the store {store} is on {fsutil.file_system(store)}: nodes that share it"
        " delete each other's trees; choose a local disk of this node (--store)"
    )


def up_to_date(wish: Ref, config: Config, bars: Bars, *, quiet: bool = False) -> Published:
    """Find an environment, and bring it up to date where that is the policy.

    Args:
        wish: what the user named.
        config: see :mod:`stager.config`.
        bars: told how far it is.
        quiet: no warnings.

    Raises:
        StagerError: it is not published, or has changed and must not be used then.
    """
    published, changes = lookup.fresh(wish, config, progress=bars)
    if changes and config["stage.on_stale"] == "fallback":
        raise StagerError(
            f"`{published.manifest.name}` changed since it was packed ({changes[0]})",
            hint="pack it again, or choose another policy with --on-stale",
            blame=JOB,
        )
    if changes and not quiet:
        name = published.manifest.name
        say(f"stager: warning: `{name}` changed since it was packed ({changes[0]})")
    return published


def ask_job(arguments: argparse.Namespace, name: str, config: Config) -> None:
    """Take the environment and the options from the job's directive where nothing else says one.

    Args:
        arguments: the command line.
        name: the argument that names an environment; set where the directive does.
        config: ``run.strict`` and :data:`stager.ref.KEYS` are set.

    Raises:
        UsageError: the directive is malformed.
    """
    if getattr(arguments, name) or os.environ.get("STAGER_ENV"):
        return
    directive = allocation.directive(os.environ)
    if directive is None:
        return
    setattr(arguments, name, "+".join(map(str, directive.refs)))
    if "strict" in directive.options:
        config.set("run.strict", True, "the job's directive")
    for option, key in KEYS.items():
        if directive.options.get(option):
            config.set(key, directive.options[option], "the job's directive")
