"""Weights in local functions train like those of the main graph, and go back to where they were."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from onnxcompress.encodings import Codebook, Masked
from onnxcompress.encodings.base import Encoding
from onnxcompress.model import bridge
from onnxcompress.model.load import load
from onnxcompress.model.weights import weights
from onnxcompress.training.distill import Settings, distill, write
from tests.builders import floats, graph, info, model, node, tensors
from tests.training.small import arrays, opened, outputs

W, B = floats(6, 6, seed=1), floats(6, seed=2) * 0.1
OPSETS = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]


def flat() -> onnx.ModelProto:
    """x -> (MatMul w, Add b, Tanh) twice with the same weights -> MatMul -> z."""
    nodes = []
    for i, (before, after) in enumerate((("x", "h"), ("h", "k"))):
        nodes += [
            node("MatMul", [before, "w"], [f"a{i}"], name=f"a{i}"),
            node("Add", [f"a{i}", "b"], [f"s{i}"], name=f"s{i}"),
            node("Tanh", [f"s{i}"], [after], name=after),
        ]
    nodes.append(node("MatMul", ["k", "w2"], ["z"], name="z"))
    given = tensors(w=W, b=B, w2=floats(6, 4, seed=3))
    return model(graph(nodes, [info("x", ["n", 6])], [info("z", ["n", 4])], given))


def constant(name: str, array: np.ndarray) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array))


def functional(nested: bool) -> onnx.ModelProto:
    """The same with the layer as a function called twice; `nested`: by one that calls it with the product done."""
    layer = [constant("w", W), constant("b", B), helper.make_node("MatMul", ["x", "w"], ["a"])]
    layer += [helper.make_node("Add", ["a", "b"], ["s"]), helper.make_node("Tanh", ["s"], ["y"])]
    functions = [helper.make_function("local", "Layer", ["x"], ["y"], layer, OPSETS)]
    if nested:
        inner = helper.make_node("Tail", ["a"], ["y"], domain="local")
        functions = [
            helper.make_function("local", "Tail", ["a"], ["y"], [layer[1], *layer[3:]], OPSETS),
            helper.make_function("local", "Layer", ["x"], ["y"], [layer[0], layer[2], inner], OPSETS),
        ]
    nodes = [helper.make_node("Layer", [x], [y], domain="local", name=y) for x, y in (("x", "h"), ("h", "k"))]
    nodes.append(node("MatMul", ["k", "w2"], ["z"], name="z"))
    body = graph(nodes, [info("x", ["n", 6])], [info("z", ["n", 4])], tensors(w2=floats(6, 4, seed=3)))
    return model(body, functions=functions, domains={"local": 1})


@pytest.mark.parametrize("nested", [False, True])
def test_a_function_called_twice_has_one_weight_whose_gradients_add_up(nested: bool) -> None:
    settings = Settings(epochs=3, batch=16, lr=1e-2)
    plain, of = load(flat()), load(functional(nested))
    wanted = distill(None, plain, opened(plain, arrays(64)), settings=settings)
    done = distill(None, of, opened(of, arrays(64)), settings=settings)
    bias = "Tail/b" if nested else "Layer/b"
    assert done.parameters.keys() == {"Layer/w", bias, "w2"}
    assert not done.left
    for mine, theirs in (("Layer/w", "w"), (bias, "b"), ("w2", "w2")):
        np.testing.assert_allclose(done.parameters[mine]["w"], wanted.parameters[theirs]["w"], atol=1e-6)
    new = bridge.clone(of)
    write(new, done.parameters)
    write(plain, wanted.parameters)
    assert len(new.functions) == len(of.functions)
    x = {"x": arrays(64)["x"]}
    np.testing.assert_allclose(outputs(new, x)["z"], outputs(plain, x)["z"], atol=1e-5)
    assert np.abs(outputs(of, x)["z"] - outputs(new, x)["z"]).max() > 0.01


def encodings() -> list[Encoding]:
    codes = np.random.default_rng(0).integers(0, 4, W.shape).astype(np.uint8)
    return [Masked.apply(W, np.abs(W) > 0.5), Codebook(codes, np.array([-0.5, 0.0, 0.2, 0.6], np.float32))]


@pytest.mark.parametrize("encoding", encodings(), ids=["masked", "codebook"])
def test_an_encoded_weight_keeps_its_structure(encoding: Encoding) -> None:
    of: ir.Model = load(functional(False))
    next(w for w in weights(of) if w.key == "Layer/w").replace(encoding)
    done = distill(None, of, opened(of, arrays(64)), settings=Settings(epochs=2, batch=16, lr=1e-2))
    new = bridge.clone(of)
    write(new, done.parameters)
    after = next(w for w in weights(new) if w.key == "Layer/w")
    assert after.encoding.kind == encoding.kind
    assert np.abs(after.array() - encoding.decode()).max() > 1e-3
    np.testing.assert_array_equal(after.array()[encoding.decode() == 0], 0)
