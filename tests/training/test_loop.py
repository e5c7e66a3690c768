"""The loop around the steps: resuming from awkward moments, which epoch is kept, and what is said of a loss that is no
number."""

from __future__ import annotations

import dataclasses
import pathlib
import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress.errors import DataError, PassError
from onnxcompress.model.load import load
from onnxcompress.training import loop
from onnxcompress.training.checkpoint import Checkpoint, Checkpoints, Epoch
from onnxcompress.training.distill import Conditions, Evaluation, Settings, Trained, distill
from onnxcompress.training.order import Order
from onnxcompress.training.settings import identity
from onnxcompress.training.targets import Objective
from tests.builders import floats, graph, info, model, node, tensors
from tests.training.small import arrays, mlp, opened

SETTINGS = Settings(epochs=4, batch=16, patience=2)


def trained(settings: Settings = SETTINGS, count: int = 40, **others: Any) -> Trained:
    """The network of two layers, finetuned on `count` samples."""
    student = load(mlp())
    return distill(None, student, opened(student, arrays(count)), settings=settings, **others)


def scored(*scores: float, before: float | None = None, higher: bool = True) -> Evaluation:
    """An evaluation that gives these scores, one an epoch."""
    left = iter(scores)
    return Evaluation(lambda candidate: next(left), higher, before)


def without_seconds(epochs: list[Epoch]) -> list[Epoch]:
    return [dataclasses.replace(epoch, seconds=0.0) for epoch in epochs]


def test_a_set_smaller_than_a_batch_is_one_batch() -> None:
    small, told = trained(Settings(epochs=2, batch=64), count=20), trained(Settings(epochs=2, batch=20), count=20)
    assert small.used["batch"] == told.used["batch"] == 20
    for key, parts in small.parameters.items():
        assert told.parameters[key]["w"].tobytes() == parts["w"].tobytes()


def test_a_rest_of_an_epoch_begins_the_next() -> None:
    assert trained(Settings(epochs=4, batch=32), count=40).steps == 160 // 32
    assert Settings().epochs_of(40 / 32) == 30
    assert Settings().epochs_of(150 / 2) == 4


# Resuming ---------------------------------------------------------------------------------------------------------


class _Killed(Exception):
    """What stands in for a kill."""


def interrupted(work: pathlib.Path, evaluation: Evaluation | None, **others: Any) -> None:
    with pytest.raises(_Killed):
        trained(conditions=Conditions(work=work, **others), evaluation=evaluation)


def same(a: Trained, b: Trained) -> None:
    assert without_seconds(a.epochs) == without_seconds(b.epochs)
    assert (a.kept, a.steps) == (b.kept, b.steps)
    for key, parts in a.parameters.items():
        assert b.parameters[key]["w"].tobytes() == parts["w"].tobytes()


def test_killed_while_an_epoch_is_evaluated(tmp_path: pathlib.Path, monkeypatch: Any) -> None:
    """Its last update may lie in the checkpoint already; it is evaluated all the same."""
    whole = trained(evaluation=scored(0.1, 0.9, 0.3, 0.2))
    monkeypatch.setattr(loop, "SAVED_EVERY", 0.0)

    def scores() -> Iterator[float]:
        yield 0.1
        raise _Killed

    left = scores()
    interrupted(tmp_path, Evaluation(lambda candidate: next(left)))
    conditions = Conditions(work=tmp_path, resume=True)
    resumed = trained(conditions=conditions, evaluation=scored(0.9, 0.3, 0.2))
    same(whole, resumed)
    assert resumed.kept == 2


def test_killed_after_patience_has_run_out(tmp_path: pathlib.Path) -> None:
    """The epoch that was not waited for any more is not trained after a resume either."""
    whole = trained(evaluation=scored(0.9, 0.3, 0.2))

    def killed(epoch: Epoch) -> None:
        if epoch.number == 3:
            raise _Killed

    interrupted(tmp_path, scored(0.9, 0.3, 0.2), on_epoch=killed)
    same(whole, trained(conditions=Conditions(work=tmp_path, resume=True), evaluation=scored()))


def test_a_resumed_training_tells_of_all_its_epochs(tmp_path: pathlib.Path) -> None:
    def killed(epoch: Epoch) -> None:
        if epoch.number == 2:
            raise _Killed

    interrupted(tmp_path, scored(0.4, 0.5), on_epoch=killed)
    told: list[Epoch] = []
    conditions = Conditions(work=tmp_path, resume=True, on_epoch=told.append)
    done = trained(conditions=conditions, evaluation=scored(0.6, 0.7))
    assert told == done.epochs
    assert [(epoch.number, epoch.score) for epoch in told] == [(1, 0.4), (2, 0.5), (3, 0.6), (4, 0.7)]
    same(trained(evaluation=scored(0.4, 0.5, 0.6, 0.7)), done)


def test_seconds_before_an_interrupt_count(tmp_path: pathlib.Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(loop, "SAVED_EVERY", 0.0)

    def killed(candidate: ir.Model) -> float:
        raise _Killed

    interrupted(tmp_path, Evaluation(killed))
    checkpoints = Checkpoints(tmp_path, identity(SETTINGS, Objective(), {}))
    found = checkpoints.load()
    assert found is not None
    loss, updates, seconds = found.sums
    assert updates == 2
    assert 0 < seconds < 500
    found.sums = (loss, updates, 1000.0)
    checkpoints.save(found)
    done = trained(conditions=Conditions(work=tmp_path, resume=True), evaluation=scored(0.1, 0.2, 0.3, 0.4))
    assert 1000 < done.epochs[0].seconds < 1500
    assert done.epochs[1].seconds < 500


def test_it_goes_on_with_another_rate_and_says_so(tmp_path: pathlib.Path) -> None:
    def killed(epoch: Epoch) -> None:
        if epoch.number == 2:
            raise _Killed

    interrupted(tmp_path, None, on_epoch=killed)
    said: list[str] = []
    conditions = Conditions(work=tmp_path, resume=True, say=said.append)
    slower = dataclasses.replace(SETTINGS, lr=SETTINGS.peak / 100, clip=0.5)
    done = trained(slower, conditions=conditions)
    assert said == [f"going on with lr {SETTINGS.peak / 100:g} in place of {SETTINGS.peak:g}, clip 0.5 in place of 1"]
    assert [epoch.number for epoch in done.epochs] == [1, 2, 3, 4]
    whole = trained()
    assert done.epochs[1].loss == whole.epochs[1].loss
    assert done.epochs[3].loss != whole.epochs[3].loss
    trained(dataclasses.replace(SETTINGS, ema=0.5), conditions=conditions)
    assert said[1:] == ["what was kept is of other settings, data or versions: starting over"]


# Which epoch is kept ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "higher", "kept"),
    [
        (0.4, True, 2),
        (0.6, True, 2),  # no epoch loses against what it is as good as
        (0.7, True, 0),
        (0.1, False, 0),
        (0.2, False, 1),
        (float("nan"), True, 2),
        (None, True, 2),
    ],
)
def test_what_came_in_is_epoch_0(before: float | None, higher: bool, kept: int) -> None:
    settings = Settings(epochs=3, batch=16, ema=0.5)
    done = trained(settings, evaluation=scored(0.2, 0.6, 0.6, before=before, higher=higher))
    assert done.kept == kept
    assert bool(done.parameters) == (kept > 0)
    if not kept:
        assert {done.left[key] for key in ("w1", "b1", "w2", "b2")} == {"left as it came in: no epoch scores as well"}


def test_what_came_in_is_kept_where_no_epoch_has_a_score() -> None:
    nan = float("nan")
    assert trained(Settings(epochs=2), evaluation=scored(nan, nan, before=0.1)).kept == 0
    assert trained(Settings(epochs=2), evaluation=scored(nan, nan)).kept is None


def test_gradual_pruning_does_not_fall_back_to_what_is_not_pruned() -> None:
    settings = Settings(epochs=4, batch=16, sparsity=0.5, sparsity_until=0.5)
    done = trained(settings, evaluation=scored(0.1, 0.2, 0.3, 0.2, before=0.9))
    assert done.kept == 3
    assert np.mean(done.parameters["w1"]["w"] == 0) == pytest.approx(0.5, abs=1e-3)


# A loss that is no number -----------------------------------------------------------------------------------------


def exponential() -> Any:
    """x [n, 6] -> MatMul -> Exp -> (+ a mask with -inf) -> Softmax -> MatMul = z: large inputs overflow in Exp."""
    nodes = [
        node("MatMul", ["x", "w1"], ["h"], name="one"),
        node("Exp", ["h"], ["e"], name="exp"),
        node("Add", ["e", "mask"], ["m"], name="add"),
        node("Softmax", ["m"], ["s"], name="soft", axis=1),
        node("MatMul", ["s", "w2"], ["z"], name="two"),
    ]
    mask = np.array([0, 0, 0, 0, 0, 0, 0, -np.inf], np.float32)
    given = tensors(w1=np.abs(floats(6, 8, seed=1)), w2=floats(8, 4, seed=2), mask=mask)
    return model(graph(nodes, [info("x", ["n", 6])], [info("z", ["n", 4])], given))


def stopped(student: ir.Model, given: dict[str, np.ndarray], **others: Any) -> str:
    data = opened(student, given)
    with pytest.raises(PassError) as error:
        distill(None, student, data, settings=Settings(epochs=2, batch=16, **others))
    return str(error.value)


def test_the_tensor_that_became_infinite_is_named() -> None:
    given = arrays(64)
    given["x"] = np.abs(given["x"])
    given["x"][20] = 1000
    step = next(u for u in range(4) if 20 in Order(64, 16, 0).samples(u)) + 1
    assert stopped(load(exponential()), given) == (
        f"step {step} (epoch 1): the loss is nan, first in tensor 'e' (Exp 'exp'); a lower --lr may help"
    )


def test_the_sample_whose_label_is_no_number_is_named() -> None:
    x = floats(64, 6)
    y = floats(64, 4)
    y[33, 2] = -np.inf
    student = load(mlp())
    with pytest.raises(DataError, match="the label of sample 33 holds -inf: mend it, or leave the sample out"):
        distill(None, student, opened(student, {"x": x, "y": y}))


def test_a_weight_whose_gradient_is_no_number_is_named() -> None:
    """A slope of 1e76 is none that float32 holds: times an input of zero it is no number, while the loss is one."""
    nodes = [
        node("MatMul", ["x", "w1"], ["h"], name="one"),
        node("Mul", ["h", "large"], ["r"], name="steep"),
        node("Mul", ["r", "large"], ["s"], name="steeper"),
        node("MatMul", ["s", "w2"], ["z"], name="two"),
    ]
    given = tensors(w1=floats(6, 8, seed=1), w2=floats(8, 4, seed=2), large=np.full(8, 1e38, np.float32))
    student = load(model(graph(nodes, [info("x", ["n", 6])], [info("z", ["n", 4])], given)))
    assert stopped(student, {**arrays(64), "x": np.zeros((64, 6), np.float32)}) == (
        "step 1 (epoch 1): the gradient's norm is nan, first in the gradient of 'w1'; a lower --lr may help"
    )


def test_the_weight_whose_gradient_is_too_large_is_named() -> None:
    told = stopped(load(mlp()), {"x": np.full((64, 6), 1e30, np.float32), "y": np.arange(64) % 4})
    assert told == (
        "step 1 (epoch 1): the gradient's norm is inf, most of it in the gradient of 'w2'; a lower --lr may help"
    )


def test_a_teacher_that_gives_no_number_is_named(tmp_path: pathlib.Path) -> None:
    x = np.abs(floats(64, 6))
    x[50] = 1000
    teacher, student = load(exponential()), load(mlp())
    with pytest.raises(PassError, match=r"the teacher gives no number: sample 50 holds nan in its output 'z'$"):
        distill(teacher, student, opened(student, {"x": x}), settings=Settings(epochs=1, batch=16))


def test_an_earlier_checkpoint_outlives_weights_that_are_not_finite(tmp_path: pathlib.Path, monkeypatch: Any) -> None:
    """Where the update itself overflowed, the state after it is not a good one."""
    student, given = load(mlp()), arrays(64)
    monkeypatch.setattr(loop, "SAVED_EVERY", 0.0)
    keep, count = loop.Loop._keep, 0

    def spoiled(self: loop.Loop) -> None:
        nonlocal count
        count += 1
        keep(self)
        if count == 2:
            leaf = self._graph.leaves[0]
            self._runner.write({leaf.name: np.full_like(leaf.initial, np.inf)})

    monkeypatch.setattr(loop.Loop, "_keep", spoiled)
    conditions = Conditions(work=tmp_path)
    with pytest.raises(PassError, match=r"step 3 \(epoch 1\): the loss is nan, first in the weight 'w1'"):
        distill(None, student, opened(student, given), settings=Settings(epochs=2, batch=16), conditions=conditions)
    with np.load(tmp_path / "training.npz") as kept:
        assert all(np.isfinite(kept[name]).all() for name in kept.files if name.startswith("state:"))


def test_no_state_is_said_to_be_kept_where_none_was_good(tmp_path: pathlib.Path, monkeypatch: Any) -> None:
    update = loop.Loop._update

    def spoiled(self: loop.Loop, epoch: int, chosen: Any) -> None:
        leaf = self._graph.leaves[0]
        self._runner.write({leaf.name: np.full_like(leaf.initial, np.inf)})
        update(self, epoch, chosen)

    monkeypatch.setattr(loop.Loop, "_update", spoiled)
    words = r"^step 1 \(epoch 1\): the loss is nan, first in the weight 'w1'; a lower --lr may help$"
    with pytest.raises(PassError, match=words):
        trained(conditions=Conditions(work=tmp_path))
    assert list(tmp_path.iterdir()) == []


# The file ---------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_not_built_in_memory(tmp_path: pathlib.Path) -> None:
    state = {f"state/{i}": np.zeros(8 << 18, np.float32) for i in range(8)}  # 8 x 8 MiB
    checkpoints = Checkpoints(tmp_path, "this")
    tracemalloc.start()
    try:
        checkpoints.save(Checkpoint(3, state, history=[Epoch(1, 0.5, 2.0, None, 4)], sums=(0.25, 2, 1.5)))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 24 << 20  # numpy writes in pieces of 16 MiB
    found = checkpoints.load()
    assert found is not None
    assert found.state.keys() == state.keys()
    assert (found.step, found.sums, found.history) == (3, (0.25, 2, 1.5), [Epoch(1, 0.5, 2.0, None, 4)])
    assert Checkpoints(tmp_path, "other").load() is None
