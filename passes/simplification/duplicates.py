"""Equal constants and equal nodes, kept once."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcompress.encodings import recognize
from onnxcompress.model.roles import subgraphs
from onnxcompress.passes.simplification import bench as b

_BYTES = {ir.DataType.INT8, ir.DataType.UINT8}  # may be an encoding's integers, known by name or consumer


class Duplicates:
    """Lets one constant and one node stand for all that are equal to it in the same graph.

    1. Constants (initializers, Constant nodes) of the same type, shape and bytes: the first stays, with its name.
    2. Nodes of the same operator and attributes that read the same values.

    Left alone: graph outputs; what a caller may override; strings; everything that belongs to a quantization or another
    encoding (each weight owns its parts); random operators; operators with bodies; operators outside ONNX's domain.
    """

    def __init__(self, bench: b.Bench) -> None:
        self.bench = bench

    def run(self) -> bool:
        """Apply both rules once everywhere; True when anything changed."""
        changed = False
        for scope in self.bench.scopes():
            changed |= self._constants(scope)
            changed |= scope.opset >= b.LEAST_OPSET and self._nodes(scope)
        return changed

    def _constants(self, scope: b.Scope) -> bool:
        values = [
            *scope.graph.initializers.values(),
            *(node.outputs[0] for node in scope.graph if b.standard(node, "Constant")),
        ]
        parts = recognize.helpers(values)
        groups: dict[Any, list[ir.Value]] = {}
        for value in values:
            tensor = self._shareable(value) if id(value) not in parts else None
            if tensor is not None:
                groups.setdefault((tensor.dtype, tuple(tensor.shape.numpy())), []).append(value)
        changed = False
        for group in groups.values():
            # Only what has a double by type and shape is read.
            first: dict[bytes, ir.Value] = {}
            for value in group if len(group) > 1 else ():
                kept = first.setdefault(_digest(value), value)
                if kept is not value:
                    self._merge(kept, value)
                    changed = True
        return changed

    def _shareable(self, value: ir.Value) -> ir.TensorProtocol | None:
        tensor = self.bench.tensor(value)
        if tensor is None or value.is_graph_output() or tensor.dtype in _BYTES or tensor.dtype.bitwidth < 8:
            return None
        return None if any(b.encodes(use.node) for use in value.uses()) else tensor

    def _merge(self, kept: ir.Value, double: ir.Value) -> None:
        double.replace_all_uses_with(kept)
        self.bench.note(double, f"equal to {kept.name}", kept)
        self.bench.drop(double)
        self.bench.counts["deduplicate"] += 1

    def _nodes(self, scope: b.Scope) -> bool:
        first: dict[Any, ir.Node] = {}
        changed = False
        for node in list(scope.graph):
            key = self._key(node)
            kept = first.setdefault(key, node) if key is not None else node
            if kept is node or any(output.is_graph_output() for output in node.outputs):
                continue
            for old, new in zip(node.outputs, kept.outputs, strict=True):
                new.shape = new.shape if new.shape is not None else old.shape
                new.type = new.type if new.type is not None else old.type
                old.replace_all_uses_with(new)
            b.remove(node)
            self.bench.counts["common-subexpression"] += 1
            changed = True
        return changed

    @staticmethod
    def _key(node: ir.Node) -> Any:
        """Equal for nodes that compute the same; None for those that may not be merged."""
        if node.domain not in b.STANDARD or node.op_type in b.NONDETERMINISTIC | {"Constant", "Dropout"}:
            return None
        if b.encodes(node) or not node.inputs or any(True for _ in subgraphs(node)):
            return None
        if any(a.is_ref() for a in node.attributes.values()):
            return None
        attributes = tuple(
            (name, ir.serde.serialize_attribute(a).SerializeToString(deterministic=True))
            for name, a in sorted(node.attributes.items())
        )
        inputs = tuple(id(value) if value is not None else None for value in node.inputs)
        return node.op_type, node.overload, inputs, attributes, tuple(bool(output.name) for output in node.outputs)


def _digest(value: ir.Value) -> bytes:
    tensor = recognize.constant(value)
    assert tensor is not None
    array = np.ascontiguousarray(tensor.numpy())
    return hashlib.sha256(array.reshape(-1).view(np.uint8).data).digest()
