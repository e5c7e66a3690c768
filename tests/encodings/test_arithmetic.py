"""The encodings as arithmetic: packing, decoding by formula, projections, equality, sizes."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxcompress.encodings import Affine, Codebook, Dense, Encoding, Masked, Sparse
from onnxcompress.encodings import codebook as codebooks
from onnxcompress.model.spill import spill
from tests.builders import ENCODERS, affine, codebook, floats, halved, same_bits

SHAPES = hnp.array_shapes(min_dims=1, max_dims=4, max_side=7)
quick = settings(max_examples=60, deadline=None)


@quick
@given(st.sampled_from([1, 2, 4, 8]), SHAPES, st.integers(0, 2**32 - 1))
def test_pack_unpack(bits: int, shape: tuple[int, ...], seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, size=shape).astype(np.uint8)
    packed, tail = codebooks.pack(codes, bits)
    per = 8 // bits
    assert packed.dtype == tail.dtype == np.uint8
    assert (len(packed), len(tail)) == (codes.size // per, codes.size % per)
    assert np.array_equal(codebooks.unpack(packed, tail, bits, shape), codes)
    flat = codes.reshape(-1)
    for i, byte in enumerate(packed):  # lowest bits first
        assert int(byte) == sum(int(flat[i * per + j]) << (j * bits) for j in range(per))


@st.composite
def tables(draw: st.DrawFn) -> Codebook:
    shape = draw(SHAPES)
    axis = draw(st.one_of(st.none(), st.integers(0, len(shape) - 1)))
    k = draw(st.integers(1, 256))
    dtype = draw(st.sampled_from([np.float32, np.float16, np.float64]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    channels = () if axis is None else (shape[axis],)
    table = rng.normal(size=(*channels, k)).astype(dtype)
    out = np.dtype(np.float32) if dtype == np.float16 and draw(st.booleans()) else None
    return Codebook(rng.integers(0, k, size=shape).astype(np.uint8), table, axis, out)


@quick
@given(tables())
def test_codebook_decodes_by_lookup(encoding: Codebook) -> None:
    decoded = encoding.decode()
    assert decoded.shape == encoding.codes.shape
    assert decoded.dtype == encoding.dtype
    for at in np.ndindex(*encoding.codes.shape):
        row = encoding.table if encoding.axis is None else encoding.table[at[encoding.axis]]
        assert decoded[at] == row[encoding.codes[at]]


@quick
@given(tables())
def test_codebook_projection_keeps_codes_and_zeros(encoding: Codebook) -> None:
    table = encoding.table.copy()
    table[..., 0] = 0
    encoding = dataclasses.replace(encoding, table=table)
    moved = encoding.updated({"codebook": encoding.table.astype(np.float32) + 1})
    assert np.array_equal(moved.codes, encoding.codes)
    assert moved.table.dtype == encoding.table.dtype
    assert not moved.table[encoding.table == 0].any()
    assert moved.nbytes == encoding.nbytes
    assert moved.structure() == encoding.structure()
    expected = (encoding.table.astype(np.float32) + 1).astype(encoding.table.dtype)
    assert np.array_equal(moved.table[encoding.table != 0], expected[encoding.table != 0])


@quick
@given(hnp.arrays(np.float32, SHAPES, elements=st.sampled_from([0.0, -0.0, 1.5, -2.0, np.inf, np.nan, 1e-45])))
def test_sparse_keeps_every_value(array: np.ndarray) -> None:
    encoding = Sparse.pack(array)
    assert np.array_equal(encoding.decode(), array, equal_nan=True)
    assert len(encoding.values) == 1 + np.count_nonzero(array)
    assert encoding.nbytes == -(-array.size // 8) + encoding.values.nbytes + 8 * array.ndim
    assert same_bits(encoding.updated(encoding.parameters()).decode(), encoding.decode())


@quick
@given(hnp.arrays(np.float32, SHAPES, elements=st.floats(-9, 9, width=32)), st.data())
def test_sparse_projection(array: np.ndarray, data: st.DataObject) -> None:
    encoding = Sparse.pack(array)
    values = encoding.parameters()["values"]
    fresh = np.asarray(data.draw(hnp.arrays(np.float32, values.shape, elements=st.floats(-9, 9, width=32))))
    moved = encoding.updated({"values": fresh})
    decoded = moved.decode()
    assert not decoded[array == 0].any()
    assert np.array_equal(decoded[array != 0], fresh)
    assert np.array_equal(moved.mask, encoding.mask)
    assert moved.shape == encoding.shape


@quick
@given(hnp.arrays(np.float32, SHAPES, elements=st.floats(-9, 9, width=32)))
def test_masked_projection(array: np.ndarray) -> None:
    encoding = Masked(array)
    moved = encoding.updated({"w": array + 100})
    assert np.array_equal(moved.decode(), np.where(array == 0, 0, array + 100))
    assert np.array_equal(moved.mask, array != 0)


@st.composite
def integers(draw: st.DrawFn) -> Affine:
    shape = draw(SHAPES)
    kind: np.dtype[Any] = np.dtype(draw(st.sampled_from(["int8", "uint8", "int16", "uint16"])))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    limits = np.iinfo(kind)

    def levels(size: tuple[int, ...]) -> np.ndarray:
        return rng.integers(limits.min, limits.max, size=size, endpoint=True).astype(kind)

    axis = draw(st.one_of(st.none(), st.integers(0, len(shape) - 1)))
    block = draw(st.one_of(st.none(), st.integers(1, 5))) if axis is not None else None
    size: tuple[int, ...] = () if axis is None else (shape[axis],)
    if block is not None and axis is not None:
        size = tuple(-(-d // block) if i == axis else d for i, d in enumerate(shape))
    zero = levels(size) if draw(st.booleans()) else None
    form: Any = "folded" if block is None and draw(st.booleans()) else "dequantize-linear"
    return Affine(levels(shape), np.asarray(rng.uniform(0.01, 2, size), np.float32), zero, axis, block, form)


@quick
@given(integers())
def test_affine_decodes_by_formula(encoding: Affine) -> None:
    decoded = encoding.decode()
    for at in np.ndindex(*encoding.q.shape):
        where: tuple[int, ...] = ()
        if encoding.block is not None:
            where = tuple(i // encoding.block if j == encoding.axis else i for j, i in enumerate(at))
        elif encoding.axis is not None:
            where = (at[encoding.axis],)
        zero = encoding.zero_point
        centre = 0 if zero is None else int(zero[where] if zero.ndim else zero)
        expected = np.float32(int(encoding.q[at]) - centre) * np.float32(encoding.scale[where])
        assert decoded[at] == expected


@quick
@given(integers())
def test_affine_projection_of_itself(encoding: Affine) -> None:
    """What is already on the grid stays there, to the last integer."""
    again = encoding.updated(encoding.parameters())
    assert np.array_equal(again.q, encoding.q)
    assert again.same(encoding)


@quick
@given(integers(), st.integers(0, 2**32 - 1))
def test_affine_projection_rounds_to_the_nearest(encoding: Affine, seed: int) -> None:
    w = np.random.default_rng(seed).normal(scale=50, size=encoding.shape).astype(np.float32)
    moved = encoding.updated({"w": w, "scale": encoding.scale * np.float32(1.5)})
    assert moved.q.dtype == encoding.q.dtype
    assert moved.structure() == encoding.structure()
    step = np.broadcast_to(moved._spread(moved.scale), w.shape)
    limits = np.iinfo(moved.q.dtype)
    inside = (moved.q > limits.min) & (moved.q < limits.max)
    assert (np.abs(moved.decode() - w) <= 0.5001 * step + 1e-5)[inside].all()


def test_affine_projection_of_four_bits_saturates() -> None:
    for name, low, high in (("int4", -8, 7), ("uint4", 0, 15)):
        kind = np.dtype(getattr(ml_dtypes, name))
        encoding = Affine(np.zeros((2, 3), np.int8).astype(kind), np.array([0.5, 0.25, 0.0], np.float32), None, 1)
        moved = encoding.updated({"w": np.array([[99, -99, 3], [1.3, 1.3, 3]], np.float32)})
        assert moved.q.dtype == kind
        assert moved.q.astype(int).tolist() == [[high, low, 0], [3, 5, 0]]  # a scale of 0 holds nothing but 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", ENCODERS)
def test_projections_keep_the_type(kind: str, dtype: str) -> None:
    """Training works in float32; the weight keeps its own type."""
    array = floats(6, 5).astype(np.dtype(getattr(ml_dtypes, dtype, dtype)))
    encoding = ENCODERS[kind](array, 0)
    moved = encoding.updated({name: value.astype(np.float32) for name, value in encoding.parameters().items()})
    assert (moved.dtype, moved.shape, moved.nbytes) == (encoding.dtype, encoding.shape, encoding.nbytes)
    assert moved.structure() == encoding.structure()
    if kind == "dense" or not kind.startswith(("folded", "dequantize")):
        assert same_bits(np.asarray(moved.decode()), np.asarray(encoding.decode()))


@pytest.mark.parametrize("kind", ENCODERS)
def test_same_is_of_content(kind: str) -> None:
    """Equal to a copy; unlike every other encoding, and unlike itself of other content."""
    one, twin = ENCODERS[kind](floats(6, 6), 0), ENCODERS[kind](floats(6, 6), 0)
    assert one.same(twin)
    assert not one.same(ENCODERS[kind](floats(6, 6, seed=1), 0))
    others: list[Encoding] = [make(floats(6, 6), 0) for name, make in ENCODERS.items() if name != kind]
    assert not any(one.same(other) for other in others)


def test_same_tells_axes_and_forms_apart() -> None:
    by_rows, by_columns = codebook(floats(6, 6), 4, 0), codebook(floats(6, 6), 4, 0)
    by_columns = dataclasses.replace(by_columns, axis=1)
    assert not by_rows.same(by_columns)
    assert dataclasses.replace(by_columns, axis=-2).same(by_rows)
    rows = affine(floats(6, 6), "dequantize-linear", 0)
    assert not rows.same(dataclasses.replace(rows, axis=1))
    assert not rows.same(dataclasses.replace(rows, form="folded"))
    assert dataclasses.replace(rows, axis=-2).same(rows)


def test_what_cannot_be_encoded_is_refused() -> None:
    codes, scale = np.zeros((4, 5), np.uint8), np.ones(4, np.float32)
    with pytest.raises(ValueError, match="give uint8 codes"):
        Codebook(codes.astype(np.int64), floats(4))
    with pytest.raises(ValueError, match="1 to 256 entries"):
        Codebook(codes, floats(257))
    with pytest.raises(ValueError, match="1 to 256 entries"):
        Codebook(codes, floats(5, 4), 0)
    with pytest.raises(ValueError, match="has no blocks"):
        Affine(codes, np.ones((2, 5), np.float32), None, 0, 2, "folded")
    with pytest.raises(ValueError, match="one an index of the axis"):
        Affine(codes, scale, None, 1)
    with pytest.raises(ValueError, match="one a block"):
        Affine(codes, np.ones((3, 5), np.float32), None, 0, 2)
    with pytest.raises(ValueError, match="one bit an element"):
        Sparse(np.zeros(1, np.uint8), floats(3), (4, 5))


def test_bytes_before_it_is_made() -> None:
    for k, axis in ((3, None), (16, 0), (200, None), (2, 1)):
        made = codebook(floats(9, 5), k, axis)
        channels = None if axis is None else made.shape[axis]
        assert Codebook.size(45, channels, k, 4, 2) == made.nbytes


@pytest.mark.parametrize("dtype", ["float32", "uint8", "int4", "bfloat16", "float16"])
def test_spill(dtype: str, tmp_path: pathlib.Path) -> None:
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    array = (np.arange(1 << 20) % 7).astype(np.float32).astype(kind).reshape(1024, 1024).T
    mapped = spill(array, tmp_path)
    assert mapped.dtype == kind
    assert np.array_equal(mapped, array)
    assert not mapped.flags.writeable
    assert spill(mapped, tmp_path) is mapped
    assert len(list(tmp_path.iterdir())) == 1
    small = floats(10)
    assert spill(small, tmp_path) is small


def test_dense_holds_arrays_and_tensors() -> None:
    array = floats(3, 4)
    one, other = Dense(array), Dense(ir.tensor(array))
    assert one.same(other)
    assert (one.shape, one.nbytes, one.dtype) == (other.shape, other.nbytes, other.dtype)
    assert (one.shape, one.nbytes, one.dtype.name) == ((3, 4), 48, "float32")


def test_masks_by_their_zeros() -> None:
    array = floats(20, 10)
    assert not Masked.recognizes(array)
    array[0, :2] = 0  # 1 %
    assert Masked.recognizes(array)
    array[0, 1] = 1
    assert not Masked.recognizes(array)
    assert not Masked.recognizes(halved(floats(50)))  # a vector
