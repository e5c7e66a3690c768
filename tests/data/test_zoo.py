"""Every model of the zoo takes its own feeds and the ones made up for it (ONNXCOMPRESS_ZOO names the folder)."""

from __future__ import annotations

import os
import pathlib

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from onnxcompress.data.batch import Data
from onnxcompress.data.sizes import candidate_sizes
from onnxcompress.data.source import open_data
from onnxcompress.data.specs import input_specs
from onnxcompress.data.synthetic import synthetic_feeds

ZOO = pathlib.Path(os.environ.get("ONNXCOMPRESS_ZOO", "/nonexistent"))
MODELS = sorted(ZOO.glob("*/model*.onnx")) if ZOO.is_dir() else []
pytestmark = pytest.mark.skipif(not MODELS, reason="ONNXCOMPRESS_ZOO is not set")


def load(path: pathlib.Path) -> ir.Model:
    proto = onnx.load(path)
    for output in proto.graph.output:
        if not output.type.HasField("tensor_type"):
            output.ClearField("type")  # onnx-ir 1.1.0 cannot read the type sequence(map)
    return ir.from_proto(proto)


def session(path: pathlib.Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def finite(runner: ort.InferenceSession, data: Data, calls: int) -> bool:
    for _, batch in zip(range(calls), data, strict=False):
        for output in runner.run(None, batch.feeds):
            if isinstance(output, np.ndarray) and output.dtype.kind == "f" and not np.isfinite(output).all():
                return False
    return True


@pytest.mark.parametrize("path", MODELS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_own_feeds_run(path: pathlib.Path) -> None:
    feeds = path.with_name(path.name.replace("model", "feeds")).with_suffix(".npz")
    if not feeds.exists():
        pytest.skip("comes without feeds")
    data = open_data(feeds, input_specs(load(path)))
    assert data.len_hint() == sum(batch.count for batch in data)
    assert len(data.digest()) == 64
    assert finite(session(path), data, 2)


@pytest.mark.parametrize("path", MODELS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_made_up_feeds_run(path: pathlib.Path) -> None:
    model, runner = load(path), session(path)
    for sizes in candidate_sizes(model):
        try:
            assert finite(runner, synthetic_feeds(model, sizes=sizes), 4)
        except ort.capi.onnxruntime_pybind11_state.InvalidArgument:
            continue
        return
    raise AssertionError(f"{path}: no candidate ran")
