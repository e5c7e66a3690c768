"""A convolutional network on scikit-learn's digits: residual, depthwise separable and inverted residual blocks.

Data: `sklearn.datasets.load_digits` (test part of UCI "Optical Recognition of Handwritten Digits", E. Alpaydin and
C. Kaynak, 1998, CC BY 4.0; shipped by scikit-learn, BSD-3-Clause). Metric: top-1 accuracy on 700 held-out images.
Input `image` float32 [batch, 1, 8, 8], pixels 0..16: the scaling is in the graph. Output `logits` float32 [batch, 10].
BatchNormalization stays a node of its own behind each convolution. Run: `python -m models.digits_cnn.make` (a few
minutes).
"""

from __future__ import annotations

import pathlib

import numpy as np
import onnx

from models import common
from onnxcompress.training.settings import Settings

HERE = pathlib.Path(__file__).parent
CLASSES, FEATURES, WIDE = 10, 128, 256
# Chosen by 300 of the training images and calib.npz, which were held out for that. An epoch is 18 forms of every image.
SETTINGS = Settings(epochs=6, batch=64, lr=3e-3, weight_decay=0.05, warmup=0.2, relative=False, ema=0.99)
SMOOTHING = 0.1
WARPS, ANGLE, STRETCH, MOVE = 9, 8.0, 0.08, 0.7  # degrees, share of the size, pixels


class Network(common.Network):
    """8x8x32 -> 4x4x64 -> 2x2x128 -> 10. Each method returns the name of its output."""

    def __init__(self) -> None:
        super().__init__("digits_cnn", [("image", onnx.TensorProto.FLOAT, ["batch", 1, 8, 8])], CLASSES)
        x = self.add("Div", ["image", self.constant("white", np.array(16, np.float32))], "scaled")
        x = self._relu(self._conv(x, "stem", 1, 32))
        x = self._residual(x, "residual1", 32)
        x = self._relu(self._separable(x, "separable1", 32, 64))
        x = self._residual(x, "residual2", 64)
        x = self._separable(x, "separable2", 64, FEATURES)
        x = self._inverted_residual(x, "inverted")
        space = self.constant("space", np.array([2, 3], np.int64))
        x = self.add("ReduceMean", [x, space], "features", keepdims=0)
        head = [self.weight("head.weight", CLASSES, FEATURES), self.weight("head.bias", CLASSES)]
        self.add("Gemm", [x, *head], "logits", transB=1)

    def _residual(self, x: str, name: str, channels: int) -> str:
        """relu(x + conv(relu(conv(x))))."""
        y = self._relu(self._conv(x, f"{name}.first", channels, channels))
        y = self._conv(y, f"{name}.second", channels, channels)
        return self._relu(self.add("Add", [x, y], f"{name}.sum"))

    def _separable(self, x: str, name: str, inputs: int, outputs: int) -> str:
        """A depthwise convolution that halves height and width, then a pointwise one."""
        y = self._relu(self._conv(x, f"{name}.depthwise", inputs, inputs, stride=2, groups=inputs))
        return self._conv(y, f"{name}.pointwise", inputs, outputs, kernel=1)

    def _inverted_residual(self, x: str, name: str) -> str:
        """x + a depthwise convolution of more channels, with ReLU6 on either side (as in MobileNetV2)."""
        y = self._relu6(self._conv(x, f"{name}.expand", FEATURES, WIDE, kernel=1))
        y = self._relu6(self._conv(y, f"{name}.depthwise", WIDE, WIDE, groups=WIDE))
        y = self._conv(y, f"{name}.project", WIDE, FEATURES, kernel=1)
        return self.add("Add", [x, y], f"{name}.sum")

    def _conv(
        self, x: str, name: str, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1
    ) -> str:
        """Convolution without bias, then BatchNormalization."""
        weight = self.weight(f"{name}.weight", outputs, inputs // groups, kernel, kernel)
        window = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [kernel // 2] * 4}
        self.add("Conv", [x, weight], f"{name}.conv", **window, group=groups)
        norm = [self.weight(f"{name}.norm.{part}", outputs) for part in ("scale", "bias", "mean", "variance")]
        return self.add("BatchNormalization", [f"{name}.conv", *norm], name)

    def _relu(self, x: str) -> str:
        return self.add("Relu", [x], f"{x}.relu")

    def _relu6(self, x: str) -> str:
        bounds = [self.constant("zero", np.array(0, np.float32)), self.constant("six", np.array(6, np.float32))]
        return self.add("Clip", [x, *bounds], f"{x}.relu6")


def warped(images: np.ndarray, seed: int = 0) -> np.ndarray:
    """`WARPS` copies of every image of [n, 1, 8, 8], each turned, stretched, slanted and moved a little, at random.

    Pixels between pixels are interpolated, those beyond the edge are 0.
    """
    draw = np.random.default_rng(seed).uniform
    copies = np.repeat(images[:, 0], WARPS, axis=0).astype(np.float32)
    count, size = len(copies), images.shape[-1]

    def each(limit: float) -> np.ndarray:
        return draw(-limit, limit, (count, 1, 1))

    angle, slant = np.deg2rad(each(ANGLE)), each(STRETCH)
    y, x = np.meshgrid(*[np.arange(size) - (size - 1) / 2] * 2, indexing="ij")
    from_x = (np.cos(angle) * x + (slant - np.sin(angle)) * y) / (1 + each(STRETCH)) + each(MOVE)
    from_y = (np.sin(angle) * x + np.cos(angle) * y) / (1 + each(STRETCH)) + each(MOVE)
    return interpolated(copies, from_y + (size - 1) / 2, from_x + (size - 1) / 2)[:, None]


def interpolated(images: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The values of `images` [n, height, width] at the places `y`, `x` [n, ...] of each: bilinear, 0 outside."""
    framed = np.pad(images, [(0, 0), (1, 1), (1, 1)])
    y, x = (np.clip(place + 1, 0, size - 1.001) for place, size in zip((y, x), framed.shape[1:], strict=True))
    row, column, image = y.astype(int), x.astype(int), np.arange(len(images))[:, None, None]
    down, right = y - row, x - column
    above = framed[image, row, column] * (1 - right) + framed[image, row, column + 1] * right
    below = framed[image, row + 1, column] * (1 - right) + framed[image, row + 1, column + 1] * right
    return np.asarray(above * (1 - down) + below * down, np.float32)


def main() -> None:
    data = common.digits(HERE, "image", (1, 8, 8))
    images, labels = data["train"]["image"], data["train"]["y"]
    forms = {
        "image": np.concatenate([common.shifted(images), warped(images)]),
        "y": np.concatenate([np.tile(labels, 9), np.repeat(labels, WARPS)]),
    }
    network = Network()
    common.save(network.to_onnx(common.train(network.to_onnx(), forms, SETTINGS, SMOOTHING)), HERE / "model.onnx")
    common.card(HERE, data["eval"], licence="scikit-learn digits (UCI optdigits), CC BY 4.0")


if __name__ == "__main__":
    main()
