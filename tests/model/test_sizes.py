"""Bytes of files and tensors."""

from __future__ import annotations

import pathlib

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxcompress.errors import ModelError
from onnxcompress.model import provenance
from onnxcompress.model.load import load
from onnxcompress.model.save import save, to_bytes
from onnxcompress.model.sizes import model_bytes, payload_bytes, saved_bytes, tensor_bytes, tensors


def make() -> onnx.ModelProto:
    """An initializer, a constant, and an initializer and a constant in an If."""

    def body(name: str) -> onnx.GraphProto:
        inner = helper.make_node(
            "Constant", [], [f"k_{name}"], value=numpy_helper.from_array(np.ones((3, 5), np.float32))
        )
        add = helper.make_node("Add", [f"i_{name}", f"k_{name}"], [name])
        value = helper.make_tensor_value_info(name, TensorProto.FLOAT, [3, 5])
        return helper.make_graph(
            [inner, add], "b", [], [value], [numpy_helper.from_array(np.ones(5, np.float16), f"i_{name}")]
        )

    nodes = [
        helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(np.ones(7, np.int8))),
        helper.make_node("If", ["c"], ["y"], then_branch=body("t"), else_branch=body("e")),
    ]
    big = numpy_helper.from_array(np.arange(1000, dtype=np.float32), "w")
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("c", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, 5])],
        [big],
    )
    return helper.make_model(graph, opset_imports=[onnx.OperatorSetIdProto(version=17)], ir_version=10)


def test_tensors_everywhere() -> None:
    model = load(make())
    assert tensors(model) == {
        "w": 4000,
        "k": 7,
        "y/then/i_t": 10,
        "y/then/k_t": 60,
        "y/else/i_e": 10,
        "y/else/k_e": 60,
    }
    assert tensor_bytes(model) == 4147


def test_shared_tensor_counts_once() -> None:
    model = load(make())
    tensor = model.graph.initializers["w"].const_value
    model.graph.register_initializer(ir.Value(name="w2", const_value=tensor))
    assert tensor_bytes(model) == 4147
    assert tensors(model)["w2"] == 4000
    assert abs(saved_bytes(model) - len(to_bytes(model))) < 16


def test_saved_bytes_evaluates_nothing() -> None:
    model = load(make())

    def never() -> ir.TensorProtocol:
        raise AssertionError("evaluated")

    exact = len(to_bytes(model))
    model.graph.initializers["w"].const_value = ir.LazyTensor(never, dtype=ir.DataType.FLOAT, shape=ir.Shape([1000]))
    assert abs(saved_bytes(model) - exact) <= 8


def test_files(tmp_path: pathlib.Path) -> None:
    model = load(make())
    inline = save(model, tmp_path / "a.onnx", check=False)
    external = save(model, tmp_path / "b.onnx", external=True, check=False)
    assert model_bytes(inline.path) == inline.bytes == payload_bytes(inline.path)
    assert model_bytes(external.path) == external.bytes == sum(path.stat().st_size for path in external.files)
    assert saved_bytes(load(external.path)) == pytest.approx(inline.bytes, abs=8)
    provenance.write(model, provenance.Provenance(parent="0" * 64, recipe="x" * 500, seed=3))
    marked = save(model, tmp_path / "c.onnx", check=False)
    assert marked.bytes > inline.bytes + 500
    assert payload_bytes(marked.path) == inline.bytes
    external.files[1].unlink()
    with pytest.raises(ModelError, match=r"b\.onnx"):
        model_bytes(external.path)
