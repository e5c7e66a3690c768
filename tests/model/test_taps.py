"""Taps against values computed by hand, also inside If, Loop and Scan."""

from __future__ import annotations

import os
import pathlib

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxcompress.errors import ModelError
from onnxcompress.model import bridge
from onnxcompress.model.load import load
from onnxcompress.model.save import save, to_bytes
from onnxcompress.model.shapes import values
from onnxcompress.model.taps import tap
from onnxcompress.runtime.session import open_session

W = np.arange(6, dtype=np.float32).reshape(2, 3) - 2
X = np.array([[1.0, -2.0]], np.float32)


def value(name: str, dims: list[int] | None = None, kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, dims)


def model(nodes: list[onnx.NodeProto], inputs: list[onnx.ValueInfoProto], output: onnx.ValueInfoProto) -> ir.Model:
    graph = helper.make_graph(nodes, "g", inputs, [output], [numpy_helper.from_array(W, "w")])
    return load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10))


def conditional() -> ir.Model:
    """then: relu(x w), else: an If again, inside it exp(x w)."""
    then = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["a"]), helper.make_node("Relu", ["a"], ["b"])], "t", [], [value("b")]
    )
    inner = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["d"]), helper.make_node("Exp", ["d"], ["e"])], "i", [], [value("e")]
    )
    other = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["f"])], "o", [], [value("f")])
    nested = helper.make_graph(
        [helper.make_node("If", ["c2"], ["h"], then_branch=inner, else_branch=other)], "n", [], [value("h")]
    )
    node = helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=nested)
    flags = [value("c", [], TensorProto.BOOL), value("c2", [], TensorProto.BOOL)]
    return model([node], [value("x", [1, 2]), *flags], value("y"))


@pytest.mark.parametrize(("first", "second"), [(True, True), (False, True), (False, False)])
def test_if(first: bool, second: bool) -> None:
    source = conditional()
    names = ["y/then/a", "b", "y/else/h/then/d", "y/else/h/else/f", "w", "x", "y"]
    before = to_bytes(source)
    tapped = tap(source, names)
    assert not tapped.left
    assert set(tapped.valid) == set(names[:4])
    with open_session(tapped.model) as session:
        got = session.run({"x": X, "c": np.array(first), "c2": np.array(second)})
    product = X @ W
    expected = {
        "y/then/a": product,
        "b": np.maximum(product, 0),
        "y/else/h/then/d": product,
        "y/else/h/else/f": product,
    }
    ran = {
        "y/then/a": first,
        "b": first,
        "y/else/h/then/d": not first and second,
        "y/else/h/else/f": not first and not second,
    }
    for name, array in expected.items():
        assert bool(got[tapped.valid[name]]) is ran[name]
        if ran[name]:
            np.testing.assert_array_equal(got[tapped.outputs[name]], array)
        else:
            assert got[tapped.outputs[name]].size == 0
    np.testing.assert_array_equal(got[tapped.outputs["w"]], W)
    np.testing.assert_array_equal(got[tapped.outputs["x"]], X)
    assert tapped.outputs["y"] == "y"
    assert to_bytes(source) == before  # the model itself is as it was


def loop() -> ir.Model:
    """state = state w w^T / 8 three times; yields relu(state)."""
    transposed = numpy_helper.from_array(np.ascontiguousarray(W.T) / 8, "wt")
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["s", "w"], ["p"]),
            helper.make_node("MatMul", ["p", "wt"], ["q"]),
            helper.make_node("Relu", ["q"], ["r"]),
            helper.make_node("Identity", ["k"], ["k2"]),
        ],
        "body",
        [value("i", [], TensorProto.INT64), value("k", [], TensorProto.BOOL), value("s", [1, 2])],
        [value("k2", [], TensorProto.BOOL), value("q", [1, 2]), value("r", [1, 2])],
        [transposed],
    )
    nodes = [
        helper.make_node("Constant", [], ["n"], value=numpy_helper.from_array(np.array(3, np.int64))),
        helper.make_node("Loop", ["n", "", "x"], ["last", "y"], body=body),
    ]
    return model(nodes, [value("x", [1, 2])], value("y"))


def test_loop() -> None:
    names = ["y/body/p", "last/body/p", "last/body/s", "last/body/wt", "q"]
    with pytest.raises(ModelError, match="no value 'y/body/p'"):
        tap(loop(), names)
    tapped = tap(loop(), names[1:])
    with open_session(tapped.model) as session:
        got = session.run({"x": X})
    state, states, products = X, [], []
    for _ in range(3):
        states.append(state)
        products.append(state @ W)
        state = products[-1] @ (W.T / np.float32(8))
    np.testing.assert_allclose(got[tapped.outputs["last/body/p"]], products, rtol=1e-6)
    np.testing.assert_allclose(got[tapped.outputs["last/body/s"]], states, rtol=1e-6)
    np.testing.assert_allclose(got[tapped.outputs["q"]], [*states[1:], state], rtol=1e-6)
    assert got[tapped.outputs["last/body/wt"]].shape == (3, 3, 2)
    assert not tapped.valid


def test_scan() -> None:
    body = helper.make_graph(
        [
            helper.make_node("Mul", ["e", "e"], ["sq"]),
            helper.make_node("Add", ["s", "sq"], ["s2"]),
            helper.make_node("Neg", ["s2"], ["o"]),
        ],
        "body",
        [value("s", [2]), value("e", [2])],
        [value("s2", [2]), value("o", [2])],
    )
    nodes = [
        helper.make_node("Constant", [], ["z"], value=numpy_helper.from_array(np.zeros(2, np.float32))),
        helper.make_node("Scan", ["z", "x"], ["last", "y"], body=body, num_scan_inputs=1, scan_output_axes=[1]),
    ]
    tapped = tap(model(nodes, [value("x", [4, 2])], value("y")), ["sq"])
    x = np.arange(8, dtype=np.float32).reshape(4, 2)
    with open_session(tapped.model) as session:
        got = session.run({"x": x})
    np.testing.assert_array_equal(got[tapped.outputs["sq"]], x * x)
    np.testing.assert_array_equal(got["y"], -np.cumsum(x * x, 0).T)


def test_if_in_a_loop() -> None:
    """The validity says in which iterations the branch ran."""
    then = helper.make_graph([helper.make_node("Add", ["s", "one"], ["a"])], "t", [], [value("a", [1])])
    other = helper.make_graph([helper.make_node("Sub", ["s", "one"], ["b"])], "e", [], [value("b", [1])])
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["k"], ["k2"]),
            helper.make_node("Constant", [], ["two"], value=numpy_helper.from_array(np.array(2, np.int64))),
            helper.make_node("Less", ["i", "two"], ["c"]),
            helper.make_node("If", ["c"], ["u"], then_branch=then, else_branch=other),
        ],
        "body",
        [value("i", [], TensorProto.INT64), value("k", [], TensorProto.BOOL), value("s", [1])],
        [value("k2", [], TensorProto.BOOL), value("u", [1])],
    )
    nodes = [
        helper.make_node("Constant", [], ["n"], value=numpy_helper.from_array(np.array(2, np.int64))),
        helper.make_node("Constant", [], ["one"], value=numpy_helper.from_array(np.ones(1, np.float32))),
        helper.make_node("Loop", ["n", "", "x"], ["y"], body=body),
    ]
    tapped = tap(model(nodes, [value("x", [1])], value("y")), ["a", "b"])
    with open_session(tapped.model) as session:
        got = session.run({"x": np.zeros(1, np.float32)})
    np.testing.assert_array_equal(got[tapped.valid["a"]], [True, True])
    np.testing.assert_array_equal(got[tapped.valid["b"]], [False, False])
    np.testing.assert_array_equal(got[tapped.outputs["a"]], [[1], [2]])
    assert got[tapped.outputs["b"]].shape == (2, 0)


def test_function_bodies_are_left_with_the_reason() -> None:
    message = onnx.ModelProto.FromString(to_bytes(conditional()))
    message.functions.append(
        helper.make_function(
            "f", "F", ["p"], ["q"], [helper.make_node("Relu", ["p"], ["q"])], [helper.make_opsetid("", 17)]
        )
    )
    message.opset_import.add(domain="f", version=1)
    tapped = tap(load(message), ["f::F/q", "a"])
    assert "inside a function" in tapped.left["f::F/q"]
    assert set(tapped.outputs) == {"a"}


def test_names() -> None:
    with pytest.raises(ModelError, match="no value 'none'"):
        tap(conditional(), ["none"])
    source = conditional()
    then = next(node for node in source.graph if node.op_type == "If").attributes["then_branch"].as_graph()
    then[0].outputs[0].name = "d"
    with pytest.raises(ModelError, match="2 subgraphs"):
        tap(source, ["d"])


def test_external_data_is_not_copied(tmp_path: pathlib.Path) -> None:
    source = conditional()
    big = ir.tensor(np.ones((2, 3000), np.float32), name="w")
    source.graph.initializers["w"].const_value = big
    source.graph.initializers["w"].shape = ir.Shape([2, 3000])
    path = save(source, tmp_path / "m.onnx", external=True, check=False).path
    again = load(path)
    tapped = tap(again, ["a"])
    assert tapped.model.graph.initializers["w"].const_value is again.graph.initializers["w"].const_value
    with open_session(tapped.model) as session:
        got = session.run({"x": X, "c": np.array(True), "c2": np.array(True)})
    np.testing.assert_array_equal(got[tapped.outputs["a"]], np.full((1, 3000), -1.0))
    assert {entry.name for entry in tmp_path.iterdir()} == {path.name, *(p.name for p in tmp_path.glob("*.data"))}


@pytest.mark.skipif(not os.environ.get("ONNXCOMPRESS_ZOO"), reason="ONNXCOMPRESS_ZOO is not set")
def test_every_value_of_a_model_whose_weights_lie_in_branches() -> None:
    folder = pathlib.Path(os.environ["ONNXCOMPRESS_ZOO"]) / "silero_vad"
    source = load(folder / "model.onnx")
    names = [f"{path}{v.name}" for path, owner in bridge.scopes(source) for v in values(owner) if v.name]
    tapped = tap(source, names)
    assert not tapped.left
    with np.load(folder / "feeds.npz") as data:
        calls = {name: data[name] for name in data.files}
    with open_session(source, optimize=False) as plain, open_session(tapped.model, optimize=False) as session:
        feeds = {p.name: calls[p.name][0] if calls[p.name].ndim > len(p.shape) else calls[p.name] for p in plain.inputs}
        expected, got = plain.run(feeds), session.run(feeds)
    for name, array in expected.items():
        np.testing.assert_array_equal(got[name], array)
    ran = sum(bool(got[flag]) for flag in tapped.valid.values())
    assert 0 < ran < len(tapped.valid)
