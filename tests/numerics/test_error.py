"""Distances between tensors against their definitions."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxcompress.numerics.error import cosine, relative_rms, sqnr_db

Array = npt.NDArray[Any]
floats = st.floats(-1e6, 1e6, width=32)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 30).flatmap(lambda n: st.tuples(*(hnp.arrays(np.float32, n, elements=floats) for _ in range(2)))))
def test_against_the_definitions(both: tuple[Array, Array]) -> None:
    a, b = (array.astype(np.float64) for array in both)
    if not np.linalg.norm(a) or not np.linalg.norm(b):
        return
    ratio = float(np.linalg.norm(a - b) / np.linalg.norm(a))
    assert relative_rms(*both) == pytest.approx(ratio, rel=1e-9)
    if ratio:
        assert sqnr_db(*both) == pytest.approx(-20 * math.log10(ratio), abs=1e-6)
    assert cosine(*both) == pytest.approx(float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)), abs=1e-9)
    assert -1 <= cosine(*both) <= 1


def test_zeros_and_large_arrays_and_types() -> None:
    zero, one = np.zeros((2, 3), np.float16), np.ones((2, 3), ml_dtypes.bfloat16)
    assert (relative_rms(zero, zero), sqnr_db(zero, zero), cosine(zero, zero)) == (0.0, math.inf, 1.0)
    assert (relative_rms(zero, one), sqnr_db(zero, one), cosine(zero, one)) == (math.inf, -math.inf, 0.0)
    assert (relative_rms(one, zero), sqnr_db(one, zero), cosine(one, zero)) == (1.0, 0.0, 0.0)
    assert (relative_rms(one, one), sqnr_db(one, one), cosine(one, -one)) == (0.0, math.inf, -1.0)
    many = np.full((3, 1 << 20), 0.1, np.float32)
    assert relative_rms(many, many * np.float32(1.5)) == pytest.approx(0.5, rel=1e-6)
    assert cosine(many, many * 2) == pytest.approx(1.0, abs=1e-12)
    assert relative_rms(np.zeros((0,)), np.zeros((0,))) == 0.0
    with pytest.raises(ValueError, match="cannot be compared"):
        relative_rms(zero, zero.T)


def test_not_a_number_stays_not_a_number() -> None:
    a, bad = np.ones(3, np.float32), np.array([1, np.nan, 1], np.float32)
    assert all(math.isnan(f(a, bad)) for f in (relative_rms, sqnr_db, cosine))
    assert math.isnan(relative_rms(np.zeros(3, np.float32), bad))
