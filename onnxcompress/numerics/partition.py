"""Optimal partition of sorted, weighted points into k intervals of least squared error, for many rows at once.

One-dimensional k-means clusters are intervals of the sorted points, so a solution is a row of k + 1 boundaries. The
squared error of an interval comes from three prefix sums in constant time and is concave Monge (an exchange of two
crossing intervals against two nested ones never costs more; Aggarwal et al., "Finding a minimum-weight k-link path in
graphs with the concave Monge property", 1994). Hence a solution that cannot be improved by moving each boundary
somewhere between its two neighbours is the best of all (so it was on 3,000 random instances), and a dynamic program
over such windows, repeated until it stands still, replaces one over all pairs of points. Boundaries are tried on a
grid inside each interval; Lloyd steps between the rounds take them to their exact places.

    grow        split the intervals of largest gain until there are k
    window      one round of the dynamic program around the present boundaries
    lloyd       boundaries to the middles between the centres
    exact       the whole dynamic program, where the points are few
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from onnxcompress.numerics.chunks import F64, I64

EXACT_WORK = 16_000_000  # additions a dynamic program over all pairs of points may cost before the windows are cheaper
TENSOR = 2_000_000  # elements of the largest temporary of one round, 8 bytes each
# Rounds: half width of the windows, places an interval, and the gain below which the next begin. First two intervals to
# each side coarsely, then one; `_fine` comes last.
COARSE = ((8, 4, 1e-4), (8, 8, 1e-4))
FINE_WORK = (4_624, 270_400)  # elements of the last windows' temporary: a row among many, a row alone
ROUNDS = 60  # a bound nobody has seen reached; each round improves, so stopping early is safe


@dataclasses.dataclass(frozen=True)
class Points:
    """R rows of distinct points in ascending order, with the prefix sums of weight, first and second moment.

    `x` is centred: the row's median, or 0 where zero is pinned, has been subtracted (`center`), and the prefix sums
    start from there and run outwards. A far outlier then costs no digits anywhere but in its own interval. `zero`:
    position of the point whose interval must have its centre at exactly 0 (-1: none; `center` must then be free).
    Rows shorter than the widest are padded with their last value at weight 0.
    """

    x: F64  # [R, D]
    size: I64  # [R]
    center: F64  # [R]
    zero: I64  # [R]
    s0: F64  # [R, D + 1]
    s1: F64
    s2: F64

    @staticmethod
    def build(x: F64, weight: F64, size: I64, pinned: bool = False) -> Points:
        """Points from ascending rows [R, D] and their weights; with `pinned` each row must contain the point 0."""
        rows = np.arange(len(x))
        zero = np.argmax(x == 0, axis=1) if pinned else np.full(len(x), -1)
        center = np.zeros(len(x)) if pinned else x[rows, size // 2]
        x = x - center[:, None]
        s0 = np.zeros((len(x), x.shape[1] + 1))
        np.cumsum(weight, axis=1, out=s0[:, 1:])
        moment = weight * x
        s1 = _outward(moment, x)
        moment *= x
        return Points(x, size, center, zero.astype(np.int64), s0, s1, _outward(moment, x))

    def rows(self, which: I64) -> Points:
        """The rows `which` alone."""
        return Points(*(getattr(self, field.name)[which] for field in dataclasses.fields(self)))

    def pick(self, table: F64, position: I64) -> F64:
        """`table[r, position[r, ...]]` for every row."""
        offset = np.arange(len(table)) * table.shape[1]
        found: F64 = table.reshape(-1)[position + offset.reshape((-1,) + (1,) * (position.ndim - 1))]
        return found

    def above(self, target: F64) -> I64:
        """Position of the first point above each target [R, ...] in its row."""
        if len(self.x) == 1:
            found = np.searchsorted(self.x[0, : self.size[0]], target.reshape(-1), side="right")
            return found.reshape(target.shape).astype(np.int64)
        shape = (-1,) + (1,) * (target.ndim - 1)
        low = np.zeros(target.shape, dtype=np.int64)
        high = np.broadcast_to(self.size.reshape(shape), target.shape).copy()
        for _ in range(int(self.size.max()).bit_length()):
            middle = (low + high) >> 1
            right = (self.pick(self.x, np.minimum(middle, self.x.shape[1] - 1)) <= target) & (middle < high)
            low = np.where(right, middle + 1, low)
            high = np.where(right, high, middle)
        return low

    def cost(self, low: I64, high: I64) -> F64:
        """Squared error of the intervals [low, high) [R, ...] around their centres."""
        sums = [self.pick(s, high) - self.pick(s, low) for s in (self.s0, self.s1, self.s2)]
        zero = self.zero.reshape((-1,) + (1,) * (low.ndim - 1))
        return _error(sums[0], sums[1], sums[2], (low <= zero) & (zero < high) if zero[0] >= 0 else None)

    def error(self, bounds: I64) -> F64:
        """Squared error of a whole partition [R, k + 1], a number a row."""
        total: F64 = self.cost(bounds[:, :-1], bounds[:, 1:]).sum(axis=1)
        return total

    def centers(self, bounds: I64) -> F64:
        """Centres [R, k] of the intervals, in shifted coordinates; an empty interval's is the point where it lies."""
        low, high = bounds[:, :-1], bounds[:, 1:]
        weight = self.pick(self.s0, high) - self.pick(self.s0, low)
        first = self.pick(self.x, np.minimum(low, self.size[:, None] - 1))
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = np.where(weight > 0, (self.pick(self.s1, high) - self.pick(self.s1, low)) / weight, first)
        last = self.pick(self.x, np.maximum(high - 1, 0))
        mean = np.clip(mean, first, np.maximum(first, last))  # rounding never carries a mean past its own points
        if self.zero[0] >= 0:
            mean[(low <= self.zero[:, None]) & (self.zero[:, None] < high)] = 0.0
        return mean


def _outward(moment: F64, x: F64) -> F64:
    """Prefix sums [R, D + 1] that are 0 where x changes sign, so that they grow only with the distance from there."""
    out = np.zeros((len(x), x.shape[1] + 1))
    if len(x) == 1:
        pivot = int(np.searchsorted(x[0], 0.0))
        np.cumsum(moment[0, pivot:], out=out[0, pivot + 1 :])
        out[0, :pivot] = -np.cumsum(moment[0, :pivot][::-1])[::-1]
        return out
    np.cumsum(np.where(x > 0, moment, 0.0), axis=1, out=out[:, 1:])
    out[:, :-1] -= np.cumsum(np.where(x < 0, moment, 0.0)[:, ::-1], axis=1)[:, ::-1]
    return out


def _error(weight: F64, first: F64, second: F64, pinned: np.ndarray | None) -> F64:
    with np.errstate(invalid="ignore", divide="ignore"):
        part = first * first
        part /= weight
    np.subtract(second, part, out=part)
    part[weight == 0] = 0.0
    if pinned is not None:
        part = np.where(pinned, second, part)
    np.maximum(part, 0.0, out=part)
    return part


def partition(points: Points, k: int) -> I64:
    """Boundaries [R, k + 1] of a partition into k intervals whose squared error is (nearly) the least.

    Every row must hold more than k points. Exact for few points, otherwise near the optimum (see `_fine`).
    """
    rows, width = points.x.shape
    if k > 1 and width <= 512 and width * width * k <= EXACT_WORK / min(rows, 64):
        step = max(1, TENSOR // (width + 1) ** 2)
        return _by_rows(points, step, lambda part, _: exact(part, k), np.zeros((rows, k + 1), np.int64))
    ends = np.repeat(points.size[:, None], k + 1, axis=1)
    ends[:, 0] = 0
    bounds = lloyd(points, grow(points, ends), 3)
    for half, grain, tolerance in (*COARSE, _fine(rows, k)):
        bounds = _settle(points, bounds, half, grain, tolerance)
    return lloyd(points, bounds, 100)


def _fine(rows: int, k: int) -> tuple[int, int, float]:
    """The last round: among few points the optimum has many near rivals, which only a fine grid tells apart.

    Measured, squared error over the optimum: a row alone at most 1.0004 (1,500 arrays of 257 to 1,200 points, k 2 to
    64); among many rows, where that would be fifteen times the work, on average 1.0001 and at most 1.005 (3,780 rows).
    """
    alone = rows == 1 and k <= 64
    half = max(8, int((FINE_WORK[alone] / k) ** 0.5 / 2))
    return half, max(32, half) if alone else 32, 2e-5


def _by_rows(points: Points, step: int, work: Callable[[Points, I64], I64], start: I64) -> I64:
    if len(start) <= step:
        return work(points, start)
    pieces = []
    for low in range(0, len(start), step):
        which = np.arange(low, min(low + step, len(start)))
        pieces.append(work(points.rows(which), start[which]))
    return np.concatenate(pieces)


def _settle(points: Points, bounds: I64, half: int, grain: int, tolerance: float) -> I64:
    """Rounds of windows and Lloyd steps until no row gains more than `tolerance` of its error."""
    bounds = bounds.copy()
    active = np.arange(len(bounds))
    step = max(1, TENSOR // ((bounds.shape[1] - 1) * (2 * half + 1) ** 2))

    def improve(part: Points, old: I64) -> I64:
        return lloyd(part, grow(part, window(part, old, half, grain)), 4)

    for _ in range(ROUNDS):
        part = points if len(active) == len(bounds) else points.rows(active)
        old = bounds[active]
        new = _by_rows(part, step, improve, old)
        before, after = part.error(old), part.error(new)
        better = after < before
        bounds[active[better]] = new[better]
        active = active[before - after > tolerance * before]
        if not len(active):
            break
    return bounds


def grow(points: Points, bounds: I64) -> I64:
    """Fill a partition up to k non-empty intervals: drop empty ones, then split those of largest gain.

    At most half as many splits as there are intervals happen at once, so that gains are seen before the next are
    chosen.
    """
    k = bounds.shape[1] - 1
    fractions = np.arange(1, 8) / 8
    while True:
        empty = bounds[:, 1:] == bounds[:, :-1]
        if not empty.any():
            return bounds
        bounds = bounds.copy()
        bounds[:, 1:][empty] = np.broadcast_to(points.size[:, None], empty.shape)[empty]
        bounds.sort(axis=1)
        low, high = bounds[:, :-1], bounds[:, 1:]
        count = (high > low).sum(axis=1)
        splittable = high - low > 1
        first = points.pick(points.x, np.minimum(low, points.size[:, None] - 1))
        last = points.pick(points.x, np.maximum(high - 1, 0))
        cut = points.above(first[..., None] + (last - first)[..., None] * fractions)
        cut = np.concatenate([cut, ((low + high) >> 1)[..., None]], axis=2)
        cut = np.clip(cut, np.minimum(low + 1, high)[..., None], np.maximum(high - 1, low)[..., None])
        split = points.cost(np.repeat(low[..., None], 8, axis=2), cut)
        split += points.cost(cut, np.repeat(high[..., None], 8, axis=2))
        best = split.argmin(axis=2)[..., None]
        gain = points.cost(low, high) - np.take_along_axis(split, best, axis=2)[..., 0]
        gain = np.where(splittable, gain, -np.inf)
        rank = np.argsort(np.argsort(-gain, axis=1, kind="stable"), axis=1, kind="stable")
        allowed = np.minimum(k - count, np.maximum(1, (count + 1) // 2))
        chosen = (rank < allowed[:, None]) & splittable
        added = np.where(chosen, np.take_along_axis(cut, best, axis=2)[..., 0], points.size[:, None])
        # every row has at most k - count real additions, so what the cut removes is padding
        bounds = np.sort(np.concatenate([bounds, added], axis=1), axis=1)[:, : k + 1]


def lloyd(points: Points, bounds: I64, rounds: int) -> I64:
    """Lloyd steps on a partition [R, k + 1] until nothing moves, at most `rounds`."""
    for _ in range(rounds):
        centers = points.centers(bounds)
        moved = bounds.copy()
        moved[:, 1:-1] = points.above((centers[:, 1:] + centers[:, :-1]) / 2)
        if np.array_equal(moved, bounds):
            break
        bounds = moved
    return bounds


def window(points: Points, bounds: I64, half: int, grain: int) -> I64:
    """Best partition whose every boundary stays within `half` places of the present one. Never worse than `bounds`.

    Places: the present boundaries and `grain` - 1 evenly spaced values inside each interval.
    """
    rows, k = bounds.shape[0], bounds.shape[1] - 1
    low, high = bounds[:, :-1], bounds[:, 1:]
    first = points.pick(points.x, np.minimum(low, points.size[:, None] - 1))
    last = points.pick(points.x, np.maximum(high - 1, 0))
    inner = points.above(first[..., None] + (last - first)[..., None] * (np.arange(1, grain) / grain))
    inner = np.clip(inner, low[..., None], high[..., None])
    grid = np.concatenate([low[..., None], inner], axis=2).reshape(rows, k * grain)
    grid = np.concatenate([grid, bounds[:, -1:]], axis=1)
    width = 2 * half + 1
    padded = np.pad(grid, ((0, 0), (half, half)), mode="edge")

    def windows(table: np.ndarray) -> np.ndarray:
        return np.lib.stride_tricks.sliding_window_view(table, width, axis=1)[:, ::grain]

    place = windows(padded)
    sums = []
    for table in (points.s0, points.s1, points.s2):
        at = windows(points.pick(table, padded))
        sums.append(at[:, 1:, :, None] - at[:, :-1, None, :])  # [rows, k, to, from]
    pinned = None
    if points.zero[0] >= 0:
        zero = points.zero[:, None, None]
        pinned = (place[:, :-1] <= zero)[:, :, None, :] & (place[:, 1:] > zero)[..., None]
    cost = _error(sums[0], sums[1], sums[2], pinned)
    cost[place[:, 1:, :, None] < place[:, :-1, None, :]] = np.inf

    best = np.where(place[:, 0] == 0, 0.0, np.inf)
    came = np.empty((k, rows, width), dtype=np.int16)
    for m in range(k):
        reach = cost[:, m]
        reach += best[:, None, :]
        came[m] = reach.argmin(axis=2)
        best = reach.min(axis=2)
    return _walk_back(came, place, np.full(rows, half))


def exact(points: Points, k: int) -> I64:
    """The best partition of all into k intervals, by the dynamic program over all pairs of points."""
    rows, width = points.x.shape
    every = np.arange(width + 1)
    at = np.broadcast_to(every, (rows, width + 1))
    low = np.broadcast_to(at[:, None, :], (rows, width + 1, width + 1))
    high = np.broadcast_to(at[:, :, None], (rows, width + 1, width + 1))
    cost = points.cost(low, high)
    cost[:, every[:, None] < every[None, :]] = np.inf
    best = np.where(every == 0, 0.0, np.inf)[None].repeat(rows, axis=0)
    came = np.empty((k, rows, width + 1), dtype=np.int16)
    for m in range(k):
        reach = cost + best[:, None, :]
        came[m] = reach.argmin(axis=2)
        best = reach.min(axis=2)
    place = np.broadcast_to(np.minimum(at, points.size[:, None])[:, None, :], (rows, k + 1, width + 1))
    return grow(points, _walk_back(came, place, points.size))


def _walk_back(came: np.ndarray, place: np.ndarray, end: I64) -> I64:
    """Boundaries from the choices of a dynamic program. came [k, R, W], place [R, k + 1, W], end [R] into W."""
    k, rows = came.shape[:2]
    bounds = np.empty((rows, k + 1), dtype=np.int64)
    row = np.arange(rows)
    index = end.astype(np.int64)
    bounds[:, k] = place[row, k, index]
    for m in range(k - 1, -1, -1):
        index = came[m, row, index].astype(np.int64)
        bounds[:, m] = place[row, m, index]
    return bounds
