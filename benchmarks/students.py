"""A small student taught by a teacher beside the same student on hard labels alone, from the same random weights.

    python benchmarks/students.py [digits] [gloss] [--seeds 0 1 2] [--threads N]

Two tasks with the bundled data: digits (teacher digits_cnn; a CNN of 1,500 parameters learns from every tenth training
sample) and gloss (teacher gloss_transformer; a bag of words learns from every tenth definition labelled). The same
data, epochs, learning rate and seed for both; only the loss differs. Prints accuracy on the held-out data of each seed,
mean and spread.
"""

from __future__ import annotations

import argparse
import dataclasses
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


def digits() -> onnx.ModelProto:
    """Two convolutions, a pooling after each, a classifier."""
    nodes = [
        helper.make_node("Conv", ["image", "w1", "b1"], ["a"], pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("MaxPool", ["b"], ["c"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Conv", ["c", "w2", "b2"], ["d"], pads=[1] * 4),
        helper.make_node("Relu", ["d"], ["e"]),
        helper.make_node("MaxPool", ["e"], ["f"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["f"], ["g"]),
        helper.make_node("Gemm", ["g", "w3", "b3"], ["logits"]),
    ]
    shapes = {"w1": (8, 1, 3, 3), "b1": (8,), "w2": (8, 8, 3, 3), "b2": (8,), "w3": (32, 10), "b3": (10,)}
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 1, 8, 8])
    return network(nodes, [image], 10, shapes)


def gloss() -> onnx.ModelProto:
    """The mean of the words' vectors, a hidden layer, a classifier."""
    words = len((MODELS / "gloss_transformer" / "vocabulary.txt").read_text(encoding="utf-8").splitlines())
    nodes = [
        helper.make_node("Gather", ["words", "input_ids"], ["a"]),
        helper.make_node("Cast", ["attention_mask"], ["m"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["m", "last"], ["n"]),
        helper.make_node("Mul", ["a", "n"], ["b"]),
        helper.make_node("ReduceSum", ["b", "middle"], ["c"], keepdims=0),
        helper.make_node("ReduceSum", ["n", "middle"], ["d"], keepdims=0),
        helper.make_node("Div", ["c", "d"], ["e"]),
        helper.make_node("MatMul", ["e", "w1"], ["f0"]),
        helper.make_node("Add", ["f0", "b1"], ["f"]),
        helper.make_node("Relu", ["f"], ["g"]),
        helper.make_node("MatMul", ["g", "w2"], ["h"]),
        helper.make_node("Add", ["h", "b2"], ["logits"]),
    ]
    shapes = {"words": (words, 16), "w1": (16, 64), "b1": (64,), "w2": (64, 25), "b2": (25,)}
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"])
        for name in ("input_ids", "attention_mask")
    ]
    constants = {"last": np.array([2], np.int64), "middle": np.array([1], np.int64)}
    return network(nodes, inputs, 25, shapes, constants)


def network(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    classes: int,
    shapes: dict[str, tuple[int, ...]],
    constants: dict[str, np.ndarray] | None = None,
) -> onnx.ModelProto:
    """A model whose weights hold small random numbers; `--init random` draws them anew."""
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=shape).astype(np.float32) * 0.1 for name, shape in shapes.items()}
    tensors = [numpy_helper.from_array(array, name) for name, array in {**arrays, **(constants or {})}.items()]
    output = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", classes])
    graph = helper.make_graph(nodes, "student", inputs, [output], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


@dataclasses.dataclass(frozen=True)
class Task:
    """A student, its teacher's folder, how much of the training data it sees and how often."""

    student: Callable[[], onnx.ModelProto]
    teacher: str
    every: int
    epochs: int
    lr: float


TASKS = {"digits": Task(digits, "digits_cnn", 10, 100, 3e-3), "gloss": Task(gloss, "gloss_transformer", 10, 10, 3e-3)}


def accuracy(path: pathlib.Path, data: dict[str, np.ndarray]) -> float:
    """Share of right answers on held-out data."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {port.name: data[port.name] for port in session.get_inputs()})
    return float((logits.argmax(-1) == data["y"]).mean())


def main() -> None:
    """Train, count, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for task_name in args.tasks or TASKS:
            task = TASKS[task_name]
            home, student = MODELS / task.teacher, folder / f"{task_name}.onnx"
            onnx.save(task.student(), student)
            data = {key: array[:: task.every] for key, array in np.load(home / "train.npz").items()}
            np.savez(folder / "train.npz", **data)
            held_out = typed(dict(np.load(home / "eval.npz")), student)
            size = student.stat().st_size / (home / "model.onnx").stat().st_size
            best = accuracy(home / "model.onnx", held_out)
            print(
                f"{task_name}: teacher {best:.4f}, student {size:.1%} of its bytes, {len(data['y'])} training samples"
            )
            found: dict[str, list[float]] = {"labels": [], "teacher": []}
            for seed in args.seeds:
                for how, scores in found.items():
                    out = folder / f"{task_name}.{how}.{seed}.onnx"
                    settings = Settings(epochs=task.epochs, lr=task.lr, seed=seed)
                    teacher = home / "model.onnx" if how == "teacher" else None
                    train(
                        teacher,
                        student,
                        out,
                        data=folder / "train.npz",
                        settings=settings,
                        init="random",
                        threads=args.threads,
                    )
                    scores.append(accuracy(out, held_out))
            for how, scores in found.items():
                told = ", ".join(f"{score:.4f}" for score in scores)
                spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
                print(f"  {how:8s} {told}: mean {statistics.mean(scores):.4f}, spread (sd) {spread:.4f}", flush=True)


def typed(data: dict[str, np.ndarray], path: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays in the types of the model's inputs."""
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
    return data | {port.name: data[port.name].astype(kinds[port.type]) for port in session.get_inputs()}


if __name__ == "__main__":
    main()
