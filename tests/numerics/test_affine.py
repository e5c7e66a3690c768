"""Quantization arithmetic against its definition and against ONNX Runtime."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper

from onnxcompress.numerics import affine
from onnxcompress.numerics.affine import AffineParams, choose_scale, limits, pair_sum_bound, quantize_weight

Array = npt.NDArray[Any]
TYPES = ["int2", "uint2", "int4", "uint4", "int8", "uint8", "int16", "uint16"]
SCALES = [np.float32, np.float16, ml_dtypes.bfloat16]
finite = st.floats(-3e4, 3e4, width=32)


def wide(q: Array) -> Array:
    return q.astype(np.int32).astype(np.int64)


@settings(max_examples=300, deadline=None)
@given(finite, finite, st.sampled_from(TYPES), st.booleans(), st.sampled_from(SCALES), st.floats(0, 1))
def test_round_trip_is_within_half_a_step(
    a: float, b: float, dtype: str, symmetric: bool, scale_dtype: Any, at: float
) -> None:
    low, high = min(a, b, 0.0), max(a, b, 0.0)
    scale, zero = choose_scale(a if a < b else b, max(a, b), dtype=dtype, symmetric=symmetric, scale_dtype=scale_dtype)
    step = float(scale)
    assert scale.dtype == scale_dtype
    assert zero.dtype == affine.numpy_dtype(dtype)
    assert 0 < step < np.inf
    x = np.array([low, high, low + at * (high - low)], np.float32)
    q = affine.quantize(x, scale, zero, dtype)
    back = (wide(q) - wide(zero)) * step  # in float64: only the rounding to integers is under test
    # float32 division may fall on the other side of a tie: a few units of 2^-24 in x / scale, at most 2^16 of them
    assert (np.abs(back - x.astype(np.float64)) <= step * (0.5 + 2.0**-7)).all()
    zeros = affine.dequantize(affine.quantize(np.zeros(3, np.float32), scale, zero, dtype), scale, zero)
    assert (zeros == 0).all()
    if symmetric and dtype.startswith("int"):
        assert int(zero) == 0


@settings(max_examples=100, deadline=None)
@given(
    hnp.arrays(np.float32, st.integers(2, 50), elements=finite),
    st.floats(2.0**-20, 1024, width=32),
    st.sampled_from(TYPES),
    st.integers(-8, 8),
)
def test_quantize_is_monotonic_and_saturates(x: Array, scale: float, dtype: str, zero: int) -> None:
    low, high = limits(dtype, symmetric=False)
    point = np.array(np.clip(zero, low, high)).astype(np.int32).astype(affine.numpy_dtype(dtype))
    q = wide(affine.quantize(np.sort(x), np.array(scale, np.float32), point, dtype))
    assert (np.diff(q) >= 0).all()
    assert q.min() >= low
    assert q.max() <= high
    edges = wide(affine.quantize(np.array([-3e38, 3e38], np.float32), np.array(scale, np.float32), point, dtype))
    assert edges.tolist() == [low, high]


def test_ties_go_to_even() -> None:
    x = np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5], np.float32)
    q = affine.quantize(x, np.array(1, np.float32), np.array(1, np.int8), "int8")
    assert q.tolist() == [-1, -1, 1, 1, 3, 3]  # the zero point is added after rounding


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.0), (0.0, 1e-45), (-1e-45, 0.0), (-3.4e38, 3.4e38), (5.0, 6.0)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scale_dtype", SCALES)
def test_extreme_ranges_get_a_finite_positive_normal_scale(
    low: float, high: float, symmetric: bool, scale_dtype: Any
) -> None:
    scale, zero = choose_scale(low, high, dtype="uint8", symmetric=symmetric, scale_dtype=scale_dtype)
    info: Any = ml_dtypes.finfo(scale_dtype)  # type: ignore[no-untyped-call]
    assert float(info.smallest_normal) <= float(scale) <= float(info.max)
    assert 0 <= int(zero) <= 255
    if low == high == 0:
        assert float(scale) == 1.0
    if low == 5.0 and not symmetric:
        assert int(zero) == 0
        assert float(scale) == pytest.approx(6 / 255, rel=0.01)


def test_ranges_that_are_none_are_refused() -> None:
    for low, high in ((np.nan, 1), (0, np.inf), (2, 1)):
        with pytest.raises(ValueError, match="range to quantize"):
            choose_scale(low, high, dtype="int8", symmetric=True)
    with pytest.raises(ValueError, match="unknown integer type"):
        choose_scale(0, 1, dtype="int3", symmetric=True)
    with pytest.raises(ValueError, match="reduced range"):
        choose_scale(0, 1, dtype="int4", symmetric=True, reduced_range=True)
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize_weight(np.array([1, np.nan], np.float32))


KINDS = {name: helper.np_dtype_to_tensor_dtype(affine.numpy_dtype(name)) for name in TYPES}


def in_runtime(op: str, x: Array, scale: Array, zero: Array, kind: str, **attributes: Any) -> Array:
    """QuantizeLinear (x float) or DequantizeLinear (x integer) in ONNX Runtime; integers come back as int32."""
    tensors = [
        helper.make_tensor(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape, value.reshape(-1))
        for name, value in (("scale", scale), ("zero", zero))
    ]
    nodes = [helper.make_node(op, ["x", "scale", "zero"], ["y"], **attributes)]
    if op == "QuantizeLinear":
        source, target = helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape), int(TensorProto.INT32)
        nodes += [helper.make_node("Cast", ["y"], ["out"], to=TensorProto.INT32)]
        feeds = {"x": x}
    else:
        source, target = helper.make_tensor_value_info("whole", TensorProto.INT32, x.shape), tensors[0].data_type
        nodes = [helper.make_node("Cast", ["whole"], ["x"], to=KINDS[kind]), *nodes]
        nodes[-1].output[0] = "out"
        feeds = {"whole": x.astype(np.int32)}
    output = helper.make_tensor_value_info("out", target, x.shape)
    graph = helper.make_graph(nodes, "g", [source], [output], tensors)
    opset = 25 if kind.endswith("2") else 21
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=13 if opset == 25 else 10
    )
    onnx.checker.check_model(model)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feeds)[0])


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("form", ["tensor", "channel", "block"])
def test_bit_for_bit_as_onnx_runtime(kind: str, form: str) -> None:
    rng = np.random.default_rng(2)
    x = (rng.standard_normal((6, 40, 5)) * 3).astype(np.float32)
    x[0, :8, 0] = [0.5, -0.5, 1.5, 2.5, 0, -0.0, 1e-30, 3e38]
    options: dict[str, int] = {} if form == "tensor" else {"axis": 1}
    if form == "block":
        options["block"] = 8
    attributes = {("block_size" if name == "block" else name): value for name, value in options.items()}
    for symmetric in (True, False):
        clipped = np.clip(x, -9, 9)
        _, scale, zero = quantize_weight(clipped, dtype=kind, symmetric=symmetric, **options)  # type: ignore[arg-type]
        q = affine.quantize(x, scale, zero, kind, **options)
        np.testing.assert_array_equal(wide(q), in_runtime("QuantizeLinear", x, scale, zero, kind, **attributes))
        back = affine.dequantize(q, scale, zero, **options)
        expected = in_runtime("DequantizeLinear", q.astype(np.int32), scale, zero, kind, **attributes)
        assert back.tobytes() == expected.tobytes()
        half = scale.astype(np.float16)
        back = affine.dequantize(q, half, zero, **options)
        assert back.dtype == np.float16
        expected = in_runtime("DequantizeLinear", q.astype(np.int32), half, zero, kind, **attributes)
        assert back.tobytes() == expected.tobytes()


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=3, max_side=9), elements=st.floats(-4, 4, width=32)),
    st.sampled_from(["int8", "uint8", "int4", "uint4", "int2"]),
    st.booleans(),
    st.sampled_from([None, 0, 1, -1]),
    st.sampled_from([0, 2, 3]),
    st.sampled_from(["minmax", "mse"]),
)
def test_whole_weights(x: Array, dtype: str, symmetric: bool, axis: int | None, block: int, clip: str) -> None:
    block = block if axis is not None else 0
    q, scale, zero = quantize_weight(x, dtype=dtype, axis=axis, block=block, symmetric=symmetric, clip=clip)
    assert q.dtype == affine.numpy_dtype(dtype)
    params = AffineParams(scale, zero, dtype, axis, block)
    np.testing.assert_array_equal(wide(params.quantize(x)), wide(q))
    error = params.dequantize(q) - x
    if clip == "minmax":
        size = np.broadcast_to(scale, x.shape) if axis is None else None
        if axis is not None:
            along = np.moveaxis(scale, axis, -1) if block else scale
            along = np.repeat(along, block, axis=-1)[..., : x.shape[axis]] if block else along
            size = np.moveaxis(np.broadcast_to(along, np.moveaxis(x, axis, -1).shape), -1, axis)
        assert size is not None
        assert (np.abs(error) <= size * (0.5 + 1e-4)).all()
    else:
        plain = quantize_weight(x, dtype=dtype, axis=axis, block=block, symmetric=symmetric)
        before = AffineParams(plain.scale, plain.zero_point, dtype, axis, block).dequantize(plain.q) - x
        assert float((error.astype(np.float64) ** 2).sum()) <= float((before.astype(np.float64) ** 2).sum()) * (
            1 + 1e-5
        )


def test_the_best_clip_of_a_normal_density_is_the_known_one() -> None:
    x = np.random.default_rng(0).standard_normal(200_000).astype(np.float32)
    q, scale, zero = quantize_weight(x, dtype="int4", clip="mse")
    error = float(((affine.dequantize(q, scale, zero) - x).astype(np.float64) ** 2).mean())
    # Max 1960, table II: the best uniform 16-level quantizer has step 0.3352 and error 0.01154; int4 has a 0
    plain = affine.dequantize(*quantize_weight(x, dtype="int4")) - x
    assert float(scale) == pytest.approx(0.3352, rel=0.06)
    assert error == pytest.approx(0.01154, rel=0.06)
    assert error < 0.5 * float((plain.astype(np.float64) ** 2).mean())


def test_large_arrays_go_in_pieces_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).standard_normal((7, 24, 10)).astype(np.float32)
    for axis, block in ((None, 0), (0, 0), (1, 0), (2, 0), (1, 5), (0, 2), (2, 3)):
        whole = quantize_weight(x, axis=axis, block=block, symmetric=False, clip="mse")
        back = affine.dequantize(whole.q, whole.scale, whole.zero_point, axis=axis, block=block)
        with monkeypatch.context() as patch:
            patch.setattr(affine, "CHUNK", 16)
            pieces = quantize_weight(x, axis=axis, block=block, symmetric=False, clip="mse")
            again = affine.dequantize(whole.q, whole.scale, whole.zero_point, axis=axis, block=block)
        assert whole.q.tobytes() == pieces.q.tobytes()
        assert back.tobytes() == again.tobytes()


def test_reduced_range_and_narrow_range() -> None:
    x = np.linspace(-1, 1, 1001, dtype=np.float32)
    assert (quantize_weight(x).q.min(), quantize_weight(x).q.max()) == (-127, 127)
    reduced = quantize_weight(x, reduced_range=True).q
    assert (reduced.min(), reduced.max()) == (-64, 64)
    assert not pair_sum_bound(reduced, axis=0).saturates
    assert pair_sum_bound(quantize_weight(x).q, axis=0).saturates


def test_int32_bias_is_exact_where_float32_is_not() -> None:
    bias = np.array([16777217.0, -16777219.0])
    q = affine.quantize(bias, np.array(1, np.float32), np.array(0, np.int32), "int32")
    assert q.tolist() == [16777217, -16777219]


@settings(max_examples=80, deadline=None)
@given(
    hnp.arrays(np.int8, st.tuples(st.integers(1, 4), st.integers(1, 9))),
    st.integers(0, 255),
    st.integers(0, 255),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_pair_sums_are_bounded_and_reached(weight: Array, a: int, b: int, neighbours: bool, random: Any) -> None:
    low, high = min(a, b), max(a, b)
    bound = pair_sum_bound(weight, axis=1, activation=(low, high), neighbours=neighbours)
    sums = [0]
    k = weight.shape[1]
    for line in weight.astype(int).tolist():
        for i in range(k):
            for j in range(i + 1, k):
                if neighbours and (i % 2 or j != i + 1):
                    continue
                sums += [p * line[i] + q * line[j] for p in (low, high) for q in (low, high)]
                sums.append(random.randint(low, high) * line[i] + random.randint(low, high) * line[j])
        if k % 2:  # one element is left alone: the last, or any where the order is not known
            sums += [end * w for end in (low, high) for w in (line[-1:] if neighbours else line)]
    assert (bound.lowest, bound.highest) == (min(sums), max(sums))
    assert bound.saturates == (min(sums) < -32768 or max(sums) > 32767)
