"""The pass `simplify`, rule by rule, on models small enough to read."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxcompress.contract import Coverage, Reason, Run, Select
from onnxcompress.encodings import Codebook
from onnxcompress.model.load import load
from onnxcompress.model.save import to_bytes
from onnxcompress.model.weights import weights
from onnxcompress.passes.simplify import Simplify
from onnxcompress.runtime.session import open_session

F32 = np.float32
BUNDLED = pathlib.Path(__file__).parents[2] / "models"


def normal(*shape: int, seed: int = 0, dtype: Any = F32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def build(
    nodes: Sequence[onnx.NodeProto],
    constants: Mapping[str, np.ndarray],
    *,
    inputs: Mapping[str, tuple[Any, Sequence[Any]]],
    outputs: Mapping[str, Any] | None = None,
    opset: int = 17,
    ir_version: int = 8,
    listed: Sequence[str] = (),
    functions: Sequence[onnx.FunctionProto] = (),
) -> ir.Model:
    """A loaded model. `outputs`: name -> element type; `listed`: constants that are graph inputs too."""
    infos = [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()]
    infos += [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(constants[n].dtype), constants[n].shape)
        for n in listed
    ]
    outs = [
        helper.make_tensor_value_info(name, kind, None) for name, kind in (outputs or {"y": TensorProto.FLOAT}).items()
    ]
    graph = helper.make_graph(
        list(nodes), "g", infos, outs, [numpy_helper.from_array(array, name) for name, array in constants.items()]
    )
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(f.domain, 1) for f in functions)]
    proto = helper.make_model(graph, opset_imports=imports, ir_version=ir_version, functions=list(functions))
    for declared, inferred in zip(graph.output, onnx.shape_inference.infer_shapes(proto).graph.output, strict=True):
        declared.CopyFrom(inferred)
        declared.type.tensor_type.shape.SetInParent()
    del proto.graph.output[:]
    proto.graph.output.extend(graph.output)
    onnx.checker.check_model(proto)
    return load(proto)


def simplify(model: ir.Model, tmp_path: pathlib.Path, **parameters: Any) -> Coverage:
    """Apply the pass and check what holds always: coverage, size, a valid model, nothing left to do."""
    keys, size = [weight.key for weight in weights(model)], len(to_bytes(model))
    coverage = Simplify(**parameters).apply(model, Run(work=tmp_path))
    data = to_bytes(model)
    onnx.checker.check_model(data)
    assert sorted([t.key for t in coverage.touched] + [entry.key for entry in coverage.left]) == sorted(keys)
    assert len(data) <= size
    again = load(data)
    assert not Simplify(**parameters).apply(again, Run(work=tmp_path)).changed
    assert to_bytes(again) == data
    return coverage


def run(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> dict[str, Any]:
    with open_session(to_bytes(model)) as session:
        return session.run(feeds)


def ops(graph: ir.Graph | ir.Function) -> list[str]:
    return [node.op_type for node in graph]


def assert_same(before: dict[str, Any], after: dict[str, Any], tolerance: float = 0.0) -> None:
    """Equal bit for bit, or within `tolerance` of the largest magnitude."""
    assert list(before) == list(after)
    for name, value in before.items():
        if tolerance:
            assert np.abs(value - after[name]).max() <= tolerance * np.abs(value).max(), name
        else:
            assert value.tobytes() == after[name].tobytes(), name


# BatchNormalization ---------------------------------------------------------------------------------------------------

IMAGE = {"x": (TensorProto.FLOAT, ["n", 4, 8, 8])}
NORM = ["scale", "beta", "mean", "var"]


def statistics(channels: int, dtype: Any = F32) -> dict[str, np.ndarray]:
    return {
        "scale": normal(channels, seed=1, dtype=dtype),
        "beta": normal(channels, seed=2, dtype=dtype),
        "mean": normal(channels, seed=3, dtype=dtype),
        "var": np.abs(normal(channels, seed=4, dtype=dtype)) + np.asarray(0.1, dtype),
    }


def conv_norm(
    bias: bool, opset: int = 17, *, transposed: bool = False, group: int = 1, norm: Mapping[str, Any] | None = None
) -> ir.Model:
    shape = (4, 6 // group, 3, 3) if transposed else (6, 4 // group, 3, 3)
    constants = {"w": normal(*shape), **statistics(6)}
    if bias:
        constants["b"] = normal(6, seed=5)
    op = "ConvTranspose" if transposed else "Conv"
    nodes = [
        helper.make_node(op, ["x", "w", *(["b"] if bias else [])], ["c"], "conv", group=group, pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["c", *NORM], ["y"], "norm", epsilon=1e-3, **(norm or {})),
    ]
    return build(nodes, constants, inputs=IMAGE, opset=opset)


@pytest.mark.parametrize("opset", [7, 9, 14, 15, 21])
@pytest.mark.parametrize("bias", [False, True])
def test_batch_norm_folds_into_the_convolution_before_it(bias: bool, opset: int, tmp_path: pathlib.Path) -> None:
    model = conv_norm(bias, opset)
    feeds = {"x": normal(2, 4, 8, 8, seed=9)}
    before = run(model, feeds)
    coverage = simplify(model, tmp_path)
    assert ops(model.graph) == ["Conv"]
    assert model.graph[0].name == "conv"
    assert list(model.graph.initializers) == ["w", "b" if bias else "beta"]
    assert coverage.rewrites == {"fold-batch-norm": 1}
    assert {t.key: t.bytes_after for t in coverage.touched} == {
        "w": 864, "scale": 0, "mean": 0, "var": 0, "beta": 0 if bias else 24, **({"b": 24} if bias else {})
    }  # fmt: skip
    assert not coverage.left
    # Two roundings of W * a and of the sum, in float32, against one of each: a few units in the last place.
    assert_same(before, run(model, feeds), 2e-6)


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_batch_norm_folds_into_transposed_convolutions(bias: bool, group: int, tmp_path: pathlib.Path) -> None:
    model = conv_norm(bias, transposed=True, group=group)
    feeds = {"x": normal(2, 4, 8, 8, seed=9)}
    before = run(model, feeds)
    simplify(model, tmp_path)
    assert ops(model.graph) == ["ConvTranspose"]
    assert_same(before, run(model, feeds), 2e-6)


@pytest.mark.parametrize("turned", [0, 1])
@pytest.mark.parametrize("shape", [(6,), (1, 6), (1,), ()])
def test_batch_norm_folds_into_gemm(turned: int, shape: tuple[int, ...], tmp_path: pathlib.Path) -> None:
    constants = {"w": normal(*((6, 5) if turned else (5, 6))), "b": normal(*shape, seed=5), **statistics(6)}
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["c"], alpha=0.5, transB=turned),
        helper.make_node("BatchNormalization", ["c", *NORM], ["y"]),
    ]
    model = build(nodes, constants, inputs={"x": (TensorProto.FLOAT, ["n", 5])})
    feeds = {"x": normal(3, 5, seed=9)}
    before = run(model, feeds)
    simplify(model, tmp_path)
    assert ops(model.graph) == ["Gemm"]
    assert_same(before, run(model, feeds), 2e-6)


def test_the_fold_is_rounded_once(tmp_path: pathlib.Path) -> None:
    model = conv_norm(True)
    w, scale, var = (model.graph.initializers[n].const_value.numpy().astype(np.float64) for n in ("w", "scale", "var"))  # type: ignore[union-attr]
    simplify(model, tmp_path)
    exact = w * (scale / np.sqrt(var + float(F32(1e-3)))).reshape(-1, 1, 1, 1)
    stored = model.graph.initializers["w"].const_value
    assert stored is not None
    assert stored.numpy().tobytes() == exact.astype(F32).tobytes()


@pytest.mark.parametrize(
    ("opset", "attributes"), [(7, {"spatial": 0}), (15, {"training_mode": 1})], ids=["spatial", "training"]
)
def test_batch_norm_of_another_kind_is_left(opset: int, attributes: dict[str, int], tmp_path: pathlib.Path) -> None:
    model = conv_norm(True, opset, norm=attributes)
    simplify(model, tmp_path)
    assert ops(model.graph) == ["Conv", "BatchNormalization"]


def test_half_precision_is_left(tmp_path: pathlib.Path) -> None:
    constants = {"w": normal(6, 4, 3, 3, dtype=np.float16), **statistics(6, np.float16)}
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"]), helper.make_node("BatchNormalization", ["c", *NORM], ["y"])]
    model = build(
        nodes, constants, inputs={"x": (TensorProto.FLOAT16, [1, 4, 8, 8])}, outputs={"y": TensorProto.FLOAT16}
    )
    assert not simplify(model, tmp_path).changed


def test_batch_norm_is_left_where_the_convolution_is_read_by_others(tmp_path: pathlib.Path) -> None:
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"]), helper.make_node("BatchNormalization", ["c", *NORM], ["y"])]
    constants = {"w": normal(6, 4, 3, 3), **statistics(6)}
    floats = {"y": TensorProto.FLOAT, "c": TensorProto.FLOAT}
    assert not simplify(build(nodes, constants, inputs=IMAGE, outputs=floats), tmp_path).changed
    read = [*nodes, helper.make_node("Relu", ["c"], ["z"])]
    floats = {"y": TensorProto.FLOAT, "z": TensorProto.FLOAT}
    assert not simplify(build(read, constants, inputs=IMAGE, outputs=floats), tmp_path).changed


def test_a_weight_that_two_convolutions_share_is_left(tmp_path: pathlib.Path) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("BatchNormalization", ["c", *NORM], ["y"]),
        helper.make_node("Conv", ["x", "w"], ["z"], pads=[1, 1, 1, 1]),
    ]
    model = build(
        nodes,
        {"w": normal(6, 4, 3, 3), **statistics(6)},
        inputs=IMAGE,
        outputs={"y": TensorProto.FLOAT, "z": TensorProto.FLOAT},
    )
    assert not simplify(model, tmp_path).changed


def test_statistics_and_bias_that_two_share_are_folded_only_without_growth(tmp_path: pathlib.Path) -> None:
    def model(channels: int) -> ir.Model:
        nodes = []
        for i in "12":
            nodes += [
                helper.make_node("Conv", ["x", f"w{i}", "b"], [f"c{i}"]),
                helper.make_node("BatchNormalization", [f"c{i}", *NORM], [f"y{i}"]),
            ]
        constants = {
            "w1": normal(channels, 4, 1, 1),
            "w2": normal(channels, 4, 1, 1, seed=6),
            "b": normal(channels, seed=7),
            **statistics(channels),
        }
        outputs = {"y1": TensorProto.FLOAT, "y2": TensorProto.FLOAT}
        return build(nodes, constants, inputs=IMAGE, outputs=outputs)

    small = model(4)
    feeds = {"x": normal(1, 4, 8, 8, seed=9)}
    before = run(small, feeds)
    simplify(small, tmp_path)
    assert ops(small.graph) == ["Conv", "Conv"]
    assert_same(before, run(small, feeds), 2e-6)
    # Of 64 channels, a bias for the first would take more than its BatchNormalization frees.
    large = model(64)
    simplify(large, tmp_path)
    assert ops(large.graph).count("BatchNormalization") == 2


def test_batch_norm_before_a_convolution_is_left(tmp_path: pathlib.Path) -> None:
    nodes = [helper.make_node("BatchNormalization", ["x", *NORM], ["c"]), helper.make_node("Conv", ["c", "w"], ["y"])]
    model = build(nodes, {"w": normal(6, 4, 3, 3), **statistics(4)}, inputs=IMAGE)
    assert not simplify(model, tmp_path).changed


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), group=st.sampled_from([1, 2, 4]), low=st.sampled_from([1e-4, 1e-2, 1.0]))
def test_folded_equals_unfolded(seed: int, group: int, low: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    random = np.random.default_rng(seed)
    constants = {
        "w": random.standard_normal((8, 4 // group, 3, 3)).astype(F32),
        "scale": random.standard_normal(8).astype(F32),
        "beta": random.standard_normal(8).astype(F32),
        "mean": random.standard_normal(8).astype(F32),
        "var": (random.random(8) + low).astype(F32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], group=group),
        helper.make_node("BatchNormalization", ["c", *NORM], ["y"]),
    ]
    model = build(nodes, constants, inputs=IMAGE)
    feeds = {"x": random.standard_normal((1, 4, 8, 8)).astype(F32)}
    with open_session(to_bytes(model), optimize=False) as session:
        before = session.run(feeds)
    simplify(model, tmp_path_factory.mktemp("work"))
    assert ops(model.graph) == ["Conv"]
    # float32 sums of 36 products, scaled by at most 1/sqrt(low), around a mean of order 1.
    assert_same(before, run(model, feeds), 1e-5)


# Constant folding -----------------------------------------------------------------------------------------------------

VECTOR = {"x": (TensorProto.FLOAT, ["n", 32])}


def test_a_transposed_weight_is_stored_transposed_under_its_name(tmp_path: pathlib.Path) -> None:
    nodes = [helper.make_node("Transpose", ["fc.weight"], ["t"]), helper.make_node("MatMul", ["x", "t"], ["y"])]
    model = build(nodes, {"fc.weight": normal(16, 32)}, inputs=VECTOR)
    before = run(model, {"x": normal(3, 32, seed=1)})
    coverage = simplify(model, tmp_path)
    assert ops(model.graph) == ["MatMul"]
    assert [(w.key, w.shape) for w in weights(model)] == [("fc.weight", (32, 16))]
    assert [(t.key, t.bytes_before, t.bytes_after) for t in coverage.touched] == [("fc.weight", 2048, 2048)]
    assert_same(before, run(model, {"x": normal(3, 32, seed=1)}))


def test_gates_cut_out_of_one_weight_are_judged_together(tmp_path: pathlib.Path) -> None:
    nodes, joined = [], []
    for i in range(4):
        nodes.append(helper.make_node("Slice", ["w", f"at{i}", f"at{i + 1}", "axis"], [f"gate{i}"]))
        nodes.append(helper.make_node("MatMul", ["x", f"gate{i}"], [f"p{i}"]))
        joined.append(f"p{i}")
    nodes.append(helper.make_node("Sum", joined, ["y"]))
    constants = {f"at{i}": np.array([8 * i], np.int64) for i in range(5)}
    model = build(nodes, {"w": normal(32, 32), "axis": np.array([1], np.int64), **constants}, inputs=VECTOR)
    before = run(model, {"x": normal(3, 32, seed=1)})
    coverage = simplify(model, tmp_path)
    assert ops(model.graph) == ["MatMul"] * 4 + ["Sum"]
    assert coverage.touched[0].detail == "folded into gate0 and gate1 and 2 more"
    assert_same(before, run(model, {"x": normal(3, 32, seed=1)}))


def test_a_recurrent_weight_put_together_from_parts_becomes_one(tmp_path: pathlib.Path) -> None:
    hidden, nodes, parts = 4, [], []
    constants = {f"at{i}": np.array([hidden * i], np.int64) for i in range(4)}
    for direction in ("f", "b"):
        for i, gate in enumerate((1, 0, 2)):
            cut = [f"w_{direction}", f"at{gate}", f"at{gate + 1}"]
            nodes.append(helper.make_node("Slice", cut, [f"{direction}{i}"]))
        nodes.append(helper.make_node("Concat", [f"{direction}{i}" for i in range(3)], [f"{direction}c"], axis=0))
        nodes.append(helper.make_node("Unsqueeze", [f"{direction}c", "zero"], [f"{direction}u"]))
        parts.append(f"{direction}u")
    nodes.append(helper.make_node("Concat", parts, ["W"], axis=0))
    nodes.append(helper.make_node("GRU", ["x", "W", "R"], ["y", ""], direction="bidirectional", hidden_size=hidden))
    constants |= {"w_f": normal(12, 5), "w_b": normal(12, 5, seed=1), "R": normal(2, 12, 4, seed=2)}
    constants["zero"] = np.array([0], np.int64)
    model = build(nodes, constants, inputs={"x": (TensorProto.FLOAT, [7, 1, 5])})
    before = run(model, {"x": normal(7, 1, 5, seed=3)})
    coverage = simplify(model, tmp_path)
    assert ops(model.graph) == ["GRU"]
    assert {w.key: w.role for w in weights(model)} == {"R": "recurrent", "W": "recurrent"}
    assert [(t.key, t.bytes_before, t.bytes_after) for t in coverage.touched] == [("w_f", 240, 480), ("w_b", 240, 0)]
    assert_same(before, run(model, {"x": normal(7, 1, 5, seed=3)}))


def test_nothing_is_folded_that_would_grow_the_file(tmp_path: pathlib.Path) -> None:
    nodes = [
        helper.make_node("Cast", ["w16"], ["w"], to=TensorProto.FLOAT),  # twice the bytes
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Transpose", ["tied"], ["t"]),  # used as it is, too
        helper.make_node("MatMul", ["a", "tied"], ["b"]),
        helper.make_node("MatMul", ["b", "t"], ["c"]),
        helper.make_node("ConstantOfShape", ["shape"], ["ones"]),
        helper.make_node("Add", ["c", "ones"], ["d"]),
        helper.make_node("Expand", ["half", "shape"], ["e"]),
        helper.make_node("Add", ["d", "e"], ["y"]),
    ]
    constants = {
        "w16": normal(32, 16, dtype=np.float16),
        "tied": normal(16, 32),
        "shape": np.array([64, 16], np.int64),
        "half": np.array([0.5], F32),
    }
    model = build(nodes, constants, inputs={"x": (TensorProto.FLOAT, [64, 32])})
    coverage = simplify(model, tmp_path)
    assert coverage.rewrites == {}
    assert [(entry.key, entry.reason) for entry in coverage.left] == [
        ("w16", Reason.UNTOUCHED),
        ("tied", Reason.UNTOUCHED),
    ]


def test_a_small_result_of_a_large_intermediate_is_folded(tmp_path: pathlib.Path) -> None:
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["zeros"]),
        helper.make_node("Shape", ["zeros"], ["s"]),
        helper.make_node("Reshape", ["x", "s"], ["y"]),
    ]
    model = build(nodes, {"shape": np.array([4, 16], np.int64)}, inputs={"x": (TensorProto.FLOAT, [64])})
    assert simplify(model, tmp_path).rewrites["fold-constants"] == 2
    assert ops(model.graph) == ["Reshape"]


def test_a_hostile_size_is_not_computed(tmp_path: pathlib.Path) -> None:
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["z"]),
        helper.make_node("ReduceSum", ["z"], ["s"], keepdims=0),
        helper.make_node("Add", ["x", "s"], ["y"]),
    ]
    model = build(nodes, {"shape": np.array([1 << 20, 1 << 20], np.int64)}, inputs=VECTOR)
    assert not simplify(model, tmp_path).changed


@pytest.mark.parametrize("op", ["RandomNormalLike", "Bernoulli"])
def test_random_operators_stay(op: str, tmp_path: pathlib.Path) -> None:
    nodes = [
        *(helper.make_node(op, ["w"], [name]) for name in "ab"),
        helper.make_node("Add", ["a", "b"], ["c"]),
        helper.make_node("Add", ["x", "c"], ["y"]),
    ]
    model = build(nodes, {"w": np.full((32,), 0.5, F32)}, inputs=VECTOR)
    assert not simplify(model, tmp_path).changed


def test_quantization_and_encodings_stay(tmp_path: pathlib.Path) -> None:
    constants: dict[str, np.ndarray] = {
        "q": np.arange(-64, 64, dtype=np.int8).reshape(32, 4),
        "s": np.array(0.1, F32),
        "w": normal(4, 4),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s"], ["d"]),
        helper.make_node("MatMul", ["x", "d"], ["a"]),
        helper.make_node("MatMul", ["a", "w"], ["b"]),
        helper.make_node("MatMul", ["b", "v"], ["y"]),
    ]
    model = build(nodes, {**constants, "v": normal(4, 4, seed=1)}, inputs=VECTOR)
    found = {weight.key: weight for weight in weights(model)}
    # Two weights with equal codebooks: each owns its parts.
    for name in "wv":
        codes = np.arange(16, dtype=np.uint8).reshape(4, 4) % 4
        book = np.array([-1, -0.5, 0.5, 1], F32)
        found[name].replace(Codebook(codes, book))
    before = run(model, {"x": normal(3, 32, seed=1)})
    assert not simplify(model, tmp_path).changed
    assert {w.key: w.encoding.kind for w in weights(model)} == {"d": "affine", "w": "codebook", "v": "codebook"}
    assert_same(before, run(model, {"x": normal(3, 32, seed=1)}))


def test_folding_inside_branches_and_functions(tmp_path: pathlib.Path) -> None:
    def branch(name: str) -> onnx.GraphProto:
        nodes = [
            helper.make_node("Constant", [], [f"{name}/w"], value=numpy_helper.from_array(normal(16, 32))),
            helper.make_node("Transpose", [f"{name}/w"], [f"{name}/t"]),
            helper.make_node("MatMul", ["x", f"{name}/t"], [f"{name}/y"]),
        ]
        return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(f"{name}/y", 1, None)])

    function = helper.make_function(
        "local",
        "F",
        ["a"],
        ["r"],
        [
            helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(normal(4, 16, seed=2))),
            helper.make_node("Transpose", ["k"], ["kt"]),
            helper.make_node("MatMul", ["a", "kt"], ["r"]),
        ],
        [helper.make_opsetid("", 17)],
    )
    nodes = [
        helper.make_node("If", ["c"], ["h"], then_branch=branch("then"), else_branch=branch("else")),
        helper.make_node("F", ["h"], ["y"], domain="local"),
    ]
    inputs = {**VECTOR, "c": (TensorProto.BOOL, [])}
    model = build(nodes, {}, inputs=inputs, functions=[function])
    keys = [weight.key for weight in weights(model)]
    feeds = {"x": normal(3, 32, seed=1), "c": np.array(False)}
    before = run(model, feeds)
    coverage = simplify(model, tmp_path)
    assert coverage.rewrites == {"fold-constants": 3}
    assert [weight.key for weight in weights(model)] == keys
    assert ops(next(iter(model.functions.values()))) == ["Constant", "MatMul"]
    assert_same(before, run(model, feeds))


def test_a_constant_that_is_put_out_keeps_its_name(tmp_path: pathlib.Path) -> None:
    nodes = [helper.make_node("Mul", ["a", "b"], ["k"]), helper.make_node("Add", ["x", "k"], ["y"])]
    constants = {"a": normal(32), "b": normal(32, seed=1)}
    model = build(nodes, constants, inputs=VECTOR, outputs={"y": TensorProto.FLOAT, "k": TensorProto.FLOAT})
    before = run(model, {"x": normal(3, 32, seed=1)})
    simplify(model, tmp_path)
    assert ops(model.graph) == ["Constant", "Add"]
    assert_same(before, run(model, {"x": normal(3, 32, seed=1)}))


# If -------------------------------------------------------------------------------------------------------------------


def test_a_constant_condition_selects_its_branch(tmp_path: pathlib.Path) -> None:
    def branch(name: str, array: np.ndarray, op: str) -> onnx.GraphProto:
        # Both branches, and the graph around them, use the same names; the second output is handed through.
        nodes = [helper.make_node(op, ["x", "w"], ["m"]), helper.make_node("Relu", ["m"], ["r"])]
        outs = [helper.make_tensor_value_info(n, 1, None) for n in ("r", "w")]
        return helper.make_graph(nodes, name, [], outs, [numpy_helper.from_array(array, "w")])

    nodes = [
        helper.make_node("Not", ["no"], ["yes"]),
        helper.make_node(
            "If",
            ["yes"],
            ["h", "k"],
            then_branch=branch("t", normal(32), "Add"),
            else_branch=branch("e", normal(32, seed=1), "Mul"),
        ),
        helper.make_node("Neg", ["h"], ["w_2"]),
        helper.make_node("Add", ["w_2", "k"], ["y"]),
    ]
    outputs = {"y": TensorProto.FLOAT, "k": TensorProto.FLOAT}
    model = build(nodes, {"no": np.array(False)}, inputs=VECTOR, outputs=outputs)
    before = run(model, {"x": normal(3, 32, seed=1)})
    coverage = simplify(model, tmp_path)
    assert coverage.rewrites["inline-if"] == 1
    assert "If" not in ops(model.graph)
    assert {t.key: t.detail for t in coverage.touched} == {"h/then/w": "is now w", "h/else/w": "nothing used it"}
    assert_same(before, run(model, {"x": normal(3, 32, seed=1)}))


# Nodes that change nothing --------------------------------------------------------------------------------------------


def test_identities_go_and_the_interface_stays(tmp_path: pathlib.Path) -> None:
    nodes = [
        helper.make_node("Identity", ["x"], ["through"]),
        helper.make_node("Identity", ["x"], ["i"]),
        helper.make_node("Cast", ["i"], ["c"], to=TensorProto.FLOAT),
        helper.make_node("Dropout", ["c"], ["d"]),
        helper.make_node("Transpose", ["d"], ["t1"], perm=[1, 0]),
        helper.make_node("Transpose", ["t1"], ["t2"], perm=[1, 0]),
        helper.make_node("Relu", ["t2"], ["r"]),
        helper.make_node("Identity", ["r"], ["y"]),
    ]
    outputs = {"y": TensorProto.FLOAT, "through": TensorProto.FLOAT}
    model = build(nodes, {}, inputs=VECTOR, outputs=outputs)
    before = run(model, {"x": normal(3, 32)})
    coverage = simplify(model, tmp_path)
    assert ops(model.graph) == ["Identity", "Relu"]
    assert coverage.rewrites == {"remove-cast": 1, "remove-dropout": 1, "remove-identity": 2, "remove-transpose": 2}
    assert_same(before, run(model, {"x": normal(3, 32)}))


def test_pairs_that_move_elements_twice_become_one(tmp_path: pathlib.Path) -> None:
    nodes = [
        helper.make_node("Transpose", ["x"], ["a"], perm=[1, 2, 0]),
        helper.make_node("Transpose", ["a"], ["b"], perm=[0, 2, 1]),
        helper.make_node("Reshape", ["b", "flat"], ["c"]),
        helper.make_node("Reshape", ["c", "shape"], ["d"]),
        helper.make_node("Relu", ["d"], ["e"]),
        helper.make_node("Reshape", ["e", "flat"], ["f"]),
        helper.make_node("Reshape", ["f", "copy"], ["y"]),  # 0 copies a dimension of what stands before it
    ]
    constants = {
        "flat": np.array([6, -1], np.int64),
        "shape": np.array([2, 12], np.int64),
        "copy": np.array([0, 2, 2], np.int64),
    }
    model = build(nodes, constants, inputs={"x": (TensorProto.FLOAT, [2, 3, 4])})
    before = run(model, {"x": normal(2, 3, 4)})
    simplify(model, tmp_path)
    assert ops(model.graph) == ["Transpose", "Reshape", "Relu", "Reshape", "Reshape"]
    assert_same(before, run(model, {"x": normal(2, 3, 4)}))


def test_a_dropout_that_does_something_stays(tmp_path: pathlib.Path) -> None:
    masked = [helper.make_node("Dropout", ["x"], ["y", "mask"])]
    model = build(masked, {}, inputs=VECTOR, outputs={"y": TensorProto.FLOAT, "mask": TensorProto.BOOL})
    assert not simplify(model, tmp_path).changed
    training = [helper.make_node("Dropout", ["x", "ratio", "on"], ["y"])]
    constants = {"ratio": np.array(0.5, F32), "on": np.array(True)}
    assert not simplify(build(training, constants, inputs=VECTOR), tmp_path).changed


def test_an_output_of_an_if_keeps_its_identity(tmp_path: pathlib.Path) -> None:
    """The first output's name is the path of the weights in the branches: their keys must not change."""

    def branch(name: str, op: str) -> onnx.GraphProto:
        array = numpy_helper.from_array(normal(32), f"{name}w")
        nodes = [helper.make_node(op, ["x", f"{name}w"], [f"{name}y"])]
        return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(f"{name}y", 1, None)], [array])

    nodes = [
        helper.make_node("If", ["c"], ["h"], then_branch=branch("t", "Add"), else_branch=branch("e", "Mul")),
        helper.make_node("Identity", ["h"], ["y"]),
    ]
    model = build(nodes, {}, inputs={**VECTOR, "c": (TensorProto.BOOL, [])})
    assert sorted(weight.key for weight in weights(model)) == ["h/else/ew", "h/then/tw"]
    assert not simplify(model, tmp_path).changed


# Duplicates and dead code ---------------------------------------------------------------------------------------------


def test_equal_constants_and_nodes_are_kept_once(tmp_path: pathlib.Path) -> None:
    nodes = [
        helper.make_node("Constant", [], ["w3"], value=numpy_helper.from_array(normal(32, 8))),
        helper.make_node("MatMul", ["x", "w1"], ["a"]),
        helper.make_node("MatMul", ["x", "w2"], ["b"]),
        helper.make_node("MatMul", ["x", "w3"], ["c"]),
        helper.make_node("MatMul", ["x", "other"], ["d"]),
        helper.make_node("Sum", ["a", "b", "c", "d"], ["y"]),
    ]
    constants = {"w1": normal(32, 8), "w2": normal(32, 8), "other": normal(32, 8, seed=1)}
    model = build(nodes, constants, inputs=VECTOR)
    before = run(model, {"x": normal(3, 32)})
    coverage = simplify(model, tmp_path)
    assert ops(model.graph) == ["MatMul", "MatMul", "Sum"]
    assert coverage.rewrites == {"common-subexpression": 2, "deduplicate": 2}
    assert {t.key: (t.bytes_after, t.detail) for t in coverage.touched} == {
        "w2": (0, "equal to w1"),
        "w3": (0, "equal to w1"),
    }
    assert_same(before, run(model, {"x": normal(3, 32)}))


def test_zeros_of_both_signs_are_not_equal(tmp_path: pathlib.Path) -> None:
    nodes = [helper.make_node("Div", ["x", "plus"], ["a"]), helper.make_node("Div", ["a", "minus"], ["y"])]
    model = build(nodes, {"plus": np.zeros(32, F32), "minus": -np.zeros(32, F32)}, inputs=VECTOR)
    assert not simplify(model, tmp_path).changed


def test_outputs_and_what_a_caller_may_set_are_not_merged(tmp_path: pathlib.Path) -> None:
    nodes = [helper.make_node("Add", ["x", "a"], ["m"]), helper.make_node("Add", ["m", "b"], ["y"])]
    constants = {name: normal(32) for name in ("a", "b", "out")}
    model = build(
        nodes,
        constants,
        inputs=VECTOR,
        outputs={"y": TensorProto.FLOAT, "out": TensorProto.FLOAT},
        listed=["b"],
    )
    assert not simplify(model, tmp_path, freeze_initializers=False).changed


def test_dead_code_goes_with_what_its_branches_read(tmp_path: pathlib.Path) -> None:
    def branch(name: str, op: str) -> onnx.GraphProto:
        nodes = [helper.make_node(op, ["x", "only_there"], [f"{name}y"])]
        return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(f"{name}y", 1, None)])

    function = helper.make_function(
        "local", "F", ["a"], ["r"], [helper.make_node("Relu", ["a"], ["r"])], [helper.make_opsetid("", 17)]
    )
    nodes = [
        helper.make_node("If", ["c"], ["h"], then_branch=branch("t", "Add"), else_branch=branch("e", "Mul")),
        helper.make_node("F", ["h"], ["unused"], domain="local"),
        helper.make_node("Add", ["x", "kept"], ["y"]),
    ]
    constants = {"only_there": normal(32), "kept": normal(32, seed=1), "never": normal(32, seed=2)}
    inputs = {**VECTOR, "c": (TensorProto.BOOL, [])}
    model = build(nodes, constants, inputs=inputs, functions=[function])
    coverage = simplify(model, tmp_path)
    assert ops(model.graph) == ["Add"]
    assert list(model.graph.initializers) == ["kept"]
    assert not model.functions
    assert [v.name for v in model.graph.inputs] == ["x", "c"]
    assert coverage.rewrites == {"dead-function": 1, "dead-initializer": 2, "dead-node": 2}
    assert {t.key: t.detail for t in coverage.touched} == dict.fromkeys(["only_there", "never"], "nothing used it")


# Parameters -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ir_version", [3, 8])
def test_initializers_that_are_inputs_become_constants(ir_version: int, tmp_path: pathlib.Path) -> None:
    nodes = [helper.make_node("Transpose", ["w"], ["t"]), helper.make_node("MatMul", ["x", "t"], ["y"])]

    def model() -> ir.Model:
        return build(nodes, {"w": normal(8, 32)}, inputs=VECTOR, opset=8, ir_version=ir_version, listed=["w"])

    frozen = model()
    coverage = simplify(frozen, tmp_path)
    assert coverage.rewrites == {"fold-constants": 1, "freeze-initializers": 1}
    assert len(coverage.warnings) == (1 if ir_version >= 4 else 0)
    assert [v.name for v in frozen.graph.inputs] == ["x"]
    assert frozen.ir_version == max(ir_version, 4)
    kept = model()
    before = run(kept, {"x": normal(3, 32)})
    coverage = simplify(kept, tmp_path, freeze_initializers=False)
    # Below IR 4 they are constants to ONNX Runtime whether or not they are listed.
    assert coverage.rewrites == ({} if ir_version >= 4 else {"fold-constants": 1})
    assert [v.name for v in kept.graph.inputs] == (["x", "w"] if ir_version >= 4 else ["x"])
    assert kept.ir_version == ir_version
    assert_same(before, run(kept, {"x": normal(3, 32)}))
    assert_same(before, run(frozen, {"x": normal(3, 32)}))


@pytest.mark.parametrize(
    ("parameter", "rule"),
    [
        ("fold_constants", "fold-constants"),
        ("fold_batch_norm", "fold-batch-norm"),
        ("deduplicate", "deduplicate"),
        ("remove_dead", "dead-initializer"),
        ("freeze_initializers", "freeze-initializers"),
    ],
)
def test_each_parameter_switches_its_rule(parameter: str, rule: str, tmp_path: pathlib.Path) -> None:
    def model() -> ir.Model:
        nodes = [
            helper.make_node("Conv", ["x", "w"], ["c"]),
            helper.make_node("BatchNormalization", ["c", *NORM], ["n"]),
            helper.make_node("Neg", ["k"], ["m"]),
            helper.make_node("Add", ["n", "m"], ["a"]),
            helper.make_node("Mul", ["a", "k2"], ["b"]),
            helper.make_node("Mul", ["b", "k3"], ["y"]),
        ]
        constants = {
            "w": normal(6, 4, 3, 3),
            **statistics(6),
            "k": normal(6, 1, 1, seed=6),
            "k2": normal(6, 1, 1, seed=7),
            "k3": normal(6, 1, 1, seed=7),
            "never": normal(9),
            "free": normal(9),
        }
        return build(nodes, constants, inputs=IMAGE, listed=["free"])

    assert rule in simplify(model(), tmp_path).rewrites
    assert rule not in simplify(model(), tmp_path, **{parameter: False}).rewrites


def test_excluded_weights_stay_as_they_are(tmp_path: pathlib.Path) -> None:
    model = conv_norm(True)
    coverage = simplify(model, tmp_path, select=Select(exclude=["w"]))
    assert ops(model.graph) == ["Conv", "BatchNormalization"]
    assert {entry.key: entry.reason for entry in coverage.left}["w"] is Reason.EXCLUDED


# Real models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(BUNDLED.glob("*/model.onnx")), ids=lambda p: p.parent.name)
def test_bundled_models_put_out_the_same(path: pathlib.Path, tmp_path: pathlib.Path) -> None:
    model = load(path)
    with np.load(path.parent / "calib.npz") as data, open_session(path) as session:
        feeds = {p.name: data[p.name][:16].astype(p.dtype) for p in session.inputs if p.name in data}
        if len(feeds) < len(session.inputs):
            pytest.skip("its calibration data is not made of whole calls")
        before = session.run(feeds)
    norms = ops(model.graph).count("BatchNormalization")
    coverage = simplify(model, tmp_path)
    assert coverage.rewrites.get("fold-batch-norm", 0) == norms
    assert ops(model.graph).count("BatchNormalization") == 0
    assert_same(before, run(model, feeds), 5e-6 if norms else 0.0)


ZOO = pathlib.Path(os.environ.get("ONNXCOMPRESS_ZOO", "/nonexistent"))


@pytest.mark.skipif(not ZOO.is_dir(), reason="ONNXCOMPRESS_ZOO is not set")
@pytest.mark.parametrize("entry", sorted(p.parent.name for p in ZOO.glob("*/feeds.npz")))
def test_zoo_models_put_out_the_same(entry: str, tmp_path: pathlib.Path) -> None:
    path = ZOO / entry / "model.onnx"
    with np.load(ZOO / entry / "feeds.npz") as data, open_session(path) as session:
        feeds = {}
        for port in session.inputs:
            array = data[port.name]
            fixed = port.shape[0] if port.shape and isinstance(port.shape[0], int) else 4
            feeds[port.name] = np.asarray(array[0] if array.ndim > len(port.shape) else array[:fixed])
        before = session.run(feeds)
    model = load(path)
    norms = simplify(model, tmp_path).rewrites.get("fold-batch-norm", 0)
    after = run(model, feeds)
    for name, value in before.items():
        if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
            assert str(value) == str(after[name])
        elif norms:
            assert np.abs(value - after[name]).max() <= 5e-6 * np.abs(value).max()
        else:
            assert value.tobytes() == after[name].tobytes()
