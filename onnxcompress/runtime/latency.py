"""Latency of sessions against each other: interleaved, so that a machine that slows down slows all of them alike."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from onnxcompress.runtime.session import Session

Feeds = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Latency:
    """What was timed over `rounds`.

    `medians`: seconds per run, one a session. `ratios`: median over rounds of time of the first / time of this one, so
    above 1 this one is faster; the first is 1.
    """

    medians: tuple[float, ...]
    ratios: tuple[float, ...]
    rounds: int


def interleaved_latency(
    sessions: Sequence[Session], feeds: Feeds | Sequence[Feeds], rounds: int = 15, warmup: int = 2
) -> Latency:
    """Time `sessions` in turn, `rounds` times after `warmup` untimed rounds. `feeds`: one for all, or one for each.

    Every other round runs in reverse, so that no session always follows the same one.
    """
    if not sessions or rounds < 1:
        raise ValueError("at least one session and one round")
    each: list[Feeds] = [feeds] * len(sessions) if isinstance(feeds, Mapping) else list(feeds)
    if len(each) != len(sessions):
        raise ValueError(f"{len(each)} feeds for {len(sessions)} sessions")
    times: list[list[float]] = [[] for _ in sessions]
    order = list(range(len(sessions)))
    for turn in range(warmup + rounds):
        for index in order if turn % 2 == 0 else reversed(order):
            start = time.perf_counter()
            sessions[index].run(each[index])
            if turn >= warmup:
                times[index].append(time.perf_counter() - start)
    ratios = [statistics.median(first / own for first, own in zip(times[0], column, strict=True)) for column in times]
    return Latency(tuple(statistics.median(column) for column in times), tuple(ratios), rounds)
