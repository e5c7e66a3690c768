"""Coarse levels are trained with smaller steps."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress.encodings import Affine, Dense
from onnxcompress.model.load import load
from onnxcompress.model.weights import weights
from onnxcompress.training import levels, step
from onnxcompress.training.distill import Settings, distill, write
from onnxcompress.training.levels import step_factor
from onnxcompress.training.optimizers import AdamW
from onnxcompress.training.targets import Objective
from tests.builders import floats
from tests.training.small import arrays, mlp, opened, outputs
from tests.training.test_step import FEEDS, cross_entropy

W = floats(6, 200, seed=1) * 0.4


def rounded(dtype: type, most: int, axis: int | None = None) -> Affine:
    scale = np.abs(W).max(axis=None if axis is None else 1 - axis) / most
    q = np.rint(W / scale).astype(np.int8).astype(dtype)
    return Affine(q, np.asarray(scale, np.float32), None, axis)


def test_the_factor_is_that_of_the_levels() -> None:
    four = rounded(ml_dtypes.int4, 7)
    rms = np.sqrt(np.mean(four.decode()[four.decode() != 0].astype(np.float64) ** 2))
    assert step_factor(four) == pytest.approx(0.05 * rms / float(four.scale), rel=1e-6)
    assert 0.05 < step_factor(four) < 0.2
    assert step_factor(rounded(ml_dtypes.int4, 7, axis=1)) > step_factor(four)  # channels have finer levels
    assert step_factor(rounded(np.int8, 127)) == 1
    assert step_factor(Dense(W)) == 1
    assert step_factor(Affine(np.ones(9, np.int32), np.ones((), np.float32))) == 1  # a bias, which is not rounded
    assert step_factor(rounded(np.int8, 3)) == 1  # a scale that is too wide, not too few levels
    assert step_factor(Affine(np.zeros((3, 3), ml_dtypes.int4), np.ones((), np.float32))) == 1


def student() -> ir.Model:
    of = load(mlp())
    of.opset_imports[""], of.ir_version = 21, 10
    next(w for w in weights(of) if w.key == "w1").replace(rounded(ml_dtypes.int4, 7))
    return of


def test_steps_of_a_weight_are_smaller_and_those_of_its_bias_are_not() -> None:
    graph = step.build(step.forward(student(), [FEEDS]), ["z"], cross_entropy, AdamW(), relative=True)
    relative = {leaf.name: leaf.relative for leaf in graph.leaves}
    whole = {leaf.name: leaf for leaf in graph.leaves}["parameter/w1/w"]
    assert relative["parameter/w1/w"] == pytest.approx(4 * step_factor(rounded(ml_dtypes.int4, 7)))  # 4: the most
    assert whole.levels < 0.2
    assert relative["parameter/b1/w"] == 1


def test_a_student_of_4_bits_ends_nearer_to_its_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, data = load(mlp()), {"x": arrays(128)["x"]}
    wanted, errors = outputs(teacher, data)["z"], []
    for fine in (levels.FINE, np.inf):
        monkeypatch.setattr(levels, "FINE", fine)
        of = student()
        settings = Settings(epochs=40, batch=16, lr=3e-3)
        done = distill(teacher, of, opened(of, data), settings=settings, objective=Objective(loss="values"))
        write(of, done.parameters)
        errors.append(float(np.sqrt(np.mean((outputs(of, data)["z"] - wanted) ** 2))))
    assert errors[0] < 0.7 * errors[1]
    assert errors[0] < 0.7 * float(np.sqrt(np.mean((outputs(student(), data)["z"] - wanted) ** 2)))
