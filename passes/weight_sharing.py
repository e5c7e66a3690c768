"""Weight sharing: every weight becomes a small codebook and packed codes."""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Iterator
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from onnxcompress.contract import Coverage, Left, Pass, Reason, Run, Touched, parameter
from onnxcompress.encodings import Codebook
from onnxcompress.encodings.pieces import ELEMENTS, pieces
from onnxcompress.model.roles import WEIGHT_ROLES
from onnxcompress.model.weights import Weight, weights
from onnxcompress.numerics.kmeans import kmeans1d, kmeans_rows
from onnxcompress.numerics.transforms import is_transform

# Mean squared error of k optimal levels for a normal distribution of variance 1 (Panter and Dite, 1951), roughly 2.72
# / k^2.
NORMAL_ERROR = 2.72
# Bytes a call node and the headers of its constants take in the file, beside their names.
NODE_BYTES = 90
# How much less error (as a ratio) one more stored bit a weight must bring for codebooks per channel. Found on trained
# convolutional
# networks and transformers at 4 bits: a convolution's error goes straight to the metric and its weights are few.
GAIN_PER_BIT = {"conv": 0.3, "recurrent": 0.3, "gemm": 0.3}
OTHER_GAIN_PER_BIT = 0.8
ENOUGH = 1e-3  # mean relative squared error of the channels below which less is no gain
# A fixed transform in a weight's place (Fourier basis, filter bank) is exact for a reason: its error goes everywhere.
TRANSFORM_BITS = 8
LEAST_OTHER = 256  # elements from which a constant of no weight role is looked at, for an exact codebook


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightSharing(Pass):
    """Cluster each weight's elements and store the cluster of each (Han, Mao, Dally, "Deep Compression", 2015).

    1. Weights of convolutions, matrix products, embeddings and recurrent cells are clustered by 1-D k-means near its
    optimum.
    2. One codebook serves the tensor. Where some output channels would be hit much harder than others, each gets its
    own
       (`granularity: auto`): the mean over channels of their relative squared error decides, not the tensor's squared
       error.
    3. Zeros of a pruned weight keep a codebook entry that is exactly zero.
    4. Any other constant gets a codebook only where that is exact.
    5. A weight that would not become smaller is left, as are biases and normalization.
    """

    name: ClassVar[str] = "weight-sharing"

    bits: Literal[1, 2, 4, 8] = parameter(4, "bits a code", choices=(1, 2, 4, 8))
    clusters: int | None = parameter(None, "entries of a codebook, if fewer than 2^bits", ge=2, le=256)
    granularity: Literal["auto", "tensor", "channel"] = parameter(
        "auto",
        "one codebook a tensor, one an output channel, or what the error asks for",
        choices=("auto", "tensor", "channel"),
    )

    def apply(self, model: ir.Model, run: Run) -> Coverage:
        found, coverage = weights(model, run.work), Coverage()
        run.progress.start(self.name, len(found))
        for weight, result in _in_order(found, self._encode, run.threads):
            if isinstance(result, Left):
                coverage.left.append(result)
            else:
                encoding, error = result
                before = weight.nbytes
                if weight.overridable:
                    coverage.warnings.append(f"{weight.key}: was also an input of the model and no longer is")
                weight.replace(encoding)
                detail = "per tensor" if encoding.axis is None else f"per channel of axis {encoding.axis}"
                coverage.touched.append(Touched(weight.key, before, encoding.nbytes, error, detail))
            run.progress.step()
        run.progress.done()
        return coverage

    def _encode(self, weight: Weight) -> Left | tuple[Codebook, float]:
        refused = self.refuses(weight)
        if refused is not None:
            return Left(weight.key, weight.nbytes, *refused)
        chosen = dataclasses.replace(self, **self.select.parameters(weight))
        array = weight.array()
        if not all(np.isfinite(part).all() for part in _parts(array)):
            return Left(weight.key, weight.nbytes, Reason.NOT_FINITE, "holds NaN or Inf; mend the model or exclude it")
        bits = max(chosen.bits, TRANSFORM_BITS) if is_transform(array, weight.axis()) else chosen.bits
        k = min(1 << bits, chosen.clusters or 256)
        exact = weight.role not in WEIGHT_ROLES
        encoding = _per_tensor(weight, array, k)
        error, channel_error = _errors(weight, array, encoding)
        if exact and error > 0:
            return Left(weight.key, weight.nbytes, Reason.ROLE, f"{weight.role}: is no weight of a layer")
        if self._try_channels(chosen, weight, k, channel_error):
            rows = _per_channel(weight, array, k)
            rows_error, rows_channel_error = _errors(weight, array, rows)
            more = 8 * (rows.nbytes - encoding.nbytes) / weight.size
            gain = 1 + GAIN_PER_BIT.get(weight.role, OTHER_GAIN_PER_BIT) * more
            wanted = chosen.granularity == "channel" or channel_error > gain * max(rows_channel_error, ENOUGH)
            if wanted and rows.nbytes + _overhead(weight) < weight.nbytes:
                encoding, error = rows, rows_error
        if encoding.nbytes + _overhead(weight) >= weight.nbytes:
            return Left(
                weight.key, weight.nbytes, Reason.TOO_SMALL, f"{weight.size} elements: would not become smaller"
            )
        return encoding, error

    def refuses(self, weight: Weight) -> tuple[Reason, str] | None:
        if weight.attribute is not None:
            return Reason.ATTRIBUTE, "lives in an attribute of an ai.onnx.ml operator"
        if not self.select.allows(weight):
            return Reason.EXCLUDED, ""
        if weight.encoding.kind in ("codebook", "affine"):
            return Reason.ALREADY_ENCODED, f"is stored as {weight.encoding.kind}"
        if weight.value.is_graph_output():
            return Reason.GRAPH_OUTPUT, "is itself an output"
        if weight.role in ("bias", "norm") or (weight.role == "other" and weight.size < LEAST_OTHER):
            return Reason.ROLE, f"{weight.role}: is no weight of a layer"
        opset = weight.model.opset_imports.get("", 1)
        if opset < 7:
            return Reason.UNSUPPORTED_OPSET, f"needs opset 7, the model has {opset}"
        if weight.size // 8 + _overhead(weight) >= weight.nbytes:
            return Reason.TOO_SMALL, f"{weight.size} elements: would not become smaller"
        return None

    def _try_channels(self, chosen: WeightSharing, weight: Weight, k: int, channel_error: float) -> bool:
        axis, opset = weight.axis(), weight.model.opset_imports.get("", 1)
        if chosen.granularity == "tensor" or axis is None or weight.shape[axis] < 2 or opset < 9:
            return False
        if weight.shape[axis] * 2 > weight.size:  # one or two elements a channel
            return False
        # Where a codebook for all is as good as k levels can be for a bell curve, own codebooks are not worth their
        # bytes.
        return chosen.granularity == "channel" or channel_error > max(ENOUGH, 0.5 * min(1.0, NORMAL_ERROR / k**2))


def _in_order(
    found: list[Weight], work: object, threads: int
) -> Iterator[tuple[Weight, Left | tuple[Codebook, float]]]:
    """(weight, work(weight)) in the order of the weights, `threads` at a time."""
    assert callable(work)
    if threads <= 1:
        yield from ((weight, work(weight)) for weight in found)
        return
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        # Never more than `threads` results wait, so that memory stays at a few tensors.
        for start in range(0, len(found), threads):
            part = found[start : start + threads]
            yield from zip(part, list(pool.map(work, part)), strict=True)


def _parts(array: np.ndarray) -> list[np.ndarray]:
    """Views of `array` that are small enough to work on at once."""
    return np.array_split(array, min(max(1, len(array)), 1 + array.size // ELEMENTS))


def _overhead(weight: Weight) -> int:
    return NODE_BYTES + 8 * (len(weight.value.name or "") + 8)


def _per_tensor(weight: Weight, array: np.ndarray, k: int) -> Codebook:
    found = kmeans1d(array, k, pinned_zero=weight.encoding.kind in ("masked", "sparse"))
    return Codebook(found.codes, found.codebook.astype(array.dtype), out=array.dtype)


def _per_channel(weight: Weight, array: np.ndarray, k: int) -> Codebook:
    """An own codebook for each index of the output axis; stored as float16 where the weight is float32 and the range
    allows.
    """
    axis = weight.axis()
    assert axis is not None
    moved = np.moveaxis(array, axis, 0)
    found = kmeans_rows(moved.reshape(len(moved), -1), k, pinned_zero=weight.encoding.kind in ("masked", "sparse"))
    table = found.codebook.astype(array.dtype)
    if array.dtype == np.float32:
        peak = np.abs(table).max()
        if 1e-3 < peak < 6e4:  # float16 steps are then far below the distance of entries
            table = table.astype(np.float16)
    codes = np.ascontiguousarray(np.moveaxis(found.codes.reshape(moved.shape), 0, axis))
    return Codebook(codes, table, axis, array.dtype)


def _errors(weight: Weight, array: np.ndarray, encoding: Codebook) -> tuple[float, float]:
    """Relative root-mean-square error of the tensor, and the mean over output channels of theirs squared."""
    axis = weight.axis()
    others = tuple(i for i in range(array.ndim) if i != axis) if axis is not None else None
    lost = np.zeros(1 if axis is None else array.shape[axis])
    had = np.zeros_like(lost)
    for part, piece in pieces(encoding):
        channels = part if axis == 0 else slice(None)
        original = array[part].astype(np.float32)
        difference = piece.decode().astype(np.float32) - original
        lost[channels] += np.sum(np.square(difference, dtype=np.float64), axis=others)
        had[channels] += np.sum(np.square(original, dtype=np.float64), axis=others)
    total = float(np.sum(had))
    whole = float(np.sqrt(np.sum(lost) / total)) if total else 0.0
    return whole, float(np.mean(lost[had > 0] / had[had > 0])) if axis is not None and total else whole**2
