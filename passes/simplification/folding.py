"""Constant folding that never makes the file larger."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from onnxcompress.encodings import recognize
from onnxcompress.model.roles import subgraphs
from onnxcompress.model.spill import spill
from onnxcompress.passes.simplification import bench as b
from onnxcompress.passes.simplification.evaluate import Evaluator, Kind, nbytes, supported

_EAGER = 1 << 16  # results this small are computed at once: they may be shapes, which other results depend on
_LEAST_LIMIT = 1 << 20
_SHARED_LEAST = 256  # smaller sources do not tie results together: a shape or an axis is shared by everything
# ONNX Runtime computes float16 in float32 where it lacks a kernel, and rounds only where its optimizer leaves a Cast:
# what a run would give is not known of single nodes, but of those that round nothing.
_MOVES = {
    "Cast", "Concat", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Reshape", "Shape", "Size", "Slice",
    "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze",
}  # fmt: skip
_UNFOLDED = {"Constant", "Dropout"} | b.NONDETERMINISTIC | b.QUANTIZED


@dataclasses.dataclass
class _Plan:
    """What is known of one scope: nodes that only depend on constants, in order, and their results."""

    nodes: list[ir.Node]
    places: dict[int, int]
    kinds: dict[ir.Value, Kind]
    arrays: dict[ir.Value, np.ndarray]


class Folding:
    """Replaces nodes that only depend on constants by what they compute.

    1. A result is stored when it takes no more bytes than the nodes and constants that become unused by it.
    2. Results that share a constant (the gates cut out of one recurrent weight) are judged together where they fail
       alone.
    3. Where a result would be larger (Cast float16 -> float32, ConstantOfShape, Expand, a weight used elsewhere too),
       it is left and rule 1 is tried on its inputs.

    Left alone: random operators, quantization and encodings, operators with bodies, float16 arithmetic, sequences and
    strings, and everything that ONNX Runtime does not compute.
    """

    def __init__(self, bench: b.Bench) -> None:
        self.bench = bench
        self.evaluator = Evaluator(bench.model.ir_version)
        self.limit = _LEAST_LIMIT
        self.barred: dict[int, ir.Node] = {}

    def run(self) -> int:
        """Fold the whole model; the number of nodes that went."""
        folded = 0
        try:
            for scope in self.bench.scopes():
                if scope.opset >= b.LEAST_OPSET:
                    folded += self._scope(scope)
        finally:
            self.evaluator.close()
        return folded

    def _scope(self, scope: b.Scope) -> int:
        self.barred = {}
        folded = 0
        plan = self._plan(scope)
        while roots := self._roots(plan):
            left = []
            for root in roots:
                done = self._replace(scope, plan, [root])
                folded += done
                left += [] if done else [root]
            for group in self._groups(plan, left):
                folded += self._replace(scope, plan, group)
            for root in left:
                node = root.producer()
                if node is not None and node.graph is not None and b.used(root):
                    self.barred[id(node)] = node
            plan.nodes = [n for n in plan.nodes if n.graph is not None and id(n) not in self.barred]
        return folded

    # What could be folded --------------------------------------------------------------------------------------------

    def _plan(self, scope: b.Scope) -> _Plan:
        plan = _Plan([], {}, {}, {})
        constants = [*scope.graph.initializers.values(), *(n.outputs[0] for n in scope.graph if _is_constant(n))]
        sizes = [t.nbytes for value in constants if (t := self.bench.tensor(value)) is not None]
        self.limit = max(_LEAST_LIMIT, 4 * max(sizes, default=0))
        for node in scope.graph:
            kinds = self._outcome(scope, plan, node)
            if kinds is None:
                continue
            plan.places[id(node)] = len(plan.places)
            plan.nodes.append(node)
            plan.kinds.update(zip(node.outputs, kinds, strict=True))
            if sum(nbytes(kind) for kind in kinds) <= _EAGER and not self._compute(scope, plan, node):
                plan.nodes.pop()
                for output in node.outputs:
                    del plan.kinds[output]
        return plan

    def _outcome(self, scope: b.Scope, plan: _Plan, node: ir.Node) -> list[Kind] | None:
        """Types and shapes of the outputs of a node that can be folded, else None."""
        if node.domain not in b.STANDARD or node.op_type in _UNFOLDED or not node.inputs or node.overload:
            return None
        if any(a.is_ref() for a in node.attributes.values()) or any(True for _ in subgraphs(node)):
            return None
        kinds: list[Kind | None] = []
        for value in node.inputs:
            kind = self._kind(plan, value) if value is not None else None
            if value is not None and kind is None:
                return None
            kinds.append(kind)
        if all(kind is None for kind in kinds):
            return None
        if node.op_type not in _MOVES and any(kind is not None and kind[0] == ir.DataType.FLOAT16 for kind in kinds):
            return None
        data = [
            self._array(plan, v) if v is not None and kind is not None and nbytes(kind) <= _EAGER else None
            for v, kind in zip(node.inputs, kinds, strict=True)
        ]
        found = self.evaluator.infer(node, scope.opset, kinds, data)
        if found is None or any(nbytes(kind) > self.limit for kind in found):
            return None
        return found

    def _kind(self, plan: _Plan, value: ir.Value) -> Kind | None:
        if value in plan.kinds:
            return plan.kinds[value]
        tensor = self.bench.tensor(value)
        if tensor is None or not supported(tensor.dtype):
            return None
        return tensor.dtype, tuple(tensor.shape.numpy())

    def _array(self, plan: _Plan, value: ir.Value) -> np.ndarray | None:
        """What a value holds, if it is at hand."""
        if value in plan.arrays:
            return plan.arrays[value]
        tensor = self.bench.tensor(value)
        return tensor.numpy() if tensor is not None else None

    def _compute(self, scope: b.Scope, plan: _Plan, node: ir.Node) -> bool:
        """Compute a planned node, and before it those it depends on; False when ONNX Runtime cannot."""
        inputs: list[np.ndarray | None] = []
        for value in node.inputs:
            array = None
            if value is not None:
                producer = value.producer()
                if value in plan.kinds and value not in plan.arrays:
                    assert producer is not None
                    if not self._compute(scope, plan, producer):
                        return False
                array = self._array(plan, value)
                if array is None:
                    return False
            inputs.append(array)
        found = self.evaluator.run(node, scope.opset, inputs, [plan.kinds[o] for o in node.outputs])
        if found is None:
            return False
        plan.arrays.update(zip(node.outputs, (spill(a, self.bench.work) for a in found), strict=True))
        return True

    def _roots(self, plan: _Plan) -> list[ir.Value]:
        """Results that something outside the plan reads."""
        planned = {id(node) for node in plan.nodes}
        return [
            output
            for node in plan.nodes
            for output in node.outputs
            if output.is_graph_output() or any(id(use.node) not in planned for use in output.uses())
        ]

    # What is worth it ------------------------------------------------------------------------------------------------

    def _groups(self, plan: _Plan, roots: list[ir.Value]) -> list[list[ir.Value]]:
        """Results that share a source of some size, together."""
        parent = list(range(len(roots)))

        def find(i: int) -> int:
            while parent[i] != i:
                i = parent[i]
            return i

        first: dict[int, int] = {}
        for index, root in enumerate(roots):
            _, sources = self._cone(plan, [root])
            for source in sources:
                tensor = recognize.constant(source)
                if tensor is not None and tensor.nbytes >= _SHARED_LEAST:
                    parent[find(index)] = find(first.setdefault(id(source), index))
        grouped: dict[int, list[ir.Value]] = {}
        for index, root in enumerate(roots):
            grouped.setdefault(find(index), []).append(root)
        return [group for group in grouped.values() if len(group) > 1]

    def _cone(self, plan: _Plan, roots: list[ir.Value]) -> tuple[list[ir.Node], list[ir.Value]]:
        """The planned nodes that `roots` depend on, last first, and the constants at their ends."""
        nodes: dict[int, ir.Node] = {}
        sources: dict[int, ir.Value] = {}
        todo = [root.producer() for root in roots]
        while todo:
            node = todo.pop()
            assert node is not None
            if id(node) in nodes:
                continue
            nodes[id(node)] = node
            for value in node.inputs:
                if value is None:
                    continue
                if value in plan.kinds:
                    todo.append(value.producer())
                else:
                    sources[id(value)] = value
        last_first = sorted(nodes.values(), key=lambda node: -plan.places[id(node)])
        return last_first, list(sources.values())

    def _unused(self, plan: _Plan, roots: list[ir.Value]) -> tuple[list[ir.Node], list[ir.Value]]:
        """Nodes, last first, and constants that nothing needs once `roots` are stored."""
        nodes, sources = self._cone(plan, roots)
        stored, gone = {id(root) for root in roots}, set()
        dead = []
        for node in nodes:
            if all(
                id(o) in stored or (not o.is_graph_output() and all(id(u.node) in gone for u in o.uses()))
                for o in node.outputs
            ):
                gone.add(id(node))
                dead.append(node)
        return dead, [
            value for value in sources if not value.is_graph_output() and all(id(u.node) in gone for u in value.uses())
        ]

    def _replace(self, scope: b.Scope, plan: _Plan, roots: list[ir.Value]) -> int:
        """Store `roots` if that takes no more bytes than it frees; the number of nodes that went."""
        roots = [root for root in roots if root.producer() is not None and b.used(root)]
        dead, sources = self._unused(plan, roots)
        heirs = self._heirs(scope, plan, roots, sources)
        cost = sum(
            b.new_bytes(
                heirs.get(id(root), root.name or ""),
                nbytes(plan.kinds[root]),
                plan.kinds[root][1],
                as_node=self.bench.needs_nodes(scope) or root.is_graph_output(),
            )
            for root in roots
        )
        if not roots or not dead or cost > b.sum_stored(sources) + sum(b.node_bytes(node) for node in dead):
            return 0
        for root in roots:
            producer = root.producer()
            assert producer is not None
            if root not in plan.arrays and not self._compute(scope, plan, producer):
                return 0
        self._store(scope, plan, roots, heirs, dead, sources)
        return len(dead)

    def _heirs(self, scope: b.Scope, plan: _Plan, roots: list[ir.Value], sources: list[ir.Value]) -> dict[int, str]:
        """The name of the weight that a result consists of, when it goes with all its elements into that one result.

        A recipe that selects weights by name finds a transposed or cast weight under the name it had.
        """
        if len(roots) != 1 or roots[0].is_graph_output():
            return {}
        weights = [v for v in sources if _is_weight(self.bench.tensor(v))]
        if len(weights) != 1 or not weights[0].name or weights[0].graph is not scope.graph:
            return {}
        tensor = recognize.constant(weights[0])
        dtype, shape = plan.kinds[roots[0]]
        same = tensor is not None and tensor.size == int(np.prod(shape, dtype=np.int64)) and dtype.is_floating_point()
        return {id(roots[0]): weights[0].name} if same else {}

    def _store(
        self,
        scope: b.Scope,
        plan: _Plan,
        roots: list[ir.Value],
        heirs: dict[int, str],
        dead: list[ir.Node],
        sources: list[ir.Value],
    ) -> None:
        fresh = []
        for root in roots:
            name, producer = root.name or "", root.producer()
            assert producer is not None
            output = root.is_graph_output()
            # The old name must be free before the new constant takes it. A branch cannot put out an initializer in
            # every runtime, so an output stays the output of a node.
            root.name = f"{name}/folded"
            array = np.ascontiguousarray(plan.arrays[root]).reshape(plan.kinds[root][1])
            value = self.bench.put(scope, name, array, producer, as_node=output)
            value.doc_string = root.doc_string
            value.metadata_props.update(root.metadata_props)
            if value.producer() is not None:
                # The declared type of an output is part of the model's interface, with its symbolic dimensions.
                value.shape, value.type = root.shape, root.type
            root.replace_all_uses_with(value, replace_graph_outputs=True)
            fresh.append((root, value))
        for node in dead:
            for result in node.outputs:
                if result not in roots:
                    plan.arrays.pop(result, None)
            b.remove(node)
        for source in sources:
            self.bench.note(source, f"folded into {' and '.join(_names(fresh, heirs))}", fresh[0][1])
            self.bench.drop(source)
        for root, value in fresh:
            plan.arrays.pop(root, None)
            if id(root) in heirs:
                value.name = heirs[id(root)]


def _names(fresh: list[tuple[ir.Value, ir.Value]], heirs: dict[int, str]) -> list[str]:
    names = [heirs.get(id(root), value.name or "") for root, value in fresh]
    return names if len(names) <= 3 else [*names[:2], f"{len(names) - 2} more"]


def _is_weight(tensor: ir.TensorProtocol | None) -> bool:
    return tensor is not None and tensor.dtype.is_floating_point() and tensor.size > 1


def _is_constant(node: ir.Node) -> bool:
    return b.standard(node, "Constant")
