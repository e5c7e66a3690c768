"""The moving average of the parameters against numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from onnxcompress.model.load import load
from onnxcompress.model.weights import weights
from onnxcompress.training import runner
from onnxcompress.training.distill import Evaluation, Settings, distill
from tests.training.small import arrays, normalized, opened


@pytest.mark.parametrize("fixed", ["n", 4])
def test_what_is_returned_is_the_average_of_every_step(fixed: int | str, monkeypatch: Any) -> None:
    student = load(normalized(fixed))
    states: list[dict[str, np.ndarray]] = []
    graphs: list[Any] = []
    whole = runner.Runner.step

    def watched(self: runner.Runner, *args: Any) -> tuple[float, float]:
        found = whole(self, *args)
        states.append(self.read())
        graphs.append(self._graph)
        return found

    monkeypatch.setattr(runner.Runner, "step", watched)
    seen = []

    def score(candidate: Any) -> float:
        seen.append({w.key: np.array(w.array()) for w in weights(candidate)})
        return float(len(seen))

    settings = Settings(epochs=3, batch=16, lr=1e-2, ema=0.8, batch_norm="trained")
    done = distill(
        None, student, opened(student, arrays(64), fixed if isinstance(fixed, int) else 16), settings=settings,
        evaluation=Evaluation(score),
    )  # fmt: skip
    graph, decays = graphs[0], []
    average = {leaf.name: leaf.initial.astype(np.float64) for leaf in graph.leaves} | dict(graph.running)
    for t, state in enumerate(states, 1):
        decays.append(min(0.8, (1 + t) / (10 + t)))
        average = {name: a * decays[-1] + state[name] * (1 - decays[-1]) for name, a in average.items()}
    assert len(states) == 12
    assert decays[0] == pytest.approx(2 / 11)
    wanted = graph.trained(average)
    assert wanted.keys() == done.parameters.keys() >= {"w1", "mean", "var"}
    for key, parts in done.parameters.items():
        np.testing.assert_allclose(parts["w"], wanted[key]["w"], atol=1e-5)
        np.testing.assert_array_equal(seen[-1][key], parts["w"])
    last = graph.trained(graph.values(states[-1]))
    assert np.abs(done.parameters["w1"]["w"] - last["w1"]["w"]).max() > 1e-4
