"""The latency ratio of two open sessions, measured for a short while."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from onnxcompress.runtime.latency import interleaved_latency
from onnxcompress.runtime.session import Session
from onnxcompress.validation.result import Timing

Feeds = Mapping[str, Any]


def measure(
    original: Session,
    compressed: Session,
    feeds: tuple[Feeds, Feeds],
    *,
    threads: int,
    batch: int,
    budget: float = 2.0,
    least: int = 3,
    most: int = 100,
) -> Timing:
    """Run both in turn on the same batch, warm from the runs before, until `budget` seconds or `most` rounds are over.

    `feeds`: for the original and the compressed model. Which of the two goes first changes every round.
    """
    times: tuple[list[float], list[float]] = ([], [])
    start = time.perf_counter()
    while len(times[0]) < most and (time.perf_counter() - start < budget or len(times[0]) < least):
        if len(times[0]) % 2 == 0:
            first, second = interleaved_latency([original, compressed], feeds, rounds=1, warmup=0).medians
        else:
            second, first = interleaved_latency([compressed, original], feeds[::-1], rounds=1, warmup=0).medians
        times[0].append(first)
        times[1].append(second)
        if time.perf_counter() - start > 5 * budget:
            break
    ratios = sorted(first / second for first, second in zip(*times, strict=True))
    low, high = median_range(ratios)
    return Timing(
        original_p50=statistics.median(times[0]),
        compressed_p50=statistics.median(times[1]),
        ratio=statistics.median(ratios),
        ratio_low=low,
        ratio_high=high,
        rounds=len(ratios),
        threads=threads,
        batch=batch,
    )


def median_range(ordered: Sequence[float], confidence: float = 0.95) -> tuple[float | None, float | None]:
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
