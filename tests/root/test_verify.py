"""``stager verify``: it finds what still leads to the original, and believes nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import environments
from environments import VENV, Environment, run
from workbench import NOBODY, Bench, Staged

METHODS = ("strace", "audit hooks")


@pytest.fixture(params=METHODS)
def environ(request: pytest.FixtureRequest, bench: Bench) -> dict[str, str]:
    """With strace to be found, and without."""
    path = "/usr/local/bin:/usr/bin:/bin"
    if request.param == "audit hooks":
        tools = bench.root / "tools"
        tools.mkdir()
        for name in ("sh", "squashfuse_ll", "squashfuse", "fusermount3", "mksquashfs"):
            for directory in path.split(":"):
                if Path(directory, name).exists() and not (tools / name).exists():
                    (tools / name).symlink_to(Path(directory, name))
        path = str(tools)
    return bench.environ(PATH=path)


@pytest.fixture
def method(request: pytest.FixtureRequest) -> str:
    return str(request.node.callspec.params["environ"])


def test_good_environment_passes(
    bench: Bench, venv_on_base: Environment, environ: dict[str, str], method: str
) -> None:
    bench.pack(venv_on_base)
    said = bench.json("verify", "it", env=environ)
    assert said["method"] == method
    assert {"requests", "six", "stager_sample", "urllib3"} <= set(said["modules"])
    assert (said["origin"], said["outside"], said["failed"]) == ([], [], {})
    assert said["paths"] > 100
    text = bench.stager("verify", "it", "--import", "six", env=environ).stderr
    assert f"traced with {method}" in text
    assert list(bench.store.glob("leases/*/pid-*")) == []


def test_where_the_store_cannot_be_made(bench: Bench, venv_uv: Environment) -> None:
    """On a login node: root makes the stores, and only on the nodes that jobs run on."""
    bench.pack(venv_uv)
    stores = bench.root / "stores"
    stores.mkdir()
    run(["chown", "-R", f"{NOBODY}:{NOBODY}", bench.repository, bench.root / "home"])
    nobody = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    environ = bench.environ(STAGER_STORE=str(stores / "theirs"))
    done = bench.stager("verify", "it", env=environ, prefix=nobody)
    assert f"the store {stores}/theirs cannot be made here: unpacking into /" in done.stderr
    assert "stager: imported " in done.stderr
    assert list(stores.iterdir()) == []
    assert list(Path(environ["TMPDIR"]).glob("stager-store-*")) == []


LEAKS = {
    # Nothing in the file names the original, so nothing could be rewritten or reported.
    "data": "import os\nplace = os.sep.join({parts!r})\nopen(place + '/leaked.txt').read()\n",
    "path": "import os, sys\nsys.path[:0] = [os.sep.join({parts!r}) + '/leaked']\nimport inner\n",
    "library": "import os, ctypes\nctypes.CDLL(os.sep.join({parts!r}) + '/leaked.so')\n",
}


@pytest.mark.parametrize("leak", LEAKS)
def test_leak_is_found(bench: Bench, environ: dict[str, str], method: str, leak: str) -> None:
    environment = environments.make_venv(bench.root / "origin" / "env")
    prefix = environment.prefix
    (prefix / "leaked.txt").write_text("")
    (prefix / "leaked").mkdir()
    (prefix / "leaked" / "inner.py").write_text("")
    library = environment.eval("_ssl.__file__", "_ssl")
    (prefix / "leaked.so").write_bytes(Path(library).read_bytes())
    code = LEAKS[leak].format(parts=str(prefix).split("/"))
    (environment.site_packages / "leaky.py").write_text(code)
    (environment.site_packages / "tidy.py").write_text("")
    bench.pack(environment)
    said = bench.expect(12, "verify", "it", env=environ)
    assert f"accessed the original: {prefix}/leaked" in said
    assert f"of the original: {prefix}/leaked" in said
    bench.stager("verify", "it", "--import", "tidy", env=environ)
    done = bench.stager("verify", "it", "--json", env=environ, check=False)
    assert done.returncode == 12 and f'"{prefix}/leaked' in done.stdout


def test_editable_that_was_kept_is_found(bench: Bench, environ: dict[str, str]) -> None:
    """It lies outside of everything: not the original, but not on the node either."""
    environment = environments.make_venv(bench.root / "origin" / "env")
    source = bench.root / "src"
    source.mkdir()
    (source / "kept.py").write_text("")
    (environment.site_packages / "kept.pth").write_text(f"{source}\n")
    bench.pack(environment, "--editables", "keep")
    said = bench.json("verify", "it", "--import", "kept", env=environ)
    assert any(path.startswith(f"{source}/kept") for path in said["outside"])


def test_module_that_does_not_import(bench: Bench, environ: dict[str, str]) -> None:
    environment = environments.make_venv(bench.root / "origin" / "env")
    (environment.site_packages / "broken.py").write_text("import no_such_module\n")
    (environment.site_packages / "leaves.py").write_text("raise SystemExit(7)\n")
    bench.pack(environment)
    said = bench.stager("verify", "it", env=environ).stderr
    assert "cannot be imported (nor from the original): broken: ModuleNotFoundError" in said
    assert "cannot be imported (nor from the original): leaves: SystemExit: 7" in said
    assert bench.json("verify", "it", env=environ)["before"] == ["broken", "leaves"]
    for name in ("broken", "nowhere_to_be_found"):
        bench.expect(1, "verify", "it", "--import", name, env=environ)
    hidden = environment.prefix.rename(bench.root / "hidden")
    said = bench.expect(1, "verify", "it", env=environ)
    assert "2 of " in said and "can they be imported from the original?" in said
    hidden.rename(environment.prefix)


def test_module_that_imports_from_the_original_alone(bench: Bench, environ: dict[str, str]) -> None:
    environment = environments.make_venv(bench.root / "origin" / "env")
    text = "import sys\nassert not sys.prefix.startswith('/'.join(%r))\n"
    where = str(bench.store).split("/")
    (environment.site_packages / "settled.py").write_text(text % where)
    (environment.site_packages / "broken.py").write_text("import no_such_module\n")
    bench.pack(environment)
    said = bench.expect(1, "verify", "it", env=environ)
    assert "cannot be imported: settled: AssertionError" in said
    assert "1 of " in said and "they can be imported from the original" in said


def test_interpreter_that_dies(bench: Bench, environ: dict[str, str]) -> None:
    environment = environments.make_venv(bench.root / "origin" / "env")
    (environment.site_packages / "dies.py").write_text("import os; os.kill(os.getpid(), 11)\n")
    bench.pack(environment)
    bench.expect(1, "verify", "it", env=environ)


def test_other_kinds_pass(staged: Callable[[str, str], Staged]) -> None:
    """Made of links, on another environment, on a base of its own; also rewritten in the store."""
    for kind, way in (("uv-symlink", "mounted"), ("nested", "elsewhere"), ("on-base", "archive")):
        one = staged(kind, way)
        said = one.bench.json("verify", kind)
        assert (said["prefix"], said["origin"], said["failed"]) == (str(one.prefix), [], {})
        assert said["outside"] == []


def test_verify_in_an_activated_shell(staged: Callable[[str, str], Staged]) -> None:
    """Without a name: what is active."""
    one = staged("venv", "mounted")
    stager = VENV / "bin" / "stager"
    code = f'eval "$({stager} activate venv)"; {stager} verify --import six'
    done = run(["sh", "-euc", code], env=one.bench.environ())
    assert str(one.prefix) in done.stderr
