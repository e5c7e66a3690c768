"""BatchNormalization in training: batch statistics in the graph, running ones as state that survives a kill."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pytest

from onnxcompress.errors import PassError
from onnxcompress.healing import train
from onnxcompress.model.load import load
from onnxcompress.model.weights import weights
from onnxcompress.training import loop
from onnxcompress.training.distill import Conditions, Evaluation, Settings, Trained, distill
from onnxcompress.training.initial import randomize
from tests.training.small import arrays, normalized, opened

ROOT = pathlib.Path(__file__).parents[2]
TRAINED = Settings(epochs=2, batch=16, batch_norm="trained")


def parameters(of: Any) -> dict[str, np.ndarray]:
    return {w.key: w.array() for w in weights(of)}


def trained(settings: Settings, batch: int | str = "n", **others: Any) -> Trained:
    student = load(normalized(batch))
    data = opened(student, arrays(64), batch if isinstance(batch, int) else 16)
    return distill(None, student, data, settings=settings, **others)


@pytest.mark.parametrize(("fixed", "size"), [("n", 16), (4, 4)])
def test_running_statistics_move_to_those_of_the_batches(fixed: int | str, size: int) -> None:
    # The first weight does not move, so that the statistics of every call are known.
    done = trained(Settings(epochs=1, batch=16, batch_norm="trained", lr=1e-20), fixed)
    assert done.steps == 4
    start, x = parameters(load(normalized())), arrays(64)["x"]
    mean, var = start["mean"].astype(np.float64), start["var"].astype(np.float64)
    order = np.random.default_rng([0, 0]).permutation(64)
    for at in range(0, 64, size):
        h = x[order[at : at + size]].astype(np.float64) @ start["w1"]
        mean, var = 0.8 * mean + 0.2 * h.mean(0), 0.8 * var + 0.2 * h.var(0)
    np.testing.assert_allclose(done.parameters["mean"]["w"], mean, atol=1e-5)
    np.testing.assert_allclose(done.parameters["var"]["w"], var, rtol=1e-5)


def test_the_loss_is_that_of_the_batch_statistics() -> None:
    done = trained(Settings(epochs=1, batch=64, batch_norm="trained", lr=1e-20))
    start, given = parameters(load(normalized())), arrays(64)
    h = given["x"].astype(np.float64) @ start["w1"]
    n = (h - h.mean(0)) / np.sqrt(h.var(0) + 1e-5) * start["scale"] + start["shift"]
    z = np.maximum(n, 0) @ start["w2"] + start["b2"]
    logs = z - np.log(np.exp(z).sum(1, keepdims=True))
    assert done.epochs[0].loss == pytest.approx(-logs[np.arange(64), given["y"]].mean(), rel=1e-5)


def test_frozen_statistics_stay() -> None:
    done = trained(Settings(epochs=1, batch=16))
    assert not {"mean", "var"} & done.parameters.keys()
    assert done.left["mean"] == "running statistics, measured and not learned"
    assert {"scale", "shift"} <= done.parameters.keys()


def test_one_sample_has_no_statistics() -> None:
    with pytest.raises(PassError, match="fixed to 1 sample"):
        trained(TRAINED, 1)


def test_the_score_is_that_of_the_running_statistics() -> None:
    seen: list[np.ndarray] = []

    def score(candidate: Any) -> float:
        seen.append(parameters(candidate)["mean"])
        return float(len(seen))

    done = trained(TRAINED, evaluation=Evaluation(score))
    assert not np.array_equal(seen[0], seen[1])
    np.testing.assert_array_equal(seen[1], done.parameters["mean"]["w"])


class _Killed(Exception):
    """What stands in for a kill."""


@pytest.mark.parametrize("batch", ["n", 4])
def test_an_interrupted_training_resumes_to_the_same_statistics(
    batch: int | str, tmp_path: pathlib.Path, monkeypatch: Any
) -> None:
    whole = trained(TRAINED, batch)
    monkeypatch.setattr(loop, "SAVED_EVERY", 0.0)
    update, count = loop.Loop._update, 0

    def killed(self: loop.Loop, epoch: int, chosen: Any) -> None:
        nonlocal count
        count += 1
        if count == 4:
            raise _Killed
        update(self, epoch, chosen)

    monkeypatch.setattr(loop.Loop, "_update", killed)
    with pytest.raises(_Killed):
        trained(TRAINED, batch, conditions=Conditions(work=tmp_path))
    resumed = trained(TRAINED, batch, conditions=Conditions(work=tmp_path, resume=True))
    assert count == 4 + 8 - 3
    assert resumed.parameters.keys() == whole.parameters.keys() >= {"mean", "var"}
    for key, parts in whole.parameters.items():
        assert resumed.parameters[key]["w"].tobytes() == parts["w"].tobytes(), key


def test_fresh_weights_begin_with_neutral_normalizations() -> None:
    fresh = load(normalized())
    randomize(fresh, 0)
    found = parameters(fresh)
    for key, value in {"scale": 1, "shift": 0, "mean": 0, "var": 1}.items():
        np.testing.assert_array_equal(found[key], np.full(16, value, np.float32))


def test_a_convolutional_network_trains_from_scratch(tmp_path: pathlib.Path) -> None:
    folder = ROOT / "models" / "digits_cnn"
    report = train(
        None,
        folder / "model.onnx",
        tmp_path / "out.onnx",
        data=folder / "train.npz",
        init="random",
        settings=Settings(epochs=4),
        evaluate=folder / "eval.npz",
        metric="accuracy",
    )
    losses = [epoch["loss"] for epoch in report["epochs"]]
    assert losses[-1] < 0.1
    assert losses[0] < 2  # with frozen statistics the first is about 400
    assert report["epochs"][-1]["score"] > 0.95
    assert not report["left"]
