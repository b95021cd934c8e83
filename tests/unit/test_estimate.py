"""The model of `stager plan`, and the timings that it takes."""

from __future__ import annotations

import io
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from stager import estimate, timings
from stager.estimate import Layer, Site, Way

pytestmark = pytest.mark.unit

# An environment with torch: 34,348 files, 1.74 GB, an image of 486 MB.
LARGE = [Layer(files=34_348, size=1_740_000_000, image=486_000_000)]
LUSTRE = Site(latency=0.01, rate=100_000, bandwidth=100e9, read=2.5e9, write=2e9)
FLASH = LUSTRE._replace(latency=0.0005, rate=500_000)
WEAK = Site(latency=0.002, rate=5_000, bandwidth=1e9, read=1e9, write=1e9)


def both(layers: list[Layer], site: Site, nodes: int) -> tuple[Way, Way]:
    return estimate.direct(layers, site, nodes), estimate.staged(layers, site, nodes)


@pytest.mark.parametrize("nodes", [1, 8, 128, 1024, 9408])
def test_cold_metadata_is_what_staging_is_for(nodes: int) -> None:
    direct, staged = both(LARGE, LUSTRE, nodes)
    assert estimate.verdict(direct, staged) == "stage"
    assert direct.operations > 100 * staged.operations


def test_a_small_environment_on_flash_gains_nothing() -> None:
    small = [Layer(files=900, size=60_000_000, image=15_000_000)]
    direct, staged = both(small, FLASH, 1)
    assert estimate.verdict(direct, staged) == "either"


def test_a_large_image_behind_a_slow_link_is_not_worth_it() -> None:
    slow = FLASH._replace(read=20e6)
    direct, staged = both(LARGE, slow, 1)
    assert estimate.verdict(direct, staged) == "direct"


def test_what_is_here_costs_next_to_nothing() -> None:
    here = [LARGE[0]._replace(here=True)]
    assert estimate.staged(here, LUSTRE, 1).seconds == pytest.approx(0.18)
    assert estimate.staged(here, LUSTRE, 1).read == 0


def test_more_nodes_are_never_faster() -> None:
    for site in (LUSTRE, FLASH, WEAK):
        for way in (estimate.direct, estimate.staged):
            times = [way(LARGE, site, nodes).seconds for nodes in (1, 2, 4, 8, 64, 1024, 9408)]
            assert times == sorted(times)


def test_extraction_costs_every_file() -> None:
    extracted = [LARGE[0]._replace(extracted=True)]
    mounted = estimate.staged(LARGE, LUSTRE, 1).seconds
    assert estimate.staged(extracted, LUSTRE, 1).seconds > mounted + 1


def test_the_metadata_service_is_shared() -> None:
    seconds = [estimate.direct(LARGE, WEAK, nodes).seconds for nodes in (100, 200)]
    assert seconds[1] == pytest.approx(2 * seconds[0])


def test_latency_is_of_files_all_over_the_tree(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"package{number}" / "sub").mkdir(parents=True)
        (tmp_path / f"package{number}" / "sub" / "module.py").write_text("")
    seconds, samples = timings.latency(str(tmp_path), seed=1)
    assert samples == 24
    assert seconds > 0


def test_no_files_no_latency(tmp_path: Path) -> None:
    assert timings.latency(str(tmp_path)) == (0.0, 0)
    assert timings.latency(str(tmp_path / "gone")) == (0.0, 0)


def test_reading_and_writing(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"x" * 100_000)
    assert timings.reading([str(tmp_path / "image")]) > 0
    assert timings.writing(str(tmp_path)) > 0
    assert [path.name for path in tmp_path.iterdir()] == ["image"]
    with pytest.raises(OSError, match="gone"):
        timings.reading([str(tmp_path / "gone")])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        timings.reading([str(tmp_path / "pipe")])


def test_no_disk_is_filled_to_time_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 0

    def free(descriptor: int) -> SimpleNamespace:
        return SimpleNamespace(f_bavail=left // 512, f_frsize=512)

    class Counted(io.RawIOBase):
        def fileno(self) -> int:
            return -1

        def write(self, piece: bytes) -> int:
            nonlocal size
            size += len(piece)
            return len(piece)

    monkeypatch.setattr(os, "statvfs", free)
    monkeypatch.setattr(timings.tempfile, "TemporaryFile", lambda **_: Counted())
    left = 10 << 20
    assert timings.writing(str(tmp_path)) > 0
    assert size == left // 2
    left = 0
    with pytest.raises(OSError, match="No space"):
        timings.writing(str(tmp_path))
