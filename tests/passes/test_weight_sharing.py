"""Weight sharing keeps its rules, on small models and on the bundled ones."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

import onnxcompress as oc
from onnxcompress.contract import Coverage, Reason, Run, Select
from onnxcompress.encodings import Codebook
from onnxcompress.model.save import to_bytes
from onnxcompress.passes.magnitude_pruning import MagnitudePruning
from onnxcompress.passes.weight_sharing import WeightSharing
from tests.builders import by_key, checked, constant, floats, function, graph, info, model, node, opened, run, tensors
from tests.house import BUNDLED_QUICK, accuracy, bundled, two_layers


def shared(proto: onnx.ModelProto, work: pathlib.Path, **settings: Any) -> tuple[bytes, Coverage]:
    """The file and the account of the pass alone; every weight is told of once."""
    found = opened(proto)
    before = {key: weight.nbytes for key, weight in by_key(found).items()}
    coverage = WeightSharing(**settings).apply(found, Run(work=work))
    told = {t.key: t.bytes_before for t in coverage.touched} | {x.key: x.bytes for x in coverage.left}
    assert told == before
    assert len(coverage.touched) + len(coverage.left) == len(before)
    data = checked(found)
    stored = by_key(oc.load(data))
    for touched in coverage.touched:
        encoding = stored[touched.key].encoding
        assert isinstance(encoding, Codebook)
        assert encoding.nbytes == touched.bytes_after < touched.bytes_before
    return data, coverage


def decoded(data: bytes) -> dict[str, np.ndarray]:
    return {key: weight.array() for key, weight in by_key(oc.load(data)).items()}


def reasons(coverage: Coverage) -> dict[str, Reason]:
    return {x.key: x.reason for x in coverage.left}


def details(coverage: Coverage) -> dict[str, str]:
    return {t.key: t.detail for t in coverage.touched}


def rms(array: np.ndarray, other: np.ndarray) -> float:
    a, b = array.astype(np.float64), other.astype(np.float64)
    return float(np.sqrt(np.square(a - b).sum() / np.square(a).sum()))


def product(weight: np.ndarray, opset: int = 17, ir_version: int = 8) -> onnx.ModelProto:
    """x [2, rows] -> MatMul w."""
    body = graph(
        [node("MatMul", ["x", "w"], ["y"])],
        [info("x", [2, weight.shape[0]])],
        [info("y", [2, weight.shape[1]])],
        tensors(w=weight),
    )
    if ir_version < 4:
        body.input.append(info("w", weight.shape))
    return model(body, opset, ir_version)


def convolution(weight: np.ndarray, group: int = 1) -> onnx.ModelProto:
    """x [1, channels, 64] -> Conv w."""
    body = graph(
        [node("Conv", ["x", "w"], ["y"], group=group)],
        [info("x", [1, weight.shape[1] * group, 64])],
        [info("y", [1, weight.shape[0], 65 - weight.shape[2]])],
        tensors(w=weight),
    )
    return model(body)


# Rule 1 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_codes_and_codebook_reach_the_error_of_the_optimum(bits: int, tmp_path: pathlib.Path) -> None:
    weight = floats(128, 256)
    data, coverage = shared(product(weight), tmp_path, bits=bits, granularity="tensor")
    found = decoded(data)["w"]
    levels = 1 << bits
    assert len(np.unique(found)) == levels
    error = rms(weight, found)
    assert coverage.touched[0].error == pytest.approx(error, rel=1e-4)
    # Mean squared errors of optimal quantizers of a normal distribution: Max, 1960. Of 256 levels: Panter and Dite's
    # formula, from which a sample of 32,768 stays away since its tails end.
    wanted, off = {1: (0.3634, 0.01), 2: (0.1175, 0.02), 4: (0.009497, 0.02), 8: (4.15e-5, 0.15)}[bits]
    assert error**2 == pytest.approx(wanted, rel=off)
    assert coverage.touched[0].bytes_after == 128 * 256 * bits // 8 + 4 * levels + 16  # codes, codebook, shape


@pytest.mark.parametrize("clusters", [2, 3, 5, 11])
def test_fewer_clusters(clusters: int, tmp_path: pathlib.Path) -> None:
    data, _ = shared(product(floats(64, 64)), tmp_path, bits=4, clusters=clusters, granularity="tensor")
    assert len(np.unique(decoded(data)["w"])) == clusters


def test_what_has_few_values_is_kept_exactly(tmp_path: pathlib.Path) -> None:
    weight = np.random.default_rng(0).choice(np.array([-1.5, 0.25, 3.0, 1e-7], np.float32), (64, 64))
    data, coverage = shared(product(weight), tmp_path, bits=2)
    assert coverage.touched[0].error == 0
    np.testing.assert_array_equal(decoded(data)["w"], weight)
    x = {"x": floats(2, 64, seed=5)}
    np.testing.assert_array_equal(run(data, x)[0], run(product(weight).SerializeToString(), x)[0])


def layer(role: str, weight: np.ndarray) -> onnx.ModelProto:
    """A model that uses a 64 x 64 weight in one role."""
    x, y, held = info("x", [1, 64]), info("y", [1, 64]), tensors(w=weight)
    match role:
        case "embedding":
            x, nodes = info("x", [1], TensorProto.INT64), [node("Gather", ["w", "x"], ["y"])]
        case "gemm":
            nodes = [node("Gemm", ["x", "w"], ["y"], transB=1)]
        case "matmul":
            x, y, nodes = info("x", [64, 1]), info("y", [64, 1]), [node("MatMul", ["w", "x"], ["y"])]
        case "conv":
            held += tensors(s=np.array([64, 64, 1]))
            x, y = info("x", [1, 64, 9]), info("y", [1, 64, 9])
            nodes = [node("Reshape", ["w", "s"], ["v"]), node("Conv", ["x", "v"], ["y"])]
        case _:
            held += tensors(a=np.array([0]))
            x, y = info("x", [3, 1, 64]), info("y", [1, 1, 64])
            nodes = [node("Unsqueeze", ["w", "a"], ["v"]), node("RNN", ["x", "v", "v"], ["", "y"], hidden_size=64)]
    return model(graph(nodes, [x], [y], held))


@pytest.mark.parametrize("role", ["embedding", "gemm", "matmul", "conv", "recurrent"])
def test_every_role_of_a_layer(role: str, tmp_path: pathlib.Path) -> None:
    weight = floats(64, 64, seed=3)
    source = layer(role, weight)
    data, coverage = shared(source, tmp_path, bits=4)
    assert [t.key for t in coverage.touched] == ["w"]
    assert by_key(oc.load(data))["w"].role == role
    shape = [dim.dim_value for dim in source.graph.input[0].type.tensor_type.shape.dim]
    feeds = {"x": np.array([63]) if role == "embedding" else floats(*shape, seed=6)}
    dense = layer(role, decoded(data)["w"])
    np.testing.assert_array_equal(run(data, feeds)[0], run(dense.SerializeToString(), feeds)[0])


# Rule 2 -----------------------------------------------------------------------------------------------------------


def test_channels_of_one_scale_share_one_codebook(tmp_path: pathlib.Path) -> None:
    _, coverage = shared(product(floats(256, 128)), tmp_path)
    assert details(coverage) == {"w": "per tensor"}


@pytest.mark.parametrize("kind", ["matmul", "conv"])
def test_channels_of_different_scale_get_their_own(kind: str, tmp_path: pathlib.Path) -> None:
    scale = np.geomspace(1, 1e-3, 64, dtype=np.float32)
    if kind == "matmul":
        weight, axis = floats(256, 64) * scale, 1
        proto = product(weight)
    else:
        weight, axis = floats(64, 32, 9) * scale[:, None, None], 0
        proto = convolution(weight)
    data, coverage = shared(proto, tmp_path)
    assert details(coverage) == {"w": f"per channel of axis {axis}"}
    found = decoded(data)["w"]
    others = tuple(i for i in range(weight.ndim) if i != axis)
    lost = np.square(found - weight).sum(others) / np.square(weight).sum(others)
    assert lost.max() < 0.02  # every channel, the smallest too
    one, _ = shared(proto, tmp_path, granularity="tensor")
    lost = np.square(decoded(one)["w"] - weight).sum(others) / np.square(weight).sum(others)
    assert lost.max() > 0.5


def test_one_outlier_does_not_take_the_codebook_of_all(tmp_path: pathlib.Path) -> None:
    weight = floats(256, 64)
    weight[3, 5] = 1000.0
    data, _ = shared(product(weight), tmp_path)
    found = decoded(data)["w"]
    rest = np.arange(64) != 5
    assert rms(weight[:, rest], found[:, rest]) < 0.13
    assert found[3, 5] == pytest.approx(1000, rel=1e-3)


def test_granularity_as_told(tmp_path: pathlib.Path) -> None:
    weight = floats(256, 64)
    for granularity, detail in (("tensor", "per tensor"), ("channel", "per channel of axis 1")):
        _, coverage = shared(product(weight), tmp_path, granularity=granularity)
        assert details(coverage) == {"w": detail}
    _, coverage = shared(
        product(weight),
        tmp_path,
        select=Select(overrides={"w": {"granularity": "channel"}, "MatMul": {"bits": 2}}),
    )
    assert details(coverage) == {"w": "per channel of axis 1"}
    assert coverage.touched[0].bytes_after == pytest.approx(256 * 64 // 4 + 64 * 4 * 2, abs=150)  # codebooks in float16


def test_channels_too_short_for_their_own_codebook_share_one(tmp_path: pathlib.Path) -> None:
    _, coverage = shared(product(floats(2, 2048)), tmp_path, granularity="channel", bits=4)
    assert details(coverage) == {"w": "per tensor"}


def test_uses_that_disagree_on_the_channel_share_one(tmp_path: pathlib.Path) -> None:
    weight = floats(64, 64) * np.geomspace(1, 1e-3, 64, dtype=np.float32)
    nodes = [node("MatMul", ["x", "w"], ["a"]), node("Transpose", ["w"], ["t"]), node("MatMul", ["a", "t"], ["y"])]
    proto = model(graph(nodes, [info("x", [2, 64])], [info("y", [2, 64])], tensors(w=weight)))
    _, coverage = shared(proto, tmp_path, granularity="channel")
    assert details(coverage) == {"w": "per tensor"}


# Rule 3 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("storage", ["masked", "sparse"])
def test_zeros_of_a_pruned_weight_stay_exactly_zero(
    granularity: Any, bits: Any, storage: Any, tmp_path: pathlib.Path
) -> None:
    found = opened(product(floats(256, 64)))
    run_of = Run(work=tmp_path)
    MagnitudePruning(sparsity=0.4, scope="layer", storage=storage).apply(found, run_of)
    zeros = by_key(found)["w"].array() == 0
    assert zeros.sum() == round(0.4 * zeros.size)
    coverage = WeightSharing(bits=bits, granularity=granularity).apply(found, run_of)
    assert [t.key for t in coverage.touched] == ["w"]
    after = decoded(checked(found))["w"]
    assert (after[zeros] == 0).all()
    if bits > 1:
        assert (after[~zeros] != 0).mean() > 0.7


# Rule 4 -----------------------------------------------------------------------------------------------------------


def test_other_constants_are_shared_only_where_that_is_exact(tmp_path: pathlib.Path) -> None:
    exact = np.tile(np.array([0.1, 0.7, -3.0], np.float32), 400)
    nodes = [node("Mul", ["x", "exact"], ["a"]), node("Mul", ["a", "many"], ["b"]), node("Mul", ["b", "few"], ["y"])]
    held = tensors(exact=exact, many=floats(1200), few=np.ones((200, 1), np.float32))
    proto = model(graph(nodes, [info("x", [1200])], [info("y", [200, 1200])], held))
    data, coverage = shared(proto, tmp_path)
    assert [(t.key, t.error) for t in coverage.touched] == [("exact", 0.0)]
    assert reasons(coverage) == {"many": Reason.ROLE, "few": Reason.ROLE}
    np.testing.assert_array_equal(decoded(data)["exact"], exact)


def test_biases_and_normalization_are_left(tmp_path: pathlib.Path) -> None:
    nodes = [
        node("Conv", ["x", "w", "b"], ["c"]),
        node("BatchNormalization", ["c", "s", "o", "m", "v"], ["y"]),
    ]
    held = tensors(
        w=floats(512, 2, 3), b=floats(512), s=floats(512), o=floats(512), m=floats(512), v=np.abs(floats(512)) + 1
    )
    proto = model(graph(nodes, [info("x", [1, 2, 64])], [info("y", [1, 512, 62])], held))
    _, coverage = shared(proto, tmp_path)
    assert [t.key for t in coverage.touched] == ["w"]
    assert reasons(coverage) == dict.fromkeys("bsomv", Reason.ROLE)


# Rule 5 and refusals ----------------------------------------------------------------------------------------------


def test_what_would_not_become_smaller_is_left(tmp_path: pathlib.Path) -> None:
    _, coverage = shared(product(floats(4, 8)), tmp_path)
    assert reasons(coverage) == {"w": Reason.TOO_SMALL}
    _, coverage = shared(product(floats(16, 16)), tmp_path, bits=8)  # 256 values: the codebook alone is as large
    assert reasons(coverage) == {"w": Reason.TOO_SMALL}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_left(bad: float, tmp_path: pathlib.Path) -> None:
    weight = floats(64, 64)
    weight[5, 7] = bad
    _, coverage = shared(product(weight), tmp_path)
    assert reasons(coverage) == {"w": Reason.NOT_FINITE}


def test_extreme_values(tmp_path: pathlib.Path) -> None:
    for scale in (1e-38, 1e-30, 1e30, 3e38 / 5):
        weight = (floats(256, 64) * np.float32(scale)).astype(np.float32)
        for granularity in ("tensor", "channel"):
            data, coverage = shared(product(weight), tmp_path, granularity=granularity)
            assert rms(weight / np.float32(scale), decoded(data)["w"] / np.float32(scale)) < 0.11, (scale, granularity)
            assert coverage.touched[0].error < 0.11


def test_a_weight_of_zeros_or_of_one_value(tmp_path: pathlib.Path) -> None:
    for value in (0.0, 3.5):
        weight = np.full((64, 64), value, np.float32)
        data, coverage = shared(product(weight), tmp_path)
        assert coverage.touched[0].error == 0
        np.testing.assert_array_equal(decoded(data)["w"], weight)


def test_fixed_transforms_keep_eight_bits(tmp_path: pathlib.Path) -> None:
    time, frequency = np.arange(64), np.arange(33)[:, None]
    angle = 2 * np.pi * frequency * time / 64
    basis = np.concatenate([np.cos(angle), np.sin(angle)[1:-1]]).astype(np.float32)[:, None, :]
    data, coverage = shared(convolution(basis), tmp_path, bits=2)
    assert rms(basis, decoded(data)["w"]) < 0.005
    assert coverage.touched[0].bytes_after >= basis.size
    learned, _ = shared(convolution(floats(64, 1, 64)), tmp_path, bits=2, granularity="tensor")
    assert len(np.unique(decoded(learned)["w"])) == 4


def test_selected_weights_alone(tmp_path: pathlib.Path) -> None:
    for select, left in (
        (Select(include=["first"]), {"second", "bias"}),
        (Select(exclude=["two"]), {"second"}),
        (Select(include=["MatMul"], exclude=["f*"]), {"first", "bias"}),
    ):
        _, coverage = shared(two_layers(), tmp_path, bits=2, select=select)
        assert {key for key, reason in reasons(coverage).items() if reason is Reason.EXCLUDED} == left


# Where weights hide -----------------------------------------------------------------------------------------------


def test_float16_behind_a_cast(tmp_path: pathlib.Path) -> None:
    weight = floats(256, 64, dtype=np.float16)
    nodes = [node("Cast", ["w"], ["v"], to=TensorProto.FLOAT), node("MatMul", ["x", "v"], ["y"])]
    proto = model(graph(nodes, [info("x", [2, 256])], [info("y", [2, 64])], tensors(w=weight)))
    data, coverage = shared(proto, tmp_path)
    assert [t.bytes_before for t in coverage.touched] == [weight.nbytes]
    found = decoded(data)["w"]
    assert found.dtype == np.float16
    assert rms(weight, found) < 0.11
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(found, "w"))
    x = {"x": floats(2, 256, seed=5)}
    np.testing.assert_array_equal(run(data, x)[0], run(proto.SerializeToString(), x)[0])


def test_tied_weights_are_one(tmp_path: pathlib.Path) -> None:
    nodes = [
        node("Gather", ["w", "i"], ["a"]),
        node("Transpose", ["w"], ["t"]),
        node("MatMul", ["a", "t"], ["y"]),
    ]
    proto = model(graph(nodes, [info("i", [3], TensorProto.INT64)], [info("y", [3, 128])], tensors(w=floats(128, 64))))
    data, coverage = shared(proto, tmp_path)
    assert [t.key for t in coverage.touched] == ["w"]
    after = onnx.load_from_string(data)
    assert sum(n.domain == "onnxcompress" for n in after.graph.node) == 1
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(decoded(data)["w"], "w"))
    i = {"i": np.array([0, 5, 127])}
    np.testing.assert_array_equal(run(data, i)[0], run(proto.SerializeToString(), i)[0])


def test_constant_nodes_and_weights_behind_identity(tmp_path: pathlib.Path) -> None:
    weight = floats(256, 64)
    nodes = [constant("w", weight), node("Identity", ["w"], ["v"]), node("MatMul", ["x", "v"], ["y"])]
    data, coverage = shared(model(graph(nodes, [info("x", [2, 256])], [info("y", [2, 64])])), tmp_path)
    assert [t.key for t in coverage.touched] == ["w"]
    x = {"x": floats(2, 256, seed=5)}
    np.testing.assert_array_equal(run(data, x)[0], run(product(decoded(data)["w"]).SerializeToString(), x)[0])


def test_weights_in_a_function(tmp_path: pathlib.Path) -> None:
    inner = function("Layer", ["a"], ["b"], [constant("w", floats(64, 64)), node("MatMul", ["a", "w"], ["b"])])
    nodes = [node("Layer", ["x"], ["h"], domain="test"), node("Layer", ["h"], ["y"], domain="test")]
    proto = model(graph(nodes, [info("x", [2, 64])], [info("y", [2, 64])]), functions=[inner], domains={"test": 1})
    data, coverage = shared(proto, tmp_path)
    assert [t.key for t in coverage.touched] == ["Layer/w"]
    x, found = floats(2, 64, seed=5), decoded(data)["Layer/w"]
    np.testing.assert_allclose(run(data, {"x": x})[0], x @ found @ found, rtol=1e-4)


@pytest.mark.parametrize("opset", range(7, onnx.defs.onnx_opset_version() + 1))
def test_every_opset_from_7(opset: int, tmp_path: pathlib.Path) -> None:
    weight = floats(64, 64) * np.geomspace(1, 1e-3, 64, dtype=np.float32)
    for granularity in ("tensor", "auto"):
        proto = product(weight, opset, ir_version=3 if opset < 9 else 10)
        data, coverage = shared(proto, tmp_path, granularity=granularity)
        assert [t.key for t in coverage.touched] == ["w"]
        per_channel = granularity == "auto" and opset >= 9
        assert details(coverage) == {"w": "per channel of axis 1" if per_channel else "per tensor"}
        assert onnx.load_from_string(data).opset_import[0].version == opset
        if opset <= 26:
            x = {"x": floats(2, 64, seed=5)}
            dense = product(decoded(data)["w"], opset, ir_version=3 if opset < 9 else 10)
            np.testing.assert_array_equal(run(data, x)[0], run(dense.SerializeToString(), x)[0])


def test_older_opsets_are_left_and_said(tmp_path: pathlib.Path) -> None:
    _, coverage = shared(product(floats(64, 64), opset=6, ir_version=3), tmp_path)
    assert reasons(coverage) == {"w": Reason.UNSUPPORTED_OPSET}


def test_an_input_that_a_caller_may_replace_is_told_of(tmp_path: pathlib.Path) -> None:
    proto = product(floats(64, 64))
    proto.graph.input.append(info("w", [64, 64]))
    _, coverage = shared(proto, tmp_path)
    assert [w for w in coverage.warnings if w.startswith("w: was also an input")]


def test_a_weight_that_is_an_output_is_left(tmp_path: pathlib.Path) -> None:
    proto = product(floats(64, 64))
    proto.graph.output.append(info("w", [64, 64]))
    _, coverage = shared(proto, tmp_path)
    assert reasons(coverage) == {"w": Reason.GRAPH_OUTPUT}


def test_already_shared_or_quantized_weights_are_left(tmp_path: pathlib.Path) -> None:
    data, _ = shared(product(floats(64, 64)), tmp_path)
    again, coverage = shared(onnx.load_from_string(data), tmp_path)
    assert reasons(coverage) == {"w": Reason.ALREADY_ENCODED}
    assert again == data
    integers = oc.compress(bundled("digits_gru"), "int8").model
    coverage = WeightSharing().apply(integers, Run(work=tmp_path))
    assert Reason.ALREADY_ENCODED in reasons(coverage).values()


# Real models ------------------------------------------------------------------------------------------------------

# name, bits: file / original at most, points of accuracy it may lose; measured: see the comments.
STATED = {
    ("digits_cnn", 4): (0.21, 0.0075),  # 0.204, 1.0000 -> 0.9943
    ("digits_gru", 4): (0.265, 0.005),  # 0.259, 0.9814 -> 0.9829
    ("gloss_transformer", 4): (0.155, 0.005),  # 0.145, 0.8200 -> 0.8193
    ("digits_gru", 2): (0.135, 0.04),  # 0.126, 0.9814 -> 0.9629
    ("gloss_transformer", 2): (0.09, 0.025),  # 0.079, 0.8200 -> 0.8025
    ("digits_gru", 8): (0.31, 0.002),  # 0.301, 0.9814 -> 0.9814
}


@pytest.mark.parametrize(
    ("name", "bits"),
    [pytest.param(*k, marks=pytest.mark.slow) if k == ("gloss_transformer", 2) else k for k in STATED],
)
def test_sizes_and_accuracies_of_the_bundled_models(name: str, bits: Any, tmp_path: pathlib.Path) -> None:
    ratio, drop = STATED[name, bits]
    done = oc.compress(bundled(name), WeightSharing(bits=bits), out=tmp_path / "o.onnx")
    assert done.ratio <= ratio
    assert (tmp_path / "o.onnx").stat().st_size <= ratio * bundled(name).stat().st_size + 2048
    assert accuracy(name, tmp_path / "o.onnx") >= accuracy(name, bundled(name)) - drop


@pytest.mark.parametrize("name", BUNDLED_QUICK)
def test_more_bits_less_error_and_larger_files(name: str) -> None:
    found = [oc.compress(bundled(name), WeightSharing(bits=b, granularity="tensor")) for b in (1, 2, 4)]
    sizes = [done.bytes_after for done in found]
    assert sizes == sorted(sizes)
    errors = [[t.error for t in done.steps[0].coverage.touched] for done in found]
    assert all(a > b > c for a, b, c in zip(*errors, strict=True))


def test_weights_in_both_branches_of_an_if_are_shared() -> None:
    done = oc.compress(bundled("digits_gru"), WeightSharing())
    touched = {t.key for t in done.steps[0].coverage.touched}
    assert touched >= {"logits/then/whole.0.weight", "logits/else/part.0.weight"}
    assert accuracy("digits_gru", to_bytes(done.model)) > 0.97


def test_on_a_pruned_model_zeros_survive_the_file(tmp_path: pathlib.Path) -> None:
    passes = [MagnitudePruning(sparsity=0.3), WeightSharing(bits=4)]
    pruned = oc.compress(bundled("digits_cnn"), passes[:1])
    done = oc.compress(bundled("digits_cnn"), passes, out=tmp_path / "o.onnx")
    before, after = (by_key(m) for m in (pruned.model, oc.load(tmp_path / "o.onnx")))
    for touched in done.steps[1].coverage.touched:
        zeros = before[touched.key].array() == 0
        assert (after[touched.key].array()[zeros] == 0).all()
    assert accuracy("digits_cnn", tmp_path / "o.onnx") >= 0.98
