"""Multiply-accumulates and weight bytes against counts by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxcompress.model.cost import costs, total_macs
from onnxcompress.model.load import load


def one(
    op: str,
    inputs: dict[str, Sequence[int | str]],
    weights: dict[str, Sequence[int]],
    output: Sequence[int | str] | None = None,
    domain: str = "",
    **attributes: Any,
) -> onnx.ModelProto:
    node = helper.make_node(op, [*inputs, *weights], ["y"], domain=domain, **attributes)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in inputs.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, output)],
        [numpy_helper.from_array(np.zeros(dims, np.float32), name) for name, dims in weights.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


@pytest.mark.parametrize(
    ("model", "macs", "stored"),
    [
        (
            one("Conv", {"x": [2, 3, 8, 8]}, {"w": [16, 3, 3, 3], "b": [16]}, pads=[1] * 4),
            2 * 16 * 64 * 27,
            4 * (432 + 16),
        ),
        (one("Conv", {"x": [1, 8, 8, 8]}, {"w": [8, 1, 3, 3]}, group=8, pads=[1] * 4), 8 * 64 * 9, 4 * 72),
        (one("ConvTranspose", {"x": [1, 4, 5, 5]}, {"w": [4, 6, 2, 2]}, strides=[2, 2]), 100 * 24, 4 * 96),
        (one("MatMul", {"x": [5, 7, 16]}, {"w": [16, 32]}), 35 * 16 * 32, 4 * 512),
        (one("MatMul", {"x": ["batch", 16]}, {"w": [16, 32]}), 16 * 32, 4 * 512),
        (one("Gemm", {"x": [16, 5]}, {"w": [32, 16]}, transA=1, transB=1), 5 * 16 * 32, 4 * 512),
        (one("LSTM", {"x": [9, 2, 4]}, {"w": [1, 32, 4], "r": [1, 32, 8]}, hidden_size=8), 18 * (128 + 256), 4 * 384),
        (one("GRU", {"x": [9, 2, 4]}, {"w": [2, 24, 4], "r": [2, 24, 8]}, hidden_size=8), 18 * 2 * (96 + 192), 4 * 576),
        (
            one(
                "MatMulNBits",
                {"x": [3, 64]},
                {"q": [8, 2, 16]},
                [3, 8],
                "com.microsoft",
                K=64,
                N=8,
                bits=4,
                block_size=32,
            ),
            3 * 64 * 8,
            4 * 256,
        ),
        (
            one("Attention", {"x": [1, 10, 32]}, {"w": [32, 96], "b": [96]}, [1, 10, 32], "com.microsoft", num_heads=4),
            10 * 32 * 96 + 2 * 100 * 32,
            4 * (3072 + 96),
        ),
        (one("Add", {"x": [5, 7]}, {"w": [7]}), 0, 28),
    ],
    ids=lambda value: value.graph.node[0].op_type if isinstance(value, onnx.ModelProto) else None,
)
def test_by_hand(model: onnx.ModelProto, macs: int, stored: int) -> None:
    (entry,) = costs(load(model))
    assert (entry.macs, entry.weight_bytes) == (macs, stored)


def test_free_dimensions() -> None:
    model = load(one("MatMul", {"x": ["batch", "steps", 16]}, {"w": [16, 32]}))
    assert costs(model, free={"batch": 4, "steps": 10})[0].macs == 40 * 512
    assert costs(model, free=3)[0].macs == 9 * 512
    assert costs(model, free={"batch": 4})[0].macs is None
    assert total_macs(costs(model, free={"batch": 4})) == 0


def test_decoder_counts_at_its_reader() -> None:
    message = one("MatMul", {"x": [1, 16]}, {"w": [16, 32]})
    message.graph.node.insert(0, helper.make_node("DequantizeLinear", ["q", "s"], ["v"]))
    message.graph.node[1].input[1] = "v"
    del message.graph.initializer[:]
    message.graph.initializer.append(numpy_helper.from_array(np.zeros((16, 32), np.int8), "q"))
    message.graph.initializer.append(numpy_helper.from_array(np.array(1, np.float32), "s"))
    (entry,) = costs(load(message))
    assert (entry.op_type, entry.macs, entry.weight_bytes) == ("MatMul", 512, 516)


def test_body_reads_weights_of_the_graph_around_it() -> None:
    message = one("MatMul", {"x": [1, 16]}, {"w": [16, 32]})
    inner = helper.make_node("MatMul", ["x", "w"], ["t"])
    value = helper.make_tensor_value_info("t", TensorProto.FLOAT, [1, 32])
    body = helper.make_graph([inner], "b", [], [value])
    message.graph.input.append(helper.make_tensor_value_info("c", TensorProto.BOOL, []))
    del message.graph.node[:]
    message.graph.node.append(helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body))
    found = [entry for entry in costs(load(message)) if entry.op_type == "MatMul"]
    assert [(entry.name, entry.macs) for entry in found] == [("y/else/t", 512), ("y/then/t", 512)]
