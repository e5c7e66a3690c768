"""The families of benchmarks/training_networks.py: ten steps of ours and of PyTorch's, in its float32 and float64.

    python tests/training/against_pytorch.py [NAME ...] [--batch N]       (needs PyTorch and onnxscript)

Prints the largest difference of any element of any weight after ten steps of SGD (momentum 0.9, learning rate 0.01) and
of AdamW (1e-3), and in brackets |difference| / |change| of all weights together. Where a network has a million Relus,
two float32 programs decide one of them differently in every few steps, and what follows is another trajectory; with
--smooth, every Relu is a Gelu, and they follow each other.
"""

from __future__ import annotations

import argparse
import copy
import io
import logging
import pathlib
import sys
import warnings
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))

import onnx_ir as ir
from training_networks import NETWORKS, settled  # type: ignore[import-not-found]

from onnxcompress.model import bridge
from onnxcompress.training import losses, step
from onnxcompress.training.optimizers import SGD, AdamW
from onnxcompress.training.runner import Runner

STEPS = 10
_FLOAT = torch.Tensor.float
OPTIMIZERS: dict[str, tuple[Any, Any, float]] = {
    "sgd": (SGD(momentum=0.9), lambda groups, lr: torch.optim.SGD(groups, lr=lr, momentum=0.9), 0.01),
    "adamw": (AdamW(), lambda groups, lr: torch.optim.AdamW(groups, lr=lr), 1e-3),
}


def exported(module: Any, inputs: tuple[Any, ...], names: tuple[str, ...]) -> onnx.ModelProto:
    """In float32. Optimized, but for networks with BatchNormalization, which would be folded."""
    buffer, plain = io.BytesIO(), any(isinstance(part, nn.BatchNorm2d) for part in module.modules())
    options: dict[str, Any] = {"input_names": list(names), "output_names": ["z"], "optimize": not plain}
    twin = copy.deepcopy(module).float()
    torch.onnx.export(twin, inputs, dynamo=True, opset_version=18, verbose=False, **options).save(buffer)
    return onnx.load_from_string(buffer.getvalue())


def arrays(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Its weights, in the names and layouts the exporter gave them."""
    return {t.name: numpy_helper.to_array(t).astype(np.float64) for t in model.graph.initializer if t.data_type == 1}


def scatter(module: Any) -> Any:
    """Ones and zeros become numbers of their own: the exporter would make one of equal tensors."""
    with torch.no_grad():
        for w in module.parameters():
            if w.ndim < 2:
                w.add_(torch.empty_like(w).uniform_(-0.1, 0.1))
    return module


def theirs(module: Any, make: Any, lr: float, clip: float | None, batches: Any) -> Any:
    """The module after PyTorch's steps, in its own precision; no weight decay on biases and norms."""
    dtype, every = next(module.parameters()).dtype, [w for w in module.parameters() if w.requires_grad]
    groups = [{"params": [w for w in every if w.ndim > 1]}]
    groups.append({"params": [w for w in every if w.ndim < 2], "weight_decay": 0.0})  # type: ignore[dict-item]
    optimizer = make(groups, lr)
    torch.Tensor.float = torch.Tensor.double if dtype == torch.float64 else _FLOAT  # what modules say inside
    for inputs, labels in batches:
        z = module(*(t.to(dtype) if t.is_floating_point() else t for t in inputs))
        optimizer.zero_grad()
        F.cross_entropy(z.reshape(-1, z.shape[-1]), labels.reshape(-1)).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(every, clip)
        optimizer.step()
    torch.Tensor.float = _FLOAT
    return module


def built(model: onnx.ModelProto, optimizer: Any, clip: float | None, positions: int) -> step.TrainingGraph:
    """Our step."""

    def loss(inputs: step.Inputs, values: Any) -> Any:
        shape: list[int | str | None] = ["n", positions] if positions else ["n"]
        labels = inputs("y", ir.DataType.INT64, shape)
        return losses.cross_entropy(values["z"], labels, inputs("weight", ir.DataType.FLOAT, shape), -1)

    return step.build(step.forward(bridge.from_proto(model, "network"), []), ["z"], loss, optimizer, clip=clip)


def ours(graph: step.TrainingGraph, names: tuple[str, ...], lr: float, batches: Any) -> dict[str, np.ndarray]:
    """The parameters after our steps."""
    with Runner(graph) as runner:
        for t, (inputs, labels) in enumerate(batches, 1):
            feeds = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
            weight = np.ones(labels.shape, np.float32)
            runner.step([{**feeds, "y": labels.numpy(), "weight": weight}], lr, t)
        found = graph.trained({leaf.name: runner.read()[leaf.name] for leaf in graph.leaves})
    return {key: parts["w"] for key, parts in found.items()}


def off(found: dict[str, np.ndarray], truth: dict[str, np.ndarray], start: dict[str, np.ndarray]) -> str:
    """Largest difference of any weight, and all together relative to the change."""
    largest = max(float(np.abs(found[name] - truth[name]).max()) for name in truth)
    change = np.linalg.norm([np.linalg.norm(truth[name] - start[name]) for name in truth])
    whole = float(np.linalg.norm([np.linalg.norm(found[name] - truth[name]) for name in truth]) / change)
    return f"{largest:.1e} ({whole:.1e})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(NETWORKS))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--smooth", action="store_true")
    arguments = parser.parse_args()
    if arguments.smooth:
        nn.ReLU = nn.ReLU6 = nn.GELU
        F.relu = F.gelu
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    print(f"{'after ten steps':24} ours - PyTorch float32   ours - float64        PyTorch float32 - float64")
    for name in arguments.names:
        torch.manual_seed(0)
        network = NETWORKS[name]
        module = scatter(settled(network))
        batches = []
        for _ in range(STEPS):
            shape = (arguments.batch, network.positions) if network.positions else (arguments.batch,)
            batches.append((network.inputs(arguments.batch), torch.randint(0, network.classes, shape)))
        inputs, names = batches[0][0], network.names
        model = exported(module, inputs, names)
        start = arrays(model)
        for kind, (optimizer, make, lr) in OPTIMIZERS.items():
            for clip in (None, 1.0):
                graph = built(model, optimizer, clip, network.positions)
                for key, w in module.named_parameters():
                    w.requires_grad_(key not in graph.left)  # a constant to us: positions, added to what is embedded
                found = ours(graph, names, lr, batches)
                double, single = (
                    arrays(exported(theirs(copy.deepcopy(module).to(dtype), make, lr, clip, batches), inputs, names))
                    for dtype in (torch.float64, torch.float32)
                )
                moved = {key for key in start if not np.array_equal(double[key], start[key])}
                assert found.keys() == moved, found.keys() ^ moved
                double, single = ({key: after[key] for key in moved} for after in (double, single))
                print(
                    f"{name:10} {kind:6} clip {clip!s:5} {off(found, single, start)}      "
                    f"{off(found, double, start)}     {off(single, double, start)}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
