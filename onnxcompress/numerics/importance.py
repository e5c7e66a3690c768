"""Which weights matter least: magnitude criteria, and an exact threshold over many tensors in bounded memory.

The magnitude of a float32, read as an integer, is in the order of its value. So a histogram of the leading 16 bits
finds the bin of the k-th smallest, and one of the remaining 15 bits within that bin finds it exactly: two passes,
65,536 counters. Magnitudes are compared as float32 (float16 and bfloat16 exactly, float64 rounded). Among equal
magnitudes the first met, in order of tensors and then of index, is dropped first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from onnxcompress.numerics.chunks import F32, I64, Array, as_float32, flat, slices

Mask = npt.NDArray[np.bool_]

LOW_BITS = 15


class Threshold(NamedTuple):
    """Drop every magnitude below `value`, and the first `ties` of those equal to it."""

    value: float
    ties: int


def drop_count(size: int, sparsity: float) -> int:
    """How many of `size` weights a sparsity in [0, 1] drops, to the nearest whole number."""
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity must lie between 0 and 1, not {sparsity}")
    return round(size * sparsity)


def scores(array: Array, scale: float = 1.0) -> F32:
    """Magnitudes |w| / scale as float32 (scale 0 counts as 1).

    Raises:
        ValueError: a magnitude is NaN or infinite.
    """
    found = np.abs(as_float32(array))
    if scale not in (0.0, 1.0):
        with np.errstate(over="ignore"):
            found /= np.float32(scale)
    if found.size and not found.max() < np.inf:
        raise ValueError("a weight is NaN or infinite, or becomes so when it is divided by its scale")
    return found


def scale_of(array: Array, how: str = "none") -> float:
    """What to divide a tensor's magnitudes by before they are compared with other tensors'.

    One raw threshold over layers of different scale empties those of small weights. "none": 1; "std": standard
    deviation; "rms": root mean square. A tensor without elements or spread has scale 1.
    """
    if how not in ("none", "std", "rms"):
        raise ValueError(f"normalization must be none, std or rms, not {how!r}")
    values = flat(array)
    if how == "none" or not values.size:
        return 1.0
    mean = 0.0
    if how == "std":
        mean = sum(float(values[part].astype(np.float64).sum()) for part in slices(values.size)) / values.size
    square = 0.0
    for part in slices(values.size):
        difference = values[part].astype(np.float64) - mean
        square += float(difference @ difference)
    return float(np.sqrt(square / values.size)) or 1.0


def lamp_scores(array: Array) -> F32:
    """Layer-adaptive magnitude scores: w^2 over the sum of squares of all elements of the tensor at least as large.

    Comparable between tensors without further scaling: small tensors and those of one scale keep what they need, the
    largest element of every tensor scores near 1. The sum is taken over bins of a relative width of 2^-8 (an element's
    own bin counts whole), so no sorting is needed and the order within a tensor stays that of the magnitudes.
    Lee, Park, Mo, Ahn, Shin, "Layer-adaptive sparsity for the magnitude-based pruning", 2021.

    Raises:
        ValueError: a magnitude is NaN or infinite.
    """
    values = flat(array)
    squares = np.zeros(1 << 16)
    for part in slices(values.size):
        found = scores(values[part])
        squares += np.bincount(found.view(np.uint32) >> LOW_BITS, np.square(found, dtype=np.float64), len(squares))
    tail = np.cumsum(squares[::-1])[::-1]
    result = np.empty(values.size, np.float32)
    for part in slices(values.size):
        found = scores(values[part])
        behind = tail[found.view(np.uint32) >> LOW_BITS]
        result[part] = np.square(found, dtype=np.float64) / np.where(behind > 0, behind, 1.0)
    return result.reshape(array.shape)


@dataclasses.dataclass
class MagnitudeThreshold:
    """The magnitude below which a given share of all weights lies, exactly, over any number of tensors.

    A monoid: `update` with each tensor, `merge` what other threads saw, in any order. Then `refine(sparsity)` gives
    the second pass, to be updated with the same tensors and scales again; its `threshold()` is exact.
    """

    counts: I64 = dataclasses.field(default_factory=lambda: np.zeros(1 << 16, dtype=np.int64))

    @property
    def size(self) -> int:
        """Weights seen."""
        return int(self.counts.sum())

    def update(self, array: Array, scale: float = 1.0) -> None:
        """Count the magnitudes of a tensor divided by `scale`."""
        values = flat(array)
        for part in slices(values.size):
            key = scores(values[part], scale).view(np.uint32) >> LOW_BITS
            self.counts += np.bincount(key, minlength=len(self.counts))

    def merge(self, other: MagnitudeThreshold) -> None:
        """Add what `other` has seen."""
        self.counts += other.counts

    def refine(self, sparsity: float) -> RefinedThreshold:
        """The second pass, for dropping `sparsity` of the weights seen."""
        rank = drop_count(self.size, sparsity)
        below = np.concatenate([[0], np.cumsum(self.counts)])
        key = int(np.searchsorted(below, rank)) - 1 if rank else -1  # below[key] < rank <= below[key + 1]
        return RefinedThreshold(key, rank - int(below[key]) if rank else 0, int(self.counts[key]) if rank else 0)


@dataclasses.dataclass
class RefinedThreshold:
    """Second pass of `MagnitudeThreshold`: the `rank`-th smallest of the magnitudes that start with `key`; -1: none."""

    key: int
    rank: int
    expected: int
    counts: I64 = dataclasses.field(default_factory=lambda: np.zeros(1 << LOW_BITS, dtype=np.int64))

    def update(self, array: Array, scale: float = 1.0) -> None:
        """Count the magnitudes of a tensor, divided by the same scale as in the first pass."""
        if self.key < 0:
            return
        values = flat(array)
        for part in slices(values.size):
            bits = scores(values[part], scale).view(np.uint32)
            low = bits[bits >> LOW_BITS == self.key] & ((1 << LOW_BITS) - 1)
            self.counts += np.bincount(low, minlength=len(self.counts))

    def merge(self, other: RefinedThreshold) -> None:
        """Add what `other` has seen of the same second pass."""
        self.counts += other.counts

    def threshold(self) -> Threshold:
        """The exact threshold.

        Raises:
            ValueError: the second pass did not see the same weights as the first.
        """
        if self.key < 0:
            return Threshold(0.0, 0)
        if int(self.counts.sum()) != self.expected:
            raise ValueError("the second pass saw other weights than the first: give both the same tensors and scales")
        below = np.concatenate([[0], np.cumsum(self.counts)])
        low = int(np.searchsorted(below, self.rank)) - 1
        value = np.array([(self.key << LOW_BITS) | low], dtype=np.uint32).view(np.float32)[0]
        return Threshold(float(value), self.rank - int(below[low]))


def global_threshold(tensors: Callable[[], Iterable[tuple[Array, float]]], sparsity: float) -> Threshold:
    """Exact threshold over all tensors; `tensors()` yields (array, scale), is called twice, and may load lazily."""
    first = MagnitudeThreshold()
    for array, scale in tensors():
        first.update(array, scale)
    second = first.refine(sparsity)
    for array, scale in tensors():
        second.update(array, scale)
    return second.threshold()


def threshold_mask(array: Array, threshold: Threshold, scale: float = 1.0) -> tuple[Mask, Threshold]:
    """Mask (True: keep) of one tensor, and the threshold with the ties left for the tensors after it."""
    values = flat(array)
    keep = np.empty(values.size, dtype=bool)
    value, ties = np.float32(threshold.value), threshold.ties
    for part in slices(values.size):
        score = scores(values[part], scale)
        np.greater_equal(score, value, out=keep[part])
        if ties:
            equal = np.flatnonzero(score == value)[:ties]
            keep[part][equal] = False
            ties -= len(equal)
    return keep.reshape(array.shape), Threshold(threshold.value, ties)


def layer_mask(array: Array, sparsity: float) -> Mask:
    """Mask (True: keep) that drops exactly `drop_count(size, sparsity)` weights of least magnitude of one tensor."""
    return threshold_mask(array, global_threshold(lambda: [(array, 1.0)], sparsity))[0]


def nm_mask(array: Array, n: int, m: int, axis: int = -1) -> Mask:
    """Mask (True: keep) of the n largest magnitudes in each group of m along `axis`; a last short group keeps at most
    n.

    Raises:
        ValueError: not 0 <= n <= m, or m < 1.
    """
    if not (0 <= n <= m and m >= 1):
        raise ValueError(f"cannot keep {n} of every {m} weights")
    along = np.moveaxis(array, axis, -1)
    length = along.shape[-1]
    keep = np.empty(along.shape, dtype=bool)
    lines, out = along.reshape(-1, length), keep.reshape(-1, length)
    groups = -(-length // m)
    for part in slices(len(lines), max(1, (1 << 20) // max(1, length))):
        score = scores(lines[part])
        padded = np.full((len(score), groups * m), -1.0, dtype=np.float32)  # below every magnitude: dropped first
        padded[:, :length] = score
        grouped = padded.reshape(-1, m)
        order = np.argsort(grouped, axis=1, kind="stable")
        kept = np.ones(grouped.shape, dtype=bool)
        np.put_along_axis(kept, order[:, : m - n], False, axis=1)
        out[part] = kept.reshape(len(score), -1)[:, :length]
    return np.ascontiguousarray(np.moveaxis(keep, -1, axis))
