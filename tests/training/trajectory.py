"""Writes trajectory.npz: what ten steps of PyTorch's optimizers make of three small networks.

    python tests/training/trajectory.py          (needs PyTorch and onnxscript)

Every network is exported before and after its training by the same exporter, so that PyTorch's parameters come in the
names and layouts of the ONNX file, whatever the exporter did to them. PyTorch computes in float64; what its own float32
makes of the same steps is printed, and stored as the measure of what can be asked.
"""

from __future__ import annotations

import copy
import io
import logging
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn
from torch.nn import functional as F

FILE = pathlib.Path(__file__).with_name("trajectory.npz")
STEPS, BATCH, CLASSES = 10, 8, 5
OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-3),
}
CLIPS = {"free": None, "clipped": 0.1}  # below the norm of all these gradients


class Convolutional(nn.Module):  # type: ignore[misc]
    """Convolutions of all kinds, each with a BatchNormalization that keeps its statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depthwise, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.last, self.norm3 = nn.Conv2d(8, 16, 1, stride=2, bias=False), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Any) -> Any:
        x = F.relu(self.norm1(self.first(x)))
        x = F.max_pool2d(x + F.relu(self.norm2(self.depthwise(x))), 2)
        return self.head(F.relu6(self.norm3(self.last(x))).mean((2, 3)))


class Block(nn.Module):  # type: ignore[misc]
    """A pre-norm encoder layer. The keys have no bias: its gradient is zero, and AdamW would step along its noise."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, width, bias=False), nn.Linear(width, width)
        self.out, self.up, self.down = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Any) -> Any:
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Encoder(nn.Module):  # type: ignore[misc]
    """Embedding, two layers, mean over the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 16)
        self.blocks = nn.Sequential(Block(16, 2), Block(16, 4))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, CLASSES)

    def forward(self, x: Any) -> Any:
        return self.head(self.norm(self.blocks(self.words(x))).mean(1))


class Recurrent(nn.Module):  # type: ignore[misc]
    """A bidirectional LSTM, mean over time."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 8, batch_first=True, bidirectional=True)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Any) -> Any:
        return self.head(self.lstm(x)[0].mean(1))


def data(network: nn.Module, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Ten batches, and labels."""
    labels = rng.integers(0, CLASSES, (STEPS, BATCH))
    if isinstance(network, Encoder):
        return rng.integers(0, 20, (STEPS, BATCH, 6)), labels
    shape = (3, 8, 8) if isinstance(network, Convolutional) else (7, 6)
    return (np.round(rng.standard_normal((STEPS, BATCH, *shape)) * 64) / 64).astype(np.float32), labels


def scatter(network: nn.Module) -> nn.Module:
    """Ones and zeros of norms become numbers of their own: the exporter would make one of equal tensors."""
    for module in network.modules():
        if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network


def exported(network: nn.Module, x: np.ndarray) -> onnx.ModelProto:
    """The network in float32, without what the exporter says of this machine.

    Optimized, but for the convolutions: the exporter would fold their BatchNormalization.
    """
    twin = copy.deepcopy(network).float().eval()
    buffer = io.BytesIO()
    options = {"input_names": ["x"], "output_names": ["z"], "optimize": not isinstance(network, Convolutional)}
    program = torch.onnx.export(twin, (torch.from_numpy(x),), dynamo=True, opset_version=18, verbose=False, **options)
    program.save(buffer)
    model = onnx.load_from_string(buffer.getvalue())
    for entry in (*model.graph.node, *model.graph.input, *model.graph.output, *model.graph.value_info, model.graph):
        del entry.metadata_props[:]
        entry.doc_string = ""
    for tensor in model.graph.initializer:
        del tensor.metadata_props[:]
        tensor.doc_string = ""
    del model.metadata_props[:]
    return model


def groups(network: nn.Module) -> list[dict[str, Any]]:
    """No weight decay on biases and norms."""
    layers = [w for w in network.parameters() if w.ndim > 1]
    return [{"params": layers}, {"params": [w for w in network.parameters() if w.ndim < 2], "weight_decay": 0.0}]


def train(network: nn.Module, optimizer: str, clip: float | None, x: np.ndarray, y: np.ndarray) -> list[float]:
    """Ten steps in the network's own precision; the losses."""
    dtype = next(network.parameters()).dtype
    stepper, losses = OPTIMIZERS[optimizer](groups(network)), []
    for inputs, labels in zip(x, y, strict=True):
        given = torch.from_numpy(inputs)
        given = given.to(dtype) if given.is_floating_point() else given
        loss = F.cross_entropy(network(given), torch.from_numpy(labels))
        stepper.zero_grad()
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(network.parameters(), clip)
        stepper.step()
        losses.append(loss.item())
    return losses


def parameters(network: nn.Module, x: np.ndarray) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in exported(network, x).graph.initializer}


def main() -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    arrays: dict[str, np.ndarray] = {}
    for kind in (Convolutional, Encoder, Recurrent):
        torch.manual_seed(0)
        network, name = scatter(kind()).eval(), kind.__name__.lower()
        x, y = data(network, np.random.default_rng(0))
        model = exported(network, x[0])
        arrays[f"{name}/model"] = np.frombuffer(model.SerializeToString(), np.uint8)
        arrays[f"{name}/x"], arrays[f"{name}/y"] = x, y
        start = parameters(network, x[0])
        print(name, sorted({node.op_type for node in model.graph.node}), {k: v.shape for k, v in start.items()})
        for optimizer in OPTIMIZERS:
            for how, clip in CLIPS.items():
                double, single = copy.deepcopy(network).double(), copy.deepcopy(network)
                losses = train(double, optimizer, clip, x, y)
                train(single, optimizer, clip, x, y)
                pairs = zip(double.parameters(), single.parameters(), strict=True)
                off = max(float((one - other).abs().max()) for one, other in pairs)
                truth = parameters(double, x[0])
                assert truth.keys() == start.keys()
                moved = {key: a for key, a in truth.items() if not np.array_equal(a, start[key])}
                print(f"  {optimizer} {how}: losses {losses[0]:.3f} to {losses[-1]:.3f}, float32 off by {off:.1e}")
                arrays[f"{name}/{optimizer}/{how}/losses"] = np.array(losses)
                arrays[f"{name}/{optimizer}/{how}/float32"] = np.array(off)
                arrays.update({f"{name}/{optimizer}/{how}/after/{key}": a for key, a in moved.items()})
    np.savez_compressed(FILE, allow_pickle=False, **arrays)
    print(f"{FILE.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
