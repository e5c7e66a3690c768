"""Every encoding against ONNX Runtime: `decode` is bit for bit what the emitted form computes, in every opset."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress.encodings import Affine, Codebook, Encoding, Sparse
from onnxcompress.errors import PassError
from onnxcompress.model.weights import weights
from tests.builders import (
    ENCODERS,
    FLOAT_ACTIVATIONS,
    affine,
    by_key,
    checked,
    codebook,
    floats,
    graph,
    halved,
    holding,
    info,
    model,
    node,
    op_types,
    opened,
    optimized,
    run,
    same_bits,
    tensors,
)

OPSETS = (7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25)
QDQ = {"DequantizeLinear"}


def stored(found: ir.Model, names: set[str]) -> int:
    """Bytes of all initializers other than `names`."""
    kept = [v.const_value for v in found.graph.initializers.values() if v.name not in names]
    return sum(int(tensor.nbytes) for tensor in kept if tensor is not None)


def proven(encoding: Encoding, opset: int, ir_version: int = 8) -> bytes:
    """Put `encoding` in place of a weight and hold it to everything that is promised; the model's bytes."""
    array = np.asarray(encoding.decode())
    found = opened(holding(np.ones(array.shape, array.dtype), opset, ir_version))
    (weight,) = weights(found)
    weight.replace(encoding)
    assert weight.key == "w"
    assert weight.encoding.same(encoding)
    data = checked(found)
    for optimize in (False, True):
        assert same_bits(run(data, optimize=optimize)[0], array), f"optimize={optimize}"
    again = opened_bytes(data)
    (read,) = weights(again)
    assert read.key == "w"
    assert read.encoding.same(encoding)
    assert encoding.same(read.encoding)
    assert same_bits(np.asarray(read.array()), array)
    assert read.nbytes == encoding.nbytes == stored(again, set())
    return data


def opened_bytes(data: bytes) -> ir.Model:
    """The model as loaded from bytes."""
    from onnxcompress.model.load import load

    return load(data)


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("opset", OPSETS)
def test_every_opset(kind: str, opset: int) -> None:
    # 7 x 5 = 35 elements: no whole number of bytes at 1, 2 or 4 bits.
    encoding = ENCODERS[kind](floats(7, 5), 0)
    if encoding.least_opset > opset:
        (weight,) = weights(opened(holding(floats(7, 5), opset)))
        with pytest.raises(PassError, match=f"needs opset {encoding.least_opset}, the model has {opset}"):
            weight.replace(encoding)
        return
    data = proven(encoding, opset)
    if kind.startswith("dequantize"):
        return
    # Nothing is left to expand when the model runs.
    assert op_types(optimized(data).graph) <= {"Identity", "Constant"}


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_every_type(kind: str, dtype: str) -> None:
    array = floats(6, 4, 3).astype(np.dtype(getattr(ml_dtypes, dtype, dtype)))
    if kind.startswith("dequantize") and dtype in ("bfloat16", "float64"):
        pytest.skip("ONNX Runtime 1.32 has no such DequantizeLinear on the CPU")
    if kind.endswith("half"):
        encoding = ENCODERS[kind](array, 1)
        assert isinstance(encoding, Codebook)
        assert encoding.table.dtype == array.dtype  # only a float32 weight takes a narrower table
    proven(ENCODERS[kind](array, 1), 21)


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("shape", [(2,), (3,), (1, 2), (2, 1), (1, 1, 5), (3, 1, 1, 3), (16, 8), (1, 9, 1)])
def test_every_shape(kind: str, shape: tuple[int, ...]) -> None:
    for axis in range(len(shape)):
        proven(ENCODERS[kind](floats(*shape, seed=sum(shape)), axis), 17)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 15, 16, 17, 64, 255, 256])
@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("half", [False, True])
def test_codebook_sizes(k: int, axis: int | None, half: bool) -> None:
    rng = np.random.default_rng(k)
    channels = () if axis is None else ((9, 31)[axis],)
    table = rng.normal(size=(*channels, k)).astype(np.float16 if half else np.float32)
    codes = rng.integers(0, k, size=(9, 31)).astype(np.uint8)
    encoding = Codebook(codes, table, axis, np.dtype(np.float32))
    assert encoding.bits == next(b for b in (1, 2, 4, 8) if k <= 2**b)
    assert encoding.nbytes == Codebook.size(279, channels[0] if channels else None, k, table.itemsize, 2)
    proven(encoding, 13)


@pytest.mark.parametrize("k", [2, 4, 16])
@pytest.mark.parametrize("count", range(2, 18))
def test_codebook_tails(k: int, count: int) -> None:
    codes = np.random.default_rng(count).integers(0, k, size=count).astype(np.uint8)
    table = floats(k, seed=count)
    proven(Codebook(codes, table), 7)
    proven(Codebook(np.stack([codes, codes[::-1]]), np.stack([table, -table]), 0), 9)


def test_codebook_of_many_channels() -> None:
    codes = np.random.default_rng(0).integers(0, 2, size=(70_001, 2)).astype(np.uint8)
    encoding = Codebook(codes, floats(70_001, 2), 0)
    assert encoding.nbytes == 140_002 // 8 + 2 + 70_001 * (8 + 4) + 16
    proven(encoding, 17)


def test_codebook_special_values() -> None:
    table = np.array([np.nan, np.inf, -np.inf, -0.0, 0.0, 1e-45, 3.4e38, 65504.0], np.float32)
    codes = np.random.default_rng(0).integers(0, 8, size=(5, 5)).astype(np.uint8)
    proven(Codebook(codes, table), 17)


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(2,), (7, 9), (3, 1, 5, 2), (64, 64)])
def test_sparse_densities(density: float, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    array = np.where(rng.random(shape) < density, rng.normal(size=shape), 0).astype(np.float32)
    encoding = Sparse.pack(array)
    assert np.array_equal(encoding.decode(), array)
    proven(encoding, 11)


def test_sparse_keeps_nan_and_infinity() -> None:
    array = np.array([[np.nan, 0.0, -np.inf], [0.0, -0.0, 2.0]], np.float32)
    decoded = Sparse.pack(array).decode()
    assert np.isnan(decoded[0, 0])
    assert decoded[0, 2] == -np.inf
    assert not np.signbit(decoded[1, 1])  # a negative zero comes back as 0
    proven(Sparse.pack(array), 17)


@pytest.mark.parametrize("q", ["int4", "uint4"])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("shape", [(64, 5), (33, 7), (32, 1), (3, 3)])
@pytest.mark.parametrize("axis", [0, 1])
def test_affine_blocks(q: str, zero: bool, shape: tuple[int, int], axis: int) -> None:
    encoding = blocked(q, zero, shape, axis)
    assert encoding.least_opset == 21
    found = opened_bytes(proven(encoding, 21))
    assert found.ir_version == 10  # the first with 4-bit integers


def blocked(q: str, zero: bool, shape: tuple[int, int], axis: int, block: int = 16) -> Affine:
    rng = np.random.default_rng(3)
    low, high = {"int4": (-8, 8), "uint4": (0, 16)}[q]
    kind = np.dtype(getattr(ml_dtypes, q))
    count = [-(-d // block) if i == axis else d for i, d in enumerate(shape)]
    scale = rng.uniform(0.01, 1, size=count).astype(np.float32)
    zero_point = rng.integers(low, high, size=count).astype(np.int8).astype(kind) if zero else None
    levels = rng.integers(low, high, size=shape).astype(np.int8).astype(kind)
    return Affine(levels, scale, zero_point, axis, block)


@pytest.mark.parametrize("q", ["int2", "uint2"])
def test_affine_two_bits(q: str) -> None:
    kind = np.dtype(getattr(ml_dtypes, q))
    levels = np.arange(15).reshape(5, 3).astype(np.int8) % 4 - (2 if q == "int2" else 0)
    encoding = Affine(levels.astype(kind), np.array(0.3, np.float32))
    assert encoding.least_opset == 25
    assert encoding.nbytes == 4 + 4
    proven(encoding, 25)


@pytest.mark.parametrize("q", ["int4", "uint4"])
@pytest.mark.parametrize("form", ["folded", "dequantize-linear"])
@pytest.mark.parametrize("axis", [None, 1])
def test_affine_four_bits(q: str, form: Any, axis: int | None) -> None:
    kind = np.dtype(getattr(ml_dtypes, q))
    levels = (np.arange(21).reshape(3, 7).astype(np.int8) % 16 - (8 if q == "int4" else 0)).astype(kind)
    scale = np.array(0.3, np.float32) if axis is None else np.linspace(0.1, 1, 7, dtype=np.float32)
    proven(Affine(levels, scale, None, axis, form=form), 21)


def test_affine_int32_bias() -> None:
    levels = np.array([2**31 - 1, -(2**31), 123_456_789, -5], np.int32)
    encoding = Affine(levels, np.array([1e-3, 2e-3, 3e-3, 4e-3], np.float32), None, 0)
    assert encoding.least_opset == 13
    proven(encoding, 13)
    assert Affine(levels, np.array(1e-3, np.float32)).least_opset == 10


@pytest.mark.parametrize("q", ["int16", "uint16"])
def test_affine_sixteen_bits(q: str) -> None:
    limits = np.iinfo(q)
    levels = np.array([[limits.min, limits.max, 7], [0, 1, limits.max // 3]], q)
    encoding = Affine(levels, np.array([0.3, 0.7], np.float32), np.array([5, 9], q), 0)
    assert encoding.least_opset == 21
    proven(encoding, 21)


def test_affine_float8() -> None:
    levels = floats(4, 6).astype(ml_dtypes.float8_e4m3fn)
    encoding = Affine(levels, np.linspace(0.1, 1, 6, dtype=np.float32), None, 1)
    assert encoding.least_opset == 19
    proven(encoding, 19)


@pytest.mark.parametrize("kind", ["codebook-16", "channels-16", "folded", "folded-channels"])
def test_lifts_old_files(kind: str) -> None:
    """Below IR 4 every initializer is an input too; a function needs IR 8, where that would make it replaceable."""
    data = proven(ENCODERS[kind](floats(4, 6), 0), 9, ir_version=3)
    found = opened_bytes(data)
    assert found.ir_version == 8
    assert [value.name for value in found.graph.inputs] == ["x"]


def test_old_file_without_functions() -> None:
    """New initializers of any encoding would have to be inputs below IR 4."""
    data = proven(affine(floats(4, 6), "dequantize-linear"), 10, ir_version=3)
    assert [value.name for value in opened_bytes(data).graph.inputs] == ["x"]
    data = proven(ENCODERS["dense"](floats(4, 6), 0), 9, ir_version=3)
    found = opened_bytes(data)
    assert found.ir_version == 3
    assert sorted(value.name or "" for value in found.graph.inputs) == ["w", "x"]


@pytest.mark.parametrize("optimize", [False, True])
def test_integer_forms_run_as_blocks(optimize: bool) -> None:
    """Blocks along K, which ONNX Runtime fuses with the product: equal within its own accuracy."""
    encoding = blocked("uint4", True, (64, 8), 0, 32)
    x = floats(4, 64)
    body = graph(
        [node("MatMul", ["x", "w"], ["y"])], [info("x", [4, 64])], [info("y", [4, 8])], tensors(w=floats(64, 8))
    )
    found = opened(model(body, 21, 10))
    by_key(found)["w"].replace(encoding)
    data = checked(found)
    (exact,) = run(data, {"x": x}, optimize, entries=FLOAT_ACTIVATIONS)
    expected = x @ encoding.decode()
    assert np.abs(exact - expected).max() <= 1e-5 * np.abs(expected).max()


def test_masked_and_sparse_agree() -> None:
    array = floats(12, 5)
    masked, sparse = ENCODERS["masked"](array, 0), Sparse.pack(halved(array))
    assert same_bits(masked.decode(), sparse.decode())
    assert sparse.nbytes == 8 + 4 * (1 + 30) + 16
    assert masked.nbytes == 240


def test_codebook_float_table_of_a_half_weight() -> None:
    """The only cast at run time is to float32, so a wider table is narrowed when the encoding is made."""
    encoding = codebook(floats(5, 5), 4)
    narrowed = Codebook(encoding.codes, encoding.table, None, np.dtype(np.float16))
    assert narrowed.table.dtype == np.float16
    proven(narrowed, 17)
