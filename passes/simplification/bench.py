"""What the rules of `simplify` share: the scopes of a model, what is constant in it, what it costs, and the log."""

from __future__ import annotations

import collections
import dataclasses
import pathlib
from collections.abc import Iterable, Iterator

import numpy as np
import onnx_ir as ir

from onnxcompress.encodings import functions, recognize
from onnxcompress.model.bridge import SPARSE_KEY
from onnxcompress.model.roles import subgraphs
from onnxcompress.model.spill import spill

STANDARD = ("", "ai.onnx")
LEAST_OPSET = 7  # broadcasting and inference-only operators as they are today
INITIALIZERS_ARE_CONSTANT = 4  # from this IR version on, an initializer need not be listed as a graph input

NONDETERMINISTIC = {
    "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli",
}  # fmt: skip
QUANTIZED = {
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "MatMulInteger",
    "ConvInteger",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Scope:
    """One graph, branch, body or function: `opset` is the version of the standard operators in it."""

    graph: ir.Graph
    opset: int
    function: bool


class Bench:
    """A model being simplified. `protected`: ids of values that the recipe's `select` leaves out."""

    def __init__(self, model: ir.Model, work: pathlib.Path, protected: frozenset[int] = frozenset()) -> None:
        self.model = model
        self.work = work
        self.protected = protected
        self.counts: collections.Counter[str] = collections.Counter()
        self.notes: dict[int, tuple[str, ir.Value | None]] = {}

    # Scopes --------------------------------------------------------------------------------------------------------

    def scopes(self) -> list[Scope]:
        """Every graph of the model, outer before inner, without the functions that expand encodings."""
        found = list(_nested(self.model.graph, self.model.opset_imports.get("", 1), False))
        for function in self.model.functions.values():
            if function.domain != functions.DOMAIN:
                imports = function.opset_imports or self.model.opset_imports
                found += _nested(function.graph, imports.get("", self.model.opset_imports.get("", 1)), True)
        return found

    # Constants -----------------------------------------------------------------------------------------------------

    def tensor(self, value: ir.Value | None) -> ir.TensorProtocol | None:
        """The tensor of a value that is the same in every run and may be used up; None for all others."""
        if value is None or id(value) in self.protected or self.overridable(value):
            return None
        tensor = recognize.constant(value)
        if tensor is None or tensor.dtype == ir.DataType.STRING or SPARSE_KEY in tensor.metadata_props:
            # A tensor that came from a sparse one would grow when it is written anew.
            return None
        return tensor

    def overridable(self, value: ir.Value) -> bool:
        """True for a graph input, with or without a default, that the caller or the enclosing node may set."""
        if not value.is_graph_input():
            return False
        return value.graph is not self.model.graph or self.model.ir_version >= INITIALIZERS_ARE_CONSTANT

    def put(self, scope: Scope, name: str, array: np.ndarray, anchor: ir.Node, *, as_node: bool = False) -> ir.Value:
        """A new constant called `name`: an initializer where the scope takes one, else a Constant before `anchor`."""
        tensor = ir.tensor(spill(array, self.work), name=name)
        shape, kind = ir.Shape(array.shape), ir.TensorType(tensor.dtype)
        if as_node or scope.function or self.model.ir_version < INITIALIZERS_ARE_CONSTANT:
            value = ir.Value(name=name, shape=shape, type=kind)
            node = ir.Node("", "Constant", [], [ir.AttrTensor("value", tensor)], outputs=[value], name="")
            scope.graph.insert_before(anchor, node)
            return value
        value = ir.Value(name=name, shape=shape, type=kind, const_value=tensor)
        scope.graph.register_initializer(value)
        return value

    def swap(self, value: ir.Value, array: np.ndarray) -> None:
        """Give the constant `value` other content of the same shape and type."""
        tensor = ir.tensor(spill(array, self.work), name=value.name)
        node = value.producer()
        if node is None:
            value.const_value = tensor
            return
        for name in [n for n in node.attributes if n.startswith("value")]:
            del node.attributes[name]
        node.attributes["value"] = ir.AttrTensor("value", tensor)

    # Removal -------------------------------------------------------------------------------------------------------

    def drop(self, value: ir.Value) -> bool:
        """Remove the constant `value` when nothing uses it any more; True when it went."""
        if used(value) or id(value) in self.protected or self.overridable(value):
            return False
        node = value.producer()
        if node is not None:
            remove(node)
            return True
        graph = value.graph
        if graph is None or value.name is None:
            return False
        if value.is_graph_input():
            graph.inputs.remove(value)
        graph.initializers.pop(value.name, None)
        return True

    def note(self, value: ir.Value, detail: str, into: ir.Value | None = None) -> None:
        """Say what became of a constant; the first word counts. `into`: the constant that now holds its content."""
        self.notes.setdefault(id(value), (detail, into))


def _nested(graph: ir.Graph, opset: int, function: bool) -> Iterator[Scope]:
    yield Scope(graph, opset, function)
    for node in graph:
        for inner in subgraphs(node):
            # A body inside a function can hold initializers; only the function itself cannot.
            yield from _nested(inner, opset, False)


def used(value: ir.Value) -> bool:
    """True when a node reads it or a graph puts it out."""
    return value.is_graph_output() or bool(value.uses())


def remove(node: ir.Node) -> None:
    """Remove a node whose outputs nobody uses, and everything in its bodies, which may read values from outside."""
    for graph in subgraphs(node):
        while len(graph.outputs):
            graph.outputs.pop()
        for inner in reversed(list(graph)):
            for output in inner.outputs:
                for use in output.uses():
                    use.node.replace_input_with(use.idx, None)
            remove(inner)
    owner = node.graph
    assert owner is not None
    owner.remove(node, safe=True)


def standard(node: ir.Node, *op_types: str) -> bool:
    """True for a node of ONNX's own domain with one of `op_types`."""
    return node.domain in STANDARD and node.op_type in op_types


def encodes(node: ir.Node) -> bool:
    """True for a node that carries quantization or another encoding, whose constants must stay where they are."""
    return node.domain == functions.DOMAIN or node.op_type in QUANTIZED or "Quant" in node.op_type


# Bytes ---------------------------------------------------------------------------------------------------------------

_SMALL = 1024


def node_bytes(node: ir.Node) -> int:
    """Bytes of a node in the file, with its framing."""
    return int(ir.serde.serialize_node(node).ByteSize()) + 2


def stored_bytes(value: ir.Value) -> int:
    """Bytes that the constant `value` takes in the file, never too many."""
    tensor, node = recognize.constant(value), value.producer()
    assert tensor is not None
    if tensor.nbytes <= _SMALL:
        # Exact: small integers may be stored one byte each.
        return node_bytes(node) if node is not None else int(ir.serde.serialize_tensor(tensor).ByteSize()) + 2
    return tensor.nbytes + len(value.name or "") + 8


def new_bytes(name: str, nbytes: int, rank: int, *, as_node: bool) -> int:
    """Bytes that a new constant will take, never too few."""
    return nbytes + len(name) + 5 * rank + 20 + (len(name) + 30 if as_node else 0)


def sum_stored(values: Iterable[ir.Value]) -> int:
    """Bytes of several constants together."""
    return sum(stored_bytes(value) for value in values)
