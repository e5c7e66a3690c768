"""Weights stored as int8 and expanded when the model is loaded: small files at float speed, in any opset and scope."""

from __future__ import annotations

import numpy as np

from onnxcompress.contract import Left, Reason, Select
from onnxcompress.encodings.affine import Affine
from onnxcompress.model.roles import WEIGHT_ROLES
from onnxcompress.model.weights import Weight
from onnxcompress.numerics.affine import quantize_weight
from onnxcompress.numerics.error import relative_rms
from onnxcompress.numerics.transforms import is_transform
from onnxcompress.passes.quantization.job import Job

NODE_BYTES = 80  # a call node and the headers of its constants, beside their names
FUNCTION_BYTES = 500  # the local function that expands them, once


def refuse(weight: Weight, select: Select, min_elements: int) -> tuple[Reason, str] | None:
    """Why no form of int8 suits this weight, whatever its consumers are; None when one may."""
    if weight.attribute is not None:
        return Reason.ATTRIBUTE, "lives in an attribute of an ai.onnx.ml operator"
    if weight.role in WEIGHT_ROLES and not select.allows(weight):
        return Reason.EXCLUDED, ""
    if weight.encoding.kind not in ("dense", "masked"):
        return Reason.ALREADY_ENCODED, f"is stored as {weight.encoding.kind}"
    if weight.value.is_graph_output():
        return Reason.GRAPH_OUTPUT, "is itself an output"
    if weight.role not in WEIGHT_ROLES:
        return Reason.ROLE, f"{weight.role}: is no weight of a layer"
    if weight.dtype not in (np.float32, np.float16):
        return Reason.DTYPE, f"is {weight.dtype}; float32 and float16 are quantized"
    if weight.size < min_elements:
        return Reason.TOO_SMALL, f"{weight.size} elements: would not become smaller"
    array = weight.array()
    if not np.isfinite(array).all():
        return Reason.NOT_FINITE, "holds NaN or Inf; mend the model or exclude it"
    if is_transform(array, weight.axis()):
        return Reason.WORSE, "a fixed transform (Fourier or filter bank): its exactness is its purpose"
    return None


def folded(weight: Weight, job: Job) -> tuple[Affine, float] | Left:
    """The int8 encoding of least error, expanded at load, and its relative root-mean-square error."""
    opset = weight.model.opset_imports.get("", 1)
    if opset < 7:
        return Left(weight.key, weight.nbytes, Reason.UNSUPPORTED_OPSET, f"needs opset 7, the model has {opset}")
    array, pruned = weight.array(), job.is_pruned(weight)
    best: tuple[float, Affine] | None = None
    for axis in _axes(weight, job):
        q, scale, _ = quantize_weight(array, axis=axis)
        encoding = Affine(q, scale, None, axis, form="folded", out=array.dtype, masked=pruned)
        if encoding.nbytes + overhead(weight) >= weight.nbytes:
            continue
        error = error_of(array, encoding)
        if best is None or error < best[0]:
            best = error, encoding
    if best is None:
        return Left(weight.key, weight.nbytes, Reason.TOO_SMALL, f"{weight.size} elements: would not become smaller")
    if best[0] > job.max_error:
        return Left(weight.key, weight.nbytes, Reason.WORSE, f"relative error {best[0]:.3f} > {job.max_error}")
    return best[1], best[0]


def _axes(weight: Weight, job: Job) -> list[int | None]:
    """Where scales may run: the output axis; any that is not too long where a reshape hides it; or nowhere."""
    axis, rank = weight.axis(), len(weight.shape)
    if not job.per_channel or rank < 2:
        return [None]
    if axis is not None:
        return [axis, None] if weight.shape[axis] * 4 > weight.size else [axis]
    return [None, *(i for i in {0, rank - 1} if weight.shape[i] * 8 <= weight.size)]


def overhead(weight: Weight) -> int:
    """Bytes the expansion costs in the file beside the arrays."""
    return NODE_BYTES + 8 * (len(weight.value.name or "") + 8)


def error_of(array: np.ndarray, encoding: Affine) -> float:
    """Relative root-mean-square error of an encoding for `array`."""
    return relative_rms(array, encoding.decode())


class WeightOnly:
    """Collects the weights that are stored as int8 and expanded at load; `commit` writes them."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._chosen: list[tuple[Weight, Affine, float, str]] = []

    def add(self, weight: Weight, why: str = "") -> None:
        """Choose an encoding for `weight`, or account for why there is none."""
        found = folded(weight, self._job)
        if isinstance(found, Left):
            self._job.coverage.left.append(found)
        else:
            self._chosen.append((weight, *found, why))

    def commit(self) -> None:
        """Write all, unless together they would not save what the expanding function costs."""
        saved = sum(w.nbytes - e.nbytes - overhead(w) for w, e, _, _ in self._chosen)
        for weight, encoding, error, why in self._chosen:
            before = weight.nbytes
            if saved <= FUNCTION_BYTES:
                detail = "the function that expands it is larger than the gain"
                self._job.left(weight, Reason.TOO_SMALL, detail)
                continue
            self._job.note_overridable(weight)
            weight.replace(encoding)
            form = "int8 weights expanded at load" + (f": {why}" if why else "")
            self._job.touched(weight, before, encoding.nbytes, error, form)
