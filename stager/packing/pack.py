"""Packing: an environment becomes layers, images and a manifest. Start at :func:`pack`."""

from __future__ import annotations

import contextlib
import datetime
import gc
import itertools
import os
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import stager
from stager import freshness, fsutil, walk
from stager.config import Config
from stager.environments import Environment, Request, Tree, describe
from stager.errors import JOB, StagerError, UsageError
from stager.manifest import (
    TREE,
    USER,
    Finding,
    Manifest,
    Platform,
    Python,
    Watch,
    read_layer,
)
from stager.packing.layers import Layers, Progress
from stager.packing.produce import Outcome
from stager.packing.survey import Survey, look_through
from stager.ref import Ref, is_name
from stager.repository import Published, Repository
from stager.walk import LINK

_NOT_CHECKED = {
    "pip",
    "setuptools",
    "wheel",
    "pkg_resources",
    "_distutils_hack",
    "distutils-precedence",
}


class Packed(NamedTuple):
    """What a pack did.

    Attributes:
        published: the manifest and where it is; None after a check.
        findings: what the user should know, by layer.
        reused: roles of the layers that had been packed before.
        seconds: how long it took.
        rewritten: how many files had an old path in them.
        compiled: how many modules got new bytecode.
    """

    published: Published | None
    environment: Environment
    findings: tuple[Finding, ...]
    reused: tuple[str, ...]
    seconds: float
    rewritten: int
    compiled: int


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Look for no reference cycles: a hundred thousand objects are gone through, and none found."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_uncollected()
def pack(
    request: Request,
    config: Config,
    *,
    name: str | None = None,
    check: bool = False,
    progress: Progress | None = None,
) -> Packed:
    """Pack an environment and publish it.

    Args:
        request: which one.
        config: see :mod:`stager.config`.
        name: the name to publish; None takes the environment's own.
        check: only find out what would move and what would not; nothing is written.
        progress: told how far it is.

    Raises:
        StagerError: the environment cannot be packed; nothing is published.
    """
    started = time.monotonic()
    if name is not None and not is_name(name):
        raise UsageError(
            f"{name!r} cannot be an environment's name",
            hint="letters, digits, '.', '_' and '-', beginning with a letter or digit",
        )
    try:
        environment = describe(request, config)
    except OSError as error:
        raise fsutil.explain(error, f"look through {request.paths[0]}", blame=JOB) from error
    repository = Repository(config["repository"])
    if name is None:
        repository.require_name(environment.name, environment.prefix)
    # Before anything is looked through: what changes from here on may not be in the image.
    watches = [freshness.watch(path) for path in environment.watched if not check]
    surveys = _surveys(environment, config, check=check)
    # What is wrong with the first tree, mostly the only one, is told before anything is written.
    surveys = itertools.chain([next(surveys)], surveys)
    layers = Layers(environment, surveys, config, progress)
    if check:
        outcomes = layers.check()
        findings = [*layers.findings, *(one for outcome in outcomes for one in outcome.findings)]
        return _packed(None, environment, findings, (), outcomes, started)
    with _told(repository), repository.workspace() as directory:
        written = layers.write(repository, directory)
        told = (Finding(**one) for record in written for one in record["findings"])
        findings = [*layers.findings, *told]
        watches += (one for survey in layers.surveys for one in survey.watches)
        manifest = _manifest(environment, layers.surveys, written, findings, watches, config, name)
        if progress is not None and name is not None:
            _note_replaced(repository, manifest, progress)
        published = repository.publish(manifest, replace=name is not None)
    with contextlib.suppress(OSError):  # it is published, whatever became of what nobody needs
        repository.collect(keep=config["keep_replaced"])
    return _packed(published, environment, findings, layers.reused, layers.outcomes, started)


@contextlib.contextmanager
def _told(repository: Repository) -> Iterator[None]:
    """Name the repository where a disk, mostly the one that it is on, fails."""
    try:
        yield
    except BrokenPipeError:
        raise  # nobody reads what is told of the progress
    except OSError as error:
        raise fsutil.explain(error, f"pack into the repository {repository.root}") from error


def _surveys(environment: Environment, config: Config, *, check: bool) -> Iterator[Survey]:
    """Look through one tree after the other, each when it is asked for.

    The next tree is looked through while the compressor is at work on the last one's image.

    Raises:
        StagerError: something cannot be packed, and this is no check.
    """
    errors = _errors(environment.findings)
    trees = iter(environment.trees)
    for tree in trees:
        survey = _survey(tree, environment, config)
        errors += _errors(survey.findings)
        if errors and not check:
            for other in trees:  # all of them are told at once
                errors += _errors(_survey(other, environment, config).findings)
            raise _refusal(errors)
        yield survey


def _survey(tree: Tree, environment: Environment, config: Config) -> Survey:
    try:
        return look_through(tree, environment, config)
    except OSError as error:
        raise fsutil.explain(error, f"look through {tree.root}", blame=JOB) from error


def _errors(findings: Iterable[Finding]) -> list[Finding]:
    return [one for one in findings if one.severity == "error"]


def _note_replaced(repository: Repository, manifest: Manifest, progress: Progress) -> None:
    with contextlib.suppress(StagerError):  # a damaged one is replaced, too
        known = repository.find(Ref(name=manifest.name))
        if known is not None and not known.is_of(manifest.origin):
            progress.note(f"`{manifest.name}` previously referred to {known.manifest.origin}")


def _packed(
    published: Published | None,
    environment: Environment,
    findings: Iterable[Finding],
    reused: Iterable[str],
    outcomes: Iterable[Outcome],
    started: float,
) -> Packed:
    outcomes = list(outcomes)
    return Packed(
        published,
        environment,
        tuple(findings),
        tuple(reused),
        time.monotonic() - started,
        sum(len(one.rewritten) for one in outcomes),
        sum(one.compiled for one in outcomes),
    )


def _refusal(errors: list[Finding]) -> StagerError:
    listed = "".join(f"\n  {one.path}: {one.reason}" for one in errors)
    return StagerError(
        f"the environment cannot be packed:{listed}",
        hint="fix these, or see `stager pack --help` for the options --editables and --links",
        blame=JOB,
    )


# -- the manifest ---------------------------------------------------------------------------


def _manifest(
    environment: Environment,
    surveys: list[Survey],
    records: list[dict[str, Any]],
    findings: list[Finding],
    watches: list[Watch],
    config: Config,
    name: str | None,
) -> Manifest:
    interpreter = environment.interpreter
    glibc = max((tuple(record["glibc"]) for record in records), default=())
    return Manifest(
        name=name or environment.name,
        kind=environment.kind,
        origin=environment.prefix,
        spellings=environment.top.spellings,
        layers=tuple(read_layer(record["layer"]) for record in records),
        python=Python(
            "bin/python"
            if environment.kind in (USER, TREE)
            else os.path.relpath(interpreter.executable, environment.prefix),
            interpreter.version,
            interpreter.tag,
            _moved_base(interpreter.base_executable, surveys, records),
        ),
        platform=Platform(os.uname().machine, ".".join(map(str, glibc))),
        activation=environment.activation.to_json(),
        watches=tuple(watches),
        modules=_modules(surveys),
        options={key: config[key] for key in config.values if key.startswith("pack.")},
        packed=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        packer=stager.__version__,
        findings=tuple(findings),
    )


def _moved_base(executable: str, surveys: list[Survey], records: list[dict[str, Any]]) -> str:
    for survey, record in zip(surveys, records):
        for spelling in survey.tree.spellings:
            if executable.startswith(f"{spelling}/"):
                return str(record["layer"]["destination"] + executable[len(spelling) :])
    return executable


def _modules(surveys: list[Survey]) -> tuple[str, ...]:
    """Top-level modules and packages of the environment's own directories of packages."""
    found = set()
    for survey in surveys:
        if survey.tree.role not in ("env", TREE):
            continue
        for site in (f"{one}/" if one else "" for one in survey.tree.sites):
            names = (one.path[len(site) :] for one in survey.entries if _is_module(one, site))
            found |= {name.partition("/")[0].partition(".")[0] for name in names}
    found = {name for name in found if name.isidentifier() and not name.startswith("_")}
    return tuple(sorted(found - _NOT_CHECKED))


def _is_module(entry: walk.Entry, site: str) -> bool:
    if entry.kind == LINK or not entry.path.startswith(site):
        return False
    directory, _, name = entry.path[len(site) :].rpartition("/")
    if directory:
        return name == "__init__.py" and "/" not in directory
    return name.endswith((".py", ".so"))
