"""What the three training scripts share: writing a graph down, the digits split, training, and a clean ONNX file.

Run the scripts from the repository root (`python -m models.digits_gru.make`).
"""

from __future__ import annotations

import json
import pathlib
import tempfile

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxcompress import healing
from onnxcompress.training.settings import Settings
from onnxcompress.training.targets import Objective

OPSET, IR_VERSION = 18, 10
Arrays = dict[str, np.ndarray]
Dim = int | str
Port = tuple[str, int, list[Dim]]
"""An input: its name, element type and shape."""


def node(kind: str, inputs: list[str], output: str, **attributes: object) -> onnx.NodeProto:
    """A node named as its output."""
    return helper.make_node(kind, inputs, [output], name=output, **attributes)


def model(
    name: str, nodes: list[onnx.NodeProto], inputs: list[Port], output: list[Dim], held: Arrays
) -> onnx.ModelProto:
    """`nodes` as a model with one output `logits` of the shape `output`; `held`: weights and constants by name."""
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info(*port) for port in inputs],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, output)],
        [numpy_helper.from_array(array, name) for name, array in held.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)


def undrawn(shapes: dict[str, tuple[int, ...]]) -> Arrays:
    """Weights of these shapes, to be drawn at random by `train`."""
    return {name: np.ones(shape, np.float32) for name, shape in shapes.items()}


class Network:
    """Nodes in their order, with the shapes of their weights and with their constants; written by a subclass.

    `add`, `weight` and `constant` return the name of what they added, to be the input of the next.
    """

    def __init__(self, name: str, inputs: list[Port], classes: int) -> None:
        self.name, self.inputs, self.classes = name, inputs, classes
        self.nodes: list[onnx.NodeProto] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.constants: Arrays = {}

    def to_onnx(self, weights: Arrays | None = None) -> onnx.ModelProto:
        """The network with these weights, or with such as are yet to be drawn."""
        found = undrawn(self.shapes) if weights is None else {name: weights[name] for name in self.shapes}
        return model(self.name, self.nodes, self.inputs, ["batch", self.classes], found | self.constants)

    def add(self, kind: str, inputs: list[str], output: str, **attributes: object) -> str:
        """A node, named as its output."""
        self.nodes.append(node(kind, inputs, output, **attributes))
        return output

    def weight(self, name: str, *shape: int) -> str:
        """A weight in float32."""
        self.shapes[name] = shape
        return name

    def constant(self, name: str, value: np.ndarray) -> str:
        """A constant."""
        self.constants[name] = value
        return name


def digits(folder: pathlib.Path, name: str, shape: tuple[int, ...]) -> dict[str, Arrays]:
    """The parts as they lie in `folder`, made first where one is missing; images of `shape` under `name`."""
    parts = ("train", "calib", "eval")
    if not all((folder / f"{part}.npz").exists() for part in parts):
        for part, (images, labels) in digits_split().items():
            np.savez_compressed(folder / f"{part}.npz", **{name: images.reshape(-1, *shape), "y": labels})
    return {part: dict(np.load(folder / f"{part}.npz")) for part in parts}


def shifted(images: np.ndarray) -> np.ndarray:
    """`images` [n, ..., height, width] moved by -1, 0 and 1 pixels either way: 9 n images, zeros where nothing was."""
    height, width = images.shape[-2:]
    framed = np.pad(images, [(0, 0)] * (images.ndim - 2) + [(1, 1), (1, 1)])
    return np.concatenate([framed[..., y : y + height, x : x + width] for y in range(3) for x in range(3)])


def train(start: onnx.ModelProto, data: Arrays, settings: Settings, smoothing: float) -> Arrays:
    """The weights of `start` after training from random ones; `data`: named as the inputs, labels `y`.

    What `onnxcompress train --init random` does, here in Python.
    """
    with tempfile.TemporaryDirectory() as name:
        student, samples, done = (pathlib.Path(name) / file for file in ("start.onnx", "train.npz", "done.onnx"))
        onnx.save(start, student)
        np.savez(samples, allow_pickle=False, **data)
        objective = Objective(smoothing=smoothing)
        healing.train(
            None,
            student,
            done,
            data=samples,
            settings=settings,
            objective=objective,
            init="random",
            threads=1,
            say=print,
        )
        return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(done).graph.initializer}


def digits_split() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """scikit-learn's 1,797 digits as uint8 [n, 8, 8] (0..16) and labels; disjoint train 997, calib 100, eval 700."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images, labels = digits.images.astype(np.uint8), digits.target.astype(np.uint8)
    rest, evaluation = train_test_split(np.arange(len(labels)), test_size=700, random_state=0, stratify=labels)
    train, calib = train_test_split(rest, test_size=100, random_state=0, stratify=labels[rest])
    return {name: (images[i], labels[i]) for name, i in (("train", train), ("calib", calib), ("eval", evaluation))}


def save(model: onnx.ModelProto, path: pathlib.Path) -> None:
    """Write `model`, checked."""
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString(deterministic=True))


def subgraphs(graph: onnx.GraphProto) -> list[onnx.GraphProto]:
    """Every graph inside an attribute of a node, at any depth."""
    inner = [a.g for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    return inner + [deeper for g in inner for deeper in subgraphs(g)]


def score(path: pathlib.Path, data: Arrays) -> float:
    """Accuracy of the file at `path` in onnxruntime; `data`: arrays named as the inputs, labels `y`."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
    feeds = {i.name: data[i.name].astype(kinds[i.type]) for i in session.get_inputs()}
    return float((session.run(None, feeds)[0].argmax(1) == data["y"]).mean())


def card(folder: pathlib.Path, evaluation: Arrays, licence: str, **more: object) -> None:
    """Score the file and write model.json. `parameters`: elements of all float weights, running statistics included."""
    path = folder / "model.onnx"
    model = onnx.load(path)
    tensors = [t for graph in [model.graph, *subgraphs(model.graph)] for t in graph.initializer if t.dims]
    facts = {
        "name": folder.name,
        "metric": "accuracy",
        "score": round(score(path, evaluation), 6),
        "eval_samples": len(evaluation["y"]),
        "parameters": sum(int(np.prod(t.dims)) for t in tensors if t.data_type == onnx.TensorProto.FLOAT),
        "bytes": path.stat().st_size,
        "opset": OPSET,
        "data": licence,
        **more,
    }
    (folder / "model.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts))
