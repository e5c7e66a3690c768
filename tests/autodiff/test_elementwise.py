"""Elementwise operators, over their domains and over ways to broadcast."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress.autodiff import gradients
from onnxcompress.model import bridge
from tests.autodiff.cases import Case, floats, ints
from tests.autodiff.checking import gradient_model, session

ANYWHERE = [
    "Abs",
    "Asinh",
    "Atan",
    "Celu",
    "Cos",
    "Cosh",
    "Elu",
    "Erf",
    "Exp",
    "HardSigmoid",
    "HardSwish",
    "Identity",
    "LeakyRelu",
    "Mish",
    "Neg",
    "Reciprocal",
    "Relu",
    "Selu",
    "Shrink",
    "Sigmoid",
    "Sin",
    "Sinh",
    "Softplus",
    "Softsign",
    "Tan",
    "Tanh",
    "ThresholdedRelu",
]
SHAPES = [((2, 3), (2, 3)), ((2, 3), (3,)), ((2, 1), (1, 3)), ((3,), (2, 1)), ((), (2, 3)), ((2, 1, 3), (4, 1))]


@pytest.mark.parametrize("op", ANYWHERE)
def test_unary(op: str) -> None:
    """Away from kinks, which lie at 0, +-0.5, 1, +-2.5 and +-3."""
    x = np.array([-2.2, -1.3, -0.7, -0.2, 0.15, 0.3, 0.8, 1.4, 1.9], np.float32).reshape(3, 3)
    Case(op, {"x": x}).check()


@pytest.mark.parametrize(
    ("op", "low", "high"),
    [
        ("Asin", -0.8, 0.8),
        ("Acos", -0.8, 0.8),
        ("Atanh", -0.8, 0.8),
        ("Acosh", 1.5, 3),
        ("Log", 0.5, 2),
        ("Sqrt", 0.5, 2),
    ],
)
def test_unary_on_an_interval(op: str, low: float, high: float) -> None:
    Case(op, {"x": floats(7, low=low, high=high)}).check()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div", "Pow", "Max", "Min"])
def test_binary_broadcasts(op: str, shapes: tuple[tuple[int, ...], tuple[int, ...]], dynamic: bool) -> None:
    a, b = (floats(*shape, low=0.5, high=3, seed=i) for i, shape in enumerate(shapes))
    Case(op, {"a": a, "b": b}).check(dynamic)


PARAMETRIZED = [
    Case("LeakyRelu", {"x": floats(7)}, {"alpha": 0.3}),
    Case("Elu", {"x": floats(7)}, {"alpha": 1.7}),
    Case("Selu", {"x": floats(7)}, {"alpha": 1.5, "gamma": 1.2}),
    Case("Celu", {"x": floats(7)}, {"alpha": 0.7}),
    Case("ThresholdedRelu", {"x": floats(7)}, {"alpha": 0.4}),
    Case("Shrink", {"x": floats(7)}, {"lambd": 0.9, "bias": 0.2}),
    Case("HardSigmoid", {"x": floats(7)}, {"alpha": 0.3, "beta": 0.4}),
    Case("Gelu", {"x": floats(7)}, opset=20),
    Case("Gelu", {"x": floats(7)}, {"approximate": "tanh"}, opset=20),
    Case("Swish", {"x": floats(7)}, {"alpha": 1.5}, opset=24, run=False),  # no kernel in ONNX Runtime 1.32
    Case("PRelu", {"x": floats(2, 3), "s": floats(3, seed=1)}),
    Case("PRelu", {"x": floats(2, 3), "s": floats(2, 3, seed=1)}),
    Case("Mod", {"a": floats(4, low=1), "b": floats(4, low=0.5)}, {"fmod": 1}),
    Case("Pow", {"x": floats(5, low=0.5)}, constants={"p": np.float32(2)}),
    Case("Pow", {"x": floats(5)}, constants={"p": np.float32(1)}),
    Case("Pow", {"x": floats(5, low=0.5)}, constants={"p": np.float32(0.5)}),
    Case("Pow", {"x": floats(5)}, constants={"p": ints(3)}),
    Case("Pow", {"x": floats(2, 3, low=0.5)}, constants={"p": floats(3)}),
    Case("Clip", {"x": floats(3, 4)}, constants={"low": np.float32(-0.5), "high": np.float32(0.7)}),
    Case("Clip", {"x": floats(3, 4), "low": np.float32(-0.5), "high": np.float32(0.7)}),
    Case("Clip", {"x": floats(3, 4), "high": np.float32(0.7)}, inputs=["x", "", "high"]),
    Case("Clip", {"x": floats(3, 4)}),
    Case("Sum", {"a": floats(2, 3), "b": floats(3), "c": floats(2, 1)}),
    Case("Mean", {"a": floats(2, 3), "b": floats(3), "c": floats(2, 1)}),
    Case("Max", {"a": floats(2, 3), "b": floats(3), "c": floats(2, 1)}),
    Case("Min", {"a": floats(2, 3)}),
    Case("Dropout", {"x": floats(2, 3)}),
    Case("Where", {"c": np.array([[True], [False]]), "a": floats(2, 3), "b": floats(3)}),
]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("case", PARAMETRIZED, ids=str)
def test_attributes_and_optional_inputs(case: Case, dynamic: bool) -> None:
    case.check(dynamic)


def test_an_exponent_that_is_a_weight_has_a_gradient() -> None:
    """dp = sum of x^p log x, for an exponent that is a constant until it is trained."""
    x = {"x": np.array([0.5, 2, 3], np.float32)}
    built, names = gradient_model(Case("Pow", x, constants={"p": np.array([1.5], np.float32)}).model(), {}, [])
    del names
    model = bridge.from_proto(built, "test")
    found = gradients(model, {"y": None}, ["x", "p"])
    model.graph.outputs.extend([found["x"], found["p"]])
    dx, dp = session(bridge.to_proto(model)).run([found["x"].name, found["p"].name], x)
    np.testing.assert_allclose(dx, 1.5 * x["x"] ** 0.5, rtol=1e-6)
    np.testing.assert_allclose(dp, [(x["x"] ** 1.5 * np.log(x["x"])).sum()], rtol=1e-6)


@pytest.mark.parametrize("opset", [13, 14, 15, 16, 18, 21])
def test_one_operator_through_the_opsets(opset: int) -> None:
    Case("Relu", {"x": floats(2, 3)}, opset=opset).check()


def test_ties_give_the_gradient_once() -> None:
    """Max of two equal values: each takes half of it; Relu at its corner: nothing passes (as in PyTorch)."""
    x = {"a": np.array([1, 0], np.float32), "b": np.array([1, 2], np.float32)}
    built, names = gradient_model(Case("Max", x).model(), {"y": np.ones(2, np.float32)}, ["a", "b"])
    a, b = session(built).run([names["a"], names["b"]], {**x, "seed/y": np.ones(2, np.float32)})
    np.testing.assert_array_equal(a, [0.5, 0])
    np.testing.assert_array_equal(b, [0.5, 1])
    zero = {"x": np.zeros(2, np.float32)}
    built, names = gradient_model(Case("Relu", zero).model(), {"y": np.ones(2, np.float32)}, ["x"])
    (x0,) = session(built).run([names["x"]], {**zero, "seed/y": np.ones(2, np.float32)})
    np.testing.assert_array_equal(x0, [0, 0])


@pytest.mark.parametrize("ratio", [0.25, None])
def test_dropout_in_training_masks_as_the_forward_pass_did(ratio: float | None) -> None:
    """Where the output is kept it is x / (1 - ratio), and so is the gradient."""
    x = {"x": floats(50, 4, low=0.5)}
    constants = (
        {"training": np.array(True)} if ratio is None else {"ratio": np.float32(ratio), "training": np.array(True)}
    )
    case = Case("Dropout", x, {"seed": 3}, constants, inputs=["x", "ratio" if ratio else "", "training"])
    built, names = gradient_model(case.model(), {"y": np.ones((50, 4), np.float32)}, ["x"])
    y, dx = session(built).run(["y", names["x"]], {**x, "seed/y": np.ones((50, 4), np.float32)})
    np.testing.assert_allclose(dx, np.where(y > 0, 1 / (1 - (ratio or 0.5)), 0), rtol=1e-6)
    assert 0.2 < (dx == 0).mean() + (0.25 if ratio else 0) < 0.8


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_gradients_have_the_type_of_their_values(dtype: type[np.floating]) -> None:
    """Constants follow: 0.5 / sqrt(x) in float16 stays float16."""
    x = {"x": np.array([0.25, 4], dtype)}
    built, names = gradient_model(Case("Sqrt", x).model(), {}, [])
    del names
    model = bridge.from_proto(built, "test")
    found = gradients(model, {"y": None}, ["x"])
    model.graph.outputs.append(found["x"])
    (dx,) = session(bridge.to_proto(model)).run([found["x"].name], x)
    assert found["x"].dtype == ir.DataType.from_numpy(np.dtype(dtype))
    np.testing.assert_array_equal(dx, np.array([1, 0.25], dtype))
