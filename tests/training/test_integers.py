"""Students that compute with integers: what their training copy computes, and what is learned in their integers."""

from __future__ import annotations

import logging
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from onnxcompress import api
from onnxcompress.model import bridge
from onnxcompress.model.load import load
from onnxcompress.trainable import SCALE, trainable
from onnxcompress.training import integers, step
from onnxcompress.training.distill import Settings, distill, write
from onnxcompress.training.integers.blocks import _packed, _unpacked
from onnxcompress.training.targets import Objective
from tests.builders import floats, graph, info, model, node, tensors
from tests.training.small import mlp, opened, outputs, sequences, tagger

MICROSOFT = {"com.microsoft": 1}
Make = Callable[[pathlib.Path], pathlib.Path]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """ONNX Runtime's quantizers advise at every call."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def convolutions() -> onnx.ModelProto:
    """x [n, 2, 8, 8] -> Conv (padded) -> Relu -> Conv (by groups) -> MaxPool -> Add -> mean -> Gemm = z [n, 4]."""
    nodes = [
        node("Conv", ["x", "w1", "b1"], ["c"], name="one", pads=[1, 1, 1, 1]),
        node("Relu", ["c"], ["r"], name="relu"),
        node("Conv", ["r", "w2"], ["d"], name="two", group=2),
        node("MaxPool", ["d"], ["p"], name="pool", kernel_shape=[2, 2], strides=[2, 2]),
        node("GlobalAveragePool", ["p"], ["g"], name="mean"),
        node("Flatten", ["g"], ["f"], name="flat"),
        node("Gemm", ["f", "w3", "b3"], ["z"], name="three"),
    ]
    given = tensors(
        w1=floats(8, 2, 3, 3, seed=1) * 0.3,
        b1=floats(8, seed=2) * 0.1,
        w2=floats(16, 4, 3, 3, seed=3) * 0.2,
        w3=floats(16, 4, seed=4) * 0.3,
        b3=floats(4, seed=5) * 0.1,
    )
    return model(graph(nodes, [info("x", ["n", 2, 8, 8])], [info("z", ["n", 4])], given))


def recurrent() -> onnx.ModelProto:
    """x [3, n, 6] -> LSTM (both directions) -> Gather (last step) -> Reshape -> MatMul = z [n, 4]."""
    nodes = [
        node("LSTM", ["x", "w", "r", "b"], ["y"], name="lstm", hidden_size=8, direction="bidirectional"),
        node("Gather", ["y", "last"], ["l"], name="last_step", axis=0),
        node("Transpose", ["l"], ["t"], name="turn", perm=[1, 0, 2]),
        node("Reshape", ["t", "shape"], ["f"], name="flat"),
        node("MatMul", ["f", "w2"], ["z"], name="two"),
    ]
    given = tensors(
        w=floats(2, 32, 6, seed=1) * 0.3,
        r=floats(2, 32, 8, seed=2) * 0.3,
        b=floats(2, 64, seed=3) * 0.1,
        w2=floats(16, 4, seed=4) * 0.3,
        last=np.array(-1, np.int64),
        shape=np.array([-1, 16], np.int64),
    )
    return model(graph(nodes, [info("x", [3, "n", 6])], [info("z", ["n", 4])], given))


def embedding() -> onnx.ModelProto:
    """input_ids [n, s] -> Gather [200, 64] -> Tanh -> MatMul [64, 64] = z; large enough to become smaller."""
    nodes = [
        node("Gather", ["table", "input_ids"], ["e"], name="embed"),
        node("Tanh", ["e"], ["t"], name="tanh"),
        node("MatMul", ["t", "w"], ["z"], name="project"),
    ]
    given = tensors(table=floats(200, 64, seed=1) * np.linspace(0.5, 2, 200)[:, None], w=floats(64, 64, seed=2) * 0.2)
    given = [numpy_helper.from_array(numpy_helper.to_array(t).astype(np.float32), t.name) for t in given]
    ids = info("input_ids", ["n", "s"], TensorProto.INT64)
    return model(graph(nodes, [ids], [info("z", ["n", "s", 64])], given))


def saved(proto: onnx.ModelProto, folder: pathlib.Path) -> pathlib.Path:
    onnx.save(proto, folder / "float.onnx")
    return folder / "float.onnx"


def dynamic(path: pathlib.Path, **options: Any) -> pathlib.Path:
    quantize_dynamic(path, path.with_name("student.onnx"), **options)
    return path.with_name("student.onnx")


def static(path: pathlib.Path, name: str, shape: tuple[int, ...], **options: Any) -> pathlib.Path:
    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._feeds = iter([{name: floats(*shape, seed=seed)} for seed in range(4)])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._feeds, None)

    quantize_static(path, path.with_name("student.onnx"), Reader(), quant_format=QuantFormat.QOperator, **options)
    return path.with_name("student.onnx")


def blocked(path: pathlib.Path, **options: Any) -> pathlib.Path:
    quantizer = MatMulNBitsQuantizer(str(path), **options)
    quantizer.process()
    quantizer.model.save_model_to_file(str(path.with_name("student.onnx")))
    return path.with_name("student.onnx")


def products() -> onnx.ModelProto:
    """x [n, 6] -> MatMul [6, 200] -> Relu -> MatMul [200, 4]: 200 is no multiple of the blocks' 32."""
    nodes = [
        node("MatMul", ["x", "w1"], ["h"], name="one"),
        node("Relu", ["h"], ["r"], name="relu"),
        node("MatMul", ["r", "w2"], ["z"], name="two"),
    ]
    given = tensors(w1=floats(6, 200, seed=1) * 0.4, w2=floats(200, 4, seed=3) * 0.1)
    return model(graph(nodes, [info("x", ["n", 6])], [info("z", ["n", 4])], given))


def fused(path: pathlib.Path) -> pathlib.Path:
    """A dynamically quantized file as ONNX Runtime fuses and saves it."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(path.with_name("fused.onnx"))
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 3
    ort.InferenceSession(str(dynamic(path)), options)
    return path.with_name("fused.onnx")


def shared() -> onnx.ModelProto:
    """Two products of one input, which ONNX Runtime makes MatMulIntegerToFloat."""
    nodes = [
        node("MatMul", ["x", "w1"], ["h"], name="one"),
        node("Add", ["h", "b1"], ["i"], name="shift"),
        node("MatMul", ["x", "w2"], ["g"], name="two"),
        node("Mul", ["i", "g"], ["z"], name="gate"),
    ]
    given = tensors(w1=floats(6, 8, seed=1), w2=floats(6, 8, seed=3), b1=floats(8, seed=4))
    return model(graph(nodes, [info("x", ["n", 6])], [info("z", ["n", 8])], given))


def packed_rows(path: pathlib.Path, dtype: Any) -> pathlib.Path:
    """The table of `tagger` in 4 bits, in blocks of 16 along rows of 24."""
    proto = onnx.load(path)
    rows = np.random.default_rng(3).integers(0, 16, (11, 24)).astype(np.uint8)
    held = _packed(rows, 4) if dtype is np.uint8 else rows.astype(ml_dtypes.uint4)
    given = {"table_Q4": held, "table_scales": np.full((11, 2), 0.2, np.float32), "w1": floats(24, 8, seed=2) * 0.3}
    kept = [t for t in proto.graph.initializer if t.name not in ("table", "w1")]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend([*kept, *tensors(**given)])
    inputs = ["table_Q4", "input_ids", "table_scales"]
    options: dict[str, Any] = {"block_size": 16, "gather_axis": 0, "quantize_axis": 1}
    options |= {"bits": 4} if dtype is np.uint8 else {}
    embed = node("GatherBlockQuantized", inputs, ["e"], name="embed", domain="com.microsoft", **options)
    proto.graph.node[0].CopyFrom(embed)
    proto.opset_import.add(domain="com.microsoft", version=1)
    proto.opset_import[0].version, proto.ir_version = 21, 10
    onnx.save(proto, path.with_name("student.onnx"))
    return path.with_name("student.onnx")


def ours(path: pathlib.Path) -> pathlib.Path:
    api.compress(path, ["dynamic-quantization"], out=path.with_name("student.onnx"))
    return path.with_name("student.onnx")


IMAGES, VECTORS = {"x": floats(32, 2, 8, 8, seed=9)}, {"x": floats(64, 6, seed=9)}
STUDENTS: dict[str, tuple[onnx.ModelProto, Make, dict[str, np.ndarray], set[str]]] = {
    "dynamic products": (mlp(), dynamic, VECTORS, {"w1", "b1", "w2", "b2"}),
    "dynamic, channels, uint8": (
        mlp(),
        lambda p: dynamic(p, per_channel=True, weight_type=QuantType.QUInt8),
        VECTORS,
        {"w1", "b1", "w2", "b2"},
    ),
    "dynamic convolutions": (convolutions(), dynamic, IMAGES, {"w1", "b1", "w2", "w3", "b3"}),
    "dynamic convolutions, channels": (
        convolutions(),
        lambda p: dynamic(p, per_channel=True),
        IMAGES,
        {"w1", "b1", "w2", "w3", "b3"},
    ),
    "dynamic embedding": (tagger(), dynamic, sequences(), {"table", "w1", "w2"}),
    "integer operators": (
        convolutions(),
        lambda p: static(p, "x", (8, 2, 8, 8)),
        IMAGES,
        {"w1", "b1", "w2", "w3", "b3"},
    ),
    "integer operators, channels": (
        convolutions(),
        lambda p: static(p, "x", (8, 2, 8, 8), per_channel=True),
        IMAGES,
        {"w1", "b1", "w2", "w3", "b3"},
    ),
    "integer products": (products(), lambda p: static(p, "x", (8, 6)), VECTORS, {"w1", "w2"}),
    "4 bits in blocks": (
        products(),
        lambda p: blocked(p, block_size=32, is_symmetric=False),
        VECTORS,
        {"w1_Q4", "w2_Q4"},
    ),
    "symmetric 4 bits in blocks": (
        products(),
        lambda p: blocked(p, block_size=16, is_symmetric=True),
        VECTORS,
        {"w1_Q4", "w2_Q4"},
    ),
    "fused products": (mlp(), fused, VECTORS, {"w1", "b1", "w2", "b2"}),
    "fused products of one input": (shared(), fused, VECTORS, {"w1", "b1", "w2"}),
    "packed rows": (tagger(), lambda p: packed_rows(p, np.uint8), sequences(), {"table_Q4", "w1", "w2"}),
    "4-bit rows": (tagger(), lambda p: packed_rows(p, ml_dtypes.uint4), sequences(), {"table_Q4", "w1", "w2"}),
    "our rows": (embedding(), ours, {"input_ids": np.arange(192).reshape(48, 4) % 200}, {"table", "w"}),
    "our dynamic products": (mlp(), ours, VECTORS, {"w1", "b1", "w2", "b2"}),
}


def other(proto: onnx.ModelProto) -> ir.Model:
    """The same network with other weights: a teacher that its quantized form has something to learn from."""
    moved = onnx.ModelProto()
    moved.CopyFrom(proto)
    for seed, tensor in enumerate(moved.graph.initializer):
        if tensor.data_type == TensorProto.FLOAT:
            array = numpy_helper.to_array(tensor)
            array = (array + 0.3 * array.std() * floats(*array.shape, seed=50 + seed)).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return load(moved)


def only(of: ir.Model, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """The one output."""
    (array,) = outputs(of, feeds).values()
    return array


def root_mean_square(array: np.ndarray) -> float:
    return float(np.sqrt(np.mean(array.astype(np.float64) ** 2)))


def stored(of: ir.Model) -> dict[str, tuple[ir.DataType | None, ir.ShapeProtocol | None]]:
    return {name: (value.dtype, value.shape) for name, value in of.graph.initializers.items()}


def constants(of: ir.Model) -> dict[str, np.ndarray]:
    return {n: v.const_value.numpy() for n, v in of.graph.initializers.items() if v.const_value is not None}


VALUES = Objective(loss="values")


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_of_integers_learns_and_keeps_its_nodes(name: str, tmp_path: pathlib.Path) -> None:
    proto, make, data, keys = STUDENTS[name]
    teacher, student = other(proto), load(make(saved(proto, tmp_path)))
    before = only(student, data)
    copied = only(step.forward(student, [data]), data)
    np.testing.assert_allclose(copied, before, rtol=1e-5, atol=2e-6 * np.abs(before).max())

    settings = Settings(epochs=20, batch=16, lr=3e-3)
    done = distill(teacher, student, opened(student, data), settings=settings, objective=VALUES)
    assert done.parameters.keys() == keys
    assert done.left == {}
    healed = bridge.clone(student)
    assert write(healed, done.parameters).keys() == keys
    assert [(n.op_type, n.name) for n in healed.graph] == [(n.op_type, n.name) for n in student.graph]
    assert stored(healed) == stored(student)
    wanted, after = only(teacher, data), only(healed, data)
    assert root_mean_square(after - wanted) < 0.5 * root_mean_square(before - wanted)
    copied = only(step.forward(healed, [data]), data)
    np.testing.assert_allclose(copied, after, rtol=1e-5, atol=2e-6 * np.abs(after).max())


def test_an_lstm_of_integers_trains_with_a_hidden_state_that_is_not_rounded(tmp_path: pathlib.Path) -> None:
    """The operator rounds its state to 1/255 of its range before each step; the training copy does not."""
    data = {"x": floats(3, 32, 6, seed=9)}
    for per_channel in (False, True):
        path = saved(recurrent(), tmp_path)
        student = load(dynamic(path, per_channel=per_channel))
        before, copied = only(student, data), only(step.forward(student, [data]), data)
        assert 0 < root_mean_square(copied - before) < 0.01 * root_mean_square(before)
        found = integers.places(student)
        assert found.keys() == {"w", "r", "w2"}
        learned = {key: {"w": np.array(found[key].encoding.decode()) * 0.5} for key in found}
        found.store(learned)
        halved = constants(student)
        original = {
            t.name: numpy_helper.to_array(t) for t in onnx.load(path.with_name("student.onnx")).graph.initializer
        }
        for name in ("w_quantized", "r_quantized", "w2_quantized"):
            assert np.abs(halved[name] - original[name] * 0.5).max() <= 0.5
            assert halved[name].dtype == original[name].dtype


def test_zeros_of_a_pruned_weight_stay_in_its_integers(tmp_path: pathlib.Path) -> None:
    proto = products()
    array = np.array(numpy_helper.to_array(proto.graph.initializer[0]))
    array[np.abs(array) < np.quantile(np.abs(array), 0.7)] = 0
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(array, "w1"))
    student = load(dynamic(saved(proto, tmp_path)))
    done = distill(other(products()), student, opened(student, VECTORS), settings=Settings(epochs=3, lr=1e-2))
    before = constants(student)["w1_quantized"]
    write(student, done.parameters)
    after = constants(student)["w1_quantized"]
    assert not after[array == 0].any()
    assert (after != before).mean() > 0.2


def test_a_bias_is_counted_anew_where_the_scale_of_its_weight_is_learned(tmp_path: pathlib.Path) -> None:
    student = load(static(saved(convolutions(), tmp_path), "x", (8, 2, 8, 8), per_channel=True))
    settings = Settings(epochs=10, batch=16, lr=1e-2, learn_scales=True)
    done = distill(other(convolutions()), student, opened(student, IMAGES), settings=settings, objective=VALUES)
    assert {key for key, parts in done.parameters.items() if "scale" in parts} == {"w1", "w2", "w3"}
    x_scale = float(constants(student)["x_scale"])
    healed = bridge.clone(student)
    write(healed, done.parameters)
    held = constants(healed)
    learned = done.parameters["w1"]["scale"]
    np.testing.assert_array_equal(held["w1_scale"], learned)
    assert np.abs(learned / constants(student)["w1_scale"] - 1).max() > 0.01
    rounding = np.abs(held["b1_quantized"] * learned * x_scale - done.parameters["b1"]["w"])
    assert np.all(rounding <= 0.501 * learned * x_scale)
    copied, after = only(step.forward(healed, [IMAGES]), IMAGES), only(healed, IMAGES)
    np.testing.assert_allclose(copied, after, rtol=1e-5, atol=2e-6 * np.abs(after).max())


def test_a_bias_that_is_not_trained_keeps_its_value_at_a_learned_scale(tmp_path: pathlib.Path) -> None:
    student = load(static(saved(convolutions(), tmp_path), "x", (8, 2, 8, 8)))
    before = constants(student)
    w1 = integers.places(student)["w1"].encoding
    assert write(student, {"w1": {"w": w1.decode(), "scale": w1.scale * np.float32(4)}}).keys() == {"w1", "b1"}
    after = constants(student)
    np.testing.assert_allclose(after["b1_quantized"], before["b1_quantized"] / 4, atol=0.5)
    np.testing.assert_allclose(after["w1_quantized"], before["w1_quantized"] / 4, atol=0.5)
    assert np.abs(after["b1_quantized"]).max() > 100


def test_a_scale_that_others_take_keeps_its_value(tmp_path: pathlib.Path) -> None:
    student = load(static(saved(products(), tmp_path), "x", (8, 6)))
    one, two = (student.graph.initializers[f"{name}_scale"] for name in ("w1", "w2"))
    two.replace_all_uses_with(one)
    before = constants(student)
    found = integers.places(student)
    write(student, {key: {"w": found[key].encoding.decode(), "scale": np.array(9, np.float32)} for key in ("w1", "w2")})
    after = constants(student)
    assert found["w1"].scale == found["w2"].scale == "w1_scale"
    for name in ("w1_scale", "w1_quantized", "w2_quantized"):
        np.testing.assert_array_equal(after[name], before[name])


def refused(nodes: list[onnx.NodeProto], out: onnx.ValueInfoProto, **given: np.ndarray) -> dict[str, str]:
    quantized = node("DynamicQuantizeLinear", ["x"], ["a", "a_scale", "a_zero"], name="measure")
    w2 = {"w2": floats(6, 4, seed=3)}
    plain = node("MatMul", ["x", "w2"], ["z"], name="plain")
    proto = model(
        graph([quantized, *nodes, plain], [info("x", ["n", 6])], [info("z", ["n", 4]), out], tensors(**given, **w2)),
        domains=MICROSOFT,
    )
    return trainable(load(proto)).left


def test_what_cannot_be_trained_is_told_with_its_reason() -> None:
    q, scale = np.arange(24, dtype=np.int8).reshape(6, 4), np.array(0.1, np.float32)
    product = node("MatMulInteger", ["a", "w_quantized", "a_zero"], ["y"], name="product")
    told = refused([product], info("y", ["n", 4], TensorProto.INT32), w_quantized=q, w_scale=scale)
    assert told == {"w": "MatMulInteger takes it as integers, and the model gives integers out"}
    as_float = node("Cast", ["y"], ["f"], name="cast", to=TensorProto.FLOAT)
    told = refused([product, as_float], info("f", ["n", 4]), w_quantized=q)
    assert told == {"w": "MatMulInteger takes it as integers, and the file does not say its scale"}
    told = refused([product, as_float], info("f", ["n", 4]), w_quantized=q, w_scale=np.zeros(4, np.float32))
    assert told == {"w": "MatMulInteger takes it as integers, and a scale of it is not above 0"}
    both = [product, as_float, node("Identity", ["w_quantized"], ["copied"], name="copy")]
    told = refused(
        [*both, node("Cast", ["copied"], ["f2"], name="cast2", to=TensorProto.FLOAT)],
        info("f2", [6, 4]),
        w_quantized=q,
        w_scale=scale,
    )
    shared = "and so does another consumer, of it or of what comes with it, that has no float form"
    assert told == {"w": f"MatMulInteger takes it as integers, {shared}"}


def test_a_scale_is_found_behind_the_product_where_names_do_not_tell_it(tmp_path: pathlib.Path) -> None:
    proto = onnx.load(dynamic(saved(mlp(), tmp_path), per_channel=True))
    for held in (*(n.input for n in proto.graph.node), *(n.output for n in proto.graph.node)):
        held[:] = [name.replace("w1_scale", "k17").replace("w1_quantized", "k18") for name in held]
    for tensor in proto.graph.initializer:
        tensor.name = tensor.name.replace("w1_scale", "k17").replace("w1_quantized", "k18")
    student = load(proto)
    assert trainable(student).left == {"k17": SCALE}
    place = integers.places(student)["k18"]
    assert (place.q, place.scale, place.encoding.axis, place.encoding.scale.shape) == ("k18", "k17", 1, (200,))


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_integers_come_back(bits: int) -> None:
    values = np.random.default_rng(0).integers(0, 1 << bits, (3, 16)).astype(np.uint8)
    packed = _packed(values, bits)
    assert packed.shape == (3, 16 * bits // 8)
    np.testing.assert_array_equal(_unpacked(packed, bits), values)
    if bits == 4:  # the specification of MatMulNBits: the first in the lowest bits
        np.testing.assert_array_equal(packed[:, 0], values[:, 0] + 16 * values[:, 1])


@pytest.mark.parametrize("name", ["mlperf_resnet8", "sst2_minilm3"])
def test_real_models_quantized_by_onnxruntime(zoo: pathlib.Path, name: str, tmp_path: pathlib.Path) -> None:
    """Every layer of the file trains, and the training copy computes what the file does."""
    path = tmp_path / "student.onnx"
    quantize_dynamic(zoo / name / "model.onnx", path)
    student, feeds = load(path), dict(np.load(zoo / name / "feeds.npz"))
    batch = {str(value.name): feeds[str(value.name)][:4] for value in student.graph.inputs}
    before, copied = only(student, batch), only(step.forward(student, [batch]), batch)
    np.testing.assert_allclose(copied, before, atol=2e-6 * np.abs(before).max())
    found = trainable(student)
    integer = {key for key, place in integers.places(student).items() if place.encoding.q.ndim > 1}
    assert len(integer) >= 2
    assert integer <= found.trained.keys()
    assert not found.blocked
