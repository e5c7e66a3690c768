"""Dynamic int8 quantization: integer products, integer rows, weights expanded at load."""

from __future__ import annotations

import pathlib

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from onnxcompress.contract import Select
from onnxcompress.errors import RecipeError
from onnxcompress.model.load import load
from onnxcompress.numerics.affine import pair_sum_bound
from onnxcompress.numerics.transforms import is_transform
from onnxcompress.passes.dynamic_quantization import DynamicQuantization
from onnxcompress.passes.quantization.integers import conv_orders, per_channel
from tests.builders import by_key, constant, floats, function, graph, info, model, node, run, tensors
from tests.passes.quantized import decibel, details, executed, operators, quantized, reasons


def projections(opset: int = 17) -> onnx.ModelProto:
    """Three products of one input, one with a bias, and one more of a sum of theirs."""
    nodes = [
        node("MatMul", ["x", "q"], ["xq"], name="query"),
        node("MatMul", ["x", "k"], ["xk"]),
        node("MatMul", ["x", "v"], ["xv0"]),
        node("Add", ["xv0", "b"], ["xv"]),
        node("Add", ["xq", "xk"], ["s0"]),
        node("Add", ["s0", "xv"], ["s"]),
        node("MatMul", ["s", "o"], ["y"]),
    ]
    constants = tensors(
        q=floats(48, 64, seed=1), k=floats(48, 64, seed=2), v=floats(48, 64, seed=3), o=floats(64, 32, seed=4),
        b=floats(64, seed=5),
    )  # fmt: skip
    return model(graph(nodes, [info("x", ["n", "t", 48])], [info("y", ["n", "t", 32])], constants), opset)


def test_products_fuse_and_share_their_input(tmp_path: pathlib.Path) -> None:
    proto = projections()
    data, coverage, made = quantized(proto, DynamicQuantization(), tmp_path)
    assert details(coverage) == dict.fromkeys("qkvo", "integer product, neighbours range")
    assert reasons(coverage) == {"b": "role"}
    assert operators(made)["DynamicQuantizeLinear"] == 2
    ran = executed(data, tmp_path)
    assert (ran["MatMulIntegerToFloat"], ran["DynamicQuantizeMatMul"], ran["MatMul"]) == (3, 1, 0)
    x = {"x": floats(2, 5, 48, seed=9)}
    assert decibel(run(proto.SerializeToString(), x)[0], run(data, x)[0]) > 30
    assert len(data) < 0.4 * len(proto.SerializeToString())


def test_weights_are_found_again_with_what_is_computed(tmp_path: pathlib.Path) -> None:
    proto = projections()
    data, coverage, _ = quantized(proto, DynamicQuantization(), tmp_path)
    again, before = by_key(load(data)), by_key(load(proto.SerializeToString()))
    assert sorted(again) == sorted(before)
    for entry in coverage.touched:
        weight, original = again[entry.key], before[entry.key].array()
        assert (weight.encoding.kind, weight.nbytes) == ("affine", entry.bytes_after)
        error = np.linalg.norm(weight.array() - original) / np.linalg.norm(original)
        assert error == pytest.approx(entry.error, rel=1e-4)
        assert 0.002 < error < 0.015
    _, second, _ = quantized(onnx.load_from_string(data), DynamicQuantization(), tmp_path)
    assert set(reasons(second)) == set("qkvob")
    assert second.touched == []


def test_integers_cannot_saturate_sixteen_bits() -> None:
    for seed in range(4):
        array = floats(33, 24, seed=seed)
        array[4:6, 3] = 5.0  # two large neighbours
        q = per_channel(array, 1, "neighbours", [array.T]).q
        assert not pair_sum_bound(q, axis=0).saturates
        assert np.abs(q.astype(int)).max() > 64  # finer than half of the range
        assert pair_sum_bound(per_channel(array, 1, "full").q, axis=0).saturates
        reduced = per_channel(array, 1, "reduced").q
        assert not pair_sum_bound(reduced, axis=0, neighbours=False).saturates
        kernel = floats(8, 6, 3, 3, seed=seed)
        q = per_channel(kernel, 0, "neighbours", conv_orders(kernel)).q
        for order in conv_orders(q):
            assert not pair_sum_bound(order, axis=1).saturates


def test_gemm_turned_with_a_bias(tmp_path: pathlib.Path) -> None:
    nodes = [node("Gemm", ["x", "w", "b"], ["y"], transB=1, name="dense"), node("Gemm", ["y", "v"], ["z"], alpha=0.5)]
    constants = tensors(w=floats(40, 64), b=floats(40, seed=1), v=floats(40, 30, seed=2))
    proto = model(graph(nodes, [info("x", ["n", 64])], [info("z", ["n", 30])], constants))
    data, coverage, made = quantized(proto, DynamicQuantization(), tmp_path)
    assert details(coverage)["w"] == "integer product, neighbours range"
    assert details(coverage)["v"] == "int8 weights expanded at load: a Gemm that scales or turns its operands"
    x = {"x": floats(3, 64, seed=4)}
    assert decibel(run(proto.SerializeToString(), x)[0], run(data, x)[0]) > 30
    assert operators(made)["MatMulInteger"] == 1


def test_weights_in_branches_and_loops(tmp_path: pathlib.Path) -> None:
    def branch(name: str, seed: int) -> onnx.GraphProto:
        nodes = [constant(f"{name}_w", floats(32, 32, seed=seed)), node("MatMul", ["x", f"{name}_w"], [f"{name}_y"])]
        return graph(nodes, [], [info(f"{name}_y", ["n", 32])], name=name)

    body = graph(
        [
            node("MatMul", ["state", "shared"], ["next0"]),
            node("Tanh", ["next0"], ["next"]),
            node("Identity", ["going"], ["on"]),
        ],
        [info("i", [], TensorProto.INT64), info("going", [], TensorProto.BOOL), info("state", ["n", 32])],
        [info("on", [], TensorProto.BOOL), info("next", ["n", 32])],
    )
    nodes = [
        node("If", ["c"], ["h"], then_branch=branch("yes", 1), else_branch=branch("no", 2)),
        node("Loop", ["trips", "", "h"], ["y"], body=body),
    ]
    constants = tensors(shared=floats(32, 32, seed=3) / 6, trips=np.array(3, np.int64))
    inputs = [info("x", ["n", 32]), info("c", [], TensorProto.BOOL)]
    proto = model(graph(nodes, inputs, [info("y", ["n", 32])], constants))
    data, coverage, _ = quantized(proto, DynamicQuantization(), tmp_path)
    assert set(details(coverage)) == {"h/then/yes_w", "h/else/no_w", "shared"}
    assert coverage.rewrites == {"dynamic integer products": 3}
    assert sorted(by_key(load(data))) == sorted(by_key(load(proto.SerializeToString())))
    for chosen in (True, False):
        x = {"x": floats(4, 32, seed=5), "c": np.array(chosen)}
        assert decibel(run(proto.SerializeToString(), x)[0], run(data, x)[0]) > 25


def test_rows_are_looked_up_as_integers(tmp_path: pathlib.Path) -> None:
    table = floats(300, 32) * np.geomspace(0.01, 10, 300)[:, None].astype(np.float32)
    nodes = [
        node("Gather", ["table", "ids"], ["e"]),
        node("Cast", ["half"], ["f"], to=1),
        node("Gather", ["f", "ids"], ["g"]),
        node("Add", ["e", "g"], ["y"]),
    ]
    constants = tensors(table=table, half=floats(300, 32, seed=1).astype(np.float16))
    proto = model(graph(nodes, [info("ids", ["n", "t"], TensorProto.INT64)], [info("y", ["n", "t", 32])], constants))
    data, coverage, made = quantized(proto, DynamicQuantization(), tmp_path)
    assert set(details(coverage).values()) == {"int8 rows, looked up as integers"}
    ids = np.array([[0, 299, 7], [7, 8, 150]], np.int64)
    y = run(data, {"ids": ids})[0]
    expected = run(proto.SerializeToString(), {"ids": ids})[0]
    assert np.abs(y - expected).max(axis=-1).max() <= np.abs(expected).max() / 200
    again = by_key(load(data))
    assert np.abs(again["table"].array() - table).max(axis=1) == pytest.approx(0, abs=0.2)
    rows = np.abs(again["table"].array() - table).max(axis=1) / np.abs(table).max(axis=1)
    assert rows.max() <= 0.5 / 127 * 1.001  # each row has a scale of its own
    assert operators(made)["Gather"] == 4
    assert executed(data, tmp_path)["Gather"] == 4  # nothing expands the table


def test_convolutions_and_recurrent_cells_are_expanded_at_load(tmp_path: pathlib.Path) -> None:
    nodes = [
        node("Conv", ["x", "k"], ["c"], pads=[1, 1]),
        node("Transpose", ["c"], ["t"], perm=[2, 0, 1]),
        node("LSTM", ["t", "w", "r"], ["y"], hidden_size=16),
    ]
    constants = tensors(k=floats(24, 8, 3) / 5, w=floats(1, 64, 24, seed=1) / 5, r=floats(1, 64, 16, seed=2) / 4)
    proto = model(graph(nodes, [info("x", ["n", 8, "t"])], [info("y", ["t", 1, "n", 16])], constants))
    data, coverage, _ = quantized(proto, DynamicQuantization(), tmp_path)
    assert set(details(coverage).values()) == {"int8 weights expanded at load"}
    axes = {key: weight.encoding.axis for key, weight in by_key(load(data)).items()}  # type: ignore[attr-defined]
    assert axes == {"k": 0, "w": 1, "r": 1}
    x = {"x": floats(2, 8, 12, seed=3)}
    assert decibel(run(proto.SerializeToString(), x)[0], run(data, x)[0]) > 35
    ran = executed(data, tmp_path)
    assert ran["Dequantize"] == ran["DequantizeLinear"] == ran["ConvInteger"] == 0


@pytest.mark.parametrize(
    ("opset", "form"), [(11, "integer product"), (10, "int8 weights expanded"), (7, "int8 weights expanded")]
)
def test_old_opsets_get_what_they_can_run(opset: int, form: str, tmp_path: pathlib.Path) -> None:
    proto = projections(opset)
    data, coverage, made = quantized(proto, DynamicQuantization(), tmp_path)
    assert all(detail.startswith(form) for detail in details(coverage).values())
    assert len(details(coverage)) == 4
    assert made.opset_imports[""] == opset
    x = {"x": floats(1, 5, 48, seed=9)}
    assert decibel(run(proto.SerializeToString(), x)[0], run(data, x)[0]) > 30


def test_a_table_tied_to_the_head_stays_one(tmp_path: pathlib.Path) -> None:
    nodes = [
        node("Gather", ["table", "ids"], ["e"]),
        node("Transpose", ["table"], ["head"], perm=[1, 0]),
        node("MatMul", ["e", "head"], ["y"]),
    ]
    proto = model(
        graph(nodes, [info("ids", ["n"], TensorProto.INT64)], [info("y", ["n", 90])], tensors(table=floats(90, 64)))
    )
    data, coverage, _ = quantized(proto, DynamicQuantization(), tmp_path)
    assert details(coverage)["table"].startswith("int8 weights expanded at load")
    ids = {"ids": np.arange(20)}
    assert decibel(run(proto.SerializeToString(), ids)[0], run(data, ids)[0]) > 35


def test_half_precision_weights_behind_casts(tmp_path: pathlib.Path) -> None:
    nodes = [node("Cast", ["w"], ["f"], to=1), node("MatMul", ["x", "f"], ["y"])]
    proto = model(
        graph(nodes, [info("x", ["n", 64])], [info("y", ["n", 48])], tensors(w=floats(64, 48).astype(np.float16)))
    )
    data, coverage, made = quantized(proto, DynamicQuantization(), tmp_path)
    assert details(coverage) == {"w": "integer product, neighbours range"}
    assert operators(made)["Cast"] == 1  # of the int32 sums; that of the weight is gone
    x = {"x": floats(3, 64, seed=1)}
    assert decibel(run(proto.SerializeToString(), x)[0], run(data, x)[0]) > 30


def test_weights_in_functions_and_listed_as_inputs(tmp_path: pathlib.Path) -> None:
    inner = function("Dense", ["a"], ["b"], [constant("fw", floats(32, 32)), node("MatMul", ["a", "fw"], ["b"])])
    nodes = [node("Dense", ["x"], ["h"], domain="test"), node("MatMul", ["h", "w"], ["y"])]
    inputs = [info("x", ["n", 32]), info("w", [32, 32])]
    body = graph(nodes, inputs, [info("y", ["n", 32])], tensors(w=floats(32, 32, seed=1)))
    proto = model(body, functions=[inner], domains={"test": 1})
    data, coverage, made = quantized(proto, DynamicQuantization(), tmp_path)
    assert details(coverage)["Dense/fw"] == "int8 weights expanded at load: it is in a function"
    assert details(coverage)["w"].startswith("integer product")
    assert coverage.warnings == ["w: was also an input of the model and no longer is"]
    assert [value.name for value in made.graph.inputs] == ["x"]
    x = {"x": floats(3, 32, seed=2)}
    assert decibel(run(proto.SerializeToString(), x)[0], run(data, x)[0]) > 30


def test_fixed_transforms_stay_exact(tmp_path: pathlib.Path) -> None:
    length, bins = 128, 65
    angle = 2 * np.pi * np.outer(np.arange(bins), np.arange(length)) / length
    window = np.hanning(length)
    basis = np.concatenate([np.cos(angle) * window, -np.sin(angle) * window]).astype(np.float32)[:, None]
    assert is_transform(basis, 0)
    centres = np.arange(1, 21)[:, None] * 6
    assert is_transform(np.maximum(0, 1 - np.abs(np.arange(129) - centres) / 6).astype(np.float32), 0)
    assert not is_transform(floats(130, 1, 128), 0)
    assert not is_transform(np.repeat(window[None, :], 40, axis=0), 0)
    inputs, outputs = [info("x", ["n", 1, 512])], [info("y", ["n", 130, 385])]
    proto = model(graph([node("Conv", ["x", "stft"], ["y"])], inputs, outputs, tensors(stft=basis)))
    _, coverage, _ = quantized(proto, DynamicQuantization(), tmp_path)
    assert reasons(coverage) == {"stft": "worse"}


def test_every_weight_left_has_its_reason(tmp_path: pathlib.Path) -> None:
    bad = floats(40, 40)
    bad[3, 3] = np.nan
    names = ["bad", "tiny", "wide", "kept", "coarse"]
    coarse = floats(40, 40, seed=4)
    nodes = [node("MatMul", ["x", name], [f"y_{name}"]) for name in names]
    nodes[1] = node("MatMul", ["t", "tiny"], ["y_tiny"])
    nodes[2] = node("MatMul", ["d", "wide"], ["y_wide"])
    constants = tensors(
        bad=bad, tiny=floats(6, 6), wide=floats(40, 40, dtype=np.float64), kept=floats(40, 40, seed=2), coarse=coarse
    )
    inputs = [info("x", ["n", 40]), info("t", ["n", 6]), info("d", ["n", 40], TensorProto.DOUBLE)]
    outputs = [
        info(f"y_{name}", ["n", 6 if name == "tiny" else 40], TensorProto.DOUBLE if name == "wide" else 1)
        for name in names
    ]
    the_pass = DynamicQuantization(select=Select(exclude=["kept"]), max_error=1e-3)
    _, coverage, _ = quantized(model(graph(nodes, inputs, outputs, constants)), the_pass, tmp_path)
    assert reasons(coverage) == {
        "bad": "not-finite", "tiny": "too-small", "wide": "dtype", "kept": "excluded", "coarse": "worse",
    }  # fmt: skip
    assert coverage.touched == []


def test_targets_without_integer_products_get_float_speed(tmp_path: pathlib.Path) -> None:
    _, coverage, made = quantized(projections(), DynamicQuantization(), tmp_path, target="tensorrt")
    assert operators(made)["DynamicQuantizeLinear"] == 0
    assert len(coverage.touched) == 4
    _, coverage, _ = quantized(projections(), DynamicQuantization(), tmp_path, target="portable")
    assert details(coverage)["q"] == "integer product, reduced range"
    with pytest.raises(RecipeError, match="unknown target 'abacus': one of cpu"):
        quantized(projections(), DynamicQuantization(), tmp_path, target="abacus")


def test_bytes_depend_on_nothing_but_the_model(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a").mkdir()
    first = quantized(projections(), DynamicQuantization(), tmp_path)[0]
    assert quantized(projections(), DynamicQuantization(), tmp_path / "a", threads=2)[0] == first


def test_streaming_voice_detector_of_the_zoo(zoo: pathlib.Path, tmp_path: pathlib.Path) -> None:
    proto = onnx.load(zoo / "silero_vad" / "model.onnx")
    data, coverage, _ = quantized(proto, DynamicQuantization(), tmp_path)
    worse = [entry.key for entry in coverage.left if entry.reason.value == "worse"]
    assert len(worse) == 2
    assert all("stft" in key for key in worse)
    assert len(data) < 0.45 * (zoo / "silero_vad" / "model.onnx").stat().st_size
    calls = dict(np.load(zoo / "silero_vad" / "feeds.npz"))
    for at in range(0, 60, 12):
        feeds = {"input": calls["input"][at], "state": calls["state"][at], "sr": np.array(16000, np.int64)}
        before, after = run(proto.SerializeToString(), feeds)[0], run(data, feeds)[0]
        assert np.abs(before - after).max() < 0.1
