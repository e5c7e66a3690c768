"""Interleaved latency: ratios say which session is faster, whatever the machine does meanwhile."""

from __future__ import annotations

import time
from typing import cast

import numpy as np
import pytest

from onnxcompress.runtime.latency import interleaved_latency, median_range, percentile, ratio, timed
from onnxcompress.runtime.session import Session


class Sleeper:
    """Takes a known time on a clock of the test's own, longer the later it is in a run: the machine slows down."""

    calls = 0
    now = 0.0

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.runs = 0

    def run(self, feeds: object) -> None:
        self.runs += 1
        Sleeper.calls += 1
        Sleeper.now += self.seconds * (1 + Sleeper.calls / 20)


class Warming:
    """Takes `seconds` on that clock once `cold` runs are over, each a second shorter than the one before."""

    def __init__(self, cold: int, seconds: float) -> None:
        self.cold, self.seconds = cold, seconds

    def run(self, feeds: object) -> None:
        Sleeper.now += self.seconds + max(0, self.cold)
        self.cold -= 1


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    Sleeper.calls, Sleeper.now = 0, 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: Sleeper.now)


def test_ratios() -> None:
    sleepers = [Sleeper(0.004), Sleeper(0.002), Sleeper(0.008)]
    found = interleaved_latency([cast(Session, s) for s in sleepers], {}, rounds=7, warmup=2)
    assert [s.runs for s in sleepers] == [9, 9, 9]
    assert found.rounds == 7
    assert found.ratios[0] == 1
    assert found.ratios[1] == pytest.approx(2, rel=0.3)
    assert found.ratios[2] == pytest.approx(0.5, rel=0.3)
    assert found.medians[1] < found.medians[0] < found.medians[2]


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="one session"):
        interleaved_latency([], {})
    with pytest.raises(ValueError, match="1 feeds for 2"):
        interleaved_latency([cast(Session, Sleeper(0)), cast(Session, Sleeper(0))], [{}])


def test_cold_runs_are_not_timed() -> None:
    warm, cold = Warming(0, 1.0), Warming(10, 2.0)
    found = timed([cast(Session, warm), cast(Session, cold)], {}, budget=1000, most=20)
    assert found.stable
    # Ten cold runs, and windows of three: the fourth holds the last of them, the fifth is as fast as the fourth.
    assert found.warmup == 15
    assert found.times == ((1.0,) * 20, (2.0,) * 20)


def test_warming_up_ends_with_its_share_of_the_budget() -> None:
    found = timed([cast(Session, Warming(100_000, 1.0))], {}, budget=3.0)
    assert not found.stable
    assert found.warmup == 2
    assert len(found.times[0]) == 1  # one round took more than five times the budget


def test_budget_and_rounds_bound_the_timing() -> None:
    assert len(timed([cast(Session, Warming(0, 1.0))], {}, budget=10.0, least=3, most=100).times[0]) == 11
    assert len(timed([cast(Session, Warming(0, 1.0))], {}, budget=1.5, least=4, most=100).times[0]) == 4


def test_percentiles_are_times_that_were_seen() -> None:
    times = [float(value) for value in range(100, 0, -1)]
    assert [percentile(times, share) for share in (0.5, 0.9, 0.99, 1.0)] == [50, 90, 99, 100]
    assert percentile([3.0], 0.99) == 3.0


def test_median_range() -> None:
    assert median_range([1.0, 2.0, 3.0]) == (None, None)
    # Binomial(15, 1/2): P(at most 3 below) = 1.76 %, at most 4 = 5.9 %.
    assert median_range([float(v) for v in range(1, 16)]) == (4.0, 12.0)
    assert median_range([float(v) for v in range(1, 7)]) == (1.0, 6.0)


def test_few_rounds_have_no_range() -> None:
    assert ratio([2.0] * 5, [1.0] * 5) == ratio([4.0] * 5, [2.0] * 5)
    assert ratio([2.0] * 5, [1.0] * 5).low is None
    found = ratio([2.0] * 6, [1.0] * 6)
    assert (found.value, found.low, found.high) == (2.0, 2.0, 2.0)


@pytest.mark.parametrize("drift", [0.0, 0.8])
def test_the_range_holds_the_true_ratio_as_often_as_it_says(drift: float) -> None:
    """`drift`: correlation of one round's disturbance of the ratio with the next."""
    generator, repeats, n = np.random.default_rng(0), 300, 60
    held = narrow = 0
    for _ in range(repeats):
        noise = generator.normal(size=n)
        for turn in range(1, n):
            noise[turn] = drift * noise[turn - 1] + np.sqrt(1 - drift**2) * noise[turn]
        second = generator.gamma(4.0, 0.25, n) + 0.1
        first = 1.5 * second * np.exp(0.1 * noise)
        found = ratio(first.tolist(), second.tolist())
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 1.5 <= found.high
        low, high = median_range(sorted((first / second).tolist()))
        assert low is not None
        assert high is not None
        narrow += low <= 1.5 <= high
    # Independent rounds: 95 %, less three standard errors. Neighbours alike: 78 %, of order statistics alone 60 %.
    assert held / repeats >= (0.91 if drift == 0 else narrow / repeats + 0.05)
