"""The distinct values of a tensor with their weights, in memory that does not grow with the tensor.

Three ways, by what is there: 16-bit floats have at most 65,536 values and are counted exactly; up to `SORT_LIMIT`
elements are sorted, and from `MERGE_FROM` on runs of near neighbours stand as their means; more are counted in 2^20
bins of their leading bits (sign, exponent, 11 bits of the mantissa), where each bin stands for the mean of its values
and bins that hold much of the weight are resolved to single values in a second pass.
"""

from __future__ import annotations

import numpy as np

from onnxcompress.numerics.chunks import CHUNK, F64, Array, as_float32, slices

SORT_LIMIT = 1 << 21
MERGE_FROM, MERGED = 1 << 17, 1 << 15  # from so many sorted values, about so many runs of neighbours stand for them
LOOSE = 30.0  # how many times the squared spread of the median run one may have
LOW_BITS = 12  # bits of a float32 that a bin does not see
BINS = 1 << (32 - LOW_BITS)
HEAVY = 1024  # a bin with more than 1 / HEAVY of the weight is resolved; at most so many


def distinct(values: Array, weights: F64 | None = None) -> tuple[F64, F64]:
    """Distinct values (as float32, in float64, ascending; -0.0 as 0.0) of a flat array, with their count or weight.

    Values of zero weight are left out. Beyond `MERGE_FROM` float32 values a result may stand for several near ones.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    if values.dtype.itemsize == 2 and values.dtype.kind in "fV" and values.size > CHUNK >> 4:
        x, weight = _counted(values, weights)
    elif values.size <= SORT_LIMIT:
        x, weight = _sorted(values, weights)
    else:
        x, weight = _binned(values, weights)
    if len(x) and not (np.isfinite(x[0]) and np.isfinite(x[-1])):
        raise ValueError("values hold NaN or infinity")
    new = np.empty(len(x), dtype=bool)
    new[:1] = True
    np.not_equal(x[1:], x[:-1], out=new[1:])
    if not new.all():
        starts = np.flatnonzero(new)
        x, weight = x[starts], np.add.reduceat(weight, starts)
    return x, weight


def _sorted(values: Array, weights: F64 | None) -> tuple[F64, F64]:
    x = as_float32(values)
    if weights is None:
        x = np.sort(x)
        return (x.astype(np.float64), np.ones(len(x))) if len(x) < MERGE_FROM else _merged(x)
    _refuse(np.isfinite(x).all())
    order = np.argsort(x, kind="stable")
    x, weights = x[order], weights[order]
    return x[weights > 0].astype(np.float64), weights[weights > 0]


def _merged(x: Array) -> tuple[F64, F64]:
    """Runs of neighbours among sorted values as their means; one that is wide beside the others stays single values.

    Against clustering every value (32 arrays, many of several distant clusters): squared error at most 1.0001 times at
    k <= 64, 1.0008 at 256.
    """
    _refuse(np.isfinite(x[[0, -1]]).all())
    starts = (np.arange(MERGED) * len(x)) // MERGED
    size = np.diff(starts, append=len(x))
    spread = size * np.square(x[starts + size - 1].astype(np.float64) - x[starts])
    first = np.repeat(spread > LOOSE * np.median(spread), size)
    first[starts] = True
    starts = np.flatnonzero(first)
    size = np.diff(starts, append=len(x))
    mean = np.add.reduceat(x, starts, dtype=np.float64) / size
    return np.clip(mean, x[starts], x[starts + size - 1]), size.astype(np.float64)


def _counted(values: Array, weights: F64 | None) -> tuple[F64, F64]:
    total = np.zeros(1 << 16)
    bits = np.ascontiguousarray(values).view(np.uint16)
    for part in slices(len(bits)):
        total += np.bincount(bits[part], None if weights is None else weights[part], minlength=1 << 16)
    if weights is not None:
        _refuse(all(np.isfinite(as_float32(values[part])).all() for part in slices(len(bits))))
    present = np.flatnonzero(total)
    x = present.astype(np.uint16).view(values.dtype).astype(np.float64)
    order = np.argsort(x, kind="stable")
    return x[order], total[present][order]


def _binned(values: Array, weights: F64 | None) -> tuple[F64, F64]:
    total, first = np.zeros(BINS), np.zeros(BINS)
    for part in slices(len(values)):
        chunk = as_float32(values[part])
        _refuse(np.isfinite(chunk).all())
        key = (chunk.view(np.uint32) >> LOW_BITS).astype(np.intp)
        weight = None if weights is None else weights[part]
        total += np.bincount(key, weight, minlength=BINS)
        first += np.bincount(key, chunk if weight is None else chunk * weight, minlength=BINS)
    present = np.flatnonzero(total)
    heavy = present if len(present) <= HEAVY else np.flatnonzero(total > total.sum() / HEAVY)
    x, weight = first[present] / total[present], total[present]
    if len(heavy):
        keep = ~np.isin(present, heavy)
        single, count = _resolved(values, weights, heavy)
        x, weight = np.concatenate([x[keep], single]), np.concatenate([weight[keep], count])
    order = np.argsort(x, kind="stable")
    return x[order], weight[order]


def _resolved(values: Array, weights: F64 | None, heavy: np.ndarray) -> tuple[F64, F64]:
    rank = np.full(BINS, -1, dtype=np.int32)
    rank[heavy] = np.arange(len(heavy))
    total = np.zeros(len(heavy) << LOW_BITS)
    for part in slices(len(values), CHUNK << 2):
        bits = as_float32(values[part]).view(np.uint32)
        slot = rank[bits >> LOW_BITS]
        where = np.flatnonzero(slot >= 0)
        index = (slot[where] << LOW_BITS) | (bits[where] & ((1 << LOW_BITS) - 1)).astype(np.int32)
        total += np.bincount(index, None if weights is None else weights[part][where], minlength=len(total))
    present = np.flatnonzero(total)
    bits = (heavy[present >> LOW_BITS] << LOW_BITS) | (present & ((1 << LOW_BITS) - 1))
    return bits.astype(np.uint32).view(np.float32).astype(np.float64), total[present]


def _refuse(finite: bool | np.bool_) -> None:
    if not finite:
        raise ValueError("values hold NaN or infinity")
