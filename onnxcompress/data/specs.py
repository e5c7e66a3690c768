"""What a model wants to be fed: the name, element type and shape of each graph input."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

Feeds = Mapping[str, np.ndarray]
"""One call's inputs: graph input name -> array of the input's rank."""


@dataclasses.dataclass(frozen=True)
class InputSpec:
    """One graph input.

    `dtype`: numpy element type (`object` for strings), None when the model does not say. `shape`: one entry an axis:
    a size, a symbol (axes with the same symbol have the same size), or None for an anonymous dynamic axis; the whole
    is None when the rank is unknown. `kind`: "tensor", or "sequence", "optional", "sparse".
    """

    name: str
    dtype: np.dtype | None
    shape: tuple[int | str | None, ...] | None
    kind: str = "tensor"

    @property
    def rank(self) -> int | None:
        """Number of axes, None when unknown."""
        return None if self.shape is None else len(self.shape)

    def describe(self) -> str:
        """The wanted type and shape as one reads it in a message: `float32[batch, 3, 32, 32]`."""
        dtype = "any" if self.dtype is None else "string" if self.dtype == object else str(self.dtype)
        if self.shape is None:
            return f"{dtype} of unknown shape"
        return f"{dtype}[{', '.join('?' if dim is None else str(dim) for dim in self.shape)}]"


def input_specs(model: ir.Model) -> list[InputSpec]:
    """The inputs a caller must feed: graph inputs that have no initializer, in the graph's order."""
    defaults = model.graph.initializers
    return [_spec(value) for value in model.graph.inputs if value.name not in defaults]


def _spec(value: ir.Value) -> InputSpec:
    dtype = None
    if value.dtype is not None and value.dtype != ir.DataType.UNDEFINED:
        dtype = np.dtype(value.dtype.numpy())
    shape = None
    if value.shape is not None:
        shape = tuple(_dim(dim) for dim in value.shape)
    return InputSpec(value.name or "", dtype, shape, _kind(value.type))


def _dim(dim: int | ir.SymbolicDim) -> int | str | None:
    if isinstance(dim, int):
        return dim if dim >= 0 else None  # some exporters write -1 for "any"; ONNX Runtime reads it so as well
    return dim.value or None


def _kind(kind: ir.TypeProtocol | None) -> str:
    if isinstance(kind, ir.SequenceType):
        return "sequence"
    if isinstance(kind, ir.OptionalType):
        return "optional"
    return "sparse" if isinstance(kind, ir.SparseTensorType) else "tensor"
