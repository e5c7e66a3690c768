"""The only door to a weight, wherever it hides.

A weight is a floating-point constant of at least two elements that some operator consumes, or an encoding that decodes
to one: an
initializer or a Constant node, at the top level, in an If, Loop or Scan body, in a function, or in an attribute of an
ai.onnx.ml operator.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcompress.encodings import functions, recognize
from onnxcompress.encodings.base import Encoding, Tape
from onnxcompress.encodings.dense import Dense, Masked
from onnxcompress.errors import PassError
from onnxcompress.model.roles import WEIGHT_ROLES, Role, Tracer, Use, subgraphs
from onnxcompress.model.spill import spill

_ROLE_ORDER: tuple[Role, ...] = (*WEIGHT_ROLES, "other", "norm", "bias")


class Weight:
    """One weight of a model. Tied uses of one constant share one weight."""

    def __init__(
        self,
        model: ir.Model,
        key: str,
        value: ir.Value,
        owner: ir.Graph | ir.Function,
        uses: tuple[Use, ...],
        work: pathlib.Path | None = None,
        attribute: tuple[ir.Node, str] | None = None,
    ) -> None:
        self.model = model
        self.key = key
        self.value = value
        self.owner = owner
        self.uses = uses
        self.attribute = attribute
        self._work = work
        self._encoding: Encoding | None = None

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
        if self._encoding is None:
            self._encoding = self._recognize()
        return self._encoding

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the decoded weight."""
        return self.encoding.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Element type of the decoded weight."""
        return self.encoding.dtype

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Bytes the model stores for it."""
        return self.encoding.nbytes

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

        Raises:
            PassError: it lives in an attribute, its consumer takes integers, or the opset is too old for `new`.
        """
        if self.attribute is not None:
            raise PassError(f"{self.key}: lives in an attribute of a node and cannot be re-encoded")
        if getattr(self.encoding, "form", None) == "integer":
            raise PassError(f"{self.key}: its consumer takes integers; rewrite the consumer")
        opset = self.model.opset_imports.get("", 1)
        if new.least_opset > opset:
            raise PassError(f"{self.key}: a {new.kind} encoding needs opset {new.least_opset}, the model has {opset}")
        new = self._spilled(new)
        if not (isinstance(new, Dense | Masked) and self._store_in_place(new)):
            self._emit(new)
        self._encoding = None

    def _spilled(self, new: Encoding) -> Encoding:
        """`new` with its large arrays as memory maps of files in the work folder."""
        if self._work is None:
            return new
        fields = {f.name: getattr(new, f.name) for f in dataclasses.fields(new)}
        arrays = {k: spill(v, self._work) for k, v in fields.items() if isinstance(v, np.ndarray)}
        return dataclasses.replace(new, **arrays)

    def _store_in_place(self, new: Dense | Masked) -> bool:
        """Swap the tensor of an initializer or Constant node."""
        tensor = Tape(self.model, self.owner).constant(new.decode(), self.value.name or "").const_value
        node = self.value.producer()
        if isinstance(new, Dense) and not isinstance(new.tensor, np.ndarray):
            tensor = new.tensor
        if tensor is None:
            tensor = ir.tensor(new.decode(), name=self.value.name)
        if node is None:
            self.value.const_value = tensor
            return True
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
            for name in [n for n in node.attributes if n.startswith("value")]:
                del node.attributes[name]
            node.attributes["value"] = ir.AttrTensor("value", tensor)
            return True
        return False

    def _emit(self, new: Encoding) -> None:
        old, owner, name = self.value, self.owner, self.value.name or ""
        node = old.producer()
        tape = Tape(self.model, owner)
        stale = list(node.inputs) if node is not None else []
        if node is None:
            assert isinstance(owner, ir.Graph)
            if old.is_graph_input():
                owner.inputs.remove(old)
            owner.initializers.pop(name, None)
        old.name = f"{name}.replaced"
        if node is not None:
            for value in stale:
                if value is not None and value.is_initializer() and isinstance(owner, ir.Graph):
                    owner.initializers.pop(value.name or "", None)
        fresh = new.emit(tape, name)
        fresh.shape, fresh.type = ir.Shape(new.shape), ir.TensorType(ir.DataType.from_numpy(new.dtype))
        fresh.metadata_props.update(old.metadata_props)
        tape.place(node)
        old.replace_all_uses_with(fresh, replace_graph_outputs=True)
        self.value = fresh
        if node is not None:
            _remove(owner, node)

    def _recognize(self) -> Encoding:
        if self.attribute is not None:
            node, name = self.attribute
            held = node.attributes[name]
            array = (
                held.as_tensor().numpy() if held.type == ir.AttributeType.TENSOR else np.array(held.value, np.float32)
            )
            return Dense(array)
        end = self.value.producer()
        if end is not None and not (end.op_type == "Constant" and end.domain in ("", "ai.onnx")):
            return recognize.encoded(end)
        found = recognize.integers(self.value)
        if found is not None:
            return found
        tensor = recognize.constant(self.value)
        if tensor is None:
            raise PassError(f"{self.key}: is no constant")
        return recognize.plain(tensor) if self.role in WEIGHT_ROLES else Dense(tensor)


def _remove(owner: ir.Graph | ir.Function, node: ir.Node) -> None:
    """Remove an encoding's last node, and the Constant nodes in front of it that fed it alone."""
    inputs = list(node.inputs)
    owner.remove(node, safe=True)
    for value in inputs:
        producer = value.producer() if value is not None else None
        if producer is not None and producer.op_type == "Constant" and not producer.outputs[0].uses():
            owner.remove(producer, safe=True)


def weights(model: ir.Model, work: pathlib.Path | None = None) -> list[Weight]:
    """Every weight of `model`, in the order of the graph; each element of a constant belongs to exactly one weight.

    `work`: a folder where re-encoded tensors of 1 MiB and more are kept memory-mapped until the model is saved.
    """
    tracer = Tracer(model)
    found: list[Weight] = []
    taken: dict[str, int] = {}
    for path, owner in scopes(model):
        for value in _candidates(owner):
            name = recognize.stem_of(value.name or "") if _is_integer(value) else value.name or ""
            key = path + name
            taken[key] = taken.get(key, 0) + 1
            if taken[key] > 1:
                key = f"{key}#{taken[key]}"
            rank = len(value.shape) if value.shape is not None else _rank(value)
            found.append(Weight(model, key, value, owner, tracer.uses(value, rank), work))
        found += list(_attributes(model, path, owner))
    return found


def scopes(model: ir.Model) -> Iterator[tuple[str, ir.Graph | ir.Function]]:
    """Every graph and function body with the path that prefixes the keys of its weights ("", "If_0/then/", "F/")."""
    yield from _scopes("", model.graph)
    for function in model.functions.values():
        if function.domain != functions.DOMAIN:
            yield from _scopes(f"{function.name}/", function)


def _scopes(path: str, owner: ir.Graph | ir.Function) -> Iterator[tuple[str, ir.Graph | ir.Function]]:
    yield path, owner
    for node in owner:
        for attribute in node.attributes.values():
            if attribute.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) or attribute.is_ref():
                continue
            label = attribute.name.removesuffix("_branch")
            graphs = list(subgraphs(node)) if attribute.type == ir.AttributeType.GRAPHS else [attribute.as_graph()]
            for graph in graphs:
                # The first output's name identifies a node whether or not it has a name, and every tool keeps it.
                yield from _scopes(f"{path}{node.outputs[0].name}/{label}/", graph)


def _candidates(owner: ir.Graph | ir.Function) -> Iterator[ir.Value]:
    """The values of one scope that are weights."""
    constants: list[ir.Value] = list(owner.initializers.values()) if isinstance(owner, ir.Graph) else []
    ends: list[ir.Value] = []
    inside: set[int] = set()
    for node in owner:
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
            constants.append(node.outputs[0])
        else:
            values = recognize.parts(node)
            if values is not None:
                inside |= {id(v) for v in values}
                ends.append(node.outputs[0])
    helpers = recognize.helpers(constants)
    for value in constants:
        tensor = recognize.constant(value)
        if tensor is None or id(value) in inside or id(value) in helpers:
            continue
        if tensor.dtype in recognize.FLOATS:
            if tensor.size > 1 and not _is_scale(value):
                yield value
        elif recognize.integers(value) is not None:
            yield value
    yield from ends


def _is_scale(value: ir.Value) -> bool:
    """True for the scale of an activation's or a weight's quantization."""
    uses = list(value.uses())
    return bool(uses) and all(
        (use.node.op_type in ("QuantizeLinear", "DequantizeLinear") and use.idx == 1)
        or (use.node.op_type in ("QLinearConv", "QLinearMatMul") and use.idx in (1, 4, 6))
        for use in uses
    )


def _is_integer(value: ir.Value) -> bool:
    tensor = recognize.constant(value)
    return tensor is not None and tensor.dtype not in recognize.FLOATS


def _rank(value: ir.Value) -> int:
    tensor = recognize.constant(value)
    if tensor is not None:
        return len(tensor.shape)
    node = value.producer()
    assert node is not None
    return len(recognize.encoded(node).shape)


def _attributes(model: ir.Model, path: str, owner: ir.Graph | ir.Function) -> Iterator[Weight]:
    """Weights that live in attributes of ai.onnx.ml operators."""
    for node in owner:
        if node.domain != "ai.onnx.ml":
            continue
        for name, attribute in node.attributes.items():
            if attribute.is_ref() or attribute.type not in (ir.AttributeType.FLOATS, ir.AttributeType.TENSOR):
                continue
            if attribute.type == ir.AttributeType.FLOATS and len(attribute.as_floats()) < 2:
                continue
            if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype not in recognize.FLOATS:
                continue
            key = f"{path}{node.name or node.outputs[0].name}/{name}"
            uses = (Use(node, -1, "other"),)
            yield Weight(model, key, node.outputs[0], owner, uses, attribute=(node, name))


def total(found: Sequence[Weight]) -> int:
    """Bytes the model stores for all of them."""
    return sum(weight.nbytes for weight in found)
