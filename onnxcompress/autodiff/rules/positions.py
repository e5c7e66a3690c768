"""One rule for every operator that only copies elements.

Applied to the positions 0, 1, 2, ... of its input, such an operator says for each output element where it came from;
the gradient is added there. Positions are computed in the graph, so this holds for dynamic shapes, negative steps,
reflected borders and repeated indices alike. Where a direct inverse exists (Transpose, Pad for Slice) it is cheaper.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from onnxcompress.autodiff.rule import Context
from onnxcompress.autodiff.tensor import Tensor


def scatter_back(c: Context, dtype: ir.DataType = ir.DataType.INT64) -> Tensor:
    """The gradient of input 0 of an operator that copies some of its elements, each to any number of places.

    `dtype`: the integer type the operator's kernel takes.
    """
    b, x = c.b, c.x[0]
    total = b.op("Size", x, shape=())
    line = b.op("Range", b.constant(0, ir.DataType.INT64), total, b.constant(1, ir.DataType.INT64), shape=(None,))
    positions = line.cast(dtype).reshape_like(x)
    attributes: dict[str, Any] = dict(c.node.attributes.items())
    source = b.op(c.node.op_type, positions, *c.x[1 : len(c.node.inputs)], **attributes)
    return add_at(c, x, source.cast(ir.DataType.INT64), c.g)


def add_at(c: Context, like: Tensor, positions: Tensor, updates: Tensor, overlap: bool = True) -> Tensor:
    """Zeros shaped like `like`, with `updates` added at flat `positions`. `overlap`: a position may stand twice."""
    b = c.b
    size = b.op("Size", like, shape=()).reshape([1])
    flat = b.zeros(size, updates.dtype)
    reduction = "add" if overlap else None
    args = (positions.reshape([-1]), updates.reshape([-1]))
    return b.op("ScatterElements", flat, *args, axis=0, reduction=reduction).reshape_like(like)
