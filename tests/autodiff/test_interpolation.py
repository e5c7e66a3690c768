"""GridSample and RoiAlign."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from onnxcompress.autodiff import NoGradient
from tests.autodiff.cases import Case, floats, ints

GRIDS: list[dict[str, Any]] = [
    {},
    {"mode": "linear", "padding_mode": "border", "align_corners": 1},
    {"mode": "linear", "padding_mode": "reflection"},
    {"mode": "cubic", "padding_mode": "border"},
]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("attributes", GRIDS, ids=str)
def test_grid_sample(attributes: dict[str, Any], dynamic: bool) -> None:
    feeds = {"x": floats(2, 2, 3, 4), "g": floats(2, 2, 3, 2, low=-1.7, high=1.7)}
    Case("GridSample", feeds, attributes, opset=20).check(dynamic)


def test_grid_sample_of_one_pixel_reflected() -> None:
    """There is nothing between the ends to reflect at."""
    feeds = {"x": floats(1, 1, 1, 3), "g": floats(1, 2, 2, 2)}
    attributes = {"padding_mode": "reflection", "align_corners": 1}
    Case("GridSample", feeds, attributes, opset=20, wrt=["x"]).check(dynamic=True)


REGIONS = np.array([[0.4, 0.3, 3.3, 4.6], [1.2, 2.1, 2.7, 3.3], [-1.7, -0.8, 5.2, 6.9]], np.float32)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("mode", ["half_pixel", "output_half_pixel"])
def test_roi_align(mode: str, ratio: int, images: int, dynamic: bool) -> None:
    """With regions that reach beyond the image, and samples as many as each region asks for (ratio 0)."""
    attributes = {
        "output_height": 2,
        "output_width": 3,
        "sampling_ratio": ratio,
        "spatial_scale": 0.7,
        "coordinate_transformation_mode": mode,
    }
    feeds = {"x": floats(images, 2, 5, 4), "r": REGIONS, "i": ints(0, images - 1, 0)}
    Case("RoiAlign", feeds, attributes, opset=16).check(dynamic)


def test_roi_align_refuses_the_maximum() -> None:
    feeds = {"x": floats(1, 1, 3, 3), "r": REGIONS[:1], "i": ints(0)}
    with pytest.raises(NoGradient, match="mode max has no rule"):
        Case("RoiAlign", feeds, {"mode": "max"}, opset=16).check()
