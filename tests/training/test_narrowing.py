"""Positions that nobody reads are not computed, and what is read stays what it was."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxcompress.autodiff.prepare import prepare
from onnxcompress.model.load import load
from onnxcompress.training.narrowing import narrow
from tests.builders import floats, graph, info, model, node, tensors
from tests.training.small import outputs

HEADS, WIDTH = 2, 4


def attention(index: int, *, pick: str = "Gather", second_use: bool = False) -> onnx.ModelProto:
    """x [n, T, 8]: one layer of attention (two heads of 4) with a residual and LayerNormalization; token `index`."""

    def split(kind: str) -> list[onnx.NodeProto]:
        return [
            node("MatMul", ["x", f"w{kind}"], [f"{kind}0"]),
            node("Reshape", [f"{kind}0", "apart"], [f"{kind}1"]),
            node("Transpose", [f"{kind}1"], [kind], perm=[0, 2, 3, 1] if kind == "k" else [0, 2, 1, 3]),
        ]

    nodes = [*split("q"), *split("k"), *split("v")]
    nodes += [
        node("MatMul", ["q", "k"], ["scores"]),
        node("Softmax", ["scores"], ["p"], axis=-1),
        node("MatMul", ["p", "v"], ["o"]),
        node("Transpose", ["o"], ["turned"], perm=[0, 2, 1, 3]),
        node("Reshape", ["turned", "joined"], ["flat"]),
        node("MatMul", ["flat", "wo"], ["projected"]),
        node("Add", ["projected", "b"], ["biased"]),
        node("Add", ["x", "biased"], ["sum"]),
        node("LayerNormalization", ["sum", "scale"], ["normal"], axis=-1),
    ]
    if pick == "Gather":
        nodes.append(node("Gather", ["normal", "index"], ["z"], axis=1))
    else:
        nodes.append(node("Slice", ["normal", "start", "end", "one"], ["z"]))
    wanted = [info("z", ["n", 8] if pick == "Gather" else ["n", 1, 8])]
    if second_use:
        wanted.append(info("biased", ["n", 5, 8]))
    arrays = {f"w{k}": floats(8, 8, seed=i) for i, k in enumerate("qkvo")}
    arrays |= {"b": floats(8, seed=9), "scale": floats(8, seed=10)}
    constants = {
        "apart": np.array([0, 5, HEADS, WIDTH]),
        "joined": np.array([0, -1, HEADS * WIDTH]),
        "index": np.array(index),
        "start": np.array([index]),
        "end": np.array([index + 1 or 2**31 - 1]),
        "one": np.array([1]),
    }
    return model(graph(nodes, [info("x", ["n", 5, 8])], wanted, tensors(**arrays, **constants)), opset=17)


def shape_of(of: ir.Model, name: str) -> list[int | str | None]:
    value = next(y for n in of.graph for y in n.outputs if y.name == name)
    assert value.shape is not None
    return [size if isinstance(size, int) else size.value for size in value.shape]


@pytest.mark.parametrize("index", [0, 3, -1])
@pytest.mark.parametrize("pick", ["Gather", "Slice"])
def test_one_position_goes_up_to_the_queries(index: int, pick: str) -> None:
    whole = load(attention(index, pick=pick))
    narrowed = load(attention(index, pick=pick))
    prepare(narrowed)
    assert narrow(narrowed) == 12  # all but keys, values and the pick itself
    for name, shape in {
        "q0": ["n", 1, 8],
        "q": ["n", 2, 1, 4],
        "k": ["n", 2, 4, 5],
        "p": ["n", 2, 1, 5],
        "normal": ["n", 1, 8],
    }.items():
        assert shape_of(narrowed, name) == shape
    x = {"x": floats(3, 5, 8, seed=20)}
    np.testing.assert_allclose(outputs(narrowed, x)["z"], outputs(whole, x)["z"], atol=1e-6)


def test_a_value_with_another_use_stays_whole() -> None:
    narrowed = load(attention(0, second_use=True))
    prepare(narrowed)
    assert narrow(narrowed) == 0  # only the sum and the normalization could be: no product is spared
    assert shape_of(narrowed, "biased") == ["n", 5, 8]
