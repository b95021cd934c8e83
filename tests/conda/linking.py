"""Makes an environment, with the interpreter of the tools: channel.py tells of the options."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rattler import Channel, MatchSpec, VirtualPackage, install, solve
from rattler.config import Config

COPY = "allow-hard-links = false\nallow-ref-links = false\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--channel", "--prefix", "--cache"):
        parser.add_argument(name, type=Path, required=True)
    for name in ("--copy", "--pyc", "--pixi"):
        parser.add_argument(name, action="store_true")
    parser.add_argument("--variable", action="append")
    parser.add_argument("specs", nargs="+")
    arguments = parser.parse_args()
    prefix: Path = arguments.prefix
    records = asyncio.run(link(arguments))
    if arguments.pixi:
        # pixi keeps no history, runs no scripts, and leaves a note of its own.
        note = {
            "manifest_path": str(prefix.parents[2] / "pixi.toml"),
            "environment_name": prefix.name,
            "pixi_version": "0.50.0",
            "environment_lock_file_hash": "4f36ee620f10329d",
        }
        (prefix / "conda-meta" / "pixi").write_text(json.dumps(note))
    else:
        (prefix / "CACHEDIR.TAG").unlink(missing_ok=True)  # rattler's
        write_history(prefix, arguments.specs, records)
    if arguments.pyc:
        compile_noarch(prefix)
    if arguments.variable:
        # As `conda env config vars set` does.
        variables = dict(one.split("=", 1) for one in arguments.variable)
        state = {"version": 1, "env_vars": variables}
        (prefix / "conda-meta" / "state").write_text(json.dumps(state))


async def link(arguments: argparse.Namespace) -> list[Any]:
    specs = [MatchSpec(spec) for spec in arguments.specs]
    records = await solve(
        sources=[Channel(arguments.channel.resolve().as_uri())],
        specs=specs,
        platforms=["linux-64", "noarch"],
        virtual_packages=VirtualPackage.detect(),
    )
    await install(
        records,
        target_prefix=arguments.prefix,
        cache_dir=arguments.cache,
        execute_link_scripts=not arguments.pixi,
        requested_specs=[spec._match_spec for spec in specs],  # py-rattler 0.28 takes no MatchSpec
        show_progress=False,
        config=Config.from_toml(COPY if arguments.copy else ""),
    )
    return records


def write_history(prefix: Path, specs: list[str], records: list[Any]) -> None:
    """``conda-meta/history`` with the transaction, as conda writes it; rattler leaves it empty."""
    packages = sorted(
        f"{one.channel}{one.subdir}::{one.name.normalized}-{one.version}-{one.build}"
        for one in records
    )
    lines = [
        f"==> {time.strftime('%Y-%m-%d %H:%M:%S')} <==",
        f"# cmd: /opt/conda/bin/conda create --prefix {prefix} {' '.join(specs)}",
        "# conda version: 24.11.3",
        *(f"+{one}" for one in packages),
        f"# update specs: {json.dumps(specs)}",
    ]
    (prefix / "conda-meta" / "history").write_text("".join(f"{line}\n" for line in lines))


def compile_noarch(prefix: Path) -> None:
    """Compile the noarch packages and add the bytecode to their records, as conda does."""
    records = {path: json.loads(path.read_text()) for path in prefix.glob("conda-meta/*.json")}
    (python,) = (prefix / "bin").glob("python3.[0-9]*[0-9]")
    tag = python.name.replace("python", "cpython-").replace(".", "")
    for path, record in records.items():
        if record.get("noarch") != "python":
            continue
        sources = [Path(name) for name in record["files"] if name.endswith(".py")]
        # The names are relative, in the bytecode as well; what cannot be compiled is left out.
        names = "".join(f"{name}\n" for name in sources)
        argv = [python, "-BI", "-m", "compileall", "-q", "-l", "-i", "-"]
        subprocess.run(argv, cwd=prefix, input=names, text=True, check=False)
        for name in sources:
            compiled = name.parent / "__pycache__" / f"{name.stem}.{tag}.pyc"
            if (prefix / compiled).exists():
                record["files"].append(str(compiled))
                entry = {"_path": str(compiled), "path_type": "pyc_file"}
                record["paths_data"]["paths"].append(entry)
        path.write_text(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # threads of py-rattler may abort the interpreter at its end
