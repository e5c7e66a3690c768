"""Near-optimal partition of many sorted rows at once, each into k intervals of least squared error.

What `partition` does for one tensor, arranged for thousands of short rows: the rows are the last axis of every
temporary, so that a handful of candidates a boundary costs one vectorized step for all of them. The squared error of a
partition is the row's second moment less the sum over intervals of s^2 / n (s: sum, n: number of its points), so a
dynamic program maximizes that sum, the gain.

    start       candidates by Panter and Dite: levels in proportion to the cube root of the density ("Quantization
                distortion in pulse-count modulation with nonuniform spacing of levels", 1951)
    refine      windows of near and far candidates around each boundary until a row no longer gains
    exchanged   one interval divided and two united, where that gains; then refine again
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcompress.numerics.chunks import CHUNK, F32, F64, I64

CELLS = 2048  # places between which a boundary may lie in a row longer than twice that, or 64 an interval if more
SINGLE = 64  # of these, at either end of the row, so many hold a single value
EXACT_WORK = 4500  # pairs of candidates in all windows up to which a row is solved with every place a candidate
FINE, REACH = 8, 12  # levels an interval at the start, and the levels to either side of a boundary that are candidates
NODES = 128  # places at which the density is looked at, at least; the tails are looked at more closely
TAIL = np.array([1, 2, 3, 5, 8, 12, 18, 27])
BESIDE = 1.0  # intervals that the places on either side of a pinned zero are worth at least
GAP = 0.1  # of the levels, more than which between two of the places is not smooth
# Candidates to either side of a boundary, in mean sizes of its two intervals; never nearer than 1, 2, 3... places
STEPS = np.array([0.0, 0.03, 0.1, 0.25, 0.6])
STEPS_OF_MANY = np.array([0.0, 0.0, 0.0, 0.03, 0.1, 0.25, 0.6])  # for more than FEW intervals, often of few values
FEW = 64
ROUGH = 16  # intervals up to which float32 is good enough for the start
TOLERANCE = 1e-5  # gain of a round, in errors of the row, below which the row is done
ROUNDS, EXCHANGES = 60, 30  # bounds nobody has seen reached; each round improves, so stopping early is safe
# The gains are sums of the size of the second moment, so an error far below it drowns in rounding.
RESOLVED = 1e-9
UNRESOLVED = 1e-5  # the same for float32
_CROSSED = 1e-9  # makes a crossing of boundaries a great loss


@dataclasses.dataclass(frozen=True)
class Rows:
    """R rows of D ascending points (single values or cells of neighbouring ones), centred at `center`.

    low, high: first and last value of each point [R, D]; s0, s1: prefix sums of count ([1, D + 1] where all rows
    have the same) and of the values [R, D + 1]; s2: second moment [R]; size: number of points [R]; zero: position of
    the point whose interval has its centre at 0, which `center` then is [R].
    """

    low: F64
    high: F64
    s0: F64
    s1: F64
    s2: F64
    size: I64
    center: F64
    zero: I64 | None = None

    @staticmethod
    def ascending(x: F32, k: int) -> Rows:
        """From sorted rows [R, M]; where M is large, neighbouring values stand as one point."""
        count, length = x.shape
        center = x[:, length // 2].astype(np.float64)
        values = x - center[:, None]
        s2: F64 = np.einsum("rm,rm->r", values, values)
        size = max(CELLS, 64 * k)
        if length <= 2 * size:
            place = np.arange(length + 1)
            low = high = sums = values
        else:
            inner = np.linspace(SINGLE, length - SINGLE, size - 2 * SINGLE + 1).astype(np.int64)
            place = np.concatenate([np.arange(SINGLE), inner, length - np.arange(SINGLE)[::-1]])
            low, high = values[:, place[:-1]], values[:, place[1:] - 1]
            sums = np.add.reduceat(values, place[:-1], axis=1)
        s1 = np.zeros((count, len(place)))
        np.cumsum(sums, axis=1, out=s1[:, 1:])
        sizes = np.full(count, len(place) - 1)
        return Rows(low, high, place[None].astype(np.float64), s1, s2, sizes, center)

    @staticmethod
    def distinct(x: F64, weight: F64, size: I64, pinned: bool) -> Rows:
        """From distinct ascending values [R, D] and their counts, a row padded with its last value at count 0."""
        rows = np.arange(len(x))
        center = np.zeros(len(x)) if pinned else x[rows, size // 2]
        values = x - center[:, None]
        s0, s1 = np.zeros((len(x), x.shape[1] + 1)), np.zeros((len(x), x.shape[1] + 1))
        np.cumsum(weight, axis=1, out=s0[:, 1:])
        moment = values * weight
        np.cumsum(moment, axis=1, out=s1[:, 1:])
        zero = np.argmax(x == 0, axis=1) if pinned else None
        return Rows(values, values, s0, s1, np.einsum("rm,rm->r", moment, values), size, center, zero)

    @staticmethod
    def together(parts: list[Rows]) -> Rows:
        """All rows of `parts`, which must come from `ascending` rows of one length."""
        if len(parts) == 1:
            return parts[0]
        low, high, s1 = (np.concatenate([getattr(part, name) for part in parts]) for name in ("low", "high", "s1"))
        s2, size, center = (
            np.concatenate([getattr(part, name) for part in parts]) for name in ("s2", "size", "center")
        )
        return Rows(low, high, parts[0].s0, s1, s2, size, center)

    def pick(self, table: F64, place: I64, which: I64 | None = None) -> F64:
        """`table[r, place[..., r]]` for all rows, or the rows `which`."""
        if len(table) > 1:
            place = place + (np.arange(len(table)) if which is None else which) * table.shape[1]
        found: F64 = table.reshape(-1).take(place)
        return found

    def gains(self, low: I64, high: I64, which: I64 | None = None) -> F64:
        """What the intervals [low, high) [..., A] take off the second moment; of all rows, or of the rows `which`."""
        count = self.pick(self.s0, high, which) - self.pick(self.s0, low, which)
        total = self.pick(self.s1, high, which) - self.pick(self.s1, low, which)
        gain: F64 = total * total / np.maximum(count, 1)
        if self.zero is not None:
            zero = self.zero if which is None else self.zero[which]
            gain[(low <= zero) & (zero < high)] = 0.0
        return gain

    def gain(self, bounds: I64, which: I64 | None = None) -> F64:
        """Second moment less squared error [A] of the partitions [k + 1, A] of all rows, or of the rows `which`."""
        found: F64 = self.gains(bounds[:-1], bounds[1:], which).sum(axis=0)
        return found

    def centers(self, bounds: I64) -> F64:
        """Means [R, k] of the intervals [k + 1, R], not centred."""
        count = np.diff(self.pick(self.s0, bounds), axis=0)
        mean = np.diff(self.pick(self.s1, bounds), axis=0) / np.maximum(count, 1)
        first = self.pick(self.low, np.minimum(bounds[:-1], self.low.shape[1] - 1))
        last = self.pick(self.high, np.maximum(bounds[1:] - 1, 0))
        mean = np.clip(mean, first, np.maximum(first, last))  # rounding never carries a mean past its own points
        if self.zero is not None:
            mean[(bounds[:-1] <= self.zero) & (self.zero < bounds[1:])] = 0.0
        found: F64 = (mean + self.center).T
        return found


def rows_at_once(length: int, k: int) -> int:
    """How many rows of `length` values keep the temporaries of a partition into k intervals at some tens of MiB."""
    points = min(length, 2 * max(CELLS, 64 * k))
    widest = (k + 1) * (2 * REACH + 1)  # candidates a row
    return max(1, min(256, CHUNK // points, (CHUNK << 3) // length, (CHUNK >> 1) // widest))


def partition_rows(rows: Rows, k: int) -> tuple[I64, npt.NDArray[np.bool_]]:
    """Boundaries [k + 1, R] of the intervals of each row, and which rows came out well.

    Rows must hold more than k points. A row is not well where rounding would decide, an interval is empty, or the
    values fall apart into clusters of their own; `partition` is for those.
    Measured on rows of 72 to 30,522 values of trained weights and of normal, Laplace and Student t densities:
    squared error over the optimum at k 2 to 16 at most 1.0005 for all rows of a set together, 1.013 for the worst row;
    at k 256, where an interval holds six values or fewer, 1.007 and 1.016. Rows of up to 30 values are optimal.
    """
    places = rows.low.shape[1] - k + 1
    well = np.ones(len(rows.size), dtype=bool)
    if places * places * k <= EXACT_WORK:
        every = np.arange(k + 1)[:, None, None] + np.arange(places)[:, None]
        bounds = _best(rows, np.minimum(every, rows.size - (k - np.arange(k + 1))[:, None, None]), None)
    else:
        node, share = _share(rows, k)
        bounds = _settle(rows, _coarse(rows, k, _start(rows, k, node, share)))
        well &= ~_gaps(rows, node, share)
    well &= rows.s2 - rows.gain(bounds) > RESOLVED * k * rows.s2
    well &= (np.diff(bounds, axis=0) > 0).all(axis=0)
    return bounds, well


def _coarse(rows: Rows, k: int, window: I64) -> I64:
    """A first partition; in float32, which is twice as fast, where that shows the differences of errors."""
    if k > ROUGH:
        return _best(rows, window)
    bounds = _best(rows, window, real=np.float32)
    hidden = np.flatnonzero(rows.s2 - rows.gain(bounds) < UNRESOLVED * k * rows.s2)
    if len(hidden):
        bounds[:, hidden] = _best(rows, window[:, :, hidden], hidden)
    return bounds


def _share(rows: Rows, k: int) -> tuple[I64, F64]:
    """Places [N, R] at which the density is looked at, and the share [N - 1, R] of levels between them."""
    place = np.linspace(0.0, 1.0, max(NODES, k) + 1)[:, None] * (rows.size - 1)
    tail = np.minimum(TAIL[:, None], rows.size - 1)
    node = np.sort(np.concatenate([place.astype(np.int64), tail, rows.size - 1 - tail]), axis=0)
    value = rows.pick(rows.low, node)
    mass, points = np.diff(rows.pick(rows.s0, node), axis=0), np.diff(node, axis=0)
    if rows.zero is not None:  # pruning left a gap around zero and perhaps half of the row on it: look past both
        upper = np.maximum(rows.pick(rows.low, np.minimum(rows.zero + 1, rows.size - 1)), 0.0)
        lower = np.minimum(rows.pick(rows.low, np.maximum(rows.zero - 1, 0)), 0.0)
        value = np.maximum(value - upper, 0.0) + np.minimum(value - lower, 0.0)
        zeros = rows.pick(rows.s0, rows.zero + 1) - rows.pick(rows.s0, rows.zero)
        mass -= zeros * ((node[:-1] <= rows.zero) & (rows.zero < node[1:]))
    width = np.diff(value, axis=0)
    share = np.cbrt(width * width * mass)  # cube root of the density mass / width, times the width
    for _ in range(3):  # one point is worth one interval at most, however far away it lies
        share = np.minimum(share, share.sum(axis=0) * points / k)
    if rows.zero is not None:
        beside = (node[:-1] <= rows.zero) & (rows.zero <= node[1:]) & (points > 0)
        share = np.where(beside, np.maximum(share, share.sum(axis=0) * (BESIDE / k)), share)
    return node, share


def _gaps(rows: Rows, node: I64, share: F64) -> npt.NDArray[np.bool_]:
    """Which rows fall apart: between two inner places lies what no smooth density has (0.08 was most)."""
    inner = (node[1:] > TAIL[-1]) & (node[:-1] < rows.size - 1 - TAIL[-1])
    if rows.zero is not None:
        inner &= (node[1:] < rows.zero) | (node[:-1] > rows.zero)
    apart: npt.NDArray[np.bool_] = (share * inner).max(axis=0) > GAP * share.sum(axis=0)
    return apart & (rows.size >= 2 * NODES)


def _start(rows: Rows, k: int, node: I64, share: F64) -> I64:
    """Candidates [k + 1, W, R] of the boundaries."""
    levels, count = FINE * k, len(rows.size)
    total = np.zeros((count, len(node)))
    np.cumsum(share.T, axis=1, out=total[:, 1:])
    total /= np.maximum(total[:, -1:], np.finfo(np.float64).tiny)
    # one search for all rows: row r lies between 2 r and 2 r + 1
    lift = 2.0 * np.arange(count)[:, None]
    wanted = np.arange(1, levels) / levels
    found = np.searchsorted((total + lift).reshape(-1), (wanted + lift).reshape(-1), side="right") - 1
    index = found.reshape(count, -1) - np.arange(count)[:, None] * len(node)
    index = np.clip(index, 0, len(node) - 2)
    below = np.take_along_axis(total, index, axis=1)
    step = np.take_along_axis(total, index + 1, axis=1) - below
    part = np.clip((wanted - below) / np.maximum(step, np.finfo(np.float64).tiny), 0.0, 1.0)
    fine = np.empty((levels + 1, count), dtype=np.int64)
    fine[0], fine[-1] = 0, rows.size
    left = np.take_along_axis(node.T, index, axis=1)
    fine[1:-1] = (
        np.rint(left + part * np.take_along_axis(np.diff(node, axis=0).T, index, axis=1) + 0.5).astype(np.int64).T
    )
    reach = np.arange(k + 1)[:, None] * FINE + np.arange(-REACH, REACH + 1)
    window: I64 = fine[np.clip(reach, 0, levels)]
    return window


def _settle(rows: Rows, bounds: I64) -> I64:
    """Windows around the boundaries, and exchanges of one boundary, for the rows that still gain."""
    gain = rows.gain(bounds)
    active = np.arange(len(gain))
    for _ in range(EXCHANGES):
        _refine(rows, bounds, gain, active)
        if len(bounds) <= 3:
            break
        moved, gained = _exchanged(rows, bounds[:, active], active)
        better = gained > TOLERANCE * (rows.s2 - gain)[active]
        active = active[better]
        if not len(active):
            break
        bounds[:, active] = moved[:, better]
        gain[active] = rows.gain(bounds[:, active], active)
    return bounds


def _refine(rows: Rows, bounds: I64, gain: F64, active: I64) -> None:
    """Rounds of windows, in place, for the rows `active`."""
    steps = STEPS if bounds.shape[0] - 1 <= FEW else STEPS_OF_MANY
    side = len(steps)
    least = np.arange(1, side + 1)[:, None]
    for _ in range(ROUNDS):
        old = bounds[:, active]
        window = np.repeat(old[:, None], 2 * side + 1, axis=1)
        size = (old[2:] - old[:-2]) * 0.5
        step = np.maximum(np.rint(size[:, None] * steps[:, None]).astype(np.int64), least)
        window[1:-1, :side] -= step
        window[1:-1, side + 1 :] += step
        np.clip(window, 0, rows.size[active], out=window)
        moved = _best(rows, window, active)
        new = rows.gain(moved, active)
        better = new > gain[active]
        bounds[:, active[better]] = moved[:, better]
        gained = np.maximum(new - gain[active], 0.0)
        gain[active] += gained
        active = active[gained > TOLERANCE * (rows.s2[active] - gain[active])]
        if not len(active):
            break


def _exchanged(rows: Rows, bounds: I64, which: I64) -> tuple[I64, F64]:
    """The interval whose division gains most divided, the two whose union costs least united; and what that gains."""
    low, high = bounds[:-1], bounds[1:]
    row = np.arange(bounds.shape[1])
    own = rows.gains(low, high, which)
    length = high - low
    cut = low + np.stack([np.ones_like(length), *(length * part // 8 for part in (1, 2, 4, 6, 7)), length - 1])
    cut = np.clip(cut, np.minimum(low + 1, high), np.maximum(high - 1, low))
    split = rows.gains(np.broadcast_to(low, cut.shape), cut, which)
    split += rows.gains(cut, np.broadcast_to(high, cut.shape), which)
    place = split.argmax(axis=0)
    gained = np.take_along_axis(split, place[None], axis=0)[0] - own
    divided = gained.argmax(axis=0)
    lost = own[:-1] + own[1:] - rows.gains(low[:-1], high[1:], which)
    lost[np.maximum(divided - 1, 0), row] = np.inf
    lost[np.minimum(divided, len(lost) - 1), row] = np.inf
    united = lost.argmin(axis=0)
    moved = bounds.copy()
    moved[united + 1, row] = cut[place[divided, row], divided, row]
    return np.sort(moved, axis=0), gained[divided, row] - lost[united, row]


def _best(rows: Rows, window: I64, which: I64 | None = None, real: type[Any] = np.float64) -> I64:
    """The boundaries of most gain among the candidates [k + 1, W, A] of all rows, or of the rows `which`."""
    k, width, count = len(window) - 1, window.shape[1], window.shape[2]
    window[0], window[-1] = 0, rows.size if which is None else rows.size[which]
    zero = rows.zero if rows.zero is None or which is None else rows.zero[which]
    place = [window[0, :1], *window[1:-1], window[-1, :1]]

    def taken(table: F64, unit: F64 | None = None) -> list[Any]:
        found = rows.pick(table, window, which)
        found = (found if unit is None else found / unit).astype(real, copy=False)
        return [found[0, :1], *found[1:-1], found[-1, :1]]

    scale = rows.s2 if which is None else rows.s2[which]
    n = taken(rows.s0)
    s = taken(rows.s1, np.sqrt(scale) if real is np.float32 else None)  # keeps squares in range
    apart = np.spacing(n[-1].max())  # makes 0 / 0 of an empty interval 0
    space = np.empty((2, width * width * count), dtype=real)

    def gains(m: int, to: Any, to_n: Any, to_s: Any) -> Any:
        """Gain [to, from, A] of interval m where it ends at `to`."""
        shape = (len(to), len(place[m]), count)
        gain, size = space[:, : shape[0] * shape[1] * count].reshape(2, *shape)
        np.subtract(to_s[:, None], s[m], out=gain)
        np.multiply(gain, gain, out=gain)
        np.subtract(to_n[:, None], n[m] - apart, out=size)
        np.maximum(size, -real(_CROSSED), out=size)
        np.divide(gain, size, out=gain)
        if zero is not None:
            np.copyto(gain, 0.0, where=(place[m] <= zero) & (zero < to[:, None]))
        gain += best[m]
        return gain

    best = [np.zeros((1, count), dtype=real)]
    for m in range(k):
        best += [gains(m, place[m + 1], n[m + 1], s[m + 1]).max(axis=1)]
    bounds = np.empty((k + 1, count), dtype=np.int64)
    bounds[0], bounds[k] = window[0, 0], window[-1, 0]
    row = np.arange(count)
    index = np.zeros(count, dtype=np.int64)
    for m in range(k - 1, 0, -1):
        to = [table[m + 1][index, row][None] for table in (place, n, s)]
        index = gains(m, *to)[0].argmax(axis=0)
        bounds[m] = place[m][index, row]
    return bounds
