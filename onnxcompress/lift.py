"""Lifts a model to a newer opset, where that is shown to change nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from onnxcompress.calibration.feeding import outputs
from onnxcompress.encodings import functions
from onnxcompress.errors import DataError, OnnxCompressError
from onnxcompress.model import bridge, valid
from onnxcompress.model.sizes import weightless

SAME = 1e-5  # relative to the largest magnitude of an output
KEEP_BYTES = 1 << 10  # constants below this may decide what an operator means; larger ones are data
CALLS = 2


def lift(model: ir.Model, opset: int, feeder: Iterable[Any]) -> str:
    """Convert `model`, in place, to `opset` with onnx's version converter; "" or why it stays as it was.

    The outputs of the first calls must be equal before and after to 1e-5 of their largest magnitude.

    Raises:
        DataError: the data does not fit the model.
    """
    if any(key[0] != functions.DOMAIN for key in model.functions):
        return "it defines functions of its own, which the version converter does not take"
    try:
        lifted = _converted(model, opset)
        before, after = (_observed(m, feeder) for m in (model, lifted))
    except DataError:
        raise
    except (OnnxCompressError, RuntimeError, ValueError, KeyError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"the version converter failed: {lines[-1][:120]}"
    worst = max((_difference(a, b) for a, b in zip(before, after, strict=True)), default=0.0)
    if not worst <= SAME:
        return f"the converted model differs by {worst:.2g}"
    model.graph = lifted.graph
    functions.refresh(model)
    functions.lift_ir_version(model, max(model.ir_version, lifted.ir_version, 7))
    return ""


def _converted(model: ir.Model, opset: int) -> ir.Model:
    """A lifted copy; large tensors stay out of the converter and come back by name."""
    copy = bridge.clone(model)
    large: dict[str, ir.TensorProtocol] = {}
    for slot in list(bridge.slots(copy)):
        tensor = slot.tensor
        if slot.initializer and tensor.dtype != ir.DataType.STRING and tensor.nbytes >= KEEP_BYTES:
            large[slot.name] = tensor
            slot.put(weightless(tensor))
    proto = bridge.to_proto(copy, keep_external=True)
    valid.set_apart(proto)
    proto = onnx.version_converter.convert_version(proto, opset)
    valid.put_back(proto)
    lifted = bridge.from_proto(proto, model.graph.name or "the model")
    for slot in list(bridge.slots(lifted)):
        if slot.name in large:
            slot.put(large.pop(slot.name))
    if large:
        raise ValueError(f"{next(iter(large))} was lost")
    _take_functions(copy, lifted)
    _forget_inferred(model, lifted)
    for key, entry in model.meta.items():
        lifted.meta[key] = entry
    return lifted


def _take_functions(model: ir.Model, lifted: ir.Model) -> None:
    """Give `lifted` the functions that expand encoded weights, which the converter drops with their domain."""
    lifted.functions.update(model.functions)
    for domain, version in model.opset_imports.items():
        lifted.opset_imports.setdefault(domain, version)
    functions.refresh(lifted)


def _forget_inferred(model: ir.Model, lifted: ir.Model) -> None:
    """Drop the shapes the converter wrote beside its work: they would make the file larger."""
    known = {v.name for _, owner in bridge.scopes(model) for n in owner for v in n.outputs if v.type is not None}
    for _, owner in bridge.scopes(lifted):
        for node in owner:
            for value in node.outputs:
                if value.name not in known and not value.is_graph_output():
                    value.shape, value.type = None, None


def _observed(model: ir.Model, feeder: Iterable[Any]) -> list[np.ndarray]:
    names = [value.name for value in model.graph.outputs if value.name and isinstance(value.type, ir.TensorType)]
    return [np.asarray(r[n]) for r, _ in outputs(model, names, feeder, limit=CALLS) for n in names]


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if a.dtype.kind not in "fc":
        return 0.0 if np.array_equal(a, b) else float("inf")
    wide, other = a.astype(np.float64), b.astype(np.float64)
    if not np.array_equal(np.isfinite(wide), np.isfinite(other)):
        return float("inf")
    finite = np.isfinite(wide)
    if not finite.any():
        return 0.0
    scale = float(np.abs(wide[finite]).max())
    return float(np.abs(wide[finite] - other[finite]).max()) / (scale or 1.0)
