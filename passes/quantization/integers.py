"""int8 weights whose dot products with unsigned activations cannot saturate where a target adds pairs in 16 bits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxcompress.numerics.affine import Quantized, choose_scale, quantize
from onnxcompress.targets.base import Weights8

SAFE_PAIR = 127  # levels two neighbours may reach together: rounding adds at most one, and 255 * 128 < 2^15


def per_channel(array: np.ndarray, axis: int | None, weights: Weights8, orders: Sequence[np.ndarray] = ()) -> Quantized:
    """Symmetric int8 of `array` along `axis` (None: one scale), in the range `weights` (see `Target`).

    `orders`: for "neighbours", the weight as [channels, K] in each order in which a kernel may run along K; without any
    the range is full.
    """
    others = tuple(i for i in range(array.ndim) if axis is None or i != axis)
    most = np.abs(array).max(axis=others, initial=0).astype(np.float64)
    if weights == "neighbours":
        for order in orders:
            pairs = _pair_sums(order.astype(np.float64))
            most = np.maximum(most, (pairs.max(initial=0) if axis is None else pairs) * (127 / SAFE_PAIR))
    reduced = weights == "reduced"
    scale, zero = choose_scale(-most, most, dtype="int8", symmetric=True, reduced_range=reduced)
    q = quantize(np.ascontiguousarray(array), scale, zero, "int8", axis=axis)
    if reduced:
        np.clip(q, -64, 64, out=q)
    return Quantized(q, scale, zero)


def conv_orders(array: np.ndarray) -> list[np.ndarray]:
    """The orders in which kernels sum a weight [outputs, inputs, *kernel]: channels outermost, or innermost (NHWC)."""
    rows = array.reshape(array.shape[0], array.shape[1], -1)
    return [rows.reshape(len(rows), -1), rows.transpose(0, 2, 1).reshape(len(rows), -1)]


def _pair_sums(rows: np.ndarray) -> np.ndarray:
    """Per row, the greatest magnitude two neighbours 2i and 2i + 1 of the same sign reach together."""
    if rows.shape[1] % 2:
        rows = np.concatenate([rows, np.zeros((len(rows), 1))], axis=1)
    above, below = np.maximum(rows, 0), np.maximum(-rows, 0)
    sums = [part[:, 0::2] + part[:, 1::2] for part in (above, below)]
    return np.asarray(np.maximum(*sums).max(axis=1, initial=0))
