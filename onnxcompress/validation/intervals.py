"""One-sided bounds on a paired difference: Tango's score bound for proportions, the BCa bootstrap for the rest."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_CELLS = 1_000_000  # weights held at once in a bootstrap
_JACKKNIFE = 200  # groups left out in turn for the acceleration


def tango_upper(b: float, c: float, n: float, alpha: float = 0.05) -> float:
    """One-sided upper bound, at level 1 - `alpha`, of p_b - p_c for paired proportions.

    `b`: pairs where only the first is right, `c`: where only the second is, of `n` pairs (real numbers are allowed).
    The bound solves (b - c - n d) / sqrt(n (2 q + d (1 - d))) = -z for d, with q the estimate of p_c restricted to d
    (Tango, Statistics in Medicine 17, 1998).
    """
    if n <= 0:
        return 1.0
    z = statistics.NormalDist().inv_cdf(1 - alpha)

    def excess(d: float) -> float:
        linear = -b - c + (2 * n - b + c) * d
        root = math.sqrt(max(0.0, linear * linear + 8 * n * c * d * (1 - d)))
        q = (root - linear) / (4 * n)
        spread = math.sqrt(max(0.0, n * (2 * q + d * (1 - d))))
        return (b - c - n * d) + z * spread

    low, high = (b - c) / n, 1.0
    if excess(high) > 0:
        return 1.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return high


def tango_lower(b: float, c: float, n: float, alpha: float = 0.05) -> float:
    """One-sided lower bound; see `tango_upper`."""
    return -tango_upper(c, b, n, alpha)


def tango_needed(b: float, c: float, budget: float, alpha: float = 0.05, most: int = 1_000_000_000) -> int | None:
    """How many pairs decide between a drop within and above `budget`, for shares `b`, `c` of pairs; None above `most`.

    n = z^2 (2 q + d (1 - d)) / (b - c - d)^2 at d = budget solves `tango_upper`'s equation: the bound then lies on the
    budget, so half of all samples of that size decide.
    """
    z, d, distance = statistics.NormalDist().inv_cdf(1 - alpha), budget, b - c - budget
    linear = -b - c + (2 - b + c) * d
    q = (math.sqrt(max(0.0, linear * linear + 8 * c * d * (1 - d))) - linear) / 4
    if abs(distance) < 1e-9:
        return None
    n = z * z * (2 * q + d * (1 - d)) / (distance * distance)
    return math.ceil(n - 1e-6) if n <= most else None


def samples_needed(decided: Callable[[int], bool], start: int, most: int = 1_000_000_000) -> int | None:
    """The least n >= `start` for which `decided` holds, given that it holds for all larger ones; None above `most`."""
    high = max(1, start)
    while not decided(high):
        if high >= most:
            return None
        high = min(2 * high, most)
    low = max(0, start - 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if decided(middle) else (middle, high)
    return high


def rule_of_three(n: int, alpha: float = 0.05) -> float:
    """What share of all samples may differ, at most, when none of `n` does: about 3 / n at 95 %.

    1 - alpha^(1/n) (Hanley and Lippman-Hand, JAMA 249, 1983).
    """
    return float(-math.expm1(math.log(alpha) / n))


def bootstrap_bounds(
    statistic: Callable[[Floats], Floats], n: int, *, seed: int = 0, alpha: float = 0.05, resamples: int = 2000
) -> tuple[float, float]:
    """One-sided lower and upper bounds, each at level 1 - `alpha`, of a statistic of `n` samples.

    `statistic`: weights (b, n) -> b values. Bias-corrected and accelerated (Efron, JASA 82, 1987), the acceleration
    from a jackknife over at most 200 groups; resamples where the statistic is not defined are left out. NaN when most
    are. How far a sample with heavy tails shows its own spread, no bootstrap knows: the distance from the statistic is
    stretched by Student's t over the normal quantile, its degrees of freedom 2 / (relative variance of the variance)
    from the jackknife's kurtosis (Satterthwaite, Biometrics Bulletin 2, 1946).
    """
    with np.errstate(all="ignore"):
        centre = float(statistic(np.ones((1, n)))[0])
        values = _resampled(statistic, n, seed, resamples)
        finite = values[np.isfinite(values)]
        if not math.isfinite(centre) or len(finite) < resamples // 2:
            return math.nan, math.nan
        if float(finite.min()) == float(finite.max()):
            return min(centre, float(finite[0])), max(centre, float(finite[0]))
        normal = statistics.NormalDist()
        below = (np.count_nonzero(finite < centre) + 0.5 * np.count_nonzero(finite == centre)) / len(finite)
        bias = normal.inv_cdf(min(max(below, 0.5 / len(finite)), 1 - 0.5 / len(finite)))
        acceleration, freedom = _shape(statistic, n)
    bounds = []
    for level in (alpha, 1 - alpha):
        z = bias + normal.inv_cdf(level)
        found = float(np.quantile(finite, normal.cdf(bias + z / (1 - acceleration * z))))
        bounds.append(centre + (found - centre) * _stretch(normal.inv_cdf(1 - alpha), freedom))
    return bounds[0], bounds[1]


def _stretch(z: float, freedom: float) -> float:
    """Student's t quantile over the normal quantile z, by its expansion in 1 / freedom (Abramowitz, Stegun 26.7.5)."""
    first, second = (z**2 + 1) / 4, (5 * z**4 + 16 * z**2 + 3) / 96
    return 1 + first / freedom + second / freedom**2


def _resampled(statistic: Callable[[Floats], Floats], n: int, seed: int, resamples: int) -> Floats:
    generator = np.random.default_rng([seed, n])
    rows = max(1, min(resamples, _CELLS // n))
    found = []
    for at in range(0, resamples, rows):
        count = min(rows, resamples - at)
        chosen = generator.integers(0, n, (count, n)) + np.arange(count)[:, None] * n
        weights = np.bincount(chosen.reshape(-1), minlength=count * n).reshape(count, n).astype(np.float64)
        found.append(np.asarray(statistic(weights), np.float64))
    return np.concatenate(found)


def _shape(statistic: Callable[[Floats], Floats], n: int) -> tuple[float, float]:
    """Acceleration, and degrees of freedom of the spread, from a jackknife."""
    groups = min(n, _JACKKNIFE)
    rows = max(1, min(groups, _CELLS // n))
    member = np.arange(n) * groups // n
    left_out: list[Any] = []
    for at in range(0, groups, rows):
        own = np.arange(at, min(at + rows, groups))
        left_out.append(statistic((member[None, :] != own[:, None]).astype(np.float64)))
    values = np.concatenate(left_out)
    values = values[np.isfinite(values)]
    spread = values.mean() - values if len(values) else np.zeros(1)
    square = float((spread**2).sum())
    if square <= 0:
        return 0.0, 2.0 * n
    excess = len(spread) * float((spread**4).sum()) / square**2 - 3  # a group's; a sample's is n / groups times that
    freedom = 2 * n / (2 + max(0.0, excess) * n / groups)
    return float((spread**3).sum()) / (6 * square**1.5), max(4.0, freedom)
