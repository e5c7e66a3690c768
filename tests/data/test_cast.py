from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxcompress.data.cast import safe_cast
from onnxcompress.errors import DataError


@given(
    hnp.arrays(hnp.integer_dtypes() | hnp.floating_dtypes(endianness="="), st.integers(0, 5)),
    st.sampled_from(["int8", "uint8", "int16", "int32", "uint32", "int64", "uint64", "bool"]),
)
def test_a_cast_to_integers_keeps_every_value_or_is_refused(array: np.ndarray, target: str) -> None:
    low, high = (0, 1) if target == "bool" else (int(np.iinfo(target).min), int(np.iinfo(target).max))
    values = array.tolist()
    fits = all(np.isfinite(float(value)) and value == int(value) and low <= int(value) <= high for value in values)
    if fits:
        cast = safe_cast(array, np.dtype(target), "x")
        assert cast.dtype == target
        assert [int(value) for value in cast.tolist()] == [int(value) for value in values]
    else:
        with pytest.raises(DataError, match="'x'"):
            safe_cast(array, np.dtype(target), "x")


def test_small_integers_become_floats() -> None:
    cast = safe_cast(np.array([0, 255], np.uint8), np.dtype(np.float32), "x")
    assert cast.dtype == np.float32
    assert cast.tolist() == [0.0, 255.0]


@pytest.mark.parametrize(
    ("array", "target", "message"),
    [
        (np.array([0.5]), np.int64, "not whole"),
        (np.array([np.nan], np.float32), np.int64, "not whole"),
        (np.array([300]), np.uint8, r"300 \(int64\) do not fit uint8"),
        (np.array([2]), np.bool_, "do not fit bool"),
        (np.array([1e30]), np.float16, "does not fit float16"),
        (np.array(["a"]), np.float32, "cannot turn <U1 into float32"),
        (np.array([1 + 2j]), np.float32, "cannot turn complex128 into float32"),
        (np.array([1]), object, "wanted strings, got int64"),
    ],
)
def test_lossy_casts_are_refused(array: np.ndarray, target: type, message: str) -> None:
    with pytest.raises(DataError, match=message):
        safe_cast(array, np.dtype(target), "x")


def test_text_and_bytes_become_strings() -> None:
    for array in (np.array(["a", "é"]), np.array([b"a", "é".encode()])):
        cast = safe_cast(array, np.dtype(object), "x")
        assert cast.dtype == object
        assert cast.tolist() == ["a", "é"]


def test_bfloat16_survives_numpys_void_storage() -> None:
    values = np.array([1.5, -2.0], ml_dtypes.bfloat16)
    assert safe_cast(values.view("V2"), values.dtype, "x").astype(np.float32).tolist() == [1.5, -2.0]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("value", [2**63 - 1, 2**63 - 512, -(2**63)])
def test_integers_that_no_float_holds_are_kept(value: int, order: str) -> None:
    cast = safe_cast(np.array([value], f"{order}i8"), np.dtype(np.int64), "x")
    assert cast.tolist() == [value]
    with pytest.raises(DataError, match="do not fit int32"):
        safe_cast(np.array([value], f"{order}i8"), np.dtype(np.int32), "x")
