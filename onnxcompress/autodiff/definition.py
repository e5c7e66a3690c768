"""What a definition is, and the table of them: an operator written in others that have rules.

A definition gets a builder and the node and returns the node's outputs, None for those it leaves out; None altogether
where this form of the node needs no definition or has none. It takes the node's place before differentiation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir

from onnxcompress.autodiff.builder import Builder
from onnxcompress.autodiff.tensor import Tensor

Outputs = Sequence["Tensor | None"]
Definition = Callable[[Builder, "Call"], "Outputs | None"]
DEFINITIONS: dict[tuple[str, str], Definition] = {}
MICROSOFT = "com.microsoft"


class Call:
    """A node to be defined: its inputs as tensors and its attributes."""

    def __init__(self, b: Builder, node: ir.Node) -> None:
        self.node, self._b = node, b

    def __getitem__(self, index: int) -> Tensor:
        value = self.node.inputs[index]
        assert value is not None
        return self._b.wrap(value)

    def has(self, index: int) -> bool:
        """True when input `index` is given."""
        return index < len(self.node.inputs) and self.node.inputs[index] is not None

    def attr(self, name: str, default: Any = None) -> Any:
        """An attribute's value."""
        attribute = self.node.attributes.get(name)
        return default if attribute is None else attribute.value

    def keep(self, *names: str) -> dict[str, Any]:
        """The node's attributes of these names, for another node."""
        return {name: self.node.attributes[name] for name in names if name in self.node.attributes}

    def plus(self, t: Tensor, index: int) -> Tensor:
        """`t`, with optional input `index` added."""
        return t + self[index] if self.has(index) else t


def define(op_type: str, domain: str = MICROSOFT) -> Callable[[Definition], Definition]:
    """Register a definition."""

    def register(function: Definition) -> Definition:
        DEFINITIONS[domain, op_type] = function
        return function

    return register
