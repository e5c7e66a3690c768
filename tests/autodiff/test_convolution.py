"""Convolutions, poolings and Resize, over strides, dilations, groups and every way to pad."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from onnxcompress.autodiff.rules import convolution
from tests.autodiff.cases import Case, floats, ints

CONV: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ((2, 3, 5, 6), (4, 3, 3, 3), {}),
    ((2, 3, 5, 6), (4, 3, 3, 3), {"pads": [1, 1, 1, 1]}),
    ((2, 3, 6, 7), (4, 3, 3, 2), {"strides": [2, 2], "pads": [1, 0, 0, 1]}),
    ((2, 3, 7, 8), (4, 3, 1, 1), {}),
    ((2, 3, 7, 8), (4, 3, 1, 1), {"strides": [2, 2]}),
    ((2, 4, 6, 6), (6, 2, 3, 3), {"group": 2, "pads": [1, 1, 1, 1]}),
    ((2, 4, 6, 6), (4, 1, 3, 3), {"group": 4, "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    ((2, 4, 6, 6), (8, 1, 3, 3), {"group": 4, "pads": [1, 1, 1, 1]}),
    ((2, 3, 9, 8), (4, 3, 3, 3), {"dilations": [2, 2]}),
    ((2, 3, 9, 8), (4, 3, 3, 3), {"strides": [3, 2], "dilations": [2, 1]}),
    ((2, 3, 6, 7), (4, 3, 3, 3), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    ((2, 3, 6, 7), (4, 3, 2, 3), {"auto_pad": "SAME_LOWER"}),
    ((2, 3, 6, 7), (4, 3, 2, 3), {"auto_pad": "VALID"}),
    ((2, 3, 9), (4, 3, 3), {"strides": [2], "pads": [1, 1]}),
    ((1, 2, 4, 5, 4), (3, 2, 2, 3, 2), {"pads": [0, 1, 0, 1, 1, 1]}),
]
TRANSPOSED: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ((2, 3, 4, 5), (3, 4, 3, 3), {}),
    ((2, 3, 4, 5), (3, 4, 3, 3), {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]}),
    ((2, 4, 4, 5), (4, 2, 2, 3), {"group": 2, "strides": [2, 3]}),
    ((2, 3, 4, 5), (3, 4, 3, 3), {"dilations": [2, 1]}),
    ((2, 3, 4, 5), (3, 4, 3, 3), {"strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    ((2, 3, 6), (3, 2, 3), {"strides": [2]}),
]
WINDOWS: list[dict[str, Any]] = [
    {"kernel_shape": [2, 2], "strides": [2, 2]},
    {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]},
    {"kernel_shape": [3, 2], "strides": [2, 2], "ceil_mode": 1},
    {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 0, 1, 1], "ceil_mode": 1},
    {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_UPPER"},
    {"kernel_shape": [2, 3], "auto_pad": "SAME_LOWER"},
    {"kernel_shape": [2, 2], "dilations": [2, 2]},
    {"kernel_shape": [2, 3]},
]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("x", "w", "attributes"), CONV, ids=str)
@pytest.mark.parametrize("form", [convolution.by_taps, convolution.by_convolution], ids=lambda f: f.__name__)
def test_conv(
    monkeypatch: pytest.MonkeyPatch, form: Any, x: tuple[int, ...], w: tuple[int, ...], attributes: Any, dynamic: bool
) -> None:
    """Both formulations of the weight gradient; the kernel's size is given, for the weights are free as well."""
    monkeypatch.setattr(convolution, "weight_gradient", form)
    feeds = {"x": floats(*x), "w": floats(*w, seed=1), "b": floats(w[0], seed=2)}
    Case("Conv", feeds, {**attributes, "kernel_shape": list(w[2:])}).check(dynamic)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("x", "w", "attributes"), TRANSPOSED, ids=str)
def test_conv_transpose(x: tuple[int, ...], w: tuple[int, ...], attributes: Any, dynamic: bool) -> None:
    channels = w[1] * attributes.get("group", 1)
    feeds = {"x": floats(*x), "w": floats(*w, seed=1), "b": floats(channels, seed=2)}
    Case("ConvTranspose", feeds, {**attributes, "kernel_shape": list(w[2:])}).check(dynamic)


def test_conv_transpose_to_a_given_size() -> None:
    feeds = {"x": floats(2, 3, 4, 5), "w": floats(3, 4, 3, 3)}
    Case("ConvTranspose", feeds, {"strides": [2, 2], "output_shape": [9, 11]}).check()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("attributes", WINDOWS, ids=str)
def test_pools(attributes: dict[str, Any], dynamic: bool) -> None:
    x = {"x": floats(2, 2, 6, 7)}
    Case("MaxPool", x, attributes).check(dynamic)
    Case("AveragePool", x, attributes, opset=19).check(dynamic)
    Case("AveragePool", x, {**attributes, "count_include_pad": 1}, opset=19).check(dynamic)
    if "ceil_mode" not in attributes:
        Case("LpPool", x, {**attributes, "p": 3}).check(dynamic)


@pytest.mark.parametrize("dynamic", [False, True])
def test_pools_of_other_ranks(dynamic: bool) -> None:
    Case("MaxPool", {"x": floats(2, 2, 9)}, {"kernel_shape": [3], "strides": [2]}).check(dynamic)
    Case("AveragePool", {"x": floats(1, 2, 4, 5, 4)}, {"kernel_shape": [2, 2, 2], "strides": [2, 1, 2]}).check(dynamic)
    for op in ("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"):
        Case(op, {"x": floats(2, 3, 4, 3)}).check(dynamic)


def test_max_unpool() -> None:
    places = np.array([[[[5, 7], [13, 15]]]], np.int64)
    Case("MaxUnpool", {"x": floats(1, 1, 2, 2)}, {"kernel_shape": [2, 2], "strides": [2, 2]}, {"i": places}).check()


MODES = [(m, t) for m in ("nearest", "linear", "cubic") for t in ("half_pixel", "asymmetric", "align_corners")]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("mode", "transformation"), MODES)
def test_resize(mode: str, transformation: str, dynamic: bool) -> None:
    attributes = {"mode": mode, "coordinate_transformation_mode": transformation}
    x, scales, sizes = {"x": floats(1, 2, 3, 4)}, np.array([1, 1, 2, 1.5], np.float32), ints(1, 2, 5, 3)
    Case("Resize", x, attributes, {"s": scales}, ["x", "", "s"]).check(dynamic)
    Case("Resize", x, attributes, {"n": sizes}, ["x", "", "", "n"]).check(dynamic)


RESIZE = [
    Case(
        "Resize", {"x": floats(1, 2, 3, 4)}, {"axes": [2, 3], "mode": "linear"}, {"n": ints(5, 3)}, ["x", "", "", "n"]
    ),
    Case(
        "Resize",
        {"x": floats(1, 2, 5, 6)},
        {"axes": [3, 2], "mode": "linear", "antialias": 1},
        {"n": ints(3, 2)},
        ["x", "", "", "n"],
    ),
    Case("Resize", {"x": floats(2, 5)}, {"mode": "linear"}, {"s": np.array([1, 2], np.float32)}, ["x", "", "s"]),
    Case("Resize", {"x": floats(2, 3, 5)}, {"mode": "linear"}, {"s": np.array([1, 1, 2], np.float32)}, ["x", "", "s"]),
    Case(
        "Resize",
        {"x": floats(1, 1, 3, 4), "s": np.array([1, 1, 2, 1.5], np.float32)},
        {"mode": "linear"},
        inputs=["x", "", "s"],
        wrt=["x"],
    ),
]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("case", RESIZE, ids=str)
def test_resize_of_some_axes(case: Case, dynamic: bool) -> None:
    case.check(dynamic)
