"""One-dimensional k-means near its optimum: `kmeans1d` for a tensor, `kmeans_rows` for a codebook a row.

The distinct values are found (`distinct`), divided into k intervals of least squared error (`partition`), and every
value gets the nearest entry of the codebook of their means. Nothing is random: equal input, equal bytes.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from onnxcompress.numerics.chunks import CHUNK, F32, F64, I64, Array, as_float32, flat, slices
from onnxcompress.numerics.distinct import BINS, LOW_BITS, distinct
from onnxcompress.numerics.partition import Points, partition
from onnxcompress.numerics.rows import Rows, partition_rows, rows_at_once

U8 = npt.NDArray[np.uint8]

MAX_CLUSTERS = 256
COUNT_TO = 32  # entries up to which comparing with every threshold is faster than a binary search
TABLE_FROM = 1 << 16  # below so many values a binary search each is faster than filling a table


@dataclasses.dataclass(frozen=True)
class Clusters:
    """`codebook[codes]` approximates the values.

    codebook: float32 [k'], strictly ascending; codes: uint8, the shape of the values; error: (weighted) squared error.
    """

    codebook: F32
    codes: U8
    error: float


@dataclasses.dataclass(frozen=True)
class RowClusters:
    """`codebook[r, codes[r]]` approximates row r. codebook: float32 [C, k], ascending, padded with its last entry."""

    codebook: F32
    codes: U8
    errors: F64


def kmeans1d(values: Array, k: int, *, weights: Array | None = None, pinned_zero: bool = False) -> Clusters:
    """Cluster all values of an array into at most k of least squared error.

    Args:
        values: any shape; float16, bfloat16, float32, or float64 (clustered as float32).
        k: number of codebook entries, 1 to 256. Fewer come back where there are fewer distinct values; the error is
            then 0.
        weights: non-negative importance of each value, same shape. All zero counts as all one.
        pinned_zero: exactly 0.0 is an entry, used or not, and every exact zero maps to it. A non-zero value maps to
            it only where it is the nearest entry; the other k - 1 entries are placed knowing that, so the total error
            is least.

    Returns:
        Clusters: at k <= 64 the error is within 1.001 of the optimum (most measured: 1.0004).

    Raises:
        ValueError: k out of range, a value or weight not finite, a weight negative, shapes that differ.
    """
    _check(k)
    x = flat(values)
    importance = None if weights is None else _importance(weights, values)
    point, weight = distinct(x, importance)
    centers = _centers(point, weight, k, pinned_zero)
    codes, error = _assign(x, centers, importance)
    return Clusters(centers, codes.reshape(values.shape), error)


def kmeans_rows(values: Array, k: int, *, pinned_zero: bool = False) -> RowClusters:
    """Cluster each row of [C, M] into its own codebook of k entries; see `kmeans1d` for the arguments.

    Returns:
        RowClusters: a row with fewer than k distinct values is exact and repeats its last entry. As measured (see
            `partition_rows`) the errors of all rows are together within 1.001 of the optimum at k <= 16, and a single
            row within 1.02; rows of up to 30 values are optimal.

    Raises:
        ValueError: not two-dimensional, k out of range, a value not finite.
    """
    _check(k)
    if values.ndim != 2:
        raise ValueError(f"rows to cluster must be two-dimensional, not {values.shape}")
    count, length = values.shape
    codebook = np.zeros((count, k), dtype=np.float32)
    codes = np.zeros(values.shape, dtype=np.uint8)
    errors = np.zeros(count)
    if length > CHUNK:  # so long that vectorizing over rows gains nothing and would take memory
        for row in range(count):
            found = kmeans1d(values[row], k, pinned_zero=pinned_zero)
            codebook[row] = np.pad(found.codebook, (0, k - len(found.codebook)), mode="edge")
            codes[row], errors[row] = found.codes, found.error
    elif length:
        for block in slices(count, rows_at_once(length, k)):
            x = as_float32(values[block])
            codebook[block] = _row_centers(x, k, pinned_zero)
            for part in slices(len(x), max(1, (CHUNK >> 2) // length)):
                here = slice(block.start + part.start, block.start + part.stop)
                codes[here], errors[here] = _assign_rows(x[part], codebook[here])
    return RowClusters(codebook, codes, errors)


def _check(k: int) -> None:
    if not 1 <= k <= MAX_CLUSTERS:
        raise ValueError(f"number of clusters must be between 1 and {MAX_CLUSTERS}, not {k}")


def _importance(weights: Array, values: Array) -> F64:
    if weights.shape != values.shape:
        raise ValueError(f"weights of shape {weights.shape} for values of shape {values.shape}")
    importance = flat(weights).astype(np.float64)
    if importance.size and not (importance.min() >= 0 and importance.max() < np.inf):
        raise ValueError("weights must be finite and not negative")
    return importance if importance.any() else np.ones_like(importance)


def _centers(point: F64, weight: F64, k: int, pinned: bool) -> F32:
    """Codebook, float32 ascending, from distinct values and their weights."""
    if pinned:
        at = int(np.searchsorted(point, 0.0))
        if at == len(point) or point[at] != 0:
            point, weight = np.insert(point, at, 0.0), np.insert(weight, at, 0.0)
    if len(point) <= k:
        return (point if len(point) else np.zeros(1)).astype(np.float32)
    points = Points.build(point[None], weight[None], np.array([len(point)]), pinned)
    first: F32 = _codebook(points, partition(points, k))[0]
    return first


def _codebook(points: Points, bounds: I64) -> F32:
    return _ascending(points.centers(bounds) + points.center[:, None])


def _row_centers(x: F32, k: int, pinned: bool) -> F32:
    """Codebooks [R, k] of the rows [R, M]."""
    codebook = np.empty((len(x), k), dtype=np.float32)
    smooth, which = [], []
    for part in slices(len(x), max(1, (CHUNK >> 2) // x.shape[1])):
        ordered = np.sort(x[part], axis=1)
        if not np.isfinite(ordered[:, [0, -1]]).all():
            raise ValueError("values hold NaN or infinity")
        whole = np.zeros(len(ordered), dtype=bool) if pinned else _without_runs(ordered, k)
        if whole.any():
            smooth.append(Rows.ascending(ordered if whole.all() else ordered[whole], k))
            which.append(np.flatnonzero(whole) + part.start)
        if not whole.all():
            rest = np.flatnonzero(~whole)
            codebook[rest + part.start] = _distinct_centers(ordered[rest], k, pinned)
    if smooth:
        rows, found = Rows.together(smooth), np.concatenate(which)
        bounds, well = partition_rows(rows, k)
        codebook[found] = _ascending(rows.centers(bounds))
        well &= (np.diff(codebook[found], axis=1) > 0).all(axis=1)
        for row in found[~well]:
            codebook[row] = _distinct_centers(np.sort(x[row : row + 1], axis=1), k, pinned)
    return codebook


def _without_runs(ordered: F32, k: int) -> npt.NDArray[np.bool_]:
    """Which sorted rows hold more than k distinct values and no long runs of equal ones."""
    run = max(2, ordered.shape[1] // (8 * k))
    if ordered.shape[1] <= max(run, k):
        return np.zeros(len(ordered), dtype=bool)
    distinct_values = np.count_nonzero(ordered[:, 1:] != ordered[:, :-1], axis=1) + 1
    found: npt.NDArray[np.bool_] = distinct_values > k
    found &= ~(ordered[:, run:] == ordered[:, :-run]).any(axis=1)
    return found


def _distinct_centers(ordered: F32, k: int, pinned: bool) -> F32:
    """Codebooks [R, k] of sorted rows [R, M], by their distinct values."""
    if pinned:
        ordered = np.sort(np.concatenate([ordered, np.zeros((len(ordered), 1), dtype=np.float32)], axis=1), axis=1)
    x = ordered.astype(np.float64) + 0.0
    new = np.ones(x.shape, dtype=bool)
    np.not_equal(x[:, 1:], x[:, :-1], out=new[:, 1:])
    size = np.count_nonzero(new, axis=1)
    weight = np.ones_like(x)
    if not new.all():
        place = np.cumsum(new, axis=1) - 1 + (np.arange(len(x)) * x.shape[1])[:, None]
        weight = np.bincount(place.reshape(-1), minlength=x.size).reshape(x.shape).astype(np.float64)
        packed = np.repeat(x[:, -1:], x.shape[1], axis=1)
        packed.reshape(-1)[place[new]] = x[new]
        x = packed
    if pinned:
        weight[x == 0] -= 1.0  # the zero put in above; padding of weight 0 repeats the last value, perhaps 0
        np.maximum(weight, 0.0, out=weight)
    if x.shape[1] < k:
        x = np.pad(x, ((0, 0), (0, k - x.shape[1])), mode="edge")
    codebook = x[:, :k].astype(np.float32)
    many = np.flatnonzero(size > k)
    if len(many):
        width = int(size[many].max())
        x, weight, size = x[many, :width], weight[many, :width], size[many]
        rows = Rows.distinct(x, weight, size, pinned)
        bounds, well = partition_rows(rows, k)
        codebook[many] = _ascending(rows.centers(bounds))
        for row in np.flatnonzero(~well):
            here = slice(row, row + 1)
            points = Points.build(x[here, : size[row]], weight[here, : size[row]], size[here], pinned)
            codebook[many[here]] = _codebook(points, partition(points, k))
    return codebook


def _ascending(centers: F64) -> F32:
    # + 0.0 turns -0.0 into 0.0; means of disjoint intervals of float32 values stay distinct when rounded to float32
    codebook: F32 = (centers + 0.0).astype(np.float32)
    return codebook


def _thresholds(codebook: F32) -> F32:
    """For neighbouring entries along the last axis, the largest float32 that is not nearer to the upper one."""
    middle = (codebook[..., 1:].astype(np.float64) + codebook[..., :-1]) / 2
    threshold = middle.astype(np.float32)
    down = np.nextafter(threshold, np.float32(-np.inf))
    return (np.where(threshold > middle, down, threshold) + 0.0).astype(np.float32)


def _assign(values: Array, codebook: F32, weights: F64 | None) -> tuple[U8, float]:
    """Nearest entry of each value of a flat array, the lower one at a tie, and the squared error."""
    threshold = _thresholds(codebook)
    codes = np.empty(len(values), dtype=np.uint8)
    table = _table(threshold) if len(values) >= TABLE_FROM else None
    error = 0.0
    for part in slices(len(values), CHUNK >> 2):
        x = as_float32(values[part])
        if table is None:
            codes[part] = np.searchsorted(threshold, x)
        else:
            found = table[x.view(np.uint32) >> LOW_BITS]
            codes[part] = found.astype(np.uint8)
            unsure = np.flatnonzero(found & 256)
            codes[part][unsure] = np.searchsorted(threshold, x[unsure])
        difference = x.astype(np.float64)
        difference -= codebook[codes[part]]
        error += float(difference @ (difference if weights is None else difference * weights[part]))
    return codes, error


def _table(threshold: F32) -> npt.NDArray[np.uint16]:
    """Code by the leading bits of a float32, with 256 added where a threshold lies in the bin and the rest decides."""
    half = BINS >> 1
    upper, lower = threshold[threshold >= 0], threshold[threshold < 0]
    table = np.empty(BINS, dtype=np.uint16)
    bins = (upper.view(np.uint32) >> LOW_BITS).astype(np.int64)
    table[:half] = len(lower) + np.cumsum(np.bincount(bins + 1, minlength=half + 1)[:half])
    table[bins] |= 256
    bins = (lower.view(np.uint32) >> LOW_BITS).astype(np.int64) - half
    table[half:] = len(lower) - np.cumsum(np.bincount(bins, minlength=half)[:half])
    table[half + bins] |= 256
    return table


def _assign_rows(x: F32, codebook: F32) -> tuple[U8, F64]:
    """Nearest entry of each value of [R, M] in its row's codebook [R, k], and the squared errors [R]."""
    k = codebook.shape[1]
    levels = max(1, (k - 1).bit_length())
    threshold = np.full((len(x), 1 << levels), np.inf, dtype=np.float32)
    threshold[:, : k - 1] = _thresholds(codebook)
    # a padded codebook repeats its last entry: nothing may lie above the first of them
    threshold[:, : k - 1][codebook[:, 1:] == codebook[:, :-1]] = np.inf
    row = np.arange(len(x))[:, None]
    if k <= COUNT_TO:
        code = np.zeros(x.shape, dtype=np.uint8)
        above = np.empty(x.shape, dtype=bool)
        for entry in range(k - 1):
            np.greater(x, threshold[:, entry, None], out=above)
            code += above.view(np.uint8)
    else:
        wide = np.zeros(x.shape, dtype=np.int64)
        for level in range(levels - 1, -1, -1):
            wide += (x > threshold.reshape(-1).take(wide + ((row << levels) + (1 << level) - 1))).astype(
                np.int64
            ) << level
        code = wide.astype(np.uint8)
    difference = x - codebook.reshape(-1).take(code + row * k).astype(np.float64)
    return code, np.einsum("rm,rm->r", difference, difference)
