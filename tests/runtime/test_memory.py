"""Memory: anonymous pages count, mapped ones do not."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

from onnxcompress.runtime.memory import PeakRssAnon, rss_anon

pytestmark = pytest.mark.skipif(rss_anon() is None, reason="no /proc/self/status")
SIZE = 64 << 20


def test_peak_of_an_array_that_is_gone_again() -> None:
    with PeakRssAnon(interval=0.002) as peak:
        array = np.ones(SIZE, np.uint8)
        for _ in range(20):
            array += 1
        del array
    assert peak.growth is not None
    assert SIZE * 0.9 < peak.growth < SIZE * 1.5


def test_mapped_pages_do_not_count(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "mapped"
    path.write_bytes(b"\1" * SIZE)
    with PeakRssAnon(interval=0.002) as peak:
        mapped = np.memmap(path, np.uint8, "r")
        assert int(mapped.sum(dtype=np.int64)) == SIZE
    assert peak.growth is not None
    assert peak.growth < SIZE * 0.2
