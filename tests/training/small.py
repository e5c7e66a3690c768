"""Small networks and data that the tests of training share."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from onnxcompress.data.batch import Data
from onnxcompress.data.source import open_data
from onnxcompress.data.specs import input_specs
from onnxcompress.model.load import load
from onnxcompress.runtime.session import open_session
from tests.builders import floats, graph, info, model, node, tensors


def mlp(head: str = "", batch: int | str = "n") -> onnx.ModelProto:
    """x [n, 6] -> Gemm [6, 200] -> Relu -> Gemm [200, 4] -> (Softmax); the first weight is too large to be packed."""
    nodes = [
        node("Gemm", ["x", "w1", "b1"], ["h"], name="one"),
        node("Relu", ["h"], ["r"], name="relu"),
        node("Gemm", ["r", "w2", "b2"], ["z"], name="two"),
    ]
    if head:
        nodes.append(node(head, ["z"], ["y"], name="head"))
    arrays = {
        "w1": floats(6, 200, seed=1) * 0.4,
        "b1": floats(200, seed=2) * 0.1,
        "w2": floats(200, 4, seed=3) * 0.1,
        "b2": floats(4, seed=4) * 0.1,
    }
    output = info("y" if head else "z", [batch, 4])
    return model(graph(nodes, [info("x", [batch, 6])], [output], tensors(**arrays)))


def arrays(count: int = 64, seed: int = 5) -> dict[str, np.ndarray]:
    """Inputs and labels that depend on them."""
    x = floats(count, 6, seed=seed)
    return {"x": x, "y": (np.abs(x[:, :4])).argmax(1).astype(np.int64)}


def opened(of: ir.Model, source: Mapping[str, np.ndarray] | pathlib.Path, batch: int = 16) -> Data:
    """Data as training reads it."""
    return open_data(source, input_specs(of), batch=batch, trim=False, last="fill")


def outputs(of: ir.Model | onnx.ModelProto, feeds: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """One run."""
    loaded = of if isinstance(of, ir.Model) else load(of)
    with open_session(loaded) as session:
        return session.run(feeds)


def normalized(batch: int | str = "n") -> onnx.ModelProto:
    """x [n, 6] -> MatMul [6, 16] -> BatchNormalization -> Relu -> Gemm [16, 4] = z."""
    nodes = [
        node("MatMul", ["x", "w1"], ["h"], name="one"),
        node("BatchNormalization", ["h", "scale", "shift", "mean", "var"], ["n"], name="norm", momentum=0.8),
        node("Relu", ["n"], ["r"], name="relu"),
        node("Gemm", ["r", "w2", "b2"], ["z"], name="two"),
    ]
    arrays = {
        "w1": floats(6, 16, seed=1) * 3,
        "scale": np.linspace(0.5, 1.5, 16, dtype=np.float32),
        "shift": floats(16, seed=2) * 0.1,
        "mean": floats(16, seed=6),
        "var": np.linspace(0.1, 2, 16, dtype=np.float32),
        "w2": floats(16, 4, seed=3) * 0.3,
        "b2": floats(4, seed=4) * 0.1,
    }
    return model(graph(nodes, [info("x", [batch, 6])], [info("z", [batch, 4])], tensors(**arrays)))


def tagger(classes: int = 3) -> onnx.ModelProto:
    """input_ids [n, s] -> Gather [11, 8] -> x attention_mask = h -> MatMul [8, 8] -> Tanh = t -> MatMul = logits."""
    nodes = [
        node("Gather", ["table", "input_ids"], ["e"], name="embed"),
        node("Cast", ["attention_mask"], ["real"], name="real", to=onnx.TensorProto.FLOAT),
        node("Unsqueeze", ["real", "last"], ["column"], name="column"),
        node("Mul", ["e", "column"], ["h"], name="mask"),
        node("MatMul", ["h", "w1"], ["m"], name="one"),
        node("Tanh", ["m"], ["t"], name="tanh"),
        node("MatMul", ["t", "w2"], ["logits"], name="two"),
    ]
    kind = onnx.TensorProto.INT64
    given = tensors(
        table=floats(11, 8, seed=1),
        w1=floats(8, 8, seed=2),
        w2=floats(8, classes, seed=3),
        last=np.array([2], np.int64),
    )
    inputs = [info("input_ids", ["n", "s"], kind), info("attention_mask", ["n", "s"], kind)]
    return model(graph(nodes, inputs, [info("logits", ["n", "s", classes])], given))


def sequences(count: int = 48, longest: int = 9, seed: int = 7) -> dict[str, np.ndarray]:
    """Token sequences of different lengths, padded."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(2, longest + 1, count)
    mask = (np.arange(longest) < lengths[:, None]).astype(np.int64)
    return {"input_ids": generator.integers(1, 11, (count, longest)) * mask, "attention_mask": mask}


def half(of: onnx.ModelProto) -> onnx.ModelProto:
    """The same model with weights and computation in float16; inputs and outputs too."""
    made = onnx.ModelProto()
    made.CopyFrom(of)
    for tensor in made.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            array = onnx.numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    for value in (*made.graph.input, *made.graph.output):
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    for each in made.graph.node:
        for attribute in each.attribute:
            if attribute.name == "to" and attribute.i == onnx.TensorProto.FLOAT:
                attribute.i = onnx.TensorProto.FLOAT16
    return made
