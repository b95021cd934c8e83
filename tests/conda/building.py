"""Builds the channel. Run by the interpreter of the tools: see channel.py.

The packages: each directory of recipes/, one for each wheel, and one of the old kind by hand.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import io
import json
import os
import platform
import shutil
import sys
import tarfile
import time
import zipfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rattler.index import index_fs
from rattler_build import Stage0Recipe, ToolConfiguration

RECIPES = Path(__file__).resolve().parent / "recipes"
FIRST = ("libraries", "python")
"""The packages that others are built with, in their order."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the channel; replaced")
    parser.add_argument("--work", type=Path, required=True, help="where the wheels are")
    arguments = parser.parse_args()
    work: Path = arguments.work
    build, generated, out = work / "build", work / "recipes", arguments.out
    temporary = (build, generated, work / "cache")
    for directory in (*temporary, out):
        shutil.rmtree(directory, ignore_errors=True)
    (build / "linux-64").mkdir(parents=True)
    legacy_package(build / "linux-64")
    os.environ["DEBIAN_PYTHON"] = platform.python_version()  # for recipes/python
    recipes = [RECIPES / name for name in FIRST]
    recipes += sorted(path for path in RECIPES.iterdir() if path not in recipes)
    recipes += [wheel_recipe(wheel, generated) for wheel in sorted((work / "wheels").iterdir())]
    for recipe in recipes:
        Stage0Recipe.from_file(recipe / "recipe.yaml").run_build(
            tool_config=ToolConfiguration(test_strategy="skip"),
            output_dir=build,
            channels=[build.as_uri()],
            package_format="conda:1",
            no_include_recipe=True,
        )
    for path in (*build.glob("*/*.conda"), *build.glob("*/*.tar.bz2")):
        (out / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.move(path, out / path.parent.name)
    asyncio.run(index_fs(out))
    for directory in temporary:
        shutil.rmtree(directory)


def wheel_recipe(wheel: Path, place: Path) -> Path:
    """Write the recipe that makes a package of a wheel, as conda-forge's recipes do.

    Of a wheel that runs everywhere it is a ``noarch: python`` one: without bytecode, and with
    entry points that are made when it is linked.
    """
    with zipfile.ZipFile(wheel) as archive:
        (info,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        found = importlib.metadata.PathDistribution(zipfile.Path(archive, f"{info}/"))
        scripts = [
            f"{one.name} = {one.value}"
            for one in found.entry_points
            if one.group in ("console_scripts", "gui_scripts")
        ]
        requirements = [Requirement(one) for one in found.requires or []]
        name, version = canonicalize_name(found.metadata["Name"]), found.version
    required = [
        canonicalize_name(one.name)
        for one in requirements
        if one.marker is None or one.marker.evaluate({"extra": ""})
    ]
    anywhere = wheel.name.endswith("-none-any.whl")
    install = (
        f"{sys.executable} -m pip install --quiet --no-index --prefix $PREFIX --ignore-installed"
    )
    install += " --no-deps --no-cache-dir --root-user-action=ignore"
    install += f" {'--no-compile' if anywhere else '--compile'} {wheel}"
    site_packages = f"$PREFIX/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    recipe = {
        "package": {"name": name, "version": version},
        "build": {
            "number": 0,
            **({"noarch": "python"} if anywhere else {}),
            "python": {"entry_points": scripts},
            "dynamic_linking": {"binary_relocation": False},
            "script": [install, f"echo conda > {site_packages}/{info}/INSTALLER"],
        },
        "requirements": {"host": [] if anywhere else ["python"], "run": ["python", *required]},
        "about": {"summary": f"{name} from its wheel"},
    }
    directory = place / name
    directory.mkdir(parents=True)
    (directory / "recipe.yaml").write_text(json.dumps(recipe, indent=2))  # JSON is YAML
    return directory


def legacy_package(place: Path) -> None:
    """Write a package of the kind there was before ``info/paths.json``.

    ``info/has_prefix`` tells of the placeholder, which has 32 characters. A line with nothing but
    a path means the same, in text. It also has a libtool file: rattler-build drops those.
    """
    placeholder = "/opt/anaconda1anaconda2anaconda3"
    files = {
        "lib/liblegacy.la": "# liblegacy.la - a libtool library file\n"
        f"dlname='liblegacy.so.1'\nlibdir='{placeholder}/lib'\ninstalled=yes\n"
        f"dependency_libs=' -L{placeholder}/lib {placeholder}/lib/libz.la'\n",
        "bin/legacy-config": f"#!/bin/sh\nprefix={placeholder}\necho $prefix/lib\n",
        "share/legacy-demo/plain.txt": "no prefix\n",
    }
    index = {
        "name": "legacy-demo",
        "version": "1.0",
        "build": "0",
        "build_number": 0,
        "depends": [],
        "subdir": "linux-64",
    }
    files = {
        "info/index.json": json.dumps(index),
        "info/files": "".join(f"{name}\n" for name in files),
        "info/has_prefix": f"{placeholder} text lib/liblegacy.la\nbin/legacy-config\n",
        **files,
    }
    with tarfile.open(place / "legacy-demo-1.0-0.tar.bz2", "w:bz2") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(text), int(time.time())
            member.mode = 0o755 if name.startswith("bin/") else 0o644
            archive.addfile(member, io.BytesIO(text.encode()))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # threads of py-rattler may abort the interpreter at its end
