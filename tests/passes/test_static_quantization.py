"""Static int8 quantization: what runs in integers, what stays in float, and that the numbers hold."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto

import onnxcompress as oc
from onnxcompress.contract import Select
from onnxcompress.errors import DataError, PassError
from onnxcompress.model.load import load
from onnxcompress.passes.static_quantization import StaticQuantization
from tests.builders import by_key, constant, floats, function, graph, info, model, node, run, tensors
from tests.passes.quantized import Calls, decibel, details, executed, operators, quantized, reasons


def residual_net(
    activation: Callable[[str, str], onnx.NodeProto] = lambda a, b: node("Relu", [a], [b]), opset: int = 17
) -> onnx.ModelProto:
    """Convolution, depthwise convolution, a residual block, pooling and a classifier."""
    nodes = [
        node("Conv", ["x", "w0", "b0"], ["c0"], pads=[1] * 4),
        activation("c0", "a0"),
        node("Conv", ["a0", "w1", "b1"], ["c1"], pads=[1] * 4, group=16),
        activation("c1", "a1"),
        node("Conv", ["a1", "w2"], ["c2"]),
        node("Add", ["a0", "c2"], ["s"]),
        node("Relu", ["s"], ["r"]),
        node("MaxPool", ["r"], ["m"], kernel_shape=[2, 2], strides=[2, 2]),
        node("GlobalAveragePool", ["m"], ["p"]),
        node("Flatten", ["p"], ["f"]),
        node("Gemm", ["f", "w3", "b3"], ["y"], transB=1),
    ]
    constants = tensors(
        w0=floats(16, 3, 3, 3) / 5, b0=floats(16, seed=1) / 5, w1=floats(16, 1, 3, 3, seed=2) / 3,
        b1=floats(16, seed=3) / 5, w2=floats(16, 16, 1, 1, seed=4) / 4, w3=floats(10, 16, seed=5) / 4,
        b3=floats(10, seed=6) / 5, low=np.array(0, np.float32), high=np.array(6, np.float32),
    )  # fmt: skip
    return model(graph(nodes, [info("x", ["n", 3, 12, 12])], [info("y", ["n", 10])], constants), opset)


def images(count: int = 3) -> Calls:
    return Calls(*({"x": floats(8, 3, 12, 12, seed=50 + seed)} for seed in range(count)))


@pytest.mark.parametrize("kind", ["Relu", "Clip"])
def test_a_residual_network_runs_in_integers_from_end_to_end(kind: str, tmp_path: pathlib.Path) -> None:
    clip = kind == "Clip"
    proto = residual_net(lambda a, b: node("Clip", [a, "low", "high"], [b]) if clip else node("Relu", [a], [b]))
    data, coverage, _ = quantized(proto, StaticQuantization(min_sqnr=15), tmp_path, feeds=images())
    assert coverage.rewrites["static integer layers"] == 4
    ran = executed(data, tmp_path)
    assert (ran["QLinearConv"], ran["QLinearAdd"], ran["QLinearGlobalAveragePool"], ran["QGemm"]) == (3, 1, 1, 1)
    assert ran["QuantizeLinear"] == 1
    assert ran["Conv"] + ran["Add"] + ran["Relu"] + ran["Clip"] + ran["DequantizeLinear"] == 0
    x = {"x": floats(8, 3, 12, 12, seed=99)}
    assert decibel(run(proto.SerializeToString(), x)[0], run(data, x)[0]) > 20
    assert reasons(coverage) == {"b0": "role", "b1": "role"}
    assert details(coverage)["b3"] == "int32 bias of an integer Gemm"


def test_weights_keep_their_keys_and_values(tmp_path: pathlib.Path) -> None:
    proto = residual_net()
    data, coverage, _ = quantized(proto, StaticQuantization(), tmp_path, feeds=images())
    again, before = by_key(load(data)), by_key(load(proto.SerializeToString()))
    assert sorted(again) == sorted(before)
    for entry in coverage.touched:
        assert again[entry.key].encoding.kind == "affine"
        original = before[entry.key].array()
        error = np.linalg.norm(again[entry.key].array() - original) / np.linalg.norm(original)
        assert error == pytest.approx(entry.error, rel=1e-4, abs=1e-7)
        assert error < 0.02


def test_batch_normalization_is_folded_and_accounted_for(tmp_path: pathlib.Path) -> None:
    nodes = [
        node("Conv", ["x", "w"], ["c"]),
        node("BatchNormalization", ["c", "gamma", "beta", "mean", "var"], ["n"]),
        node("Relu", ["n"], ["y"]),
    ]
    constants = tensors(
        w=floats(32, 16, 3, 3) / 8, gamma=floats(32, seed=1), beta=floats(32, seed=2), mean=floats(32, seed=3),
        var=np.abs(floats(32, seed=4)) + 0.1,
    )  # fmt: skip
    proto = model(graph(nodes, [info("x", ["n", 16, 8, 8])], [info("y", ["n", 32, 6, 6])], constants))
    feeds = Calls({"x": floats(4, 16, 8, 8, seed=5)})
    data, coverage, made = quantized(proto, StaticQuantization(), tmp_path, feeds=feeds)
    assert coverage.rewrites["BatchNormalization folded"] == 1
    assert {k for k, d in details(coverage).items() if d == "folded into a convolution"} == {
        "gamma",
        "beta",
        "mean",
        "var",
    }
    assert operators(made)["BatchNormalization"] == 0
    assert executed(data, tmp_path)["QLinearConv"] == 1
    x = {"x": floats(4, 16, 8, 8, seed=6)}
    assert decibel(run(proto.SerializeToString(), x)[0], run(data, x)[0]) > 30


def attention() -> onnx.ModelProto:
    """One head with a mask of large negative numbers, layer normalization and a residual."""
    nodes = [
        *[node("MatMul", ["x", w], [f"x{w}"]) for w in "qkv"],
        node("Transpose", ["xk"], ["kt"], perm=[0, 2, 1]),
        node("MatMul", ["xq", "kt"], ["scores"]),
        node("Add", ["scores", "mask"], ["masked"]),
        node("Softmax", ["masked"], ["p"], axis=-1),
        node("MatMul", ["p", "xv"], ["a"]),
        node("MatMul", ["a", "o"], ["ao"]),
        node("Add", ["ao", "x"], ["s"]),
        node("LayerNormalization", ["s", "g"], ["y"]),
    ]
    constants = tensors(
        **{w: floats(32, 32, seed=i) / 6 for i, w in enumerate("qkvo")},
        g=np.ones(32, np.float32),
        mask=np.triu(np.full((6, 6), -1e4, np.float32), 1),
    )
    return model(graph(nodes, [info("x", ["n", 6, 32])], [info("y", ["n", 6, 32])], constants))


def test_attention_scores_masks_and_normalization_stay_in_float(tmp_path: pathlib.Path) -> None:
    proto = attention()
    feeds = Calls(*({"x": floats(4, 6, 32, seed=20 + seed)} for seed in range(6)))
    data, coverage, made = quantized(proto, StaticQuantization(), tmp_path, feeds=feeds)
    assert set(details(coverage)) == set("qkvo")
    assert operators(made)["QuantizeLinear"] == 2  # x, once for three products, and a
    ran = executed(data, tmp_path)
    assert (ran["MatMulIntegerToFloat"], ran["MatMul"] + ran["FusedMatMul"]) == (4, 2)
    x = {"x": floats(4, 6, 32, seed=10)}
    assert decibel(run(proto.SerializeToString(), x)[0], run(data, x)[0]) > 30


def test_a_layer_that_loses_too_much_keeps_float_activations(tmp_path: pathlib.Path) -> None:
    def calls(seed: int) -> dict[str, np.ndarray]:
        spiky = floats(4, 48, seed=seed)
        spiky[:, 0] = 4000.0  # an outlier channel that no weight listens to
        return {"x": spiky, "z": floats(4, 48, seed=seed + 1)}

    deaf = floats(48, 40, seed=2)
    deaf[0] = 0
    nodes = [node("MatMul", ["x", "deaf"], ["y"]), node("MatMul", ["z", "good"], ["u"])]
    inputs, outputs = [info("x", ["n", 48]), info("z", ["n", 48])], [info("y", ["n", 40]), info("u", ["n", 40])]
    proto = model(graph(nodes, inputs, outputs, tensors(deaf=deaf, good=floats(48, 40, seed=3))))
    data, coverage, _ = quantized(proto, StaticQuantization(), tmp_path, feeds=Calls(calls(20), calls(30)))
    assert details(coverage)["deaf"].startswith(
        "int8 weights expanded at load: in integers its layer has 0.0 dB, below 24"
    )
    assert details(coverage)["good"] == "int8 MatMul, neighbours range"
    feeds = calls(40)
    for before, after in zip(run(proto.SerializeToString(), feeds), run(data, feeds), strict=True):
        assert decibel(before, after) > 30


def test_layers_in_branches_are_calibrated_where_they_run(tmp_path: pathlib.Path) -> None:
    def branch(name: str, seed: int) -> onnx.GraphProto:
        nodes = [
            constant(f"{name}_w", floats(16, 8, 3, seed=seed) / 5),
            node("Conv", ["x", f"{name}_w"], [f"{name}_c"]),
            node("Relu", [f"{name}_c"], [f"{name}_y"]),
        ]
        return graph(nodes, [], [info(f"{name}_y", ["n", 16, "t"])], name=name)

    nodes = [node("If", ["c"], ["y"], then_branch=branch("yes", 1), else_branch=branch("no", 2))]
    inputs = [info("x", ["n", 8, "t"]), info("c", [], TensorProto.BOOL)]
    proto = model(graph(nodes, inputs, [info("y", ["n", 16, "t"])]))
    calls = [{"x": floats(2, 8, 20, seed=s), "c": np.array(True)} for s in range(3)]
    data, coverage, _ = quantized(proto, StaticQuantization(), tmp_path, feeds=Calls(*calls))
    never = "int8 weights expanded at load: its activations were never seen in the data"
    assert details(coverage) == {"y/then/yes_w": "int8 Conv, neighbours range", "y/else/no_w": never}
    for chosen in (True, False):
        x = {"x": floats(2, 8, 20, seed=9), "c": np.array(chosen)}
        assert decibel(run(proto.SerializeToString(), x)[0], run(data, x)[0]) > 28


def test_an_old_opset_is_lifted_where_nothing_changes(tmp_path: pathlib.Path) -> None:
    proto = residual_net(opset=8)
    data, coverage, made = quantized(proto, StaticQuantization(min_sqnr=15), tmp_path, feeds=images())
    assert coverage.rewrites["opset lifted from 8 to 13"] == 1
    assert made.opset_imports[""] == 13
    assert executed(data, tmp_path)["QLinearConv"] == 3
    x = {"x": floats(8, 3, 12, 12, seed=99)}
    assert decibel(run(proto.SerializeToString(), x)[0], run(data, x)[0]) > 20


def test_what_cannot_be_lifted_gets_small_weights_at_least(tmp_path: pathlib.Path) -> None:
    inner = function("Twice", ["a"], ["b"], [node("Add", ["a", "a"], ["b"])], opset=11)
    nodes = [node("Conv", ["x", "w"], ["c"]), node("Twice", ["c"], ["y"], domain="test")]
    body = graph(nodes, [info("x", ["n", 16, 9])], [info("y", ["n", 32, 7])], tensors(w=floats(32, 16, 3)))
    proto = model(body, opset=11, functions=[inner], domains={"test": 1})
    data, coverage, made = quantized(
        proto, StaticQuantization(), tmp_path, feeds=Calls({"x": floats(2, 16, 9, seed=1)})
    )
    assert made.opset_imports[""] == 11
    obstacle = "integer layers need opset 13, the model has 11: it defines functions of its own"
    assert coverage.warnings[0].startswith(obstacle)
    assert details(coverage)["w"].startswith(f"int8 weights expanded at load: {obstacle}")
    x = {"x": floats(2, 16, 9, seed=2)}
    assert decibel(run(proto.SerializeToString(), x)[0], run(data, x)[0]) > 35


def test_tensorrt_gets_signed_symmetric_activations_and_float_bias(tmp_path: pathlib.Path) -> None:
    data, coverage, _ = quantized(residual_net(), StaticQuantization(), tmp_path, feeds=images(), target="tensorrt")
    proto = onnx.load_from_string(data)
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    points = [n for n in proto.graph.node if n.op_type == "QuantizeLinear"]
    # what the four layers take, and the skip input of the addition, which is one of them
    assert sorted(n.input[0] for n in points) == ["a0", "a1", "f", "x"]
    for n in points:
        assert held[n.input[2]].dtype == np.int8
        assert not held[n.input[2]].any()
    assert {"b0", "b1", "b3"} <= set(reasons(coverage))
    assert not any(array.dtype in (np.uint8, np.int32) for array in held.values())


def test_names_of_outputs_and_exclusions_hold(tmp_path: pathlib.Path) -> None:
    nodes = [node("Conv", ["x", "w"], ["y"], name="head"), node("Conv", ["x", "v"], ["u"], name="other")]
    outputs = [info("y", ["n", 32, 7]), info("u", ["n", 32, 7])]
    constants = tensors(w=floats(32, 16, 3), v=floats(32, 16, 3, seed=1))
    proto = model(graph(nodes, [info("x", ["n", 16, 9])], outputs, constants))
    feeds = Calls({"x": floats(8, 16, 9, seed=2)})
    the_pass = StaticQuantization(select=Select(exclude=["other"]))
    data, coverage, made = quantized(proto, the_pass, tmp_path, feeds=feeds)
    assert [value.name for value in made.graph.outputs] == ["y", "u"]
    assert reasons(coverage) == {"v": "excluded"}
    before, after = run(proto.SerializeToString(), feeds.calls[0]), run(data, feeds.calls[0])
    assert decibel(before[0], after[0]) > 30
    assert np.allclose(before[1], after[1], atol=1e-5)  # float convolution, another layout


def test_bytes_do_not_depend_on_threads(tmp_path: pathlib.Path) -> None:
    (tmp_path / "two").mkdir()
    one = quantized(residual_net(), StaticQuantization(), tmp_path, feeds=images(5))[0]
    two = quantized(residual_net(), StaticQuantization(), tmp_path / "two", feeds=images(5), threads=2)[0]
    assert one == two


def test_data_is_needed_and_must_fit(tmp_path: pathlib.Path) -> None:
    with pytest.raises(PassError, match="needs calibration data"):
        quantized(residual_net(), StaticQuantization(), tmp_path)
    for opset in (8, 17):
        with pytest.raises(DataError, match="x"):
            quantized(residual_net(opset=opset), StaticQuantization(), tmp_path, feeds=Calls({"z": floats(1)}))


def test_face_detector_of_the_zoo(zoo: pathlib.Path, tmp_path: pathlib.Path) -> None:
    proto = onnx.load(zoo / "ultraface_rfb320" / "model.onnx")
    name = proto.graph.input[0].name
    images = np.load(zoo / "ultraface_rfb320" / "feeds.npz")[name][:8]
    calls = Calls(*({name: image[None].astype(np.float32)} for image in images[:6]))
    data, coverage, _ = quantized(proto, StaticQuantization(), tmp_path, feeds=calls)
    assert coverage.rewrites["BatchNormalization folded"] == 35
    ran = executed(data, tmp_path)
    assert ran["QLinearConv"] == coverage.rewrites["static integer layers"] >= 50
    assert ran["Conv"] <= 2
    feeds = {name: images[7][None].astype(np.float32)}
    for before, after in zip(run(proto.SerializeToString(), feeds), run(data, feeds), strict=True):
        assert decibel(before, after) > 20


def test_a_folded_bias_takes_the_name_of_the_one_it_replaces(tmp_path: pathlib.Path) -> None:
    """A BatchNormalization whose output is called `norm` and whose bias is called `norm.bias`."""
    nodes = [
        node("Conv", ["x", "w"], ["c"]),
        node("BatchNormalization", ["c", "scale", "norm.bias", "mean", "variance"], ["norm"]),
        node("Relu", ["norm"], ["y"]),
    ]
    vectors = {name: floats(8, seed=at) for at, name in enumerate(("scale", "norm__bias", "mean"), 1)}
    given = tensors(w=floats(8, 4, 3, 3), variance=np.full(8, 2, np.float32), **vectors)
    parent = model(graph(nodes, [info("x", ["n", 4, 6, 6])], [info("y", ["n", 8, 4, 4])], given))
    onnx.save(parent, tmp_path / "parent.onnx")
    data = {"x": floats(8, 4, 6, 6)}
    oc.compress(tmp_path / "parent.onnx", ["static-quantization"], out=tmp_path / "out.onnx", calibration=data)
    assert "norm.bias" in {tensor.name for tensor in onnx.load(tmp_path / "out.onnx").graph.initializer}
    assert not oc.verify(tmp_path / "out.onnx", tmp_path / "parent.onnx").problems
