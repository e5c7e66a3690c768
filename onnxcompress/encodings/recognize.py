"""Reads an encoding back from any file: from the local function called, the Q/DQ pattern, or the integers a consumer
takes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxcompress.encodings import functions
from onnxcompress.encodings.affine import Affine
from onnxcompress.encodings.base import Encoding
from onnxcompress.encodings.codebook import Codebook
from onnxcompress.encodings.dense import Dense, Masked
from onnxcompress.encodings.sparse import Sparse

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
INTEGER_DOT = {"MatMulInteger": (1, 3), "ConvInteger": (1, 3), "QLinearMatMul": (3, 5), "QLinearConv": (3, 5)}
QUANTIZED_SUFFIXES = (".q", "_quantized", ".int8")


def constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of an initializer or of a Constant node; None for anything that is computed or fed."""
    if value is None:
        return None
    node = value.producer()
    if node is None:
        return value.const_value if value.is_initializer() else None
    if node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
        return None
    return constant_tensor(node)


def constant_tensor(node: ir.Node) -> ir.TensorProtocol | None:
    """The tensor a Constant node holds, whichever attribute holds it; None for strings and sparse tensors."""
    for name in ("value", "value_float", "value_floats", "value_int", "value_ints"):
        attribute = node.attributes.get(name)
        if attribute is None or attribute.is_ref():
            continue
        if name == "value":
            return attribute.as_tensor()
        dtype = np.float32 if "float" in name else np.int64
        return ir.tensor(np.array(attribute.value, dtype))
    return None


def parts(node: ir.Node) -> list[ir.Value] | None:
    """The constants from which `node` makes a weight, or None when it is not the last node of an encoded weight."""
    if node.domain == functions.DOMAIN:
        values = [v for v in node.inputs if v is not None]
        return values if all(constant(v) is not None for v in values) else None
    if node.op_type == "DequantizeLinear" and node.domain in ("", "com.microsoft"):
        values = [v for v in node.inputs if v is not None]
        tensors = [constant(v) for v in values]
        if all(t is not None for t in tensors) and tensors[0] is not None and tensors[0].size > 1:
            # A bias stored as int32 is a weight too; an activation's DequantizeLinear has a computed first input.
            return values
    return None


def encoded(node: ir.Node) -> Encoding:
    """The encoding that `node` (see `parts`) expands."""
    tensors = [constant(v) for v in node.inputs]
    arrays = [None if t is None else t.numpy() for t in tensors]
    present = [a for a in arrays if a is not None]
    if node.domain == functions.DOMAIN:
        if node.op_type == "ExpandSparse":
            return Sparse.recognize(dict(zip(("mask", "values", "shape"), present, strict=False)))
        if node.op_type.startswith("Depalettize"):
            named = dict(zip(("codes", "codebook", "shape", "channel"), present, strict=False))
            return Codebook.recognize(node.op_type, named)
        out = np.dtype(np.float16 if node.op_type == "DequantizeHalf" else np.float32)
        scale, zero, axis = _along(present[1], present[2])
        return Affine(present[0], scale, zero, axis, form="folded", out=out)
    return _dequantize_linear(node, *present)


def _dequantize_linear(node: ir.Node, q: np.ndarray, scale: np.ndarray, zero_point: np.ndarray | None = None) -> Affine:
    axis_attribute = node.attributes.get("axis")
    block_attribute = node.attributes.get("block_size")
    block = block_attribute.as_int() if block_attribute is not None else 0
    axis: int | None = axis_attribute.as_int() if axis_attribute is not None else 1
    if scale.ndim == 0 or (scale.ndim == 1 and scale.size == 1 and q.ndim != 1 and axis_attribute is None):
        axis = None
    elif axis is not None and axis < 0:
        axis += q.ndim
    return Affine(q, scale, zero_point, axis, block or None, out=scale.dtype)


def _along(scale: np.ndarray, zero: np.ndarray) -> tuple[np.ndarray, np.ndarray, int | None]:
    """A broadcastable scale and zero point as (scalar or 1-D, ..., axis)."""
    if scale.size == 1:
        return scale.reshape(()), zero.reshape(()), None
    axis = next(i for i, d in enumerate(scale.shape) if d != 1)
    return scale.reshape(-1), np.broadcast_to(zero, scale.shape).reshape(-1).astype(zero.dtype), axis


def integers(value: ir.Value) -> Encoding | None:
    """The affine encoding of an integer constant that its consumer takes as integers, or None."""
    tensor = constant(value)
    if tensor is None or tensor.dtype not in (ir.DataType.INT8, ir.DataType.UINT8) or value.name is None:
        return None
    for use in value.uses():
        if use.node.op_type in INTEGER_DOT and use.idx == INTEGER_DOT[use.node.op_type][0]:
            return _integer_operand(value, tensor.numpy(), use.node)
        if use.node.op_type == "Gather" and use.idx == 0 and value.name.endswith(QUANTIZED_SUFFIXES):
            return _integer_operand(value, tensor.numpy(), use.node)
    return None


def _integer_operand(value: ir.Value, q: np.ndarray, node: ir.Node) -> Affine | None:
    scale, zero = scale_of(value, node)
    if scale is None:
        return None
    axis: int | None = None
    if scale.size > 1:
        candidates = [i for i, d in enumerate(q.shape) if d == scale.size]
        preferred = {"MatMulInteger": q.ndim - 1, "QLinearMatMul": q.ndim - 1}.get(node.op_type, 0)
        if not candidates:
            return None
        axis = preferred if preferred in candidates else candidates[0]
    scale = scale.reshape(-1) if axis is not None else scale.reshape(())
    if zero is not None:
        zero = np.broadcast_to(zero.reshape(-1) if axis is not None else zero.reshape(()), scale.shape)
    return Affine(q, scale, zero, axis, form="integer", out=scale.dtype)


def scale_of(value: ir.Value, node: ir.Node) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Scale and zero point of integers: from the consumer's inputs, else from the constants named after them."""
    if node.op_type in ("QLinearMatMul", "QLinearConv"):
        scale, zero = constant(node.inputs[4]), constant(node.inputs[5])
    else:
        graph, stem = value.graph, stem_of(value.name or "")
        found = [graph.initializers.get(stem + s) for s in (".scale", "_scale")] if isinstance(graph, ir.Graph) else []
        scale = next((constant(v) for v in found if v is not None), None)
        at = INTEGER_DOT.get(node.op_type, (0, 99))[1]
        zero = constant(node.inputs[at]) if at < len(node.inputs) else None
    return (None if scale is None else scale.numpy()), (None if zero is None else zero.numpy())


def stem_of(name: str) -> str:
    """The original weight's name of an integer constant called `<name>.q` or `<name>_quantized`."""
    for suffix in QUANTIZED_SUFFIXES:
        if name.endswith(suffix):
            return name[: -len(suffix)]
    return name


def plain(tensor: ir.TensorProtocol) -> Encoding:
    """Dense, or Masked where a weight carries its pruning in its zeros."""
    if tensor.dtype in FLOATS and len(tensor.shape) >= 2:
        array = tensor.numpy()
        if Masked.recognizes(array):
            return Masked(array)
    return Dense(tensor)


def helpers(values: Sequence[ir.Value]) -> set[int]:
    """ids of values that are scales of integer operands, by name: constants of an encoding, no weights of their own."""
    named = {v.name: v for v in values if v.name}
    found = set()
    for name in named:
        for suffix in (".scale", "_scale"):
            if name.endswith(suffix):
                stem = name[: -len(suffix)]
                if any(stem + s in named for s in QUANTIZED_SUFFIXES):
                    found.add(id(named[name]))
    return found
