"""PyTorch networks whose training step is timed against ours: one a family, as their users write them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al., 2016)."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        same = stride == 1 and channels == width
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.body(x) + self.shortcut(x))


class Cnn(nn.Module):
    """A residual network for 32x32 images, three stages of 32, 64 and 128 channels."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.stages = nn.Sequential(
            ResidualBlock(32, 32, 1),
            ResidualBlock(32, 64, 2),
            ResidualBlock(64, 64, 1),
            ResidualBlock(64, 128, 2),
            ResidualBlock(128, 128, 1),
        )
        self.head = nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


class InvertedResidual(nn.Module):
    """1x1, depthwise 3x3, 1x1 (Sandler et al., 2018)."""

    def __init__(self, channels: int, width: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = channels * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers += [nn.Conv2d(channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()]
        layers += [nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden)]
        layers += [nn.ReLU6(), nn.Conv2d(hidden, width, 1, bias=False), nn.BatchNorm2d(width)]
        self.body = nn.Sequential(*layers)
        self.shortcut = stride == 1 and channels == width

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if self.shortcut else y


class MobileNetV2(nn.Module):
    """MobileNetV2 as published, on 64x64 images."""

    BLOCKS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6()]
        channels = 32
        for expansion, width, count, stride in self.BLOCKS:
            for index in range(count):
                layers.append(InvertedResidual(channels, width, stride if index == 0 else 1, expansion))
                channels = width
        layers += [nn.Conv2d(channels, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.ReLU6()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(1280, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class Attention(nn.Module):
    """Self-attention with one projection for queries, keys and values."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        n, length, width = x.shape
        shape = (n, length, self.heads, width // self.heads)
        q, k, v = (part.reshape(shape).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        y = functional.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(n, length, width))


class Block(nn.Module):
    """A transformer layer, normalization before (GPT) or after (BERT) each half."""

    def __init__(self, width: int, heads: int, *, causal: bool, before: bool) -> None:
        super().__init__()
        self.before = before
        self.attention = Attention(width, heads, causal)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.before:
            x = x + self.attention(self.first(x), mask)
            return x + self.mlp(self.second(x))
        x = self.first(x + self.attention(x, mask))
        return self.second(x + self.mlp(x))


class Bert(nn.Module):
    """BERT-mini (4 layers of 256, 4 heads, BERT's vocabulary of 30,522) with a classifier on the first token."""

    def __init__(self, width: int = 256, classes: int = 2) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(30522, width), nn.Embedding(512, width)
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, 4, causal=False, before=False) for _ in range(4))
        self.head = nn.Linear(width, classes)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.norm(self.tokens(ids) + self.positions(torch.arange(ids.shape[1])))
        wide = (1.0 - mask[:, None, None, :].float()) * -1e4
        for block in self.blocks:
            x = block(x, wide)
        return self.head(x[:, 0])


class CharGpt(nn.Module):
    """A character model: 4 layers of 192, 6 heads, context 128, 65 characters, untied head."""

    def __init__(self, width: int = 192, characters: int = 65) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(characters, width), nn.Embedding(128, width)
        self.blocks = nn.ModuleList(Block(width, 6, causal=True, before=True) for _ in range(4))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Lstm(nn.Module):
    """Two LSTM layers of 128 over 40 frames of 40 features, a classifier on the last."""

    def __init__(self, features: int = 40, width: int = 128, classes: int = 10) -> None:
        super().__init__()
        self.lstm = nn.LSTM(features, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


@dataclasses.dataclass(frozen=True)
class Network:
    """A family. `inputs`: example inputs for a batch size; `classes`: what labels lie below; `batch`: samples a step.

    `positions`: labels for each position of this many, 0 for one label a sample. `names`: of the inputs.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Tensor, ...]]
    names: tuple[str, ...]
    classes: int
    batch: int
    positions: int = 0


def settled(network: Network) -> nn.Module:
    """The network after a few batches have gone through it, so that BatchNormalization's statistics are of its kind."""
    module = network.make().train()
    with torch.no_grad():
        for _ in range(20):
            module(*network.inputs(network.batch))
    return module.eval()


def _tokens(n: int, length: int, below: int) -> Tensor:
    return torch.randint(0, below, (n, length))


NETWORKS = {
    "cnn": Network(Cnn, lambda n: (torch.randn(n, 3, 32, 32),), ("image",), 10, 32),
    "bert": Network(
        Bert, lambda n: (_tokens(n, 64, 30522), torch.ones(n, 64, dtype=torch.int64)), ("ids", "mask"), 2, 16
    ),
    "char_gpt": Network(CharGpt, lambda n: (_tokens(n, 128, 65),), ("ids",), 65, 16, positions=128),
    "mobilenet": Network(MobileNetV2, lambda n: (torch.randn(n, 3, 64, 64),), ("image",), 10, 16),
    "lstm": Network(Lstm, lambda n: (torch.randn(n, 40, 40),), ("frames",), 10, 32),
}
