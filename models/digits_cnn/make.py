"""A convolutional network on scikit-learn's digits: residual, depthwise separable and inverted residual blocks.

Data: `sklearn.datasets.load_digits` (test part of UCI "Optical Recognition of Handwritten Digits", E. Alpaydin and
C. Kaynak, 1998, CC BY 4.0; shipped by scikit-learn, BSD-3-Clause). Metric: top-1 accuracy on 700 held-out images.
Input `image` float32 [batch, 1, 8, 8], pixels 0..16: the scaling is in the graph. Output `logits` float32 [batch, 10].
BatchNormalization stays a node of its own behind each convolution. Run: `python -m models.digits_cnn.make` (a minute).
"""

from __future__ import annotations

import pathlib

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from models import common

HERE = pathlib.Path(__file__).parent
EPOCHS = 60


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution without bias, then BatchNormalization."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs))


class Residual(nn.Module):
    """x + body(x), then the activation where the block ends in one."""

    def __init__(self, *body: nn.Module, relu: bool) -> None:
        super().__init__()
        self.body, self.relu = nn.Sequential(*body), relu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x + self.body(x)
        return torch.relu(y) if self.relu else y


class Net(nn.Module):
    """8x8x32 -> 4x4x64 -> 2x2x128 -> 10."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(1, 32, 3), nn.ReLU())
        self.residual1 = Residual(conv(32, 32, 3), nn.ReLU(), conv(32, 32, 3), relu=True)
        self.separable1 = nn.Sequential(conv(32, 32, 3, 2, groups=32), nn.ReLU(), conv(32, 64, 1), nn.ReLU())
        self.residual2 = Residual(conv(64, 64, 3), nn.ReLU(), conv(64, 64, 3), relu=True)
        self.separable2 = nn.Sequential(conv(64, 64, 3, 2, groups=64), nn.ReLU(), conv(64, 128, 1))
        self.inverted = Residual(
            conv(128, 256, 1), nn.ReLU6(), conv(256, 256, 3, groups=256), nn.ReLU6(), conv(256, 128, 1), relu=False
        )
        self.head = nn.Linear(128, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.residual1(self.stem(image / 16))
        x = self.residual2(self.separable1(x))
        x = self.inverted(self.separable2(x))
        return self.head(x.mean((2, 3)))


def train(images: torch.Tensor, labels: torch.Tensor) -> Net:
    """AdamW, one-cycle rate, label smoothing, shifts by up to one pixel."""
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    steps = EPOCHS * (len(labels) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    for step in range(steps):
        if step % (len(labels) // 64) == 0:
            order = torch.randperm(len(labels))
        pick = order[step % (len(labels) // 64) * 64 :][:64]
        dy, dx = torch.randint(0, 3, (2,)).tolist()
        x = F.pad(images[pick], (1, 1, 1, 1))[:, :, dy : dy + 8, dx : dx + 8]
        loss = F.cross_entropy(net(x), labels[pick], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net


def main() -> None:
    common.seed(0)
    data = {name: {"image": x[:, None], "y": y} for name, (x, y) in common.digits_split().items()}
    for name, arrays in data.items():
        np.savez_compressed(HERE / f"{name}.npz", **arrays)
    net = train(torch.from_numpy(data["train"]["image"]).float(), torch.from_numpy(data["train"]["y"]).long())
    model = common.export(net, {"image": torch.zeros(2, 1, 8, 8)}, {"image": {0: "batch"}})
    common.save(model, HERE / "model.onnx")
    common.card(HERE, data["eval"], licence="scikit-learn digits (UCI optdigits), CC BY 4.0")


if __name__ == "__main__":
    main()
