"""The layers of one environment, from the bottom up: those that are there, and new images."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from stager import fsutil, transfer, walk
from stager.config import Config
from stager.environments import Environment
from stager.errors import IntegrityError, NoSpaceError
from stager.formats import tarstream
from stager.formats.tarstream import Member
from stager.manifest import Finding, Image, Layer, plain
from stager.packing import lustre, plan
from stager.packing.produce import Data, Outcome, Producer, Sink
from stager.packing.survey import Survey, place_of
from stager.repository import Repository
from stager.rewriting.bytecode import Compiler
from stager.walk import DIRECTORY

LAYOUT = 5
"""Raised when the same environment would be packed into other bytes than before."""


class Progress(Protocol):
    """What a pack reports while it works."""

    def start(self, what: str, files: int, size: int) -> None:
        """A layer of so many files and bytes begins."""

    def advance(self, files: int, size: int) -> None:
        """So many more are done."""

    def finish(self) -> None:
        """The layer is done."""

    def waiting(self, seconds: float) -> None:
        """Somebody else is packing the same; so long so far."""

    def note(self, message: str) -> None:
        """Something the user may want to know."""


class Layers:
    """The layers of one environment, from the bottom up.

    Attributes:
        surveys: what was looked through so far.
        reused: roles of the layers that had been packed before.
        outcomes: what came of the others.
    """

    def __init__(
        self,
        environment: Environment,
        surveys: Iterator[Survey],
        config: Config,
        progress: Progress | None,
    ) -> None:
        self._environment = environment
        self._ahead = surveys
        self._config = config
        self._progress = progress
        self.surveys: list[Survey] = []
        self.reused: list[str] = []
        self.outcomes: list[Outcome] = []
        self._told = False  # that an image could not be spread

    @property
    def findings(self) -> list[Finding]:
        """What was found before anything was read."""
        each = (one for survey in self.surveys for one in survey.findings)
        return [*self._environment.findings, *each]

    def _places(self) -> Iterator[tuple[Survey, str, plan.Place]]:
        """Yield each survey with its layer's id and place."""
        config, environment = self._config, self._environment
        below: dict[str, str] = {}
        lower = environment.interpreter.base_executable
        for survey in self._ahead:
            self.surveys.append(survey)
            layer_id = walk.fingerprint(
                survey.entries,
                LAYOUT,
                survey.tree.spellings,
                survey.moves,
                config["store"],
                config["pack.bytecode"],
                config["local_prefixes"],  # where links may go on leading to
                environment.interpreter.version,
                lower,
            )
            destination = f"{config['store']}/envs/{layer_id}"
            place = place_of(survey, environment, config, destination, below)
            below[survey.tree.root] = destination
            lower = layer_id
            yield survey, layer_id, place

    def write(self, repository: Repository, directory: str) -> list[dict[str, Any]]:
        """Write the images that are not there yet; return each layer's record."""
        image_format = self._config["pack.format"]
        records: list[Future[dict[str, Any]]] = []
        # The end of an image, a wait for compressor and disk, overlaps with the next tree's survey.
        with ThreadPoolExecutor(1) as aside:
            for survey, layer_id, place in self._places():
                for one in filter(Future.done, records):
                    one.result()  # where that failed, nothing more is packed
                known = self._known(repository, layer_id, image_format)
                if known is not None:
                    self.reused.append(survey.tree.role)
                    # It may have been packed for another role.
                    role = {"role": survey.tree.role, "spellings": survey.tree.spellings}
                    again = {**known, "layer": {**known["layer"], **role}}
                    records.append(aside.submit(dict, again))
                    continue
                path = os.path.join(directory, f"{layer_id}.{image_format}")
                self._spread(path, survey)
                with contextlib.ExitStack() as image:
                    sink = image.enter_context(self._image(survey, path))
                    compile_all = self._config["pack.bytecode"]
                    outcome = self._produce(survey, place, sink, compile_all=compile_all)
                    end = image.pop_all()
                made = (layer_id, survey, place, outcome)
                records.append(aside.submit(self._finish, repository, path, end, made))
        return [record.result() for record in records]

    def _finish(
        self,
        repository: Repository,
        path: str,
        end: contextlib.ExitStack,
        made: tuple[str, Survey, plan.Place, Outcome],
    ) -> dict[str, Any]:
        """End an image that all has been written to, and add its layer."""
        end.close()
        layer_id, survey, place, outcome = made
        image = transfer.identify(path, self._config["pack.format"])
        layer = Layer(
            layer_id,
            survey.tree.role,
            survey.tree.root,
            place.destination,
            image,
            outcome.files,
            outcome.bytes,
            survey.tree.spellings,
        )
        repository.add_image(path, layer)
        record = {
            "layer": plain(layer),
            "image": layer.filename,
            "level": self._config["pack.level"],
            "glibc": list(outcome.glibc or ()),
            "findings": plain(outcome.findings),
            "rewritten": sorted(outcome.rewritten),
        }
        repository.add_layer(layer_id, image.format, record)
        return record

    def _spread(self, path: str, survey: Survey) -> None:
        size = sum(entry.size for entry in survey.entries)
        reason = lustre.spread(path, size, self._config["stripe_count"])
        if reason and self._progress is not None and not self._told:
            self._told = True
            self._progress.note(
                f"warning: many nodes will read the image slowly: it has the stripe"
                f" count of its directory ({reason})"
            )

    def _known(
        self, repository: Repository, layer_id: str, image_format: str
    ) -> dict[str, Any] | None:
        """The record of a layer that was packed before: here, or by the site for all."""
        for one in (repository, *map(Repository, self._config["repositories"])):
            record = one.layer(layer_id, image_format)
            if record is not None and self._is_good(one, record):
                if one is not repository:
                    repository.refer(one, record)
                return record
        return None

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

    @contextlib.contextmanager
    def _image(self, survey: Survey, path: str) -> Iterator[Sink]:
        """An image that is written meanwhile, and given up where that fails."""
        try:
            with self._written(survey, path) as sink:
                yield sink
        except (NoSpaceError, OSError) as error:
            told = fsutil.explain(error, "write it") if isinstance(error, OSError) else error
            if not isinstance(told, NoSpaceError) or told.hint == fsutil.TOO_LARGE:
                raise
            raise _full(survey, path, self._config["repository"], told) from error

    @contextlib.contextmanager
    def _written(self, survey: Survey, path: str) -> Iterator[Sink]:
        options = {"level": self._config["pack.level"], "threads": self._config["pack.threads"]}
        if self._config["pack.format"] == "squashfs":
            from stager.formats import squashfs

            newest = max(plan.seconds(entry) for entry in survey.entries)
            writer = squashfs.Writer(path, newest=newest, **options)
            try:
                yield writer
                writer.close()
            except BaseException:
                writer.abort()
                raise
            return
        from stager.formats import tarzst

        # It may be there, empty, with a layout of its own (stager/packing/lustre.py).
        with open(path, "wb") as file, tarzst.Writer(file, **options) as archive:
            yield archive

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


def _full(survey: Survey, path: str, repository: str, error: NoSpaceError) -> NoSpaceError:
    """Tell which file system has no space for an image, and how much it would take."""
    directory = os.path.dirname(path)
    size = sum(entry.size for entry in survey.entries)
    takes = f"the image of {survey.tree.root} takes up to {-(-size >> 20)} MiB"
    if os.strerror(errno.EDQUOT) in error.message:  # and nothing tells how much of it is left
        left = "your quota is used up"
    else:
        left = "no space is left"
        info = os.statvfs(directory)
        free = info.f_bavail * info.f_frsize
        with contextlib.suppress(OSError):  # what is written of it goes
            free += os.stat(path).st_blocks * 512
        takes += f", {free >> 20} MiB are free"
    return NoSpaceError(
        f"{left} on {fsutil.mount_point(directory)}, where the repository {repository} is: {takes}",
        hint="`stager remove` what you do not need any more, or name another repository"
        " (--repository, STAGER_REPOSITORY)",
    )


class _Nowhere:
    """A sink for checks: refuses what images refuse, reads large files to their end."""

    def write_member(self, member: Member, data: Data = b"") -> None:
        tarstream.header(member)
        if not isinstance(data, bytes):
            for _ in data:
                pass


def _check_unchanged(survey: Survey) -> None:
    """Make sure that no directory gained or lost an entry while its files were read."""
    directories = [
        entry
        for entry in survey.entries
        if entry.kind == DIRECTORY and not entry.path.startswith(".stager") and entry.mtime_ns
    ]
    with ThreadPoolExecutor(walk.SLOW_WORKERS) as pool:
        each = pool.map if survey.slow else map
        unchanged = list(each(_is_unchanged, directories))
    for entry, same in zip(directories, unchanged):
        if not same:
            raise IntegrityError(
                f"{entry.source} changed while it was being packed",
                hint="something is still installing into it; pack again when it has finished",
            )


def _is_unchanged(entry: walk.Entry) -> bool:
    try:
        return os.lstat(entry.source).st_mtime_ns == entry.mtime_ns
    except OSError:
        return False
