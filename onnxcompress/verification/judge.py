"""Whether the error of one encoded weight is one that its encoding explains: element by element, in float64."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from onnxcompress.encodings import Affine, Codebook, Encoding, Masked, Sparse
from onnxcompress.encodings.affine import limits

HALF = 0.5 + 2e-3  # of a step: rounding, and the float32 division in front of it
ROUNDING = 4e-7  # relative error of a float32 weight that was computed anew (BatchNormalization folded into it)
NEAREST = 0.03  # of the distance between two entries: k-means assigns by a table of float16 keys
CENTER = 0.25  # of the distance to the next entry, between an entry and the mean of its elements


@dataclasses.dataclass(frozen=True)
class Judgement:
    """`error`, `expected`: relative root-mean-square; `largest`: absolute; `unexplained`: how many elements."""

    error: float
    largest: float
    expected: float
    unexplained: int
    why: str


def judge(encoding: Encoding, reference: np.ndarray, *, pruned_as: np.ndarray | None = None) -> Judgement:
    """`encoding` as one of `reference`, which has its shape.

    `pruned_as`: the parent's weight where the reference is computed from it: what was pruned was chosen by that, and
    float rounding is explained, too.

    An element is explained within half a step of an affine encoding (beyond its range: by the last step), by the
    nearest entry of a codebook, and by equality otherwise. A pruned element is zero, and no kept one is smaller.
    """
    ref = reference.astype(np.float64)
    decoded = encoding.decode().astype(np.float64)
    difference = np.abs(ref - decoded)
    allowed, why = _allowed(encoding, ref, decoded)
    if pruned_as is not None:
        allowed = allowed + ROUNDING * np.abs(ref).max(initial=0)
    bad = ~(difference <= allowed)
    dropped = bad & (decoded == 0) & np.isfinite(ref)
    if dropped.any() and _by_magnitude(ref if pruned_as is None else pruned_as, decoded, dropped):
        bad &= ~dropped
    else:
        dropped = np.zeros_like(bad)
    norm = math.sqrt(float(np.sum(ref * ref)))
    noise = _expected(encoding, ref, decoded, dropped)
    lost = math.sqrt(float(np.sum(difference * difference)))
    count = int(np.count_nonzero(bad))
    words = f"{count:,} of {bad.size:,} elements {why}" if count else ""
    if not count and isinstance(encoding, Codebook) and (entries := _off_center(encoding, ref)):
        count, words = entries, f"{entries} entries of its codebook lie off the middle of their elements"
    return Judgement(
        (lost / norm if norm else (math.inf if lost else 0.0)),
        float(difference.max(initial=0)),
        noise / norm if norm else 0.0,
        count,
        words,
    )


def _allowed(encoding: Encoding, ref: np.ndarray, decoded: np.ndarray) -> tuple[np.ndarray, str]:
    """The error each element may have, and the words for more."""
    if isinstance(encoding, Affine):
        step = np.abs(encoding._spread(encoding.scale).astype(np.float64))
        allowed = np.broadcast_to(step * HALF, ref.shape) + ROUNDING * np.abs(ref)
        low, high = limits(encoding.q.dtype)
        q = encoding.q.astype(np.float64)
        cut = ((q >= high) & (ref > decoded)) | ((q <= low) & (ref < decoded))
        return np.where(cut, np.inf, allowed), "are further than half a step from the parent's"
    if isinstance(encoding, Codebook):
        return _nearest(encoding, ref, NEAREST), "are not at their nearest codebook entry"
    return np.zeros(ref.shape), "differ from the parent's, though stored as they are"


def _by_magnitude(ref: np.ndarray, decoded: np.ndarray, dropped: np.ndarray) -> bool:
    """True when the elements set to zero are none larger than any that is kept, as magnitude pruning leaves it."""
    kept = decoded != 0
    if not kept.any():
        return True
    smallest = np.abs(ref[kept]).min()
    return bool(np.abs(ref[dropped]).max() <= smallest * (1 + 1e-6))


def _tables(encoding: Codebook, ref: np.ndarray) -> Iterator[tuple[tuple[slice | int, ...], np.ndarray]]:
    """The part of the weight that each table serves, and the table."""
    if encoding.axis is None:
        yield (), encoding.table.astype(np.float64)
        return
    for index, table in enumerate(encoding.table.astype(np.float64)):
        yield (*[slice(None)] * encoding.axis, index), table


def _nearest(encoding: Codebook, ref: np.ndarray, more: float) -> np.ndarray:
    """For each element the distance to its nearest entry, and `more` of the gap between entries there."""
    allowed = np.empty(ref.shape)
    for part, table in _tables(encoding, ref):
        values = ref[part]
        entries = np.unique(table)
        if len(entries) == 1:
            allowed[part] = np.abs(values - entries[0])
            continue
        above = np.clip(np.searchsorted(entries, values), 1, len(entries) - 1)
        low, high = entries[above - 1], entries[above]
        best = np.minimum(np.abs(values - low), np.abs(values - high))
        allowed[part] = best + more * (high - low)
    return allowed


def _off_center(encoding: Codebook, ref: np.ndarray) -> int:
    """Entries that are not the mean of their elements; 0 is structure and stays where it is."""
    found = 0
    for part, table in _tables(encoding, ref):
        codes = encoding.codes[part].reshape(-1).astype(np.int64)
        counts = np.bincount(codes, minlength=len(table))
        sums = np.bincount(codes, ref[part].reshape(-1), minlength=len(table))
        used = (counts > 0) & (table != 0)
        if used.sum() < 2:
            continue
        mean = np.divide(sums, np.maximum(counts, 1))
        entries = np.unique(table[counts > 0])
        gaps = np.diff(entries)
        at = np.searchsorted(entries, table)
        gap = np.minimum(gaps[np.clip(at - 1, 0, len(gaps) - 1)], gaps[np.clip(at, 0, len(gaps) - 1)])
        found += int(np.count_nonzero(used & (np.abs(mean - table) > CENTER * np.abs(gap) + 1e-3 * np.abs(table))))
    return found


def _expected(encoding: Encoding, ref: np.ndarray, decoded: np.ndarray, dropped: np.ndarray) -> float:
    """Root of the summed squares of the errors that the encoding explains."""
    pruned = float(np.sum(np.square(ref[dropped])))
    if isinstance(encoding, Affine):
        step = np.abs(encoding._spread(encoding.scale).astype(np.float64))
        if encoding.q.dtype != np.int32:  # a bias counts in the steps of its layer's products
            step = np.minimum(step, _widest(encoding, ref))
        step = np.broadcast_to(step, ref.shape)
        return math.sqrt(pruned + float(np.sum(np.square(step[~dropped]))) / 12)
    if isinstance(encoding, Codebook):
        best = np.square(_nearest(encoding, ref, 0.0)[~dropped]).sum()
        rounding = float(np.sum(np.square(decoded * 2.0**-11))) / 3 if encoding.table.dtype.itemsize == 2 else 0.0
        return math.sqrt(pruned + rounding + min(float(best), _within(encoding, ref)))
    if isinstance(encoding, Masked | Sparse):
        zero = (decoded == 0) & (ref != 0)
        return math.sqrt(float(np.sum(np.square(ref[zero]))))
    return 0.0


def _widest(encoding: Affine, ref: np.ndarray) -> np.ndarray:
    """The widest step a quantizer would choose: one for a range twice what the channel needs, of half the integers."""
    if encoding.axis is None or encoding.block is not None:
        most = np.abs(ref).max(initial=0)
    else:
        others = tuple(i for i in range(ref.ndim) if i != encoding.axis)
        most = np.abs(ref).max(axis=others, keepdims=True, initial=0)
    return np.asarray(2.2 * most / max(1.0, abs(limits(encoding.q.dtype)[1])))


def _within(encoding: Codebook, ref: np.ndarray) -> float:
    """Sum of squares around the mean of each cluster: what the codes explain, wherever the entries lie."""
    total = 0.0
    for part, table in _tables(encoding, ref):
        codes, values = encoding.codes[part].reshape(-1).astype(np.int64), ref[part].reshape(-1)
        counts = np.maximum(np.bincount(codes, minlength=len(table)), 1)
        sums = np.bincount(codes, values, minlength=len(table))
        total += float(values @ values) - float(np.sum(sums * sums / counts))
    return max(0.0, total)
