"""If nodes whose condition is a constant."""

from __future__ import annotations

import onnx_ir as ir

from onnxcompress.model.roles import subgraphs
from onnxcompress.passes.simplification import bench as b


class Branches:
    """Puts the branch that a constant condition selects in the place of its `If`.

    1. Nodes and constants of the branch move before the `If`; names that are taken there get a suffix.
    2. An output of the branch takes the name of the output of the `If`; one that the branch merely hands through, or
       hands out twice, goes through an `Identity`.

    Left alone: conditions that are fed or computed, sequences, and branches with inputs (ONNX has none).
    """

    def __init__(self, bench: b.Bench) -> None:
        self.bench = bench

    def run(self) -> bool:
        """Inline every `If` that can be; True when anything changed."""
        changed = False
        for scope in self.bench.scopes():
            for node in list(scope.graph):
                if node.graph is None or not b.standard(node, "If") or len(node.inputs) != 1:
                    continue
                condition = self.bench.tensor(node.inputs[0])
                if condition is None or condition.size != 1 or any(a.is_ref() for a in node.attributes.values()):
                    continue
                chosen = node.attributes.get("then_branch" if bool(condition.numpy().item()) else "else_branch")
                if chosen is None or len(chosen.as_graph().inputs) or not _tensors(node):
                    continue
                self._inline(scope, node, chosen.as_graph())
                changed = True
        return changed

    def _inline(self, scope: b.Scope, node: ir.Node, branch: ir.Graph) -> None:
        taken, moved = self._names(node), {id(inner) for inner in branch}
        outputs = list(branch.outputs)
        while len(branch.outputs):
            branch.outputs.pop()
        self._move(scope, node, branch, taken)
        condition = node.inputs[0]
        seen: set[int] = set()
        for old, new in zip(node.outputs, outputs, strict=True):
            producer = new.producer()
            if producer is None or id(producer) not in moved or id(new) in seen:
                identity = ir.Node("", "Identity", [new], outputs=[ir.Value(name=None)], name="")
                scope.graph.insert_before(node, identity)
                new = identity.outputs[0]
            seen.add(id(new))
            name, shape, kind = old.name, old.shape, old.type
            old.name = f"{name}/inlined"
            new.name = name
            new.shape, new.type = shape if shape is not None else new.shape, kind if kind is not None else new.type
            new.metadata_props.update(old.metadata_props)
            old.replace_all_uses_with(new, replace_graph_outputs=True)
        b.remove(node)
        if condition is not None:
            self.bench.drop(condition)
        self.bench.counts["inline-if"] += 1

    def _move(self, scope: b.Scope, node: ir.Node, branch: ir.Graph, taken: set[str]) -> None:
        for value in list(branch.initializers.values()):
            tensor = value.const_value
            assert tensor is not None
            branch.initializers.pop(value.name or "")
            value.name = _free(value.name or "constant", taken)
            if self.bench.needs_nodes(scope):
                fresh = ir.Value(name=value.name, shape=value.shape, type=value.type)
                constant = ir.Node("", "Constant", [], [ir.AttrTensor("value", tensor)], outputs=[fresh], name="")
                scope.graph.insert_before(node, constant)
                value.replace_all_uses_with(fresh)
                self.bench.note(value, f"moved out of the branch of {node.name or node.outputs[0].name}", fresh)
            else:
                scope.graph.register_initializer(value)
        for inner in list(branch):
            for output in inner.outputs:
                if output.name:
                    output.name = _free(output.name, taken)
            branch.remove(inner)
            scope.graph.insert_before(node, inner)

    def _names(self, node: ir.Node) -> set[str]:
        """Names of values outside `node`, in every scope: a name of an outer or inner graph may not be used again."""
        inside = {id(value) for graph in subgraphs(node) for value in _all_values(graph)}
        return {v.name or "" for scope in self.bench.scopes() for v in b.values(scope.graph) if id(v) not in inside}


def _tensors(node: ir.Node) -> bool:
    """True unless an output is known to be a sequence or optional, which Identity takes in newer opsets alone."""
    return all(o.type is None or isinstance(o.type, ir.TensorType) for o in node.outputs)


def _free(name: str, taken: set[str]) -> str:
    fresh, number = name, 1
    while fresh in taken:
        number += 1
        fresh = f"{name}_{number}"
    taken.add(fresh)
    return fresh


def _all_values(graph: ir.Graph) -> list[ir.Value]:
    found = b.values(graph)
    for node in graph:
        for inner in subgraphs(node):
            found += _all_values(inner)
    return found
