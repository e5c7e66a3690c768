"""What a constant is to its consumers: roles and axes through every kind of view."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto

from onnxcompress.model.weights import Weight, weights
from tests.builders import by_key, constant, floats, function, graph, info, model, node, opened, tensors


def only(nodes: list[onnx.NodeProto], shape: tuple[int, ...], domains: Mapping[str, int] | None = None) -> Weight:
    """The weight "w" of a graph of `nodes`; its inputs and outputs need no types to be traced."""
    body = graph(
        nodes, [info("x", ["n"]), info("ids", ["m"], TensorProto.INT64)], [info("y", ["k"])], tensors(w=floats(*shape))
    )
    return by_key(opened(model(body, domains=domains)))["w"]


def turned(w: str, shape: tuple[int, ...], perm: list[int]) -> list[onnx.NodeProto]:
    return [node("Transpose", ["w"], [w], perm=perm)]


CONSUMERS = [
    (node("Conv", ["x", "v"], ["y"]), (8, 4, 3, 3), "conv", 0, (1, 2, 3)),
    (node("ConvTranspose", ["x", "v"], ["y"]), (4, 8, 3, 3), "conv", 1, (0, 2, 3)),
    (node("ConvTranspose", ["x", "v"], ["y"], group=2), (4, 8, 3, 3), "conv", None, ()),
    (node("MatMul", ["x", "v"], ["y"]), (4, 5), "matmul", 1, (0,)),
    (node("MatMul", ["v", "x"], ["y"]), (4, 5), "matmul", 0, (1,)),
    (node("MatMul", ["x", "v"], ["y"]), (6, 4, 5), "matmul", 2, (1,)),
    (node("MatMul", ["x", "v"], ["y"]), (4,), "matmul", None, (0,)),
    (node("Gemm", ["x", "v"], ["y"]), (4, 5), "gemm", 1, (0,)),
    (node("Gemm", ["x", "v"], ["y"], transB=1), (5, 4), "gemm", 0, (1,)),
    (node("Gemm", ["v", "x"], ["y"]), (5, 4), "gemm", 0, (1,)),
    (node("Gemm", ["v", "x"], ["y"], transA=1), (4, 5), "gemm", 1, (0,)),
    (node("Gather", ["v", "ids"], ["y"]), (9, 4), "embedding", 1, (0,)),
    (node("Gather", ["v", "ids"], ["y"], axis=1), (4, 9), "embedding", 0, (1,)),
    (node("Gather", ["v", "ids"], ["y"], axis=-1), (4, 9), "embedding", 0, (1,)),
    (node("LSTM", ["x", "v", "v"], ["y"], hidden_size=4), (1, 16, 4), "recurrent", 1, (2,)),
    (node("Einsum", ["x", "v"], ["y"], equation="ab,bc->ac"), (4, 5), "matmul", None, ()),
    (node("LayerNormalization", ["x", "v"], ["y"]), (4,), "norm", None, ()),
    (node("Add", ["x", "v"], ["y"]), (4,), "bias", None, ()),
    (node("Add", ["x", "v"], ["y"]), (1, 4, 1), "bias", None, ()),
    (node("Add", ["x", "v"], ["y"]), (4, 4), "other", None, ()),
    (node("Conv", ["x", "x", "v"], ["y"]), (8,), "bias", None, ()),
    (node("Mul", ["x", "v"], ["y"]), (4,), "other", None, ()),
    (node("PRelu", ["x", "v"], ["y"]), (4, 1, 1), "other", None, ()),
]


@pytest.mark.parametrize("case", CONSUMERS, ids=lambda case: f"{case[0].op_type}-{case[1]}")
def test_direct(case: tuple[onnx.NodeProto, tuple[int, ...], str, int | None, tuple[int, ...]]) -> None:
    consumer, shape, role, output, inputs = case
    weight = only([node("Identity", ["w"], ["v"]), consumer], shape)
    assert weight.role == role
    for use in weight.uses:
        assert (use.output_axis, use.input_axes) == (output, inputs)
        assert [each.op_type for each in use.path] == ["Identity"]


@pytest.mark.parametrize(("perm", "axis"), [([1, 0], 0), ([0, 1], 1)])
def test_axes_through_a_transpose(perm: list[int], axis: int) -> None:
    weight = only([*turned("v", (4, 5), perm), node("MatMul", ["x", "v"], ["y"])], (4, 5))
    assert weight.axis() == axis
    assert weight.uses[0].input_axes == (1 - axis,)


def test_axes_through_two_transposes_of_three_axes() -> None:
    nodes = [
        node("Transpose", ["w"], ["a"], perm=[2, 0, 1]),  # axes of w: 2 0 1
        node("Transpose", ["a"], ["v"]),  # reversed: 1 0 2
        node("MatMul", ["x", "v"], ["y"]),
    ]
    weight = only(nodes, (3, 4, 5))
    assert weight.axis() == 2
    assert weight.uses[0].input_axes == (0,)


@pytest.mark.parametrize(
    "view",
    [
        node("Reshape", ["w", "dims"], ["v"]),
        node("Slice", ["w", "from", "to"], ["v"]),
        node("Concat", ["w", "other"], ["v"], axis=0),
        node("Concat", ["other", "w"], ["v"], axis=0),
        node("Split", ["w"], ["v", "rest"], axis=0),
        node("Gather", ["w", "rows"], ["v"]),
        node("Flatten", ["w"], ["v"]),
        node("Expand", ["w", "dims"], ["v"]),
    ],
    ids=lambda each: f"{each.op_type}-{each.input[0]}",
)
def test_cut_and_joined_weights_lose_their_axes(view: onnx.NodeProto) -> None:
    constants = [
        constant("dims", np.array([4, 5])),
        constant("from", np.array([0])),
        constant("to", np.array([2])),
        constant("rows", np.array([0, 2])),
        constant("other", floats(4, 5)),
    ]
    weight = only([*constants, view, node("MatMul", ["x", "v"], ["y"])], (4, 5))
    assert weight.role == "matmul"
    assert weight.axis() is None


@pytest.mark.parametrize("order", [["w", "x"], ["x", "w"]])
def test_what_is_joined_with_an_activation_is_no_weight(order: list[str]) -> None:
    """A class token, or the padding of a cache, goes where the activation goes."""
    nodes = [
        node("Concat", order, ["cat"], axis=0),
        node("Transpose", ["cat"], ["t"], perm=[1, 0]),
        node("MatMul", ["k", "t"], ["y"]),
        constant("k", floats(3, 4)),
    ]
    weight = only(nodes[3:] + nodes[:3], (2, 5))
    assert weight.role == "other"
    assert weight.uses[0].op_type == "Concat"


def test_joined_with_what_is_computed_of_constants() -> None:
    nodes = [
        constant("b", floats(4, 5)),
        node("Neg", ["b"], ["c"]),
        node("Concat", ["c", "w"], ["v"], axis=0),
        node("MatMul", ["x", "v"], ["y"]),
    ]
    assert only(nodes, (4, 5)).role == "matmul"


def test_other_domains_mean_nothing_known() -> None:
    weight = only([node("MatMul", ["x", "w"], ["y"], domain="acme")], (4, 5), {"acme": 1})
    assert weight.role == "other"
    assert weight.uses[0].op_type == "acme::MatMul"
    fused = only([node("FusedConv", ["x", "w"], ["y"], domain="com.microsoft")], (4, 5, 3, 3), {"com.microsoft": 1})
    assert (fused.role, fused.axis()) == ("conv", 0)


def test_uses_that_disagree_have_no_common_axis() -> None:
    nodes = [
        node("Gather", ["w", "ids"], ["e"]),
        node("Transpose", ["w"], ["t"], perm=[1, 0]),
        node("MatMul", ["e", "t"], ["y"]),
    ]
    weight = only(nodes, (9, 4))
    assert {use.role: use.output_axis for use in weight.uses} == {"embedding": 1, "matmul": 0}
    assert weight.axis() is None
    assert weight.role == "matmul"


def test_calls_are_told_apart() -> None:
    """One function turns two weights; each goes on at its own call."""
    turn = function("Turn", ["a"], ["b"], [node("Transpose", ["a"], ["b"], perm=[1, 0])])
    nodes = [
        node("Turn", ["w"], ["wt"], domain="test"),
        node("Turn", ["v"], ["vt"], domain="test"),
        node("MatMul", ["x", "wt"], ["h"]),
        node("Gather", ["vt", "ids"], ["e"]),
        node("Add", ["h", "e"], ["y"]),
    ]
    body = graph(
        nodes,
        [info("x", ["n"]), info("ids", ["m"], TensorProto.INT64)],
        [info("y", ["k"])],
        tensors(w=floats(5, 4), v=floats(5, 9)),
    )
    keyed = by_key(opened(model(body, functions=[turn], domains={"test": 1})))
    assert [(use.op_type, use.output_axis) for use in keyed["w"].uses] == [("MatMul", 0)]
    assert [(use.op_type, use.output_axis) for use in keyed["v"].uses] == [("Gather", 0)]


def test_axes_through_a_function_that_multiplies() -> None:
    product = function(
        "Product", ["a", "m"], ["b"], [node("Transpose", ["m"], ["t"], perm=[1, 0]), node("MatMul", ["a", "t"], ["b"])]
    )
    nodes = [node("Transpose", ["w"], ["v"], perm=[1, 0]), node("Product", ["x", "v"], ["y"], domain="test")]
    body = graph(nodes, [info("x", ["n"])], [info("y", ["k"])], tensors(w=floats(4, 5)))
    weight = by_key(opened(model(body, functions=[product], domains={"test": 1})))["w"]
    assert weight.axis() == 1  # turned twice
    assert [each.op_type for each in weight.uses[0].path] == ["Transpose", "Transpose"]


def test_functions_that_multiply_themselves() -> None:
    """Each function calls the next twice: 2^25 paths, two uses."""
    depth = 25
    last = function("F0", ["a", "m"], ["b"], [node("MatMul", ["a", "m"], ["b"])])
    made = [last]
    for i in range(1, depth + 1):
        calls = [
            node(f"F{i - 1}", ["a", "m"], ["c"], domain="test"),
            node(f"F{i - 1}", ["c", "m"], ["b"], domain="test"),
        ]
        made.append(function(f"F{i}", ["a", "m"], ["b"], calls))
    nodes = [node(f"F{depth}", ["x", "w"], ["y"], domain="test")]
    body = graph(nodes, [info("x", [4, 4])], [info("y", [4, 4])], tensors(w=floats(4, 4)))
    # The loader refuses such a bomb; the tracer must not hang on it either.
    (weight,) = weights(ir.from_proto(model(body, functions=made, domains={"test": 1})))
    assert [use.op_type for use in weight.uses] == ["MatMul"]


def test_stacked_weights_lose_the_axis_they_are_scanned_along() -> None:
    body = graph(
        [node("MatMul", ["h", "w1"], ["h1"])],
        [info("h", [3, 4]), info("w1", [4, 4])],
        [info("h1", [3, 4])],
        name="body",
    )
    nodes = [node("Scan", ["x", "w"], ["y"], body=body, num_scan_inputs=1, scan_input_axes=[1])]
    outer = graph(nodes, [info("x", [3, 4])], [info("y", [3, 4])], tensors(w=floats(4, 6, 4)))
    weight = by_key(opened(model(outer)))["w"]
    assert weight.role == "matmul"
    assert weight.uses[0].output_axis == 2
    assert weight.uses[0].input_axes == (0,)


def test_names_of_a_use() -> None:
    named = only([node("MatMul", ["x", "w"], ["y"], name="layer/mm")], (4, 5)).uses[0]
    assert (named.node_name, named.op_type, named.index) == ("layer/mm", "MatMul", 1)
    assert only([node("MatMul", ["x", "w"], ["y"])], (4, 5)).uses[0].node_name == "y"
