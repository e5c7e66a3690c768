"""What is shown while work goes on."""

from __future__ import annotations

import time

import pytest

from onnxcompress.cli import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, to be moved by hand."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_every_ten_seconds(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    lines = progress._Lines()
    lines.start("training", 100)
    for _ in range(8):
        clock[0] += 2.5
        lines.step(5, now="epoch 1 of 2, loss 0.5000")
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "training: 20 of 100, epoch 1 of 2, loss 0.5000, about 40 s left",
        "training: 40 of 100, epoch 1 of 2, loss 0.5000, about 30 s left",
    ]


def test_steps_of_an_interrupted_run_do_not_make_this_one_look_fast(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = progress._Lines()
    lines.start("training", 100, done=50)
    clock[0] += 10
    lines.step(10)
    assert capsys.readouterr().err == "training: 60 of 100, about 40 s left\n"


def test_a_bar_shows_the_figures(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    bar = progress._Bar()
    bar.start("training", 10, done=4)
    bar.step(2, now="loss 0.2500")
    bar._bar.refresh()
    bar.done()
    shown = capsys.readouterr().err
    assert "loss 0.2500" in shown
    assert "6/10" in shown
