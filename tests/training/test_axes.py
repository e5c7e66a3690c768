"""Inputs and outputs whose samples do not lie along the first axis, and several inputs shuffled together."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress.data.axes import batch_axes
from onnxcompress.data.specs import InputSpec
from onnxcompress.errors import DataError
from onnxcompress.model.load import load
from onnxcompress.training import samples
from onnxcompress.training.distill import Settings, Trained, distill
from onnxcompress.training.order import Order
from tests.builders import floats, graph, info, model, node, tensors
from tests.training.small import opened

COUNT = 24
SETTINGS = Settings(epochs=3, batch=8, lr=1e-2)


def stateful(state_at: int, batch: str = "n") -> ir.Model:
    """x [n, 6], state [2, n, 4] (samples at 1) or [n, 2, 4] (at 0) -> z = tanh(x w + sum of the state v), and twice z
    as the next state."""
    layers = 1 - state_at
    nodes = [
        node("MatMul", ["x", "w"], ["h"]),
        node("MatMul", ["state", "v"], ["turned"]),
        node("ReduceSum", ["turned", "layers"], ["s"], keepdims=0),
        node("Add", ["h", "s"], ["a"]),
        node("Tanh", ["a"], ["z"]),
        node("Unsqueeze", ["z", "layers"], ["one"]),
        node("Concat", ["one", "one"], ["after"], axis=layers),
    ]
    given = tensors(w=floats(6, 4, seed=1), v=floats(4, 4, seed=2), layers=np.array([layers]))
    shape: list[int | str] = [batch, batch, 4]
    shape[layers] = 2
    inputs = [info("x", [batch, 6]), info("state", shape)]
    return load(model(graph(nodes, inputs, [info("z", [batch, 4]), info("after", shape)], given)))


def rows() -> dict[str, np.ndarray]:
    """Samples along the first axis."""
    return {"x": floats(COUNT, 6, seed=3), "state": floats(COUNT, 2, 4, seed=4)}


def whole_calls(size: int) -> dict[str, np.ndarray]:
    """The same samples as calls of `size`, the state as a model with samples at 1 wants it."""
    x, state = (array.reshape(COUNT // size, size, *array.shape[1:]) for array in rows().values())
    return {"x": x, "state": np.ascontiguousarray(state.swapaxes(1, 2))}


def taught(of: ir.Model, source: Any, **settings: Any) -> Trained:
    """Trained towards a teacher with other weights."""
    teacher = load_again(of)
    return distill(teacher, of, opened(of, source, 8), settings=Settings(**{**vars(SETTINGS), **settings}))


def load_again(of: ir.Model) -> ir.Model:
    teacher = of.clone()
    for name, value in teacher.graph.initializers.items():
        if name in "wv":
            value.const_value = ir.tensor(np.asarray(value.const_value) * np.float32(0.5), name=name)
    return teacher


@pytest.mark.parametrize(
    ("shapes", "axes"),
    [
        ({"x": ("n", 6), "state": (2, "n", 4)}, {"x": 0, "state": 1}),
        ({"input": (None, None), "state": (2, None, 128), "sr": ()}, {"input": 0, "state": 1}),
        ({"input": (None, 4), "context": (2, None, 128)}, {"input": 0, "context": 1}),
        ({"frames": ("time", "batch", 40), "lengths": ("batch",)}, {"frames": 1, "lengths": 0}),
        ({"image": ("batch", 3, "h", "w"), "text": ("batch", "seq")}, {"image": 0, "text": 0}),
        ({"a": (1, 1, 257), "b": (1, 2, 128, 2)}, {"a": 0, "b": 0}),
        ({"ids": ("batch", "seq"), "positions": ("seq",)}, {"ids": 0, "positions": 0}),
        ({"x": None}, {"x": 0}),
    ],
)
def test_where_samples_lie(shapes: dict[str, Any], axes: dict[str, int]) -> None:
    assert batch_axes([InputSpec(name, np.dtype(np.float32), shape) for name, shape in shapes.items()]) == axes


@pytest.mark.parametrize("size", [1, 4])
def test_where_the_samples_lie_changes_nothing(size: int) -> None:
    """Trained on rows, on whole calls of one and of several samples, and with its axes in another order."""
    wanted = taught(stateful(0), rows())
    for done in (taught(stateful(1), whole_calls(size)), taught(stateful(1), rows())):
        assert done.steps == wanted.steps == 9
        np.testing.assert_allclose([e.loss for e in done.epochs], [e.loss for e in wanted.epochs], rtol=1e-5)
        for key, parts in wanted.parameters.items():
            np.testing.assert_allclose(done.parameters[key]["w"], parts["w"], atol=2e-6)
    assert wanted.epochs[-1].loss < 0.9 * wanted.epochs[0].loss


def test_outputs_whose_samples_lie_elsewhere_are_learned_when_asked_for() -> None:
    wanted = taught(stateful(0), rows(), outputs=("z", "after"))
    done = taught(stateful(1), whole_calls(1), outputs=("z", "after"))
    assert done.losses.keys() == {"z", "after"}
    for key, parts in wanted.parameters.items():
        np.testing.assert_allclose(done.parameters[key]["w"], parts["w"], atol=2e-6)


def test_a_state_of_nothing_trains() -> None:
    zeros = {**whole_calls(1), "state": np.zeros((COUNT, 2, 1, 4), np.float32)}
    done = taught(stateful(1), zeros, weight_decay=0.0)
    np.testing.assert_array_equal(done.parameters["v"]["w"], floats(4, 4, seed=2))  # meets zeros alone


def test_the_samples_of_several_inputs_stay_together() -> None:
    """Two towers, one of them with its samples elsewhere; one value for all calls goes with each of them."""
    nodes = [
        node("MatMul", ["x", "w"], ["a"]),
        node("ReduceSum", ["state", "layers"], ["s"], keepdims=0),
        node("Add", ["a", "s"], ["b"]),
        node("Mul", ["b", "rate"], ["z"]),
    ]
    given = tensors(w=floats(6, 4), layers=np.array([0]))
    inputs = [info("x", ["n", 6]), info("state", [2, "n", 4]), info("rate", [])]
    of = load(model(graph(nodes, inputs, [info("z", ["n", 4])], given)))
    numbers = np.arange(COUNT, dtype=np.float32)
    x = np.repeat(numbers[:, None], 6, axis=1)[:, None]  # every number tells which sample it is of
    state = np.broadcast_to(numbers[:, None, None, None], (COUNT, 2, 1, 4)).astype(np.float32)
    source = {"x": x, "state": state, "rate": np.full(COUNT, 3, np.float32), "y": numbers}
    found = samples.collect(opened(of, source))
    chosen = Order(COUNT, 8, seed=5).samples(2)
    assert not np.array_equal(chosen, np.sort(chosen))
    feeds, _ = found.call(chosen)
    assert {name: array.shape for name, array in feeds.items()} == {"x": (8, 6), "state": (2, 8, 4), "rate": ()}
    np.testing.assert_array_equal(feeds["x"], np.repeat(chosen[:, None], 6, axis=1))
    np.testing.assert_array_equal(feeds["state"], np.broadcast_to(chosen[None, :, None], (2, 8, 4)))
    assert found.labels is not None
    np.testing.assert_array_equal(found.labels[chosen], chosen)
    assert feeds["rate"] == 3
    source["rate"] = numbers
    with pytest.raises(DataError, match="'rate' has one value a call"):
        samples.collect(opened(of, source))


def test_inputs_that_hold_different_numbers_of_samples_are_refused() -> None:
    calls = {**whole_calls(4), "state": floats(COUNT // 4, 2, 3, 4)}
    with pytest.raises(DataError, match="'x' 4, 'state' 3"):
        samples.collect(opened(stateful(1), calls))


def test_labels_of_whole_calls_belong_to_their_samples() -> None:
    labels = np.arange(COUNT).reshape(COUNT // 4, 4)
    found = samples.collect(opened(stateful(1), {**whole_calls(4), "y": labels}))
    assert found.labels is not None
    assert found.labels.tolist() == list(range(COUNT))
    np.testing.assert_array_equal(found.feeds["state"], rows()["state"])
