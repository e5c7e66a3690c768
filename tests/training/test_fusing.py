"""Fused nodes give what the operators they replace gave, forward and backward, in fewer passes."""

from __future__ import annotations

import collections
from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxcompress.autodiff import gradients
from onnxcompress.autodiff.prepare import prepare
from onnxcompress.model.load import load
from onnxcompress.training.fusing import DOMAIN, fuse, lower, part
from onnxcompress.training.narrowing import narrow
from tests.builders import floats, graph, info, model, node, tensors
from tests.training.small import outputs

X = {"x": floats(3, 5, 4, seed=1) * 2}


def network(nodes: Sequence[onnx.NodeProto], opset: int = 17, **constants: np.ndarray) -> onnx.ModelProto:
    """x [n, 5, 4] -> h = x w -> `nodes`, from h to y -> loss, the sum of y v."""
    around = [node("MatMul", ["x", "w"], ["h"]), *nodes, node("MatMul", ["y", "v"], ["z"])]
    around.append(node("ReduceSum", ["z"], ["loss"], keepdims=0))
    arrays = {"w": floats(4, 4, seed=2), "v": floats(4, 2, seed=3)}
    numbers = {f"number_{k}": np.array(v, np.float32) for k, v in {"half": 0.5, "one": 1, "root": 2**0.5}.items()}
    initial = tensors(**arrays, **numbers, inverse=np.array(0.5**0.5, np.float32), **constants)
    return model(graph(around, [info("x", ["n", 5, 4])], [info("loss", [])], initial), opset=opset)


def trained(
    of: onnx.ModelProto, fused: bool, wrt: Sequence[str] = ("w", "v")
) -> tuple[dict[str, np.ndarray], collections.Counter[str]]:
    """The loss and the gradients of `wrt`, and the operators that gave them."""
    loaded = load(of)
    prepare(loaded)
    if fused:
        part(loaded)
        narrow(loaded)
        fuse(loaded)
    found = gradients(loaded, {"loss": None}, list(wrt))
    loaded.graph.outputs.extend(found.values())
    lower(loaded)
    assert {n.domain for n in loaded.graph} == {""}
    values = outputs(loaded, X)
    named = {"loss": values["loss"]} | {name: values[str(value.name)] for name, value in found.items()}
    return named, collections.Counter(n.op_type for n in loaded.graph)


def compare(
    of: onnx.ModelProto, wrt: Sequence[str] = ("w", "v")
) -> tuple[collections.Counter[str], collections.Counter[str]]:
    """Both ways agree; the operators of each."""
    plain, before = trained(of, False, wrt)
    fused, after = trained(of, True, wrt)
    for name, value in plain.items():
        np.testing.assert_allclose(fused[name], value, atol=1e-5 * np.abs(value).max(), err_msg=name)
    return before, after


def _erf(scale: Sequence[str], *rest: onnx.NodeProto) -> list[onnx.NodeProto]:
    return [
        node(scale[0], ["h", scale[1]], ["u"]),
        node("Erf", ["u"], ["e"]),
        node("Add", ["e", "number_one"], ["p"]),
        *rest,
    ]


GELU = {
    "half of the sum": _erf(
        ("Div", "number_root"), node("Mul", ["number_half", "p"], ["c"]), node("Mul", ["h", "c"], ["y"])
    ),
    "half of the product": _erf(
        ("Mul", "inverse"), node("Mul", ["h", "p"], ["m"]), node("Mul", ["m", "number_half"], ["y"])
    ),
    "half of x": _erf(("Mul", "inverse"), node("Mul", ["h", "number_half"], ["m"]), node("Mul", ["m", "p"], ["y"])),
    "standard": [node("Gelu", ["h"], ["y"])],
}


@pytest.mark.parametrize("form", GELU)
def test_gelu(form: str) -> None:
    before, after = compare(network(GELU[form], opset=20))
    assert (after["HardSigmoid"], after["Exp"], after["Erf"]) == (1, 1, 1)
    assert sum(after.values()) < sum(before.values()) or form == "standard"


def test_another_function_of_erf_stays() -> None:
    nodes = _erf(("Mul", "number_half"), node("Mul", ["h", "p"], ["m"]), node("Mul", ["m", "number_half"], ["y"]))
    before, after = compare(network(nodes))
    assert before == after


def test_silu() -> None:
    before, after = compare(network([node("Sigmoid", ["h"], ["s"]), node("Mul", ["h", "s"], ["y"])]))
    assert sum(after.values()) == sum(before.values()) - 2


def test_keys_are_transposed_once_and_one_side_is_scaled() -> None:
    nodes = [
        node("Reshape", ["h", "apart"], ["heads"]),
        node("Transpose", ["heads"], ["k"], perm=[0, 2, 1, 3]),
        node("Reshape", ["k", "merged"], ["flat"]),
        node("Transpose", ["flat"], ["turned"], perm=[0, 2, 1]),
        node("Reshape", ["turned", "stack"], ["kt"]),
        node("Mul", ["k", "number_half"], ["q"]),
        node("Mul", ["kt", "number_half"], ["scaled"]),
        node("MatMul", ["q", "scaled"], ["scores"]),
        node("Softmax", ["scores"], ["p"]),
        node("MatMul", ["p", "k"], ["o"]),
        node("Transpose", ["o"], ["back"], perm=[0, 2, 1, 3]),
        node("Reshape", ["back", "joined"], ["y"]),
    ]
    shapes = {"apart": [0, 5, 2, 2], "merged": [-1, 5, 2], "stack": [-1, 2, 2, 5], "joined": [0, 5, 4]}
    before, after = compare(network(nodes, 17, **{name: np.array(sizes) for name, sizes in shapes.items()}))
    assert after["Mul"] == before["Mul"] - 2  # one forward, one backward
    assert after["Reshape"] < before["Reshape"]


def test_a_free_dimension_keeps_its_name() -> None:
    loaded = load(network([node("Add", ["h", "h"], ["y"])]))
    prepare(loaded)
    y = next(n for n in loaded.graph if n.op_type == "Add").outputs[0]
    y.shape = ir.Shape([None, 5, 4])
    fuse(loaded)
    assert y.shape == ir.Shape(["n", 5, 4])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layer_bias", [True, False])
def test_a_normalization_goes_into_the_layers_that_read_it(bias: bool, layer_bias: bool) -> None:
    nodes = [
        node("LayerNormalization", ["h", "g", "b"] if bias else ["h", "g"], ["normal"]),
        node("MatMul", ["normal", "w2"], ["first"]),
        node("MatMul", ["normal", "w3"], ["second" if layer_bias else "y2"]),
        *([node("Add", ["c", "second"], ["y2"])] if layer_bias else []),
        node("Add", ["first", "y2"], ["y"]),
    ]
    constants = {"g": floats(4, seed=4), "b": floats(4, seed=5), "c": floats(4, seed=6)}
    constants |= {"w2": floats(4, 4, seed=7), "w3": floats(4, 4, seed=8)}
    wrt = ["w", "v", "g", "w2", "w3", *["b"] * bias, *["c"] * layer_bias]
    _, after = compare(network(nodes, 17, **constants), wrt)
    loaded = load(network(nodes, 17, **constants))
    prepare(loaded)
    part(loaded)
    normal = next(n for n in loaded.graph if n.op_type == "LayerNormalization")
    tensor = ir.convenience.get_const_tensor(normal.inputs[1])  # type: ignore[arg-type]
    assert len(normal.inputs) == 2
    assert tensor is not None
    assert (tensor.numpy() == 1).all()
    assert after["LayerNormalization"] == 1


def test_a_normalization_with_another_reader_stays() -> None:
    nodes = [
        node("LayerNormalization", ["h", "g"], ["normal"]),
        node("MatMul", ["normal", "w2"], ["first"]),
        node("Add", ["first", "normal"], ["y"]),
    ]
    before, after = compare(network(nodes, 17, g=floats(4, seed=4), w2=floats(4, 4, seed=7)), ["w", "g", "w2"])
    assert before == after


def test_attention_sums_over_the_heads_instead_of_the_scores() -> None:
    nodes = [
        node("Reshape", ["h", "apart"], ["heads"]),
        node("Transpose", ["heads"], ["k"], perm=[0, 2, 3, 1]),
        node("Transpose", ["heads"], ["q"], perm=[0, 2, 1, 3]),
        node("MatMul", ["q", "k"], ["scores"]),
        node("Softmax", ["scores"], ["p"]),
        node("MatMul", ["p", "q"], ["o"]),
        node("Transpose", ["o"], ["back"], perm=[0, 2, 1, 3]),
        node("Reshape", ["back", "joined"], ["y"]),
    ]
    constants = {"apart": np.array([0, 5, 2, 2]), "joined": np.array([0, 5, 4])}
    before, after = compare(network(nodes, 17, **constants))
    assert before == after  # the same operators, on smaller tensors
    loaded = load(network(nodes, 17, **constants))
    prepare(loaded)
    fuse(loaded)
    assert [n.op_type for n in loaded.graph if n.domain == DOMAIN] == ["Attention"]


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("full", [True, False])
def test_an_lstm_keeps_what_its_gradient_needs(direction: str, full: bool) -> None:
    """All outputs, with and without bias and initial states; the steps of x [3, 5, 4] are its first axis."""
    ways, hidden = 2 if direction == "bidirectional" else 1, 4
    inputs = ["h", "a", "r", *(["bias", "", "h0", "c0"] if full else [])]
    nodes = [
        node("LSTM", inputs, ["ys", "yh", "yc"], hidden_size=hidden, direction=direction),
        node("ReduceSum", ["ys", "first"], ["every"], keepdims=0),
        node("ReduceSum", ["yh", "zeroth"], ["last"], keepdims=0),
        node("ReduceSum", ["yc", "zeroth"], ["cell"], keepdims=0),
        node("Mul", ["last", "cell"], ["both"]),
        node("Add", ["every", "both"], ["y"]),
    ]
    arrays = {"a": floats(ways, 16, 4, seed=4), "r": floats(ways, 16, 4, seed=5), "bias": floats(ways, 32, seed=6)}
    arrays |= {"h0": floats(ways, 5, 4, seed=7), "c0": floats(ways, 5, 4, seed=8)}
    constants = {"first": np.array([1]), "zeroth": np.array([0])}
    wrt = ["w", "v", "a", "r", *(["bias", "h0", "c0"] if full else [])]
    before, after = compare(network(nodes, 17, **arrays, **constants), wrt)
    assert (before["LSTM"], after["LSTM"], after["Scan"]) == (1, 0, 2 * ways)


def test_an_lstm_without_a_rule_stays() -> None:
    inputs = ["h", "a", "r", "", "lengths"]
    nodes = [node("LSTM", inputs, ["ys"], hidden_size=4), node("ReduceSum", ["ys", "first"], ["y"], keepdims=0)]
    arrays = {"a": floats(1, 16, 4, seed=4), "r": floats(1, 16, 4, seed=5), "first": np.array([1])}
    loaded = load(network(nodes, 17, **arrays, lengths=np.full(5, 2, np.int32)))
    prepare(loaded)
    fuse(loaded)
    assert [n.domain for n in loaded.graph if n.op_type == "LSTM"] == [""]


def test_a_layer_whose_result_is_split_becomes_several() -> None:
    nodes = [
        node("MatMul", ["h", "w2"], ["all"]),
        node("Add", ["all", "c"], ["biased"]),
        node("Split", ["biased", "sizes"], ["p", "q"], axis=-1),
        node("MatMul", ["q", "w3"], ["wide"]),
        node("Mul", ["p", "wide"], ["y"]),
    ]
    constants = {"w2": floats(4, 6, seed=4), "c": floats(6, seed=5), "w3": floats(2, 4, seed=6)}
    of = network(nodes, 17, **constants, sizes=np.array([4, 2]))
    compare(of, ["w", "v", "w2", "w3", "c"])
    loaded = load(of)
    prepare(loaded)
    part(loaded)
    assert [x.name for n in loaded.graph if n.op_type == "Split" for x in n.inputs[:1] if x] == ["w2", "c"]
    assert [x.shape for n in loaded.graph if n.op_type == "Mul" for x in n.inputs if x] == [ir.Shape(["n", 5, 4])] * 2
