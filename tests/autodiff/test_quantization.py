"""The straight-through gradient: exact where rounding is seen as nothing and saturation as a wall."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from onnx import helper

from tests.autodiff.cases import floats, ints
from tests.autodiff.checking import check, gradient_model, model_of, relative, session


@pytest.mark.parametrize("kind", [np.int8, np.uint8])
@pytest.mark.parametrize("channels", [False, True])
def test_fake_quantization(kind: Any, channels: bool) -> None:
    """dx = [inside], ds = (q - z) - [inside] x/s, as with learned step sizes; a Reshape of integers lies between."""
    x = floats(3, 4)
    scale = floats(4, low=0.006, high=0.012) if channels else np.array(0.007, np.float32)
    zero = np.full(scale.shape, 3 if channels else 100 if kind == np.uint8 else -20, kind)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], axis=1),
        helper.make_node("Reshape", ["q", "shape"], ["moved"]),
        helper.make_node("DequantizeLinear", ["moved", "s", "z"], ["y"], axis=1),
    ]
    model = model_of(nodes, {"x": x, "s": scale}, constants={"z": zero, "shape": ints(3, 4)})
    seed = floats(3, 4, low=0.5, seed=1)
    built, names = gradient_model(model, {"y": seed}, ["x", "s"])
    dx, ds = session(built).run([names["x"], names["s"]], {"x": x, "s": scale, "seed/y": seed})
    limits = np.iinfo(kind)
    steps = x.astype(np.float64) / scale
    inside = (steps + zero >= limits.min - 0.5) & (steps + zero <= limits.max + 0.5)
    assert 0 < inside.sum() < inside.size  # the test sees both
    q = np.clip(np.rint(steps) + zero, limits.min, limits.max)
    expected = seed * ((q - zero) - np.where(inside, steps, 0))
    assert relative(dx, seed * inside) < 1e-6
    assert relative(ds, expected.sum(0) if channels else np.asarray(expected.sum())) < 2e-5  # differences of near steps


@pytest.mark.parametrize(
    ("scale", "attributes"),
    [(floats(), {}), (floats(4), {"axis": 1}), (floats(3, 4), {"axis": 0, "block_size": 2})],
    ids=["tensor", "channels", "blocks"],
)
def test_scales_of_integer_weights(scale: np.ndarray, attributes: dict[str, Any]) -> None:
    q = np.random.default_rng(0).integers(0, 15, (6, 4)).astype(np.uint8)
    node = helper.make_node("DequantizeLinear", ["q", "s"], ["y"], **attributes)
    check(model_of([node], {"s": scale}, opset=21, constants={"q": q}), {"s": scale})


def test_what_is_quantized_at_run_time() -> None:
    """dx = 1 everywhere: the whole range is inside, and the scale is taken as given, though it depends on x."""
    x, seed = floats(3, 4, low=-2.0), floats(3, 4, low=0.5, seed=1)
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    built, names = gradient_model(model_of(nodes, {"x": x}), {"y": seed}, ["x"])
    (dx,) = session(built).run([names["x"]], {"x": x, "seed/y": seed})
    assert relative(dx, seed) < 1e-6


def test_four_bits_in_blocks_with_zero_points() -> None:
    """ONNX Runtime 1.32 has no kernel that moves 4-bit integers: zero points are numbers before they are spread."""
    x, seed = floats(6, 4), floats(6, 4, low=0.5, seed=1)
    scale, zero = floats(3, 4, low=0.05, high=0.2), np.full((3, 4), 7).astype(ml_dtypes.uint4)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], axis=0, block_size=2),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], axis=0, block_size=2),
    ]
    built, names = gradient_model(
        model_of(nodes, {"x": x, "s": scale}, opset=21, constants={"z": zero}), {"y": seed}, ["x", "s"]
    )
    dx, ds = session(built).run([names["x"], names["s"]], {"x": x, "s": scale, "seed/y": seed})
    steps = x.astype(np.float64) / np.repeat(scale, 2, 0)
    inside = (steps + 7 >= -0.5) & (steps + 7 <= 15.5)
    assert 0 < inside.sum() < inside.size
    each = seed * (np.clip(np.rint(steps) + 7, 0, 15) - 7 - np.where(inside, steps, 0))
    assert relative(dx, seed * inside) < 1e-6
    assert relative(ds, each.reshape(3, 2, 4).sum(1)) < 2e-5
