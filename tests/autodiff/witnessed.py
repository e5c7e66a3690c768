"""What PyTorch was asked: every operator with a rule that it has as well, over its attributes, in tiny shapes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from onnx import helper

from tests.autodiff.cases import Case, floats, ints
from tests.autodiff.checking import model_of
from tests.autodiff.witnessed_edges import FAMILIES as EDGES

MS = "com.microsoft"
LINE = np.array([-2.2, -1.3, -0.7, -0.2, 0.15, 0.3, 0.8, 1.4, 1.9], np.float32)  # away from all kinks
UNARY = ["Abs", "Asinh", "Atan", "Celu", "Cos", "Cosh", "Elu", "Erf", "Exp", "HardSigmoid", "HardSwish", "Identity"]
UNARY += ["LeakyRelu", "Mish", "Neg", "Reciprocal", "Relu", "Selu", "Shrink", "Sigmoid", "Sin", "Sinh", "Softplus"]
UNARY += ["Softsign", "Tan", "Tanh", "ThresholdedRelu"]
INTERVALS = {"Asin": (-0.8, 0.8), "Acos": (-0.8, 0.8), "Atanh": (-0.8, 0.8), "Acosh": (1.5, 3), "Log": (0.5, 2)}
ATTRIBUTES: dict[str, dict[str, Any]] = {
    "LeakyRelu": {"alpha": 0.3},
    "Elu": {"alpha": 1.7},
    "Selu": {"alpha": 1.5, "gamma": 1.2},
    "Celu": {"alpha": 0.7},
    "ThresholdedRelu": {"alpha": 0.4},
    "Shrink": {"lambd": 0.9, "bias": 0.2},
    "HardSigmoid": {"alpha": 0.3, "beta": 0.4},
}
BROADCASTS = [((2, 3), (2, 3)), ((2, 3), (3,)), ((2, 1), (1, 3)), ((), (2, 3)), ((2, 1, 3), (4, 1))]
REDUCTIONS = ["ReduceSum", "ReduceMean", "ReduceSumSquare", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp"]
REDUCTIONS += ["ReduceProd", "ReduceMax", "ReduceMin"]
EINSUM: list[tuple[str, list[tuple[int, ...]]]] = [
    ("ij,jk->ik", [(2, 3), (3, 4)]),
    ("bhqd,bhkd->bhqk", [(1, 2, 3, 2), (1, 2, 4, 2)]),
    ("i,j->ij", [(2,), (3,)]),
    ("ij->j", [(2, 3)]),
    ("ij,k->i", [(2, 3), (4,)]),
    ("i,i,i->i", [(3,), (3,), (3,)]),
    ("...ij,...jk->...ik", [(2, 2, 3), (1, 3, 2)]),
]


def elementwise() -> Iterator[Case]:
    for op in UNARY:
        yield Case(op, {"x": LINE})
    for op, (low, high) in INTERVALS.items():
        yield Case(op, {"x": floats(7, low=low, high=high)})
    yield Case("Sqrt", {"x": floats(7, low=0.5)})
    for op, attributes in ATTRIBUTES.items():
        yield Case(op, {"x": LINE}, attributes)
    for op in ("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min"):
        for shapes in BROADCASTS:
            a, b = (floats(*shape, low=0.5, high=3, seed=i) for i, shape in enumerate(shapes))
            yield Case(op, {"a": a, "b": b})
    yield Case("Gelu", {"x": LINE}, opset=20)
    yield Case("Gelu", {"x": LINE}, {"approximate": "tanh"}, opset=20)
    yield Case("Swish", {"x": LINE}, {"alpha": 1.5}, opset=24, run=False)
    yield Case("PRelu", {"x": floats(2, 3), "s": floats(3, seed=1)})
    yield Case("PRelu", {"x": floats(2, 3, 2), "s": floats(3, 1, seed=1)})
    yield Case("Mod", {"a": floats(4, low=1), "b": floats(4, low=0.5)}, {"fmod": 1})
    for power in (np.float32(2), np.float32(0.5), floats(3)):
        yield Case("Pow", {"x": floats(2, 3, low=0.5)}, constants={"p": power})
    yield Case("Pow", {"x": floats(5)}, constants={"p": ints(3)})
    yield Case("Clip", {"x": floats(3, 4), "low": np.float32(-0.5), "high": np.float32(0.7)})
    yield Case("Clip", {"x": floats(3, 4), "high": np.float32(0.7)}, inputs=["x", "", "high"])
    many = {"a": floats(2, 3), "b": floats(3), "c": floats(2, 1)}
    yield from (Case(op, many) for op in ("Sum", "Mean", "Max", "Min"))
    yield Case("Where", {"c": np.array([[True], [False]]), "a": floats(2, 3), "b": floats(3)})
    for op in ("Gelu", "QuickGelu", "FastGelu"):
        yield Case(op, {"x": LINE}, domain=MS)
    for op in ("BiasGelu", "FastGelu"):
        yield Case(op, {"x": floats(2, 3), "b": floats(3)}, domain=MS)


def products() -> Iterator[Case]:
    for a, b in [
        ((2, 3), (3, 4)),
        ((5, 2, 3), (3, 4)),
        ((2, 3), (5, 3, 4)),
        ((3,), (3,)),
        ((3,), (5, 3, 4)),
        ((5, 2, 3), (3,)),
        ((1, 4, 2, 3), (3, 1, 3, 2)),
    ]:
        yield Case("MatMul", {"a": floats(*a), "b": floats(*b, seed=1)})
    for trans_a, trans_b, bias in [(0, 0, (4,)), (1, 0, (2, 1)), (0, 1, ()), (1, 1, (2, 4))]:
        feeds = {"a": floats(3, 2) if trans_a else floats(2, 3), "b": floats(4, 3) if trans_b else floats(3, 4)}
        attributes = {"transA": trans_a, "transB": trans_b, "alpha": 0.5, "beta": 2.0}
        yield Case("Gemm", {**feeds, "c": floats(*bias)}, attributes)
    for equation, sizes in EINSUM:
        feeds = {name: floats(*s, seed=i) for i, (name, s) in enumerate(zip("abc", sizes, strict=False))}
        yield Case("Einsum", feeds, {"equation": equation})
    yield Case("FusedMatMul", {"a": floats(2, 4, 3), "b": floats(2, 4, 2)}, {"transA": 1, "alpha": 0.5}, domain=MS)


def along_axes() -> Iterator[Case]:
    for op in REDUCTIONS:
        x = {"x": floats(2, 3, 4, low=0.5 if op in ("ReduceLogSum", "ReduceProd") else -2)}
        for axes, keep in (([1], 1), ([0, 2], 0)):
            yield Case(op, x, {"keepdims": keep}, {"axes": ints(*axes)})
        yield Case(op, x, {"keepdims": 0})
    for op in ("ReduceMax", "ReduceMin"):  # elements that are equal share the gradient
        yield Case(op, {"x": np.array([[1, 2, 2], [3, 3, 3]], np.float32)}, {"keepdims": 0}, {"axes": ints(1)})
    for exclusive, reverse in ((0, 0), (1, 0), (0, 1), (1, 1)):
        attributes = {"exclusive": exclusive, "reverse": reverse}
        yield Case("CumSum", {"x": floats(3, 4)}, attributes, {"axis": np.int64(1)})
    yield Case("LpNormalization", {"x": floats(3, 4)})
    yield Case("LpNormalization", {"x": floats(3, 4)}, {"p": 1, "axis": 0})
    for op in ("Softmax", "LogSoftmax"):
        yield Case(op, {"x": floats(3, 4)})
        yield Case(op, {"x": floats(2, 4, 3)}, {"axis": 1})
    for axis, largest in ((1, 1), (0, 0)):
        attributes = {"axis": axis, "largest": largest}
        yield Case("TopK", {"x": floats(3, 5)}, attributes, {"k": ints(2)}, outputs=("y", "at"))


def movement() -> Iterator[Case]:
    yield Case("Reshape", {"x": floats(2, 6)}, constants={"s": ints(0, -1, 2)})
    yield Case("Flatten", {"x": floats(2, 3, 2)}, {"axis": 2})
    yield Case("Squeeze", {"x": floats(2, 1, 3)}, constants={"a": ints(1)})
    yield Case("Unsqueeze", {"x": floats(2, 3)}, constants={"a": ints(0, -1)})
    yield Case("Transpose", {"x": floats(2, 3, 4)}, {"perm": [1, 2, 0]})
    yield Case("Expand", {"x": floats(3, 1)}, constants={"s": ints(2, 1, 4)})
    yield Case("Concat", {"a": floats(2, 3), "b": floats(2, 1), "c": floats(2, 2)}, {"axis": 1})
    yield Case("Split", {"x": floats(2, 6)}, {"axis": 1}, {"s": ints(1, 2, 3)}, outputs=("y", "z", "u"))
    for starts, ends, axes, steps in [
        ([1, 0], [3, -1], [0, 1], [1, 1]),
        ([-2], [2**31], [1], [1]),
        ([0, 1], [4, 6], [0, 1], [2, 3]),
        ([-1], [-10], [0], [-1]),
    ]:
        constants = {"s": ints(*starts), "e": ints(*ends), "a": ints(*axes), "t": ints(*steps)}
        yield Case("Slice", {"x": floats(4, 6)}, constants=constants)
    yield Case(
        "Pad", {"x": floats(2, 3), "v": np.float32(0.5)}, constants={"p": ints(1, 0, 2, 1)}, inputs=["x", "p", "v"]
    )
    yield Case("Pad", {"x": floats(3, 4)}, constants={"p": ints(-1, 0, 2, -1)})
    yield Case("Pad", {"x": floats(3, 4)}, constants={"p": ints(1, 2), "a": ints(1)}, inputs=["x", "p", "", "a"])
    for mode in ("reflect", "edge", "wrap"):
        pads = ints(0, 0, 1, 2, 0, 0, 1, 1)
        yield Case("Pad", {"x": floats(1, 1, 3, 4)}, {"mode": mode}, {"p": pads}, opset=19)
    yield Case("Tile", {"x": floats(2, 3)}, constants={"r": ints(2, 3)})
    for mode in ("DCR", "CRD"):
        yield Case("DepthToSpace", {"x": floats(1, 8, 2, 2)}, {"blocksize": 2, "mode": mode})
    yield Case("SpaceToDepth", {"x": floats(1, 2, 4, 4)}, {"blocksize": 2})
    yield Case("Trilu", {"x": floats(4, 4)})
    yield Case("Trilu", {"x": floats(4, 4)}, {"upper": 0}, {"k": np.int64(1)})
    yield Case("ReverseSequence", {"x": floats(4, 3, 2)}, constants={"l": ints(2, 4, 1)})
    yield Case("Compress", {"x": floats(4, 3)}, {"axis": 0}, {"c": np.array([True, False, True, True])})


def indexing() -> Iterator[Case]:
    for axis, indices in [(0, ints(0, 2, 2, -1)), (1, np.array([[0, 2], [2, 1]])), (1, np.int64(1)), (0, np.int64(-1))]:
        yield Case("Gather", {"x": floats(5, 3)}, {"axis": axis}, {"i": indices})
    yield Case("Gather", {"x": floats(5, 3, 2), "i": np.array([[0, 2], [2, 1]])}, {"axis": 1}, wrt=["x"])
    yield Case("GatherElements", {"x": floats(3, 4)}, {"axis": 1}, {"i": np.array([[0, 0], [1, 1], [2, 0]])})
    yield Case("GatherND", {"x": floats(3, 4, 2)}, constants={"i": np.array([[0, 1], [2, 3], [0, 1]])})
    yield Case("GatherND", {"x": floats(2, 4, 3)}, {"batch_dims": 1}, {"i": np.array([[[0]], [[2]]])})
    order = ["x", "i", "u"]
    for reduction in ("none", "add"):
        attributes: dict[str, Any] = {"reduction": reduction}
        elements, rows = {"i": np.array([[0, 1], [1, 3]])}, {"i": np.array([[0], [2]])}
        feeds = {"x": floats(3, 4), "u": floats(2, 2)}
        yield Case("ScatterElements", feeds, {"axis": 1, **attributes}, elements, order)
        yield Case("ScatterND", {"x": floats(3, 4), "u": floats(2, 4)}, attributes, rows, order)
    twice = {"i": np.array([[1], [1]])}
    yield Case("ScatterND", {"x": floats(3, 4), "u": floats(2, 4)}, {"reduction": "add"}, twice, order)


CONV: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ((2, 2, 4, 5), (3, 2, 3, 3), {"pads": [1, 1, 1, 1]}),
    ((2, 2, 5, 6), (3, 2, 3, 2), {"strides": [2, 2], "pads": [1, 0, 0, 1]}),
    ((2, 3, 4, 5), (2, 3, 1, 1), {}),
    ((2, 3, 4, 5), (2, 3, 1, 1), {"strides": [2, 2]}),
    ((2, 4, 4, 4), (6, 2, 3, 3), {"group": 2, "pads": [1, 1, 1, 1]}),
    ((2, 4, 5, 5), (4, 1, 3, 3), {"group": 4, "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    ((1, 3, 4, 4), (6, 1, 3, 3), {"group": 3, "pads": [0, 1, 1, 0]}),
    ((1, 2, 7, 6), (3, 2, 3, 3), {"strides": [3, 1], "dilations": [2, 2]}),
    ((1, 2, 5, 6), (3, 2, 3, 3), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    ((1, 2, 5, 6), (3, 2, 2, 3), {"auto_pad": "SAME_LOWER"}),
    ((2, 3, 9), (4, 3, 3), {"strides": [2], "pads": [1, 2], "dilations": [2]}),
    ((2, 4, 8), (4, 1, 5), {"group": 4, "pads": [2, 2]}),
    ((1, 2, 3, 4, 3), (2, 2, 2, 3, 2), {"pads": [0, 1, 0, 1, 1, 1]}),
    ((1, 2, 4, 4, 3), (2, 1, 2, 2, 2), {"group": 2, "strides": [2, 1, 1]}),
]
TRANSPOSED: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ((2, 2, 3, 4), (2, 3, 3, 3), {}),
    ((2, 2, 3, 4), (2, 3, 3, 3), {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]}),
    ((2, 2, 3, 3), (2, 3, 3, 2), {"strides": [2, 1], "pads": [0, 1, 1, 0]}),
    ((1, 4, 3, 3), (4, 2, 2, 3), {"group": 2, "strides": [2, 3]}),
    ((1, 2, 3, 4), (2, 3, 3, 3), {"dilations": [2, 1]}),
    ((1, 2, 3, 4), (2, 3, 3, 3), {"strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    ((1, 2, 3, 4), (2, 3, 4, 3), {"strides": [2, 2], "auto_pad": "SAME_LOWER"}),
    ((1, 2, 3, 4), (2, 3, 3, 3), {"strides": [2, 2], "output_shape": [6, 9]}),
    ((2, 3, 5), (3, 2, 3), {"strides": [2]}),
    ((1, 2, 2, 3, 2), (2, 2, 2, 2, 2), {"strides": [1, 2, 1]}),
]


def windows() -> Iterator[Case]:
    for op, table in (("Conv", CONV), ("ConvTranspose", TRANSPOSED)):
        for x, w, attributes in table:
            channels = w[0] if op == "Conv" else w[1] * attributes.get("group", 1)
            feeds = {"x": floats(*x), "w": floats(*w, seed=1), "b": floats(channels, seed=2)}
            yield Case(op, feeds, {**attributes, "kernel_shape": list(w[2:])})
    image = {"x": floats(1, 2, 5, 6)}
    for attributes in (
        {"kernel_shape": [2, 2], "strides": [2, 2]},
        {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]},
        {"kernel_shape": [2, 3], "strides": [2, 2], "ceil_mode": 1},  # windows that hang over
        {"kernel_shape": [2, 3], "strides": [2, 2], "pads": [1, 1, 1, 1], "ceil_mode": 1},
        {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 0, 0, 1]},
        {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_UPPER"},
        {"kernel_shape": [2, 3], "auto_pad": "SAME_LOWER"},
    ):
        yield Case("MaxPool", image, attributes)
        yield Case("AveragePool", image, attributes, opset=19)
        yield Case("AveragePool", image, {**attributes, "count_include_pad": 1}, opset=19)
    yield Case("MaxPool", image, {"kernel_shape": [2, 2], "dilations": [2, 2]})
    yield Case("LpPool", image, {"kernel_shape": [2, 3], "strides": [2, 1], "p": 3})
    yield Case("MaxPool", {"x": floats(2, 2, 9)}, {"kernel_shape": [3], "strides": [2]})
    yield Case("AveragePool", {"x": floats(2, 2, 9)}, {"kernel_shape": [3], "strides": [2], "pads": [1, 1]})
    cube = {"x": floats(1, 1, 4, 5, 4)}
    yield Case("MaxPool", cube, {"kernel_shape": [2, 2, 2], "strides": [2, 1, 2]})
    yield Case("AveragePool", cube, {"kernel_shape": [2, 2, 2], "strides": [2, 1, 2]})
    for op in ("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"):
        yield Case(op, {"x": floats(2, 3, 4, 3)})
    equal = np.array([[[[1, 2], [2, 0]], [[3, 3], [3, 3]]]], np.float32)
    yield Case("GlobalMaxPool", {"x": equal})
    places = np.array([[[[5, 7], [13, 15]]]], np.int64)
    yield Case("MaxUnpool", {"x": floats(1, 1, 2, 2)}, {"kernel_shape": [2, 2], "strides": [2, 2]}, {"i": places})


def resizing() -> Iterator[Case]:
    image, sizes = {"x": floats(1, 2, 3, 4)}, {"n": ints(1, 2, 5, 3)}
    nearest = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    for scales in ([1, 1, 2, 3], [1, 1, 2, 1.5]):
        factors = {"s": np.array(scales, np.float32)}
        yield Case("Resize", image, nearest, factors, ["x", "", "s"])
        for mode in ("linear", "cubic"):
            yield Case("Resize", image, {"mode": mode}, factors, ["x", "", "s"])
    for mode in ("linear", "cubic"):
        yield Case("Resize", image, {"mode": mode}, sizes, ["x", "", "", "n"])
        where = {"mode": mode, "coordinate_transformation_mode": "align_corners"}
        yield Case("Resize", image, where, sizes, ["x", "", "", "n"])
    smaller = {"n": ints(1, 1, 3, 2)}
    filtered = {"mode": "linear", "antialias": 1, "exclude_outside": 1}  # as PyTorch treats the edges
    yield Case("Resize", {"x": floats(1, 1, 5, 6)}, filtered, smaller, ["x", "", "", "n"])
    yield Case(
        "Resize", {"x": floats(2, 3, 5)}, {"mode": "linear"}, {"s": np.array([1, 1, 2], np.float32)}, ["x", "", "s"]
    )


STATISTICS = {"s": floats(3), "b": floats(3, seed=1), "m": floats(3, seed=2), "v": floats(3, low=0.5)}


def normalizations() -> Iterator[Case]:
    yield Case("LayerNormalization", {"x": floats(2, 3, 5), "s": floats(5), "b": floats(5, seed=1)})
    yield Case("LayerNormalization", {"x": floats(2, 3, 4), "s": floats(3, 4)}, {"axis": 1, "epsilon": 1e-2})
    all_outputs = ("y", "mean", "inverse")
    yield Case("LayerNormalization", {"x": floats(3, 4), "s": floats(4)}, outputs=all_outputs)
    yield Case("BatchNormalization", {"x": floats(2, 3, 4, 2), **STATISTICS})
    fixed = {name: STATISTICS[name] for name in "mv"}
    moving = {name: STATISTICS[name] for name in "sb"}
    yield Case("BatchNormalization", {"x": floats(2, 3, 4, 2), **moving}, {"epsilon": 1e-3}, fixed)
    training = {"training_mode": 1, "epsilon": 1e-3}
    yield Case(
        "BatchNormalization", {"x": floats(4, 3, 2), **STATISTICS}, training, outputs=("y", "", ""), wrt=["x", "s", "b"]
    )
    yield Case("InstanceNormalization", {"x": floats(2, 3, 4, 2), "s": floats(3), "b": floats(3, seed=1)})
    for opset, scales in ((18, 2), (21, 4)):
        feeds = {"x": floats(2, 4, 3, 2), "s": floats(scales), "b": floats(scales, seed=1)}
        yield Case("GroupNormalization", feeds, {"num_groups": 2}, opset=opset)
    yield Case("RMSNormalization", {"x": floats(2, 3, 4), "s": floats(4)}, opset=23)
    yield Case("RMSNormalization", {"x": floats(2, 3, 4), "s": floats(3, 4)}, {"axis": 1}, opset=23)
    yield Case("LRN", {"x": floats(5, 5, 2, 1)}, {"size": 3, "alpha": 0.1, "beta": 0.6, "bias": 1.2})
    yield Case("MeanVarianceNormalization", {"x": floats(2, 3, 3, 2)})


ATTENTION = {"q": floats(2, 2, 3, 4), "k": floats(2, 2, 5, 4, seed=1), "v": floats(2, 2, 5, 4, seed=2)}
JOINED = {"q": floats(2, 3, 8), "k": floats(2, 3, 8, seed=1), "v": floats(2, 3, 8, seed=2)}
GROUPED = {"q": floats(1, 4, 3, 4), "k": floats(1, 2, 3, 4), "v": floats(1, 2, 3, 4, seed=1)}


def attention() -> Iterator[Case]:
    yield Case("Attention", ATTENTION, opset=23)
    yield Case("Attention", {**ATTENTION, "m": floats(3, 5)}, {"scale": 0.75}, opset=23)
    yield Case("Attention", JOINED, {"q_num_heads": 2, "kv_num_heads": 2, "is_causal": 1}, opset=23)
    yield Case("Attention", GROUPED, opset=23)
    turns = {"c": floats(5, 2), "s": floats(5, 2, seed=1), "p": np.array([[0, 3, 2]])}
    yield Case("RotaryEmbedding", {"x": floats(1, 2, 3, 4), **turns}, opset=23)
    for reduction in ("mean", "sum", "none"):
        for op in ("SoftmaxCrossEntropyLoss", "NegativeLogLikelihoodLoss"):
            yield Case(op, {"x": floats(3, 4), "l": ints(0, 2, 3)}, {"reduction": reduction}, opset=13)
    labels = {"l": np.array([[0, 1], [2, 1], [3, 0]])}
    yield Case("SoftmaxCrossEntropyLoss", {"x": floats(3, 4, 2), **labels}, {"ignore_index": 1}, opset=13)
    weights = {"l": ints(0, 2, 3), "w": floats(4, low=0.5)}
    yield Case("SoftmaxCrossEntropyLoss", {"x": floats(3, 4), **weights}, opset=13, wrt=["x"])


def recurrent() -> Iterator[Case]:
    kinds: list[tuple[str, int, dict[str, Any]]] = [
        ("LSTM", 4, {}),
        ("GRU", 3, {}),
        ("GRU", 3, {"linear_before_reset": 1}),
        ("RNN", 1, {}),
        ("RNN", 1, {"activations": ["Relu"]}),
        ("RNN", 1, {"activations": ["Sigmoid"]}),
    ]
    for op, gates, attributes in kinds:
        for direction in ("forward", "reverse", "bidirectional"):
            ways = 2 if direction == "bidirectional" else 1
            if "activations" in attributes and direction != "forward":
                continue
            rows, hidden = gates * 3, 3
            shapes = {"x": (4, 2, 2), "w": (ways, rows, 2), "r": (ways, rows, hidden), "b": (ways, 2 * rows)}
            shapes |= {"h": (ways, 2, hidden)} | ({"c": (ways, 2, hidden)} if op == "LSTM" else {})
            feeds = {n: floats(*s, low=-1, high=1, seed=i) for i, (n, s) in enumerate(shapes.items())}
            names = ["x", "w", "r", "b", "", *list(shapes)[4:]]
            outputs = ["y", "h_last", "c_last"][: 3 if op == "LSTM" else 2]
            settings = {"hidden_size": hidden, "direction": direction, **attributes}
            yield Case(op, feeds, settings, inputs=names, outputs=outputs)
            if direction == "forward" and not attributes:
                bare = {name: feeds[name] for name in ("x", "w", "r")}
                yield Case(op, bare, settings, outputs=["", "h_last"])


def quantization() -> Iterator[Case]:
    codes = {"q": np.array([[3, -100, 7], [0, 90, -128]], np.int8)}
    yield Case("DequantizeLinear", {"s": np.float32(0.25)}, {}, {**codes, "z": np.int8(4)}, ["q", "s", "z"], opset=21)
    rows = {**codes, "z": np.array([0, 3], np.int8)}
    yield Case("DequantizeLinear", {"s": floats(2, low=0.1)}, {"axis": 0}, rows, ["q", "s", "z"], opset=21)


FAMILIES = {
    f.__name__: f
    for f in (
        elementwise,
        products,
        along_axes,
        movement,
        indexing,
        windows,
        resizing,
        normalizations,
        attention,
        recurrent,
        quantization,
    )
} | EDGES


def fake_quantization() -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """QuantizeLinear and DequantizeLinear, with values outside the range: the straight-through gradient."""
    x = [-40.1, -32.6, -3.3, -0.2, 0.14, 7.7, 30.9, 60.2]  # the zero point decides on which side some are
    feeds = {"x": np.array(x, np.float32), "s": np.array(0.25, np.float32)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    return model_of(nodes, feeds, opset=21, constants={"z": np.array(4, np.int8)}), feeds
