"""Scripts and launchers: every way in which a script names its interpreter."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import zipapp
from pathlib import Path

import pytest

import environments
import workbench
from environments import BASE_PYTHON, Environment, run
from workbench import Bench, Staged

SAYS_PREFIX = "import sys; print(sys.prefix)"


def write_script(environment: Environment, name: str, text: str) -> None:
    path = environment.bin / name
    path.write_text(text)
    path.chmod(0o755)


def run_directly(staged: Staged, name: str, *arguments: str) -> str:
    """Start a script by execve, as ``srun`` does: a shell would run what the kernel refuses."""
    starter = "import os, sys; os.execv(sys.argv[1], sys.argv[1:])"
    return staged.run(BASE_PYTHON, "-I", "-c", starter, staged.bin / name, *arguments).stdout


@pytest.fixture
def environment(bench: Bench) -> Environment:
    return environments.make_venv(bench.root / "origin" / "env")


DIALECTS = {
    "plain": f"#!{{python}}\n{SAYS_PREFIX}\n",
    "versioned": f"#!{{python}}{BASE_PYTHON.name.removeprefix('python')}\n{SAYS_PREFIX}\n",
    "distlib": f"#!/bin/sh\n'''exec' {{python}} \"$0\" \"$@\"\n' '''\n{SAYS_PREFIX}\n",
    "quoted": f"#!/bin/sh\n'''exec' \"{{python}}\" \"$0\" \"$@\"\n' '''\n{SAYS_PREFIX}\n",
    "conda": f"#!/bin/sh\n'''exec' \"{{python}}\" \"$0\" \"$@\" #'''\n{SAYS_PREFIX}\n",
    "uv": (
        '#!/bin/sh\n\'\'\'exec\' "$(dirname -- "$(realpath -- "$0")")"/\'python\' "$0" "$@"\n'
        f"' '''\n{SAYS_PREFIX}\n"
    ),
    "dirname": ('#!/bin/sh\n"exec" "`dirname $0`/python" "$0" "$@"\n' + SAYS_PREFIX + "\n"),
    "env": f"#!/usr/bin/env -S {{python}} -s\n{SAYS_PREFIX}\n",
    "blank": f"#! {{python}}\n{SAYS_PREFIX}\n",
    "shell": "#!/bin/sh\nexec {python} -c '" + SAYS_PREFIX + "'\n",
    "twice": "#!{python}\nimport sys\nassert sys.executable == '{python}'\nprint('{prefix}')\n",
}


def test_every_dialect(bench: Bench, environment: Environment) -> None:
    for name, text in DIALECTS.items():
        filled = text.replace("{python}", str(environment.python))
        write_script(environment, f"d-{name}", filled.replace("{prefix}", str(environment.prefix)))
        before = run([environment.bin / f"d-{name}"]).stdout
        assert before == f"{environment.prefix}\n", name
    staged = bench.packed_and_staged(environment)
    for name in DIALECTS:
        assert run_directly(staged, f"d-{name}") == f"{staged.prefix}\n", name


def test_options_of_the_interpreter_are_kept(bench: Bench, environment: Environment) -> None:
    flags = "import sys; print(sys.flags.isolated, sys.flags.no_user_site, sys.argv[1:])"
    write_script(environment, "isolated", f"#!{environment.python} -I\n{flags}\n")
    write_script(environment, "two", f"#!{environment.python} -sE\n{flags}\n")
    staged = bench.packed_and_staged(environment)
    assert run_directly(staged, "isolated", "a b", "c") == "1 1 ['a b', 'c']\n"
    assert run_directly(staged, "two") == "0 1 []\n"


def test_future_import_and_docstring_behind_a_trampoline(
    bench: Bench, environment: Environment
) -> None:
    text = (
        f"#!/bin/sh\n'''exec' \"{environment.python}\" \"$0\" \"$@\"\n' '''\n"
        "from __future__ import annotations\nx: nonsense = 1\nprint(repr(__doc__))\n"
    )
    write_script(environment, "documented", text)
    staged = bench.packed_and_staged(environment)
    said = run_directly(staged, "documented")
    assert said.startswith("'exec' ") is False
    assert str(staged.python) in said
    assert (staged.bin / "documented").read_text() == text.replace(
        str(environment.prefix), str(staged.prefix)
    )


def test_other_interpreters(bench: Bench, environment: Environment) -> None:
    """A perl, shell or node in the environment is found by scripts that name it."""
    (environment.bin / "perl").symlink_to("/usr/bin/perl")
    write_script(environment, "pearl", f'#!{environment.bin}/perl -w\nprint "$^X @ARGV\\n";\n')
    write_script(
        environment,
        "python3-config",
        (
            f'#!/bin/sh\nprefix="{environment.prefix}"\nincludes="-I{environment.prefix}/include"\n'
            'echo "$prefix $includes -L${prefix}/lib"\n'
        ),
    )
    staged = bench.packed_and_staged(environment)
    assert run_directly(staged, "pearl", "x") == "/usr/bin/perl x\n"
    assert (staged.bin / "pearl").read_text().startswith(f"#!{staged.bin}/perl -w\n")
    new = staged.prefix
    assert run_directly(staged, "python3-config") == f"{new} -I{new}/include -L{new}/lib\n"


def test_zip_with_an_interpreter_line(bench: Bench, environment: Environment) -> None:
    """zipapp, pex and shiv: a line of text, then a zip, which tolerates what stands before it."""
    source = bench.root / "app"
    source.mkdir()
    (source / "__main__.py").write_text(f"{SAYS_PREFIX}\n")
    zipapp.create_archive(
        source, environment.bin / "app.pyz", interpreter=str(environment.python), compressed=True
    )
    staged = bench.packed_and_staged(environment, hide=[source])
    assert run_directly(staged, "app.pyz") == f"{staged.prefix}\n"
    assert staged.told("leftover") == {}


def test_binary_with_the_prefix_is_told(bench: Bench, environment: Environment) -> None:
    """A longer path does not fit into a compiled program; the report names it."""
    content = b"\x7fELF\x01\0\0" + bytes(environment.bin) + b"/program\0rest"
    (environment.bin / "compiled").write_bytes(content)
    said = bench.pack(environment)
    findings = [one for one in said["findings"] if one["path"] == "bin/compiled"]
    assert [one["code"] for one in findings] == ["leftover"]
    check = bench.json("pack", environment.prefix, "--check")
    assert any(one["path"] == "bin/compiled" for one in check["findings"])
    staged = bench.stage()
    assert (staged.bin / "compiled").read_bytes() == content


@pytest.mark.parametrize("installer", ["pip", "uv"])
def test_prefix_with_spaces_and_quotes(bench: Bench, installer: str) -> None:
    """What pip and uv write then is a trampoline; the name of the store never needs one."""
    prefix = bench.root / "my é env" / "it's \U0001f40d"
    prefix.parent.mkdir()
    if installer == "pip":
        environment = environments.make_venv(prefix)
        environments.pip_install(environment)
    else:
        environment = environments.make_uv_venv(prefix)
        environments.uv_install(environment)
    assert (environment.bin / "sample-console").read_text().startswith("#!/bin/sh\n")
    assert run([environment.bin / "sample-console"]).stdout == f"hello {prefix}\n"
    staged = bench.packed_and_staged(environment)
    for name in ("sample-console", "sample-script"):
        assert run_directly(staged, name) == f"hello {staged.prefix}\n"
    assert workbench.traces(staged, [prefix, prefix.parent]) == {}
    assert workbench.broken_records(staged.site_packages) == []
    said = staged.run("bash", "-euc", f". {staged.bin}/activate; echo $VIRTUAL_ENV").stdout
    assert said == f"{staged.prefix}\n"


def test_longest_store_fits_a_shebang_line(bench: Bench, environment: Environment) -> None:
    """127 bytes are what old kernels read of it; a longer store is refused with the limit."""
    write_script(environment, "plain", f"#!{environment.python}3\n{SAYS_PREFIX}\n")
    room = 78 - len(str(bench.root)) - 1
    bench.settings["STAGER_STORE"] = str(bench.root / ("s" * room))
    staged = bench.packed_and_staged(environment)
    first = (staged.bin / "plain").read_bytes().partition(b"\n")[0]
    assert len(str(staged.prefix)) == 100
    assert len(first) <= 127
    assert run_directly(staged, "plain") == f"{staged.prefix}\n"
    bench.settings["STAGER_STORE"] += "s"
    assert "78 bytes" in bench.expect(2, "pack", environment.prefix)


def test_environment_that_was_moved_by_hand(bench: Bench, environment: Environment) -> None:
    """Its scripts silently use the place it came from, as long as that is there (trap 1)."""
    write_script(environment, "plain", f"#!{environment.python}\n{SAYS_PREFIX}\n")
    copy = bench.root / "copied" / "env"
    subprocess.run(["cp", "-a", environment.prefix, _made(copy.parent)], check=True)
    bench.pack(copy)
    staged = bench.stage(hide=[environment.prefix, copy])
    assert run_directly(staged, "plain") == f"{staged.prefix}\n"
    assert str(environment.prefix) in staged.told("copied")
    assert workbench.traces(staged, [environment.prefix, copy]) == {}


@pytest.mark.parametrize("starter", ["", "/usr/bin/env -S "])
@pytest.mark.parametrize(
    "detour",
    [
        "project/../origin/env/bin/python",
        "origin/env/bin/../bin/python",
        "origin//env/bin/python",
        "link/env/bin/python3.13t",
    ],
)
def test_interpreter_that_is_named_by_a_detour(
    bench: Bench, environment: Environment, detour: str, starter: str
) -> None:
    """``../env/bin/python -m pip install`` writes the path it was called by into scripts."""
    (bench.root / "project").mkdir()
    (bench.root / "link").symlink_to("origin")
    (environment.bin / "python3.13t").symlink_to("python")
    python = f"{bench.root}/{detour}"
    write_script(environment, "plain", f"#!{starter}{python}\n{SAYS_PREFIX}\n")
    named = os.path.dirname(os.path.dirname(python))
    (environment.prefix / "note").write_text(f"{named}/share\n")
    staged = bench.packed_and_staged(environment)
    assert run_directly(staged, "plain") == f"{staged.prefix}\n"
    assert (staged.prefix / "note").read_text() == f"{staged.prefix}/share\n"
    assert staged.told("copied") == staged.told("interpreter") == {}


def test_interpreter_that_cannot_be_followed_is_told(
    bench: Bench, environment: Environment
) -> None:
    """A link to the Python itself, and paths that mean something only to who calls the script."""
    (bench.root / "tools").mkdir()
    (bench.root / "tools" / "python").symlink_to(environment.python)
    link = f"{bench.root}/tools/python"
    lines = {
        "relative": "../env/bin/python",
        "relative-env": "/usr/bin/env -S ./env/bin/python3 -s",
        "link": link,
        "link-env": f"/usr/bin/env {link}",
    }
    known = {"node": "/bin/sh", "found": "/usr/bin/env python", "gone": "/no/bin/python"}
    for name, line in {**lines, **known}.items():
        write_script(environment, name, f"#!{line}\n{SAYS_PREFIX}\n")
    written = (environment.bin / "link").read_text()
    check = bench.json("pack", environment.prefix, "--check")
    staged = bench.packed_and_staged(environment)
    for told in (check["findings"], staged.manifest["findings"]):
        found = {one["path"]: one for one in told if one["code"] == "interpreter"}
        assert sorted(found) == ["bin/link", "bin/relative", "bin/relative-env"]
        assert {one["severity"] for one in found.values()} == {"warning"}
        reason = f"is started by {link}, which is not on the node (and 1 more)"
        assert found["bin/link"]["reason"] == reason
        for name in ("relative", "relative-env"):
            assert "in the directory where it is called" in found[f"bin/{name}"]["reason"]
    assert (staged.bin / "link").read_text() == written


def test_kernels_call_it_by_other_names(bench: Bench, environment: Environment) -> None:
    """``ipykernel install --sys-prefix`` writes whatever path its Python was called by."""
    (bench.root / "link").symlink_to(bench.root / "origin")
    (bench.root / "project").mkdir()
    other = environments.make_venv(bench.root / "origin" / "other")
    called = {
        "link": f"{bench.root}/link/env/bin/python",
        "detour": f"{bench.root}/project/../origin/env/bin/python",
        "other": f"{other.bin}/python",
        "relative": "python",
    }
    kernels = environment.prefix / "share" / "jupyter" / "kernels"
    for name, python in called.items():
        _made(kernels / name)
        (kernels / name / "kernel.json").write_text(json.dumps({"argv": [python, "-m", "x"]}))
    for name, text in (("text", "no JSON"), ("list", "[]"), ("empty", '{"argv": []}')):
        _made(kernels / name)
        (kernels / name / "kernel.json").write_text(text)
    staged = bench.packed_and_staged(environment)
    kernels = staged.prefix / "share" / "jupyter" / "kernels"
    for name, python in called.items():
        expected = f"{staged.prefix}/bin/python" if name in ("link", "detour") else python
        assert json.loads((kernels / name / "kernel.json").read_text())["argv"][0] == expected
    assert staged.told("copied") == {}


def test_scripts_keep_their_modes(bench: Bench, environment: Environment) -> None:
    write_script(environment, "executable", f"#!{environment.python}\n")
    (environment.bin / "plain").write_text(f"#!{environment.python}\n")
    (environment.bin / "private").write_text("secret\n")
    (environment.bin / "private").chmod(0o600)
    staged = bench.packed_and_staged(environment)
    modes = {
        name: stat.S_IMODE((staged.bin / name).stat().st_mode)
        for name in ("executable", "plain", "private")
    }
    assert modes == {"executable": 0o755, "plain": 0o644, "private": 0o644}


def _made(directory: Path) -> Path:
    directory.mkdir(parents=True)
    return directory
