"""Every kind of venv, staged in every way, works with its original gone and never looks for it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import workbench
from environments import strace_files
from workbench import KINDS, Staged

WAYS = ("mounted", "extracted", "archive", "elsewhere")
MODULES = ("requests", "six", "urllib3", "charset_normalizer", "idna", "certifi", "stager_sample")

# Environments whose own pip the fixtures keep.
WITH_PIP = ("venv", "virtualenv")


@pytest.fixture
def one(request: pytest.FixtureRequest, staged: Callable[[str, str], Staged]) -> Staged:
    kind, way = request.param
    result = staged(kind, way)
    assert result.how == ("mounted" if way == "mounted" else "extracted")
    return result


EVERY = pytest.mark.parametrize(
    "one", [(kind, way) for kind in KINDS for way in WAYS], indirect=True, ids="-".join
)
# What takes longer, and does not depend on how the same bytes came into the store.
MOUNTED = pytest.mark.parametrize(
    "one", [(kind, "mounted") for kind in KINDS], indirect=True, ids="-".join
)
REWRITTEN = pytest.mark.parametrize(
    "one",
    [(kind, way) for kind in KINDS for way in ("mounted", "elsewhere")],
    indirect=True,
    ids="-".join,
)


@EVERY
def test_imports(one: Staged) -> None:
    """Compiled modules of the standard library, installed packages, package data."""
    code = (
        f"import ssl, sqlite3, ctypes, json, {', '.join(MODULES)}; "
        "print(requests.__file__, ssl.__file__)"
    )
    requests, ssl = one.run(one.python, "-c", code).stdout.split()
    assert requests == f"{one.site_packages}/requests/__init__.py"
    if len(one.trees) > 1:
        assert ssl.startswith(f"{one.trees[0]}/lib/")


@EVERY
def test_python_knows_where_it_is(one: Staged) -> None:
    said = one.run(
        one.python, "-c", "import sys; print(sys.prefix, sys.base_prefix, sys.executable)"
    ).stdout.strip()
    base = "/usr" if len(one.trees) == 1 else str(one.trees[0])
    assert said == f"{one.prefix} {base} {one.python}"
    # ... also where it is started from makes no difference.
    said = one.run("./bin/python", "-c", "import sys; print(sys.prefix)", cwd=one.prefix).stdout
    assert said.strip() == str(one.prefix)


@EVERY
def test_console_scripts_run_without_activation(one: Staged) -> None:
    for name in ("sample-console", "sample-script"):
        assert one.run(one.bin / name).stdout == f"hello {one.prefix}\n"
    assert one.run(one.bin / "normalizer", "--version").stdout.startswith("Charset-Normalizer")


@EVERY
def test_data_files_are_where_sysconfig_says(one: Staged) -> None:
    assert (
        one.eval(
            "open(sysconfig.get_path('data') + '/share/stager-sample/sample.conf').read()",
            "sysconfig",
        )
        == "key = value\n"
    )


@MOUNTED
def test_pip_finds_what_is_installed(one: Staged, request: pytest.FixtureRequest) -> None:
    kind = request.node.callspec.params["one"][0]
    if kind in WITH_PIP:
        pip = [one.bin / "pip", "--disable-pip-version-check"]
    else:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", one.python]
    listed = one.run(*pip, "list", "--format=freeze").stdout.split()
    names = {line.partition("==")[0] for line in listed}
    assert {"requests", "six", "certifi", "idna", "urllib3", "stager-sample"} <= names
    assert "No broken requirements found." in one.run(*pip, "check").stdout


@EVERY
def test_nothing_is_compiled(one: Staged) -> None:
    assert workbench.modules_from_source(one, *MODULES) == []


@EVERY
def test_no_trace_of_the_original(one: Staged) -> None:
    old = {*one.hide, one.manifest["origin"], *one.manifest["spellings"]}
    if one.prefix != Path(one.manifest["layers"][-1]["destination"]):
        # Staged elsewhere than it was packed for: nothing names that place either.
        old.update(layer["destination"] for layer in one.manifest["layers"])
    assert workbench.traces(one, old) == {}


@EVERY
def test_links_are_relative_or_lead_to_the_node(one: Staged) -> None:
    assert workbench.links_out(one) == {}


@EVERY
def test_records_are_right(one: Staged) -> None:
    assert workbench.broken_records(one.site_packages) == []


@REWRITTEN
def test_the_original_is_not_even_looked_for(one: Staged) -> None:
    """With the original in its place, so that whoever asks for it finds it."""
    for argv in (
        [one.python, "-c", f"import ssl, sqlite3, ctypes, {', '.join(MODULES)}"],
        [one.bin / "sample-console"],
    ):
        asked = strace_files(argv)
        assert any(path.startswith(f"{one.prefix}/") for path in asked)
        origins = tuple(f"{path}/" for path in one.hide)
        assert [path for path in asked if f"{path}/".startswith(origins)] == []
