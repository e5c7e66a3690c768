"""Tells tables that are computed from positions (sinusoids, coordinates, slopes) from learned ones."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

_LEAST_LENGTH = 4  # points of a line from which one free number cannot fit it by chance
_LINES = 64  # looked at, of each axis
_LARGEST_GRID = 1 << 16  # positions of a flattened grid whose width is searched for
_HOLDS = 0.9  # share of lines, and of the points of a line, that must follow: a slope may have a kink
_TOLERANCE = {2: 4e-3}  # bytes an element -> rounding, relative to the largest value
_LEAST_NONZERO = 0.5
_SINGLE = 1e-3  # the arguments of a sine were rounded, too


def is_table_of_positions(array: np.ndarray) -> bool:
    """True when the lines of `array` along one of its axes are sinusoids or straight; constant lines do not count.

    Sampled at equal distances, both obey x[t + 1] + x[t - 1] = k x[t] with one k a line (2 cos w; 2). Noise, which all
    learned tables hold, does not. An axis may be a flattened grid, whose rows then are the lines. A table that is zero
    for the most part was pruned: zeros follow any rule, and of what is computed only a few are.
    """
    if array.size and np.count_nonzero(array) < _LEAST_NONZERO * array.size:
        return False
    tolerance = _TOLERANCE.get(array.dtype.itemsize, _SINGLE)
    return any(_follow(lines, tolerance) for lines in _lines(array))


def _lines(array: np.ndarray) -> Iterator[np.ndarray]:
    """Lines [count, length] along each axis and along the rows of grids that an axis may hold."""
    for axis, size in enumerate(array.shape):
        if size < _LEAST_LENGTH:
            continue
        whole = np.moveaxis(array, axis, -1).reshape(-1, size)
        chosen = np.unique(np.linspace(0, len(whole) - 1, min(len(whole), _LINES)).astype(int))
        lines = whole[chosen].astype(np.float64)
        yield lines
        for width in _widths(size):
            yield lines[::4].reshape(-1, width)


def _widths(size: int) -> list[int]:
    if size > _LARGEST_GRID:
        return []
    small = [d for d in range(2, math.isqrt(size) + 1) if size % d == 0]
    return sorted({w for d in small for w in (d, size // d) if w >= _LEAST_LENGTH})


def _follow(lines: np.ndarray, tolerance: float) -> bool:
    largest = np.abs(lines).max(axis=1)
    moving = np.ptp(lines, axis=1) > 1e-6 * max(float(largest.max()), 1e-30)
    lines, largest = lines[moving], largest[moving]
    if not len(lines):
        return False
    middle, around = lines[:, 1:-1], lines[:, 2:] + lines[:, :-2]
    usable = np.abs(middle) > 0.1 * largest[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(usable, around / middle, np.nan)
    k = np.nanmedian(np.where(usable.any(axis=1)[:, None], ratio, 0.0), axis=1)
    off = np.abs(around - k[:, None] * middle)
    points = (off <= tolerance * largest[:, None]).mean(axis=1)
    return bool(((points >= _HOLDS) & (np.abs(k) <= 2 + 10 * tolerance)).mean() >= _HOLDS)
