"""How far a tensor is from its reference, in float64, in memory that does not grow with the tensor."""

from __future__ import annotations

import math

import numpy as np

from onnxcompress.numerics.chunks import Array, flat, slices


def relative_rms(reference: Array, other: Array) -> float:
    """||reference - other|| / ||reference||: 0 where both are all zero, infinity where only the reference is."""
    reference_square, _, _, difference_square = _moments(reference, other)
    if difference_square == 0:
        return 0.0
    return math.sqrt(difference_square / reference_square) if reference_square else difference_square * math.inf


def sqnr_db(reference: Array, other: Array) -> float:
    """Signal to quantization noise ratio 20 log10(||reference|| / ||reference - other||): infinity where equal."""
    ratio = relative_rms(reference, other)
    if ratio == 0 or math.isnan(ratio):
        return math.inf if ratio == 0 else math.nan
    return -20 * math.log10(ratio) if ratio < math.inf else -math.inf


def cosine(reference: Array, other: Array) -> float:
    """Cosine of the angle between two tensors: 1 where both are all zero, 0 where one is."""
    reference_square, other_square, product, _ = _moments(reference, other)
    if reference_square == 0 or other_square == 0:
        return 1.0 if reference_square == other_square else 0.0 * (reference_square + other_square)
    value = product / (math.sqrt(reference_square) * math.sqrt(other_square))
    return min(1.0, max(-1.0, value)) if not math.isnan(value) else value


def _moments(reference: Array, other: Array) -> tuple[float, float, float, float]:
    """Sums of reference^2, other^2, reference * other, (reference - other)^2."""
    if reference.shape != other.shape:
        raise ValueError(f"tensors of shapes {reference.shape} and {other.shape} cannot be compared")
    total = [0.0, 0.0, 0.0, 0.0]
    a, b = flat(reference), flat(other)
    for part in slices(a.size):
        x, y = a[part].astype(np.float64), b[part].astype(np.float64)
        for i, (left, right) in enumerate(((x, x), (y, y), (x, y))):
            total[i] += float(left @ right)
        x -= y
        total[3] += float(x @ x)
    return total[0], total[1], total[2], total[3]
