"""Which values an integer input may take: the rows of the table that it looks up, found by following it to a Gather."""

from __future__ import annotations

import onnx_ir as ir

_PASS_ON = frozenset(
    [
        "Cast",
        "Identity",
        "Reshape",
        "Unsqueeze",
        "Squeeze",
        "Flatten",
        "Slice",
        "Transpose",
        "Expand",
        "Concat",
        "Split",
        "Tile",
        "Clip",
    ]
)
_SAME_SHAPE = frozenset(["Cast", "Identity", "DequantizeLinear", "Mul", "QuantizeLinear"])
_STEPS = 10_000


def index_bounds(model: ir.Model) -> dict[str, int]:
    """For each graph input that reaches a lookup: the size of the smallest table it indexes (values 0 to size - 1)."""
    found = {}
    for value in model.graph.inputs:
        bound = _bound(value, model)
        if bound is not None and value.name:
            found[value.name] = bound
    return found


def _bound(start: ir.Value, model: ir.Model) -> int | None:
    pending, seen = [start], {id(start)}
    bounds: list[int] = []
    while pending and len(seen) < _STEPS:
        value = pending.pop()
        for node, index in value.uses():
            rows = _looked_up(node, index)
            if rows is not None:
                bounds.append(rows)
                continue
            follow: list[ir.Value] = []
            function = model.functions.get(node.op_identifier())
            if function is not None and index < len(function.inputs):
                follow = [function.inputs[index]]
            elif node.op_type in _PASS_ON and (index == 0 or node.op_type == "Concat"):
                follow = list(node.outputs)
            for other in follow:
                if id(other) not in seen:
                    seen.add(id(other))
                    pending.append(other)
    return min(bounds, default=None)


def _looked_up(node: ir.Node, index: int) -> int | None:
    """The rows of the table when input `index` of `node` is an index into one."""
    if index == 1 and node.op_type in ("Gather", "GatherElements"):
        return _dim(node.inputs[0], node.attributes.get_int("axis", 0))
    if index == 1 and node.op_type == "GatherBlockQuantized":
        return _dim(node.inputs[0], node.attributes.get_int("gather_axis", 0))
    if node.op_type == "EmbedLayerNormalization":
        table = {0: 2, 1: 4, 7: 3}.get(index)
        if table is not None and table < len(node.inputs):
            return _dim(node.inputs[table], 0)
    return None


def _dim(value: ir.Value | None, axis: int | None) -> int | None:
    """The size of one axis of a table, through the nodes that decode it."""
    for _ in range(20):
        if value is None or axis is None:
            return None
        const = value.const_value
        shape = list(const.shape) if const is not None else list(value.shape) if value.shape is not None else []
        if -len(shape) <= axis < len(shape) and isinstance(shape[axis], int):
            size = shape[axis]
            assert isinstance(size, int)
            return size
        producer = value.producer()
        if producer is None:
            return None
        if producer.op_type == "Constant":
            tensor = producer.attributes.get_tensor("value")
            return int(tensor.shape.numpy()[axis]) if tensor is not None and len(tensor.shape) else None
        if producer.op_type not in _SAME_SHAPE or not producer.inputs:
            return None
        value = producer.inputs[0]
    return None
