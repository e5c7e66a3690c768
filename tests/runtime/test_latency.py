"""Interleaved latency: ratios say which session is faster, whatever the machine does meanwhile."""

from __future__ import annotations

import time
from typing import cast

import pytest

from onnxcompress.runtime.latency import interleaved_latency
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


def test_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "perf_counter", lambda: Sleeper.now)
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
