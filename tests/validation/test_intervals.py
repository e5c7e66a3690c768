"""Bounds on a paired drop: against brute force, against theory, and their coverage in simulation."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress.validation.intervals import (
    _stretch,
    bootstrap_bounds,
    rule_of_three,
    samples_needed,
    tango_lower,
    tango_needed,
    tango_upper,
)

Z = 1.6448536269514722


def brute_force(b: int, c: int, n: int) -> float:
    """The first d whose score statistic, with the likelihood maximized on a grid, is below -z."""
    for d in np.arange((b - c) / n, 1, 0.001):
        q = np.linspace(max(0.0, -d) + 1e-9, (1 - d) / 2 - 1e-9, 20_001)
        likelihood = b * np.log(q + d) + c * np.log(q) + (n - b - c) * np.log(np.maximum(1 - 2 * q - d, 1e-300))
        best = float(q[likelihood.argmax()])
        if (b - c - n * d) / math.sqrt(n * (2 * best + d * (1 - d))) < -Z:
            return float(d)
    return 1.0


@pytest.mark.parametrize(("b", "c", "n"), [(12, 5, 100), (1, 7, 60), (3, 3, 40)])
def test_tango_is_the_score_bound(b: int, c: int, n: int) -> None:
    assert tango_upper(b, c, n) == pytest.approx(brute_force(b, c, n), abs=0.0011)


def test_tango_without_disagreement_is_closed_form() -> None:
    for n in (20, 542, 2000):
        assert tango_upper(0, 0, n) == pytest.approx(Z * Z / (n + Z * Z), rel=1e-9)
    assert tango_upper(0, 0, 2000) == pytest.approx(0.00135, abs=1e-5)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 200), st.integers(0, 200), st.integers(1, 2000))
def test_tango_encloses_the_estimate(b: int, c: int, extra: int) -> None:
    n = b + c + extra
    upper, lower = tango_upper(b, c, n), tango_lower(b, c, n)
    assert -1 <= lower <= (b - c) / n <= upper <= 1
    assert tango_upper(b + 1, c, n) >= upper


def test_samples_needed_agree_with_theory() -> None:
    # z^2 (disagreement) / budget^2, which the score bound approaches from above.
    for share, budget in ((0.02, 0.01), (0.02, 0.005), (0.05, 0.01), (0.05, 0.005)):
        theory = Z * Z * share / budget**2
        found = samples_needed(lambda m: tango_upper(share / 2 * m, share / 2 * m, m) <= budget, 1)  # noqa: B023
        assert found is not None
        assert theory <= found <= 1.2 * theory
    assert samples_needed(lambda m: m >= 777, 10) == 777
    assert samples_needed(lambda m: False, 10) is None


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 0.3), st.floats(0, 0.3), st.floats(0, 0.2), st.sampled_from([0.05, 0.0051]))
def test_tango_needed_is_where_the_bound_meets_the_budget(b: float, c: float, budget: float, alpha: float) -> None:
    n = tango_needed(b, c, budget, alpha)
    if n is None or n < 2:
        assert n is not None or abs(b - c - budget) < 1e-3
        return
    if b - c < budget:
        assert tango_upper(b * n, c * n, n, alpha) <= budget + 1e-9
        assert tango_upper(b * (n - 1), c * (n - 1), n - 1, alpha) > budget - 1e-9
    else:
        assert tango_lower(b * n, c * n, n, alpha) >= budget - 1e-9
        assert tango_lower(b * (n - 1), c * (n - 1), n - 1, alpha) < budget + 1e-9


def test_tango_covers() -> None:
    generator = np.random.default_rng(5)
    n, drop, disagreement, below = 500, 0.01, 0.05, 0
    for _ in range(2000):
        b, c, _rest = generator.multinomial(n, [(disagreement + drop) / 2, (disagreement - drop) / 2, 1 - disagreement])
        below += tango_upper(int(b), int(c), n) < drop
    # A share of 5 % +- three standard errors of 2000 draws.
    assert below / 2000 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 2000)


def mean_of(values: npt.NDArray[np.float64]):  # type: ignore[no-untyped-def]
    return lambda weights: weights @ values / weights.sum(axis=1)


def test_bootstrap_is_near_the_normal_bound_of_a_mean() -> None:
    values = np.random.default_rng(2).standard_normal(2000)
    lower, upper = bootstrap_bounds(mean_of(values), 2000, seed=1)
    error = float(values.std()) / math.sqrt(2000)
    assert upper - values.mean() == pytest.approx(Z * error, rel=0.1)
    assert values.mean() - lower == pytest.approx(Z * error, rel=0.1)


def test_bootstrap_is_seeded_and_skewed_where_the_data_is() -> None:
    values = np.random.default_rng(4).lognormal(0, 1.5, 200)
    first, again = bootstrap_bounds(mean_of(values), 200, seed=7), bootstrap_bounds(mean_of(values), 200, seed=7)
    assert first == again
    assert first != bootstrap_bounds(mean_of(values), 200, seed=8)
    assert first[1] - values.mean() > 1.2 * (values.mean() - first[0])


def test_bootstrap_covers_a_mean() -> None:
    generator, missed = np.random.default_rng(6), 0
    for trial in range(300):
        values = generator.exponential(1.0, 60)
        missed += bootstrap_bounds(mean_of(values), 60, seed=trial, resamples=400)[1] < 1.0
    # 5 % in theory; BCa on 60 skewed samples still misses a little more often, the plain percentile 9 %.
    assert missed / 300 <= 0.10


def test_heavy_tails_stretch_the_bound() -> None:
    generator = np.random.default_rng(8)
    light = generator.standard_normal(100)
    heavy = np.sign(light) * generator.pareto(2.5, 100)
    reach = {}
    for name, values in (("light", light), ("heavy", heavy)):
        upper = bootstrap_bounds(mean_of(values), 100, seed=1, alpha=0.01)[1]
        reach[name] = (upper - values.mean()) / (values.std() / 10)
    # z = 2.326; with the kurtosis of a normal Student's t of 100 degrees of freedom, 2.364.
    assert reach["light"] == pytest.approx(2.364, rel=0.08)
    kurtosis = float(((heavy - heavy.mean()) ** 4).mean() / heavy.var() ** 2)
    freedom = 2 * 100 / (kurtosis - 1)
    assert _stretch(2.326348, 100) == pytest.approx(2.364217 / 2.326348, abs=1e-4)
    assert _stretch(2.326348, 10) == pytest.approx(2.763769 / 2.326348, abs=5e-3)
    assert 5 < freedom < 40
    assert reach["heavy"] > 1.05 * reach["light"]


def test_bootstrap_of_a_constant_or_undefined_statistic() -> None:
    assert bootstrap_bounds(lambda weights: np.full(len(weights), 0.25), 50) == (0.25, 0.25)
    assert all(math.isnan(bound) for bound in bootstrap_bounds(lambda weights: np.full(len(weights), np.nan), 50))


def test_rule_of_three() -> None:
    assert rule_of_three(300) == pytest.approx(3 / 300, rel=0.01)
    assert (1 - rule_of_three(100)) ** 100 == pytest.approx(0.05)
