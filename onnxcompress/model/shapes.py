"""The shape of every value, and how it is known: declared in the file, inferred from operators, or seen in a run."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from onnxcompress.model import bridge
from onnxcompress.model.limits import DEFAULT
from onnxcompress.model.sizes import weightless

Dims = tuple[int | str | None, ...]


class Origin(enum.Enum):
    """How a shape is known."""

    DECLARED = "declared"
    INFERRED = "inferred"
    OBSERVED = "observed"


@dataclasses.dataclass(frozen=True)
class ShapeInfo:
    """`dims`: sizes, names of free dimensions, or None for unknown ones; None as a whole when the rank is unknown."""

    dims: Dims | None
    dtype: ir.DataType | None
    origin: Origin

    @property
    def static(self) -> bool:
        """True when every dimension is a number."""
        return self.dims is not None and all(isinstance(size, int) for size in self.dims)

    @property
    def known(self) -> int:
        """How many dimensions are numbers; -1 when the rank is unknown."""
        return -1 if self.dims is None else sum(isinstance(size, int) for size in self.dims)


def shapes(model: ir.Model, observed: Mapping[str, Any] | None = None) -> dict[str, ShapeInfo]:
    """The best known shape of every value, by name with the path of its scope (`bridge.scopes`), main graph first.

    `observed`: name -> array or dimensions from one run. What was observed wins over a declaration it contradicts and
    over anything incomplete; an inferred shape wins over a declared one that knows less. Inference sees a copy of the
    graph without weights; where it fails, what is declared remains.
    """
    inferred = _inferred(model)
    found: dict[str, ShapeInfo] = {}
    for path, owner in bridge.scopes(model):
        for value in values(owner):
            if not value.name:
                continue
            name = f"{path}{value.name}"
            best = _declared(value)
            other = inferred.get(name)
            if other is not None and (best is None or other.known > best.known):
                best = other
            if observed is not None and name in observed:
                seen = _observed(observed[name])
                if seen is not None and (best is None or not best.static or best.dims != seen.dims):
                    best = seen
            if best is not None:
                if best.dtype is None and other is not None:
                    best = dataclasses.replace(best, dtype=other.dtype)
                found[name] = best
    return found


def values(owner: ir.Graph | ir.Function) -> list[ir.Value]:
    """The values one scope defines: inputs, initializers, outputs of nodes."""
    found = list(owner.inputs)
    if isinstance(owner, ir.Graph):
        names = {value.name for value in found}
        found += [value for value in owner.initializers.values() if value.name not in names]
    for node in owner:
        found += node.outputs
    return found


def _declared(value: ir.Value) -> ShapeInfo | None:
    if value.const_value is not None:
        return ShapeInfo(tuple(value.const_value.shape.numpy()), value.const_value.dtype, Origin.DECLARED)
    if value.shape is None and value.dtype is None:
        return None
    return ShapeInfo(_dims(value.shape), value.dtype, Origin.DECLARED)


def _dims(shape: ir.Shape | None) -> Dims | None:
    if shape is None:
        return None
    return tuple(size if isinstance(size, int) else size.value for size in shape)


def _observed(value: Any) -> ShapeInfo | None:
    if isinstance(value, np.ndarray | np.generic):
        try:
            dtype = ir.DataType.from_numpy(value.dtype)
        except TypeError:  # an object array: strings
            dtype = ir.DataType.STRING
        return ShapeInfo(tuple(int(size) for size in value.shape), dtype, Origin.OBSERVED)
    if isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(size, int) for size in value):
        return ShapeInfo(tuple(value), None, Origin.OBSERVED)
    return None  # a sequence or a map has no shape


def _inferred(model: ir.Model) -> dict[str, ShapeInfo]:
    """Run onnx's shape inference on the graph with stand-ins for its weights; {} where it fails."""
    swaps: dict[int, Any] = {}
    for slot in bridge.slots(model):
        if slot.tensor.dtype != ir.DataType.STRING and slot.tensor.nbytes >= DEFAULT.external_threshold:
            swaps[id(slot.tensor)] = weightless(slot.tensor)
        elif isinstance(slot.tensor, ir.ExternalTensor):
            swaps[id(slot.tensor)] = bridge.inlined(slot.tensor)
    try:
        with bridge.swapped(model, swaps):
            proto = bridge.to_proto(model, keep_external=True)
        result = onnx.shape_inference.infer_shapes(proto, check_type=False, strict_mode=False, data_prop=True)
        again = bridge.from_proto(result, "shape inference")
    except Exception:  # any failure of inference means no more than that it says nothing
        return {}
    found: dict[str, ShapeInfo] = {}
    for path, owner in bridge.scopes(again):
        for value in values(owner):
            if value.name and (value.shape is not None or value.dtype is not None):
                found[f"{path}{value.name}"] = ShapeInfo(_dims(value.shape), value.dtype, Origin.INFERRED)
    return found
