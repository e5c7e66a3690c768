"""Every form of head: a student that is its teacher has nothing to learn, and labels meet its probabilities.

Expected values are computed with numpy in float64 from the logits in front of the head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import pytest

from onnxcompress.errors import DataError
from onnxcompress.model.load import load
from onnxcompress.training.distill import Settings, distill, write
from onnxcompress.training.heads import heads
from onnxcompress.training.initial import randomize
from onnxcompress.training.targets import Objective
from tests.builders import floats, function, graph, info, model, node, tensors
from tests.training.small import opened, outputs

STILL = Settings(epochs=1, batch=64, lr=1e-20)  # nothing moves: the loss is that of the start
COUNT = 64
CONSTANTS: dict[str, np.ndarray] = {
    "naught": np.array(0, np.float32),
    "half": np.array(0.5, np.float32),
    "one": np.array(1, np.float32),
    "step": np.array(1 / 255, np.float32),  # of probabilities in 8 bits
    "point": np.array(0, np.uint8),
    "coarse": np.array(0.05, np.float32),
    "middle": np.array(128, np.uint8),
    "start": np.array(0, np.int64),
    "first": np.array([0], np.int64),
    "second": np.array([1], np.int64),
    "third": np.array([2], np.int64),
    "fourth": np.array([3], np.int64),
    "end": np.array([4], np.int64),
    "flat": np.array([0, -1], np.int64),
    "cells": np.array([0, 6, 4], np.int64),
    "grid": np.array([0, 4, 2, 3], np.int64),
    "pixel": np.array([0, 4, 1, 1], np.int64),
    "plane": np.array([0, 1, 2, 3], np.int64),
}


def softmax(z: np.ndarray, axis: int = -1) -> np.ndarray:
    powers = np.exp(z.astype(np.float64) - z.max(axis, keepdims=True))
    return np.asarray(powers / powers.sum(axis, keepdims=True))


def sigmoid(z: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-z.astype(np.float64))))


def headed(
    nodes: list[onnx.NodeProto], shape: list[int | str], width: int = 4, name: str = "y", opset: int = 17
) -> onnx.ModelProto:
    """x [n, 6] -> Gemm [6, width] = z -> `nodes` = y."""
    given = tensors(w=floats(6, width, seed=1), b=floats(width, seed=2), **CONSTANTS)
    inside = [node("Div", ["a", "b"], ["c"])]
    body = graph(
        [node("Gemm", ["x", "w", "b"], ["z"], name="layer"), *nodes], [info("x", ["n", 6])], [info(name, shape)], given
    )
    domains = {each.domain for each in nodes if each.domain}
    functions = [function("Divide", ["a", "b"], ["c"], inside)] if "test" in domains else []
    return model(body, opset, functions=functions, domains=dict.fromkeys(domains, 1))


def written_out(*, shifted: bool, divide: str = "Div") -> list[onnx.NodeProto]:
    """Softmax in simpler operators."""
    nodes = [node("ReduceMax", ["z"], ["m"], axes=[1]), node("Sub", ["z", "m"], ["s"])] if shifted else []
    nodes += [node("Exp", ["s" if shifted else "z"], ["e"]), node("ReduceSum", ["e", "second"], ["t"])]
    if divide == "Mul":
        return [*nodes, node("Reciprocal", ["t"], ["q"]), node("Mul", ["q", "e"], ["y"])]
    return [*nodes, node(divide, ["e", "t"], ["y"], domain="test" if divide == "Divide" else "")]


def pictures(perm: list[int], *after: onnx.NodeProto) -> list[onnx.NodeProto]:
    """z [n, 24] as a picture [n, 4, 2, 3], Softmax, Transpose."""
    transposed = [node("Transpose", ["p"], ["t"], perm=perm)]
    return [node("Reshape", ["z", "grid"], ["g"]), node("Softmax", ["g"], ["p"], axis=1), *transposed, *after]


SOFTMAX = node("Softmax", ["z"], ["p"], axis=1)
Form = tuple[list[onnx.NodeProto], list[int | str], int]
CLASSES: dict[str, Form] = {  # [n, 4] -> y of these shapes, classes along axis 1 unless said
    "Softmax": ([node("Softmax", ["z"], ["y"])], ["n", 4], 4),
    "LogSoftmax": ([node("LogSoftmax", ["z"], ["y"])], ["n", 4], 4),
    "Log of Softmax": ([SOFTMAX, node("Log", ["p"], ["y"])], ["n", 4], 4),
    "Reshape": ([SOFTMAX, node("Reshape", ["p", "flat"], ["y"])], ["n", 4], 4),
    "Flatten": ([SOFTMAX, node("Flatten", ["p"], ["y"])], ["n", 4], 4),
    "Unsqueeze": ([SOFTMAX, node("Unsqueeze", ["p", "third"], ["y"])], ["n", 4, 1], 4),
    "Unsqueeze and Flatten": (
        [
            node("Unsqueeze", ["z", "third"], ["u"]),
            node("Softmax", ["u"], ["p"], axis=1),
            node("Flatten", ["p"], ["y"]),
        ],
        ["n", 4],
        4,
    ),
    "Unsqueeze, Transpose, Squeeze": (
        [
            SOFTMAX,
            node("Unsqueeze", ["p", "third"], ["u"]),
            node("Transpose", ["u"], ["t"], perm=[0, 2, 1]),
            node("Squeeze", ["t", "second"], ["y"]),
        ],
        ["n", 4],
        4,
    ),
    "Slice of all": ([SOFTMAX, node("Slice", ["p", "first", "end", "second"], ["y"])], ["n", 4], 4),
    "Identity, Cast": (
        [SOFTMAX, node("Identity", ["p"], ["i"]), node("Cast", ["i"], ["y"], to=onnx.TensorProto.FLOAT)],
        ["n", 4],
        4,
    ),
    "written out": (written_out(shifted=False), ["n", 4], 4),
    "written out, less the largest": (written_out(shifted=True), ["n", 4], 4),
    "written out with Reciprocal": (written_out(shifted=True, divide="Mul"), ["n", 4], 4),
    "hidden in a function": (written_out(shifted=True, divide="Divide"), ["n", 4], 4),
    "hidden by Clip": ([SOFTMAX, node("Mul", ["p", "one"], ["m"]), node("Clip", ["m"], ["y"])], ["n", 4], 4),
    "written out LogSoftmax": (
        [node("ReduceLogSumExp", ["z"], ["l"], axes=[1]), node("Sub", ["z", "l"], ["y"])],
        ["n", 4],
        4,
    ),
}


def logits(of: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    given = {tensor.name: onnx.numpy_helper.to_array(tensor).astype(np.float64) for tensor in of.graph.initializer}
    return np.asarray(x.astype(np.float64) @ given["w"] + given["b"])


def started(
    student: onnx.ModelProto,
    given: Mapping[str, np.ndarray],
    teacher: onnx.ModelProto | None = None,
    objective: Objective | None = None,
) -> tuple[float, dict[str, str]]:
    """The loss before anything is learned, and what it is said to be."""
    of = load(student)
    original = load(teacher) if teacher is not None else None
    done = distill(original, of, opened(of, given), objective=objective, settings=STILL)
    return done.epochs[0].loss, done.losses


X = floats(COUNT, 6, seed=5)
PLAIN = headed([node("Softmax", ["z"], ["y"])], ["n", 4])
MOVED = headed([node("Softmax", ["z"], ["y"])], ["n", 4])
for _tensor in MOVED.graph.initializer:
    if _tensor.name == "w":
        _tensor.CopyFrom(onnx.numpy_helper.from_array(floats(6, 4, seed=9), "w"))


def classes(name: str) -> onnx.ModelProto:
    nodes, shape, width = CLASSES[name]
    return headed(nodes, shape, width)


def soft(z: np.ndarray, t: np.ndarray, temperature: float = 2) -> float:
    p, q = softmax(t / temperature, 1), softmax(z / temperature, 1)
    return float((p * (np.log(p) - np.log(q))).sum(1).mean() * temperature**2)


@pytest.mark.parametrize("name", CLASSES)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(name: str) -> None:
    student = classes(name)
    loss, said = started(student, {"x": X}, student, Objective(temperature=2))
    assert said == {"y": "soft targets at T = 2"}
    assert abs(loss) < 1e-6
    other = PLAIN if len(CLASSES[name][1]) == 2 else student
    for mine, theirs in ((student, other), (other, student)):  # heads of two forms, the same logits
        loss, said = started(mine, {"x": X}, theirs, Objective(temperature=2))
        assert said == {"y": "soft targets at T = 2"}
        assert abs(loss) < 1e-6


@pytest.mark.parametrize("name", [name for name in CLASSES if len(CLASSES[name][1]) == 2])
def test_soft_targets_and_labels_of_every_head(name: str) -> None:
    student, y = classes(name), np.arange(COUNT) % 4
    z, t = logits(student, X), logits(MOVED, X)
    loss, _ = started(student, {"x": X}, MOVED, Objective(temperature=2))
    assert loss == pytest.approx(soft(z, t), rel=1e-4)
    log_p = np.log(softmax(z))
    for labels in (y, y[:, None], y.astype(np.float32)):
        loss, said = started(student, {"x": X, "y": labels})
        assert said == {"y": "1 x cross-entropy"}
        assert loss == pytest.approx(-log_p[np.arange(COUNT), y].mean(), rel=1e-5)
    shares = softmax(floats(COUNT, 4, seed=8)).astype(np.float32)
    loss, said = started(student, {"x": X, "y": shares})
    assert said == {"y": "1 x cross-entropy"}
    assert loss == pytest.approx(-(shares * log_p).sum(1).mean(), rel=1e-5)


@pytest.mark.parametrize("name", ["Reshape", "written out", "hidden in a function", "hidden by Clip"])
def test_a_student_learns_through_every_head(name: str) -> None:
    teacher, student = load(classes(name)), load(classes(name))
    randomize(student, 0)
    before = np.abs(outputs(student, {"x": X})["y"] - outputs(teacher, {"x": X})["y"]).mean()
    done = distill(teacher, student, opened(student, {"x": X}), settings=Settings(epochs=60, lr=0.03))
    write(student, done.parameters)
    assert np.abs(outputs(student, {"x": X})["y"] - outputs(teacher, {"x": X})["y"]).mean() < 0.1 * before


PICTURES: dict[str, tuple[list[onnx.NodeProto], list[int | str], int]] = {  # nodes, shape, the classes' axis
    "channels first": (pictures([0, 1, 3, 2], node("Identity", ["t"], ["y"])), ["n", 4, 3, 2], 1),
    "channels last": (pictures([0, 2, 3, 1], node("Identity", ["t"], ["y"])), ["n", 2, 3, 4], 3),
    "channels last, cells in a row": (
        pictures([0, 2, 3, 1], node("Reshape", ["t", "cells"], ["y"])),
        ["n", 6, 4],
        2,
    ),
}


@pytest.mark.parametrize("name", PICTURES)
def test_classes_of_every_cell(name: str) -> None:
    nodes, shape, axis = PICTURES[name]
    student = headed(nodes, shape, 24)
    loss, said = started(student, {"x": X}, student, Objective(temperature=2))
    assert said == {"y": "soft targets at T = 2"}
    assert abs(loss) < 1e-6
    p = outputs(student, {"x": X})["y"].astype(np.float64)
    y = np.random.default_rng(0).integers(0, 4, tuple(d for i, d in enumerate(p.shape) if i != axis))
    picked = np.take_along_axis(p, np.expand_dims(y, axis), axis)
    for labels in (y, np.expand_dims(y, 1)):
        loss, said = started(student, {"x": X, "y": labels})
        assert said == {"y": "1 x cross-entropy"}
        assert loss == pytest.approx(-np.log(picked).mean(), rel=1e-5)


def test_classes_of_one_position() -> None:
    nodes = [
        node("Reshape", ["z", "cells"], ["c"]),
        node("Softmax", ["c"], ["p"]),
        node("Gather", ["p", "start"], ["y"], axis=1),
    ]
    student, y = headed(nodes, ["n", 4], 24), np.arange(COUNT) % 4
    loss, _ = started(student, {"x": X}, student)
    assert abs(loss) < 1e-6
    loss, said = started(student, {"x": X, "y": y})
    assert said == {"y": "1 x cross-entropy"}
    p = softmax(logits(student, X)[:, :4])
    assert loss == pytest.approx(-np.log(p[np.arange(COUNT), y]).mean(), rel=1e-5)


@pytest.mark.parametrize("moved", [False, True])
def test_probabilities_in_8_bits_are_seen_through(moved: bool) -> None:
    nodes = [
        node("Softmax", ["z"], ["p"]),
        node("QuantizeLinear", ["p", "step", "point"], ["q"]),
        node("DequantizeLinear", ["q", "step", "point"], ["d"]),
        node("Reshape" if moved else "Identity", ["d", "flat"] if moved else ["d"], ["y"]),
    ]
    student, y = headed(nodes, ["n", 4]), np.arange(COUNT) % 4
    loss, said = started(student, {"x": X}, MOVED, Objective(temperature=2))
    assert said == {"y": "soft targets at T = 2"}
    assert loss == pytest.approx(soft(logits(student, X), logits(MOVED, X)), rel=1e-4)
    loss, _ = started(student, {"x": X, "y": y})
    assert loss == pytest.approx(-np.log(softmax(logits(student, X)))[np.arange(COUNT), y].mean(), rel=1e-5)


def of_integers(kind: str, shape: list[int | str], width: int, **attributes: Any) -> onnx.ModelProto:
    """The head as ONNX Runtime's quantizer writes it in integer operators."""
    nodes = [
        node("QuantizeLinear", ["z", "coarse", "middle"], ["q"]),
        node(kind, ["q", "coarse", "middle", "step", "point"], ["h"], domain="com.microsoft", **attributes),
        node("DequantizeLinear", ["h", "step", "point"], ["y"]),
    ]
    return headed(nodes, shape, width)


def test_integer_heads_give_probabilities() -> None:
    y = np.arange(COUNT) % 4
    student = of_integers("QLinearSoftmax", ["n", 4], 4, axis=-1, opset=13)
    p = np.maximum(outputs(student, {"x": X})["y"].astype(np.float64), 1e-30)
    p /= p.sum(1, keepdims=True)
    loss, said = started(student, {"x": X, "y": y})
    assert said == {"y": "1 x cross-entropy"}
    assert loss == pytest.approx(-np.log(p[np.arange(COUNT), y]).mean(), rel=1e-5)
    for teacher in (PLAIN, headed([node("Identity", ["z"], ["y"])], ["n", 4])):
        loss, _ = started(student, {"x": X, "y": y}, teacher, Objective(temperature=1, alpha=0))
        t = softmax(logits(teacher, X))
        wanted = (t * (np.log(t) - np.log(p))).sum(1).mean()
        assert loss == pytest.approx(wanted, rel=1e-3)  # the integer kernel rounds some a step of 1/255 otherwise
    student, y = of_integers("QLinearSigmoid", ["n", 1], 1), np.arange(COUNT) % 2
    p = np.clip(outputs(student, {"x": X})["y"][:, 0].astype(np.float64), 1e-7, 1 - 1e-7)
    loss, said = started(student, {"x": X, "y": y})
    assert said == {"y": "1 x binary cross-entropy"}
    assert loss == pytest.approx(-np.where(y, np.log(p), np.log(1 - p)).mean(), rel=1e-4)
    assert abs(started(student, {"x": X}, student)[0]) < 1e-6


BINARY: dict[str, list[onnx.NodeProto]] = {  # z [n, 1] -> y
    "Sigmoid": [node("Sigmoid", ["z"], ["y"])],
    "Squeeze": [node("Sigmoid", ["z"], ["p"]), node("Squeeze", ["p", "second"], ["y"])],
    "written out": [
        node("Neg", ["z"], ["n1"]),
        node("Exp", ["n1"], ["e"]),
        node("Add", ["e", "one"], ["d"]),
        node("Div", ["one", "d"], ["y"]),
    ],
    "written out with Reciprocal": [
        node("Neg", ["z"], ["n1"]),
        node("Exp", ["n1"], ["e"]),
        node("Add", ["one", "e"], ["d"]),
        node("Reciprocal", ["d"], ["y"]),
    ],
    "as Tanh": [
        node("Mul", ["z", "half"], ["h"]),
        node("Tanh", ["h"], ["t"]),
        node("Add", ["t", "one"], ["a"]),
        node("Mul", ["a", "half"], ["y"]),
    ],
    "one of two classes": [
        node("Mul", ["z", "naught"], ["zero"]),
        node("Concat", ["zero", "z"], ["both"], axis=1),
        node("Softmax", ["both"], ["p"]),
        node("Slice", ["p", "second", "third", "second"], ["y"]),
    ],
}


def binary(name: str) -> onnx.ModelProto:
    return headed(BINARY[name], ["n"] if name == "Squeeze" else ["n", 1], 1)


@pytest.mark.parametrize("name", BINARY)
def test_yes_or_no_behind_every_head(name: str) -> None:
    student, y = binary(name), np.arange(COUNT) % 2
    p = sigmoid(logits(student, X))[:, 0]
    wanted = -np.where(y, np.log(p), np.log(1 - p)).mean()
    smooth = 0.9 * y + 0.05
    for labels in (y, y[:, None], y.astype(np.float32), y.astype(bool), y.astype(np.float32)[:, None]):
        loss, said = started(student, {"x": X, "y": labels})
        assert said == {"y": "1 x binary cross-entropy"}
        assert loss == pytest.approx(wanted, rel=1e-4)
        loss, said = started(student, {"x": X, "y": labels}, student, Objective(temperature=2, alpha=0.25))
        assert said == {"y": "0.25 x binary cross-entropy + 0.75 x soft targets at T = 2"}
        assert loss == pytest.approx(0.25 * wanted, rel=1e-4)
    loss, _ = started(student, {"x": X, "y": y}, objective=Objective(smoothing=0.1))
    assert loss == pytest.approx(-(smooth * np.log(p) + (1 - smooth) * np.log(1 - p)).mean(), rel=1e-4)
    with pytest.raises(DataError, match="label 3 of sample 0 is neither yes nor no: output 'y' wants 0 to 1"):
        started(headed(BINARY["Sigmoid"], ["n", 1], 1), {"x": X, "y": np.full(COUNT, 3)})


@pytest.mark.parametrize("name", BINARY)
def test_a_binary_student_that_is_its_teacher_has_nothing_to_learn(name: str) -> None:
    student = binary(name)
    loss, _ = started(student, {"x": X}, student)
    assert abs(loss) < 1e-6


def test_many_labels_leave_no_rounding() -> None:
    student = headed([node("Mul", ["z", "steep"], ["m"]), node("Sigmoid", ["m"], ["y"])], ["n", 300], 300)
    student.graph.initializer.append(onnx.numpy_helper.from_array(np.array(20, np.float32), "steep"))
    assert started(student, {"x": X}, student)[0] == 0


VALUES: dict[str, list[onnx.NodeProto]] = {
    "a layer": [node("Identity", ["z"], ["y"])],
    "no less than zero": [node("Relu", ["z"], ["y"])],
    "between 0 and 1": [node("Clip", ["z", "naught", "one"], ["y"])],
    "one": [node("Tanh", ["z"], ["y"])],
    "one class cut off": [
        node("Softmax", ["z"], ["p"]),
        node("Slice", ["p", "second", "end", "second"], ["y"]),
    ],
}


@pytest.mark.parametrize("output", ["prediction", "pred_boxes", "y_score", "class_embeddings"])
@pytest.mark.parametrize("name", VALUES)
def test_values_are_matched_whatever_they_are_called(name: str, output: str) -> None:
    nodes = [*VALUES[name][:-1], onnx.NodeProto()]
    nodes[-1].CopyFrom(VALUES[name][-1])
    nodes[-1].output[0] = output
    student = headed(nodes, ["n", 3 if name == "one class cut off" else 4], name=output)
    teacher = onnx.ModelProto()
    teacher.CopyFrom(student)
    assert started(student, {"x": X}, teacher) == (0, {output: "squared error"})
    for tensor in teacher.graph.initializer:
        if tensor.name == "w":
            tensor.CopyFrom(onnx.numpy_helper.from_array(floats(6, 4, seed=9), "w"))
    a, b = (outputs(of, {"x": X})[output].astype(np.float64) for of in (student, teacher))
    loss, said = started(student, {"x": X}, teacher)
    assert said == {output: "squared error"}
    assert loss == pytest.approx(((a - b) ** 2).mean(), rel=1e-5)
    labels = floats(*a.shape, seed=4)
    loss, said = started(student, {"x": X, "y": labels})
    assert said == {output: "1 x squared error"}
    assert loss == pytest.approx(((a - labels) ** 2).mean(), rel=1e-5)


def shares() -> onnx.ModelProto:
    """Softplus(z) over its sum: a distribution without a Softmax."""
    nodes = [
        node("Softplus", ["z"], ["s"]),
        node("ReduceSum", ["s", "second"], ["t"]),
        node("Div", ["s", "t"], ["y"]),
    ]
    return headed(nodes, ["n", 4])


def test_shares_are_a_distribution_on_both_sides() -> None:
    student = shares()
    loss, said = started(student, {"x": X}, student, Objective(temperature=2))
    assert said == {"y": "soft targets at T = 2"}
    assert abs(loss) < 1e-6
    p = outputs(student, {"x": X})["y"].astype(np.float64)
    loss, said = started(student, {"x": X}, student, Objective("values"))
    assert said == {"y": "squared error"}
    assert loss == 0
    y = floats(COUNT, 4, seed=4)  # labels that are none make it values
    loss, said = started(student, {"x": X, "y": y})
    assert said == {"y": "1 x squared error"}
    assert loss == pytest.approx(((p - y) ** 2).mean(), rel=1e-5)


@pytest.mark.parametrize("wanted", ["values", "cosine"])
def test_values_of_heads_that_differ_are_those_of_the_outputs(wanted: str) -> None:
    hidden = classes("hidden in a function")
    for student, teacher in ((PLAIN, hidden), (hidden, PLAIN), (PLAIN, PLAIN)):
        loss, _ = started(student, {"x": X}, teacher, Objective(wanted))  # type: ignore[arg-type]
        assert abs(loss) < 1e-6


def test_several_labels_of_any_type_on_plain_logits() -> None:
    student = headed([node("Identity", ["z"], ["y"])], ["n", 4])
    z = logits(student, X)
    several = np.random.default_rng(1).integers(0, 2, (COUNT, 4))
    hot = np.eye(4)[np.arange(COUNT) % 4]
    for kind in (np.float32, np.int64, np.bool_):
        loss, said = started(student, {"x": X, "y": several.astype(kind)})
        assert said == {"y": "1 x binary cross-entropy"}
        assert loss == pytest.approx((np.logaddexp(0, z) - z * several).sum(1).mean(), rel=1e-5)
        loss, said = started(student, {"x": X, "y": hot.astype(kind)})
        assert said == {"y": "1 x cross-entropy"}
        assert loss == pytest.approx(-(hot * np.log(softmax(z))).sum(1).mean(), rel=1e-5)


@pytest.mark.parametrize("shape", [(COUNT,), (COUNT, 1), (COUNT, 1, 1)])
def test_labels_of_classes_with_axes_of_size_1(shape: tuple[int, ...]) -> None:
    nodes = [node("Reshape", ["z", "pixel"], ["y"])]
    student, y = headed(nodes, ["n", 4, 1, 1]), np.arange(COUNT) % 4
    loss, said = started(student, {"x": X, "y": y.reshape(shape)})
    assert said == {"y": "1 x cross-entropy"}
    assert loss == pytest.approx(-np.log(softmax(logits(student, X)))[np.arange(COUNT), y].mean(), rel=1e-5)


@pytest.mark.parametrize("head", ["Identity", "Sigmoid"])
def test_masks_without_the_axis_of_their_channel(head: str) -> None:
    student = headed([node("Reshape", ["z", "plane"], ["g"]), node(head, ["g"], ["y"])], ["n", 1, 2, 3], 6)
    z = logits(student, X).reshape(COUNT, 2, 3)
    y = np.random.default_rng(2).integers(0, 2, (COUNT, 2, 3))
    for labels in (y, y[:, None], y.astype(np.float32)):
        loss, said = started(student, {"x": X, "y": labels})
        assert said == {"y": "1 x binary cross-entropy"}
        assert loss == pytest.approx((np.logaddexp(0, z) - z * y).mean(), rel=1e-5)


def test_the_softmax_of_old_operator_sets_is_over_all_axes_from_one_on() -> None:
    nodes = [node("Reshape", ["z", "grid"], ["g"]), node("Softmax", ["g"], ["y"], axis=1)]
    student = headed(nodes, ["n", 4, 2, 3], 24, opset=11)
    (whole,) = heads(load(student))
    assert (whole.kind, whole.axis) == ("classes", None)
    assert started(student, {"x": X}, student) == (0, {"y": "squared error"})
    nodes = [node("Softmax", ["z"], ["y"], axis=1)]
    (flat,) = heads(load(headed(nodes, ["n", 4], opset=11)))
    assert flat.kind == "classes"
    loss, said = started(headed(nodes, ["n", 4], opset=11), {"x": X}, PLAIN, Objective(temperature=2))
    assert said == {"y": "soft targets at T = 2"}
    assert abs(loss) < 1e-6


def test_old_operator_sets_are_lifted_with_what_moves() -> None:
    nodes = [
        node("Unsqueeze", ["z"], ["u"], axes=[2]),
        node("Softmax", ["u"], ["p"], axis=1),
        node("Squeeze", ["p"], ["y"], axes=[2]),
    ]
    student = headed(nodes, ["n", 4], opset=11)
    loss, said = started(student, {"x": X}, MOVED, Objective(temperature=2))
    assert said == {"y": "soft targets at T = 2"}
    assert loss == pytest.approx(soft(logits(student, X), logits(MOVED, X)), rel=1e-4)


def test_probabilities_of_a_student_whose_teacher_gives_logits() -> None:
    plain, y = headed([node("Identity", ["z"], ["y"])], ["n", 1], 1), np.arange(COUNT) % 2
    p = sigmoid(logits(plain, X))[:, 0]
    loss, said = started(binary("as Tanh"), {"x": X, "y": y}, plain, Objective(temperature=2, alpha=0.25))
    assert said == {"y": "0.25 x binary cross-entropy + 0.75 x soft targets at T = 2"}
    assert loss == pytest.approx(-0.25 * np.where(y, np.log(p), np.log(1 - p)).mean(), rel=1e-4)


def test_the_temperature_of_a_single_logit_follows_its_size() -> None:
    z = floats(50, 1) * 1000
    assert Objective().temperature_for(z, 1, "binary") == pytest.approx(np.abs(z).mean(), rel=1e-6)
    assert Objective().temperature_for(z[:, 0], 1, "binary") == pytest.approx(np.abs(z).mean(), rel=1e-6)
    assert Objective().temperature_for(floats(50, 1), 1, "binary") == 2


def test_smoothing_without_labels_of_classes_is_refused() -> None:
    of = headed([node("Identity", ["z"], ["y"])], ["n", 4])
    with pytest.raises(DataError, match="--smoothing: is of labels of classes, and there are none"):
        started(of, {"x": X, "y": floats(COUNT, 4)}, objective=Objective(smoothing=0.1))


@pytest.mark.parametrize("labelled", ["p", "q"])
def test_labels_go_to_the_output_that_has_a_head(labelled: str) -> None:
    first, second = ("q", "p") if labelled == "p" else ("p", "q")
    nodes = [node("Gemm", ["x", "w"], ["features"]), node("Gemm", ["x", "v"], ["z"])]
    nodes.append(node("Softmax", ["z"], [labelled]))
    nodes.append(node("Identity", ["features"], [second if labelled == first else first]))
    given = tensors(w=floats(6, 8), v=floats(6, 4, seed=1))
    other = "q" if labelled == "p" else "p"
    shapes = {labelled: 4, other: 8}
    declared = [info(name, ["n", shapes[name]]) for name in (other, labelled)]
    of = model(graph(nodes, [info("x", ["n", 6])], declared, given))
    _, said = started(of, {"x": X, "y": np.arange(COUNT) % 4})
    assert said == {labelled: "1 x cross-entropy", other: f"not learned, the labels are {labelled}'s"}
