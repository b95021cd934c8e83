"""Several environments together, and names that tools keep: what is decided off a node."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import tiny
from stager import activate, jobstate, lookup, ref, together
from stager.activate import Part
from stager.environments import kept
from stager.envpatch import EnvPatch
from stager.errors import JOB, IncompatibleError, StagerError, UsageError
from stager.hooks import forjob, jobactivation
from stager.manifest import Manifest, Python
from stager.ref import Ref
from stager.staging import stage

pytestmark = pytest.mark.unit

VENV = {"set": {"VIRTUAL_ENV": "{prefix}"}, "unset": [], "prepend": {"PATH": ["{prefix}/bin"]}}


def manifest(name: str, **changes: Any) -> Manifest:
    return tiny.described(name=name, origin=f"/o/{name}")._replace(**changes)


def part(name: str, **changes: Any) -> Part:
    return Part(manifest(name, **{"activation": VENV, **changes}), (f"/s/envs/{name}",))


# -- together


def test_the_first_is_the_base_and_the_last_comes_first() -> None:
    parts = [part("base"), part("one"), part("two")]
    patch = activate.together(parts)
    library = parts[0].manifest.library
    assert patch.set == {"VIRTUAL_ENV": "/s/envs/base"}
    assert patch.prepend == {
        "PATH": ("/s/envs/base/bin", "/s/envs/one/bin", "/s/envs/two/bin"),
        "PYTHONPATH": tuple(f"/s/envs/{name}/{library}/site-packages" for name in ("two", "one")),
    }
    assert activate.together(parts[:1]).prepend == {"PATH": ("/s/envs/base/bin",)}


def test_a_tree_adds_the_directories_it_is_searched_by() -> None:
    layers = (tiny.layer(1), tiny.layer(2))
    prepend = {"PATH": ["{prefix}/bin"], "PYTHONPATH": ["{layer1}", "{layer0}/lib"]}
    activation = {"set": {}, "unset": [], "prepend": prepend}
    value = manifest("tree", kind="tree", layers=layers, activation=activation)
    patch = activate.together([part("base"), Part(value, ("/s/envs/low", "/s/envs/up"))])
    assert patch.prepend["PYTHONPATH"] == ("/s/envs/up", "/s/envs/low/lib")
    # As the base, it keeps its own order behind what is added.
    patch = activate.together([Part(value, ("/s/envs/low", "/s/envs/up")), part("one")])
    site = f"/s/envs/one/{value.library}/site-packages"
    assert patch.prepend["PYTHONPATH"] == (site, "/s/envs/up", "/s/envs/low/lib")


@pytest.mark.parametrize("change", [("3.8.1", "cpython-38"), ("3.9.1", "pypy39")])
def test_other_pythons_are_refused(change: tuple[str, str]) -> None:
    version, tag = change
    other = manifest("other", python=Python("bin/python", version, tag, "/usr/bin/python3"))
    base = manifest("base", python=Python("bin/python", "3.9.2", "cpython-39", "/usr/bin/python3"))
    with pytest.raises(IncompatibleError, match=r"`base` is for Python 3\.9\.2, `other` for"):
        together.require([base, base, other])
    together.require([base, base])


def test_what_two_have_and_is_not_the_same(tmp_path: Path) -> None:
    def tree(name: str, files: dict[str, str]) -> Part:
        site = tmp_path / name / tiny.SITE
        for path, text in files.items():
            (site / path).parent.mkdir(parents=True, exist_ok=True)
            (site / path).write_text(text)
        python = tiny.described().python._replace(version=_version())
        names = {path.partition("/")[0].partition(".")[0] for path in files}
        modules = tuple(sorted(one for one in names if one.isidentifier()))
        value = manifest(name, python=python, modules=modules)
        return Part(value, (str(tmp_path / name),))

    same = {"same.py": "x = 1", "Six-1.0.dist-info/METADATA": "", "six.py": "x = 1"}
    one = tree("one", {**same, "mine.py": "1", "pkg/__init__.py": "1", "np-1.0.dist-info/R": ""})
    two = tree("two", {**same, "mine.py": "2", "pkg/__init__.py": "2", "np-2.0.dist-info/R": ""})
    (said,) = together.conflicts([one, two])
    assert said == "`one` and `two` both have mine, np (1.0, 2.0), pkg: those of `two` are used"
    assert list(together.conflicts([one, one])) == []


def _version() -> str:
    return tiny.BASE_PYTHON.name.removeprefix("python") + ".0"


def test_a_job_of_several(public_path: Path) -> None:
    """What the hooks' worker tells for a directive of two, without a node's Slurm."""
    config = tiny.configured(public_path)
    everything = []
    for name in ("one", "two"):
        environment = tiny.environment(public_path / name, {f"{tiny.SITE}/of_{name}.py": ""})
        published = tiny.packed(environment, config)
        result = stage.stage(published, tiny.store(config), config, holder="process.1.1")
        everything.append((published, result))
    (_, one), (_, two) = everything
    directive = ref.parse_directive("one+two?verbose")
    parts = [Part.staged(result) for _, result in everything]
    described = jobactivation.of_staged(directive, parts, config)
    assert described.warning == ""
    value = described.value
    assert value["prefix"] == one.prefix
    assert value["python"] == f"{one.prefix}/bin/python"
    assert value["set"]["VIRTUAL_ENV"] == one.prefix
    assert value["set"]["STAGER_ACTIVE"] == "one+two"
    assert value["prepend"]["PATH"] == [f"{one.prefix}/bin", f"{two.prefix}/bin"]
    assert value["prepend"]["PYTHONPATH"] == [f"{two.prefix}/{tiny.SITE}"]
    assert {f"{public_path}/one", f"{public_path}/two"} <= set(value["leave"])
    found, results = zip(*everything)
    said = forjob._outcome(value, directive, list(found), list(results))
    assert said["ref"] == "+".join(published.ref for published in found)
    assert (said["staged"], said["verbose"]) == (value, True)


def test_what_a_job_has_no_place_for_is_left_out_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """``conda env config vars`` take anything; a job's state has a line for each variable."""
    odd = {"LINES": "a\nb", "LONG": "x" * 5000, "a-b": "1", "FINE": "1"}
    monkeypatch.setattr(activate, "patch", lambda *_, **__: EnvPatch(set=odd))
    directive = ref.parse_directive("base")
    config = tiny.configured(Path("/x"))
    described = jobactivation.of_staged(directive, [part("base")], config)
    assert described.value["set"] == {"FINE": "1"}
    assert described.warning.startswith("'LINES', 'LONG', 'a-b' not set: ")
    jobstate.Activation.checked(described.value)
    many = {f"V{number}": "1" for number in range(201)}
    monkeypatch.setattr(activate, "patch", lambda *_, **__: EnvPatch(set=many))
    with pytest.raises(StagerError, match="more than 200 variables") as raised:
        jobactivation.of_staged(directive, [part("base")], config)
    assert raised.value.blame == JOB


def test_modules_that_pth_files_of_another_one_add(tmp_path: Path) -> None:
    value = manifest("one")
    site = tmp_path / value.library / "site-packages"
    for name in ("source", "marked"):
        (site / name).mkdir(parents=True)
    (site / "a.pth").write_text("# source\nimport os; os.sep\nsource\nmissing\n\n.\n")
    (site / "b.pth").write_text("\ufeffmarked\n")
    patch = activate.together([part("base"), Part(value, (str(tmp_path),))])
    assert patch.prepend["PYTHONPATH"] == (str(site), f"{site}/source", f"{site}/marked")


# -- what the user typed


def test_refs_that_are_added(tmp_path: Path) -> None:
    assert lookup.parse("a+b") == (Ref(name="a"), Ref(name="b"))
    assert lookup.parse("/x/y+b") == (Ref(path="/x/y"), Ref(name="b"))
    (tmp_path / "with+plus").mkdir()
    path = f"{tmp_path}/with+plus"
    assert lookup.parse(path) == (Ref(path=path),)
    for text in ("a+", "+a", "a++b"):
        with pytest.raises(UsageError):
            lookup.parse(text)


def test_layers_in_an_activation() -> None:
    patch = EnvPatch({"A": "{layer0}/x:{prefix}"}, (), {"P": ("{layer1}", "{layer9}", "{else}")})
    assert patch.at("/low", "/{layer0}") == EnvPatch(
        {"A": "/low/x:/{layer0}"}, (), {"P": ("/{layer0}", "{layer9}", "{else}")}
    )


# -- names


def keep(path: Path, *, conda: bool = False, text: str = "") -> str:
    directory = path / "conda-meta" if conda else path
    directory.mkdir(parents=True)
    (directory / ("history" if conda else "pyvenv.cfg")).write_text(text)
    return str(path)


def test_where_tools_keep_environments(tmp_path: Path) -> None:
    home, cwd = tmp_path / "home", tmp_path / "project"
    expected = {
        "in-path": keep(tmp_path / "p" / "in-path", conda=True),
        "in-dirs": keep(tmp_path / "d" / "in-dirs", conda=True),
        "listed": keep(tmp_path / "far" / "listed", conda=True),
        "worked-on": keep(tmp_path / "w" / "worked-on"),
        "wrapped": keep(home / ".virtualenvs" / "wrapped"),
        "lint": keep(cwd / ".pixi" / "envs" / "lint", conda=True),
        "project": keep(cwd / ".venv", text="prompt = 'shown'\n"),
    }
    (home / ".conda").mkdir()
    (home / ".conda" / "environments.txt").write_text(f"\n/gone/gone\n{expected['listed']}/\n")
    environ = {
        "HOME": str(home),
        "CONDA_ENVS_PATH": f"{tmp_path}/nothing:{tmp_path}/p:relative",
        "CONDA_ENVS_DIRS": f"{tmp_path}/d",
        "WORKON_HOME": f"{tmp_path}/w",
    }
    for name, path in expected.items():
        assert kept.named(name, environ, str(cwd)) == path
    assert kept.named("shown", environ, str(cwd)) == expected["project"]
    for name in ("gone", "far", "unknown"):
        assert kept.named(name, environ, str(cwd)) is None
    assert kept.named("worked-on", {}, "/") is None


def test_one_environment_in_two_places_is_one(tmp_path: Path) -> None:
    path = keep(tmp_path / "w" / "torch")
    (tmp_path / "c").mkdir()
    os.symlink(path, tmp_path / "c" / "torch")
    environ = {"WORKON_HOME": f"{tmp_path}/w", "CONDA_ENVS_PATH": f"{tmp_path}/c"}
    assert kept.named("torch", environ, "/") == f"{tmp_path}/c/torch"
    other = keep(tmp_path / "project" / ".pixi" / "envs" / "torch", conda=True)
    with pytest.raises(UsageError) as caught:
        kept.named("torch", environ, str(tmp_path / "project"))
    assert f"\n  {tmp_path}/c/torch\n  {other}" in caught.value.message


def test_the_base_of_an_installation(tmp_path: Path) -> None:
    root = keep(tmp_path / "miniforge3", conda=True)
    os.mkdir(f"{root}/condabin")
    (tmp_path / ".conda").mkdir()
    (tmp_path / ".conda" / "environments.txt").write_text(f"{root}\n")
    assert kept.named("base", {"HOME": str(tmp_path)}, "/") == root
    assert kept.named("miniforge3", {"HOME": str(tmp_path)}, "/") == root
