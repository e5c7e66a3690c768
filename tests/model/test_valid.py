"""Operators that ONNX Runtime has in the standard's domain are no reason to refuse a model; real faults still are."""

from __future__ import annotations

import pathlib

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxcompress.lift import lift
from onnxcompress.model import bridge, valid
from onnxcompress.model.load import load
from onnxcompress.model.save import save


def _model(*, fault: bool = False, body: bool = False) -> onnx.ModelProto:
    norm = helper.make_node("SimplifiedLayerNormalization", ["x", "s"], ["y"], axis=-1, epsilon=1e-5)
    nodes = [norm]
    if body:
        inner = helper.make_graph([norm], "then", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
        nodes = [helper.make_node("If", ["c"], ["z"], then_branch=inner, else_branch=inner)]
    if fault:
        nodes.append(helper.make_node("Relu", ["nowhere"], ["w"]))
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4])]
    inputs += [helper.make_tensor_value_info("c", TensorProto.BOOL, [])] if body else []
    output = helper.make_tensor_value_info("z" if body else "y", TensorProto.FLOAT, [2, 4])
    scale = numpy_helper.from_array(np.arange(4, dtype=np.float32), "s")
    graph = helper.make_graph(nodes, "g", inputs, [output], [scale])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)


@pytest.mark.parametrize("body", [False, True])
def test_an_operator_of_the_runtime_is_believed(body: bool) -> None:
    with pytest.raises(onnx.checker.ValidationError, match="No Op registered for SimplifiedLayerNormalization"):
        onnx.checker.check_model(_model(body=body))
    valid.check(_model(body=body))


def test_what_is_wrong_beside_it_is_found() -> None:
    with pytest.raises(onnx.checker.ValidationError, match="nowhere"):
        valid.check(_model(fault=True))


def test_it_is_lifted_to_a_newer_opset() -> None:
    model = bridge.from_proto(_model(), "test")
    feeds = {"x": np.arange(8, dtype=np.float32).reshape(2, 4)}
    assert lift(model, 21, [feeds]) == ""
    assert model.opset_imports == {"": 21}
    assert [(node.domain, node.op_type) for node in model.graph] == [("", "SimplifiedLayerNormalization")]


def test_saved_with_external_data(tmp_path: pathlib.Path) -> None:
    onnx.save(_model(), tmp_path / "in.onnx", save_as_external_data=True, size_threshold=0)
    save(load(tmp_path / "in.onnx"), tmp_path / "out.onnx")
    (node,) = onnx.load(tmp_path / "out.onnx").graph.node
    assert (node.domain, node.op_type) == ("", "SimplifiedLayerNormalization")
    assert {path.name for path in tmp_path.iterdir()} >= {"in.onnx", "out.onnx"}
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]


def test_a_missing_data_file_beside_it_is_found(tmp_path: pathlib.Path) -> None:
    model = _model()
    path = tmp_path / "in.onnx"
    onnx.save(model, path, save_as_external_data=True, size_threshold=0, location="weights.bin")
    data = path.read_bytes()
    valid.check_file(path, data)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(onnx.checker.ValidationError, match=r"weights\.bin"):
        valid.check_file(path, data)
