"""Distillation end to end: heads, targets, labels, healing, resume, and what is refused."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxcompress.encodings import Masked
from onnxcompress.errors import DataError, ModelError, PassError
from onnxcompress.model import bridge
from onnxcompress.model.load import load
from onnxcompress.model.weights import weights
from onnxcompress.training import heads, loop
from onnxcompress.training.distill import Conditions, Evaluation, Settings, Trained, distill, write
from onnxcompress.training.targets import Objective
from tests.builders import floats, graph, info, model, node, tensors
from tests.training.small import arrays, mlp, opened, outputs

ROOT = pathlib.Path(__file__).parents[2]


def pruned(of: ir.Model, share: float) -> ir.Model:
    """The least weights of every matrix become structure."""
    copy = bridge.clone(of)
    for weight in weights(copy):
        if len(weight.shape) > 1:
            array = weight.array()
            weight.replace(Masked.apply(array, np.abs(array) > np.quantile(np.abs(array), share)))
    return copy


def healed(student: ir.Model, done: Trained) -> ir.Model:
    copy = bridge.clone(student)
    write(copy, done.parameters)
    return copy


@pytest.mark.parametrize(
    ("head", "kind"), [("Softmax", "classes"), ("LogSoftmax", "classes"), ("Sigmoid", "binary"), ("", "values")]
)
def test_logits_are_found_behind_the_output(head: str, kind: str) -> None:
    (found,) = heads.heads(load(mlp(head)))
    assert (found.output, found.logits, found.kind) == ("y" if head else "z", "z", kind)


def test_label_and_scores_are_one_head() -> None:
    nodes = [
        node("Gemm", ["x", "w"], ["z"]),
        node("ArgMax", ["z"], ["label"], axis=1),
        node("Softmax", ["z"], ["scores"], axis=1),
    ]
    declared = [info("label", ["n", 1], onnx.TensorProto.INT64), info("scores", ["n", 3])]
    of = load(model(graph(nodes, [info("x", ["n", 2])], declared, tensors(w=floats(2, 3)))))
    assert [(h.logits, h.kind, h.axis) for h in heads.heads(of)] == [("z", "classes", 1)]


@pytest.mark.parametrize("head", ["", "Softmax", "Sigmoid"])
@pytest.mark.parametrize("labelled", [True, False])
def test_a_pruned_student_comes_back_and_keeps_its_zeros(head: str, labelled: bool) -> None:
    teacher = load(mlp(head))
    student = pruned(teacher, 0.6)
    given = arrays(256)
    if not labelled or head == "Sigmoid":
        given = {"x": given["x"]}
    done = distill(teacher, student, opened(student, given), settings=Settings(epochs=15, batch=16))
    new = healed(student, done)
    name = "y" if head else "z"
    truth, cut, now = (outputs(m, {"x": given["x"]})[name] for m in (teacher, student, new))
    if labelled:
        agree = [(o.argmax(1) == truth.argmax(1)).mean() for o in (cut, now)]
        assert agree[1] > agree[0] - 0.05
    else:
        assert np.abs(now - truth).mean() < 0.4 * np.abs(cut - truth).mean()
    for before, after in zip(weights(student), weights(new), strict=True):
        assert after.encoding.kind == before.encoding.kind
        if before.encoding.kind == "masked":
            np.testing.assert_array_equal(after.array()[before.array() == 0], 0)


def test_labels_alone_train() -> None:
    student = load(mlp())
    given = arrays(256)
    done = distill(None, student, opened(student, given), settings=Settings(epochs=30, lr=1e-2))
    new = healed(student, done)
    before, after = ((outputs(m, {"x": given["x"]})["z"].argmax(1) == given["y"]).mean() for m in (student, new))
    assert before < 0.5
    assert after > 0.9
    assert done.losses == {"z": "1 x cross-entropy"}


def test_a_fixed_batch_is_trained_by_accumulation() -> None:
    free, fixed = load(mlp()), load(mlp(batch=4))
    student_free, student_fixed = pruned(free, 0.5), pruned(fixed, 0.5)
    given = arrays(64)
    settings = Settings(epochs=2, batch=16)
    a = distill(free, student_free, opened(student_free, given), settings=settings)
    b = distill(fixed, student_fixed, opened(student_fixed, given, 4), settings=settings)
    assert a.steps == b.steps == 8
    for key, parts in a.parameters.items():
        np.testing.assert_allclose(b.parameters[key]["w"], parts["w"], atol=1e-4)


class _Killed(Exception):
    """What stands in for a kill."""


def test_a_resume_with_other_settings_says_that_it_starts_over(tmp_path: pathlib.Path) -> None:
    teacher = load(mlp())
    student, given = pruned(teacher, 0.5), arrays(32)
    said: list[str] = []
    for warmup, resume in ((0.01, False), (0.02, True)):
        conditions = Conditions(work=tmp_path, resume=resume, say=said.append)
        settings = Settings(epochs=2, batch=16, warmup=warmup)
        distill(teacher, student, opened(student, given), settings=settings, conditions=conditions)
    assert said == ["what was kept is of other settings, data or versions: starting over"]


def test_an_interrupted_training_resumes_to_the_same_bytes(tmp_path: pathlib.Path, monkeypatch: Any) -> None:
    teacher = load(mlp())
    student, given = pruned(teacher, 0.5), arrays(64)
    settings = Settings(epochs=3, batch=16)
    whole = distill(teacher, student, opened(student, given), settings=settings)
    monkeypatch.setattr(loop, "SAVED_EVERY", 0.0)
    update, count = loop.Loop._update, 0

    def killed(self: loop.Loop, epoch: int, chosen: Any) -> None:
        nonlocal count
        count += 1
        if count == 8:
            raise _Killed
        update(self, epoch, chosen)

    monkeypatch.setattr(loop.Loop, "_update", killed)
    with pytest.raises(_Killed):
        distill(teacher, student, opened(student, given), settings=settings, conditions=Conditions(work=tmp_path))
    conditions = Conditions(work=tmp_path, resume=True)
    resumed = distill(teacher, student, opened(student, given), settings=settings, conditions=conditions)
    assert count == 8 + 12 - 7  # seven steps were done and kept
    for key, parts in whole.parameters.items():
        assert resumed.parameters[key]["w"].tobytes() == parts["w"].tobytes()


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_state(tmp_path: pathlib.Path) -> None:
    teacher = load(mlp())
    student, given = pruned(teacher, 0.5), arrays(64)
    given["x"][40] = np.inf
    words = (
        r"^step \d \(epoch 1\): the loss is (nan|inf), first in tensor 'h' \(Gemm 'one'\); the last good state is kept "
        r"in \S+training.npz; the data holds values that are not finite: sample 40 holds inf in the input 'x'$"
    )
    with pytest.raises(PassError, match=words):
        distill(None, student, opened(student, given), settings=Settings(), conditions=Conditions(work=tmp_path))
    with np.load(tmp_path / "training.npz") as kept:
        assert all(np.isfinite(kept[name]).all() for name in kept.files if name.startswith("state:"))


def test_the_best_epoch_is_kept() -> None:
    student = load(mlp())
    scores = iter([0.3, 0.9, 0.5, 0.4])
    seen: list[np.ndarray] = []

    def score(candidate: ir.Model) -> float:
        seen.append(np.array(next(w for w in weights(candidate) if w.key == "w1").array()))
        return next(scores)

    data = opened(student, arrays(64))
    done = distill(None, student, data, settings=Settings(epochs=9, patience=2), evaluation=Evaluation(score))
    assert len(seen) == 4
    assert done.steps == 4 * 2  # of the epochs that ran
    np.testing.assert_array_equal(done.parameters["w1"]["w"], seen[1])


def test_a_score_that_is_no_number_is_never_the_best() -> None:
    """Read back from a checkpoint it would not even equal itself."""
    student, scores = load(mlp()), iter([float("nan"), 0.3, float("nan"), 0.2])
    settings = Settings(epochs=9, patience=2)
    done = distill(
        None,
        student,
        opened(student, arrays(64)),
        settings=settings,
        evaluation=Evaluation(lambda candidate: next(scores)),
    )
    assert len(done.epochs) == 4
    scores = iter([float("nan")] * 3)
    whole = Settings(epochs=3, patience=1)
    done = distill(
        None, student, opened(student, arrays(64)), settings=whole, evaluation=Evaluation(lambda c: next(scores))
    )
    assert len(done.epochs) == 3


def test_soft_targets_follow_the_scale_of_the_logits() -> None:
    wide = np.random.default_rng(0).normal(size=(50, 10)).astype(np.float32)
    assert Objective().temperature_for(wide, 1) == 2
    assert Objective().temperature_for(wide * 1000, 1) == pytest.approx(950, rel=0.1)
    assert Objective(temperature=3).temperature_for(wide * 1000, 1) == 3
    assert Objective().temperature_for(wide * np.float32(1e30), 1) == 1e6  # T^2 stays within single precision


def test_what_does_not_fit_is_refused() -> None:
    teacher = load(mlp())
    student = pruned(teacher, 0.5)
    wrong = arrays(64) | {"y": np.full(64, 7)}
    with pytest.raises(DataError, match="label 7 of sample 0 is out of range: output 'z' has classes 0 to 3"):
        distill(teacher, student, opened(student, wrong))
    other = model(graph([node("Gemm", ["x", "w"], ["z"])], [info("x", ["n", 6])], [info("z", ["n", 5])],
                        tensors(w=floats(6, 5))))  # fmt: skip
    with pytest.raises(ModelError, match="they do not fit"):
        distill(load(other), student, opened(student, arrays(64)))
    with pytest.raises(DataError, match="training without a teacher needs labels"):
        distill(None, student, opened(student, {"x": floats(64, 6)}))
    with pytest.raises(ModelError, match="--output nope: has no such output, only z"):
        distill(teacher, student, opened(student, arrays(64)), settings=Settings(outputs=("nope",)))
