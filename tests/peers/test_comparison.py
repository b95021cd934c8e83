"""What becomes of an environment in the hands of each packer: the table of docs/comparison.md.

Each row is a question to the environment at its new place, with the original hidden; some come
from the list in docs/relocation.md. What is known to go wrong is in :data:`KNOWN` with the reason,
and must go wrong: a peer that mends it fails this test, and gets its due.

The table is written from what comes out here: ``make comparison``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import pytest

import workbench
from conda.fixtures import CondaEnvironment
from environments import REPO, Environment, clean_environ
from workbench import Bench

from . import subjects
from .packers import CondaPack, CondaPacker, Moved, Stager, UvAndTar, VenvPack, VenvPacker

pytestmark = pytest.mark.environments

DOCUMENT = REPO / "docs" / "comparison.md"
PACKERS = (Stager.name, VenvPack.name, UvAndTar.name)
CONDA_PACKERS = (Stager.name, CondaPack.name)

NO_BASE = "the base Python is not packed"
NO_TEXT = "paths in files are left as they are"
NO_SHELLS = "there are no such scripts in what it makes"
NO_LINKS = "absolute links into the environment are left as they are"
_V, _U, _C = VenvPack.name, UvAndTar.name, CondaPack.name
KNOWN = {
    (_V, "base_gone"): NO_BASE,
    (_U, "base_gone"): NO_BASE,
    (_V, "system_site"): NO_BASE,
    (_U, "system_site"): NO_BASE,
    (_V, "script_options"): "options of the interpreter are dropped",
    (_U, "script_options"): "scripts that uv did not install are left as they are",
    (_V, "hard_links"): "the archive is damaged: a body follows the header of a hard link",
    (_V, "activate_others"): NO_SHELLS,
    (_U, "activate_others"): "`activate.csh` is not made for relocatable environments",
    (_V, "editable"): "refused: environments with editable installs cannot be packed",
    (_U, "editable"): "the source is not packed",
    (_V, "path_line"): NO_TEXT,
    (_U, "path_line"): NO_TEXT,
    (_V, "absolute_link"): NO_LINKS,
    (_U, "absolute_link"): NO_LINKS,
    (_V, "kernel"): NO_TEXT,
    (_U, "kernel"): NO_TEXT,
    (_V, "boundary"): NO_TEXT,
    (_U, "boundary"): NO_TEXT,
    (_V, "traces"): NO_TEXT,
    (_U, "traces"): NO_TEXT,
    (_V, "records"): "scripts are rewritten, their hashes are not",
    (_V, "same_bytes"): "the archive has the time it was made at",
    (_C, "conda_scripts"): "they ask `env` for a `python`: the environment must be active",
    (_C, "conda_edited"): "the package cache's file is packed in its place",
    (_C, "conda_activation"): "its `activate` stops where a variable is not set",
    (_C, "conda_checksums"): "files are rewritten, their checksums are not",
    (_V, "space"): "scripts of an environment with a space in its path are left as they are",
}


@dataclass
class Subject:
    """One packer, its environments, and what came of them; made when first asked for.

    Args:
        root: a directory of its own.
        base: the Python that the environments are made from.
    """

    packer: VenvPacker
    root: Path
    base: Environment
    _moved: list[Moved | AssertionError] = field(default_factory=list)

    def environment(self, name: str, make: subjects.Make | None = None) -> Environment:
        """A new environment, not to be moved to where it was made."""
        place = self.root / name
        place.mkdir()
        return (make or self.packer.make)(place / "env", self.base.bin / "python3")

    def carry(self, name: str, environment: Environment, *hide: Path) -> Moved:
        """Pack it, bring it to another place; the original, and more, is not there any more."""
        there = self.root / f"{name}-there"
        there.mkdir()
        archive = self.packer.pack(environment, there)
        return Moved(environment, self.packer.unpack(archive, there), (environment.prefix, *hide))

    def moved(self) -> Moved:
        """The environment that most questions are put to."""
        if not self._moved:
            try:
                environment = self.environment("lived-in")
                subjects.lived_in(environment)
                self._moved.append(self.carry("lived-in", environment))
            except AssertionError as error:
                self._moved.append(error)
        (found,) = self._moved
        if isinstance(found, AssertionError):
            raise found
        return found


Check = Callable[[Subject], None]
ROWS: dict[str, tuple[str, Check]] = {}


def row(title: str) -> Callable[[Check], Check]:
    def add(check: Check) -> Check:
        ROWS[check.__name__] = (title, check)
        return check

    return add


@row("Python starts, packages are imported")
def imports(subject: Subject) -> None:
    moved = subject.moved()
    code = "import sys, six, requests, stager_sample; print(sys.prefix, requests.__file__)"
    said = moved.run(moved.python, "-c", code).stdout.split()
    assert said == [str(moved.prefix), f"{moved.site_packages}/requests/__init__.py"]


@row("... and where the base Python is gone too")
def base_gone(subject: Subject) -> None:
    moved = subject.moved()
    gone = Moved(moved.original, moved.prefix, (*moved.hide, subject.base.prefix))
    gone.run(moved.python, "-c", "import ssl, json, requests")


@row("packages of the base are seen (`--system-site-packages`), the base gone")
def system_site(subject: Subject) -> None:
    environment = subject.environment("system-site", subjects.with_system_site_packages)
    moved = subject.carry("system-site", environment, subject.base.prefix)
    said = moved.run(moved.python, "-c", "import of_the_base; print(of_the_base.word)").stdout
    assert said == "base\n"


@row("console scripts run by their path, without activation")
def scripts(subject: Subject) -> None:
    moved = subject.moved()
    for name in ("sample-console", "sample-script"):
        said = moved.run(moved.prefix / "bin" / name).stdout
        assert said == f"hello {moved.prefix}\n"


@row("options in a script's first line are kept (`python -I`)")
def script_options(subject: Subject) -> None:
    moved = subject.moved()
    assert moved.run(moved.prefix / "bin" / "isolated").stdout == "1\n"


@row("files that are hard links of one another are all there")
def hard_links(subject: Subject) -> None:
    environment = subject.environment("twins")
    subjects.with_twins(environment)
    moved = subject.carry("twins", environment)
    for name in ("first", "second"):
        assert moved.run(moved.prefix / "bin" / name).stdout == "a twin\n"


@row("`activate` of bash names the new place")
def activate_bash(subject: Subject) -> None:
    _activated(subject.moved(), "bash", "-c", '. "$1"/bin/activate; echo "$VIRTUAL_ENV"; {}')


@row("... under `set -eu`")
def activate_strict(subject: Subject) -> None:
    code = 'set -eu; . "$1"/bin/activate; echo "$VIRTUAL_ENV"; {}'
    _activated(subject.moved(), "bash", "-c", code)


@row("`activate.fish` and `activate.csh` do, too")
def activate_others(subject: Subject) -> None:
    moved = subject.moved()
    place = moved.prefix / "bin"
    _activated(moved, "fish", "-c", f"source {place}/activate.fish; echo $VIRTUAL_ENV; {{}}")
    _activated(
        moved, "csh", "-fc", f"set prompt=x; source {place}/activate.csh; echo $VIRTUAL_ENV; {{}}"
    )


def _activated(moved: Moved, shell: str, option: str, code: str) -> None:
    words = [shell, option, code.format("command -v python" if shell != "csh" else "which python")]
    if shell == "bash":
        words += ["bash", str(moved.prefix)]
    said = moved.run(*words, env=clean_environ(TERM="dumb")).stdout.splitlines()
    assert said == [str(moved.prefix), f"{moved.prefix}/bin/python"]


@row("an editable install is imported, its source gone")
def editable(subject: Subject) -> None:
    environment = subject.environment("editable")
    source = subject.root / "source"
    subjects.with_editable(environment, source)
    moved = subject.carry("editable", environment, source)
    assert moved.run(moved.python, "-c", "import edited; print(edited.word)").stdout == "edited\n"


@row("a `.pth` line with a path in the environment")
def path_line(subject: Subject) -> None:
    moved = subject.moved()
    said = moved.run(moved.python, "-c", "import along; print(along.__file__)").stdout
    assert said == f"{moved.prefix}/more/along.py\n"


@row("a link by its absolute path into the environment")
def absolute_link(subject: Subject) -> None:
    moved = subject.moved()
    link = moved.prefix / "share" / "stager-sample" / "link.conf"
    assert moved.run("cat", link).stdout == "key = value\n"


@row("a Jupyter kernel specification names the new place")
def kernel(subject: Subject) -> None:
    moved = subject.moved()
    text = (moved.prefix / "share/jupyter/kernels/python3/kernel.json").read_text()
    assert f'"{moved.python}"' in text


@row("a text file follows; a longer path in it that begins alike does not")
def boundary(subject: Subject) -> None:
    moved = subject.moved()
    lines = (moved.prefix / "share" / "beside.txt").read_text().splitlines()
    assert lines[0] == f"{moved.original.prefix}-2/data"
    assert lines[1] == f"{moved.prefix}/share"


@row("no other file names the original")
def traces(subject: Subject) -> None:
    moved = subject.moved()
    needle = os.fsencode(moved.original.prefix)
    left = []
    for parent, _directories, names in os.walk(moved.prefix):
        for name in names:
            path = Path(parent, name)
            data = os.fsencode(os.readlink(path)) if path.is_symlink() else path.read_bytes()
            if re.search(re.escape(needle) + rb"(?!-2)", data):
                left.append(str(path.relative_to(moved.prefix)))
    assert left == []


@row("no module is compiled again")
def compiled(subject: Subject) -> None:
    moved = subject.moved()
    said = moved.run(moved.python, "-v", "-c", "import requests, six, stager_sample").stderr
    loaded = re.findall(r"^# code object from '?(.*?)'?$", said, re.MULTILINE)
    ours = [one for one in loaded if one.startswith(f"{moved.prefix}/lib")]
    assert len(ours) > 10
    assert [one for one in ours if not one.endswith(".pyc")] == []


@row("RECORD has the hashes of the files")
def records(subject: Subject) -> None:
    assert workbench.broken_records(subject.moved().site_packages) == []


@row("the same environment gives the same bytes")
def same_bytes(subject: Subject) -> None:
    environment = subject.environment("twice")
    sums = []
    for name in ("first", "second"):
        place = subject.root / name
        place.mkdir()
        archive = subject.packer.pack(environment, place)
        sums.append(hashlib.sha256(archive.read_bytes()).hexdigest())
        archive.unlink()
        made = int(time.time())
        while int(time.time()) == made:  # an archive may hold when it was made, in seconds
            time.sleep(0.05)
    assert sums[0] == sums[1]


@row("scripts of an environment whose path had a space")
def space(subject: Subject) -> None:
    moved = subject.carry("space", subject.environment("with space"))
    said = moved.run(moved.prefix / "bin" / "sample-console").stdout
    assert said == f"hello {moved.prefix}\n"


# conda


@dataclass
class Conda:
    """A conda environment in the hands of one packer."""

    packer: CondaPacker
    root: Path
    original: CondaEnvironment
    _moved: list[Moved | AssertionError] = field(default_factory=list)

    def moved(self) -> Moved:
        """The environment at its new place, the original and its package cache gone."""
        if not self._moved:
            there = self.root / "conda-there"
            there.mkdir()
            hide = (self.original.prefix, self.original.cache)
            try:
                prefix = self.packer.unpack(self.packer.pack(self.original, there), there)
                self._moved.append(Moved(self.original, prefix, hide))
            except AssertionError as error:
                self._moved.append(error)
        (found,) = self._moved
        if isinstance(found, AssertionError):
            raise found
        return found


CONDA_ROWS: dict[str, tuple[str, Callable[[Conda], None]]] = {}


def conda_row(title: str) -> Callable[[Callable[[Conda], None]], Callable[[Conda], None]]:
    def add(check: Callable[[Conda], None]) -> Callable[[Conda], None]:
        CONDA_ROWS[check.__name__] = (title, check)
        return check

    return add


@conda_row("Python starts, packages of conda's and of pip's are imported")
def conda_imports(subject: Conda) -> None:
    moved = subject.moved()
    code = "import sys, ssl, noarch_demo, stager_sample; print(sys.prefix)"
    assert moved.run(moved.python, "-c", code).stdout == f"{moved.prefix}\n"


@conda_row("scripts run by their path, without activation")
def conda_scripts(subject: Conda) -> None:
    moved = subject.moved()
    assert moved.run(moved.prefix / "bin" / "sample-console").stdout == f"hello {moved.prefix}\n"
    assert moved.run(moved.prefix / "bin" / "noarch-entry").stdout.startswith(f"{moved.prefix} ")


@conda_row("a compiled program with the prefix in it")
def conda_compiled(subject: Conda) -> None:
    moved = subject.moved()
    assert moved.run(moved.prefix / "bin" / "cbaked").stdout == "hello from the prefix\n"


@conda_row("an edited file of a package keeps the edit")
def conda_edited(subject: Conda) -> None:
    moved = subject.moved()
    text = (moved.prefix / subjects.EDITED).read_text()
    assert text == f'{{"mine": "{moved.prefix}"}}'


@conda_row("a file of the user's names the new place")
def conda_own(subject: Conda) -> None:
    moved = subject.moved()
    assert (moved.prefix / "share" / "mine.txt").read_text() == f"{moved.prefix}/share\n"


@conda_row("activation under `set -eu` runs the packages' scripts")
def conda_activation(subject: Conda) -> None:
    moved = subject.moved()
    code = subject.packer.activation(moved.prefix) + '; echo "$CONDA_PREFIX" "$DEMO_HOME"'
    said = moved.run("bash", "-euc", code, env=subject.packer.environ()).stdout
    assert said == f"{moved.prefix} {moved.prefix}/share/activate-demo\n"


@conda_row("`conda-meta` has the checksums of the files")
def conda_checksums(subject: Conda) -> None:
    moved = subject.moved()
    wrong = []
    for record in moved.prefix.glob("conda-meta/*.json"):
        for path in json.loads(record.read_text())["paths_data"]["paths"]:
            file = moved.prefix / path["_path"]
            plain = file.is_file() and not file.is_symlink()
            if plain and path.get("sha256_in_prefix") and path["_path"] != subjects.EDITED:
                found = hashlib.sha256(file.read_bytes()).hexdigest()
                wrong += [path["_path"]] if found != path["sha256_in_prefix"] else []
    assert wrong == []


@conda_row("no module is compiled again")
def conda_bytecode(subject: Conda) -> None:
    moved = subject.moved()
    said = moved.run(moved.python, "-v", "-c", "import json, ssl, noarch_demo").stderr
    loaded = re.findall(r"^# code object from '?(.*?)'?$", said, re.MULTILINE)
    ours = [one for one in loaded if one.startswith(f"{moved.prefix}/lib")]
    assert len(ours) > 10
    assert [one for one in ours if not one.endswith(".pyc")] == []


# What came out


@pytest.fixture(scope="module")
def outcomes(
    new_directory: Callable[[], Path], conda_channel: Path
) -> Iterator[Callable[[str, str], str]]:
    """Ask one question to one packer, once; returns what went wrong, if anything."""
    with contextlib.ExitStack() as stack:
        root = new_directory()
        base = subjects.base(root / "base")
        bench = Bench(root / "bench")
        bench.root.mkdir()
        stack.callback(bench.close)
        subject: dict[str, Subject] = {}
        for packer in (Stager(bench), VenvPack(), UvAndTar()):
            own = root / f"p{len(subject)}"
            own.mkdir()
            subject[packer.name] = Subject(packer, own, base)
        original = subjects.conda(root, conda_channel)
        of_conda: dict[str, Conda] = {}
        for packer in (Stager(bench), CondaPack()):
            own = root / f"c{len(of_conda)}"
            own.mkdir()
            of_conda[packer.name] = Conda(packer, own, original)
        answers: dict[tuple[str, str], str] = {}

        def ask(packer: str, name: str) -> str:
            if (packer, name) not in answers:
                try:
                    if name in ROWS:
                        ROWS[name][1](subject[packer])
                    else:
                        CONDA_ROWS[name][1](of_conda[packer])
                    answers[packer, name] = ""
                except (AssertionError, OSError) as error:
                    answers[packer, name] = str(error) or "failed"
            return answers[packer, name]

        yield ask
    shutil.rmtree(root)


def _cases() -> Iterator[object]:
    cases = [(name, packer) for name in ROWS for packer in PACKERS]
    cases += [(name, packer) for name in CONDA_ROWS for packer in CONDA_PACKERS]
    for name, packer in cases:
        reason = KNOWN.get((packer, name))
        marks = [pytest.mark.xfail(reason=reason, strict=True)] if reason else []
        yield pytest.param(packer, name, marks=marks, id=f"{packer.split()[0]}-{name}")


@pytest.mark.parametrize(("packer", "name"), [*_cases()])
def test_row(outcomes: Callable[[str, str], str], packer: str, name: str) -> None:
    assert outcomes(packer, name) == ""


def test_the_table_is_what_came_out(outcomes: Callable[[str, str], str]) -> None:
    table = _document(outcomes)
    if os.environ.get("WRITE_COMPARISON"):
        DOCUMENT.write_text(table)
    assert DOCUMENT.read_text() == table, "write it again: make comparison"


def _document(outcomes: Callable[[str, str], str]) -> str:
    notes: list[str] = []
    venvs = _table({name: title for name, (title, _) in ROWS.items()}, PACKERS, outcomes, notes)
    titles = {name: title for name, (title, _) in CONDA_ROWS.items()}
    condas = _table(titles, CONDA_PACKERS, outcomes, notes)
    numbered = "\n".join(f"{number}. {note}" for number, note in enumerate(notes, 1))
    versions = {"venv_pack": version("venv-pack2"), "conda_pack": version("conda-pack")}
    return _DOCUMENT.format(venvs=venvs, condas=condas, notes=numbered, **versions)


def _table(
    rows: dict[str, str],
    packers: tuple[str, ...],
    outcomes: Callable[[str, str], str],
    notes: list[str],
) -> str:
    lines = [f"| with the original hidden | {' | '.join(packers)} |"]
    lines.append("|---" * (len(packers) + 1) + "|")
    for name, title in rows.items():
        cells = []
        for packer in packers:
            if not outcomes(packer, name):
                cells.append("yes")
                continue
            reason = KNOWN.get((packer, name), "not known why")
            if reason not in notes:
                notes.append(reason)
            cells.append(f"no ({notes.index(reason) + 1})")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


_DOCUMENT = """\
# Compared with other packers

The same environment, made and packed as each packer's documentation says, and brought to another
path. The tables are written by `tests/peers/test_comparison.py` from what came out (`make
comparison`), with venv-pack2 {venv_pack} and conda-pack {conda_pack}; `make test` fails where they
are no longer true.

## Virtual environments

With a Python outside of `/usr`, packages, and what users add to theirs.

{venvs}

## Conda environments

With a package of pip's, an edited file, and one that the user has added; the package cache is gone
where they are used.

{condas}

{notes}

## What the tables do not show

What stager cannot do and they can: their archives need nothing of the packer's where they are
unpacked, and where that is need not be known when they are packed. conda-pack writes zip and tar of
several compressions, squashfs and Cloudera's parcels, and has code for Windows. An image of
stager's is for Linux nodes that have stager, and best used in the store that it was packed for.

How long a job waits with each of them: [performance.md](performance.md), where conda-pack and
venv-pack2 are the *recipe*.
"""
