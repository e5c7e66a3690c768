"""Reads an encoding back from any file: from the local function called, the Q/DQ pattern, or the integers a consumer
takes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from onnxcompress.encodings import functions
from onnxcompress.encodings.affine import Affine
from onnxcompress.encodings.base import Encoding
from onnxcompress.encodings.codebook import Codebook
from onnxcompress.encodings.dense import Dense, Masked
from onnxcompress.encodings.sparse import Sparse
from onnxcompress.errors import ModelError

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
QUANTIZED_SUFFIXES = (".q", "_quantized", ".int8")


class Operand(NamedTuple):
    """An input where an operator takes a weight as integers, and where it takes their scale and zero point."""

    at: int
    scale: int | None = None
    zero_point: int | None = None


OPERANDS = {
    "MatMulInteger": (Operand(1, None, 3), Operand(0, None, 2)),
    "ConvInteger": (Operand(1, None, 3),),
    "QLinearMatMul": (Operand(3, 4, 5), Operand(0, 1, 2)),
    "QLinearConv": (Operand(3, 4, 5),),
    "QGemm": (Operand(3, 4, 5),),
    "DynamicQuantizeMatMul": (Operand(1, 2, 3),),
    "MatMulIntegerToFloat": (Operand(1, 3, 5),),
    "DynamicQuantizeLSTM": (Operand(1, 8, 9), Operand(2, 10, 11)),
    "QAttention": (Operand(1, 4, 7),),
    "QEmbedLayerNormalization": (Operand(2, 8, 13), Operand(3, 9, 14), Operand(4, 10, 15)),
    "MatMulNBits": (Operand(1, 2, 3),),
    "GatherBlockQuantized": (Operand(0, 2, 3),),
}
# Scales of what is no weight.
_ACTIVATION_SCALES = {
    "QuantizeLinear": (1,),
    "DequantizeLinear": (1,),
    "QLinearConv": (1, 6),
    "QLinearMatMul": (1, 6),
    "QGemm": (1, 7),
    "MatMulIntegerToFloat": (2,),
    "QAttention": (3,),
    "QEmbedLayerNormalization": (11, 12),
}


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


def is_noted(value: ir.Value) -> bool:
    """Whether the file says of a weight, plain or in integers, that its zeros are structure (`Masked.KEY`)."""
    end = value.producer()
    held = end.inputs[0] if end is not None and parts(end) is not None else value
    tensor = constant(held)
    return tensor is not None and Masked.KEY in tensor.metadata_props


def parts(node: ir.Node) -> list[ir.Value] | None:
    """The constants from which `node` makes a weight, or None when it is not the last node of an encoded weight."""
    values = [v for v in node.inputs if v is not None]
    if node.domain == functions.DOMAIN:
        if len(values) != functions.inputs_of(node.op_type):
            return None
    elif node.op_type != "DequantizeLinear" or node.domain not in ("", "com.microsoft"):
        return None
    tensors = [constant(v) for v in values]
    if len(values) < 2 or any(t is None for t in tensors):
        return None
    # A bias stored as int32 is a weight too; an activation's DequantizeLinear has a computed first input.
    return values if tensors[0] is not None and (tensors[0].size > 1 or node.domain == functions.DOMAIN) else None


def only_part(value: ir.Value) -> bool:
    """True for a constant that serves encoded weights and nothing else."""
    uses = value.uses()
    return bool(uses) and not value.is_graph_output() and all(parts(use.node) is not None for use in uses)


def shape(node: ir.Node) -> tuple[int, ...]:
    """Shape of the weight that `node` (see `parts`) expands, without expanding it."""
    stored = constant(node.inputs[2] if _shape_is_input(node) else node.inputs[0])
    assert stored is not None
    return tuple(int(d) for d in stored.numpy()) if _shape_is_input(node) else tuple(stored.shape.numpy())


def _shape_is_input(node: ir.Node) -> bool:
    return node.domain == functions.DOMAIN and not node.op_type.startswith("Dequantize")


def encoded(node: ir.Node) -> Encoding:
    """The encoding that `node` (see `parts`) expands.

    Raises:
        ModelError: its constants do not fit together.
    """
    arrays = [t.numpy() for t in map(constant, node.inputs) if t is not None]
    masked = is_noted(node.outputs[0])
    try:
        if node.domain != functions.DOMAIN:
            return dataclasses.replace(_dequantize_linear(node, *arrays), masked=masked)
        if node.op_type == functions.EXPAND_SPARSE:
            return Sparse.recognize(arrays)
        if node.op_type.startswith("Dequantize"):
            return dataclasses.replace(_dequantize(node.op_type, *arrays), masked=masked)
        return Codebook.recognize(node.op_type, arrays)
    except (ValueError, IndexError, TypeError, StopIteration) as error:
        raise ModelError(
            f"{node.outputs[0].name}: is no valid {node.op_type} of constants ({error}); export the model again"
        ) from error


def _dequantize(name: str, q: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> Affine:
    out = functions.DEQUANTIZE[name.removeprefix("Dequantize")].numpy()
    if scale.size == 1:
        return Affine(q, scale.reshape(()), zero.reshape(()), None, form="folded", out=out)
    (axis,) = (i for i, d in enumerate(scale.shape) if d != 1)
    return Affine(q, scale.reshape(-1), zero.reshape(-1), axis - scale.ndim + q.ndim, form="folded", out=out)


def _dequantize_linear(node: ir.Node, q: np.ndarray, scale: np.ndarray, zero_point: np.ndarray | None = None) -> Affine:
    def integer(name: str, default: int) -> int:
        attribute = node.attributes.get(name)
        return default if attribute is None else attribute.as_int()

    block, to = integer("block_size", 0), integer("output_dtype", 0)
    axis = None if scale.size == 1 and not block else integer("axis", 1)
    return Affine(q, scale, zero_point, axis, block or None, out=ir.DataType(to).numpy() if to else scale.dtype)


def integers(value: ir.Value) -> Affine | None:
    """The affine encoding of an integer constant that its consumer takes as integers, or None.

    Where the file computes their scale or lays them out in a way of its own, they decode to themselves.
    """
    tensor = constant(value)
    if tensor is None or tensor.dtype in FLOATS or tensor.dtype.bitwidth > 8 or value.name is None or tensor.size < 2:
        return None
    for use in value.uses():
        operand = next((o for o in OPERANDS.get(use.node.op_type, ()) if o.at == use.idx), None)
        if operand is not None:
            return _operand(value, tensor.numpy(), use.node, operand)
        if use.node.op_type == "Gather" and use.idx == 0 and value.name.endswith(QUANTIZED_SUFFIXES):
            return _operand(value, tensor.numpy(), use.node, Operand(0)) if _scale_named(value) is not None else None
    return None


def _operand(value: ir.Value, q: np.ndarray, node: ir.Node, operand: Operand) -> Affine:
    scale = _scale_named(value) if operand.scale is None else _array(node, operand.scale)
    zero = _array(node, operand.zero_point)
    unscaled = Affine(q, np.ones((), np.float32), None, form="integer")
    known = node.op_type not in ("MatMulNBits", "GatherBlockQuantized") and q.dtype.kind in "iu"
    if scale is None or not known or (scale.size > 1 and scale.size != max(scale.shape)):
        return unscaled
    axis: int | None = None
    if scale.size > 1:
        candidates = [i for i, d in enumerate(q.shape) if d == scale.size]
        last = node.op_type not in ("QLinearConv", "ConvInteger", "Gather")
        preferred = q.ndim - 1 if last else 0
        if not candidates:
            return unscaled
        axis = preferred if preferred in candidates else candidates[0]
    scale = scale.reshape(-1) if axis is not None else scale.reshape(())
    if zero is not None:
        if zero.size not in (1, scale.size):
            return unscaled
        zero = np.broadcast_to(zero.reshape(-1 if axis is not None else ()), scale.shape)
    return Affine(q, scale, zero, axis, form="integer", out=scale.dtype, masked=is_noted(value))


def _array(node: ir.Node, index: int | None) -> np.ndarray | None:
    tensor = constant(node.inputs[index]) if index is not None and index < len(node.inputs) else None
    return None if tensor is None else tensor.numpy()


def _scale_named(value: ir.Value) -> np.ndarray | None:
    """The scale of integers whose consumer does not take it, by its name beside theirs."""
    graph, stem = value.graph, stem_of(value.name or "")
    found = [graph.initializers.get(stem + s) for s in (".scale", "_scale")] if isinstance(graph, ir.Graph) else []
    tensor = next((constant(v) for v in found if v is not None), None)
    return None if tensor is None else tensor.numpy()


def is_scale(value: ir.Value) -> bool:
    """True for the scale of an activation's or a weight's quantization, and nothing else."""
    uses = value.uses()
    return bool(uses) and all(
        use.idx in _ACTIVATION_SCALES.get(use.node.op_type, ())
        or any(use.idx in (o.scale, o.zero_point) for o in OPERANDS.get(use.node.op_type, ()))
        for use in uses
    )


def stem_of(name: str) -> str:
    """The original weight's name of an integer constant called `<name>.q` or `<name>_quantized`."""
    for suffix in QUANTIZED_SUFFIXES:
        if name.endswith(suffix) and name != suffix:
            return name[: -len(suffix)]
    return name


def plain(tensor: ir.TensorProtocol, layer: bool) -> Encoding:
    """Dense, or Masked where a weight of a layer carries its pruning in its zeros, or its metadata says so."""
    if Masked.KEY in tensor.metadata_props:
        return Masked(tensor.numpy())
    if layer and tensor.dtype in FLOATS and len(tensor.shape) >= 2:
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
