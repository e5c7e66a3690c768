"""Small models and encodings that tests share."""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from onnxcompress.encodings import Affine, Codebook, Dense, Encoding, Masked, Sparse
from onnxcompress.model.load import load
from onnxcompress.model.save import to_bytes
from onnxcompress.model.weights import Weight, weights

node = helper.make_node
ort.set_default_logger_severity(3)


def floats(*shape: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
    """Standard normal values."""
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def info(name: str, shape: Sequence[int | str], dtype: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    """A declared input or output."""
    return helper.make_tensor_value_info(name, dtype, shape)


def tensors(**arrays: np.ndarray) -> list[onnx.TensorProto]:
    """Named tensors; a double underscore in a name stands for a dot."""
    return [numpy_helper.from_array(array, name.replace("__", ".")) for name, array in arrays.items()]


def constant(name: str, array: np.ndarray) -> onnx.NodeProto:
    """A Constant node."""
    return node("Constant", [], [name], value=numpy_helper.from_array(array, name))


def graph(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    initializers: Sequence[onnx.TensorProto] = (),
    name: str = "g",
) -> onnx.GraphProto:
    """A graph."""
    return helper.make_graph(list(nodes), name, list(inputs), list(outputs), list(initializers))


def model(
    body: onnx.GraphProto,
    opset: int = 17,
    ir_version: int = 8,
    functions: Sequence[onnx.FunctionProto] = (),
    domains: Mapping[str, int] | None = None,
) -> onnx.ModelProto:
    """A model. `domains`: further opset imports."""
    imports = [helper.make_opsetid("", opset)]
    imports += [helper.make_opsetid(name, version) for name, version in (domains or {}).items()]
    made = helper.make_model(body, opset_imports=imports, functions=list(functions), ir_version=ir_version)
    made.producer_name = ""
    return made


def function(
    name: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    nodes: Sequence[onnx.NodeProto],
    opset: int = 17,
    domain: str = "test",
) -> onnx.FunctionProto:
    """A local function; it may call others of its domain."""
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(domain, 1)]
    return helper.make_function(domain, name, list(inputs), list(outputs), list(nodes), imports)


def holding(array: np.ndarray, opset: int = 17, ir_version: int = 8) -> onnx.ModelProto:
    """A model that gives the float weight "w" out, through a Reshape to its own shape, and takes a float x."""
    dtype = helper.np_dtype_to_tensor_dtype(array.dtype)
    body = graph(
        [node("Identity", ["w"], ["y"]), node("Identity", ["x"], ["z"])],
        [info("x", [1])],
        [info("y", array.shape, dtype), info("z", [1])],
        tensors(w=array),
    )
    if ir_version < 4:
        body.input.append(info("w", array.shape, dtype))
    return model(body, opset, ir_version)


def opened(proto: onnx.ModelProto) -> ir.Model:
    """The model as the project loads it."""
    return load(proto.SerializeToString())


def by_key(found: ir.Model) -> dict[str, Weight]:
    """The weights by key, which must be unique."""
    listed = weights(found)
    keyed = {weight.key: weight for weight in listed}
    assert len(keyed) == len(listed)
    return keyed


def checked(found: ir.Model) -> bytes:
    """The serialized model, accepted by the full checker."""
    data = to_bytes(found)
    onnx.checker.check_model(onnx.load_from_string(data), full_check=True)
    return data


def session(data: bytes, optimize: bool = True, entries: Mapping[str, str] | None = None) -> ort.InferenceSession:
    """A one-thread CPU session."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    for key, value in (entries or {}).items():
        options.add_session_config_entry(key, value)
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def run(
    data: bytes,
    feeds: Mapping[str, np.ndarray] | None = None,
    optimize: bool = True,
    entries: Mapping[str, str] | None = None,
) -> list[np.ndarray]:
    """The outputs, in order; bfloat16 ones as such. Without feeds a single float x of 1."""
    made = session(data, optimize, entries)
    feeds = {"x": np.ones(1, np.float32)} if feeds is None else feeds
    names = [port.name for port in made.get_inputs()]
    given = {name: ort.OrtValue.ortvalue_from_numpy(feeds[name]) for name in names}
    found = made.run_with_ort_values([port.name for port in made.get_outputs()], given)
    return [_numpy(value) for value in found]


def _numpy(value: ort.OrtValue) -> np.ndarray:
    if value.data_type() == "tensor(bfloat16)":
        import ctypes

        size = int(np.prod(value.shape())) * 2
        raw = ctypes.string_at(value.data_ptr(), size)
        return np.frombuffer(raw, ml_dtypes.bfloat16).reshape(value.shape())
    array: np.ndarray = value.numpy()
    return array


def optimized(data: bytes) -> onnx.ModelProto:
    """What ONNX Runtime makes of a model before it runs it (basic optimizations, among them constant folding)."""
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(pathlib.Path(folder) / "optimized.onnx")
        ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        return onnx.load(options.optimized_model_filepath)


def op_types(found: onnx.GraphProto) -> set[str]:
    """Operators of a graph and its subgraphs."""
    types = set()
    for each in found.node:
        types.add(each.op_type)
        for attribute in each.attribute:
            for inner in [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]:
                types |= op_types(inner)
    return types


# DequantizeLinear before a product is fused with it; without this, activations are rounded to int8 on the way.
FLOAT_ACTIVATIONS = {"session.qdq_matmulnbits_accuracy_level": "0"}


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """True for equal type, shape and bits."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


# Encodings of any weight ----------------------------------------------------------------------------------------------


def codebook(array: np.ndarray, k: int, axis: int | None = None, half: bool = False) -> Codebook:
    """`array` on k evenly spaced levels, of all or of each index of `axis`."""
    wide = array.astype(np.float32)
    rows = wide.reshape(1, -1) if axis is None else np.moveaxis(wide, axis, 0).reshape(wide.shape[axis], -1)
    low, high = rows.min(axis=1, keepdims=True), rows.max(axis=1, keepdims=True)
    step = np.where(high > low, high - low, 1)
    table = (low + (high - low) * np.linspace(0, 1, k, dtype=np.float32)).astype(np.float16 if half else array.dtype)
    codes = np.rint((rows - low) / step * (k - 1)).astype(np.uint8)
    if axis is None:
        return Codebook(codes.reshape(array.shape), table[0], out=array.dtype)
    moved = codes.reshape(array.shape[axis], *[d for i, d in enumerate(array.shape) if i != axis])
    return Codebook(np.ascontiguousarray(np.moveaxis(moved, 0, axis)), table, axis, array.dtype)


def halved(array: np.ndarray) -> np.ndarray:
    """`array` with its smaller half set to zero."""
    wide = np.abs(array.astype(np.float32))
    return np.where(wide > np.median(wide), array, np.zeros((), array.dtype))


def affine(array: np.ndarray, form: Any, axis: int | None = None, q: str = "int8", zero: bool = False) -> Affine:
    """`array` as 8-bit integers, with scales along `axis`."""
    wide = array.astype(np.float32)
    others = tuple(i for i in range(wide.ndim) if i != axis)
    most = np.abs(wide).max(axis=others, keepdims=True) if axis is not None else np.abs(wide).max(keepdims=True)
    scale = np.where(most > 0, most, 1) / np.float32(127)
    shape = () if axis is None else (-1,)
    at = np.asarray({"int8": 3, "uint8": 128}[q] if zero else {"int8": 0, "uint8": 128}[q], q)
    limits = np.iinfo(q)
    levels = np.clip(np.rint(wide / scale) + at.astype(np.float32), limits.min, limits.max).astype(q)
    zero_point = np.broadcast_to(at, scale.reshape(shape).shape).copy() if zero or q == "uint8" else None
    dtype = np.float32 if form == "folded" else array.dtype
    return Affine(levels, scale.reshape(shape).astype(dtype), zero_point, axis, form=form, out=array.dtype)


ENCODERS: dict[str, Callable[[np.ndarray, int | None], Encoding]] = {
    "dense": lambda w, axis: Dense((w * 2).astype(w.dtype)),
    "masked": lambda w, axis: Masked(halved(w)),
    "sparse": lambda w, axis: Sparse.pack(halved(w)),
    "codebook-2": lambda w, axis: codebook(w, 2),
    "codebook-3": lambda w, axis: codebook(w, 3),
    "codebook-16": lambda w, axis: codebook(w, 16),
    "codebook-200": lambda w, axis: codebook(w, 200),
    "codebook-half": lambda w, axis: codebook(w, 16, half=True),
    "channels-3": lambda w, axis: codebook(w, 3, axis),
    "channels-16": lambda w, axis: codebook(w, 16, axis),
    "channels-half": lambda w, axis: codebook(w, 16, axis, half=True),
    "folded": lambda w, axis: affine(w, "folded"),
    "folded-channels": lambda w, axis: affine(w, "folded", axis),
    "folded-zero": lambda w, axis: affine(w, "folded", axis, "uint8", zero=True),
    "dequantize": lambda w, axis: affine(w, "dequantize-linear"),
    "dequantize-channels": lambda w, axis: affine(w, "dequantize-linear", axis),
    "dequantize-zero": lambda w, axis: affine(w, "dequantize-linear", axis, "int8", zero=True),
}
