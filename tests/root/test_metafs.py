"""The measuring file system of ``tests/benchmarks``: does its ledger tell what programs asked?"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.metafs import Metafs
from benchmarks.metafs_server import Service
from benchmarks.settings import COLD_LUSTRE, NONE, Settings
from environments import Environment, clean_environ, run, strace_files

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "mounted").mkdir()
    yield tmp_path / "mounted"


def asked(shared: Metafs, *kinds: str) -> Counter[tuple[str, str]]:
    return Counter((one.kind, one.path) for one in shared.ledger() if one.kind in kinds)


def components(path: str, top: Path, backing: Path) -> Iterator[tuple[str, str]]:
    """What resolving a path asks a client who knows nothing, links followed."""
    walked = str(top)
    left = os.path.relpath(path, top).split("/")
    while left:
        name = left.pop(0)
        here = f"{walked}/{name}"
        yield "lookup", here
        real = backing / os.path.relpath(here, top)
        if real.is_symlink():
            yield "readlink", here
            target = os.path.normpath(os.path.join(walked, os.readlink(real)))
            if not target.startswith(f"{top}/"):
                return
            walked, left = str(top), [*os.path.relpath(target, top).split("/"), *left]
        elif not real.is_dir():
            return
        else:
            walked = here


def test_it_tells_what_strace_tells(venv_numpy: Environment, place: Path) -> None:
    """Each name that a program's calls lead through is looked up once, and no other is."""
    backing = venv_numpy.prefix.parent
    argv = [place / venv_numpy.prefix.name / "bin" / "python", "-c", "import numpy.linalg"]
    with Metafs(backing, str(place), {"here": None}) as shared:
        named = strace_files(argv, env=clean_environ(PYTHONDONTWRITEBYTECODE="1"))
        found = asked(shared, "lookup", "readlink")
        opened = asked(shared, "open")
        closed = asked(shared, "close")
    named = [path for path in named if path.startswith(f"{place}/")]
    assert len(named) > 400
    expected = {one for path in named for one in components(path, place, backing)}
    # A link that was only asked about (lstat, readlink) is not followed; all that is met here are.
    assert set(found) == expected
    assert set(found.values()) == {1}
    # A call names what it opens; nothing else is opened.
    assert {path for _, path in opened} <= set(named)
    assert sum(opened.values()) == sum(closed.values()) > 50


def test_what_a_client_keeps(place: Path, tmp_path: Path) -> None:
    backing = tmp_path / "backing"
    (backing / "directory").mkdir(parents=True)
    (backing / "directory" / "file").write_text("text")
    (backing / "link").symlink_to("directory/file")
    with Metafs(backing, str(place), {"here": None}) as shared:
        for _ in range(3):
            assert not (place / "missing").exists()
            assert (place / "link").read_text() == "text"
            assert os.listdir(place / "directory") == ["file"]
        end = time.monotonic() + 30
        while (kinds := shared.ledger().kinds())["closedir"] < 3 and time.monotonic() < end:
            time.sleep(0.05)  # nobody waits for it
        size = shared.ledger().bytes()
    assert kinds == {
        "lookup": 4,  # missing, link, directory, directory/file
        "readlink": 1,
        "open": 3,
        "close": 3,
        "read": 1,
        "opendir": 3,
        "readdir": 1,
        "closedir": 3,
    }
    assert size == 4


def test_lookups_of_one_directory_do_not_wait_for_each_other(place: Path, tmp_path: Path) -> None:
    """As many are asked at a time as there are processes (libfuse 3.14 would not let them)."""
    (tmp_path / "backing").mkdir()
    slow = Settings("slow", latency=5.0)
    with Metafs(tmp_path / "backing", str(place), {"here": None}, slow) as shared:
        run(["sh", "-c", 'for n in 1 2 3 4; do [ -e "$0/$n" ] & done; wait', place])
        moments = sorted(one.at for one in shared.ledger() if one.kind == "lookup")
    assert len(moments) == 4
    # All had been asked before the first was answered.
    assert moments[-1] < moments[0] + slow.latency


def test_nothing_can_be_written(place: Path, tmp_path: Path) -> None:
    (tmp_path / "backing").mkdir()
    with (
        Metafs(tmp_path / "backing", str(place), {"here": None}),
        pytest.raises(OSError, match="Read-only"),
    ):
        (place / "file").touch()


def test_what_cannot_be_mounted_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with (
        pytest.raises(RuntimeError, match="could not be mounted"),
        Metafs(tmp_path, "/no/such/place", {"here": None}),
    ):
        pass
    assert "No such file or directory" in capfd.readouterr().err


# The model. Moments are given and told: nothing here takes time.


def test_all_nodes_wait_in_one_queue() -> None:
    service = Service(Settings("test", rate=100, latency=1.0))
    assert [service.metadata(5.0) for _ in range(3)] == pytest.approx([6.01, 6.02, 6.03])
    other = FORK.Process(target=service.metadata, args=(5.0,))
    other.start()
    other.join()
    assert service.metadata(5.0) == pytest.approx(6.05)
    assert service.metadata(7.0) == pytest.approx(8.01)  # the queue is empty by then


def test_a_file_of_one_stripe_is_read_from_one_server() -> None:
    settings = Settings("test", osts=4, ost_bandwidth=1 << 20, stripe_size=1 << 20)
    pieces = [n << 20 for n in range(4)]
    service = Service(settings)
    narrow = [service.data(0.0, 1 << 20, offset, 7, wide=False) for offset in pieces]
    assert narrow == [1.0, 2.0, 3.0, 4.0]
    service = Service(settings)
    assert [service.data(0.0, 1 << 20, offset, 7, wide=True) for offset in pieces] == [1.0] * 4


def test_bandwidth_is_for_all() -> None:
    service = Service(Settings("test", bandwidth=100.0, node_bandwidth=50.0, data_latency=0.5))
    assert service.data(0.0, 100, 0, 0, wide=False) == 2.5  # the node's own card
    other = FORK.Process(target=service.data, args=(0.0, 300, 0, 1), kwargs={"wide": False})
    other.start()
    other.join()
    assert service.data(0.0, 50, 0, 2, wide=False) == 5.0  # behind 400 bytes of both


def test_dilated_ten_times() -> None:
    settings = Settings("test", rate=100, latency=1.0, bandwidth=100.0, data_latency=0.5)
    service = Service(settings)
    service.dilate(10)
    assert service.metadata(0.0) == pytest.approx(10.1)
    assert service.data(0.0, 100, 0, 0, wide=False) == pytest.approx(15.0)


def test_what_delays() -> None:
    assert COLD_LUSTRE.delays and not NONE.delays
