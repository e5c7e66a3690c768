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
        self._names: set[str] | None = None

    # Scopes --------------------------------------------------------------------------------------------------------

    def scopes(self) -> list[Scope]:
        """Every graph of the model, outer before inner, without the functions that expand encodings."""
        if any(function.domain in STANDARD for function in self.model.functions.values()):
            return []  # the model gives standard operators another meaning
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

    def needs_nodes(self, scope: Scope) -> bool:
        """True where a new constant cannot be an initializer: in a function, and unlisted below IR 4."""
        return scope.function or self.model.ir_version < INITIALIZERS_ARE_CONSTANT

    def put(self, scope: Scope, name: str, array: np.ndarray, anchor: ir.Node, *, as_node: bool = False) -> ir.Value:
        """A new constant called `name`: an initializer where the scope takes one, else a Constant before `anchor`."""
        array = spill(array, self.work)
        if as_node or self.needs_nodes(scope):
            # Without type and shape, which would be written beside the tensor's own.
            value = ir.Value(name=name)
            held = ir.AttrTensor("value", ir.tensor(array))
            scope.graph.insert_before(anchor, ir.Node("", "Constant", [], [held], outputs=[value], name=""))
            return value
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        scope.graph.register_initializer(value)
        return value

    def unused_name(self, name: str) -> str:
        """`name`, or `name_2`, ... where a value of the model is called that already."""
        if self._names is None:
            self._names = {value.name or "" for scope in self.scopes() for value in values(scope.graph)}
        fresh, number = name, 1
        while fresh in self._names:
            number += 1
            fresh = f"{name}_{number}"
        self._names.add(fresh)
        return fresh

    def swap(self, value: ir.Value, array: np.ndarray) -> None:
        """Give the constant `value` other content of the same shape and type."""
        array = spill(array, self.work)
        node = value.producer()
        if node is None:
            value.const_value = ir.tensor(array, name=value.name)
            return
        for name in [n for n in node.attributes if n.startswith("value")]:
            del node.attributes[name]
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor(array))

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


def values(graph: ir.Graph) -> list[ir.Value]:
    """Everything defined in one graph, without its bodies."""
    return [*graph.inputs, *graph.initializers.values(), *(o for node in graph for o in node.outputs)]


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
    return _field(int(ir.serde.serialize_node(node).ByteSize()))


def stored_bytes(value: ir.Value) -> int:
    """Bytes that the constant `value` takes in the file, never too many."""
    tensor, node = recognize.constant(value), value.producer()
    assert tensor is not None
    listed = _field(int(ir.serde.serialize_value(value).ByteSize())) if value.is_graph_input() else 0
    if tensor.nbytes <= _SMALL or tensor.dtype.is_integer():
        # Exact: a file may store integers in one byte each.
        proto = ir.serde.serialize_node(node) if node is not None else ir.serde.serialize_tensor(tensor)
        return listed + _field(int(proto.ByteSize()))
    shape = tuple(int(d) for d in tensor.shape.numpy())
    return listed + new_bytes(value.name or "", tensor.nbytes, shape, as_node=node is not None)


def new_bytes(name: str, nbytes: int, shape: tuple[int, ...], *, as_node: bool) -> int:
    """Bytes that a new constant takes in the file, as an initializer or as a Constant node."""
    label = _field(len(name.encode()))
    dims = sum(1 + _varint(d) for d in shape)
    tensor = dims + 2 + (_field(nbytes) if nbytes else 0)
    if not as_node:
        return _field(tensor + label)
    attribute = 7 + _field(tensor) + 3  # its name "value", and its type
    return _field(label + 10 + _field(attribute))


def _field(length: int) -> int:
    """Bytes of a protobuf field of `length` bytes, with its tag and its length."""
    return 1 + _varint(length) + length


def _varint(number: int) -> int:
    return max(1, (number.bit_length() + 6) // 7)


def sum_stored(values: Iterable[ir.Value]) -> int:
    """Bytes of several constants together."""
    return sum(stored_bytes(value) for value in values)
