"""Gradual pruning: the schedule, what is pruned, the masks in the step, and exact resume."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pytest

from onnxcompress.contract import Run
from onnxcompress.encodings import Affine, Masked, Sparse
from onnxcompress.errors import PassError
from onnxcompress.model import bridge
from onnxcompress.model.load import load
from onnxcompress.model.weights import weights
from onnxcompress.numerics.affine import quantize_weight
from onnxcompress.passes.dynamic_quantization import DynamicQuantization
from onnxcompress.training import loop
from onnxcompress.training.distill import Conditions, Evaluation, Settings, Trained, distill, write
from onnxcompress.training.gradual import Gradual, Rise, rise
from tests.training.small import arrays, mlp, opened, outputs, tagger

SETTINGS = Settings(epochs=6, batch=16, sparsity=0.8, sparsity_until=0.5)


def trained(settings: Settings = SETTINGS, **others: Any) -> Trained:
    student = load(mlp())
    data = opened(student, {"x": arrays(64)["x"]})
    return distill(load(mlp()), student, data, settings=settings, **others)


def test_the_sparsity_rises_as_a_cubic() -> None:
    to = Rise(0.8, 100)
    assert [to.at(step, 0.0) for step in (0, 50, 100, 200)] == pytest.approx([0, 0.8 * 7 / 8, 0.8, 0.8])
    assert to.at(50, 0.4) == pytest.approx(0.8 - 0.4 / 8)
    assert to.at(100, 0.9) == 0.9
    assert [step for step in range(110) if to.is_due(step)] == [*range(0, 100, 2), 100]
    assert (rise(0.5, 24, 0.5).end, rise(0.5, 24, 1.0).end, rise(0.5, 1, 1.0).end) == (12, 23, 1)
    with pytest.raises(PassError, match="wants shares between 0 and 1, got sparsity 50"):
        rise(50, 10, 0.5)


def test_every_layer_reaches_the_sparsity_and_the_zeros_are_the_small_ones() -> None:
    student = load(mlp())
    done = trained()
    new = bridge.clone(student)
    write(new, done.parameters)
    before = {w.key: w for w in weights(student)}
    for weight in weights(new):
        zeros = np.mean(weight.array() == 0)
        if weight.role == "gemm":
            assert zeros == pytest.approx(0.8, abs=1e-3)
            assert isinstance(weight.encoding, Masked)
            large = np.abs(before[weight.key].array())
            assert large[weight.array() == 0].mean() < 0.6 * large[weight.array() != 0].mean()
        else:
            assert zeros < 0.05


def test_it_heals_while_it_prunes() -> None:
    teacher, given = load(mlp()), {"x": arrays(64)["x"]}
    truth = outputs(teacher, given)["z"]
    errors = []
    for until, epochs in ((0.7, 40), (0.001, 1)):  # gradually; all at once, with no time to heal
        done = trained(Settings(epochs=epochs, batch=16, sparsity=0.8, sparsity_until=until, lr=5e-3))
        new = load(mlp())
        write(new, done.parameters)
        errors.append(np.abs(outputs(new, given)["z"] - truth).mean())
    assert errors[0] < 0.6 * errors[1]


def test_pruned_elements_do_not_act_in_later_steps() -> None:
    # The loss of the last epoch is that of the model that comes out, at a learning rate that moves nothing.
    done = trained(Settings(epochs=2, batch=64, sparsity=0.5, sparsity_until=0.5, lr=1e-20))
    again = load(mlp())
    write(again, done.parameters)
    data = opened(again, {"x": arrays(64)["x"]})
    start = distill(load(mlp()), again, data, settings=Settings(epochs=1, batch=64, lr=1e-20))
    assert done.epochs[1].loss == pytest.approx(start.epochs[0].loss, rel=1e-5)
    assert done.epochs[0].loss < 0.5 * done.epochs[1].loss


def test_an_epoch_before_the_sparsity_is_reached_is_never_the_best() -> None:
    scores = iter([0.9, 0.8, 0.7, 0.2, 0.6, 0.5])
    seen = []

    def score(candidate: Any) -> float:
        seen.append(next(np.mean(w.array() == 0) for w in weights(candidate) if w.key == "w1"))
        return next(scores)

    done = trained(evaluation=Evaluation(score))
    assert seen == sorted(seen)
    assert seen[0] < 0.7 < seen[3]
    assert [epoch.score for epoch in done.epochs] == [0.9, 0.8, 0.7, 0.2, 0.6, 0.5]
    kept = done.parameters["w1"]["w"]
    assert np.mean(kept == 0) == pytest.approx(0.8, abs=1e-3)


class _Killed(Exception):
    """What stands in for a kill."""


@pytest.mark.parametrize("at", [5, 16])
def test_an_interrupted_training_resumes_to_the_same_bytes(at: int, tmp_path: pathlib.Path, monkeypatch: Any) -> None:
    settings = Settings(epochs=6, batch=16, sparsity=0.8, sparsity_until=0.5, ema=0.9)
    whole = trained(settings)
    monkeypatch.setattr(loop, "SAVED_EVERY", 0.0)
    update, count = loop.Loop._update, 0

    def killed(self: loop.Loop, epoch: int, chosen: Any) -> None:
        nonlocal count
        count += 1
        if count == at:
            raise _Killed
        update(self, epoch, chosen)

    monkeypatch.setattr(loop.Loop, "_update", killed)
    with pytest.raises(_Killed):
        trained(settings, conditions=Conditions(work=tmp_path))
    resumed = trained(settings, conditions=Conditions(work=tmp_path, resume=True))
    assert count == at + 24 - (at - 1)
    for key, parts in whole.parameters.items():
        assert resumed.parameters[key]["w"].tobytes() == parts["w"].tobytes()


def test_nothing_to_prune_is_said() -> None:
    graph: Any = type("Graph", (), {"leaves": [], "buffers": {}})()
    with pytest.raises(PassError, match="no layer's weight"):
        Gradual(graph, Rise(0.5, 10))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sparsity": 1.0}, "sparsity: wanted a share from 0 to below 1, got 1.0"),
        ({"sparsity": float("nan")}, "sparsity: .* got nan"),
        ({"sparsity": 0.5, "sparsity_until": 0.0}, "sparsity_until: wanted a share of the steps"),
        ({"ema": 1.0}, "ema: wanted a decay between 0 and 1, got 1.0"),
    ],
)
def test_settings_that_no_training_can_have(given: dict[str, Any], message: str) -> None:
    with pytest.raises(PassError, match=message):
        Settings(**given)


def test_embeddings_stay_as_they_are() -> None:
    student = load(tagger())
    table = next(weight for weight in weights(student) if weight.role == "embedding")
    table.replace(Masked(np.where(np.abs(table.array()) > 0.5, table.array(), np.float32(0))))
    ids = np.random.default_rng(2).integers(0, 11, (64, 5))
    data = opened(student, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
    done = distill(load(tagger()), student, data, settings=SETTINGS)
    new = bridge.clone(student)
    write(new, done.parameters)
    for weight in weights(new):
        if weight.role == "matmul":
            assert np.mean(weight.array() == 0) == pytest.approx(0.8, abs=0.03)
        elif weight.role == "embedding":
            np.testing.assert_array_equal(weight.array() == 0, table.array() == 0)
            assert np.any(weight.array() != table.array())


@pytest.mark.parametrize("stored", ["integers", "integer product", "sparse"])
def test_the_sparsity_of_stored_forms_rises_too(stored: str, tmp_path: pathlib.Path) -> None:
    student = load(mlp())
    if stored == "integer product":
        DynamicQuantization(max_error=1, min_elements=1).apply(student, Run(work=tmp_path))
    else:
        for weight in weights(student):
            if weight.role == "gemm":
                array = np.where(np.abs(weight.array()) > 0.1, weight.array(), np.float32(0))
                q, scale, _ = quantize_weight(array, axis=1)
                weight.replace(Sparse.pack(array) if stored == "sparse" else Affine(q, scale, None, 1))
    before = {weight.key: weight for weight in weights(student)}
    data = opened(student, {"x": arrays(64)["x"]})
    done = distill(load(mlp()), student, data, settings=SETTINGS)
    new = bridge.clone(student)
    write(new, done.parameters)
    found = [weight for weight in weights(new) if weight.role in ("gemm", "matmul")]
    assert len(found) == 2
    for weight in found:
        assert np.mean(weight.array() == 0) == pytest.approx(0.8, abs=0.01)
        assert weight.encoding.kind == before[weight.key].encoding.kind
        assert not np.any(weight.array()[before[weight.key].array() == 0])
        assert stored != "sparse" or weight.nbytes < before[weight.key].nbytes
