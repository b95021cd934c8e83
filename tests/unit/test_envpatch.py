"""Changes of the environment, and every shell's way of writing them down."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stager import containers, envpatch
from stager.envpatch import RENDERERS, EnvPatch, changes

pytestmark = pytest.mark.unit

VENV = EnvPatch(
    set={"VIRTUAL_ENV": "{prefix}"},
    unset=("PYTHONHOME",),
    prepend={"PATH": ("{prefix}/bin",)},
)


def test_the_prefix_is_filled_in() -> None:
    assert VENV.at("/s/e") == EnvPatch(
        {"VIRTUAL_ENV": "/s/e"}, ("PYTHONHOME",), {"PATH": ("/s/e/bin",)}
    )


def test_a_patch_survives_json() -> None:
    assert EnvPatch.from_json(json.loads(json.dumps(VENV.to_json()))) == VENV
    assert EnvPatch.from_json({}) == EnvPatch()


def test_activation_of_a_plain_environment() -> None:
    before = {"PATH": "/usr/bin:/bin", "HOME": "/h", "PYTHONHOME": "/x"}
    after = VENV.at("/s/e").apply(before)
    assert after == {"PATH": "/s/e/bin:/usr/bin:/bin", "HOME": "/h", "VIRTUAL_ENV": "/s/e"}
    assert before["PYTHONHOME"] == "/x"  # what is given is not changed


def test_activation_without_a_path() -> None:
    assert VENV.at("/s/e").apply({})["PATH"] == "/s/e/bin"


def test_containers_are_reached_and_keep_what_is_bound() -> None:
    patch = containers.reached(VENV.at("/s/envs/e"), ["/s/envs/b", "/s/envs/e"])
    after = patch.apply({"PATH": "/bin", "APPTAINER_BIND": "/a:/b:ro,/c", "SINGULARITY_BIND": "/d"})
    assert after["APPTAINER_BIND"] == "/s/envs/b,/s/envs/e,/a:/b:ro,/c"
    assert after["SINGULARITY_BIND"] == "/s/envs/b,/s/envs/e,/d"
    for program in ("APPTAINER", "SINGULARITY"):
        assert after[f"{program}ENV_PREPEND_PATH"] == "/s/envs/e/bin"
        assert after[f"{program}ENV_VIRTUAL_ENV"] == "/s/envs/e"
    assert patch.apply(after) == after


def test_what_is_for_singularity_alone_is_for_apptainer_too() -> None:
    """It reads the other's variable only where its own is not there, and now it is."""
    patch = containers.reached(VENV.at("/s/envs/e"), ["/s/envs/e"])
    after = patch.apply({"SINGULARITY_BIND": "/d", "SINGULARITYENV_PREPEND_PATH": "/x"})
    assert after["APPTAINER_BIND"] == after["SINGULARITY_BIND"] == "/s/envs/e,/d"
    assert after["APPTAINERENV_PREPEND_PATH"] == "/s/envs/e/bin:/x"


def test_another_activation_takes_back_what_containers_had() -> None:
    first = containers.reached(VENV.at("/s/envs/1"), ["/s/envs/0", "/s/envs/1"])
    before = {"PATH": "/bin", "APPTAINER_BIND": "/data"}
    during = first.apply({**before, "SINGULARITYENV_X": "x"}) | {"STAGER_PREFIX": "/s/envs/1"}
    during["APPTAINERENV_CONDA_PREFIX"] = "/opt/conda"
    second = containers.reached(VENV.at("/s/envs/2"), ["/s/envs/2"])
    after = second.apply(during)
    assert after["APPTAINER_BIND"] == "/s/envs/2,/data"
    assert after["APPTAINERENV_PREPEND_PATH"] == "/s/envs/2/bin"
    assert "APPTAINERENV_CONDA_PREFIX" not in after
    without = EnvPatch().apply(during)
    assert without["APPTAINER_BIND"] == "/data"
    assert without["SINGULARITYENV_X"] == "x"
    assert [name for name, value in without.items() if "/s/" in value] == ["STAGER_PREFIX"]


def test_activating_twice_is_activating_once() -> None:
    once = VENV.at("/s/e").apply({"PATH": "/usr/bin"}, {"/h/env": "/s/e"})
    assert VENV.at("/s/e").apply(once, {"/h/env": "/s/e"}) == once


def test_the_original_that_is_active_leaves_everything() -> None:
    before = {
        "PATH": "/h/env/bin:/h/env2/bin:/usr/bin:/h/env:/mnt/h/env/bin",
        "VIRTUAL_ENV": "/h/env",
        "VIRTUAL_ENV_PROMPT": "env",
        "LD_LIBRARY_PATH": "/h/env/lib:/h/env2/lib::/opt/lib",
        "PYTHONPATH": "/h/env/src:/shared/x",
        "MANPATH": "/h/env/share/man:",
        "SSL_CERT_FILE": "/h/env/lib/cacert.pem",
        "REQUESTS_CA_BUNDLE": "/h/env2/cacert.pem",
    }
    assert VENV.at("/s/e").apply(before, {"/h/env": "/s/e"}) == {
        "PATH": "/s/e/bin:/h/env2/bin:/usr/bin:/mnt/h/env/bin",
        "VIRTUAL_ENV": "/s/e",
        "LD_LIBRARY_PATH": "/s/e/lib:/h/env2/lib::/opt/lib",
        "PYTHONPATH": "/s/e/src:/shared/x",
        "MANPATH": "/s/e/share/man:",
        "SSL_CERT_FILE": "/s/e/lib/cacert.pem",
        "REQUESTS_CA_BUNDLE": "/h/env2/cacert.pem",
    }


@pytest.mark.parametrize(
    "name",
    [
        *("LD_LIBRARY_PATH", "PKG_CONFIG_PATH", "CMAKE_PREFIX_PATH", "CPATH", "C_INCLUDE_PATH"),
        *("CPLUS_INCLUDE_PATH", "LIBRARY_PATH"),
    ],
)
def test_where_a_compiler_looks_follows(name: str) -> None:
    after = EnvPatch().apply({name: "/mine:/h/env/x::/h/env2"}, {"/h/env": "/s/e"})
    assert after == {name: "/mine:/s/e/x::/h/env2"}


def test_another_environment_that_is_active_is_taken_back() -> None:
    before = {
        "PATH": "/conda/envs/a/bin:/conda/condabin:/old/bin:/staged/x/bin:/usr/bin",
        "CONDA_PREFIX": "/conda/envs/a",
        "CONDA_SHLVL": "1",
        "CONDA_PREFIX_1": "/conda",
        "_CE_CONDA": "",
        "CONDA_PKGS_DIRS": "/scratch/pkgs",
        "VIRTUAL_ENV": "/old/",
        "STAGER_PREFIX": "/staged/x",
        "__PYVENV_LAUNCHER__": "/x",
    }
    assert VENV.at("/s/e").apply(before) == {
        "PATH": "/s/e/bin:/conda/condabin:/usr/bin",
        "CONDA_PKGS_DIRS": "/scratch/pkgs",
        "VIRTUAL_ENV": "/s/e",
        "STAGER_PREFIX": "/staged/x",
    }


@pytest.mark.parametrize("value", ["", "relative", "."])
def test_a_strange_activation_does_not_empty_the_path(value: str) -> None:
    after = VENV.at("/s/e").apply({"PATH": "/usr/bin:/bin", "VIRTUAL_ENV": value})
    assert after["PATH"] == "/s/e/bin:/usr/bin:/bin"


def test_changes_between_two_environments() -> None:
    before = {"A": "1", "B": "2", "C": "3", "E": ""}
    assert changes(before, {"A": "1", "B": "x", "D": ""}) == ({"B": "x", "D": ""}, ["C", "E"])


@given(
    st.dictionaries(st.sampled_from("ABCD"), st.text(max_size=3)),
    st.dictionaries(st.sampled_from("ABCD"), st.text(max_size=3)),
)
def test_changes_lead_from_one_to_the_other(before: dict[str, str], after: dict[str, str]) -> None:
    changed, unset = changes(before, after)
    result = {key: value for key, value in {**before, **changed}.items() if key not in unset}
    assert result == after
    assert not set(changed) & set(unset)


# Rendered: what a shell makes of it is what counts

NASTY = {
    "QUOTES": """it's "quoted" and `run` $(run) ${HOME} $HOME""",
    "SLASHES": "back\\slash \\n \\' \\\\ end\\",
    "GLOB": "* ? [a] {a,b} ~ ~root",
    "SIGNS": "! !! !$ ; & | < > ( ) # % ^ = @ -",
    "SPACES": "  two  spaces\tand a tab ",
    "UNICODE": "größe 環境",
    "EMPTY": "",
    "DASH": "-n",
    "PATH": "/a b/bin:/c'd:/usr/bin:/bin",
}
NEWLINE = {"NEWLINE": "one\ntwo\n"}
SHELLS = {
    "sh": ["dash", "-euc"],
    "bash": ["bash", "-euc"],
    "zsh": ["zsh", "-fuc"],
    "csh": ["csh", "-fc"],
    "fish": ["fish", "--no-config", "-c"],
}
# The environment that results, whatever the shell: NUL-separated, by a program.
SHOW = (
    "import os,sys; sys.stdout.buffer.write(b'\\0'.join(k+b'='+v for k,v in os.environb.items()))"
)


def result(shell: str, code: str, before: dict[str, str]) -> dict[str, str]:
    """What the environment is after a shell has run ``eval`` of some code."""
    before = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "HOME": "/", **before}
    show = f"'{sys.executable}' -S -c \"{SHOW}\""
    run = {"csh": "eval $CODE:q", "fish": "printenv CODE | source"}.get(shell, 'eval "$CODE"')
    environ = {**before, "CODE": code}
    done = subprocess.run(
        [*SHELLS[shell], f"{run}; {show}"], env=environ, check=True, capture_output=True
    )
    assert done.stderr == b""
    pairs = (os.fsdecode(item).partition("=") for item in done.stdout.split(b"\0"))
    return {key: text for key, _, text in pairs}


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_gets_every_value_as_it_is(shell: str) -> None:
    values = NASTY if shell == "csh" else {**NASTY, **NEWLINE}  # csh cannot eval a newline
    render = RENDERERS.get(shell, envpatch.render_sh)
    after = result(shell, render(values, ["GONE", "NEVER_WAS"]), {"GONE": "x", "KEPT": "y"})
    assert {key: after.get(key) for key in values} == values
    assert "GONE" not in after
    assert after["KEPT"] == "y"


@pytest.mark.parametrize("shell", SHELLS)
def test_a_variable_whose_name_is_code_is_not_rendered(shell: str) -> None:
    names = ["CONDA_X; echo hacked", "CONDA_$(echo hacked)", "CONDA_Y%%", "CONDA_Z-1", "CONDA_\n"]
    before = {**dict.fromkeys(names, "x"), "CONDA_OK": "x"}
    changed, unset = changes(before, dict.fromkeys(["A;B", "9A", "", "A B"], "v"))
    assert (changed, unset) == ({}, ["CONDA_OK"])
    render = RENDERERS.get(shell, envpatch.render_sh)
    assert "CONDA_OK" not in result(shell, render(changed, unset), {"CONDA_OK": "x"})


@settings(max_examples=25)
@given(
    st.lists(
        st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"])), max_size=30
    )
)
def test_any_value_survives_sh(texts: list[str]) -> None:
    values = {f"V{number}": text for number, text in enumerate(texts)}
    after = result("sh", envpatch.render_sh(values, []), {})
    assert {key: after.get(key) for key in values} == values


def test_bytes_that_are_no_text_survive_sh() -> None:
    text = os.fsdecode(b"/caf\xe9/bin")
    code = envpatch.render_sh({"V": text}, [])
    assert result("sh", code, {})["V"] == text


def test_json_is_an_object_with_null_for_what_goes() -> None:
    text = envpatch.render_json({"A": "x'y"}, ["B"])
    assert json.loads(text) == {"A": "x'y", "B": None}
