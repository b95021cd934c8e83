"""Packing: an environment becomes layers, images and a manifest. Start at :func:`pack`."""

from __future__ import annotations

import contextlib
import csv
import datetime
import filecmp
import os
import platform
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import stager
from stager import freshness, plan, transfer, walk
from stager.bytecode import Compiler
from stager.config import Config
from stager.environments import Environment, Tree, describe, editables
from stager.errors import IntegrityError, StagerError, UsageError
from stager.manifest import Finding, Image, Layer, Manifest, Platform, Python
from stager.produce import Outcome, Producer, Sink
from stager.ref import is_name
from stager.relocate import Move, Relocation
from stager.repository import Published, Repository, stripe
from stager.walk import DIRECTORY, FILE, LINK, Entry, Excluder

LAYOUT = 1
"""Raised when the same environment would be packed into other bytes than before."""

SNAPSHOTS = ".stager/editable"
"""Where copies of editable source trees lie in a layer."""

_NOT_CHECKED = {
    "pip",
    "setuptools",
    "wheel",
    "pkg_resources",
    "_distutils_hack",
    "distutils-precedence",
}


class Progress(Protocol):
    """What a pack reports while it works."""

    def start(self, what: str, files: int, size: int) -> None:
        """A layer of so many files and bytes begins."""

    def advance(self, files: int, size: int) -> None:
        """So many more are done."""

    def finish(self) -> None:
        """The layer is done."""

    def note(self, message: str) -> None:
        """Something the user may want to know."""


@dataclass
class Survey:
    """What a tree holds and how long looking took.

    Attributes:
        tree: the tree.
        entries: everything to pack, taken-in link targets and snapshots included.
        moves: paths outside the tree whose copies lie in it, relative to the destination.
        copies: directories outside the tree, and where in it a link was replaced by their copy.
        slow: the files lie on a network file system.
        watched: source trees whose changes make the environment stale.
    """

    tree: Tree
    entries: list[Entry]
    moves: list[tuple[str, str]] = field(default_factory=list)
    copies: list[tuple[str, str]] = field(default_factory=list)
    slow: bool = False
    watched: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


@dataclass(frozen=True)
class Packed:
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
    files: int
    bytes: int


def pack(
    path: str,
    config: Config,
    *,
    name: str | None = None,
    check: bool = False,
    progress: Progress | None = None,
) -> Packed:
    """Pack the environment at ``path`` and publish it.

    Args:
        path: a directory.
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
    environment = describe(path, config)
    surveys = [_survey(tree, environment, config) for tree in environment.trees]
    findings = [*environment.findings, *(one for survey in surveys for one in survey.findings)]
    errors = [one for one in findings if one.severity == "error"]
    if errors and not check:
        raise _refusal(errors)
    layers = _Layers(environment, surveys, config, progress)
    if check:
        outcomes = layers.check()
        findings += [one for outcome in outcomes for one in outcome.findings]
        return _packed(None, environment, findings, (), outcomes, started)
    repository = Repository(config["repository"])
    with repository.workspace() as directory:
        stripe(os.path.join(repository.root, "images"))
        written = layers.write(repository, directory)
        findings += [Finding(**one) for record in written for one in record["findings"]]
        manifest = _manifest(environment, surveys, written, findings, config, name)
        published = repository.publish(manifest, replace=name is not None)
    repository.collect(keep=config["keep_replaced"])
    return _packed(published, environment, findings, layers.reused, layers.outcomes, started)


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
        sum(one.files for one in outcomes),
        sum(one.bytes for one in outcomes),
    )


def _refusal(errors: list[Finding]) -> StagerError:
    listed = "".join(f"\n  {one.path}: {one.reason}" for one in errors)
    return StagerError(
        f"the environment cannot be packed:{listed}",
        hint="mend these, or see `stager pack --help` for the options --editables and --links",
        blame="job",
    )


# -- what is there --------------------------------------------------------------------------


def _survey(tree: Tree, environment: Environment, config: Config) -> Survey:
    started = time.monotonic()
    exclude = Excluder((*tree.exclude, *config["pack.exclude"]))
    try:
        entries = walk.walk(tree.root, exclude)
    except OSError as error:
        from stager.fsutil import explain

        raise explain(error, f"look through {tree.root}") from error
    survey = Survey(tree, entries, slow=walk.is_slow(len(entries), time.monotonic() - started))
    _take_in_links(survey, environment, config)
    if tree.role == "env":
        _take_in_editables(survey, environment, config)
    _settle_links(survey)
    survey.entries.sort(key=lambda entry: entry.path)
    return survey


def _take_in_links(survey: Survey, environment: Environment, config: Config) -> None:
    """Replace links out of the Python directories by what they lead to.

    An installer that links modules to its cache (``UV_LINK_MODE=symlink``) leaves an environment
    of nothing but such links. Elsewhere, a link may lead to data that are much larger than the
    environment: what it leads to is taken in only where an installer put it there.
    """
    place = _place(survey, environment, config, "/", {})
    tree, policy = survey.tree, config["pack.links"]
    kept: list[Entry] = []
    taken = 0
    installed: frozenset[str] | None = None
    for entry in survey.entries:
        if not plan.leaves(place, entry):
            kept.append(entry)
            continue
        if not any(entry.path.startswith(f"{one}/") for one in (*tree.python_directories, "bin")):
            if installed is None:
                installed = _installed_data(survey)
            if entry.path not in installed:
                kept.append(entry)
                continue
        real = os.path.realpath(entry.source)
        if policy == "refuse":
            reason = f"a link out of the environment, to {real} (--links refuse)"
            survey.findings.append(Finding(entry.path, "link", reason, "error"))
        if policy != "copy":
            kept.append(entry)
            continue
        taken += 1
        if os.path.isdir(real):
            kept += walk.walk(real, Excluder(config["pack.exclude"]), at=entry.path)
            survey.copies.append((real, entry.path))
        else:
            kept.append(walk.entry(entry.path, real))
    survey.entries = kept
    if taken:
        reason = f"{taken} links out of the environment: what they lead to is included"
        survey.findings.append(Finding(".", "links", reason, "note"))


def _settle_links(survey: Survey) -> None:
    """Give links in copies of other trees a target that is right where the copy lies.

    One between copied entries stays a link. One to a file that is not copied becomes the file, as
    does one to a directory of a copied source tree; a directory elsewhere may be of any size, so a
    link to it goes on leading there.
    """
    own = f"{survey.tree.root}/"
    known = {entry.path for entry in survey.entries}
    settled: list[Entry] = []
    for entry in survey.entries:
        if entry.kind != LINK or entry.source.startswith(own):
            settled.append(entry)
            continue
        target = os.path.normpath(os.path.join(os.path.dirname(entry.source), entry.target))
        real = os.path.realpath(entry.source)
        copies = [_copy_of(path, survey) for path in (target, real)]
        copy = next((path for path in copies if path in known), None)
        if copy is not None:
            relative = os.path.relpath(copy, os.path.dirname(entry.path))
            settled.append(entry._replace(target=relative))
        elif os.path.isfile(real):
            settled.append(walk.entry(entry.path, real))
        elif any(copies) and os.path.isdir(real):
            settled += walk.walk(real, Excluder(()), at=entry.path)
        else:
            settled.append(entry._replace(target=target))
    survey.entries = settled


def _copy_of(path: str, survey: Survey) -> str | None:
    """Where the copy of a path outside of the tree lies in it, if the tree it is in is copied."""
    for old, at in (*survey.moves, *survey.copies):
        if path == old or path.startswith(f"{old}/"):
            return at + path[len(old) :]
    return None


def _installed_data(survey: Survey) -> frozenset[str]:
    """The files outside of site-packages that installed packages list as theirs."""
    found: set[str] = set()
    for entry in survey.entries:
        if entry.path.endswith(".dist-info/RECORD") and os.path.isfile(entry.source):
            site = os.path.dirname(os.path.dirname(entry.path))
            with (
                contextlib.suppress(csv.Error),
                open(entry.source, encoding="utf-8", errors="surrogateescape") as file,
            ):
                names = (row[0] for row in csv.reader(file) if row)
                found.update(
                    os.path.normpath(os.path.join(site, name))
                    for name in names
                    if name.startswith("../")
                )
    return frozenset(found)


def _take_in_editables(survey: Survey, environment: Environment, config: Config) -> None:
    tree, policy = survey.tree, config["pack.editables"]
    inside = tuple(spelling for one in environment.trees for spelling in one.spellings)
    inside += tuple(config["local_prefixes"])
    sources: list[editables.Source] = []
    for directory in tree.python_directories:
        found, rebuilding = editables.find(
            os.path.join(tree.root, directory, "site-packages"), inside
        )
        sources += found
        for one in rebuilding:
            survey.findings.append(
                Finding(
                    os.path.relpath(one.named_by, tree.root),
                    "editable",
                    "an editable install that rebuilds itself on import cannot be packed;"
                    " install the package without -e",
                    "note" if policy == "keep" else "error",
                )
            )
    for number, source in enumerate(sources):
        named_by = os.path.relpath(source.named_by, tree.root)
        if policy != "snapshot":
            severity = "error" if policy == "refuse" else "warning"
            reason = f"an editable install of {source.path}, which is not on the node"
            survey.findings.append(Finding(named_by, "editable", reason, severity))
            continue
        at = f"{SNAPSHOTS}/{number}-{os.path.basename(source.path)}"
        survey.entries += _snapshot(source, at)
        survey.moves.append((source.path, at))
        survey.watched += _watchable(source)
        reason = f"an editable install: a copy of {source.path} is included"
        survey.findings.append(Finding(named_by, "editable", reason, "note"))
    if any(at.startswith(SNAPSHOTS) for _, at in survey.moves):
        now = next(entry for entry in survey.entries if entry.path == ".")
        for path in (".stager", SNAPSHOTS):
            survey.entries.append(now._replace(path=path, mode=0o755))


def _snapshot(source: editables.Source, at: str) -> Iterator[Entry]:
    exclude = Excluder((".git", ".hg", ".svn", "node_modules"))
    if source.module:
        parent = os.path.dirname(source.module)
        name = os.path.basename(source.module)
        yield walk.entry(at, parent)
        # setuptools puts a suffix in place of the mapped path's own: keep the file's beside it.
        yield walk.entry(f"{at}{name[len(os.path.basename(source.path)) :]}", source.module)
        return
    yield walk.entry(at, source.path)
    names = source.items if source.items is not None else sorted(os.listdir(source.path))
    for name in names:
        path = os.path.join(source.path, name)
        if exclude(name):
            continue
        entry = walk.entry(f"{at}/{name}", path)
        if entry.kind == DIRECTORY:
            yield from walk.walk(path, exclude, at=f"{at}/{name}")
        else:
            yield entry


def _watchable(source: editables.Source) -> list[str]:
    if source.module:
        return [source.module]
    if source.items is None:
        return [source.path]
    return [os.path.join(source.path, name) for name in source.items]


def _place(
    survey: Survey,
    environment: Environment,
    config: Config,
    destination: str,
    below: dict[str, str],
) -> plan.Place:
    """Everything a plan has to know of where a layer goes.

    Args:
        survey: the layer.
        environment: its environment.
        config: the configuration.
        destination: the layer's new prefix.
        below: old roots of the layers below, and where they go.
    """
    tree, interpreter = survey.tree, environment.interpreter
    moves = [Move(spelling, destination) for spelling in tree.spellings]
    for lower in environment.trees:
        if lower is tree:
            break
        moves += [Move(spelling, below.get(lower.root, "/")) for spelling in lower.spellings]
    moves += [Move(old, f"{destination}/{at}") for old, at in survey.moves]
    relocation = Relocation(moves)
    base = interpreter.base_executable
    copies = frozenset(
        entry.path
        for entry in survey.entries
        if tree.role == "env" and entry.kind == FILE and _is_copy_of_python(entry, base)
    )
    return plan.Place(
        root=tree.root,
        destination=destination,
        relocation=relocation,
        python_directories=(*tree.python_directories, SNAPSHOTS),
        tag=interpreter.tag,
        interpreter=relocation.path(base) or base,
        base_executable=base,
        local=config["local_prefixes"],
        copies_of_python=copies,
    )


def _is_copy_of_python(entry: Entry, base: str) -> bool:
    if not re.fullmatch(r"bin/python[\d.]*t?", entry.path) or entry.source == base:
        return False
    return os.path.getsize(base) == entry.size and filecmp.cmp(entry.source, base, shallow=False)


# -- layers ---------------------------------------------------------------------------------


class _Layers:
    """The layers of one environment, from the bottom up."""

    def __init__(
        self,
        environment: Environment,
        surveys: list[Survey],
        config: Config,
        progress: Progress | None,
    ) -> None:
        self._environment = environment
        self._surveys = surveys
        self._config = config
        self._progress = progress
        self.reused: list[str] = []
        self.outcomes: list[Outcome] = []

    def _places(self) -> Iterator[tuple[Survey, str, plan.Place]]:
        """Yield each survey with its layer's id and place."""
        config, environment = self._config, self._environment
        below: dict[str, str] = {}
        lower = environment.interpreter.base_executable
        for survey in self._surveys:
            layer_id = walk.fingerprint(
                survey.entries,
                LAYOUT,
                survey.tree.spellings,
                survey.moves,
                config["store"],
                config["pack.bytecode"],
                environment.interpreter.version,
                lower,
            )
            destination = f"{config['store']}/envs/{layer_id}"
            place = _place(survey, environment, config, destination, below)
            below[survey.tree.root] = destination
            lower = layer_id
            yield survey, layer_id, place

    def write(self, repository: Repository, directory: str) -> list[dict[str, Any]]:
        """Write the images that are not there yet; return each layer's record."""
        records = []
        image_format = self._config["pack.format"]
        for survey, layer_id, place in self._places():
            known = repository.layer(layer_id, image_format)
            if known is not None and self._is_good(repository, known):
                self.reused.append(survey.tree.role)
                records.append(known)
                continue
            path = os.path.join(directory, f"{layer_id}.{image_format}")
            outcome = self._write(survey, place, path)
            image = transfer.identify(path, image_format)
            layer = Layer(
                layer_id,
                survey.tree.role,
                survey.tree.root,
                place.destination,
                image,
                outcome.files,
                outcome.bytes,
            )
            repository.add_image(path, layer)
            record = {
                "layer": asdict(layer),
                "image": layer.filename,
                "level": self._config["pack.level"],
                "glibc": list(outcome.glibc or ()),
                "findings": [asdict(one) for one in outcome.findings],
                "rewritten": sorted(outcome.rewritten),
            }
            repository.add_layer(layer_id, image_format, record)
            records.append(record)
        return records

    def _is_good(self, repository: Repository, record: dict[str, Any]) -> bool:
        """Tell whether an image can be used again: packing again is the advice for damaged ones."""
        image = Image(**record["layer"]["image"])
        path = os.path.join(repository.root, "images", record["image"])
        same = record["level"] == self._config["pack.level"]
        return bool(same and transfer.is_image(path, image))

    def check(self) -> list[Outcome]:
        """Find out what would happen, writing nothing."""
        for survey, _, place in self._places():
            self._produce(survey, place, _Nowhere(), compile_all=False)
        return self.outcomes

    def _write(self, survey: Survey, place: plan.Place, path: str) -> Outcome:
        config = self._config
        newest = max(plan.seconds(entry) for entry in survey.entries)
        if config["pack.format"] == "squashfs":
            from stager.formats import squashfs

            writer = squashfs.Writer(
                path, level=config["pack.level"], threads=config["pack.threads"], newest=newest
            )
            try:
                outcome = self._produce(survey, place, writer, compile_all=config["pack.bytecode"])
                writer.close()
            except BaseException:
                writer.abort()
                raise
            return outcome
        from stager.formats import tarzst

        with open(path, "xb") as file:
            archive = tarzst.Writer(
                file, level=config["pack.level"], threads=config["pack.threads"]
            )
            outcome = self._produce(survey, place, archive, compile_all=config["pack.bytecode"])
            archive.close()
        return outcome

    def _produce(
        self, survey: Survey, place: plan.Place, sink: Sink, *, compile_all: bool
    ) -> Outcome:
        items, findings = plan.make(place, survey.entries, compile_all=compile_all)
        interpreter = self._environment.interpreter
        workers = self._config["pack.threads"] or len(os.sched_getaffinity(0))
        if self._progress is not None:
            size = sum(entry.size for entry in survey.entries)
            self._progress.start(survey.tree.role, len(items), size)
        with Compiler(interpreter.base_executable, workers) as compiler:
            producer = Producer(place, survey.tree.spellings, interpreter.magic, compiler)
            for item in producer.write(items, sink, slow=survey.slow):
                if self._progress is not None:
                    self._progress.advance(1, item.entry.size if item.entry else 0)
        _check_unchanged(survey)
        if self._progress is not None:
            self._progress.finish()
        producer.outcome.findings[:0] = findings
        self.outcomes.append(producer.outcome)
        return producer.outcome


class _Nowhere:
    """A sink for checks: reads large files to their end, keeps nothing."""

    def write_member(self, member: object, data: Any = b"") -> None:
        if not isinstance(data, bytes):
            for _ in data:
                pass


def _check_unchanged(survey: Survey) -> None:
    """Make sure that no directory gained or lost an entry while its files were read."""
    for entry in survey.entries:
        if entry.kind != DIRECTORY or entry.path.startswith(".stager"):
            continue
        try:
            unchanged = os.lstat(entry.source).st_mtime_ns == entry.mtime_ns
        except OSError:
            unchanged = False
        if not unchanged:
            raise IntegrityError(
                f"{entry.source} changed while it was being packed",
                hint="something is still installing into it; pack again when it has finished",
            )


# -- the manifest ---------------------------------------------------------------------------


def _manifest(
    environment: Environment,
    surveys: list[Survey],
    records: list[dict[str, Any]],
    findings: list[Finding],
    config: Config,
    name: str | None,
) -> Manifest:
    interpreter = environment.interpreter
    glibc = max((tuple(record["glibc"]) for record in records), default=())
    trees = [path for survey in surveys for path in survey.watched]
    return Manifest(
        name=name or environment.name,
        kind=environment.kind,
        origin=environment.prefix,
        spellings=environment.top.spellings,
        layers=tuple(
            Layer(**{**record["layer"], "image": Image(**record["layer"]["image"])})
            for record in records
        ),
        python=Python(
            os.path.relpath(interpreter.executable, environment.prefix),
            interpreter.version,
            interpreter.tag,
            _moved_base(interpreter.base_executable, surveys, records),
        ),
        platform=Platform(platform.machine(), ".".join(map(str, glibc))),
        activation=environment.activation.to_json(),
        watches=(
            *(freshness.watch(path) for path in environment.watched),
            *(freshness.watch(path, tree=True) for path in trees),
        ),
        modules=_modules(environment, surveys[-1]),
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


def _modules(environment: Environment, survey: Survey) -> tuple[str, ...]:
    """Top-level modules and packages of the environment's own site-packages."""
    found = set()
    for directory in environment.top.python_directories:
        site = f"{directory}/site-packages/"
        for entry in survey.entries:
            if not entry.path.startswith(site) or entry.kind == LINK:
                continue
            parts = entry.path[len(site) :].split("/")
            if len(parts) == 2 and parts[1] == "__init__.py":
                found.add(parts[0])
            elif len(parts) == 1 and parts[0].endswith((".py", ".so")):
                found.add(parts[0].split(".")[0])
    found = {name for name in found if name.isidentifier() and not name.startswith("_")}
    return tuple(sorted(found - _NOT_CHECKED))
