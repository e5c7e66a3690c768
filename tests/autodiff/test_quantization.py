"""The straight-through gradient: exact where rounding is seen as nothing and saturation as a wall."""

from __future__ import annotations

from typing import Any

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
