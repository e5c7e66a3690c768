"""What labels of each kind are trained with, against numpy: the loss of the start, at a rate that moves nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx
import pytest

from onnxcompress.errors import DataError
from onnxcompress.model.load import load
from onnxcompress.training.distill import Settings, distill
from onnxcompress.training.order import Order
from onnxcompress.training.targets import Objective
from tests.builders import floats, graph, info, model, node, tensors
from tests.training.small import arrays, mlp, opened, outputs, sequences, tagger

STILL = Settings(epochs=1, batch=64, lr=1e-20)
X = arrays(64)["x"]
GENERATOR = np.random.default_rng(3)


def started(
    student: onnx.ModelProto,
    given: dict[str, np.ndarray],
    objective: Objective | None = None,
    teacher: onnx.ModelProto | None = None,
    settings: Settings = STILL,
) -> tuple[float, dict[str, str]]:
    """The loss of the first epoch, and what it is said to be."""
    of = load(student)
    original = load(teacher) if teacher is not None else None
    done = distill(original, of, opened(of, given), objective=objective, settings=settings)
    return done.epochs[0].loss, done.losses


def logits(of: onnx.ModelProto, given: dict[str, Any], name: str = "z") -> np.ndarray:
    """In float64, read in front of any head."""
    proto = onnx.ModelProto()
    proto.CopyFrom(of)
    if name not in {value.name for value in proto.graph.output}:
        del proto.graph.node[-1], proto.graph.output[:]
        proto.graph.output.append(info(name, ["n", "c"]))
    return outputs(proto, given)[name].astype(np.float64)


def log_softmax(z: np.ndarray) -> np.ndarray:
    shifted = z - z.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def one_output(head: str) -> onnx.ModelProto:
    """x [n, 6] -> Gemm [6, 1] = z -> (head)."""
    nodes = [node("Gemm", ["x", "w", "b"], ["z"], name="one")]
    if head:
        nodes.append(node(head, ["z"], ["y"], name="head"))
    given = tensors(w=floats(6, 1, seed=1), b=floats(1, seed=2))
    return model(graph(nodes, [info("x", ["n", 6])], [info("y" if head else "z", ["n", 1])], given))


def test_several_labels_a_sample() -> None:
    y = GENERATOR.integers(0, 2, (64, 4))
    z = logits(mlp("Sigmoid"), {"x": X})
    wanted = (np.logaddexp(0, z) - z * y).sum(1).mean()
    for kind in (np.int64, np.float32, np.bool_):
        loss, said = started(mlp("Sigmoid"), {"x": X, "y": y.astype(kind)})
        assert loss == pytest.approx(wanted, rel=1e-5)
        assert said == {"y": "1 x binary cross-entropy"}
    loss, said = started(mlp(), {"x": X, "y": y})  # no Sigmoid, but the labels say it
    assert loss == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("head", ["Sigmoid", ""])
def test_one_label_of_yes_or_no(head: str) -> None:
    y = GENERATOR.integers(0, 2, 64)
    z = logits(one_output(head), {"x": X})[:, 0]
    wanted = (np.logaddexp(0, z) - z * y).mean()
    for labels in (y, y[:, None], y.astype(np.float32) if head else y):
        loss, said = started(one_output(head), {"x": X, "y": labels})
        assert loss == pytest.approx(wanted, rel=1e-5)
        assert list(said.values()) == ["1 x binary cross-entropy"]


def test_numbers_to_match() -> None:
    y = GENERATOR.normal(size=64).astype(np.float32)
    z = logits(one_output(""), {"x": X})[:, 0]
    for labels in (y, y[:, None]):
        loss, said = started(one_output(""), {"x": X, "y": labels})
        assert loss == pytest.approx(((z - y) ** 2).mean(), rel=1e-5)
        assert said == {"z": "1 x squared error"}


def test_labels_that_are_left_out() -> None:
    y = np.array(arrays(64)["y"])
    y[::3] = -100
    z = log_softmax(logits(mlp(), {"x": X}))
    told = y >= 0
    loss, _ = started(mlp(), {"x": X, "y": y})
    assert loss == pytest.approx(-z[told, y[told]].mean(), rel=1e-5)


def test_soft_labels() -> None:
    y = GENERATOR.dirichlet(np.ones(4), 64).astype(np.float32)
    z = log_softmax(logits(mlp(), {"x": X}))
    for head in ("", "Softmax"):
        loss, said = started(mlp(head), {"x": X, "y": y}, Objective("classes"))
        assert loss == pytest.approx(-(y * z).sum(1).mean(), rel=1e-5)
        assert list(said.values()) == ["1 x cross-entropy"]
    loss, _ = started(mlp("Softmax"), {"x": X, "y": y})  # the head says that it is classes
    assert loss == pytest.approx(-(y * z).sum(1).mean(), rel=1e-5)
    smooth, _ = started(mlp("Softmax"), {"x": X, "y": y}, Objective(smoothing=0.2))
    assert smooth == pytest.approx(-((0.8 * y + 0.05) * z).sum(1).mean(), rel=1e-5)
    with pytest.raises(DataError, match="label of sample 3 is no distribution: it sums up to 2"):
        started(mlp("Softmax"), {"x": X, "y": np.where(np.arange(64)[:, None] == 3, 0.5, y).astype(np.float32)})


@pytest.mark.parametrize("squared", [True, False])
def test_labels_and_a_teacher_are_mixed(squared: bool) -> None:
    teacher, y = mlp("Softmax"), arrays(64)["y"]
    student = mlp("Softmax")
    for tensor in student.graph.initializer:
        if tensor.name == "w2":
            tensor.CopyFrom(onnx.numpy_helper.from_array(floats(200, 4, seed=9) * 0.1, "w2"))
    z, t = (logits(of, {"x": X}) for of in (student, teacher))
    hard = -log_softmax(z)[np.arange(64), y].mean()
    p = np.exp(log_softmax(t / 2))
    soft = (p * (np.log(p) - log_softmax(z / 2))).sum(1).mean()
    objective = Objective(temperature=2, alpha=0.3, squared=squared)
    loss, said = started(student, {"x": X, "y": y}, objective, teacher)
    assert loss == pytest.approx(0.3 * hard + 0.7 * soft * (4 if squared else 1), rel=1e-5)
    assert said == {"y": "0.3 x cross-entropy + 0.7 x soft targets at T = 2"}


@pytest.mark.parametrize("batch", [8, 48])
def test_a_label_a_token(batch: int) -> None:
    given = sequences()
    y = np.where(given["attention_mask"] == 1, GENERATOR.integers(0, 3, (48, 9)), -100)
    y[:, 0] = -100  # as for a token that opens the sequence
    z = log_softmax(outputs(tagger(), given)["logits"].astype(np.float64))
    order, wanted = Order(48, batch, 0, given["attention_mask"].sum(1)), []
    for update in range(48 // batch):
        rows = order.samples(update)
        told = y[rows] >= 0
        wanted.append(-z[rows][told, y[rows][told]].mean())
    settings = dataclasses.replace(STILL, batch=batch)
    loss, said = started(tagger(), given | {"y": y}, settings=settings)
    assert loss == pytest.approx(np.mean(wanted), rel=1e-5)
    assert said == {"logits": "1 x cross-entropy"}
    trained, _ = started(tagger(), given | {"y": y}, settings=Settings(epochs=1, batch=4, lr=2e-2))
    assert trained < 0.97 * loss


def test_padding_counts_nowhere() -> None:
    given = sequences()
    y = GENERATOR.integers(0, 3, (48, 9))  # labels of padding are there, and are not looked at
    z = log_softmax(outputs(tagger(), given)["logits"].astype(np.float64))
    real = given["attention_mask"] == 1
    loss, _ = started(tagger(), given | {"y": y})
    assert loss == pytest.approx(-z[real, y[real]].mean(), rel=1e-5)
