"""The blocked form of a gradient graph gives the gradients of the plain one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxcompress.autodiff.engine import gradients
from onnxcompress.model.bridge import clone
from onnxcompress.runtime.session import open_session
from onnxcompress.training.blocked import block_size, lower
from tests.builders import floats, graph, info, model, node, tensors

BLOCK = block_size()
needs_kernels = pytest.mark.skipif(not BLOCK, reason="this machine has no blocked kernels")


def graded(nodes: Sequence[onnx.NodeProto], image: Sequence[int], **arrays: np.ndarray) -> tuple[ir.Model, list[str]]:
    """A model with image x -> y, its weights inputs, and the gradients of sum(y * y) as its outputs, x's among them."""
    tail = [node("ReduceSumSquare", ["y"], ["loss"], keepdims=0)]
    inputs = [info("x", ["n", *image[1:]]), *(info(name, array.shape) for name, array in arrays.items())]
    proto = model(graph([*nodes, *tail], inputs, [info("loss", [])]), opset=17)
    found = ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(proto))
    names = ["x", *arrays]
    wanted = gradients(found, {"loss": None}, names)
    for name in names:
        found.graph.outputs.append(wanted[name])
    return found, [str(value.name) for value in found.graph.outputs]


def check(nodes: Sequence[onnx.NodeProto], image: Sequence[int], moved: int, **arrays: np.ndarray) -> ir.Model:
    """Run plain and blocked; `moved`: how many convolutions must have become blocked."""
    feeds = {"x": floats(*image, seed=7), **arrays}
    plain, names = graded(nodes, image, **arrays)
    with open_session(plain) as session:
        truth = list(session.run(feeds).values())
    blocked = clone(graded(nodes, image, **arrays)[0])  # as the runner does, which keeps the plain one
    assert lower(blocked, {name: array.shape for name, array in feeds.items()}, BLOCK) == moved
    assert [value.name for value in blocked.graph.outputs] == names
    if moved:  # every product of a weight's gradient was written anew
        products = [str(n.name) for n in blocked.graph if n.op_type in ("Gemm", "MatMul")]
        assert all("/blocked/" in name for name in products)
    with open_session(blocked) as session:
        found = list(session.run(feeds).values())
    for name, a, b in zip(names, truth, found, strict=True):
        assert a.shape == b.shape, name
        assert np.abs(a - b).max() <= 1e-5 * max(1e-3, np.abs(a).max()), name
    return blocked


@needs_kernels
@pytest.mark.parametrize("channels", [(32, 48), (24, 40), (3, 16), (8, 5), (20, 33)])
@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"pads": [1, 1, 1, 1]},
        {"pads": [0, 1, 2, 1], "dilations": [2, 1]},
        {"pads": [1, 1, 1, 1], "strides": [2, 2]},
        {"strides": [2, 3], "pads": [1, 0, 0, 1]},
        {"auto_pad": "VALID"},
    ],
)
def test_convolution(channels: tuple[int, int], attributes: dict[str, Any]) -> None:
    c, m = channels
    nodes = [node("Conv", ["x", "w", "b"], ["y"], **attributes)]
    strided = max(attributes.get("strides", [1])) > 1
    check(nodes, (4, c, 9, 8), 1 if strided else 2, w=floats(m, c, 3, 3, seed=1), b=floats(m, seed=2))


@needs_kernels
@pytest.mark.parametrize("channels", [16, 24, 40])
@pytest.mark.parametrize(
    "attributes",
    [
        {"pads": [1, 1, 1, 1]},
        {"pads": [1, 1, 1, 1], "strides": [2, 2]},
        {"pads": [0, 0, 1, 1], "strides": [2, 2]},
        {"pads": [2, 2, 2, 2], "dilations": [2, 2]},
        {},
    ],
)
def test_depthwise(channels: int, attributes: dict[str, Any]) -> None:
    nodes = [node("Conv", ["x", "w"], ["y"], group=channels, **attributes)]
    check(nodes, (3, channels, 9, 8), 2, w=floats(channels, 1, 3, 3, seed=1))


@needs_kernels
@pytest.mark.parametrize("strides", [[1, 1], [2, 2], [2, 1]])
def test_pointwise(strides: list[int]) -> None:
    nodes = [node("Conv", ["x", "w"], ["y"], strides=strides)]
    check(nodes, (4, 24, 7, 8), 2, w=floats(40, 24, 1, 1, seed=1))


@needs_kernels
def test_what_lies_between_stays_blocked() -> None:
    """A residual block with a channelwise scale, squeeze and excitation, a clip and a pooling at its end."""
    nodes = [
        node("Conv", ["x", "w1"], ["a"], pads=[1, 1, 1, 1]),
        node("Mul", ["a", "scale"], ["b"]),
        node("Clip", ["b", "low", "high"], ["c"]),
        node("GlobalAveragePool", ["c"], ["s"]),
        node("Sigmoid", ["s"], ["t"]),
        node("Mul", ["c", "t"], ["d"]),
        node("Conv", ["d", "w2"], ["e"], pads=[1, 1, 1, 1], group=24),
        node("Add", ["e", "a"], ["f"]),
        node("Relu", ["f"], ["g"]),
        node("MaxPool", ["g"], ["y"], kernel_shape=[2, 2], strides=[2, 2]),
    ]
    arrays = {
        "w1": floats(24, 16, 3, 3, seed=1) * 0.2,
        "scale": floats(24, 1, 1, seed=2),
        "low": np.array(-1.0, np.float32),
        "high": np.array(1.0, np.float32),
        "w2": floats(24, 1, 3, 3, seed=3),
    }
    tail = [node("ReduceSumSquare", ["y"], ["loss"], keepdims=0)]
    constants = tensors(low=arrays.pop("low"), high=arrays.pop("high"))

    def build() -> ir.Model:
        inputs = [info("x", [2, 16, 8, 8]), *(info(name, array.shape) for name, array in arrays.items())]
        proto = model(graph([*nodes, *tail], inputs, [info("loss", [])], constants), opset=17)
        found = ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(proto))
        found.graph.outputs.extend(gradients(found, {"loss": None}, ["x", *arrays]).values())
        return found

    feeds = {"x": floats(2, 16, 8, 8, seed=5), **arrays}
    plain, blocked = build(), build()
    assert lower(blocked, {name: array.shape for name, array in feeds.items()}, BLOCK) == 4
    with open_session(plain) as one, open_session(blocked) as other:
        for a, b in zip(one.run(feeds).values(), other.run(feeds).values(), strict=True):
            assert np.abs(a - b).max() <= 1e-5 * np.abs(a).max()
    reorders = sum(n.op_type in ("ReorderInput", "ReorderOutput") for n in blocked.graph)
    assert reorders <= 12  # the image, the gradient that enters, and what pooling and the weights' gradients want


@needs_kernels
@pytest.mark.parametrize("channels", [2, 5, 16, 30])
def test_a_gradient_of_any_number_of_channels_enters(channels: int) -> None:
    """What comes back from a layer that is not blocked has to be reordered first."""
    nodes = [
        node("Conv", ["x", "w"], ["a"], pads=[1, 1, 1, 1]),
        node("Transpose", ["a"], ["y"], perm=[0, 2, 3, 1]),
    ]
    check(nodes, (2, 17, 5, 6), 2, w=floats(channels, 17, 3, 3, seed=1))


@needs_kernels
def test_a_normalization_stays_blocked() -> None:
    nodes = [
        node("Conv", ["x", "w"], ["a"], pads=[1, 1, 1, 1]),
        node("BatchNormalization", ["a", "scale", "bias", "mean", "variance"], ["b"], epsilon=1e-3),
        node("Relu", ["b"], ["y"]),
    ]
    arrays = {name: floats(20, seed=i) for i, name in enumerate(("scale", "bias", "mean"), 2)}
    arrays["variance"] = np.abs(floats(20, seed=9)) + 0.1
    moved = check(nodes, (2, 16, 5, 6), 2, w=floats(20, 16, 3, 3, seed=1), **arrays)
    assert all(n.op_type != "BatchNormalization" for n in moved.graph)


@needs_kernels
def test_channels_that_were_added_spoil_nothing() -> None:
    """Where a root is taken of what is positive in every channel that there is, and -0.5 in those that were added."""
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Mul", ["a", "a"], ["b"]),
        node("Add", ["b", "one"], ["c"]),
        node("Sub", ["c", "half"], ["d"]),
        node("Sqrt", ["d"], ["e"]),
        node("Conv", ["e", "v"], ["y"]),
    ]
    arrays = {"one": np.ones((20, 1, 1), np.float32), "half": np.array([[[0.5]]], np.float32)}
    w, v = floats(20, 16, 3, 3, seed=1) * 0.1, floats(16, 20, 1, 1, seed=2)
    check(nodes, (2, 16, 6, 6), 4, w=w, v=v, **arrays)


@needs_kernels
def test_what_it_cannot_move_stays() -> None:
    """Grouped but not depthwise, and one-dimensional."""
    grouped = [node("Conv", ["x", "w"], ["y"], group=2)]
    check(grouped, (2, 32, 6, 6), 0, w=floats(32, 16, 3, 3, seed=1))


def test_without_kernels_nothing_moves() -> None:
    nodes = [node("Conv", ["x", "w"], ["y"])]
    found, _ = graded(nodes, (2, 16, 6, 6), w=floats(16, 16, 3, 3))
    before = [n.op_type for n in found.graph]
    assert lower(found, {"x": (2, 16, 6, 6)}, 0) == 0
    assert [n.op_type for n in found.graph] == before


def test_block_size_is_one_of_the_known() -> None:
    assert BLOCK in (0, 4, 8, 16, 32)
