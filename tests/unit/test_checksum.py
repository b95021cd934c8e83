from __future__ import annotations

import importlib
import sys
import zlib
from collections.abc import Iterator

import pytest

from stager import checksum


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    importlib.reload(checksum)


@pytest.mark.parametrize("has_isal", [True, False])
def test_the_sum_is_zlibs_in_pieces_of_any_size(
    monkeypatch: pytest.MonkeyPatch, *, has_isal: bool
) -> None:
    if has_isal:
        pytest.importorskip("isal")
    else:
        monkeypatch.setitem(sys.modules, "isal", None)
        monkeypatch.setitem(sys.modules, "isal.isal_zlib", None)
    module = importlib.reload(checksum)
    assert (module.crc32 is zlib.crc32) is not has_isal
    data = bytes(range(256)) * 4099
    for size in (1, 7, 4096, 1 << 20):
        total = 0
        for start in range(0, len(data) if size > 1 else 1000, size):
            total = module.crc32(memoryview(data)[start : start + size], total)
        assert total == zlib.crc32(data if size > 1 else data[:1000])
