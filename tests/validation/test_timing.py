"""What a validation says of time and memory."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

from onnxcompress.errors import ModelError
from onnxcompress.runtime.cpu import cpu_class
from onnxcompress.validation import validate as module
from onnxcompress.validation.validate import validate
from onnxcompress.validation.verdict import Verdict
from tests.house import two_layers

DATA = {"x": np.zeros((40, 16), np.float32)}


@pytest.fixture
def file(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "m.onnx").write_bytes(two_layers().SerializeToString())
    return tmp_path / "m.onnx"


def test_latency_has_its_conditions_and_its_tail(file: pathlib.Path) -> None:
    found = validate(file, file, data=DATA, threads=2)
    timing = found.latency
    assert timing is not None
    assert (timing.threads, timing.batch, timing.cpu_class) == (2, 32, cpu_class())
    assert 0 < timing.original_p50 <= timing.original_p90 <= timing.original_p99
    assert 0 < timing.compressed_p50 <= timing.compressed_p90 <= timing.compressed_p99
    assert timing.warmup >= 2
    assert timing.ratio_low is not None
    assert timing.ratio_high is not None
    assert timing.ratio_low <= timing.ratio <= timing.ratio_high
    assert found.footprints is None


def test_load_and_memory_of_two_files(file: pathlib.Path) -> None:
    found = validate(file, file, data=DATA, latency=False, footprint=True)
    assert found.footprints is not None
    assert all(0 < entry.load < 10 for entry in found.footprints)
    assert found.to_json()["footprints"][0]["starts"] == 1
    assert validate(two_layers(), file, data=DATA, latency=False, footprint=True).footprints is None


def test_a_process_that_fails_costs_the_figures_and_not_the_verdict(
    file: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ModelError("no memory there")

    monkeypatch.setattr(module, "of_file", fails)
    found = validate(file, file, data=DATA, latency=False, footprint=True)
    assert found.verdict is Verdict.PASS
    assert found.footprints is None
    assert any("were not measured: no memory there" in reason for reason in found.reasons)
