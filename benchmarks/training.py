"""A training step of ours beside PyTorch's eager one: time and peak memory, the two interleaved.

    python benchmarks/training.py [NETWORK...] [--threads N...] [--rounds N] [--batch N] [--clip X] [--memory]

Wants torch (2.13) and onnxscript beside onnxcompress. Both sides do the same: forward, cross-entropy, gradients, AdamW
with PyTorch's defaults, on the same batch; BatchNormalization uses its running statistics (`--batch-norm trained`:
those of the batch). Blocks of steps take turns in one process, so that a busy machine is busy for both; the ratio is
the median over rounds of ours / PyTorch. `--memory` runs each side in a process of its own and prints the peak of its
anonymous memory.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import pathlib
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from measure import measure

Step = Callable[[], float]
SEED, LR = 0, 1e-4
LABELS, CLASSES = "train/labels", "train/classes"


def pytorch(name: str, batch: int, threads: int, clip: float | None, batch_norm: str) -> Step:
    """PyTorch's step, as its user writes it."""
    import torch
    from torch.nn import functional
    from training_networks import NETWORKS, settled

    torch.set_num_threads(threads)
    torch.manual_seed(SEED)
    network = NETWORKS[name]
    module = settled(network).train(batch_norm == "trained")
    inputs = network.inputs(batch)
    labels = torch.randint(0, network.classes, (batch, network.positions) if network.positions else (batch,))
    optimizer = torch.optim.AdamW(module.parameters(), lr=LR)

    def step() -> float:
        optimizer.zero_grad()
        z = module(*inputs)
        loss = functional.cross_entropy(z.reshape(-1, z.shape[-1]), labels.reshape(-1))
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()
        return loss.item()

    return step


def exported(name: str, batch_norm: str, folder: pathlib.Path) -> pathlib.Path:
    """The network as its exporter gives it."""
    import torch
    from onnxscript import optimizer
    from training_networks import NETWORKS, settled

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    torch.manual_seed(SEED)
    network, path = NETWORKS[name], folder / f"{name}.onnx"
    module = settled(network)
    free = {key: {0: torch.export.Dim("batch")} for key in network.names}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            network.inputs(2),
            input_names=list(network.names),
            output_names=["logits"],
            dynamic_shapes=tuple(free[key] for key in network.names),
            opset_version=18,
            dynamo=True,
            optimize=batch_norm == "frozen",
        )
        if batch_norm == "trained":  # what the optimizer does, but without taking BatchNormalization into its layer
            optimizer.fold_constants(program.model)
        program.save(path)
    return path


def ours(path: pathlib.Path, name: str, batch: int, threads: int, clip: float | None, batch_norm: str) -> Step:
    """Our step on the exported network."""
    from training_networks import NETWORKS

    feeds, labels = drawn(name, batch)
    return our_step(path, feeds, labels, NETWORKS[name].classes, threads, clip, batch_norm)


def drawn(name: str, batch: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The inputs and labels that PyTorch's side draws."""
    import torch
    from training_networks import NETWORKS, settled

    torch.manual_seed(SEED)
    network = NETWORKS[name]
    settled(network)  # draws the numbers the other side drew
    inputs = network.inputs(batch)
    labels = torch.randint(0, network.classes, (batch, network.positions) if network.positions else (batch,))
    return {key: value.numpy() for key, value in zip(network.names, inputs, strict=True)}, labels.numpy()


def our_step(
    path: pathlib.Path,
    feeds: Mapping[str, np.ndarray],
    labels: np.ndarray,
    classes: int,
    threads: int,
    clip: float | None,
    batch_norm: str,
) -> Step:
    """Our step on any model with one output of logits."""
    import onnx_ir as ir

    import onnxcompress as oc
    from onnxcompress.training import losses, samples, step
    from onnxcompress.training.optimizers import AdamW
    from onnxcompress.training.runner import Runner

    model = oc.load(path)
    counted = np.ones(labels.shape, np.float32)

    def loss(inputs: Any, values: Any) -> Any:
        (z,) = values.values()
        dims = ["n", *labels.shape[1:]]
        y, w = inputs("y", ir.DataType.INT64, dims), inputs("w", ir.DataType.FLOAT, dims)
        return losses.cross_entropy(z, y, w, labels.ndim)

    trainable = step.forward(model, [dict(feeds)])
    output = model.graph.outputs[0].name or ""
    trained = batch_norm == "trained"
    graph = step.build(trainable, [output], loss, AdamW(), clip=clip, batch_statistics=trained)
    runner = Runner(graph, threads=threads)
    whole = {**feeds, "y": labels, "w": counted}
    size = len(labels) if trained else samples.call_size(len(labels))  # as training splits a batch
    calls = [{key: array[at : at + size] for key, array in whole.items()} for at in range(0, len(labels), size)]
    count = 0

    def run() -> float:
        nonlocal count
        count += 1
        return float(runner.step(calls, LR, count)[0])

    return run


def block(step: Step, count: int, clock: str) -> float:
    """Seconds a step, the median of a few in a row."""
    took = []
    now = time.perf_counter if clock == "wall" else time.process_time
    for _ in range(count):
        began = now()
        step()
        took.append(now() - began)
    return statistics.median(took)


def compare(name: str, threads: int, args: argparse.Namespace, folder: pathlib.Path) -> None:
    """One line: times, ratio."""
    from training_networks import NETWORKS

    batch = args.batch or NETWORKS[name].batch
    path = exported(name, args.batch_norm, folder)
    theirs = pytorch(name, batch, threads, args.clip, args.batch_norm)
    mine = ours(path, name, batch, threads, args.clip, args.batch_norm)
    first = (mine(), theirs())
    apart = abs(first[0] - first[1]) / abs(first[1])
    for _ in range(3):
        mine(), theirs()
    a, b = [], []
    for _ in range(args.rounds):
        a.append(block(mine, args.steps, args.clock))
        b.append(block(theirs, args.steps, args.clock))
    ratios = sorted(x / y for x, y in zip(a, b, strict=True))
    low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
    on = f"{name:10s} batch {batch:3d}, {threads} thread{'s' if threads > 1 else ' '}"
    times = f"ours {statistics.median(a) * 1e3:7.2f} ms, PyTorch {statistics.median(b) * 1e3:7.2f} ms"
    ratio = f"ratio {statistics.median(ratios):.3f} ({low:.3f} to {high:.3f})"
    print(f"{on}: {times}, {ratio}; first loss {apart:.0e} apart", flush=True)


def memory(name: str, args: argparse.Namespace) -> None:
    """One line: peak RssAnon of a process that trains for 20 steps, the libraries that it needs included.

    The network is exported beforehand, and ours runs without torch, as its user does.
    """
    from training_networks import NETWORKS

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        path = exported(name, args.batch_norm, pathlib.Path(folder))
        feeds, labels = drawn(name, args.batch or NETWORKS[name].batch)
        np.savez(path.with_suffix(".npz"), **feeds, **{LABELS: labels, CLASSES: np.array(NETWORKS[name].classes)})
        for side in ("ours", "pytorch"):
            here = [sys.executable, __file__, name if side == "pytorch" else path, "--side", side]
            run = measure(
                [*here, "--batch-norm", args.batch_norm, *(["--batch", str(args.batch)] if args.batch else [])]
            )
            if run.status:
                raise SystemExit(run.err)
            found[side] = (run.peak or 0) / 1e6
    ratio = found["ours"] / found["pytorch"]
    print(
        f"{name:10s} peak: ours {found['ours']:.0f} MB, PyTorch {found['pytorch']:.0f} MB, ratio {ratio:.2f}",
        flush=True,
    )


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--clip", type=float)
    parser.add_argument("--batch-norm", choices=["frozen", "trained"], default="frozen")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: of all threads together")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--side", choices=["ours", "pytorch"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side == "ours":  # without torch
        path = pathlib.Path(args.networks[0])
        with np.load(path.with_suffix(".npz")) as stored:
            given = dict(stored)
        labels, classes = given.pop(LABELS), int(given.pop(CLASSES))
        train(our_step(path, given, labels, classes, 1, args.clip, args.batch_norm))
        return
    from training_networks import NETWORKS

    from onnxcompress.runtime.cpu import cpu_class

    if args.side is None:
        print(f"CPU class: {cpu_class()}")
    with tempfile.TemporaryDirectory() as folder:
        for name in args.networks or NETWORKS:
            batch = args.batch or NETWORKS[name].batch
            if args.side == "pytorch":
                train(pytorch(name, batch, 1, args.clip, args.batch_norm))
            elif args.memory:
                memory(name, args)
            else:
                for threads in args.threads:
                    compare(name, threads, args, pathlib.Path(folder))


def train(step: Step) -> None:
    """Some steps."""
    for _ in range(20):
        step()


if __name__ == "__main__":
    main()
