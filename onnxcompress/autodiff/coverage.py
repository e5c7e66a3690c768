"""Which weights of a model can be trained, and what stands in the way of the others."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import onnx_ir as ir

from onnxcompress.autodiff.builder import Builder
from onnxcompress.autodiff.engine import backward, inputs_of, is_float, named, reach
from onnxcompress.autodiff.errors import NoGradient
from onnxcompress.autodiff.prepare import prepare
from onnxcompress.model.bridge import clone


@dataclasses.dataclass(frozen=True)
class Trainable:
    """What `coverage` found, by names of weights.

    `reached`: their gradient is complete. `blocked`: the operators that refuse, each with the weights it cuts off.
    `unused`: no output depends on them in a way a gradient can follow. `operators`: how many of each operator the
    gradient passes through.
    """

    reached: tuple[str, ...]
    blocked: tuple[NoGradient, ...]
    unused: tuple[str, ...]
    operators: collections.Counter[str]

    @property
    def cut_off(self) -> tuple[str, ...]:
        """The weights whose gradient would be missing or incomplete."""
        return tuple(dict.fromkeys(name for error in self.blocked for name in error.cut_off))


def coverage(model: ir.Model, weights: Sequence[str] | None = None) -> Trainable:
    """Differentiate a copy of `model`, from all its float outputs, noting what refuses.

    `weights`: names of values in the main graph; by default every float constant with more than one element, those in
    the bodies of If, Loop and Scan included. `model` stays as it is; its tensors are not read.

    Raises:
        ModelError: the opset is below 13, a function cannot be inlined, or a name is unknown.
    """
    copy = clone(model)
    prepare(copy, wrt=weights or ())
    values = named(copy.graph)
    wrt = [values[name] for name in weights] if weights is not None else _constants(copy.graph)
    b, nodes = Builder(copy.graph, copy.opset_imports[""]), list(copy.graph)
    outputs = [y for y in dict.fromkeys(copy.graph.outputs) if y.dtype is not None and is_float(y)]
    refused: list[NoGradient] = []
    found = backward(b, nodes, {y: b.wrap(y) for y in outputs}, wrt, refused)
    cut = {name for error in refused for name in error.cut_off}
    reached = tuple(str(v.name) for v in wrt if v in found and v.name not in cut)
    unused = tuple(str(v.name) for v in wrt if v not in found and v.name not in cut)
    return Trainable(reached, tuple(refused), unused, _operators(nodes, wrt, outputs))


def _constants(graph: ir.Graph) -> list[ir.Value]:
    """The float constants of a graph, initializers or not."""
    found = list(graph.initializers.values())
    found += [node.outputs[0] for node in graph if node.op_type == "Constant" and not node.domain]
    return [v for v in found if v.dtype is not None and is_float(v) and v.shape is not None and _size(v) > 1]


def _size(value: ir.Value) -> int:
    tensor = ir.convenience.get_const_tensor(value)
    return 0 if tensor is None else int(tensor.size)


def _operators(
    nodes: Sequence[ir.Node], sources: Sequence[ir.Value], outputs: Sequence[ir.Value]
) -> collections.Counter[str]:
    """The operators between `sources` and `outputs`."""
    forward = reach(nodes, sources)
    wanted = set(outputs)
    counts: collections.Counter[str] = collections.Counter()
    for node in reversed(nodes):
        if any(y in wanted and y in forward for y in node.outputs):
            wanted.update(x for x in inputs_of(node) if x is not None)
            counts[node.op_type] += 1
    return counts
