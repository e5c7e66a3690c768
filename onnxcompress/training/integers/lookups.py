"""Rows that are looked up as integers, and become numbers after that."""

from __future__ import annotations

from collections.abc import Sequence

from onnxcompress.autodiff.tensor import Tensor
from onnxcompress.encodings import recognize
from onnxcompress.training.integers.call import Call, Refused, Table, readers


def gather(call: Call) -> Sequence[Tensor]:
    """Gather of integers, then DequantizeLinear; or then Cast, and the rows' scale multiplied in by nodes behind."""
    if recognize.integers(call.value(0)) is None:
        raise Refused("which is no weight")
    ends = [node for node in call.leaves("DequantizeLinear") if node.op_type == "DequantizeLinear"]
    axis = int(call.attr("axis", 0))
    if not ends:
        table, steps = call.scaled(0, None, 0)
        rows = call.b.op("Gather", table, call.x(1), axis=axis)
        if steps.rank == 0:
            return [rows / steps]
        if axis:
            raise Refused("and its rows have scales of their own")
        return [rows / call.b.op("Gather", call.along(steps, len(table.shape or ()) - 1), call.x(1))]
    parts = {tuple(id(value) for value in node.inputs[1:]) for node in ends}
    _, scale, *zero = ends[0].inputs
    if len(parts) > 1 or any(node not in ends for node in readers(call.node.outputs[0])) or scale is None:
        raise Refused("and its rows become numbers in several ways")
    tensor = recognize.constant(scale)
    if tensor is None or tensor.size > 1:
        raise Refused("and its rows become numbers with scales of their own")
    rows = call.b.op("Gather", call.weight(0, scale, zero[0] if zero else None, None), call.x(1), axis=axis)
    call.ends.extend((node, rows) for node in ends)
    return [rows]


TABLE: Table = {("", "Gather"): gather}
