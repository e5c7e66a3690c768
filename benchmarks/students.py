"""A small student taught by a teacher beside the same student on hard labels alone, from the same random weights.

    python benchmarks/students.py [gloss] [digits] [cifar] [--seeds 0 1 2] [--threads N]

gloss: a bag of words learns 25 kinds of nouns from 7,487 definitions; teacher gloss_transformer. digits: a CNN of 754
weights learns from 333 images; teacher digits_cnn. cifar (where ONNXCOMPRESS_ZOO is set): a CNN of 14,666 weights
learns from 5,000 images; teacher a CNN of 1.1 million. Data with labels, epochs, learning rate, seed and first weights
are the same for both, and temperature and alpha are the defaults; only the loss differs. Prints the accuracy on
held-out data of each seed, mean and standard deviation.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import statistics
import tempfile
from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from onnxcompress.healing import train
from onnxcompress.training.distill import Settings

MODELS = pathlib.Path(__file__).resolve().parent.parent / "models"
ZOO = os.environ.get("ONNXCOMPRESS_ZOO")
Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Task:
    """A student, its teacher, and what both learn from. `data`: the training and the held-out arrays."""

    student: Callable[[], onnx.ModelProto]
    teacher: pathlib.Path
    data: Callable[[], tuple[Arrays, Arrays]]
    epochs: int
    lr: float


def convolutions(image: str, pixels: tuple[int, int, int], white: float, widths: tuple[int, ...]) -> onnx.ModelProto:
    """Convolution, Relu and pooling by two for each of `widths`, the mean over what is left, a classifier."""
    nodes, at, channels = [helper.make_node("Div", [image, "white"], ["scaled"])], "scaled", pixels[0]
    shapes: dict[str, tuple[int, ...]] = {}
    for i, width in enumerate(widths):
        shapes |= {f"w{i}": (width, channels, 3, 3), f"b{i}": (width,)}
        nodes += [
            helper.make_node("Conv", [at, f"w{i}", f"b{i}"], [f"conv{i}"], pads=[1] * 4),
            helper.make_node("Relu", [f"conv{i}"], [f"relu{i}"]),
            helper.make_node("MaxPool", [f"relu{i}"], [f"pool{i}"], kernel_shape=[2, 2], strides=[2, 2]),
        ]
        at, channels = f"pool{i}", width
    nodes += [
        helper.make_node("GlobalAveragePool", [at], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["features"]),
        helper.make_node("Gemm", ["features", "w", "b"], ["logits"]),
    ]
    inputs = [helper.make_tensor_value_info(image, TensorProto.FLOAT, ["batch", *pixels])]
    shapes |= {"w": (channels, 10), "b": (10,)}
    return network(nodes, inputs, 10, shapes, {"white": np.array(white, np.float32)})


def bag_of_words() -> onnx.ModelProto:
    """The mean of the words' vectors, a hidden layer, a classifier."""
    words = len((MODELS / "gloss_transformer" / "vocabulary.txt").read_text(encoding="utf-8").splitlines())
    nodes = [
        helper.make_node("Gather", ["words", "input_ids"], ["vectors"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["real"]),
        helper.make_node("Mul", ["vectors", "real"], ["masked"]),
        helper.make_node("ReduceSum", ["masked", "middle"], ["sum"], keepdims=0),
        helper.make_node("ReduceSum", ["real", "middle"], ["count"], keepdims=0),
        helper.make_node("Div", ["sum", "count"], ["mean"]),
        helper.make_node("MatMul", ["mean", "w1"], ["product1"]),
        helper.make_node("Add", ["product1", "b1"], ["hidden"]),
        helper.make_node("Relu", ["hidden"], ["relu"]),
        helper.make_node("MatMul", ["relu", "w2"], ["product2"]),
        helper.make_node("Add", ["product2", "b2"], ["logits"]),
    ]
    shapes: dict[str, tuple[int, ...]] = {"words": (words, 16), "w1": (16, 64), "b1": (64,), "w2": (64, 25)}
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"])
        for name in ("input_ids", "attention_mask")
    ]
    constants = {"last": np.array([2], np.int64), "middle": np.array([1], np.int64)}
    return network(nodes, inputs, 25, shapes | {"b2": (25,)}, constants)


def network(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    classes: int,
    shapes: dict[str, tuple[int, ...]],
    constants: Arrays,
) -> onnx.ModelProto:
    """A model whose weights hold small random numbers; `init="random"` draws them anew."""
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=shape).astype(np.float32) * 0.1 for name, shape in shapes.items()}
    tensors = [numpy_helper.from_array(array, name) for name, array in (arrays | constants).items()]
    output = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", classes])
    graph = helper.make_graph(nodes, "student", inputs, [output], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def bundled(name: str, every: int) -> tuple[Arrays, Arrays]:
    """Every so manieth training sample of a bundled model, and all of its held-out data."""
    folder = MODELS / name
    train_data, held_out = (dict(np.load(folder / f"{part}.npz")) for part in ("train", "eval"))
    return {key: array[::every] for key, array in train_data.items()}, held_out


def cifar(folder: pathlib.Path) -> tuple[Arrays, Arrays]:
    """Both parts of cifar10_data, channels first."""

    def part(name: str) -> Arrays:
        with np.load(folder / "cifar10_data" / f"{name}.npz") as file:
            return {"input": file["x_input"].transpose(0, 3, 1, 2), "y": file["y"]}

    return part("train"), part("eval")


def tasks() -> dict[str, Task]:
    """Those whose models and data are here."""
    found = {
        "gloss": Task(
            bag_of_words,
            MODELS / "gloss_transformer" / "model.onnx",
            lambda: bundled("gloss_transformer", 10),
            epochs=10,
            lr=3e-3,
        ),
        "digits": Task(
            lambda: convolutions("image", (1, 8, 8), 16, (8, 8)),
            MODELS / "digits_cnn" / "model.onnx",
            lambda: bundled("digits_cnn", 3),
            epochs=200,
            lr=1e-2,
        ),
    }
    if ZOO:
        folder = pathlib.Path(ZOO)
        found["cifar"] = Task(
            lambda: convolutions("input", (3, 32, 32), 128, (16, 32, 32)),
            folder / "cifar_resdw_cnn" / "model.onnx",
            lambda: cifar(folder),
            epochs=10,
            lr=3e-3,
        )
    return found


def accuracy(path: pathlib.Path, data: Arrays) -> float:
    """Share of right answers."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
    (logits,) = session.run(
        None, {port.name: data[port.name].astype(kinds[port.type]) for port in session.get_inputs()}
    )
    return float((logits.argmax(-1) == data["y"]).mean())


def compare(name: str, task: Task, seeds: list[int], threads: int, folder: pathlib.Path) -> None:
    """Train one task's student both ways with every seed, and print what came of it."""
    student, samples = folder / f"{name}.onnx", folder / f"{name}.npz"
    onnx.save(task.student(), student)
    learned, held_out = task.data()
    np.savez(samples, allow_pickle=False, **learned)
    size = student.stat().st_size / task.teacher.stat().st_size
    best = accuracy(task.teacher, held_out)
    print(f"{name}: teacher {best:.4f}, student {size:.1%} of its bytes, {len(learned['y']):,} training samples")
    for how, teacher in (("labels", None), ("teacher", task.teacher)):
        scores = []
        for seed in seeds:
            out = folder / f"{name}.{how}.{seed}.onnx"
            settings = Settings(epochs=task.epochs, lr=task.lr, seed=seed)
            train(teacher, student, out, data=samples, settings=settings, init="random", threads=threads)
            scores.append(accuracy(out, held_out))
        told = ", ".join(f"{score:.4f}" for score in scores)
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        print(f"  {how:8s} {told}: mean {statistics.mean(scores):.4f}, sd {spread:.4f}", flush=True)


def main() -> None:
    """Train, count, print."""
    known = tasks()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"of {', '.join(known)}; all by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if unknown := [name for name in args.tasks if name not in known]:
        parser.error(f"{', '.join(unknown)}: not here; there are {', '.join(known)}")
    with tempfile.TemporaryDirectory() as folder:
        for name in args.tasks or known:
            compare(name, known[name], args.seeds, args.threads, pathlib.Path(folder))


if __name__ == "__main__":
    main()
