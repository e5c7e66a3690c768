"""Normalizations, losses, attention: by rule, by our definitions, by those of the standard."""

from __future__ import annotations

import numpy as np
import pytest

from tests.autodiff.cases import Case, floats, ints

MS = "com.microsoft"
VARIANCE = floats(4, low=0.5, seed=3)
BATCH = {"s": floats(4), "b": floats(4, seed=1), "m": floats(4, seed=2), "v": VARIANCE}

RULES = [
    Case("LayerNormalization", {"x": floats(3, 4, 5), "s": floats(5), "b": floats(5, seed=1)}),
    Case("LayerNormalization", {"x": floats(3, 4, 5), "s": floats(4, 5)}, {"axis": 1, "epsilon": 1e-2}),
    Case("LayerNormalization", {"x": floats(3, 4), "s": floats(4)}, outputs=("y", "mean", "inverse")),
    Case("BatchNormalization", {"x": floats(3, 4, 5, 2), **BATCH}),
    Case("BatchNormalization", {"x": floats(3, 4), **BATCH}, {"epsilon": 1e-2}),
    Case("InstanceNormalization", {"x": floats(2, 3, 4, 5), "s": floats(3), "b": floats(3, seed=1)}),
    Case("RMSNormalization", {"x": floats(2, 3, 4), "s": floats(4)}, opset=23),
    Case("RMSNormalization", {"x": floats(2, 3, 4), "s": floats(3, 4)}, {"axis": 1}, opset=23),
    Case("LRN", {"x": floats(6, 6, 2, 2)}, {"size": 3, "alpha": 0.1, "beta": 0.6, "bias": 1.2}),
    Case("GroupNormalization", {"x": floats(2, 4, 3, 3), "s": floats(2), "b": floats(2, seed=1)}, {"num_groups": 2}),
    Case(
        "GroupNormalization",
        {"x": floats(2, 4, 3, 3), "s": floats(4), "b": floats(4, seed=1)},
        {"num_groups": 2},
        opset=21,
        defined=True,
    ),
    Case("MeanVarianceNormalization", {"x": floats(2, 3, 4, 2)}),
    Case(
        "BatchNormalization",
        {"x": floats(4, 3, 2), "s": floats(3), "b": floats(3, seed=1), "m": floats(3, seed=2), "v": floats(3, low=0.5)},
        {"training_mode": 1, "epsilon": 1e-3, "momentum": 0.8},
        outputs=("y", "mean", "var"),
        opset=15,
    ),
]
ATTENTION = {"q": floats(2, 2, 3, 4), "k": floats(2, 2, 5, 4, seed=1), "v": floats(2, 2, 5, 4, seed=2)}
JOINED = {"q": floats(2, 3, 8), "k": floats(2, 3, 8, seed=1), "v": floats(2, 3, 8, seed=2)}
GROUPED = {"q": floats(1, 4, 3, 4), "k": floats(1, 2, 3, 4), "v": floats(1, 2, 3, 4, seed=1)}
ROTARY = {"x": floats(1, 2, 3, 4), "c": floats(5, 2), "s": floats(5, 2, seed=1), "p": np.array([[0, 1, 2]])}
DEFINED = [
    Case("Attention", ATTENTION, opset=23),
    Case("Attention", {**ATTENTION, "m": floats(3, 5)}, opset=23),
    Case("Attention", JOINED, {"q_num_heads": 2, "kv_num_heads": 2, "is_causal": 1}, opset=23),
    Case("Attention", GROUPED, opset=23),
    Case("RotaryEmbedding", ROTARY, opset=23),
    Case(
        "RotaryEmbedding",
        {"x": floats(1, 3, 8), "c": floats(1, 3, 2), "s": floats(1, 3, 2)},
        {"num_heads": 2},
        opset=23,
    ),
    Case("SoftmaxCrossEntropyLoss", {"x": floats(3, 4), "l": ints(0, 2, 3)}, {"reduction": "mean"}, opset=13),
    Case("SoftmaxCrossEntropyLoss", {"x": floats(3, 4), "l": ints(0, 2, 3)}, {"reduction": "none"}, opset=13),
    Case("SoftmaxCrossEntropyLoss", {"x": floats(3, 4, 2), "l": np.array([[0, 1]] * 3)}, {"ignore_index": 1}, opset=13),
    Case("NegativeLogLikelihoodLoss", {"x": floats(3, 4), "l": ints(0, 2, 3)}, {"reduction": "sum"}, opset=13),
    Case("Gelu", {"x": floats(2, 3)}, domain=MS),
    Case("BiasGelu", {"x": floats(2, 3), "b": floats(3)}, domain=MS),
    Case("FastGelu", {"x": floats(2, 3)}, domain=MS),
    Case("FastGelu", {"x": floats(2, 3), "b": floats(3)}, domain=MS),
    Case("QuickGelu", {"x": floats(2, 3)}, domain=MS),
    Case("FusedMatMul", {"a": floats(2, 3, 4), "b": floats(2, 3, 5)}, {"transA": 1, "alpha": 0.5}, domain=MS),
    Case("FusedMatMul", {"a": floats(2, 3, 4), "b": floats(2, 5, 4)}, {"transB": 1}, domain=MS),
    Case(
        "FusedGemm",
        {"a": floats(2, 3), "b": floats(3, 4), "c": floats(4)},
        {"activation": "LeakyRelu", "activation_alpha": 0.1},
        domain=MS,
    ),
    Case(
        "SkipLayerNormalization",
        {
            "x": floats(2, 3, 4),
            "k": floats(2, 3, 4, seed=1),
            "g": floats(4),
            "b": floats(4, seed=1),
            "i": floats(4, seed=2),
        },
        {"epsilon": 1e-5},
        domain=MS,
    ),
    Case(
        "SkipSimplifiedLayerNormalization",
        {"x": floats(2, 3, 4), "k": floats(2, 3, 4, seed=1), "g": floats(4)},
        {"epsilon": 1e-5},
        domain=MS,
    ),
    Case(
        "EmbedLayerNormalization",
        {
            "ids": np.array([[0, 4, 1], [1, 1, 2]], np.int32),
            "types": np.array([[0, 1, 1], [0, 0, 0]], np.int32),
            "words": floats(5, 8),
            "places": floats(6, 8),
            "kinds": floats(2, 8),
            "g": floats(8),
            "b": floats(8, seed=1),
        },
        {"epsilon": 1e-5},
        outputs=("y", ""),
        domain=MS,
        dynamic=False,  # ONNX Runtime wants the size of the embedding
    ),
]
IMAGE, FILTERS = floats(1, 2, 4, 4), floats(3, 2, 2, 2)
FUSED = [
    ("Relu", None, {"x": IMAGE, "w": FILTERS, "b": floats(3)}),
    ("Relu", None, {"x": IMAGE, "w": FILTERS, "b": floats(3), "z": floats(1, 3, 3, 3)}),
    ("Tanh", None, {"x": IMAGE, "w": FILTERS}),
    ("HardSigmoid", [0.2, 0.5], {"x": IMAGE, "w": FILTERS}),
    ("Clip", [-0.2, 0.5], {"x": IMAGE, "w": FILTERS}),
    ("LeakyRelu", [0.1], {"x": IMAGE, "w": FILTERS}),
]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("case", RULES, ids=str)
def test_normalizations(case: Case, dynamic: bool) -> None:
    case.check(dynamic)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("case", DEFINED, ids=str)
def test_definitions(case: Case, dynamic: bool) -> None:
    case.defined = True
    if case.dynamic or not dynamic:
        case.check(dynamic)


@pytest.mark.parametrize(("activation", "parameters", "feeds"), FUSED, ids=str)
def test_fused_convolutions(activation: str, parameters: list[float] | None, feeds: dict[str, np.ndarray]) -> None:
    attributes = {"activation": activation, "kernel_shape": [2, 2]}
    if parameters:
        attributes["activation_params"] = parameters
    Case("FusedConv", feeds, attributes, domain=MS, defined=True).check()
