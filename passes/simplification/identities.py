"""Nodes that put out what comes in."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from onnxcompress.model.roles import subgraphs
from onnxcompress.passes.simplification import bench as b


class Identities:
    """Removes nodes that change nothing, and joins pairs that move elements twice.

    1. `Identity`.
    2. `Dropout` in inference, unless its mask is used.
    3. `Cast` to the type its input is known to have.
    4. `Transpose` that keeps the order of axes; a `Transpose` of a `Transpose` becomes one.
    5. `Reshape` of a `Reshape`, when the second shape is a constant without zeros (which would refer to the first).

    Left alone: a node between a graph input, an initializer, a value from outside or another output, and a graph
    output: the output needs a node of its own (onnx-ir's IdentityElimination 1.1.0 renames the outer value); and one
    between a node with bodies and a graph output: the name of its first output is the path of the weights inside.
    """

    def __init__(self, bench: b.Bench) -> None:
        self.bench = bench

    def run(self) -> bool:
        """Apply the rules once everywhere; True when anything changed."""
        rules: dict[str, Callable[[b.Scope, ir.Node], bool]] = {
            "Identity": self._identity,
            "Dropout": self._dropout,
            "Cast": self._cast,
            "Transpose": self._transpose,
            "Reshape": self._reshape,
        }
        changed = False
        for scope in self.bench.scopes():
            if scope.opset < b.LEAST_OPSET:
                continue
            for node in list(scope.graph):
                rule = rules.get(node.op_type)
                if rule is None or node.domain not in b.STANDARD or node.graph is None:
                    continue
                if not node.inputs or node.inputs[0] is None or any(a.is_ref() for a in node.attributes.values()):
                    continue
                if rule(scope, node):
                    self.bench.counts[f"remove-{node.op_type.lower()}"] += 1
                    changed = True
        return changed

    def _identity(self, scope: b.Scope, node: ir.Node) -> bool:
        return self._bypass(node)

    def _dropout(self, scope: b.Scope, node: ir.Node) -> bool:
        if any(b.used(output) for output in node.outputs[1:]):
            return False
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            mode = self.bench.tensor(node.inputs[2])
            if mode is None or bool(np.any(mode.numpy())):
                return False
        return self._bypass(node)

    def _cast(self, scope: b.Scope, node: ir.Node) -> bool:
        source = node.inputs[0]
        to = node.attributes.get("to")
        if source is None or to is None or source.dtype is None or int(source.dtype) != to.as_int():
            return False
        return self._bypass(node)

    def _transpose(self, scope: b.Scope, node: ir.Node) -> bool:
        perm = _perm(node)
        if perm is not None and perm == sorted(perm):
            return self._bypass(node)
        first = _only_before(node, "Transpose")
        if first is None or perm is None:
            return False
        before = _perm(first)
        if before is None or len(before) != len(perm):
            return False
        node.attributes["perm"] = ir.AttrInt64s("perm", [before[i] for i in perm])
        return self._skip(first, node)

    def _reshape(self, scope: b.Scope, node: ir.Node) -> bool:
        first = _only_before(node, "Reshape")
        shape = self.bench.tensor(node.inputs[1]) if len(node.inputs) > 1 else None
        if first is None or shape is None or not np.all(shape.numpy()):
            return False
        return self._skip(first, node)

    @staticmethod
    def _skip(first: ir.Node, second: ir.Node) -> bool:
        """Let `second` read what `first`, which nothing else needs, reads."""
        second.replace_input_with(0, first.inputs[0])
        b.remove(first)
        return True

    @staticmethod
    def _bypass(node: ir.Node) -> bool:
        """Remove a node whose first output is its first input; False where that cannot be."""
        source, output = node.inputs[0], node.outputs[0]
        assert source is not None
        if output.is_graph_output():
            producer = source.producer()
            if producer is None or producer.graph is not node.graph or source.is_graph_output():
                return False
            if any(True for _ in subgraphs(producer)):
                return False
        if source.type is None:
            source.type = output.type
        if output.is_graph_output():
            if output.shape is not None:
                source.shape = output.shape
            output.replace_all_uses_with(source, replace_graph_outputs=True)
            name = output.name
            output.name = f"{name}/removed"
            source.name = name
            source.metadata_props.update(output.metadata_props)
        else:
            if source.shape is None:
                source.shape = output.shape
            output.replace_all_uses_with(source)
        b.remove(node)
        return True


def _perm(node: ir.Node) -> list[int] | None:
    """The permutation, also where it is left out (reversed axes) and the rank is known."""
    attribute = node.attributes.get("perm")
    if attribute is not None:
        return list(attribute.as_ints())
    shape = node.outputs[0].shape or (node.inputs[0].shape if node.inputs[0] is not None else None)
    return list(range(len(shape)))[::-1] if shape is not None else None


def _only_before(node: ir.Node, op_type: str) -> ir.Node | None:
    """The node before `node`, if it is of this type in the same graph and nothing else reads its output."""
    source = node.inputs[0]
    first = source.producer() if source is not None else None
    if source is None or first is None or not b.standard(first, op_type) or first.graph is not node.graph:
        return None
    if source.is_graph_output() or len(source.uses()) != 1 or first.inputs[0] is None:
        return None
    return None if any(a.is_ref() for a in first.attributes.values()) else first
