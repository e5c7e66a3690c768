"""What a rule is, and the table of them.

A rule gets a `Context` (the node, its inputs and outputs, the gradients of its outputs) and returns one gradient, or
None, for each input. It never asks which gradients are wanted: the engine drops what nobody needs, and with it every
node that served nothing else. To add an operator:

    @rule("Sin")
    def sin(c: Context) -> Grads:
        "dx = g cos x"
        return [c.g * c.x[0].map("Cos")]

in the file of its family under `rules/`; for elementwise operators a line in the table there is enough, broadcasting is
undone for it. The first line of the docstring is what the documentation says of it. A rule that cannot treat some form
of its operator says so with `raise c.refuse("why")`, and lists such forms for the documentation: `rule(...,
refuses="what")`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcompress.autodiff.builder import Builder
from onnxcompress.autodiff.errors import NoGradient
from onnxcompress.autodiff.tensor import Tensor

Grads = Sequence["Tensor | None"]
Rule = Callable[["Context"], Grads]


@dataclasses.dataclass
class Context:
    """All a rule may use.

    `x`: the inputs as tensors, None where an optional one is left out, followed by what the node's bodies capture from
    outside. `y`: the outputs. `grads`: the gradients of the outputs, None where nothing depends on one. `needs`: for
    each of `x`, whether its gradient is wanted; only rules that save real work ask. `sweep`: the engine itself, for
    bodies.
    """

    b: Builder
    node: ir.Node
    x: list[Tensor]
    y: list[Tensor]
    grads: list[Tensor | None]
    needs: list[bool]
    sweep: Callable[..., dict[ir.Value, Tensor]]

    @property
    def g(self) -> Tensor:
        """The gradient of the first output."""
        if self.grads[0] is None:
            raise self.refuse("only a secondary output is used, which has no rule")
        return self.grads[0]

    def has(self, index: int) -> bool:
        """True when the optional input `index` is given."""
        return index < len(self.node.inputs) and self.node.inputs[index] is not None

    def only(self, outputs: int = 1) -> None:
        """Refuse gradients of any output after the first `outputs`."""
        if any(g is not None for g in self.grads[outputs:]):
            raise self.refuse(f"the gradient of output {outputs} and later ones has no rule")

    def refuse(self, reason: str) -> NoGradient:
        """The error that says what this rule cannot do."""
        return NoGradient(self.node.name or str(self.node.outputs[0].name), self.node.op_type, reason)

    def attr(self, name: str, default: Any = None) -> Any:
        """An attribute's value (numbers, lists of numbers, strings)."""
        attribute = self.node.attributes.get(name)
        return default if attribute is None else attribute.value

    def constant(self, index: int) -> np.ndarray | None:
        """The value of input `index` where it is constant."""
        if not self.has(index):
            return None
        value = self.node.inputs[index]
        tensor = None if value is None else ir.convenience.get_const_tensor(value)
        return None if tensor is None else tensor.numpy()

    def rank(self, index: int = 0) -> int:
        """The rank of input `index`.

        Raises:
            NoGradient: it is unknown.
        """
        rank = self.x[index].rank
        if rank is None:
            raise self.refuse(f"the rank of input {index} is unknown; declare its shape")
        return rank

    def axis(self, default: int = 0) -> int:
        """Attribute `axis`, as a number from 0 on where the rank of the first input is known."""
        axis, rank = int(self.attr("axis", default)), self.x[0].rank
        return axis % rank if rank else axis

    def axes_from(self, default: int) -> list[int]:
        """Attribute `axis` and all axes after it."""
        axis = self.axis(default)
        return list(range(axis, 0)) if axis < 0 else list(range(axis, self.rank()))

    def output(self, index: int, dtype: ir.DataType | None = None) -> Tensor:
        """Output `index` of the forward node, which is made to emit it where it did not."""
        if index >= len(self.node.outputs):
            self.node.resize_outputs(index + 1)
        value = self.node.outputs[index]
        if not value.name:
            value.name = self.b.name(f"{self.node.outputs[0].name}/output_{index}")
            value.dtype = dtype or self.node.outputs[0].dtype or self.x[0].dtype
        return self.b.wrap(value)


RULES: dict[tuple[str, str], Rule] = {}
FAMILIES: dict[tuple[str, str], str] = {}
REFUSALS: dict[tuple[str, str], str] = {}
PARTIALS: dict[tuple[str, str], Sequence[Callable[..., Tensor] | None]] = {}  # of elementwise operators
ZERO: set[tuple[str, str]] = set()
STRAIGHT_THROUGH: set[tuple[str, str]] = set()


def rule(*op_types: str, domain: str = "", refuses: str = "") -> Callable[[Rule], Rule]:
    """Register a rule for operators of `domain`. `refuses`: the forms of them it refuses, in words."""

    def register(function: Rule) -> Rule:
        for op_type in op_types:
            RULES[domain, op_type] = function
            FAMILIES[domain, op_type] = function.__module__.rsplit(".", 1)[-1]
            REFUSALS[domain, op_type] = refuses
        return function

    return register


def elementwise(op_type: str, formula: str, *partials: Callable[..., Tensor] | None, domain: str = "") -> None:
    """Register an operator whose inputs broadcast: for each input, its gradient from (g, *inputs, output).

    Broadcasting is undone afterwards. None: this input has no gradient. `formula`: the same for the documentation.
    """

    def apply(c: Context) -> Grads:
        found: list[Tensor | None] = []
        for x, partial, needed in zip(c.x, partials, c.needs, strict=False):
            found.append(partial(c.g, *c.x, c.y[0]).unbroadcast(x) if partial and needed else None)
        return found

    apply.__module__, apply.__doc__ = "elementwise", formula
    PARTIALS[domain, op_type] = partials
    rule(op_type, domain=domain)(apply)


def zero(*op_types: str) -> None:
    """Operators whose outputs do not change, or change in steps: no gradient passes."""
    ZERO.update(("", op_type) for op_type in op_types)
