"""Which products can overflow 16 bits: against brute force, in every form that a file can hold."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto

from onnxcompress.validation.integers import (
    LIMIT,
    PairBound,
    has_integers,
    pair_bounds,
    paired,
    products,
    real_activations,
)
from onnxcompress.validation.saturation import cut_off, matrices, saturations
from tests.builders import graph, info, model, node, opened, tensors

SCALE, ZERO, NONE = np.array(0.02, np.float32), np.array(100, np.uint8), np.array(0, np.int8)


def int8(*shape: int, most: int = 127, seed: int = 0) -> np.ndarray:
    """Codes from -`most` to `most`."""
    return np.random.default_rng(seed).integers(-most, most + 1, shape).astype(np.int8)


def qdq(op: str, weight: np.ndarray, shape: Sequence[int | str], zero: np.ndarray = ZERO, **given: Any) -> ir.Model:
    """x -> QuantizeLinear -> DequantizeLinear -> `op` with a dequantized weight."""
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        node("DequantizeLinear", ["w", "ws"], ["wd"]),
        node(op, ["xd", "wd"], ["y"], "layer", **given),
    ]
    held = tensors(s=SCALE, z=zero, w=weight, ws=SCALE)
    return opened(model(graph(nodes, [info("x", shape)], [info("y", [f"y{i}" for i in range(len(shape))])], held)))


def brute(rows: np.ndarray, low: int, high: int) -> tuple[int, int]:
    """The largest sum of two products over neighbours, and over any two, by trying all pairs and all ends."""
    ends = list(itertools.product((low, high), repeat=2))

    def most(pairs: Sequence[tuple[int, int]]) -> int:
        return max(
            (abs(a * int(row[i]) + b * int(row[j])) for row in rows for i, j in pairs for a, b in ends), default=0
        )

    size = rows.shape[1]
    neighbours = [(i, i + 1) for i in range(0, size - 1, 2)]
    alone = max((abs(end * int(row[-1])) for row in rows for end in (low, high)), default=0) if size % 2 else 0
    return max(most(neighbours), alone), most(list(itertools.combinations(range(size), 2)))


def the(found: list[PairBound]) -> PairBound:
    """The one entry there must be."""
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("size", [1, 2, 7, 16])
@pytest.mark.parametrize("real", [None, (-1.0, 0.5), (0.3, 3.0)])
def test_a_product_against_brute_force(size: int, real: tuple[float, float] | None) -> None:
    weight = int8(size, 5, seed=size)
    loaded = qdq("MatMul", weight, ["n", size])
    found = the(pair_bounds(loaded, {"x": real} if real else None))
    codes = (0, 255) if real is None else tuple(min(255, round(end / 0.02) + 100) for end in real)
    neighbours, any_pair = brute(weight.T, *codes)
    assert found.codes == codes
    assert found.neighbours == neighbours
    assert found.any_pair == (any_pair if size > 1 else neighbours)
    assert (found.node, found.op_type, found.weight, found.activation) == ("layer", "MatMul", "w", "xq")
    assert found.channels == 5
    assert real_activations(loaded) == ["x"]


def test_the_rule_that_targets_keep_is_where_the_limit_lies() -> None:
    safe = the(pair_bounds(qdq("MatMul", np.full((2, 3), 64, np.int8), ["n", 2])))
    assert (safe.neighbours, safe.at_risk, safe.channels_at_risk) == (32640, False, 0)
    weight = np.array([[64, 65, -65], [64, 64, -64]], np.int8)
    over = the(pair_bounds(qdq("MatMul", weight, ["n", 2])))
    assert (over.neighbours, over.at_risk, over.channels_at_risk, over.channel) == (255 * 129, True, 2, 1)
    apart = np.array([[127], [0], [127], [0]], np.int8)
    found = the(pair_bounds(qdq("MatMul", apart, ["n", 4])))
    assert (found.neighbours, found.any_pair, found.at_risk) == (255 * 127, 2 * 255 * 127, False)


def test_convolutions_are_paired_in_both_orders_and_read_their_padding() -> None:
    weight = np.zeros((1, 2, 1, 2), np.int8)
    weight[0, :, 0, 0] = 100  # neighbours with channels innermost only
    found = the(pair_bounds(qdq("Conv", weight, ["n", 2, 4, 4])))
    assert (found.neighbours, found.at_risk) == (255 * 200, True)
    narrow = the(pair_bounds(qdq("Conv", weight, ["n", 2, 4, 4]), {"x": (-1.8, -1.6)}))
    assert narrow.codes == (10, 100)  # 20 at most in the data, and padding writes the zero point


@pytest.mark.parametrize("turned", [0, 1])
def test_gemm_in_both_orders(turned: int) -> None:
    weight = int8(6, 4) if not turned else int8(4, 6)
    found = the(pair_bounds(qdq("Gemm", weight, ["n", 6], transB=turned)))
    assert found.neighbours == brute(weight if turned else weight.T, 0, 255)[0]
    assert found.channels == 4


def test_a_weight_behind_a_transpose() -> None:
    weight = int8(4, 6)
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        node("DequantizeLinear", ["w", "s"], ["wd"]),
        node("Transpose", ["wd"], ["wt"], perm=[1, 0]),
        node("MatMul", ["xd", "wt"], ["y"]),
    ]
    held = tensors(s=SCALE, z=ZERO, w=weight)
    loaded = opened(model(graph(nodes, [info("x", ["n", 6])], [info("y", ["n", 4])], held)))
    assert the(pair_bounds(loaded)).neighbours == brute(weight, 0, 255)[0]


def test_signed_activations_and_unsigned_weights_are_added_in_32_bits() -> None:
    signed = qdq("MatMul", int8(8, 4), ["n", 8], zero=NONE)
    unsigned = qdq("MatMul", int8(8, 4).view(np.uint8), ["n", 8])
    assert pair_bounds(signed) == pair_bounds(unsigned) == []
    assert has_integers(signed)
    assert has_integers(unsigned)


def test_floats_are_no_integers() -> None:
    nodes = [node("DequantizeLinear", ["w", "s"], ["wd"]), node("MatMul", ["x", "wd"], ["y"])]
    held = tensors(s=SCALE, w=int8(8, 4))
    loaded = opened(model(graph(nodes, [info("x", ["n", 8])], [info("y", ["n", 4])], held)))
    assert not has_integers(loaded)
    assert pair_bounds(loaded) == []


def _dynamic(weight: np.ndarray) -> onnx.ModelProto:
    nodes = [
        node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"]),
        node("MatMulInteger", ["xq", "w", "xz"], ["yi"], name="product"),
        node("Cast", ["yi"], ["yf"], to=TensorProto.FLOAT),
        node("Mul", ["yf", "xs"], ["y"]),
    ]
    return model(graph(nodes, [info("x", ["n", len(weight)])], [info("y", ["n", weight.shape[1]])], tensors(w=weight)))


def test_integer_operators() -> None:
    weight = int8(9, 4)
    assert the(pair_bounds(opened(_dynamic(weight)))).neighbours == brute(weight.T, 0, 255)[0]
    names = ["x", "s", "z", "w", "s", "zs", "s", "z"]
    kernel = int8(4, 3, 2, 2)
    held = tensors(s=SCALE, z=ZERO, zs=NONE, w=kernel)
    kind = TensorProto.UINT8
    body = graph([node("QLinearConv", names, ["y"])], [info("x", [1, 3, 5, 5], kind)], [info("y", [1, 4, 4, 4], kind)])
    body.initializer.extend(held)
    found = the(pair_bounds(opened(model(body))))
    orders = [kernel.reshape(4, 3, 4), kernel.reshape(4, 3, 4).transpose(0, 2, 1)]
    assert found.neighbours == max(brute(order.reshape(4, -1), 0, 255)[0] for order in orders)
    assert found.node == "y"


def test_products_of_two_activations_may_hold_any_code() -> None:
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        node("QuantizeLinear", ["v", "s", "zs"], ["vq"]),
        node("DequantizeLinear", ["vq", "s", "zs"], ["vd"]),
        node("MatMul", ["xd", "vd"], ["y"]),
    ]
    held = tensors(s=SCALE, z=ZERO, zs=NONE)
    loaded = opened(model(graph(nodes, [info("x", [2, 3]), info("v", [3, 2])], [info("y", [2, 2])], held)))
    found = the(pair_bounds(loaded))
    assert (found.weight, found.neighbours, found.at_risk) == (None, 2 * 255 * 128, True)
    assert saturations(loaded, [{"x": np.ones((2, 3), np.float32), "v": np.ones((3, 2), np.float32)}])[0].rows == 0


def _saturated(codes: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """[rows, channels] as vpmaddubsw and vpmaddwd compute it."""
    pairs = [part.astype(np.int64) for part in (*paired(codes), *paired(rows))]
    sums = pairs[0][:, None] * pairs[2][None] + pairs[1][:, None] * pairs[3][None]
    return np.asarray(np.clip(sums, -LIMIT - 1, LIMIT).sum(axis=2))


def test_what_is_cut_off_against_all_sums() -> None:
    codes = np.random.default_rng(1).integers(0, 256, (50, 15)).astype(np.uint8)
    rows = int8(6, 15)
    lost = codes.astype(np.int64) @ rows.T.astype(np.int64) - _saturated(codes, rows)
    error, cut, pairs = cut_off(codes, rows)
    assert error == float((lost**2).sum()) > 0
    assert 0 < cut < pairs == 50 * 6 * 8


def test_saturation_of_a_dynamic_product_on_data() -> None:
    weight = np.abs(int8(16, 4))
    x = np.abs(np.random.default_rng(2).normal(size=(40, 16))).astype(np.float32)
    x[0, 0] = -0.5  # a zero point above 0
    found = saturations(opened(_dynamic(weight)), [{"x": x}])
    low, high = float(x.min()), float(x.max())
    zero = round(-low * 255 / (high - low))
    codes = np.clip(np.rint(x / np.float32((high - low) / 255)) + zero, 0, 255).astype(np.uint8)
    exact = (codes.astype(np.int64) - zero) @ weight.astype(np.int64)
    lost = codes.astype(np.int64) @ weight.astype(np.int64) - _saturated(codes, weight.T)
    assert found[0].node == "product"
    assert found[0].rows == 40
    assert found[0].relative_error == pytest.approx(np.sqrt((lost**2).sum() / (exact.astype(float) ** 2).sum()), 1e-6)
    assert found[0].relative_error > 0.01


@pytest.mark.parametrize(
    ("given", "kernel"),
    [
        ({"group": 2, "strides": [2, 1], "pads": [1, 0, 2, 1], "dilations": [1, 2]}, (6, 2, 3, 2)),
        ({"auto_pad": "SAME_UPPER", "strides": [2, 2]}, (3, 4, 4, 3)),
        ({"auto_pad": "SAME_LOWER"}, (3, 4, 2, 2)),
        ({"auto_pad": "VALID"}, (3, 4, 2, 2)),
    ],
)
def test_rows_of_a_convolution_give_what_onnxruntime_computes(given: dict[str, Any], kernel: tuple[int, ...]) -> None:
    held = tensors(w=int8(*kernel, most=60), z=ZERO)
    body = graph(
        [node("ConvInteger", ["x", "w", "z"], ["y"], **given)],
        [info("x", [2, 4, 7, 6], TensorProto.UINT8)],
        [info("y", [2, kernel[0], "h", "v"], TensorProto.INT32)],
        held,
    )
    made = model(body)
    x = np.random.default_rng(3).integers(0, 256, (2, 4, 7, 6)).astype(np.uint8)
    session = ort.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = np.asarray(session.run(None, {"x": x})[0])
    product = next(iter(products(opened(made))))
    assert product.rows is not None
    found = np.concatenate(
        [
            (part.astype(np.int64) - 100) @ product.rows[0][channels].T.astype(np.int64)
            for part, channels in matrices(product, x, 100, 10_000)
        ],
        axis=1,
    )
    np.testing.assert_array_equal(found, expected.transpose(0, 2, 3, 1).reshape(-1, kernel[0]))
