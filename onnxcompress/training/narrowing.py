"""Compute only the positions that the loss reads.

A classifier that looks at the first token throws away what its last layer made of all the others. A node that picks one
index along an axis (Gather, Slice) is moved up through operators that treat the positions along that axis alike, so
that these run, forward and backward, for one position. It stops where another position is needed (keys and values of
attention) and where a value has another use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from onnxcompress.autodiff.builder import Builder
from onnxcompress.autodiff.rule import PARTIALS

Axes = Sequence["int | None"] | None
"""For each input the axis along which it is narrowed with the output, None for an input taken whole; or: impossible."""

END = 2**63 - 1
PRODUCTS = {"MatMul", "Gemm"}
BROADCASTING = {
    *(op for domain, op in PARTIALS if not domain),
    *("Cast", "Clip", "Elu", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Max", "Min", "Mish", "Pow", "Sum"),
    *("Swish", "Where"),
}


def narrow(model: ir.Model) -> int:
    """Move picked positions up in the main graph, in place; types and shapes must be on its values.

    Only where that spares a matrix product work. Returns how many nodes were narrowed.
    """
    count = 0
    for node in list(model.graph):
        pick = _pick(node)
        if pick is not None and node.graph is model.graph:
            count += _Cone(model, node, *pick).apply()
    return count


def _pick(node: ir.Node) -> tuple[int, int] | None:
    """The axis and the one constant index that a node selects."""
    x = node.inputs[0] if node.inputs else None
    if node.domain or x is None or x.shape is None or x.producer() is None:
        return None
    rank = len(x.shape)
    if node.op_type == "Gather":
        index, axis = _constant(node, 1), node.attributes.get_int("axis", 0)
        return None if index is None or index.size != 1 else (axis % rank, int(index.reshape(-1)[0]))
    if node.op_type == "Slice" and len(node.inputs) > 3:
        given = [_constant(node, i) for i in range(1, 5 if len(node.inputs) > 4 else 4)]
        if any(a is None or a.size != 1 for a in given):
            return None
        start, end, axis, *step = (int(a.reshape(-1)[0]) for a in given if a is not None)
        if step in ([], [1]) and (end == start + 1 != 0 or (start == -1 and end >= 2**31 - 1)):
            return axis % rank, start
    return None


class _Cone:
    """The nodes above `pick`, which selects `index` along `axis`, that need to work for that index only."""

    def __init__(self, model: ir.Model, pick: ir.Node, axis: int, index: int) -> None:
        self.graph, self.pick, self.index = model.graph, pick, index
        self.b = Builder(model.graph, model.opset_imports[""])
        source = pick.inputs[0]
        assert source is not None
        self.axis = {source: axis}
        self.asked: dict[ir.Value, set[tuple[ir.Node, int]]] = {source: {(pick, 0)}}
        self.nodes: list[ir.Node] = []
        self.refused: set[ir.Value] = set()
        self._grow()

    def _grow(self) -> None:
        order = list(self.graph)
        for node in reversed(order[: order.index(self.pick)]):
            y = node.outputs[0]
            if y not in self.asked or y in self.refused or not self._alone(node):
                continue
            axes = _axes(node, self.axis[y])
            if axes is None:
                continue
            self.nodes.append(node)
            for position, (x, axis) in enumerate(zip(node.inputs, axes, strict=True)):
                if x is None or axis is None:
                    continue
                if self.axis.setdefault(x, axis) != axis:
                    self.refused.add(x)  # it is wanted along two axes: whole, then
                self.asked.setdefault(x, set()).add((node, position))

    def _alone(self, node: ir.Node) -> bool:
        """True when nobody needs the other positions of what `node` makes."""
        y = node.outputs[0]
        uses = {(use.node, use.idx) for use in y.uses()}
        others = any(other.uses() or other.is_graph_output() for other in node.outputs[1:])
        return not others and not y.is_graph_output() and uses == self.asked[y]

    def apply(self) -> int:
        """Narrow the nodes; the number of them."""
        if self.refused or not PRODUCTS & {node.op_type for node in self.nodes}:
            return 0
        made = {node.outputs[0] for node in self.nodes}
        for node in self.nodes:
            y, axis = node.outputs[0], self.axis[node.outputs[0]]
            if node.op_type == "Reshape":
                node.replace_input_with(1, self._target(node, axis))
            assert y.shape is not None
            y.shape = ir.Shape([1 if i == axis else size for i, size in enumerate(y.shape)])
        for value, uses in self.asked.items():
            if value not in made:
                part = self._sliced(value, self.axis[value])
                for node, position in uses:
                    node.replace_input_with(position, part)
        self._pick_the_only()
        return len(self.nodes)

    def _sliced(self, value: ir.Value, axis: int) -> ir.Value:
        """One position of a value from above the cone."""
        assert value.shape is not None
        end = self.index + 1 or END
        bounds = [self.b.constant(np.array([n], np.int64)).value for n in (self.index, end, axis)]
        shape = [1 if i == axis else size for i, size in enumerate(value.shape)]
        return self._node("Slice", [value, *bounds], f"{value.name}/position", shape, value.dtype)

    def _target(self, node: ir.Node, axis: int) -> ir.Value:
        """The sizes a Reshape is to make, now with 1 along `axis`."""
        given, sizes = node.inputs[1], _constant(node, 1)
        assert given is not None
        if sizes is not None:
            sizes = np.array(sizes)
            sizes[axis] = 1
            return self.b.constant(sizes).value
        rank = len(node.outputs[0].shape or ())
        cut = [self.b.constant(np.array([n], np.int64)).value for n in (0, axis, axis + 1, END)]
        before, after = (
            self._node("Slice", [given, *pair], f"{given.name}/{word}", [size], ir.DataType.INT64, node)
            for pair, word, size in ((cut[:2], "before", axis), (cut[2:], "after", rank - axis - 1))
        )
        one = self.b.constant(np.array([1], np.int64)).value
        return self._node("Concat", [before, one, after], f"{given.name}/one", [rank], ir.DataType.INT64, node, axis=0)

    def _node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        name: str,
        shape: Sequence[int | ir.SymbolicDim],
        dtype: ir.DataType | None,
        before: ir.Node | None = None,
        **attributes: int,
    ) -> ir.Value:
        """A new node, put right after what it reads, or before `before`."""
        node = ir.Node("", op_type, inputs, ir.convenience.convert_attributes(attributes), num_outputs=1)
        node.name = self.b.name(name)
        y = node.outputs[0]
        y.name, y.shape = node.name, ir.Shape(shape)
        y.type = None if dtype is None else ir.TensorType(dtype)
        producer = inputs[0].producer()
        if before is not None:
            self.graph.insert_before(before, node)
        elif producer is not None and producer.graph is self.graph:
            self.graph.insert_after(producer, node)
        else:
            self.graph.insert_before(next(iter(self.graph)), node)
        return y

    def _pick_the_only(self) -> None:
        """What selected one of many now selects the only one."""
        zero, one = (self.b.constant(np.array([n], np.int64)).value for n in (0, 1))
        if self.pick.op_type == "Slice":
            self.pick.replace_input_with(1, zero)
            self.pick.replace_input_with(2, one)
            return
        given = _constant(self.pick, 1)
        assert given is not None
        self.pick.replace_input_with(1, self.b.constant(np.zeros(given.shape, np.int64)).value)


def _axes(node: ir.Node, axis: int) -> Axes:
    """Through which axes of its inputs a node's output is narrowed along `axis`."""
    if node.domain or node.outputs[0].shape is None or any(x is not None and x.shape is None for x in node.inputs):
        return None
    if node.op_type in BROADCASTING:
        return _aligned(node.inputs, node.outputs[0], axis)
    find = _TRANSFER.get(node.op_type)
    return None if find is None else find(node, axis)


def _aligned(inputs: Sequence[ir.Value | None], y: ir.Value, axis: int) -> Axes:
    """Elementwise: the same axis counted from the end; an input that is repeated along it stays whole."""
    found: list[int | None] = []
    for x in inputs:
        own = axis - len(y.shape or ()) + len(x.shape or ()) if x is not None else -1
        if own < 0 or x is None or _size(x, own) == 1:
            found.append(None)
        elif _size(x, own) is not None and _size(x, own) == _size(y, axis):
            found.append(own)
        else:
            return None
    return found


def _matmul(node: ir.Node, axis: int) -> Axes:
    """A row of the product needs that row of the left matrix; a matrix of the stack those of both stacks."""
    a, b = _ranks(node)[:2]
    rank = max(a, b)
    if a < 2 or b < 2 or axis == rank - 1:
        return None
    if axis == rank - 2:
        return [a - 2, None]
    return _aligned(node.inputs, node.outputs[0], axis)


def _gemm(node: ir.Node, axis: int) -> Axes:
    if axis != 0:
        return None
    found: list[int | None] = [node.attributes.get_int("transA", 0), None]
    return found + [*(_aligned(node.inputs[2:], node.outputs[0], 0) or [None])][: len(node.inputs) - 2]


def _transpose(node: ir.Node, axis: int) -> Axes:
    perm = node.attributes.get_ints("perm") or list(range(_ranks(node)[0]))[::-1]
    return [perm[axis]]


def _normalized(node: ir.Node, axis: int) -> Axes:
    """Normalizations of what lies behind `axis`."""
    first = node.attributes.get_int("axis", -1) % _ranks(node)[0]
    return [axis, *[None] * (len(node.inputs) - 1)] if axis < first else None


def _softmax(node: ir.Node, axis: int) -> Axes:
    return [axis] if node.attributes.get_int("axis", -1) % _ranks(node)[0] != axis else None


def _reshape(node: ir.Node, axis: int) -> Axes:
    """An axis of the same size with as much before it, or behind it."""
    x, y, sizes = node.inputs[0], node.outputs[0], _constant(node, 1)
    size = _size(y, axis)
    if x is None or x.shape is None or y.shape is None or size is None:
        return None
    whole = [[_size(v, i) for i in range(len(v.shape or ()))] for v in (x, y)]
    for own in range(len(x.shape)):
        if own != axis and (sizes is None or 0 in sizes):  # a 0 copies a size by its place
            continue
        before = None not in whole[0][:own] and whole[0][:own] == whole[1][:axis]
        volumes = [_volume(whole[0][own + 1 :]), _volume(whole[1][axis + 1 :])]
        if whole[0][own] == size and (before or (volumes[0] is not None and volumes[0] == volumes[1])):
            return [own, None]
    return None


_TRANSFER: dict[str, Callable[[ir.Node, int], Axes]] = {
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Transpose": _transpose,
    "LayerNormalization": _normalized,
    "RMSNormalization": _normalized,
    "Softmax": _softmax,
    "LogSoftmax": _softmax,
    "Reshape": _reshape,
}


def _ranks(node: ir.Node) -> list[int]:
    return [len(x.shape or ()) if x is not None else 0 for x in node.inputs]


def _size(value: ir.Value, axis: int) -> int | str | None:
    """A size, the name of a free one, or None."""
    assert value.shape is not None
    size = value.shape[axis]
    return size if isinstance(size, int) else size.value


def _volume(sizes: Sequence[int | str | None]) -> int | None:
    """The product of sizes, where all are numbers."""
    return int(np.prod([n for n in sizes if isinstance(n, int)])) if all(isinstance(n, int) for n in sizes) else None


def _constant(node: ir.Node, index: int) -> np.ndarray | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()
