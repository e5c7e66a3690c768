"""Every form that a target's documentation or our measurements speak against is found, in a small model of its own."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxcompress as oc
from onnxcompress.errors import RecipeError
from onnxcompress.linting import Finding, lint
from onnxcompress.targets import TARGETS
from tests.builders import floats, graph, info, model, node, tensors
from tests.house import bundled, split

F32, I8, U8 = np.float32, np.int8, np.uint8
TENTH = np.array(0.1, F32)


def rules(proto: onnx.ModelProto, target: str) -> dict[str, Finding]:
    """The findings, by rule."""
    return {finding.rule: finding for finding in lint(proto, target).findings}


def quantized(
    *,
    zero: np.ndarray | None = None,
    scale: np.ndarray = TENTH,
    weight: np.ndarray | None = None,
    weight_scale: np.ndarray = TENTH,
    weight_axis: int = 0,
    block: int = 0,
    op: str = "MatMul",
    behind: bool = True,
    activation: bool = True,
    opset: int = 21,
    bias: np.ndarray | None = None,
) -> onnx.ModelProto:
    """x -> Q -> DQ -> layer(DQ(weight)) [-> Q -> DQ] -> y, with everything as given."""
    zero = np.array(0, I8) if zero is None else zero
    weight = np.ones((8, 8), I8) if weight is None else weight
    name = weight.dtype.name
    stored = [*tensors(sx=scale, zx=zero, sw=weight_scale), numpy_helper.from_array(weight, "qw")]
    attributes: dict[str, Any] = {"axis": weight_axis, **({"block_size": block} if block else {})}
    nodes = []
    if activation:
        nodes += [node("QuantizeLinear", ["x", "sx", "zx"], ["qx"], name="q"),
                  node("DequantizeLinear", ["qx", "sx", "zx"], ["dx"], name="dq")]  # fmt: skip
    inputs = ["dx" if activation else "x", "w"]
    if bias is not None:
        stored += tensors(qb=bias, sb=np.array(0.1, F32))
        nodes.append(node("DequantizeLinear", ["qb", "sb"], ["b"], name="dq_bias"))
        inputs.append("b")
    nodes += [node("DequantizeLinear", ["qw", "sw"], ["w"], name="dq_w", **attributes),
              node(op, inputs, ["m"], name="layer")]  # fmt: skip
    if behind:
        nodes += [node("QuantizeLinear", ["m", "sx", "zx"], ["qy"], name="q_y"),
                  node("DequantizeLinear", ["qy", "sx", "zx"], ["y"], name="dq_y")]  # fmt: skip
    else:
        nodes.append(node("Identity", ["m"], ["y"]))
    rank = 4 if "Conv" in op else 2
    assert name
    return model(graph(nodes, [info("x", ["n"] * rank)], [info("y", ["n"] * rank)], stored), opset, 10)


CONV = np.ones((8, 8, 1, 1), I8)


def one(op: str, inputs: list[str], constants: dict[str, np.ndarray] | None = None, **given: Any) -> onnx.ModelProto:
    """A model of one node "it" that takes float inputs x, z, ... and constants."""
    domain = str(given.pop("domain", ""))
    outputs = given.pop("outputs", ["y"])
    assert isinstance(outputs, list)
    constants = constants or {}
    made = node(op, inputs, outputs, name="it", domain=domain, **given)
    fed = [info(name, ["n", "n"]) for name in dict.fromkeys(inputs) if name and name not in constants]
    return model(
        graph([made], fed, [info("y", ["n", "n"])], tensors(**constants)),
        21,
        10,
        domains={domain: 1} if domain else None,
    )


W8 = np.ones((4, 4), I8)
ZERO, ONE = np.array(0, U8), np.array(1, F32)
TENSORRT = {
    "asymmetric activation": (quantized(zero=np.array(3, I8)), "zero-point", "q"),
    "asymmetric weight": (
        model(
            graph(
                [node("DequantizeLinear", ["q", "s", "z"], ["w"], name="dq"), node("MatMul", ["x", "w"], ["y"])],
                [info("x", ["n", 4])], [info("y", ["n", 4])],
                tensors(q=W8, s=np.array(0.1, F32), z=np.array(1, I8)),
            ),
        ),
        "zero-point", "dq",
    ),
    "uint8 activation": (quantized(zero=ZERO), "quantized-type", "q"),
    "uint8 weight": (quantized(weight=np.ones((8, 8), U8)), "quantized-type", "dq_w"),
    "int16 activation": (quantized(zero=np.array(0, np.int16)), "quantized-type", "q"),
    "uint4 weight": (quantized(weight=np.ones((8, 8), ml_dtypes.uint4), activation=False), "quantized-type", "dq_w"),
    "fp8 e5m2": (quantized(zero=np.array(0, ml_dtypes.float8_e5m2)), "quantized-type", "q"),
    "scale a channel on an activation": (
        quantized(scale=np.full(8, 0.1, F32), zero=np.zeros(8, I8)), "activation-channels", "q",
    ),
    "weight axis of Conv": (
        quantized(op="Conv", weight=CONV, weight_scale=np.full(8, 0.1, F32), weight_axis=1), "weight-axis", "layer",
    ),
    "weight axis of ConvTranspose": (
        quantized(op="ConvTranspose", weight=CONV, weight_scale=np.full(8, 0.1, F32)), "weight-axis", "layer",
    ),
    "weight axis of MatMul": (quantized(weight_scale=np.full(8, 0.1, F32), weight_axis=0), "weight-axis", "layer"),
    "int4 blocks of 32": (
        quantized(weight=np.ones((128, 8), ml_dtypes.int4), weight_scale=np.ones((4, 8), F32), block=32,
                  activation=False),
        "int4-block", "dq_w",
    ),
    "int4 blocks across K": (
        quantized(weight=np.ones((8, 128), ml_dtypes.int4), weight_scale=np.ones((8, 2), F32), block=64, weight_axis=1,
                  activation=False),
        "int4-axis", "dq_w",
    ),
    "int4 convolution": (quantized(op="Conv", weight=CONV.astype(ml_dtypes.int4)), "int4-consumer", "dq_w"),
    "int4 odd": (quantized(weight=np.ones((8, 7), ml_dtypes.int4), activation=False), "int4-odd", "dq_w"),
    "int4 activation": (quantized(zero=np.array(0, ml_dtypes.int4)), "int4-activation", "q"),
    "integer bias": (quantized(op="Gemm", bias=np.ones(8, np.int32)), "integer-bias", "dq_bias"),
    "8-bit weights alone": (quantized(activation=False), "weight-only", "layer"),
    "integers between": (
        model(
            graph(
                [
                    node("QuantizeLinear", ["x", "s", "z"], ["q"]),
                    node("MaxPool", ["q"], ["p"], name="pool", kernel_shape=[2, 2]),
                    node("DequantizeLinear", ["p", "s", "z"], ["y"]),
                ],
                [info("x", ["n"] * 4)], [info("y", ["n"] * 4)], tensors(s=ONE, z=np.array(0, I8)),
            )
        ),
        "integers-between", "pool",
    ),
    "dynamic scale": (
        model(
            graph(
                [node("QuantizeLinear", ["x", "s"], ["q"], name="q"), node("DequantizeLinear", ["q", "s"], ["y"])],
                [info("x", ["n", 4]), info("s", [])], [info("y", ["n", 4])],
            )
        ),
        "dynamic-scale", "q",
    ),
    "negative scale": (quantized(scale=np.array(-0.1, F32)), "bad-scale", "q"),
    "dynamic quantization": (
        one("DynamicQuantizeLinear", ["x"], outputs=["y", "s", "z"]), "operator", "it",
    ),
    "QLinearMatMul": (
        one("QLinearMatMul", ["x", "s", "z", "w", "s", "z", "s", "z"], {"s": ONE, "z": ZERO, "w": W8}),
        "operator", "it",
    ),
    "QLinearConv": (
        one("QLinearConv", ["x", "s", "z", "w", "s", "z", "s", "z"], {"s": ONE, "z": ZERO, "w": CONV}),
        "operator", "it",
    ),
    "MatMulInteger": (one("MatMulInteger", ["x", "w"], {"w": W8}), "operator", "it"),
    "ConvInteger": (one("ConvInteger", ["x", "w"], {"w": CONV}), "operator", "it"),
    "MatMulNBits": (
        one("MatMulNBits", ["x", "w", "s"], {"w": np.ones((4, 1, 16), U8), "s": np.ones(4, F32)},
            domain="com.microsoft", K=32, N=4, bits=4, block_size=32),
        "domain", "it",
    ),
    "DynamicQuantizeMatMul": (
        one("DynamicQuantizeMatMul", ["x", "w", "s"], {"w": W8, "s": ONE}, domain="com.microsoft"), "domain", "it",
    ),
    "uint8 initializer": (one("Gather", ["w", "x"], {"w": np.ones((4, 4), U8)}), "integer-constant", "it"),
    "int8 rows": (one("Gather", ["w", "x"], {"w": W8}), "integer-constant", "it"),
    "int64 beyond 32 bits": (one("Add", ["x", "w"], {"w": np.full(4, 1 << 40, np.int64)}), "int64", "it"),
    "float64": (one("Add", ["x", "w"], {"w": np.ones(4)}), "double", "it"),
    "unsupported operator": (one("Unique", ["x"]), "operator", "it"),
    "sequence": (one("SplitToSequence", ["x"]), "operator", "it"),
    "computed axes": (one("ReduceSum", ["x", "z"]), "operator-form", "it"),
    "LSTM layout": (one("LSTM", ["x", "z", "z"], layout=1, hidden_size=2), "operator-form", "it"),
    "MaxPool indices": (
        model(
            graph(
                [node("MaxPool", ["x"], ["y", "i"], name="it", kernel_shape=[2, 2])], [info("x", ["n"] * 4)],
                [info("y", ["n"] * 4), info("i", ["n"] * 4, TensorProto.INT64)],
            )
        ),
        "operator-form", "it",
    ),
    "Resize cubic": (one("Resize", ["x", "", "s"], {"s": np.ones(2, F32)}, mode="cubic"), "operator-form", "it"),
    "ScatterND add": (one("ScatterND", ["x", "z", "z"], reduction="add"), "operator-form", "it"),
    "residual": (
        model(
            graph(
                [
                    node("QuantizeLinear", ["x", "s", "z"], ["q"]), node("DequantizeLinear", ["q", "s", "z"], ["d"]),
                    node("Add", ["d", "x"], ["y"], name="add"),
                ],
                [info("x", ["n", 4])], [info("y", ["n", 4])], tensors(s=ONE, z=np.array(0, I8)),
            )
        ),
        "residual", "add",
    ),
    "old opset": (model(graph([node("Relu", ["x"], ["y"])], [info("x", [4])], [info("y", [4])]), 8), "opset", ""),
}  # fmt: skip
WARNINGS = {"int64", "double", "residual", "opset", "folded"}


@pytest.mark.parametrize("form", TENSORRT)
def test_tensorrt_forms(form: str) -> None:
    proto, rule, name = TENSORRT[form]
    found = rules(proto, "tensorrt")
    assert rule in found, f"{sorted(found)}"
    assert found[rule].level == ("warning" if rule in WARNINGS else "error")
    assert name in [f.node for f in lint(proto, "tensorrt").findings if f.rule == rule]
    assert found[rule].mend


def test_tensorrt_takes_its_native_form() -> None:
    for proto in (
        quantized(),
        quantized(op="Conv", weight=CONV, weight_scale=np.full(8, 0.1, F32)),
        quantized(op="ConvTranspose", weight=CONV, weight_scale=np.full(8, 0.1, F32), weight_axis=1),
        quantized(weight_scale=np.full(8, 0.1, F32), weight_axis=1),
        quantized(weight=np.ones((128, 8), ml_dtypes.int4), weight_scale=np.ones((2, 8), F32), block=64,
                  activation=False),
        quantized(zero=np.array(0, ml_dtypes.float8_e4m3fn)),
    ):  # fmt: skip
        assert lint(proto, "tensorrt").findings == ()


def test_tensorrt_finds_sparse_initializers() -> None:
    proto = one("MatMul", ["x", "w"])
    values = helper.make_tensor("w", TensorProto.FLOAT, [1], [1.0])
    indices = helper.make_tensor("i", TensorProto.INT64, [1], [3])
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4, 4]))
    del proto.graph.input[1]
    assert rules(proto, "tensorrt")["sparse-initializer"].level == "error"
    assert rules(proto, "cpu")["sparse-initializer"].level == "warning"


def test_tensorrt_names_weights_that_only_onnx_runtime_expands() -> None:
    small = oc.compress(bundled("digits_cnn"), [{"weight-sharing": {"bits": 4}}]).model
    found = lint(small, "tensorrt")
    assert found.errors == ()
    assert {finding.rule for finding in found.findings} == {"folded"}


FULL = np.full((8, 8), 127, I8)
CPU = {
    "int8 activations": (quantized(op="Conv", weight=CONV), "signed-activation", "layer"),
    "float output": (quantized(op="Conv", weight=CONV, zero=ZERO, behind=False), "unfused", "layer"),
    "saturation": (quantized(zero=ZERO, weight=FULL), "saturation", "layer"),
    "saturation at run time": (one("MatMulInteger", ["x", "w"], {"w": FULL}), "saturation", "it"),
    "dynamic convolution": (one("ConvInteger", ["x", "w"], {"w": CONV}), "slow", "it"),
    "MatMulNBits 8": (
        one("MatMulNBits", ["x", "w", "s"], {"w": np.ones((4, 1, 32), U8), "s": np.ones(4, F32)},
            domain="com.microsoft", K=32, N=4, bits=8, block_size=32),
        "accuracy-level", "it",
    ),
    "MatMulBnb4": (
        one("MatMulBnb4", ["x", "w", "s"], {"w": np.ones(64, U8), "s": np.ones(4, F32)}, domain="com.microsoft"),
        "slow", "it",
    ),
    "blocks along N": (
        quantized(weight=np.ones((8, 128), ml_dtypes.int4), weight_scale=np.ones((8, 4), F32), block=32, weight_axis=1,
                  activation=False),
        "block-axis", "dq_w",
    ),
    "blocks along K": (
        quantized(weight=np.ones((128, 8), ml_dtypes.int4), weight_scale=np.ones((4, 8), F32), block=32,
                  activation=False),
        "block-accuracy", "dq_w",
    ),
    "table": (
        model(
            graph(
                [node("DequantizeLinear", ["w", "s"], ["t"], name="dq"), node("Gather", ["t", "x"], ["y"])],
                [info("x", ["n"], TensorProto.INT64)], [info("y", ["n", 4])], tensors(w=W8, s=ONE),
            )
        ),
        "table", "dq",
    ),
    "float4": (quantized(weight=np.ones((8, 8), ml_dtypes.float4_e2m1fn), opset=23), "quantized-type", "dq_w"),
    "float8": (quantized(zero=np.array(0, ml_dtypes.float8_e4m3fn)), "slow", "q"),
}  # fmt: skip


@pytest.mark.parametrize("form", CPU)
def test_cpu_forms(form: str) -> None:
    proto, rule, name = CPU[form]
    found = [finding for finding in lint(proto, "cpu").findings if finding.rule == rule]
    assert name in [finding.node for finding in found]
    assert found[0].level == ("error" if rule == "quantized-type" else "warning")


def test_portable_refuses_what_saturates_and_what_only_one_runtime_knows() -> None:
    within = np.where(np.indices((8, 8)).sum(axis=0) % 2, 127, 0).astype(I8)
    spread = quantized(zero=ZERO, weight=within)
    assert "saturation" not in rules(spread, "cpu")  # no two neighbours overflow, in the order the CPU sums
    assert rules(spread, "portable")["saturation"].level == "error"
    assert "neighbours fit" in rules(spread, "portable")["saturation"].message  # as validate says
    over = quantized(zero=ZERO, weight=FULL)
    assert "a CPU without VNNI gives other results" in rules(over, "portable")["saturation"].message
    assert "saturation" not in rules(quantized(zero=ZERO, weight=np.full((8, 8), 64, I8)), "portable")
    assert "saturation" in rules(quantized(zero=ZERO, weight=np.full((8, 8), 65, I8)), "portable")
    gelu = one("Gelu", ["x"], domain="com.microsoft")
    assert rules(gelu, "portable")["domain"].level == "error"
    assert rules(gelu, "cpu") == {}


def test_cuda_says_what_falls_to_the_cpu() -> None:
    found = rules(one("ConvInteger", ["x", "w"], {"w": CONV}), "cuda")
    assert found["operator"].level == "warning"
    assert "CPU" in found["operator"].message
    assert rules(one("MatMulInteger", ["x", "w"], {"w": W8}), "cuda") == {}


@pytest.mark.parametrize("target", TARGETS)
def test_an_operator_that_onnx_does_not_have_is_an_error(target: str) -> None:
    found = rules(one("Conw", ["x"]), target)["unknown-operator"]
    assert found.level == ("warning" if target == "tensorrt" else "error")  # it may be a plugin
    assert "unknown-operator" not in rules(one("Relu", ["x"]), target)
    assert "unknown-operator" not in rules(one("SimplifiedLayerNormalization", ["x", "z"]), target)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["digits_cnn", "gloss_transformer"])
def test_what_the_quantizer_writes_for_a_target_has_no_errors_there(name: str, target: str) -> None:
    data = split(name, "calib")
    made = oc.compress(bundled(name), ["simplify", "static-quantization"], calibration=data, target=target).model
    assert lint(made, target).errors == ()


def test_untouched_models_are_clean() -> None:
    assert lint(bundled("digits_cnn"), "tensorrt").findings == ()
    assert lint(bundled("gloss_transformer"), "portable").findings == ()
    with pytest.raises(RecipeError, match="unknown target"):
        lint(bundled("digits_cnn"), "gpu")


def test_constants_count_wherever_they_lie() -> None:
    weight = numpy_helper.from_array(floats(4, 4), "w")
    inner = graph([node("Unique", ["x"], ["a"], name="deep")], [], [info("a", ["n"])])
    other = graph([node("Identity", ["x"], ["b"])], [], [info("b", ["n"])])
    branch = node("If", ["c"], ["y"], then_branch=inner, else_branch=other, name="if")
    proto = model(graph([branch], [info("x", [4]), info("c", [], TensorProto.BOOL)], [info("y", ["n"])], [weight]))
    assert rules(proto, "tensorrt")["operator"].node == "y/then/deep"
