"""Nodes, constants and functions that nothing needs."""

from __future__ import annotations

import onnx_ir as ir

from onnxcompress.encodings import functions
from onnxcompress.model.roles import subgraphs
from onnxcompress.passes.simplification import bench as b


class DeadCode:
    """Removes what no output depends on.

    1. Nodes none of whose outputs is read or put out, with their bodies.
    2. Constants that nothing reads.
    3. Functions that nothing calls, and the import of their domain if it was of encodings.

    Left alone: graph inputs, initializers that a caller may override, weights that the recipe excludes, unused outputs
    of nodes that are used (in BatchNormalization before opset 14 their number decides what the first one means).
    """

    def __init__(self, bench: b.Bench) -> None:
        self.bench = bench

    def run(self) -> bool:
        """Apply the rules once everywhere; True when anything changed."""
        before = sum(self.bench.counts.values())
        self._functions()
        for scope in self.bench.scopes():
            self._nodes(scope)
            self._initializers(scope)
        return sum(self.bench.counts.values()) > before

    def _nodes(self, scope: b.Scope) -> None:
        for node in reversed(list(scope.graph)):
            if node.graph is None or any(
                b.used(output) or id(output) in self.bench.protected for output in node.outputs
            ):
                continue
            b.remove(node)
            self.bench.counts["dead-node"] += 1

    def _initializers(self, scope: b.Scope) -> None:
        for value in list(scope.graph.initializers.values()):
            if not b.used(value) and self.bench.drop(value):
                self.bench.counts["dead-initializer"] += 1

    def _functions(self) -> None:
        model = self.bench.model
        called: set[ir.OperatorIdentifier] = set()
        todo = [model.graph]
        while todo:
            for node in todo.pop():
                todo += subgraphs(node)
                name = node.op_identifier()
                if name in model.functions and name not in called:
                    called.add(name)
                    todo.append(model.functions[name].graph)
        for name in [name for name in model.functions if name not in called]:
            # Its nodes may not keep anything alive.
            del model.functions[name]
            self.bench.counts["dead-function"] += 1
            if name[0] == functions.DOMAIN and all(key[0] != name[0] for key in model.functions):
                for imports in [model.opset_imports, *(f.opset_imports for f in model.functions.values())]:
                    imports.pop(functions.DOMAIN, None)
