"""Rules by recomputation: the operator is written in others that have rules, and the engine goes through these."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from onnxcompress.autodiff.rule import Context, Grads
from onnxcompress.autodiff.tensor import Tensor


def recomputed(c: Context, write: Callable[[], Tensor]) -> Grads:
    """The gradients of what `write` appends from the node's inputs, which must equal its output.

    The forward node stays; what only serves to know its result again is removed with all that nobody uses.
    """
    b, scope, first = c.b, c.b.scope, len(c.b.nodes)
    y = write()
    wanted: dict[ir.Value, int] = {}  # one value may stand at two inputs: its gradient is given once
    for index, x in enumerate(c.x):
        if c.needs[index]:
            wanted.setdefault(x.value, index)
    found = c.sweep(b, b.nodes[first:], {y.value: c.g}, list(wanted))
    b.scope = scope
    result: list[Tensor | None] = [None] * len(c.x)
    for value, gradient in found.items():
        result[wanted[value]] = gradient
    return result
