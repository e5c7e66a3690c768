"""The latency of two open sessions against each other, measured for a short while."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onnxcompress.runtime.cpu import cpu_class
from onnxcompress.runtime.latency import percentile, ratio, timed
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
    """Warm both up until neither becomes faster, then run them in turn until `budget` seconds or `most` rounds.

    `feeds`: for the original and the compressed model. Which of the two goes first changes every round.
    """
    found = timed([original, compressed], feeds, budget=budget, least=least, most=most)
    first, second = found.times
    against = ratio(first, second)
    return Timing(
        original_p50=percentile(first, 0.5),
        compressed_p50=percentile(second, 0.5),
        ratio=against.value,
        ratio_low=against.low,
        ratio_high=against.high,
        rounds=len(first),
        threads=threads,
        batch=batch,
        original_p90=percentile(first, 0.9),
        compressed_p90=percentile(second, 0.9),
        original_p99=percentile(first, 0.99),
        compressed_p99=percentile(second, 0.99),
        warmup=found.warmup,
        stable=found.stable,
        cpu_class=cpu_class(),
    )
