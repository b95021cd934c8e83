"""The environment that every packer gets: what users do to theirs, all in one.

It has a Python outside of ``/usr``, packages, a path line, a kernel specification, and a link by
an absolute path. What a packer may refuse is in environments of its own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import environments
from conda import channel
from conda.fixtures import CondaEnvironment
from environments import BASE_PYTHON, Environment

Make = Callable[[Path, Path], Environment]


def with_venv(prefix: Path, python: Path) -> Environment:
    """``python -m venv`` and pip."""
    environment = environments.make_venv(prefix, python=python)
    environments.pip_install(environment)
    return environment


def with_uv(prefix: Path, python: Path) -> Environment:
    """``uv venv --relocatable`` and ``uv pip install``."""
    environment = environments.make_uv_venv(prefix, "--relocatable", python=python)
    environments.uv_install(environment, "--link-mode=copy", "--compile-bytecode")
    return environment


def base(prefix: Path) -> Environment:
    """A Python of its own, with a package that environments above it may see."""
    made = environments.make_base(prefix)
    module = prefix / "lib" / BASE_PYTHON.name / "site-packages" / "of_the_base.py"
    module.parent.mkdir(exist_ok=True)
    module.write_text("word = 'base'\n")
    return made


def lived_in(environment: Environment) -> None:
    """Do to an environment what users do."""
    prefix, site = environment.prefix, environment.site_packages
    (prefix / "more").mkdir()
    (prefix / "more" / "along.py").write_text("word = 'along'\n")
    (site / "more.pth").write_text(f"{prefix / 'more'}\n")
    kernel = prefix / "share" / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    argv = [str(environment.python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "Python"}))
    (prefix / "share" / "stager-sample" / "link.conf").symlink_to(
        prefix / "share" / "stager-sample" / "sample.conf"
    )
    isolated = prefix / "bin" / "isolated"
    isolated.write_text(f"#!{environment.python} -I\nimport sys\nprint(sys.flags.isolated)\n")
    isolated.chmod(0o755)
    beside = f"{prefix}-2/data"
    (prefix / "share" / "beside.txt").write_text(f"{beside}\n{prefix}/share\n")


def with_editable(environment: Environment, source: Path) -> None:
    """Install a project in a new directory as ``pip install -e`` does."""
    source.mkdir()
    (source / "edited.py").write_text("word = 'edited'\n")
    (environment.site_packages / "__editable__.edited-1.pth").write_text(f"{source}\n")


def with_twins(environment: Environment) -> None:
    """Give two programs to an environment that are hard links of one another."""
    first = environment.bin / "first"
    first.write_text("#!/bin/sh\necho a twin\n")
    first.chmod(0o755)
    os.link(first, environment.bin / "second")


def with_system_site_packages(prefix: Path, python: Path) -> Environment:
    """A venv that sees the packages of its base."""
    return environments.make_venv(prefix, "--system-site-packages", python=python)


EDITED = "share/prefix-text/config.json"


def conda(root: Path, conda_channel: Path) -> CondaEnvironment:
    """A conda environment, with what a user adds: a package of pip's, and an edited file."""
    prefix, cache = root / "conda" / "envs" / "lived-in", root / "conda" / "pkgs"
    packages = ("python", "pip", "cbaked", "prefix-text", "activate-demo", "noarch-demo")
    channel.environment(prefix, *packages, channel=conda_channel, cache=cache, pyc=True)
    edited = prefix / EDITED
    edited.unlink()  # it is a hard link into the cache
    edited.write_text(json.dumps({"mine": str(prefix)}))
    wheel = environments.sample_wheel(root / "wheels")
    pip = [prefix / "bin" / "pip", "--quiet", "--no-cache-dir", "install"]
    environments.run([*pip, "--no-index", "--no-deps", wheel])
    (prefix / "share" / "mine.txt").write_text(f"{prefix}/share\n")
    return CondaEnvironment(prefix, prefix, cache)
