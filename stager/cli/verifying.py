"""``stager verify``."""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from collections.abc import Iterator

from stager import activate, lookup
from stager import verify as verifier
from stager.cli.common import count, load_config, print_json, say
from stager.cli.preparing import prepare
from stager.config import Config
from stager.errors import JOB, IntegrityError, StagerError
from stager.staging import lease
from stager.staging.store import Store

_SHOWN = 20


def verify(arguments: argparse.Namespace) -> int:
    """Import from the staged tree; exit 12 where the original is touched."""
    config = load_config(arguments)
    with contextlib.ExitStack() as stack:
        if not _can_be_made(config["store"]):
            config.values["store"] = stack.enter_context(_temporary_store(config["store"]))
        return _verify(arguments, config)


def _can_be_made(store: str) -> bool:
    return os.path.lexists(store) or os.access(os.path.dirname(store), os.W_OK)


@contextlib.contextmanager
def _temporary_store(instead: str) -> Iterator[str]:
    """A store for a machine that has none for us: a login node, where jobs and hooks never run."""
    with tempfile.TemporaryDirectory(prefix="stager-store-") as directory:
        say(f"stager: the store {instead} cannot be made here: unpacking into {directory}")
        yield directory


def _verify(arguments: argparse.Namespace, config: Config) -> int:
    holder = lease.of_process(os.getpid())
    everything, results = prepare(arguments.ref, config, holder=holder, quiet=arguments.json)
    manifests, prefix = [one.manifest for one in everything], results[0].prefix
    modules = sorted({name for manifest in manifests for name in manifest.modules})
    if arguments.modules:
        modules = ",".join(arguments.modules).split(",")
    environ = activate.staged(results, config, os.environ, ref=lookup.called(None, everything))
    original = activate.original(arguments.ref, config, os.environ)
    try:
        found = verifier.verify(
            results, config, environ, modules=modules or ["site"], original=original
        )
    finally:
        Store(config["store"]).release(holder)
    if arguments.json:
        print_json({"prefix": prefix, "modules": modules, **found._asdict()})
    else:
        good = len(modules) - len(found.failed)
        say(f"stager: imported {count(good, 'module')} from {prefix}")
        leaks = f"{len(found.origin) or 'none'} of the original"
        say(f"stager: {found.paths} paths accessed, {leaks}, traced with {found.method}")
        for title, paths in (("of the original", found.origin), ("elsewhere", found.outside)):
            for path in paths[:_SHOWN]:
                say(f"  {title}: {path}")
            if len(paths) > _SHOWN:
                say(f"  {title}: {len(paths) - _SHOWN} more")
        for module, reason in found.failed.items():
            where = " (nor from the original)" if module in found.before else ""
            say(f"  cannot be imported{where}: {module}: {reason}")
    if found.origin:
        raise IntegrityError(
            f"the staged environment accessed the original: {found.origin[0]}",
            hint="`stager inspect` lists what could not be moved",
        )
    # Many environments have modules that import nowhere; who names one wants it to.
    forgiven = () if arguments.modules else found.before
    lost = len(found.failed) - len(forgiven)
    if lost:
        hint = "they can be imported from the original; see `stager inspect`"
        if original is None or arguments.modules:
            hint = "can they be imported from the original? name those that matter with --import"
        raise StagerError(
            f"{lost} of {len(modules)} modules cannot be imported from the staged tree",
            hint=hint,
            blame=JOB,
        )
    return 0
