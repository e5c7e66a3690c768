"""Which weights are drawn anew, and how."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress.model import bridge
from onnxcompress.model.load import load
from onnxcompress.model.weights import weights
from onnxcompress.training.initial import SLOPE, TABLE, randomize
from tests.builders import floats, function, graph, info, model, node, tensors
from tests.house import BUNDLED, bundled

C, WIDE = 64, 256


def encoder() -> ir.Model:
    """ids -> words + positions -> LayerNormalization -> up, Relu, down -> scale, shift -> PRelu -> GRU -> Conv -> z."""
    nodes = [
        node("Gather", ["words", "ids"], ["e"]),
        node("Add", ["e", "positions"], ["p"]),
        node("LayerNormalization", ["p", "gamma", "beta"], ["l"]),
        node("MatMul", ["l", "up"], ["u"]),
        node("Add", ["u", "bias"], ["ub"]),
        node("Relu", ["ub"], ["r"]),
        node("MatMul", ["r", "down"], ["d"]),
        node("Mul", ["d", "scale"], ["s"]),
        node("Add", ["s", "shift"], ["t"]),
        node("PRelu", ["t", "slope"], ["a"]),
        node("Exp", ["temperature"], ["warm"]),
        node("Mul", ["a", "warm"], ["b"]),
        node("Transpose", ["b"], ["time_first"], perm=[1, 0, 2]),
        node("GRU", ["time_first", "W", "R", "B"], ["states"], hidden_size=C),
        node("Squeeze", ["states", "one"], ["c"]),
        node("Transpose", ["c"], ["f"], perm=[1, 2, 0]),
        node("Conv", ["f", "kernel"], ["z"], kernel_shape=[3]),
    ]
    held = tensors(
        words=floats(500, C),
        positions=floats(1, 8, C),
        gamma=floats(C),
        beta=floats(C),
        up=floats(C, WIDE),
        bias=floats(WIDE),
        down=floats(WIDE, C),
        scale=floats(C),
        shift=floats(C),
        slope=floats(C),
        temperature=floats(C),
        W=floats(1, 3 * C, C),
        R=floats(1, 3 * C, C),
        B=floats(1, 6 * C),
        kernel=floats(128, C, 3),
        one=np.array([1]),
    )
    return load(model(graph(nodes, [info("ids", ["n", 8], 7)], [info("z", ["n", 128, 6])], held)))


def drawn(of: ir.Model, seed: int = 0) -> dict[str, np.ndarray]:
    randomize(of, seed)
    return {weight.key: np.array(weight.array()) for weight in weights(of)}


def test_each_role_is_drawn_as_its_source_says() -> None:
    found = drawn(encoder())
    normal = {
        "words": TABLE,
        "positions": TABLE,
        "up": (2 / (C + WIDE)) ** 0.5,  # Glorot: its input is normalized
        "down": (2 / WIDE) ** 0.5,  # He: its input is rectified
        "kernel": (2 / (C * 3)) ** 0.5,
        "W": (1 / (3 * C)) ** 0.5,  # uniform within 1 / sqrt(C)
        "R": (1 / C) ** 0.5,  # orthogonal
    }
    for key, deviation in normal.items():
        spread = 4 / np.sqrt(2 * found[key].size)  # four standard errors
        assert found[key].std() == pytest.approx(deviation, rel=spread), key
        assert abs(found[key].mean()) < 4 * deviation / np.sqrt(found[key].size), key
    assert 0.99 / np.sqrt(C) < np.abs(found["W"]).max() <= 1 / np.sqrt(C)
    gates = found["R"].reshape(-1, C, C).astype(np.float64)
    np.testing.assert_allclose(gates @ gates.swapaxes(1, 2), np.broadcast_to(np.eye(C), gates.shape), atol=1e-5)
    assert abs(gates.mean()) < 4 / C / np.sqrt(len(gates))
    constant = {"gamma": 1, "beta": 0, "bias": 0, "scale": 1, "shift": 0, "slope": SLOPE, "B": 0}
    for key, value in constant.items():
        assert (found[key] == value).all(), key
    np.testing.assert_array_equal(found["temperature"], floats(C))


def test_a_weight_behind_normalization_and_a_mask_in_front_of_it() -> None:
    """Weight normalization keeps the length and draws the direction; a mask stays."""
    nodes = [
        node("Mul", ["v", "mask"], ["pruned"]),
        node("ReduceL2", ["pruned"], ["length"], axes=[0], keepdims=1),
        node("Div", ["pruned", "length"], ["unit"]),
        node("Mul", ["unit", "g"], ["w"]),
        node("MatMul", ["x", "w"], ["z"]),
    ]
    mask = (floats(C, 8) > 0).astype(np.float32)
    given = {"v": 3 * floats(C, 8, seed=1), "g": floats(1, 8, seed=2), "mask": mask}
    of = load(model(graph(nodes, [info("x", ["n", C])], [info("z", ["n", 8])], tensors(**given))))
    found = drawn(of)
    np.testing.assert_array_equal(found["g"], given["g"])
    np.testing.assert_array_equal(found["mask"], mask)
    assert found["v"].std() == pytest.approx(3, rel=0.15)
    assert abs(np.corrcoef(found["v"].ravel(), given["v"].ravel())[0, 1]) < 0.2


def test_an_embedding_that_is_the_last_layer_too_is_drawn_as_an_embedding() -> None:
    nodes = [
        node("Gather", ["words", "ids"], ["e"]),
        node("Tanh", ["e"], ["h"]),
        node("Transpose", ["words"], ["head"], perm=[1, 0]),
        node("MatMul", ["h", "head"], ["z"]),
    ]
    body = graph(nodes, [info("ids", ["n", 4], 7)], [info("z", ["n", 4, 200])], tensors(words=floats(200, 32)))
    assert drawn(load(model(body)))["words"].std() == pytest.approx(TABLE, rel=0.05)


def test_weights_in_functions_are_drawn_too() -> None:
    inner = [node("Constant", [], ["w"], value=tensors(w=floats(6, 4))[0]), node("MatMul", ["a", "w"], ["b"])]
    of = load(
        model(
            graph([node("F", ["x"], ["z"], domain="test")], [info("x", ["n", 6])], [info("z", ["n", 4])]),
            functions=[function("F", ["a"], ["b"], inner)],
            domains={"test": 1},
        )
    )
    assert randomize(of, 0) == 1
    (weight,) = weights(of)
    assert not np.array_equal(weight.array(), floats(6, 4))
    assert len(of.functions) == 1


def test_nothing_of_a_bundled_model_is_left_as_it_was_learned() -> None:
    for name in BUNDLED:
        of = load(bundled(name))
        before = {weight.key: np.array(weight.array()) for weight in weights(of)}
        after = drawn(of)
        assert [key for key in before if np.array_equal(before[key], after[key])] == []


def test_a_draw_depends_on_the_seed_and_the_name_alone() -> None:
    of = load(bundled("digits_gru"))
    one, again, other = (drawn(bridge.clone(of), seed) for seed in (1, 1, 2))
    assert all(np.array_equal(one[key], again[key]) for key in one)
    assert not np.array_equal(one["both.W"], other["both.W"])
