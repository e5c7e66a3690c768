"""What opening a model costs in a fresh process."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest
from onnx import TensorProto

from onnxcompress.errors import ModelError
from onnxcompress.runtime.footprint import footprint
from onnxcompress.runtime.memory import rss_anon
from tests.builders import graph, info, model, node, tensors

MIB = 1 << 20


def _wide(path: pathlib.Path, rows: int) -> pathlib.Path:
    """x [n, 4] -> MatMul with 4 x rows floats that the file does not hold: ONNX Runtime expands and keeps them."""
    nodes = [
        node("Expand", ["one", "shape"], ["w"]),
        node("MatMul", ["x", "w"], ["y"]),
        node("ReduceSum", ["y"], ["z"], keepdims=0),
    ]
    held = tensors(one=np.ones((1, 1), np.float32), shape=np.array([4, rows], np.int64))
    made = model(graph(nodes, [info("x", ["n", 4])], [info("z", [])], held))
    path.write_bytes(made.SerializeToString())
    return path


@pytest.mark.skipif(rss_anon() is None, reason="no /proc/self/status")
def test_memory_is_the_models_own(tmp_path: pathlib.Path) -> None:
    feeds = {"x": np.ones((1, 4), np.float32)}
    small = footprint(_wide(tmp_path / "small.onnx", 16), feeds, starts=2)
    large = footprint(_wide(tmp_path / "large.onnx", 4 * MIB), feeds)  # 64 MiB of weights, 16 MiB of result
    assert small.starts == 2
    assert small.peak is not None
    assert small.held is not None
    assert large.peak is not None
    assert large.held is not None
    assert small.held <= small.peak < 16 * MIB
    assert 64 * MIB < large.peak < 320 * MIB
    assert large.held > 60 * MIB
    assert 0 < small.load < 5
    assert 0 < small.first < 5


def test_strings_reach_the_model(tmp_path: pathlib.Path) -> None:
    nodes = [node("Identity", ["x"], ["y"])]
    kind = TensorProto.STRING
    made = model(graph(nodes, [info("x", [2], kind)], [info("y", [2], kind)]))
    (tmp_path / "m.onnx").write_bytes(made.SerializeToString())
    assert footprint(tmp_path / "m.onnx", {"x": np.array(["a", "b"], object)}).load > 0


def test_what_went_wrong_there_is_said_here(tmp_path: pathlib.Path) -> None:
    path = _wide(tmp_path / "m.onnx", 16)
    with pytest.raises(ModelError, match=r"process of its own: .*m\.onnx: has no input 'other'"):
        footprint(path, {"x": np.ones((1, 4), np.float32), "other": np.zeros(1, np.float32)})
