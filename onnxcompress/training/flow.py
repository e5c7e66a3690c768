"""Where values of a model come from and go to: depend on an input, come from a layer with weights, lead to one.

Only the ways on which a gradient could flow count: a shape, a comparison or an index carries none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import onnx_ir as ir

from onnxcompress.autodiff.rule import ZERO
from onnxcompress.model.roles import WEIGHT_ROLES, Tracer, Use, subgraphs
from onnxcompress.model.weights import Weight


class Flow:
    """The ways through one model whose weights are `found`. Bodies of If, Loop and Scan belong to it, functions don't.

    `behind`: ids of nodes with an input that comes from a layer. `before`: ids of nodes whose outputs lead to one.
    """

    def __init__(self, model: ir.Model, found: Sequence[Weight]) -> None:
        self._tracer = Tracer(model)
        self._nodes = list(ir.traversal.RecursiveGraphIterator(model.graph))
        self._constant = self._constants(model)
        self._meets: dict[str, list[Use]] = {weight.key: list(self._ends(weight.uses)) for weight in found}
        layers = {id(use.node) for uses in self._meets.values() for use in uses if use.role in WEIGHT_ROLES}
        self.behind = self._behind(layers)
        self.before = self._before(layers)

    def meets(self, weight: Weight) -> list[Use]:
        """The operators in which `weight` meets what depends on an input, or a layer: behind arithmetic with other
        constants, where there is some (a weight's norm, a scale 1 + w)."""
        return self._meets[weight.key]

    def arithmetic(self, weight: Weight) -> Iterator[ir.Node]:
        """The nodes that compute with `weight` before it meets anything but constants."""
        for use in weight.uses:
            if use.role not in WEIGHT_ROLES and self._is_constant(use.node):
                yield use.node

    def onward(self, node: ir.Node) -> Iterator[Use]:
        """What takes the outputs of `node`, through all that only moves or joins elements."""
        waiting, seen = list(node.outputs), set[int]()
        while waiting:
            value = waiting.pop()
            for use in self._tracer.uses(value, _shape(value)):
                if use.node.op_type != "Concat":
                    yield use
                elif id(use.node) not in seen:
                    seen.add(id(use.node))
                    waiting += use.node.outputs

    def _constants(self, model: ir.Model) -> set[int]:
        """ids of the values that depend on no input's elements (on its shape, they may)."""
        known: set[int] = set()
        for graph in _graphs(model.graph):
            known.update(id(value) for value in graph.initializers.values())
        for node in self._nodes:
            if node.op_type.startswith("Random") or any(subgraphs(node)):
                continue
            if node.op_type in ("Shape", "Size") or all(v is None or id(v) in known for v in node.inputs):
                known.update(id(value) for value in node.outputs)
        return known

    def _is_constant(self, node: ir.Node) -> bool:
        return all(id(value) in self._constant for value in node.outputs)

    def _ends(self, uses: Iterable[Use]) -> Iterator[Use]:
        seen: set[tuple[int, int]] = set()
        waiting = list(uses)
        while waiting:
            use = waiting.pop()
            if (id(use.node), use.index) in seen:
                continue
            seen.add((id(use.node), use.index))
            if use.role in WEIGHT_ROLES or not self._is_constant(use.node):
                yield use
            elif not _is_zero(use.node):
                for value in use.node.outputs:
                    waiting += self._tracer.uses(value, _shape(value))

    def _behind(self, layers: set[int]) -> set[int]:
        reached: set[int] = set()
        behind: set[int] = set()
        before = -1
        while before != len(reached):  # a loop's body is gone through again with what it hands on
            before = len(reached)
            for node in self._nodes:
                after = any(id(v) in reached for v in node.inputs if v is not None)
                for graph in subgraphs(node):
                    given = after or any(id(v) in reached for v in graph.outputs)
                    reached.update(id(v) for v in graph.inputs if given)
                    after = after or any(id(v) in reached for v in graph.outputs)
                if after:
                    behind.add(id(node))
                if (after or id(node) in layers) and not _is_zero(node):
                    reached.update(id(v) for v in node.outputs)
        return behind

    def _before(self, layers: set[int]) -> set[int]:
        leading: set[int] = set()
        found: set[int] = set()
        before = -1
        while before != len(leading):
            before = len(leading)
            for node in reversed(self._nodes):
                if _is_zero(node):
                    continue
                onward = any(id(v) in leading for v in node.outputs)
                if onward:
                    found.add(id(node))
                for graph in subgraphs(node):
                    leading.update(id(v) for v in graph.outputs if onward)
                    onward = onward or any(id(v) in leading for v in graph.inputs)
                if onward or id(node) in layers:
                    leading.update(id(v) for v in node.inputs if v is not None)
        return found


def _graphs(graph: ir.Graph) -> Iterator[ir.Graph]:
    yield graph
    for node in graph:
        for inner in subgraphs(node):
            yield from _graphs(inner)


def _is_zero(node: ir.Node) -> bool:
    return (node.domain, node.op_type) in ZERO


def _shape(value: ir.Value) -> tuple[int, ...] | None:
    """The shape of a value, unknown sizes as 2: what counts is how many axes are not 1."""
    return None if value.shape is None else tuple(dim if isinstance(dim, int) else 2 for dim in value.shape)
