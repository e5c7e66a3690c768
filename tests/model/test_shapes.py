"""Shapes and where they are known from."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from onnxcompress.model.load import load
from onnxcompress.model.shapes import Origin, ShapeInfo, shapes


def make() -> onnx.ModelProto:
    body = helper.make_graph(
        [helper.make_node("Relu", ["t"], ["r"])], "b", [], [helper.make_tensor_value_info("r", TensorProto.FLOAT, None)]
    )
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["t"]),
        helper.make_node("If", ["c"], ["u"], then_branch=body, else_branch=body),
        helper.make_node("NonZero", ["u"], ["n"]),
        helper.make_node("F", ["t"], ["y"], domain="f"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 512]),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
        ],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, None),
            helper.make_tensor_value_info("n", TensorProto.INT64, None),
        ],
        [numpy_helper.from_array(np.zeros((512, 8), np.float32), "w")],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    inner = [helper.make_node("Exp", ["a"], ["b"])]
    model.functions.append(helper.make_function("f", "F", ["a"], ["b"], inner, opsets[:1]))
    return model


def test_declared_and_inferred() -> None:
    model = load(make())
    tensor = model.graph.initializers["w"].const_value
    found = shapes(model)
    assert found["x"] == ShapeInfo(("batch", 512), ir.DataType.FLOAT, Origin.DECLARED)
    assert found["w"] == ShapeInfo((512, 8), ir.DataType.FLOAT, Origin.DECLARED)
    assert found["t"] == ShapeInfo(("batch", 8), ir.DataType.FLOAT, Origin.INFERRED)
    assert found["u/then/r"] == ShapeInfo(("batch", 8), ir.DataType.FLOAT, Origin.INFERRED)
    assert found["y"] == ShapeInfo(("batch", 8), ir.DataType.FLOAT, Origin.INFERRED)
    assert found["n"].dtype == ir.DataType.INT64
    assert not found["n"].static
    # Inference left the model as it was.
    assert model.graph.initializers["w"].const_value is tensor
    assert model.graph[0].outputs[0].shape is None


def test_observed() -> None:
    found = shapes(
        load(make()), observed={"t": np.zeros((3, 8), np.float32), "n": (2, 5), "w": np.zeros((512, 8), "f4")}
    )
    assert found["t"] == ShapeInfo((3, 8), ir.DataType.FLOAT, Origin.OBSERVED)
    assert found["n"] == ShapeInfo((2, 5), ir.DataType.INT64, Origin.OBSERVED)
    assert found["w"].origin is Origin.DECLARED


def test_observed_wins_over_a_wrong_declaration() -> None:
    message = make()
    message.graph.value_info.append(helper.make_tensor_value_info("t", TensorProto.FLOAT, [7, 8]))
    model = load(message)
    assert shapes(model)["t"].dims == (7, 8)
    assert shapes(model, observed={"t": (2, 8)})["t"] == ShapeInfo((2, 8), ir.DataType.FLOAT, Origin.OBSERVED)


def test_failed_inference_leaves_what_is_declared() -> None:
    message = make()
    message.graph.node[0].input[0] = "c"  # MatMul of a bool scalar
    found = shapes(load(message))
    assert found["x"].dims == ("batch", 512)
    assert "t" not in found or found["t"].dims is None
