"""Products and lookups of weights in blocks, each with a scale of its own: MatMulNBits and GatherBlockQuantized.

ONNX Runtime may quantize what MatMulNBits multiplies with (accuracy_level 4); in training that stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from onnxcompress.autodiff.tensor import Tensor
from onnxcompress.encodings.affine import Affine
from onnxcompress.training.integers.call import Call, Refused, Table
from onnxcompress.training.integers.places import Place

_KINDS: dict[int, np.dtype[Any]] = {4: np.dtype(ml_dtypes.uint4), 8: np.dtype(np.uint8)}
BLOCKS_OPSET = 21  # QuantizeLinear in blocks, and to 4 bits
_OPERATORS = {"MatMulNBits", "GatherBlockQuantized"}


def least_opset(model: ir.Model) -> int:
    """The opset in which the blocks of `model` train; 0 where it has none."""
    return BLOCKS_OPSET if any(node.op_type in _OPERATORS for node in model.graph) else 0


def matmul_nbits(call: Call) -> Sequence[Tensor]:
    """A B', where B [N, K] lies packed in blocks along K."""
    bits, block = int(call.attr("bits", 4)), int(call.attr("block_size"))
    rows, columns = int(call.attr("N")), int(call.attr("K"))
    packed, scale, zero = (call.constant(i) for i in (1, 2, 3))
    if packed is None or scale is None or (call.has(3) and zero is None):
        raise Refused("and computes its weight")
    if call.has(4):
        raise Refused("and groups it by an index")
    kind, blocks = _kind(call, bits), -(-columns // block)
    whole = _unpacked(packed.reshape(rows, -1), bits)
    if zero is None:
        zeros = np.full((rows, blocks), 1 << bits - 1, np.uint8)
    elif zero.dtype != np.uint8:
        raise Refused("and its zero points are floats")
    else:
        zeros = _unpacked(zero.reshape(rows, -1), bits)[:, :blocks]
    encoding = Affine(whole[:, :columns].astype(kind), scale.reshape(rows, blocks), zeros.astype(kind), 1, block)

    def pack(q: np.ndarray) -> np.ndarray:
        return _packed(np.concatenate([q.astype(np.uint8), whole[:, columns:]], axis=1), bits)

    weight = call.train(Place(call.key(1), call.name(1), call.name(2), encoding, pack))
    y = call.x(0) @ weight.transpose([1, 0])
    return [y + call.x(5) if call.has(5) else y]


def gather_block_quantized(call: Call) -> Sequence[Tensor]:
    """Gather of a table in blocks along its last axis, dequantized."""
    bits, block = int(call.attr("bits", 4)), int(call.attr("block_size", 128))
    data, scale, zero = (call.constant(i) for i in (0, 2, 3))
    if data is None or scale is None or (call.has(3) and zero is None):
        raise Refused("and computes its table")
    last = data.ndim - 1
    if call.attr("quantize_axis", 1) % data.ndim != last:
        raise Refused("and its blocks lie along another axis than the last")
    if data.dtype != np.uint8:  # 4-bit tensors, one element each
        encoding, pack = Affine(data, scale, zero, last, block), _same
        _check_opset(call)
    else:
        kind = _kind(call, bits)
        zeros = np.full(scale.shape, 1 << bits - 1, np.uint8) if zero is None else _unpacked(zero, bits)
        zeros = zeros[..., : scale.shape[-1]].astype(kind)
        encoding = Affine(_unpacked(data, bits).astype(kind), scale, zeros, last, block)

        def pack(q: np.ndarray) -> np.ndarray:
            return _packed(q.astype(np.uint8), bits)

    table = call.train(Place(call.key(0), call.name(0), call.name(2), encoding, pack))
    return [call.b.op("Gather", table, call.x(1), axis=int(call.attr("gather_axis", 0)))]


def _kind(call: Call, bits: int) -> np.dtype[Any]:
    if bits not in _KINDS:
        raise Refused(f"and {bits} bits have no float form")
    _check_opset(call)
    return _KINDS[bits]


def _check_opset(call: Call) -> None:
    if call.b.opset < BLOCKS_OPSET:
        raise Refused(f"and blocks train from opset {BLOCKS_OPSET} on, to which this model could not be lifted")


def _same(q: np.ndarray) -> np.ndarray:
    return q


def _unpacked(packed: np.ndarray, bits: int) -> np.ndarray:
    """Integers of `bits` bits, one a byte, from bytes that hold the first in their lowest bits."""
    if bits == 8:
        return packed
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((packed[..., None] >> shifts) & ((1 << bits) - 1)).reshape(*packed.shape[:-1], -1)


def _packed(integers: np.ndarray, bits: int) -> np.ndarray:
    if bits == 8:
        return integers
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    lanes = integers.reshape(*integers.shape[:-1], -1, len(shifts)) << shifts
    packed: np.ndarray = np.bitwise_or.reduce(lanes, axis=-1)
    return packed.astype(np.uint8)


TABLE: Table = {
    ("com.microsoft", "MatMulNBits"): matmul_nbits,
    ("com.microsoft", "GatherBlockQuantized"): gather_block_quantized,
}
