"""What PyTorch was asked at the edges: zeros that formulas divide by, kinks and ties, masks of -inf, nothing at all."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from tests.autodiff.cases import Case, floats, ints

HOLES = np.array([[0, 2, 3], [0, 0, 3], [1, 2, 3], [0, 0, 0]], np.float32)
INF = np.float32(np.inf)


def zeros() -> Iterator[Case]:
    """Sums, products and norms of zeros."""
    for keep in (0, 1):
        yield Case("ReduceL2", {"x": HOLES}, {"keepdims": keep}, {"axes": ints(1)})
        yield Case("ReduceProd", {"x": HOLES}, {"keepdims": keep}, {"axes": ints(-1)})
    yield Case("ReduceProd", {"x": HOLES[:2]}, {"keepdims": 0})
    yield Case("ReduceProd", {"x": HOLES.reshape(2, 2, 3)}, {"axes": [0, 2]}, opset=13)
    for exclusive, reverse in itertools.product((0, 1), (0, 1)):
        attributes = {"exclusive": exclusive, "reverse": reverse}
        yield Case("CumProd", {"x": HOLES}, attributes, {"axis": np.int64(-1)}, opset=26)
        yield Case("CumProd", {"x": floats(3, 2, 2)}, attributes, {"axis": np.int64(0)}, opset=26)
    yield Case("LpPool", {"x": np.array([[[0, 0, 1, 2]]], np.float32)}, {"kernel_shape": [2], "strides": [2]})
    for x, p in itertools.product(([0.0, 1.5, -2.0], [0.5, 1.5, 2.0]), (0.0, 1.0, 2.0)):
        yield Case("Pow", {"x": np.array(x, np.float32)}, constants={"p": np.float32(p)})
    yield Case("Pow", {"x": np.array([0, 0, 0, 1.5], np.float32), "p": np.array([0, 2, 1, 0], np.float32)})
    yield Case("Pow", {"x": floats(2, 3, low=0.5), "p": np.array([1.5], np.float32)})
    yield Case("normalize", {"x": HOLES}, constants={"axes": ints(1), "eps": np.float32(1e-12)}, nodes=NORMALIZE)


NORMALIZE = ["n = ReduceL2 (x, axes)", "m = Clip (n, eps)", "s = Shape (x)", "d = Expand (m, s)", "y = Div (x, d)"]


def stopped() -> Iterator[Case]:
    """An infinite slope behind something that lets nothing through."""
    x = {"x": np.array([-1.5, 0.25, 1, -0.5], np.float32)}
    zero = {"zero": np.float32(0)}
    yield Case("root", x, nodes=["p = Relu (x)", "y = Sqrt (p)"])
    yield Case("root", x, constants=zero, nodes=["p = Clip (x, zero)", "y = Sqrt (p)"])
    yield Case("root", x, constants=zero, nodes=["p = Max (x, zero)", "y = Sqrt (p)"])
    yield Case("root", x, constants={"p": np.float32(0.25)}, nodes=["r = Relu (x)", "y = Pow (r, p)"])
    yield Case("root", x, constants=zero, nodes=["c = Greater (x, zero)", "p = Where (c, x, zero)", "y = Sqrt (p)"])
    wide = {"x": np.array([-1.5, 0.25, 2, -0.5], np.float32)}
    for op in ("Acos", "Asin"):
        ends = {"low": np.float32(-1), "high": np.float32(1)}
        yield Case(op, wide, constants=ends, nodes=["p = Clip (x, low, high)", f"y = {op} (p)"])
    one = {"one": np.float32(1)}
    yield Case("Acosh", wide, constants=one, nodes=["p = Max (x, one)", "y = Acosh (p)"])


def masked() -> Iterator[Case]:
    """-inf in what exponentials are taken of."""
    feeds = {"x": floats(2, 4), "c": np.array([[True, False, True, True], [True, True, True, False]])}
    low = {"low": np.float32(-np.inf)}
    mask = "m = Where (c, x, low)"
    yield Case("Softmax", feeds, constants=low, nodes=[mask, "y = Softmax (m)"])
    back = ["l = LogSoftmax (m)", "y = Where (c, l, zero)"]
    yield Case("LogSoftmax", feeds, constants={**low, "zero": np.float32(0)}, nodes=[mask, *back])
    total = "y = ReduceLogSumExp <keepdims = 0> (m, axes)"
    yield Case("ReduceLogSumExp", feeds, constants={**low, "axes": ints(1)}, nodes=[mask, total])


def kinks() -> Iterator[Case]:
    """The side PyTorch takes; values far out."""
    corner = np.array([-1e4, -3, -1, 0, 1, 3, 1e4], np.float32)
    for op in ("Relu", "LeakyRelu", "Elu", "Selu", "Celu", "Abs", "HardSwish", "ThresholdedRelu", "Softsign", "Mish"):
        yield Case(op, {"x": corner})
    yield Case("Softplus", {"x": corner[1:]})
    yield Case("Shrink", {"x": corner}, {"lambd": 1.0})
    yield Case("PRelu", {"x": corner, "s": np.array([0.25], np.float32)})
    for op in ("Max", "Min"):
        yield Case(op, {"a": np.array([1, 2, 3], np.float32), "b": np.array([1, 3, 2], np.float32)})
        yield Case(op, {"a": np.array([[1, 2], [3, 1]], np.float32), "b": np.array([1, 2], np.float32)})
    bounds = {"low": np.float32(-1), "high": np.float32(1)}
    yield Case("Clip", {"x": corner}, constants=bounds)
    yield Case("Clip", {"x": corner, **bounds})
    yield Case("Clip", {"x": np.array([0, 2, 4], np.float32), "low": np.float32(3), "high": np.float32(1)})
    yield Case("TopK", {"x": floats(3, 5)}, {}, {"k": ints(2)}, outputs=("y", ""))
    yield Case("Split", {"x": floats(3, 5)}, {"axis": 1}, {"k": ints(1, 2, 2)}, outputs=("y", "", "z"))


def nothing() -> Iterator[Case]:
    """Tensors without elements, and scalars."""
    none = {"x": floats(0, 3)}
    for op in ("Relu", "Softmax", "Exp"):
        yield Case(op, none)
    yield Case("MatMul", {**none, "w": floats(3, 2)})
    yield Case("Gemm", {**none, "w": floats(3, 2), "b": floats(2)})
    yield Case("Add", {**none, "b": floats(3)})
    yield Case("Reshape", none, constants={"s": ints(0, 3, 1)})
    yield Case("Reshape", {"x": floats(3, 0)}, {"allowzero": 1}, {"s": ints(0, 5)})
    yield Case("Squeeze", {"x": floats(3, 1, 0)}, constants={"a": ints(1)})
    yield Case("Transpose", none, {"perm": [1, 0]})
    yield Case("Concat", {**none, "b": floats(2, 3)}, {"axis": 0})
    yield Case("ReduceSum", none, {"keepdims": 0}, {"axes": ints(1)})
    yield Case("ReduceSum", none, {"keepdims": 0}, {"axes": ints(0)})
    yield Case("Slice", {"x": floats(4, 3)}, constants={"s": ints(3), "e": ints(1), "a": ints(0)})
    yield Case("Gather", {"x": floats(4, 3), "i": ints()}, wrt=["x"])
    yield Case("Expand", {"x": floats(1, 3)}, constants={"s": ints(0, 3)})
    scalar = {"x": np.float32(1.5)}
    for op in ("ReduceSum", "ReduceMean", "Exp", "Identity"):
        yield Case(op, scalar)
    yield Case("Unsqueeze", scalar, constants={"a": ints(0, 1)})
    yield Case("Expand", scalar, constants={"s": ints(2, 3)})
    for op in ("Softmax", "LogSoftmax"):
        yield Case(op, {"x": floats(4)})


def broadcast_labels() -> Iterator[Case]:
    for equation, *sizes in (("ij,jk->ik", (2, 1), (3, 4)), ("ij,ij->i", (2, 1), (2, 3)), ("ij,jk->", (2, 3), (1, 4))):
        feeds = {name: floats(*s, seed=i) for i, (name, s) in enumerate(zip("ab", sizes, strict=True))}
        yield Case("Einsum", feeds, {"equation": equation})


def interpolation() -> Iterator[Case]:
    image, grid = floats(2, 2, 3, 4), floats(2, 2, 3, 2, low=-1.7, high=1.7)
    edge = np.array([[[[-1, -1], [1, 1], [0, 1]], [[-1, 0.5], [1, -0.5], [0.25, 0]]]], np.float32)
    for mode, padding, aligned in itertools.product(
        ("linear", "nearest", "cubic"), ("zeros", "border", "reflection"), (0, 1)
    ):
        attributes: dict[str, Any] = {"mode": mode, "padding_mode": padding, "align_corners": aligned}
        yield Case(
            "GridSample", {"x": image, "g": grid}, attributes, opset=20, wrt=["x"] if mode == "nearest" else None
        )
        if mode != "cubic" and padding != "reflection":
            wrt = None if padding == "border" and mode == "linear" else ["x"]
            yield Case("GridSample", {"x": image[:1], "g": edge}, attributes, opset=20, wrt=wrt)
    cube = {"x": floats(1, 2, 2, 3, 2), "g": floats(1, 2, 2, 1, 3, low=-1.5, high=1.5)}
    for padding in ("zeros", "reflection"):
        yield Case("GridSample", cube, {"padding_mode": padding}, opset=22)
    yield Case("GridSample", {"x": image, "g": grid}, opset=16)


def overlaps() -> Iterator[Case]:
    block = {"size": ints(4, 5), "block": ints(2, 3)}
    yield Case("Col2Im", {"x": floats(2, 12, 9)}, {}, block)
    yield Case("Col2Im", {"x": floats(1, 6, 9)}, {"pads": [1, 1, 1, 1], "strides": [2, 2]}, block)
    yield Case("Col2Im", {"x": floats(1, 12, 2)}, {"dilations": [2, 2]}, block)
    cache = {"x": floats(2, 3, 4, 2), "u": floats(2, 3, 2, 2)}
    yield Case("TensorScatter", cache, opset=24)
    yield Case("TensorScatter", cache, {}, {"i": ints(1, 2)}, opset=24)
    yield Case("TensorScatter", cache, {"mode": "circular"}, {"i": ints(3, 1)}, opset=24)
    yield Case("TensorScatter", {"x": floats(2, 4, 3), "u": floats(2, 1, 3)}, {"axis": 1}, {"i": ints(3, 0)}, opset=24)


FAMILIES = {f.__name__: f for f in (zeros, stopped, masked, kinks, nothing, broadcast_labels, interpolation, overlaps)}
