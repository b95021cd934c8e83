"""A staged environment inside of a container.

Apptainer is in no registry that a test could use, so :data:`STAND_IN` does what its documentation
says of the parts that matter here: a root directory of its own with the home directory in it,
``*_BIND``, ``*ENV_*``, ``*ENV_PREPEND_PATH`` and ``--cleanenv``. Its "image" is the node's system
without the paths that the image file lists.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from environments import BASE_PYTHON, VENV, Environment, make_small_venv, run_hidden
from workbench import Bench, Staged, shell_words

pytestmark = pytest.mark.environments

STAGE_RUN = VENV / "bin" / "stage-run"

STAND_IN = r"""#!%(python)s -IS
import os, sys

own = os.path.basename(sys.argv[0]).upper()
families = ["APPTAINER", "SINGULARITY"] if own == "APPTAINER" else ["SINGULARITY"]
arguments = sys.argv[1:]
assert arguments.pop(0) == "exec"
clean = arguments[0] == "--cleanenv"
image, *command = arguments[clean:]

inside, given = {}, {}
for name, value in os.environ.items():
    if not clean and name not in ("PATH", "LD_LIBRARY_PATH", "HOME"):
        if not name.startswith(("APPTAINER", "SINGULARITY")):
            inside[name] = value
for family in reversed(families):  # the program's own come last
    prefix = family + "ENV_"
    given.update({k[len(prefix):]: v for k, v in os.environ.items() if k.startswith(prefix)})
path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
first = given.pop("PREPEND_PATH", "")
inside.update(given, HOME=os.environ["HOME"], PATH=first + ":" + path if first else path)
binds = next((os.environ[f + "_BIND"] for f in families if f + "_BIND" in os.environ), "")

script = r'''
root=$1 image=$2 home=$3
shift 3
mount -t tmpfs container "$root"
for one in usr bin sbin lib lib64 etc proc dev; do
    if [ -h "/$one" ]; then
        cp -P "/$one" "$root/$one"
    else
        mkdir "$root/$one"
        mount --rbind "/$one" "$root/$one"
    fi
done
mkdir -p "$root$home"
mount --rbind "$home" "$root$home"
while [ "$1" != -- ]; do
    [ -e "$1" ] || { echo "FATAL: mount source $1 does not exist" >&2; exit 255; }
    mkdir -p "$root$2"
    mount --rbind "$1" "$root$2"
    shift 2
done
shift
while read -r lacking; do
    if [ -d "$root$lacking" ]; then
        mount -t tmpfs container "$root$lacking"
    else
        mount --bind /dev/null "$root$lacking"
    fi
done <"$image"
exec chroot "$root" env -i "$@"
'''
pairs = []
for item in filter(None, binds.split(",")):
    source, *rest = item.split(":")
    pairs += [source, rest[0] if rest else source]
unshare = ["unshare", "--mount", "--propagation", "private"]
unshare += [] if os.geteuid() == 0 else ["--map-root-user"]
root = os.path.join(os.path.dirname(os.path.abspath(sys.argv[0])), "root")
variables = [k + "=" + v for k, v in inside.items()]
os.execvp(unshare[0], [*unshare, "sh", "-euc", script, "sh", root, image, os.environ["HOME"]]
          + pairs + ["--"] + variables + command)
"""


@pytest.fixture
def programs(new_directory: Callable[[], Path]) -> Path:
    """The stand-ins; and ``same.sif``, an image with the node's Python, and ``other.sif``."""
    directory = new_directory()
    (directory / "root").mkdir()
    for name in ("apptainer", "singularity"):
        (directory / name).write_text(STAND_IN % {"python": BASE_PYTHON})
        (directory / name).chmod(0o755)
    library = BASE_PYTHON.parent.parent / "lib" / BASE_PYTHON.name
    (directory / "same.sif").write_text("")
    (directory / "other.sif").write_text(f"{BASE_PYTHON.resolve()}\n{library}\n")
    return directory


SHOW = """
import os, sys, six
print(sys.prefix, os.environ["VIRTUAL_ENV"], six.__file__)
print(os.environ["PATH"])
print(sys.flags.no_user_site, os.path.exists(os.path.expanduser("~/.local")))
print(os.listdir("/data"))
"""


def in_container(
    one: Staged, programs: Path, program: str, options: Sequence[str], *, image: str = "other.sif"
) -> list[str]:
    return [str(programs / program), "exec", *options, str(programs / image), "python", "-c", SHOW]


def environ(one: Staged, **variables: str) -> dict[str, str]:
    """With a package in ``~/.local`` that must not be imported, and something bound already."""
    home = one.bench.root / "home"
    version = BASE_PYTHON.name
    local = home / ".local" / "lib" / version / "site-packages"
    local.mkdir(parents=True, exist_ok=True)
    (local / "six.py").write_text("raise SystemExit('the wrong six')\n")
    data = one.bench.root / "data"
    data.mkdir(exist_ok=True)
    (data / "mine").touch()
    return one.bench.environ(**variables)


def judge(one: Staged, said: str) -> None:
    where, path, flags, data = said.splitlines()
    assert where.split() == [str(one.prefix)] * 2 + [f"{one.site_packages}/six.py"]
    assert path.split(":")[0] == str(one.bin)
    assert flags == "1 True"
    assert data == "['mine']"


@pytest.mark.parametrize("options", [[], ["--cleanenv"]], ids=["", "cleanenv"])
@pytest.mark.parametrize(
    ("program", "variable"),
    [
        ("apptainer", "APPTAINER_BIND"),
        ("apptainer", "SINGULARITY_BIND"),
        ("singularity", "SINGULARITY_BIND"),
    ],
)
@pytest.mark.parametrize("how", ["stage-run", "activate"])
def test_an_environment_that_brings_its_python(
    staged: Callable[[str, str], Staged],
    programs: Path,
    program: str,
    variable: str,
    options: list[str],
    how: str,
) -> None:
    """Everything hidden that it was made from, and another Python or none in the image."""
    one = staged("on-base", "mounted")
    env = environ(one, **{variable: f"{one.bench.root}/data:/data:ro"})
    command = in_container(one, programs, program, options)
    if how == "stage-run":
        done = one.run(STAGE_RUN, "--strict", "--env", "on-base", *command, env=env)
        assert done.stderr == ""
    else:
        code = f'eval "$({VENV}/bin/stager activate on-base)"; {shell_words(*command)}'
        done = one.run("sh", "-euc", code, env=env)
    judge(one, done.stdout)


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_an_environment_of_the_nodes_python(
    staged: Callable[[str, str], Staged], programs: Path, warm: bool
) -> None:
    """It works where the image has the same Python; that it may not is told in one line."""
    one = staged("venv", "mounted")
    env = environ(one, APPTAINER_BIND=f"{one.bench.root}/data:/data")
    stage_run = [STAGE_RUN, "--strict", "--env", "venv"]
    for image, works in (("same.sif", True), ("other.sif", False)):
        command = [*stage_run, *in_container(one, programs, "apptainer", [], image=image)]
        done = one.run(*(stage_run if warm else ()), *command, env=env, check=False)
        told, *more = done.stderr.splitlines()
        assert told.startswith("stage-run: the environment's Python is this node's own, in /usr")
        assert "local_prefixes" in told
        assert (done.returncode == 0) is works, done
        if works:
            assert more == []
            judge(one, done.stdout)


def test_what_is_bound_follows_from_one_environment_to_the_next(
    staged: Callable[[str, str], Staged], programs: Path
) -> None:
    """A container does not start where something to be bound is not there (any more)."""
    one, other = staged("venv", "mounted"), staged("on-base", "mounted")
    env = environ(other, APPTAINER_BIND=f"{one.bench.root}/data:/data")
    code = (
        'eval "$({0} activate venv)"; old=$STAGER_PREFIX; eval "$({0} activate on-base)";'
        ' case $APPTAINER_BIND in *"$old"*) exit 3 ;; esac; {1}'
    )
    command = in_container(other, programs, "apptainer", ["--cleanenv"])
    done = other.run(
        "sh", "-euc", code.format(VENV / "bin" / "stager", shell_words(*command)), env=env
    )
    judge(other, done.stdout)
    assert os.listdir(programs / "root") == []


@pytest.mark.parametrize("ref", ["user", "tree", "env+tree", "env+user", "user+tree"])
def test_other_kinds_and_several(
    bench: Bench,
    programs: Path,
    pyenv_like_base: Environment,
    new_directory: Callable[[], Path],
    ref: str,
) -> None:
    """All of their layers are there, whatever variables lead to them."""
    place = new_directory()
    python = pyenv_like_base.python
    sites = {
        "env": make_small_venv(place / "env", python=python).site_packages,
        "user": place / "user" / "lib" / BASE_PYTHON.name / "site-packages",
        "tree": place / "tree",
    }
    options = {"env": [place / "env"], "user": ["--user"], "tree": ["--tree", place / "tree"]}
    names = ref.split("+")
    for name in names:
        sites[name].mkdir(parents=True, exist_ok=True)
        (sites[name] / f"of_{name}.py").write_text("")
        given = ["--python", python] if name != "env" else []
        env = bench.environ(PYTHONUSERBASE=str(place / "user"))
        bench.stager("pack", *options[name], *given, "--name", name, env=env)
    modules = [f"of_{name}" for name in names]
    code = (
        f"import {', '.join(modules)}, ssl; print(*(m.__file__ for m in ({', '.join(modules)},)))"
    )
    image = programs / "other.sif"
    command = [programs / "apptainer", "exec", "--cleanenv", image, "python", "-c", code]
    env = bench.environ(STAGER_STAGE_ON_STALE="warn")
    stage_run = [STAGE_RUN, "--strict", "--env", ref]
    done = run_hidden([*stage_run, *command], hide=[place, pyenv_like_base.prefix], env=env)
    assert len(done.stdout.split()) == len(names)
    assert all(path.startswith(f"{bench.store}/envs/") for path in done.stdout.split())
