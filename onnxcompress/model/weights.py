"""The only door to a weight, wherever it hides.

A weight is a floating-point constant of at least two elements that some operator consumes, or an encoding that decodes
to one: an initializer or a Constant node, at the top level, in an If, Loop or Scan body, in a function, or in an
attribute of an ai.onnx.ml operator.
"""

from __future__ import annotations

import pathlib
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcompress.encodings import functions, recognize
from onnxcompress.encodings.base import Encoding, Tape, opset_of
from onnxcompress.encodings.codebook import Codebook
from onnxcompress.encodings.dense import Dense, Masked
from onnxcompress.errors import PassError
from onnxcompress.model.roles import WEIGHT_ROLES, Role, Tracer, Use, subgraphs

_ROLE_ORDER: tuple[Role, ...] = (*WEIGHT_ROLES, "other", "norm", "bias")
_CONSTANT_OF_ANY_TYPE = 9  # opset from which a Constant node holds other types than floats

Scope = ir.Graph | ir.Function


class Weight:
    """One weight of a model. Tied uses of one constant share one weight.

    `owner`: the graph or function body it lies in; `root`: the main graph or function around that.
    """

    def __init__(
        self,
        model: ir.Model,
        key: str,
        value: ir.Value,
        owner: Scope,
        uses: tuple[Use, ...],
        work: pathlib.Path | None = None,
        attribute: tuple[ir.Node, str] | None = None,
        root: Scope | None = None,
        names: dict[int, set[str]] | None = None,
        twins: tuple[ir.Value, ...] = (),
    ) -> None:
        self.model = model
        self.key = key
        self.value = value
        self.owner = owner
        self.root = root if root is not None else owner
        self.uses = uses
        self.attribute = attribute
        self._work = work
        self._names = names if names is not None else {}
        self._twins = twins  # the same constants expanded again, for another consumer
        self._held: Encoding | None = None
        self._seen: weakref.ref[Codebook] | None = None
        self._facts: tuple[tuple[int, ...], np.dtype[Any], int] | None = None

    def __repr__(self) -> str:
        return f"Weight({self.key!r}, {self.encoding.kind}, {self.dtype}{list(self.shape)}, {self.role})"

    @property
    def role(self) -> Role:
        """The most telling role among its uses; "other" for a constant nothing consumes."""
        roles = {use.role for use in self.uses}
        return next((role for role in _ROLE_ORDER if role in roles), "other")

    @property
    def encoding(self) -> Encoding:
        """How the weight is stored, read from the graph as it stands."""
        found = self._held or (self._seen() if self._seen is not None else None)
        if found is None:
            found = self._recognize()
            self._facts = (found.shape, found.dtype, found.nbytes)
            if isinstance(found, Codebook):
                self._seen = weakref.ref(found)  # unpacked, it is larger than what the model holds
            else:
                self._held = found
        return found

    def _known(self) -> tuple[tuple[int, ...], np.dtype[Any], int]:
        if self._facts is None:
            found = self.encoding
            self._facts = (found.shape, found.dtype, found.nbytes)
        return self._facts

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the decoded weight."""
        return self._known()[0]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Element type of the decoded weight."""
        return self._known()[1]

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Bytes the model stores for it."""
        return self._known()[2]

    @property
    def overridable(self) -> bool:
        """True for an initializer that is listed as a graph input in IR >= 4, so that a caller could replace it."""
        return self.value.is_graph_input() and self.model.ir_version >= 4

    def axis(self) -> int | None:
        """The output axis that all consumers agree on, or None."""
        axes = {use.output_axis for use in self.uses if use.role in WEIGHT_ROLES}
        return next(iter(axes)) if len(axes) == 1 else None

    def array(self) -> np.ndarray:
        """The decoded weight; a memory map where the file is one. Not to be written to."""
        return self.encoding.decode()

    def replace(self, new: Encoding) -> None:
        """Store the weight in another encoding; consumers and the weight's name stay.

        A caller can no longer override an initializer that this turns into more than a tensor (see `overridable`).

        Raises:
            PassError: it lives in an attribute, its consumer takes integers, or the opset is too old for `new`.
        """
        if self.attribute is not None:
            raise PassError(f"{self.key}: lives in an attribute of a node and cannot be re-encoded")
        if getattr(self.encoding, "form", None) == "integer":
            raise PassError(f"{self.key}: its consumer takes integers; rewrite the consumer")
        if getattr(new, "form", None) == "integer":
            raise PassError(f"{self.key}: integers for its consumer are written by the pass that rewrites the consumer")
        opset, least = opset_of(self.model, self.root), new.least_opset
        if isinstance(self.owner, ir.Function) and not isinstance(new, Dense | Masked):
            least = max(least, _CONSTANT_OF_ANY_TYPE)
        if least > opset:
            raise PassError(f"{self.key}: a {new.kind} encoding needs opset {least}, the model has {opset} there")
        if not (isinstance(new, Dense | Masked) and self._store_in_place(new)):
            self._emit(new)
        self._held = self._seen = self._facts = None

    def _tape(self) -> Tape:
        if id(self.owner) not in self._names:
            self._names[id(self.owner)] = _names_around(_graph(self.root), _graph(self.owner), False) or set()
        return Tape(self.model, self.owner, self.root, self._names[id(self.owner)], self._work)

    def _store_in_place(self, new: Dense | Masked) -> bool:
        """Swap the tensor of an initializer or Constant node; False where the weight is neither."""
        node = self.value.producer()
        if node is not None and recognize.constant_tensor(node) is None:
            return False
        tensor = self._tensor(new, self._tape())
        if node is None:
            self.value.const_value = tensor
        else:
            for name in [n for n in node.attributes if n.startswith("value")]:
                del node.attributes[name]
            node.attributes["value"] = ir.AttrTensor("value", tensor)
        if node is None or self.value.shape is not None:
            self.value.shape, self.value.type = ir.Shape(new.shape), ir.TensorType(tensor.dtype)
        return True

    def _tensor(self, new: Dense | Masked, tape: Tape) -> ir.TensorProtocol:
        held = recognize.constant(self.value)
        # A tensor in a Constant node keeps its name, mostly none: naming it would make the file larger.
        name = (held.name or "") if held is not None and self.value.producer() is not None else self.value.name or ""
        tensor = tape.tensor(new.tensor if isinstance(new, Dense) else new.values, name)
        tensor.metadata_props.pop(Masked.KEY, None)
        if isinstance(new, Masked) and recognize.plain(tensor, self.role in WEIGHT_ROLES).kind != Masked.kind:
            tensor.metadata_props[Masked.KEY] = "1"
        return tensor

    def _emit(self, new: Encoding) -> None:
        old, owner, name = self.value, self.owner, self.value.name or ""
        node, tape = old.producer(), self._tape()
        names = self._names[id(owner)]
        if node is None:
            assert isinstance(owner, ir.Graph)
            if old.is_graph_input():
                owner.inputs.remove(old)
            owner.initializers.pop(name, None)
        ends = [node, *(twin.producer() for twin in self._twins)] if node is not None else []
        parts = _own_parts([end for end in ends if end is not None])
        for part in parts:
            if part.is_initializer() and isinstance(part.graph, ir.Graph):
                part.graph.initializers.pop(part.name or "", None)
            names.discard(part.name or "")
        names.discard(name)
        if isinstance(new, Dense | Masked):
            fresh = tape.constant(self._tensor(new, tape), name)
        else:
            fresh = new.emit(tape, name)
        if recognize.constant(fresh) is None:  # a constant says so itself
            fresh.shape, fresh.type = ir.Shape(new.shape), ir.TensorType(ir.DataType.from_numpy(new.dtype))
        fresh.metadata_props.update(old.metadata_props)
        tape.place(node)
        for value in (old, *self._twins):
            value.replace_all_uses_with(fresh, replace_graph_outputs=True)
        self.value, self._twins = fresh, ()
        for end in ends:
            if end is not None:
                owner.remove(end, safe=True)
        for part in parts:
            producer = part.producer()
            if producer is not None and producer.graph is not None:
                producer.graph.remove(producer, safe=True)
        if node is not None and node.domain == functions.DOMAIN:
            functions.release(self.model, node.op_type)

    def _recognize(self) -> Encoding:
        if self.attribute is not None:
            node, name = self.attribute
            held = node.attributes[name]
            array = (
                held.as_tensor().numpy() if held.type == ir.AttributeType.TENSOR else np.array(held.value, np.float32)
            )
            return Dense(array)
        end = self.value.producer()
        if end is not None and recognize.parts(end) is not None:
            return recognize.encoded(end)
        found = recognize.integers(self.value)
        if found is not None:
            return found
        tensor = recognize.constant(self.value)
        if tensor is None:
            raise PassError(f"{self.key}: is no constant")
        return recognize.plain(tensor, self.role in WEIGHT_ROLES)


def _own_parts(nodes: Sequence[ir.Node]) -> list[ir.Value]:
    """The constants that feed `nodes` alone; others may share a scale or zero point with other weights."""
    values = {id(v): v for node in nodes for v in node.inputs if v is not None}
    return [
        v
        for v in values.values()
        if all(use.node in nodes for use in v.uses()) and not v.is_graph_output() and not v.is_graph_input()
    ]


def weights(model: ir.Model, work: pathlib.Path | None = None) -> list[Weight]:
    """Every weight of `model`, in the order of the graph; each element of a constant belongs to exactly one weight.

    `work`: a folder where re-encoded tensors of 1 MiB and more are kept memory-mapped until the model is saved.
    """
    tracer = Tracer(model)
    found: list[Weight] = []
    taken: dict[str, int] = {}
    names: dict[int, set[str]] = {}

    def unique(key: str) -> str:
        """Names are unique within a scope; two scopes may have the same path."""
        taken[key] = taken.get(key, 0) + 1
        return key if taken[key] == 1 else unique(f"{key}#{taken[key]}")

    for path, owner, root in _all_scopes(model):
        values = list(_candidates(owner))
        floats = {value.name for value in values if not _is_integer(value)}
        twins = _twins(owner)
        for value in values:
            if id(value) in twins and twins[id(value)][0] is not value:
                continue
            name = value.name or ""
            stem = recognize.stem_of(name) if _is_integer(value) else name
            # The integers "w.q" go by the name of the weight they stand for, unless that is still there.
            key = unique(path + (name if stem in floats else stem))
            others = tuple(twins.get(id(value), ()))[1:]
            uses = tuple(use for each in (value, *others) for use in tracer.uses(each, _shape(value)))
            found.append(Weight(model, key, value, owner, uses, work, None, root, names, others))
        for node, name in _attributes(owner):
            key = unique(f"{path}{node.name or node.outputs[0].name}/{name}")
            found.append(
                Weight(model, key, node.outputs[0], owner, (Use(node, -1, "other"),), work, (node, name), root, names)
            )
    return found


def scopes(model: ir.Model) -> Iterator[tuple[str, Scope]]:
    """Every graph and function body with the path that prefixes the keys of its weights ("", "If_0/then/", "F/")."""
    for path, owner, _ in _all_scopes(model):
        yield path, owner


def _all_scopes(model: ir.Model) -> Iterator[tuple[str, Scope, Scope]]:
    yield from _scopes("", model.graph, model.graph)
    for function in model.functions.values():
        if function.domain != functions.DOMAIN or functions.inputs_of(function.name) is None:
            yield from _scopes(f"{function.name}/", function, function)


def _scopes(path: str, owner: Scope, root: Scope) -> Iterator[tuple[str, Scope, Scope]]:
    yield path, owner, root
    for node in owner:
        for attribute in node.attributes.values():
            if attribute.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) or attribute.is_ref():
                continue
            label = attribute.name.removesuffix("_branch")
            graphs = (
                list(attribute.as_graphs()) if attribute.type == ir.AttributeType.GRAPHS else [attribute.as_graph()]
            )
            for graph in graphs:
                # The first output's name identifies a node whether or not it has a name, and every tool keeps it.
                name = node.outputs[0].name if node.outputs else node.name
                yield from _scopes(f"{path}{name}/{label}/", graph, root)


def _candidates(owner: Scope) -> Iterator[ir.Value]:
    """The values of one scope that are weights."""
    constants: list[ir.Value] = list(owner.initializers.values()) if isinstance(owner, ir.Graph) else []
    ends: list[ir.Value] = []
    for node in owner:
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
            constants.append(node.outputs[0])
        elif recognize.parts(node) is not None:
            ends.append(node.outputs[0])
    helpers = recognize.helpers(constants)
    for value in constants:
        tensor = recognize.constant(value)
        if tensor is None or id(value) in helpers or recognize.only_part(value):
            continue
        if tensor.dtype in recognize.FLOATS:
            if tensor.size > 1 and not recognize.is_scale(value):
                yield value
        elif recognize.integers(value) is not None:
            yield value
    yield from ends


def _twins(owner: Scope) -> dict[int, list[ir.Value]]:
    """Values that one and the same constants are expanded to, by the id of each; only where they are several.

    Quantizers write a DequantizeLinear for each consumer of a tied weight.
    """
    groups: dict[tuple[Any, ...], list[ir.Value]] = {}
    for node in owner:
        if recognize.parts(node) is not None and not node.outputs[0].is_graph_output():
            attributes = sorted((a.name, repr(a.value)) for a in node.attributes.values())
            signature = (node.domain, node.op_type, tuple(id(v) for v in node.inputs), tuple(attributes))
            groups.setdefault(signature, []).append(node.outputs[0])
    return {id(value): group for group in groups.values() if len(group) > 1 for value in group}


def _is_integer(value: ir.Value) -> bool:
    tensor = recognize.constant(value)
    return tensor is not None and tensor.dtype not in recognize.FLOATS


def _shape(value: ir.Value) -> tuple[int, ...]:
    tensor = recognize.constant(value)
    if tensor is not None:
        return tuple(tensor.shape.numpy())
    node = value.producer()
    assert node is not None
    return recognize.shape(node)


def _graph(scope: Scope) -> ir.Graph:
    return scope.graph if isinstance(scope, ir.Function) else scope


def _names_around(graph: ir.Graph, owner: ir.Graph, inside: bool) -> set[str] | None:
    """Names that `owner` sees or hides: its own, those around it and those within; None when it is not in `graph`."""
    own = {value.name or "" for value in (*graph.inputs, *graph.initializers.values())}
    own |= {value.name or "" for node in graph for value in node.outputs}
    inner = [subgraph for node in graph for subgraph in subgraphs(node)]
    if inside or graph is owner:
        return own.union(*(_names_around(subgraph, owner, True) or () for subgraph in inner))
    for subgraph in inner:
        found = _names_around(subgraph, owner, False)
        if found is not None:
            return own | found
    return None


def _attributes(owner: Scope) -> Iterator[tuple[ir.Node, str]]:
    """Attributes of ai.onnx.ml operators that are weights."""
    for node in owner:
        if node.domain != "ai.onnx.ml":
            continue
        for name, attribute in node.attributes.items():
            if attribute.is_ref():
                continue
            if attribute.type == ir.AttributeType.FLOATS and len(attribute.as_floats()) > 1:
                yield node, name
            elif attribute.type == ir.AttributeType.TENSOR:
                tensor = attribute.as_tensor()
                if tensor.dtype in recognize.FLOATS and tensor.size > 1:
                    yield node, name


def total(found: Sequence[Weight]) -> int:
    """Bytes the model stores for all of them."""
    return sum(weight.nbytes for weight in found)
