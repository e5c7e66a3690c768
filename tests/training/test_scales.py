"""Learned scales against the formula of Esser et al., and what they are good for."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from onnxcompress.contract import Select
from onnxcompress.encodings import Affine, Encoding
from onnxcompress.model.load import load
from onnxcompress.model.weights import weights
from onnxcompress.runtime.session import open_session
from onnxcompress.training import step
from onnxcompress.training.distill import Settings, distill, write
from onnxcompress.training.optimizers import SGD
from onnxcompress.training.runner import Runner
from onnxcompress.training.scales import gradient_scale
from tests.builders import floats, graph, info, model, node
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
    scale = np.array(2.5, np.float32)  # beside a standard deviation of 0.4: hardly a weight is more than zero
    student = quantized(Affine(np.rint(W / scale).astype(np.int8), scale))
    teacher = load(mlp())
    losses, ends = {}, {}
    for learned in (False, True):
        settings = Settings(epochs=60, batch=16, lr=5e-3, learn_scales=learned, keep_zeros="never")
        done = distill(teacher, student, opened(student, {"x": arrays(128)["x"]}), settings=settings)
        losses[learned], ends[learned] = done.epochs[-1].loss, done
    assert losses[True] < 0.5 * losses[False]
    assert "scale" not in ends[False].parameters["w1"]
    write(student, ends[True].parameters)
    found = next(w for w in weights(student) if w.key == "w1").encoding
    assert isinstance(found, Affine)
    assert 0.02 < float(found.scale) < 0.5


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


def integer_layers() -> onnx.ModelProto:
    """x [n, 6] -> Gemm -> Relu -> Gemm = z, all of it between QuantizeLinear and DequantizeLinear, biases in int32."""
    plain = {t.name: numpy_helper.to_array(t) for t in mlp().graph.initializer}
    nodes: list[onnx.NodeProto] = []
    given: dict[str, np.ndarray] = {}
    x = "x"
    for name, x_scale, y in (("1", 0.03, "h"), ("2", 0.02, "z")):
        w, b = plain[f"w{name}"], plain[f"b{name}"]
        scale = (np.abs(w).max(0) / 127).astype(np.float32)
        given |= {
            f"x{name}_scale": np.array(x_scale, np.float32),
            f"x{name}_zero": np.array(128 if name == "1" else 0, np.uint8),
            f"w{name}.q": np.rint(w / scale).astype(np.int8),
            f"w{name}.scale": scale,
            f"w{name}.zero_point": np.zeros(scale.shape, np.int8),
            f"b{name}.q": np.rint(b / (scale * np.float32(x_scale))).astype(np.int32),
            f"b{name}.scale": (scale * np.float32(x_scale)).astype(np.float32),
        }
        nodes += [
            node("QuantizeLinear", [x, f"x{name}_scale", f"x{name}_zero"], [f"x{name}_q"], name=f"quantize{name}"),
            node("DequantizeLinear", [f"x{name}_q", f"x{name}_scale", f"x{name}_zero"], [f"x{name}"], name=f"d{name}"),
            node("DequantizeLinear", [f"w{name}.q", f"w{name}.scale", f"w{name}.zero_point"], [f"w{name}"], axis=1),
            node("DequantizeLinear", [f"b{name}.q", f"b{name}.scale"], [f"b{name}"], axis=0),
            node("Gemm", [f"x{name}", f"w{name}", f"b{name}"], [y], name=f"gemm{name}"),
        ]
        if name == "1":
            nodes.append(node("Relu", [y], ["r"], name="relu"))
            x = "r"
    inputs, results = [info("x", ["n", 6])], [info("z", ["n", 4])]
    held = [numpy_helper.from_array(array, name) for name, array in given.items()]
    return model(graph(nodes, inputs, results, held))


@pytest.mark.parametrize("biases", [True, False])
def test_biases_in_integers_follow_learned_scales(biases: bool) -> None:
    """ONNX Runtime 1.32 makes a QGemm of it and takes x_scale * w_scale for the bias's scale, whatever that is."""
    student = load(integer_layers())
    select = Select() if biases else Select(exclude=("b1", "b2"))
    settings = Settings(epochs=10, batch=16, lr=2e-2, learn_scales=True, select=select)
    done = distill(load(mlp()), student, opened(student, arrays(64)), settings=settings)
    assert ("b1" in done.parameters) == biases
    before = {weight.key: weight.encoding for weight in weights(student)}
    write(student, done.parameters)
    after = {weight.key: weight.encoding for weight in weights(student)}
    for number, x_scale in (("1", 0.03), ("2", 0.02)):
        w, b, old = after[f"w{number}"], after[f"b{number}"], before[f"b{number}"]
        assert isinstance(w, Affine)
        assert isinstance(b, Affine)
        assert isinstance(old, Affine)
        assert np.abs(b.scale / old.scale - 1).max() > 0.01
        np.testing.assert_allclose(b.scale, w.scale * x_scale, rtol=1e-6)
        wanted = done.parameters[f"b{number}"]["w"] if biases else old.decode()
        assert np.all(np.abs(b.decode() - wanted) <= 0.501 * b.scale)
    feeds_ = {"x": arrays(32)["x"]}
    with open_session(student, optimize=False) as plain, open_session(student) as fused:
        np.testing.assert_allclose(fused.run(feeds_)["z"], plain.run(feeds_)["z"], atol=0.02)
