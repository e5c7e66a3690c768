"""Latency of sessions against each other: interleaved, so that a machine that slows down slows all of them alike."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from onnxcompress.runtime.session import Session

Feeds = Mapping[str, Any]
Column = Sequence[float]

_WINDOW = 3  # rounds whose best times are compared to see whether runs still become faster
_STEADY = 0.97  # a window counts as faster than the one before below this share of its time
_RESAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class Latency:
    """What was timed over `rounds`.

    `medians`: seconds per run, one a session. `ratios`: median over rounds of time of the first / time of this one, so
    above 1 this one is faster; the first is 1.
    """

    medians: tuple[float, ...]
    ratios: tuple[float, ...]
    rounds: int


@dataclasses.dataclass(frozen=True)
class Timed:
    """Seconds of every run: `times[session][round]`, after `warmup` untimed rounds.

    `stable`: warming up ended because no session became faster any more, and not because its time was over.
    """

    times: tuple[tuple[float, ...], ...]
    warmup: int
    stable: bool


@dataclasses.dataclass(frozen=True)
class Ratio:
    """Median over rounds of first / second, above 1 the second is faster; `low`, `high` hold it with 95 % confidence.

    None for fewer than six rounds.
    """

    value: float
    low: float | None
    high: float | None


def interleaved_latency(
    sessions: Sequence[Session], feeds: Feeds | Sequence[Feeds], rounds: int = 15, warmup: int = 2
) -> Latency:
    """Time `sessions` in turn, `rounds` times after `warmup` untimed rounds. `feeds`: one for all, or one for each.

    Every other round runs in reverse, so that no session always follows the same one.
    """
    each = _checked(sessions, feeds, rounds)
    times: list[list[float]] = [[] for _ in sessions]
    for turn in range(warmup + rounds):
        for column, seconds in zip(times, _round(sessions, each, turn), strict=True):
            if turn >= warmup:
                column.append(seconds)
    ratios = [statistics.median(first / own for first, own in zip(times[0], column, strict=True)) for column in times]
    return Latency(tuple(statistics.median(column) for column in times), tuple(ratios), rounds)


def timed(
    sessions: Sequence[Session],
    feeds: Feeds | Sequence[Feeds],
    *,
    budget: float = 2.0,
    least: int = 3,
    most: int = 100,
) -> Timed:
    """Warm all sessions up until none becomes faster, then time them in turn for `budget` seconds.

    Warming up takes at most another third of `budget`, or two rounds. At least `least` rounds are timed as long as that
    keeps within five times `budget`, and at most `most`. `feeds`: one for all, or one for each.
    """
    each = _checked(sessions, feeds, least)
    warmup, stable = _warm(sessions, each, budget / 3)
    times: list[list[float]] = [[] for _ in sessions]
    start, turn = time.perf_counter(), 0
    while turn < most:
        spent = time.perf_counter() - start
        if turn and (spent > 5 * budget or (turn >= least and spent > budget)):
            break
        for column, seconds in zip(times, _round(sessions, each, turn), strict=True):
            column.append(seconds)
        turn += 1
    return Timed(tuple(tuple(column) for column in times), warmup, stable)


def percentile(times: Column, share: float) -> float:
    """The value below or at which `share` of the times lie: the smallest such order statistic, so one that was seen."""
    ordered = sorted(times)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def ratio(first: Column, second: Column, *, seed: int = 0, confidence: float = 0.95) -> Ratio:
    """The median of first / second over rounds, and a range that holds it with `confidence`.

    The wider, at each end, of two ranges. Order statistics of the ratios are exact when rounds are independent, and too
    narrow when the machine is slow for some rounds in a row. A circular block bootstrap (Politis, Romano 1992) widens
    with that: blocks of about n^(1/2) neighbouring rounds, an even number because the order in a round alternates.
    """
    ratios = np.asarray(first, np.float64) / np.asarray(second, np.float64)
    n = len(ratios)
    low, high = median_range(sorted(float(value) for value in ratios), confidence)
    if low is None or high is None:
        return Ratio(float(np.median(ratios)), None, None)
    block = max(2, 2 * math.ceil(math.sqrt(n) / 2))
    starts = np.random.default_rng(seed).integers(0, n, (_RESAMPLES, math.ceil(n / block)))
    picked = (starts[:, :, None] + np.arange(block)).reshape(_RESAMPLES, -1)[:, :n] % n
    ends = np.quantile(np.median(ratios[picked], axis=1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Ratio(float(np.median(ratios)), min(low, float(ends[0])), max(high, float(ends[1])))


def median_range(ordered: Column, confidence: float = 0.95) -> tuple[float | None, float | None]:
    """The order statistics of sorted values that hold their median with `confidence`; None for too few values.

    The number of values below the median is binomial(n, 1/2): the widest k from both ends whose tails stay within it.
    """
    n, tail, k = len(ordered), 0.0, 0
    while k < n // 2:
        tail += math.comb(n, k) / 2**n
        if 2 * tail > 1 - confidence:
            break
        k += 1
    return (ordered[k - 1], ordered[n - k]) if k else (None, None)


def _warm(sessions: Sequence[Session], each: Sequence[Feeds], budget: float) -> tuple[int, bool]:
    """How many rounds it took, and whether the best time of every session had settled.

    Best times, because the machine's other work only ever adds; only getting faster is warming up.
    """
    start, turn = time.perf_counter(), 0
    before: list[float] | None = None
    while True:
        window: list[list[float]] = []
        for _ in range(_WINDOW):
            window.append(_round(sessions, each, turn))
            turn += 1
            if turn >= 2 and time.perf_counter() - start > budget:
                return turn, False
        best = [min(column) for column in zip(*window, strict=True)]
        if before is not None and all(now >= _STEADY * old for now, old in zip(best, before, strict=True)):
            return turn, True
        before = best


def _round(sessions: Sequence[Session], each: Sequence[Feeds], turn: int) -> list[float]:
    """Seconds of one run of every session; the order alternates with `turn`."""
    order = range(len(sessions))
    seconds = [0.0] * len(sessions)
    for index in order if turn % 2 == 0 else reversed(order):
        start = time.perf_counter()
        sessions[index].run(each[index])
        seconds[index] = time.perf_counter() - start
    return seconds


def _checked(sessions: Sequence[Session], feeds: Feeds | Sequence[Feeds], rounds: int) -> list[Feeds]:
    if not sessions or rounds < 1:
        raise ValueError("at least one session and one round")
    each: list[Feeds] = [feeds] * len(sessions) if isinstance(feeds, Mapping) else list(feeds)
    if len(each) != len(sessions):
        raise ValueError(f"{len(each)} feeds for {len(sessions)} sessions")
    return each
