"""What installers and users put into site-packages besides modules: links to elsewhere, mostly."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

import environments
import workbench
from environments import BASE_PYTHON, Environment, run, strace_files
from workbench import Bench

SOURCE = "import pathlib\nWORD = (pathlib.Path(__file__).parent / 'word.txt').read_text()\n"


@pytest.fixture
def environment(bench: Bench) -> Environment:
    return environments.make_venv(bench.root / "origin" / "env")


def project(directory: Path, name: str, *, package: Path, more: str = "") -> Path:
    """A source tree that setuptools can install."""
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(SOURCE)
    (package / "word.txt").write_text(name)
    (directory / "pyproject.toml").write_text(
        "[build-system]\nrequires = ['setuptools']\nbuild-backend = 'setuptools.build_meta'\n"
        f"[project]\nname = '{name}'\nversion = '1'\n{more}"
        "[tool.setuptools.package-data]\n'*' = ['*.txt']\n"
    )
    (directory / ".git").mkdir()
    (directory / ".git" / "large").write_text("not wanted")
    return directory


# Editable installs

MODULES = ("flat", "layered", "strict", "mapped", "mapped_too", "single", "develop", "lines")


@pytest.fixture(scope="module")
def editables(tmp_path_factory: pytest.TempPathFactory) -> tuple[Environment, Path]:
    """An environment with every editable install that pip and setuptools make; their sources."""
    root = tmp_path_factory.mktemp("editables")
    environment = environments.make_venv(root / "origin" / "env")
    environments.pip_install(environment, requirements=["setuptools"])
    src = root / "src"
    scripts = "[project.scripts]\nflat-script = 'flat:main'\n"
    flat = project(src / "flat", "flat", package=src / "flat" / "flat", more=scripts)
    with open(flat / "flat" / "__init__.py", "a") as module:
        module.write("\ndef main():\n    import sys\n    print(WORD, sys.prefix)\n")
    (flat / "tests").mkdir()
    (flat / "tests" / "data.bin").write_text("not a module")
    project(src / "layered", "layered", package=src / "layered" / "src" / "layered")
    project(src / "strict", "strict", package=src / "strict" / "src" / "strict")
    # A mapping of setuptools: the package does not lie where its name says.
    project(
        src / "mapped",
        "mapped",
        package=src / "mapped" / "code",
        more="[tool.setuptools]\npackages = ['mapped', 'mapped_too']\n"
        "[tool.setuptools.package-dir]\nmapped = 'code'\nmapped_too = 'more'\n",
    )
    (src / "mapped" / "more").mkdir()
    (src / "mapped" / "more" / "__init__.py").write_text("WORD = 'more'\n")
    # A single module.
    single = src / "single"
    single.mkdir()
    (single / "single.py").write_text("WORD = 'single'\n")
    (single / "pyproject.toml").write_text(
        "[build-system]\nrequires = ['setuptools']\nbuild-backend = 'setuptools.build_meta'\n"
        "[project]\nname = 'single'\nversion = '1'\n[tool.setuptools]\npy-modules = ['single']\n"
    )
    pip = [sys.executable, "-m", "pip", "--python", environment.python, "--quiet"]
    pip += ["--disable-pip-version-check", "install", "--no-index", "--no-build-isolation"]
    for name in ("flat", "layered", "mapped", "single"):
        run([*pip, "--no-deps", "--editable", src / name])
    run([*pip, "--no-deps", "--config-settings=editable_mode=strict", "--editable", src / "strict"])
    # `setup.py develop` of old: an egg-link, and a line in a .pth file that many share.
    develop = project(src / "develop", "develop", package=src / "develop" / "develop")
    (develop / "develop.egg-info").mkdir()
    (develop / "develop.egg-info" / "PKG-INFO").write_text("Name: develop\nVersion: 1\n")
    site = environment.site_packages
    (site / "develop.egg-link").write_text(f"{develop}\n.")
    (site / "easy-install.pth").write_text(f"{develop}\n")
    (src / "develop" / "tools").mkdir()
    (src / "develop" / "tools" / "run").write_text("import develop; print(develop.WORD, __file__)")
    launcher = environment.bin / "develop-script"
    launcher.write_text(
        f"#!{environment.python}\n# EASY-INSTALL-DEV-SCRIPT: 'develop==1','run'\n"
        f"__file__ = {str(src / 'develop' / 'tools' / 'run')!r}\n"
        "with open(__file__) as f:\n    exec(compile(f.read(), __file__, 'exec'))\n"
    )
    launcher.chmod(0o755)
    # A path line as hatchling, flit and maturin write it.
    lines = project(src / "lines", "lines", package=src / "lines" / "src" / "lines")
    (site / "_lines.pth").write_text(f"{lines}/src")
    run([environment.python, "-c", f"import {', '.join(MODULES)}"])
    # Not editable, though direct_url.json names a local directory as well.
    local = project(src / "local", "local", package=src / "local" / "local")
    run([*pip, "--no-deps", local])
    return environment, src


@pytest.mark.parametrize("options", [[], ["--format", "tar.zst"]], ids=["squashfs", "tar.zst"])
def test_editables_are_included(
    bench: Bench, editables: tuple[Environment, Path], options: list[str]
) -> None:
    environment, src = editables
    staged = bench.packed_and_staged(environment, *options, hide=[src])
    words = {"mapped_too": "more"}
    for module in (*MODULES, "local"):
        said = staged.eval(f"{module}.WORD, {module}.__file__", module)
        assert said.startswith(f"{words.get(module, module)} {staged.prefix}/"), said
    assert staged.run(staged.bin / "flat-script").stdout == f"flat {staged.prefix}\n"
    said = staged.run(staged.bin / "develop-script").stdout
    assert said.startswith(f"develop {staged.prefix}/") and said.endswith("/run\n")
    assert workbench.modules_from_source(staged, *MODULES) == []
    # Where a package was installed from is a fact about the past, and stays one.
    traces = workbench.traces(staged, [src, environment.prefix])
    assert {Path(path).name for path in traces} == {"direct_url.json"}
    assert workbench.links_out(staged) == {}
    told = {one["path"].rpartition("/")[2] for one in staged.told("editable").values()}
    assert {"develop.egg-link", "_lines.pth"} & told, told
    assert len(staged.told("editable")) >= len(MODULES) - 2
    left_out = {".git", "tests", "large", "data.bin"}
    copied = {path.name for path in (staged.prefix / ".stager").rglob("*")}
    assert copied & left_out == set()
    assert {"word.txt", "single.py"} <= copied
    asked = strace_files([staged.python, "-c", f"import {', '.join(MODULES)}"])
    assert [path for path in asked if f"{path}/".startswith(f"{src}/")] == []


def test_editables_can_be_refused_or_kept(
    bench: Bench, editables: tuple[Environment, Path]
) -> None:
    environment, src = editables
    said = bench.expect(1, "pack", environment.prefix, "--editables", "refuse")
    for name in ("flat", "layered", "strict", "mapped", "single", "develop", "lines"):
        assert f"{src}/{name}" in said
    assert f"{src}/local" not in said
    assert bench.unfinished() == [] and list(bench.store.glob("*")) == []
    bench.pack(environment, "--editables", "keep")
    staged = bench.stage(hide=[environment.prefix])
    assert staged.eval("flat.__file__", "flat").startswith(f"{src}/flat/")
    assert {one["severity"] for one in staged.told("editable").values()} == {"warning"}


def test_metadata_of_editables_moves(bench: Bench, editables: tuple[Environment, Path]) -> None:
    environment, src = editables
    staged = bench.packed_and_staged(environment, hide=[src])
    names = "sorted(d.metadata['Name'] for d in importlib.metadata.distributions())"
    listed = staged.eval(names, "importlib.metadata")
    for name in ("flat", "layered", "strict", "mapped", "single", "local", "develop"):
        assert f"'{name}'" in listed
    assert workbench.broken_records(staged.site_packages) == []


REBUILDING = {
    "meson-python": ("_mesonic_editable_loader.py", "mesonic-editable.pth"),
    "scikit-build-core": ("_skbuild_editable.py", "_skbuild_editable.pth"),
}


@pytest.mark.parametrize("builder", REBUILDING)
def test_editables_that_rebuild_are_refused(
    bench: Bench, environment: Environment, builder: str
) -> None:
    """They need a compiler and a build tree on every import; no copy of them can work."""
    loader, path = REBUILDING[builder]
    (environment.site_packages / loader).write_text("import sys\n")
    (environment.site_packages / path).write_text(f"import {loader.removesuffix('.py')}\n")
    said = bench.expect(1, "pack", environment.prefix)
    assert loader in said and "rebuilds itself" in said
    check = bench.stager("pack", environment.prefix, "--check", check=False)
    assert check.returncode == 1
    assert loader in check.stderr and "would be refused" in check.stderr
    assert not list(bench.root.glob("repository/refs/*"))
    assert bench.pack(environment, "--editables", "keep")["name"] == "it"


def test_links_in_editable_sources(bench: Bench, environment: Environment) -> None:
    """Between its files, to a file elsewhere, and to a directory of data that is not copied."""
    src, data = bench.root / "src", bench.root / "data"
    package = src / "pkg"
    package.mkdir(parents=True)
    data.mkdir()
    (data / "huge").write_text("huge")
    (src / "other").mkdir()
    (src / "other" / "shared.txt").write_text("shared")
    (package / "__init__.py").write_text("from .inner import WORD\n")
    (package / "real.py").write_text("WORD = 'linked'\n")
    (package / "inner.py").symlink_to("real.py")
    (package / "absolute.py").symlink_to(package / "real.py")
    (package / "shared.txt").symlink_to("../other/shared.txt")
    (package / "data").symlink_to(data)
    (environment.site_packages / "pkg.pth").write_text(f"{src}\n")
    bench.pack(environment)
    staged = bench.stage(hide=[environment.prefix, src])
    assert staged.eval("pkg.WORD", "pkg") == "linked"
    assert staged.eval("pkg.absolute.__file__", "pkg.absolute").startswith(str(staged.prefix))
    (copied,) = (staged.prefix / ".stager").rglob("shared.txt")
    assert staged.run("cat", copied).stdout == "shared"
    # What it leads to may be of any size: it stays, and the report says so.
    (link,) = [path for path in staged.told("link") if path.endswith("pkg/data")]
    assert os.readlink(staged.prefix / link) == str(data)


# .pth files


def test_path_lines(bench: Bench, environment: Environment) -> None:
    site, outside = environment.site_packages, bench.root / "outside"
    for name in ("inside_relative", "inside_absolute", "inside_up"):
        (site / f"{name}.d").mkdir()
        (site / f"{name}.d" / f"{name}.py").write_text(f"WORD = '{name}'\n")
    elsewhere = environment.prefix / "lib" / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "higher.py").write_text("WORD = 'higher'\n")
    outside.mkdir()
    (outside / "beyond.py").write_text("WORD = 'beyond'\n")
    up = os.path.relpath(outside, site)
    (site / "a.pth").write_text(
        "# a comment that names " + str(environment.prefix) + "\n"
        "inside_relative.d\n"
        f"{site}/inside_absolute.d\n"
        f"../site-packages/inside_up.d\n"
        "../../elsewhere\n"
        "\n"
        f"{up}\n"
        "no_such_directory\n"
    )
    (site / "b.pth").write_text(
        f"import sys; sys.path.append('{environment.prefix}/lib/by-code'); sys.word = 'code'\n"
    )
    by_code = environment.prefix / "lib" / "by-code"
    by_code.mkdir()
    (by_code / "coded.py").write_text("WORD = 'coded'\n")
    staged = bench.packed_and_staged(environment, hide=[outside])
    modules = ("inside_relative", "inside_absolute", "inside_up", "higher", "beyond", "coded")
    for module in modules:
        word, file = staged.eval(f"{module}.WORD, {module}.__file__", module).split()
        assert word == module
        assert file.startswith(f"{staged.prefix}/")
    assert staged.eval("sys.word") == "code"
    assert workbench.traces(staged, [environment.prefix, outside]) == {}


def test_path_lines_to_what_is_left_out_of_the_base(bench: Bench) -> None:
    """The base's own packages, and those of an environment in its prefix, are no part of it."""
    base = environments.make_base(bench.root / "origin" / "base")
    packages = base.prefix / "lib" / BASE_PYTHON.name / "site-packages"
    packages.mkdir()
    (packages / "based.py").write_text("WORD = 'based'\n")
    other = environments.make_small_venv(base.prefix / "other", python=base.python)
    (other.site_packages / "others.py").write_text("WORD = 'others'\n")
    origin = bench.root / "origin"
    for name, line, word in (("one", packages, "based"), ("two", other.site_packages, "others")):
        environment = environments.make_small_venv(origin / name, python=base.python)
        (environment.site_packages / "a.pth").write_text(f"{line}\n")
        bench.pack(environment, name=name)
        staged = bench.stage(name=name, hide=[origin])
        told, file = staged.eval(f"{word}.WORD, {word}.__file__", word).split()
        assert told == word
        assert file.startswith(f"{staged.prefix}/.stager/")
        assert staged.told("editable")


def test_editable_installs_of_the_base_are_included_with_its_packages(bench: Bench) -> None:
    origin = bench.root / "origin"
    base = environments.make_base(origin / "base")
    packages = base.prefix / "lib" / BASE_PYTHON.name / "site-packages"
    packages.mkdir()
    (packages / "beside.py").write_text("WORD = 'beside'\n")
    source = origin / "src"
    source.mkdir()
    (source / "developed.py").write_text("WORD = 'developed'\n")
    (packages / "a.pth").write_text(f"{source}\n")
    (packages / "_rebuilt_editable_loader.py").touch()
    with_them = environments.make_venv(
        origin / "with", "--system-site-packages", python=base.python
    )
    bench.pack(with_them)
    staged = bench.stage(hide=[origin])
    for word in ("beside", "developed"):
        told, file = staged.eval(f"{word}.WORD, {word}.__file__", word).split()
        assert told == word
        assert file.startswith(f"{staged.trees[0]}/")
    severities = {path: one["severity"] for path, one in staged.told("editable").items()}
    site = f"lib/{BASE_PYTHON.name}/site-packages"
    assert severities == {f"{site}/a.pth": "note", f"{site}/_rebuilt_editable_loader.py": "warning"}
    bench.pack(environments.make_small_venv(origin / "without", python=base.python), name="without")
    assert not bench.stage(name="without").told("editable")


def test_code_in_a_path_file_that_leads_out_is_told(bench: Bench, environment: Environment) -> None:
    outside = bench.root / "outside"
    outside.mkdir()
    named = [outside, f"{outside}/no-such", "/usr/lib", environment.prefix / "lib"]
    lines = [f"import sys; sys.path.append('{one}')\n" for one in named]
    (environment.site_packages / "code.pth").write_text("".join(lines))
    bench.pack(environment)
    (told,) = (
        one for one in bench.json("inspect", "it")["findings"] if one["code"] == "module-path"
    )
    assert told["path"].endswith("/code.pth")
    assert told["reason"] == f"has code that names {outside}, which is not on the node"
    assert told["severity"] == "warning"


# Other files with the prefix in them


def test_rewritten_module_of_equal_length(bench: Bench) -> None:
    """With its time kept and its length the same, old bytecode would be taken for the new."""
    length = len(f"{bench.store}/envs/0123456789abcdef")
    prefix = bench.root / "origin"
    prefix = prefix / ("e" * (length - len(str(prefix)) - 1))
    environment = environments.make_venv(prefix)
    module = environment.site_packages / "where.py"
    module.write_text(f"PREFIX = {str(prefix)!r}\n")
    compiled = run(
        [environment.python, "-c", "import where; print(where.__cached__)"],
        env=environments.clean_environ(PYTHONDONTWRITEBYTECODE=None),
    ).stdout.strip()
    assert Path(compiled).is_file()
    staged = bench.packed_and_staged(environment)
    assert len(str(staged.prefix)) == len(str(prefix))
    assert staged.eval("where.PREFIX", "where") == str(staged.prefix)
    assert workbench.modules_from_source(staged, "where") == []
    assert (staged.site_packages / "where.py").stat().st_size == module.stat().st_size


def test_tracebacks_and_source(bench: Bench, environment: Environment) -> None:
    """The path in bytecode is the new one, also in that which was compiled before the move."""
    site = environment.site_packages
    for name in ("compiled", "fresh"):
        (site / f"{name}.py").write_text("def fails():\n    raise ValueError('here')\n")
    run(
        [environment.python, "-c", "import compiled"],
        env=environments.clean_environ(PYTHONDONTWRITEBYTECODE=None),
    )
    assert list(site.glob("__pycache__/compiled.*.pyc"))
    assert not list(site.glob("__pycache__/fresh.*.pyc"))
    staged = bench.packed_and_staged(environment)
    for name in ("compiled", "fresh"):
        path = staged.site_packages / f"{name}.py"
        failed = staged.run(staged.python, "-c", f"import {name}; {name}.fails()", check=False)
        assert f'File "{path}", line 2, in fails\n    raise ValueError' in failed.stderr
        assert staged.eval(f"inspect.getsourcefile({name}.fails)", f"inspect, {name}") == str(path)
        # The code object itself, which profilers and loggers show, and which nothing corrects.
        (cached,) = (path.parent / "__pycache__").glob(f"{name}.*.pyc")
        code = f"marshal.loads(open({str(cached)!r}, 'rb').read()[16:]).co_filename"
        assert staged.eval(code, "marshal") == str(path)


def test_bytecode_that_is_not_wanted(bench: Bench, environment: Environment) -> None:
    """That of other versions, of missing sources, and stale: none may be there to be used."""
    site = environment.site_packages
    cache = site / "__pycache__"
    cache.mkdir()
    (site / "mod.py").write_text("WORD = 'new'\n")
    (site / "broken.py").write_text("this is not { Python\n")
    tag = environment.eval("sys.implementation.cache_tag")
    (site / "mod.py.old").write_text("WORD = 'old'\n")
    os.utime(site / "mod.py.old", (1_000_000_000, 1_000_000_000))
    run(
        [
            environment.python,
            "-c",
            "import py_compile, sys; py_compile.compile(sys.argv[1], cfile=sys.argv[2])",
            site / "mod.py.old",
            cache / f"mod.{tag}.pyc",
        ]
    )
    for name in ("mod.cpython-27.pyc", f"gone.{tag}.pyc", f"mod.{tag}.opt-1.pyc"):
        (cache / name).write_bytes(b"rubbish")
    # What numba keeps there is no bytecode of Python's.
    (cache / "mod.fast-1.py311.nbi").write_bytes(b"index")
    staged = bench.packed_and_staged(environment)
    assert staged.eval("mod.WORD", "mod") == "new"
    found = {path.name for path in (staged.site_packages / "__pycache__").iterdir()}
    assert found == {f"mod.{tag}.pyc", "mod.fast-1.py311.nbi"}
    assert "left out" in staged.told("bytecode")["."]["reason"]


def test_no_bytecode_option(bench: Bench, environment: Environment) -> None:
    (environment.site_packages / "mod.py").write_text("WORD = 'new'\n")
    staged = bench.packed_and_staged(environment, "--no-bytecode")
    assert staged.eval("mod.WORD", "mod") == "new"
    assert list(staged.site_packages.rglob("mod.*.pyc")) == []


def test_text_of_any_kind(bench: Bench, environment: Environment) -> None:
    """Configuration, JSON, URLs, make files: wherever the prefix is a path of its own."""
    old = str(environment.prefix)
    share = environment.prefix / "share"
    share.mkdir()
    texts = {
        "kernel.json": json.dumps({"argv": [f"{old}/bin/python", "-m", "ipykernel"]}),
        "zlib.pc": f"prefix={old}\nlibdir=${{prefix}}/lib\n",
        "libx.la": f"dependency_libs=' -L{old}/lib -lm'\nlibdir='{old}/lib'\n",
        "config.cmake": f'set(X "{old}/include;{old}/lib")\n',
        "site.cfg": f"[x]\npath: {old}\n",
        "list.txt": f"{old}:{old}/a,{old}/b {old}.",
        "url.txt": f"file://{old}/share",
        "escaped.json": json.dumps(f"{old}/é"),
        "latin.txt": f"{old}/\udce9",
    }
    for name, text in texts.items():
        (share / name).write_bytes(os.fsencode(text))
    neighbours = f"{old}2 {old}-data {old}.bak {old}_x /mnt{old} {old}~ x{old}"
    (share / "neighbours.txt").write_text(neighbours)
    staged = bench.packed_and_staged(environment)
    for name, text in texts.items():
        found = os.fsdecode((staged.prefix / "share" / name).read_bytes())
        assert found == text.replace(old, str(staged.prefix)), name
    # Other directories whose path begins like it are not its own, and are told of.
    assert (staged.prefix / "share" / "neighbours.txt").read_text() == neighbours
    assert "share/neighbours.txt" in staged.told("leftover")


def test_every_spelling_of_the_prefix(bench: Bench) -> None:
    """Made through a link, packed by the real path, and the reverse."""
    real = bench.root / "real"
    real.mkdir()
    link = bench.root / "link"
    link.symlink_to(real)
    environment = environments.make_venv(link / "env")
    (environment.bin / "script").write_text(
        f"#!{environment.python}\nimport sys; print(sys.prefix)"
    )
    (environment.bin / "script").chmod(0o755)
    (environment.prefix / "both.txt").write_text(f"{real}/env {link}/env")
    for path in (real / "env", link / "env"):
        bench.pack(path)
        staged = bench.stage(hide=[real])
        assert staged.run(staged.bin / "script").stdout == f"{staged.prefix}\n"
        assert (staged.prefix / "both.txt").read_text() == f"{staged.prefix} {staged.prefix}"
        # The name the link has is not in what is left when it is packed by the real path: only
        # the environment's own scripts tell of it.
        assert workbench.traces(staged, [f"{real}/env", f"{link}/env"]) == {}


def test_uninstall_in_a_staged_copy(bench: Bench, environment: Environment) -> None:
    """RECORD leads to every file, scripts and data outside of site-packages included."""
    environments.pip_install(environment, requirements=["six"])
    staged = bench.packed_and_staged(environment, how="extract")
    assert (staged.bin / "sample-console").exists()
    assert (staged.prefix / "share/stager-sample/sample.conf").exists()
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", staged.python]
    staged.run(*pip, "uninstall", "--yes", environments.SAMPLE)
    left = [path for path in staged.prefix.rglob("*") if "sample" in path.name]
    assert left == []


# Configurations


def test_system_site_packages(bench: Bench) -> None:
    """The base's packages are imported, so they are part of its layer."""
    base = environments.make_base(bench.root / "origin" / "base")
    (base.site_packages).mkdir(exist_ok=True)
    (base.site_packages / "only_in_base.py").write_text("WORD = 'base'\n")
    (base.site_packages / "in_both.py").write_text("WORD = 'base'\n")
    environment = environments.make_venv(
        bench.root / "origin" / "env", "--system-site-packages", python=base.bin / "python3"
    )
    (environment.site_packages / "in_both.py").write_text("WORD = 'env'\n")
    staged = bench.packed_and_staged(environment, hide=[base.prefix])
    words = staged.eval("only_in_base.WORD, in_both.WORD", "only_in_base, in_both")
    assert words == "base env"
    assert workbench.traces(staged, [environment.prefix, base.prefix]) == {}
    # A venv that does not see them does not carry them.
    without = environments.make_venv(bench.root / "origin" / "plain", python=base.bin / "python3")
    plain = bench.packed_and_staged(without, name="plain", hide=[base.prefix])
    assert list(plain.trees[0].rglob("only_in_base*")) == []


def test_system_site_packages_of_the_node(bench: Bench) -> None:
    """Of a base that stays: what the node's own Python has is what there will be. Told."""
    environment = environments.make_venv(bench.root / "origin" / "env", "--system-site-packages")
    staged = bench.packed_and_staged(environment)
    (told,) = staged.told("system-site").values()
    assert told["severity"] == "warning"
    assert "/usr" in told["reason"]


def test_copied_interpreter_of_a_packed_base(bench: Bench) -> None:
    """``--copies`` beside a base that moves: a copy would not find its library, a link does."""
    base = environments.make_base(bench.root / "origin" / "base")
    environment = environments.make_venv(
        bench.root / "origin" / "env", "--copies", python=base.bin / "python3"
    )
    assert not environment.python.is_symlink()
    staged = bench.packed_and_staged(environment, hide=[base.prefix])
    for name in ("python", "python3", BASE_PYTHON.name):
        link = os.readlink(staged.bin / name)
        assert not link.startswith("/")
        said = staged.run(staged.bin / name, "-c", "import sys, ssl; print(sys.base_prefix)")
        assert said.stdout == f"{staged.trees[0]}\n"


@pytest.mark.parametrize("home", ["relative", "missing"])
def test_odd_configuration(bench: Bench, environment: Environment, home: str) -> None:
    """A relative or missing ``home``, and a command with more than one ``=``."""
    config = environment.prefix / "pyvenv.cfg"
    lines = [
        line for line in config.read_text().splitlines() if not line.startswith(("home", "comm"))
    ]
    if home == "relative":
        lines.insert(0, "home = ../../../../../../../../../../usr/bin")
    lines.append(f"command = /usr/bin/python3 -m venv --prompt=a=b {environment.prefix}")
    lines.append("unknown-key = kept = as it is")
    config.write_text("\n".join(lines) + "\n")
    staged = bench.packed_and_staged(environment)
    for cwd in ("/", staged.prefix, "/proc"):
        said = staged.run(staged.python, "-c", "import sys; print(sys.prefix)", cwd=cwd).stdout
        assert said == f"{staged.prefix}\n"
    written = (staged.prefix / "pyvenv.cfg").read_text()
    assert f"--prompt=a=b {staged.prefix}\n" in written
    assert "unknown-key = kept = as it is\n" in written
    assert ("home = /usr/bin\n" in written) == (home == "relative")
    assert workbench.traces(staged, [environment.prefix]) == {}


def test_namespace_packages_and_empty_directories(bench: Bench, environment: Environment) -> None:
    site = environment.site_packages
    (site / "space" / "inner").mkdir(parents=True)
    (site / "space" / "inner" / "mod.py").write_text("WORD = 'namespace'\n")
    (environment.prefix / "share" / "empty" / "deeper").mkdir(parents=True)
    for options in ([], ["--format", "tar.zst"]):
        staged = bench.packed_and_staged(environment, *options, how="extract")
        assert staged.eval("space.inner.mod.WORD", "space.inner.mod") == "namespace"
        assert list((staged.prefix / "share" / "empty").iterdir()) == [
            staged.prefix / "share" / "empty" / "deeper"
        ]
