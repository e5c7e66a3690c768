"""The builder that records a gradient graph: nodes, constants, names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcompress.autodiff.tensor import Dims, Operand, Size, Tensor

_INT64 = {"Shape", "Size", "NonZero", "ArgMax", "ArgMin"}
_BOOL = {"Equal", "Greater", "Less", "GreaterOrEqual", "LessOrEqual", "Not", "And", "Or"}


class Builder:
    """Appends nodes to `graph`, for a model of standard operator set `opset`.

    Constants become initializers of the main graph, equal ones once; bodies (`inside`) see them from there.
    `scope`: put before every name, so that a profile shows which operator a gradient belongs to.
    """

    def __init__(self, graph: ir.Graph, opset: int, root: Builder | None = None) -> None:
        self.graph, self.opset = graph, opset
        self.root = root or self
        self.nodes: list[ir.Node] = []
        self.scope: str = "grad" if root is None else root.scope
        if root is None:
            self._constants: dict[Any, ir.Value] = {}
            self._taken = set(_names(graph))
            self._next: dict[str, int] = {}

    def inside(self, graph: ir.Graph) -> Builder:
        """A builder for a body: `graph` sees every value of this one's."""
        return Builder(graph, self.opset, self.root)

    def name(self, wish: str) -> str:
        """`wish`, or with a number after it where that name is taken, now or before."""
        root, name = self.root, wish
        while name in root._taken:
            root._next[wish] = root._next.get(wish, 0) + 1
            name = f"{wish}_{root._next[wish]}"
        root._taken.add(name)
        return name

    def wrap(self, value: ir.Value) -> Tensor:
        """A value of the graph as an operand."""
        return Tensor(self, value)

    def constant(self, array: Any, dtype: ir.DataType | None = None) -> Tensor:
        """A constant; `dtype` defaults to the array's own."""
        array = np.asarray(array)
        dtype = dtype or ir.DataType.from_numpy(array.dtype)
        array = np.ascontiguousarray(array.astype(dtype.numpy())).reshape(array.shape)
        key = (dtype, array.shape, array.tobytes())
        value = self.root._constants.get(key)
        if value is None:
            name = self.name("grad/constant")
            value = ir.Value(name=name, const_value=ir.tensor(array, dtype=dtype, name=name))
            value.dtype, value.shape = dtype, ir.Shape(array.shape)
            self.root.graph.register_initializer(value)
            self.root._constants[key] = value
        return self.wrap(value)

    def ints(self, sizes: Iterable[Size]) -> Tensor:
        """int64 [n] from numbers and tensors: a constant where all are numbers."""
        parts: list[Tensor] = []
        run: list[int] = []
        for size in [*sizes, None]:
            if isinstance(size, int):
                run.append(size)
                continue
            if run:
                parts.append(self.constant(np.array(run, np.int64)))
            run = []
            if size is not None:
                parts.append(size)
        if not parts:
            return self.constant(np.zeros(0, np.int64))
        return parts[0] if len(parts) == 1 else self.op("Concat", *parts, axis=0)

    def op(
        self,
        op_type: str,
        *inputs: Tensor | None,
        dtype: ir.DataType | None = None,
        shape: Dims | None = None,
        **attributes: Any,
    ) -> Tensor:
        """Append a node with one output. `dtype` defaults to what `op_type` says, or else to the first input's."""
        return self.ops(op_type, *inputs, outputs=1, dtype=dtype, shape=shape, **attributes)[0]

    def ops(
        self,
        op_type: str,
        *inputs: Tensor | None,
        outputs: int,
        dtype: ir.DataType | None = None,
        shape: Dims | None = None,
        **attributes: Any,
    ) -> list[Tensor]:
        """Append a node with several outputs, all of one type."""
        given = {key: value for key, value in attributes.items() if value is not None}
        values = [None if x is None else x.value for x in inputs]
        node = ir.Node("", op_type, values, ir.convenience.convert_attributes(given), num_outputs=outputs)
        node.name = self.name(f"{self.scope}/{op_type}")
        if dtype is None and op_type in _INT64:
            dtype = ir.DataType.INT64
        if dtype is None and op_type in _BOOL:
            dtype = ir.DataType.BOOL
        if dtype is None:
            dtype = next((x.value.dtype for x in inputs if x is not None), None)
        for i, output in enumerate(node.outputs):
            output.name = node.name if i == 0 else self.name(f"{node.name}.{i}")
            if dtype is not None:
                output.dtype = dtype
            if shape is not None:
                output.shape = ir.Shape(shape)
        self.graph.append(node)
        self.nodes.append(node)
        return [self.wrap(output) for output in node.outputs]

    def zeros(self, shape: Tensor, dtype: ir.DataType) -> Tensor:
        """Zeros of a shape known at run time."""
        tensor = ir.tensor(np.zeros(1, dtype.numpy()), dtype=dtype)
        return self.op("ConstantOfShape", shape, dtype=dtype, value=tensor)

    def where(self, condition: Tensor, yes: Operand, no: Operand) -> Tensor:
        """Elementwise choice; at least one of `yes` and `no` is a tensor."""
        like = yes if isinstance(yes, Tensor) else no
        assert isinstance(like, Tensor)
        a, b = like.operand(yes), like.operand(no)
        return self.op("Where", condition, a, b, dtype=like.dtype)

    def sum(self, parts: Sequence[Tensor]) -> Tensor:
        """The sum of tensors of one shape."""
        if len(parts) == 1:
            return parts[0]
        return self.op("Add" if len(parts) == 2 else "Sum", *parts, shape=parts[0].shape)

    def prune(self, keep: Iterable[ir.Value]) -> None:
        """Remove the recorded nodes nobody uses, and constants left without a use; `keep` are results."""
        kept = set(keep)
        for node in reversed(self.nodes):
            if not any(output.uses() or output in kept or output.is_graph_output() for output in node.outputs):
                self.graph.remove(node, safe=True)
        self.nodes = [node for node in self.nodes if node.graph is self.graph]
        if self.root is self:
            for key, value in list(self._constants.items()):
                if not value.uses() and value not in kept:
                    del self._constants[key], self.graph.initializers[str(value.name)]


def _names(graph: ir.Graph) -> Iterable[str]:
    """Every name in a graph and its bodies."""
    for value in (*graph.inputs, *graph.initializers.values()):
        yield value.name or ""
    for node in ir.traversal.RecursiveGraphIterator(graph):
        yield node.name or ""
        for output in node.outputs:
            yield output.name or ""
        for attribute in node.attributes.values():
            for body in graphs_of(attribute):
                yield from (v.name or "" for v in (*body.inputs, *body.initializers.values()))


def graphs_of(attribute: ir.Attr) -> Sequence[ir.Graph]:
    """The bodies an attribute holds."""
    if attribute.is_ref():
        return ()
    if attribute.type == ir.AttributeType.GRAPH:
        return (attribute.as_graph(),)
    return attribute.as_graphs() if attribute.type == ir.AttributeType.GRAPHS else ()
