"""Learned scales against the formula of Esser et al., and what they are good for."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress.encodings import Affine, Encoding
from onnxcompress.model.load import load
from onnxcompress.model.weights import weights
from onnxcompress.training import step
from onnxcompress.training.distill import Settings, distill, write
from onnxcompress.training.optimizers import SGD
from onnxcompress.training.runner import Runner
from onnxcompress.training.scales import gradient_scale
from tests.builders import floats
from tests.training.small import arrays, mlp, opened
from tests.training.test_step import FEEDS, cross_entropy, feeds, numpy_step

W = floats(6, 200, seed=1) * 0.4


def quantized(encoding: Encoding) -> ir.Model:
    of = load(mlp())
    next(w for w in weights(of) if w.key == "w1").replace(encoding)
    return of


def rounded(scale: np.ndarray) -> Affine:
    levels = np.clip(np.rint(W / scale) + 3, -128, 127).astype(np.int8)
    axis = 1 if scale.size > 1 else None
    return Affine(levels, scale, np.full(scale.shape, 3, np.int8), axis)


@pytest.mark.parametrize("scale", [np.array(0.006, np.float32), np.linspace(0.004, 0.02, 200, dtype=np.float32)])
def test_the_gradient_of_a_scale_is_that_of_the_paper(scale: np.ndarray) -> None:
    encoding, lr = rounded(scale), 0.1
    of = step.forward(quantized(encoding), [FEEDS])
    graph = step.build(of, ["z"], cross_entropy, SGD(momentum=0), clip=None, learn_scales=True)
    with Runner(graph) as runner:
        runner.step([feeds()], lr, 1)  # leaves the weights between two levels
        before = graph.trained(graph.values(runner.read()))
        runner.step([feeds()], lr, 2)
        after = graph.trained(graph.values(runner.read()))
    w, s = (before["w1"][part].astype(np.float64) for part in ("w", "scale"))
    level = w / s
    q = np.clip(np.rint(level) + 3, -128, 127) - 3
    others = {key: parts["w"].astype(np.float64) for key, parts in before.items() if key != "w1"}
    _, g = numpy_step({**others, "w1": q * s})
    inside = (level + 3 >= -128.5) & (level + 3 <= 127.5)
    assert 0 < (~inside).sum() < inside.sum()
    each = g["w1"] * np.where(inside, q - level, q)
    wanted = (each.sum(0) if s.ndim else each.sum()) / np.sqrt(each.size / s.size * 127)
    assert np.abs(wanted).max() > 1e-6
    np.testing.assert_allclose(s - after["w1"]["scale"], lr * wanted, atol=2e-7)


def test_a_scale_that_is_too_wide_is_learned() -> None:
    scale = np.array(0.6, np.float32)  # five levels are used
    student = quantized(Affine(np.rint(W / scale).astype(np.int8), scale))
    teacher = load(mlp())
    losses, ends = {}, {}
    for learned in (False, True):
        settings = Settings(epochs=60, batch=16, lr=5e-3, learn_scales=learned)
        done = distill(teacher, student, opened(student, {"x": arrays(128)["x"]}), settings=settings)
        losses[learned], ends[learned] = done.epochs[-1].loss, done
    assert losses[True] < 0.5 * losses[False]
    assert "scale" not in ends[False].parameters["w1"]
    write(student, ends[True].parameters)
    found = next(w for w in weights(student) if w.key == "w1").encoding
    assert isinstance(found, Affine)
    assert 0.1 < float(found.scale) < 0.5


def test_what_has_no_learned_scale() -> None:
    scale = np.array(0.01, np.float32)
    assert gradient_scale(Affine(np.ones(5, np.int32), scale)) is None
    assert gradient_scale(Affine(np.ones((4, 6), np.int8), np.ones((2, 6), np.float32), None, 0, 3)) is None
    assert gradient_scale(Affine(np.ones((4, 6), np.int8), np.ones((2, 6), np.float32), None, 0, 2)) == pytest.approx(
        1 / np.sqrt(2 * 127)
    )


def test_one_zero_point_for_scales_of_many_channels() -> None:
    """As dynamic quantization stores recurrent weights and those of convolutions."""
    scale = np.linspace(0.004, 0.02, 200, dtype=np.float32)
    levels = np.clip(np.rint(W / scale) + 3, -128, 127).astype(np.int8)
    student = quantized(Affine(levels, scale, np.array(3, np.int8), 1, form="folded"))
    done = distill(load(mlp()), student, opened(student, {"x": arrays(64)["x"]}), settings=Settings(epochs=1, batch=16))
    before = next(weight.array() for weight in weights(student) if weight.key == "w1")
    write(student, done.parameters)
    (after,) = (weight for weight in weights(student) if weight.key == "w1")
    assert isinstance(after.encoding, Affine)
    assert after.encoding.form == "folded"
    np.testing.assert_array_equal(after.encoding.scale, scale)
    assert np.any(after.array() != before)
