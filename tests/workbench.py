"""A repository and a store of a test's own, and the questions to ask of a staged tree.

``environments.py`` makes real environments; this module packs and stages them with the installed
command line, as a user would, and judges what lies in the store then. Whoever makes a
:class:`Bench` closes it: FUSE servers and mounts outlive the programs that start them.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from environments import VENV, Environment, clean_environ, run, run_hidden

KINDS = {
    "venv": "venv_stdlib",
    "copies": "venv_copies",
    "virtualenv": "venv_virtualenv",
    "uv": "venv_uv",
    "uv-relocatable": "venv_uv_relocatable",
    "uv-symlink": "venv_uv_symlink",
    "nested": "venv_nested",
    "on-base": "venv_on_base",
}
"""Kinds of environments, and the fixtures that make them."""

NOBODY = 65534
"""An unprivileged user and group."""
LIMIT = 60.0
"""Seconds to wait at most for something that takes a moment."""


@dataclass(frozen=True)
class Staged:
    """A staged environment.

    Args:
        prefix: its path in the store.
        how: how it came to be, as ``stager stage`` says.
        manifest: its manifest, as ``stager inspect --json`` shows it.
        bench: where it was packed and staged.
        hide: the original, and whatever it was made from.
    """

    prefix: Path
    how: str
    manifest: dict[str, Any]
    bench: Bench
    hide: tuple[Path, ...] = ()

    @property
    def bin(self) -> Path:
        return self.prefix / "bin"

    @property
    def python(self) -> Path:
        return self.bin / "python"

    @property
    def site_packages(self) -> Path:
        (found,) = self.prefix.glob("lib/python3.*/site-packages")
        return found

    @property
    def trees(self) -> list[Path]:
        """The trees of all layers, the base first."""
        return [self.prefix.parent / layer["id"] for layer in self.manifest["layers"]]

    def told(self, code: str) -> dict[str, dict[str, str]]:
        """The manifest's findings of one kind, by path."""
        return {one["path"]: one for one in self.manifest["findings"] if one["code"] == code}

    def run(
        self,
        *argv: str | Path,
        env: Mapping[str, str] | None = None,
        cwd: str | Path = "/",
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command for which the original does not exist."""
        return run_hidden(argv, hide=self.hide, env=env, cwd=cwd, check=check)

    def eval(self, expression: str, imports: str = "sys") -> str:
        """What `expression` is in the staged Python, with the original hidden."""
        code = f"import {imports}; print({expression})"
        return self.run(self.python, "-c", code).stdout.removesuffix("\n")


@dataclass
class Bench:
    """One repository and one store, side by side.

    Args:
        root: an empty directory; short, since a store's path may have 78 bytes.
        settings: variables ``STAGER_*`` for every command.
    """

    root: Path
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def repository(self) -> Path:
        return self.root / "repository"

    @property
    def store(self) -> Path:
        return Path(self.settings.get("STAGER_STORE", str(self.root / "store")))

    def environ(self, **changes: str | None) -> dict[str, str]:
        """Variables with which ``stager`` uses this repository and store."""
        ours = {"STAGER_REPOSITORY": str(self.repository), "STAGER_STORE": str(self.store)}
        home = self.root / "home"  # shells write there
        home.mkdir(exist_ok=True)
        ours["HOME"] = str(home)
        return clean_environ(**{**ours, **self.settings, **changes})

    def stager(
        self,
        *argv: str | Path,
        env: Mapping[str, str] | None = None,
        check: bool = True,
        prefix: Sequence[str | Path] = (),
        cwd: str | Path = "/",
    ) -> subprocess.CompletedProcess[str]:
        """Run ``stager``; `prefix` is a command to run it with, such as ``setpriv``."""
        environ = self.environ() if env is None else env
        command = [*prefix, VENV / "bin" / "stager", *argv]
        done = run(command, env=environ, cwd=cwd, check=check)
        if "Traceback" in done.stderr or "bug in stager" in done.stderr:
            raise AssertionError(f"{command}: {done.stderr}")
        return done

    def json(self, *argv: str | Path, env: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Run ``stager ... --json`` and return what it prints."""
        value: dict[str, Any] = json.loads(self.stager(*argv, "--json", env=env).stdout)
        return value

    def pack(
        self, environment: Environment | Path, *options: str | Path, name: str = "it"
    ) -> dict[str, Any]:
        prefix = environment.prefix if isinstance(environment, Environment) else environment
        return self.json("pack", prefix, "--name", name, *options)

    def stage(
        self, *options: str | Path, name: str = "it", hide: Iterable[str | Path] = ()
    ) -> Staged:
        said = self.json("stage", name, *options)
        hidden = tuple(Path(one) for one in hide)
        return Staged(Path(said["prefix"]), said["how"], self.json("inspect", name), self, hidden)

    def packed_and_staged(
        self,
        environment: Environment,
        *options: str | Path,
        how: str = "auto",
        name: str = "it",
        hide: Iterable[str | Path] = (),
    ) -> Staged:
        """Pack, stage, and hide the original together with `hide`."""
        self.pack(environment, *options, name=name)
        return self.stage("--how", how, name=name, hide=[environment.prefix, *hide])

    def expect(
        self,
        status: int,
        *argv: str | Path,
        env: Mapping[str, str] | None = None,
        prefix: Sequence[str | Path] = (),
    ) -> str:
        """Run ``stager`` where it must fail: with `status`, a message, and a hint; returns both.

        Raises:
            AssertionError: it did anything else.
        """
        done = self.stager(*argv, env=env, check=False, prefix=prefix)
        said = done.stderr
        assert done.returncode == status, (done.returncode, done.stdout, said)
        assert re.search(r"^stager: error: \S", said, re.MULTILINE), said
        assert re.search(r"^hint: \S", said, re.MULTILINE), said
        return said

    def unfinished(self) -> list[str]:
        """What an interrupted or failed command must not leave: half-made trees, claims, files."""
        left = [*self.repository.glob("tmp/*"), *self.store.glob("tmp/*")]
        left += [*self.repository.rglob("*.new"), *self.store.glob("ready/*.new")]
        left += self.store.glob("leases/*/*")
        ready = {path.name for path in self.store.glob("ready/*")}
        left += [path for path in self.store.glob("envs/*") if path.name not in ready]
        return [str(path) for path in left]

    def close(self) -> None:
        """Unmount whatever is mounted below the bench and end the servers of these mounts.

        Also those in other mount namespaces, that a test has hidden something in.
        """
        for mount in sorted(mounts_below(self.root), reverse=True):
            run(["umount", "--lazy", mount])
        limit = time.monotonic() + LIMIT
        while pids := servers(self.root):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
            if time.monotonic() > limit:
                raise AssertionError(f"processes that do not end: {pids}")
            time.sleep(0.02)


def mounts_below(directory: Path) -> list[str]:
    """Mount points below a directory, in our mount namespace."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    points = [line.split()[4] for line in lines]
    return [point for point in points if f"{point}/".startswith(f"{directory}/")]


def servers(directory: Path) -> list[int]:
    """FUSE servers of images below a directory, in any mount namespace."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            arguments = (process / "cmdline").read_bytes()
            if b"squashfuse" in arguments.split(b"\0")[0] and os.fsencode(directory) in arguments:
                found.append(int(process.name))
    return found


def until(what: str, condition: Any, *, limit: float = LIMIT) -> Any:
    """Wait for `condition()` to be true, and return what it is.

    Raises:
        AssertionError: it still was not after `limit` seconds.
    """
    end = time.monotonic() + limit
    while not (value := condition()):
        if time.monotonic() > end:
            raise AssertionError(f"not within {limit} s: {what}")
        time.sleep(0.01)
    return value


# Questions to a staged tree


def traces(staged: Staged, prefixes: Iterable[str | Path]) -> dict[str, str]:
    """Every place in the staged trees where one of the `prefixes` is left: path -> what is left.

    File contents, link targets and names. A file that the manifest tells of with the code
    ``leftover`` does not count.
    """
    needles = [os.fsencode(prefix) for prefix in prefixes]
    told = staged.told("leftover")
    found = {}
    for tree in staged.trees:
        for parent, directories, files in os.walk(os.fsencode(tree)):
            for name in [*directories, *files]:
                path = os.path.join(parent, name)
                relative = os.fsdecode(os.path.relpath(path, os.fsencode(tree)))
                if os.path.islink(path):
                    content = os.readlink(path)
                elif name in files:
                    content = Path(os.fsdecode(path)).read_bytes()
                else:
                    continue
                for needle in needles:
                    at = content.find(needle)
                    if at >= 0 and relative not in told:
                        found[relative] = content[max(0, at - 20) : at + 100].decode(
                            "utf-8", "backslashreplace"
                        )
    return found


def links_out(staged: Staged, local: Iterable[str] = ("/usr/",)) -> dict[str, str]:
    """Every link that leads out of the staged trees, other than to the node's own disk.

    Where a link has to be absolute, it is one that leads to the node's own disk.
    """
    trees = [f"{tree}/" for tree in staged.trees]
    found = {}
    for tree in staged.trees:
        for parent, directories, files in os.walk(tree):
            for name in [*directories, *files]:
                path = os.path.join(parent, name)
                if not os.path.islink(path):
                    continue
                target = os.readlink(path)
                absolute = os.path.normpath(os.path.join(parent, target))
                if absolute.startswith(tuple(local)):
                    continue
                if target.startswith("/") or not absolute.startswith(tuple(trees)):
                    found[os.path.relpath(path, tree)] = target
    return found


def broken_records(site_packages: Path) -> list[str]:
    """Every line of every RECORD whose file is missing or has another hash or size."""
    wrong, lines = [], 0
    for record in site_packages.glob("*.dist-info/RECORD"):
        for name, digest, size in csv.reader(record.read_text().splitlines()):
            path = Path(os.path.normpath(site_packages / name))
            lines += 1
            if path.name == "__pycache__" or path.suffix == ".pyc":
                assert not digest, f"{name} has a hash, and bytecode may be made anew"
                continue
            if not path.is_file():
                wrong.append(f"{record.parent.name}: {name} is missing")
                continue
            data = path.read_bytes()
            if digest:
                kind, _, wanted = digest.partition("=")
                found = base64.urlsafe_b64encode(hashlib.new(kind, data).digest())
                if found.rstrip(b"=").decode() != wanted:
                    wrong.append(f"{record.parent.name}: {name} has another hash")
            if size and int(size) != len(data):
                wrong.append(f"{record.parent.name}: {name} has another size")
    assert lines >= 20, f"{lines} lines in the RECORDs of {site_packages}: too few to prove a thing"
    return wrong


def modules_from_source(staged: Staged, *names: str) -> list[str]:
    """Import modules with ``python -v``: the source files below the store that were compiled.

    Raises:
        AssertionError: it does not look as if anything was imported from the store.
    """
    said = staged.run(staged.python, "-v", "-c", f"import {', '.join(names)}").stderr
    loaded = re.findall(r"^# code object from '?(.*?)'?$", said, re.MULTILINE)
    store = f"{staged.prefix.parent}/"
    assert sum(one.startswith(store) and one.endswith(".pyc") for one in loaded) >= len(names), said
    wrong = [one for one in loaded if one.startswith(store) and not one.endswith(".pyc")]
    stale = re.findall(r"^# (?:bytecode is stale for|wrote) (.*)$", said, re.MULTILINE)
    return wrong + [one for one in stale if store in one]


def entry_points(staged: Staged) -> Iterator[Path]:
    """The programs in ``bin`` that are not interpreters or meant to be sourced."""
    for path in sorted(staged.bin.iterdir()):
        if not re.match(r"(python|pip|[Aa]ctivate|deactivate|pydoc)", path.name):
            yield path


def shell_words(*words: str | Path) -> str:
    """A command line for a POSIX shell."""
    return shlex.join(str(word) for word in words)
