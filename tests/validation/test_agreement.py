"""Agreement of outputs: figures by hand, exactness when equal, and every kind of value onnxruntime returns."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress.validation.agreement import Agreement, OutputAgreement


def compare(original: Any, compressed: Any, **where: Any) -> OutputAgreement:
    agreement = Agreement()
    agreement.update({"out": original}, {"out": compressed}, **where)
    (found,) = agreement.results()
    return found


def test_figures_by_hand() -> None:
    x = np.array([[3.0, 4.0], [0.0, 5.0]], np.float32)
    y = np.array([[3.0, 3.0], [0.0, 7.0]], np.float32)
    found = compare(x, y, start=10, count=2)
    assert found.cosine == pytest.approx((9 + 12 + 35) / math.sqrt(50 * 67))
    assert found.sqnr_db == pytest.approx(10 * math.log10(50 / 5))
    assert (found.max_abs, found.mean_abs, found.max_relative) == (2.0, 0.75, 0.4)
    assert found.mean_relative == 3 / 12
    assert found.equal == 0.5
    # The first row's largest entry ties in `y`, and argmax takes the first.
    assert found.top1 == 0.5
    assert found.top5 is None
    assert [(w.index, w.max_abs) for w in found.worst] == [(11, 2.0), (10, 1.0)]
    assert found.worst[0].rms == pytest.approx(math.sqrt(2))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 5),
    st.integers(0, 7),
    st.sampled_from(["f2", "f4", "f8", "i8", "u1"]),
    st.integers(0, 2**32 - 1),
)
def test_equal_outputs_have_no_difference_at_all(rows: int, width: int, dtype: str, seed: int) -> None:
    values = np.random.default_rng(seed).standard_normal((rows, width)) * 100
    array = values.astype(dtype) if dtype != "u1" else np.abs(values).astype(dtype)
    found = compare(array, array.copy(), count=rows)
    assert found.bit_equal
    assert found.equal == 1.0
    assert found.elements == rows * width
    assert found.worst == ()
    if array.size:
        assert (found.max_abs, found.mean_abs, found.max_relative) == (0.0, 0.0, 0.0)
        assert found.mean_relative == 0.0
        assert found.cosine == 1.0
        assert found.sqnr_db == math.inf
        assert found.kl in (0.0, None)
        assert found.top1 in (1.0, None)


def test_streaming_gives_what_one_call_gives() -> None:
    generator = np.random.default_rng(3)
    x = generator.standard_normal((60, 7)).astype(np.float32)
    y = x + 0.1 * generator.standard_normal((60, 7)).astype(np.float32)
    whole = compare(x, y, count=60)
    parts = Agreement()
    for at in range(0, 60, 16):
        stop = min(60, at + 16)
        parts.update({"out": x[at:stop]}, {"out": y[at:stop]}, start=at, count=stop - at)
    (found,) = parts.results()
    for name in ("cosine", "sqnr_db", "max_abs", "mean_abs", "max_relative", "top1", "top5", "kl"):
        assert getattr(found, name) == pytest.approx(getattr(whole, name), rel=1e-12), name
    assert [w.index for w in found.worst] == [w.index for w in whole.worst]
    errors = ((x.astype(np.float64) - y) ** 2).sum(axis=1)
    assert [w.index for w in found.worst] == np.argsort(-errors)[:5].tolist()


def test_top5_and_kl() -> None:
    x = np.array([[9.0, 1, 2, 3, 4, 5, 6], [9.0, 1, 2, 3, 4, 5, 6]])
    y = np.array([[2.5, 1, 2, 3, 4, 5, 6], [1.5, 1, 2, 3, 4, 5, 6]])
    found = compare(x, y, count=2)
    assert (found.top1, found.top5) == (0.0, 0.5)
    p, q = np.array([[0.5, 0.5]]), np.array([[0.25, 0.75]])
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert compare(p, q).kl == pytest.approx(expected)
    # The same through logits.
    assert compare(np.log(p) + 4, np.log(q) - 2).kl == pytest.approx(expected)


def test_nan_and_inf_are_counted_and_kept_out_of_the_sums() -> None:
    x = np.array([[1.0, 2.0, -np.inf, np.nan]])
    y = np.array([[1.0, np.nan, -np.inf, np.nan]])
    found = compare(x, y)
    assert (found.nonfinite_original, found.nonfinite_compressed, found.nonfinite_new) == (2, 3, 1)
    assert (found.max_abs, found.mean_abs, found.equal) == (0.0, 0.0, 0.75)
    same = compare(x, x.copy())
    assert same.bit_equal
    assert same.nonfinite_new == 0


def test_integers_booleans_strings() -> None:
    integers = compare(np.array([1, 2, 3, 4]), np.array([1, 2, 3, 9]), count=4)
    assert (integers.kind, integers.equal, integers.max_abs) == ("integer", 0.75, 5.0)
    assert [w.index for w in integers.worst] == [3]
    flags = compare(np.array([True, False]), np.array([True, True]))
    assert (flags.kind, flags.equal, flags.bit_equal, flags.cosine) == ("bool", 0.5, False, None)
    words = compare(np.array(["a", "b"], object), np.array(["a", "b"], object))
    assert (words.kind, words.equal, words.bit_equal) == ("string", 1.0, True)


def test_maps_and_sequences() -> None:
    maps = [{1: 0.25, 0: 0.75}, {0: 0.5, 1: 0.5}]
    found = compare(maps, [{0: 0.75, 1: 0.25}, {0: 0.25, 1: 0.75}], count=2)
    assert (found.elements, found.max_abs, found.top1, found.equal) == (4, 0.25, 0.5, 0.5)
    assert [w.index for w in found.worst] == [1]
    other = compare(maps, [{0: 0.75, 2: 0.25}, {0: 0.5, 2: 0.5}], count=2)
    assert other.mismatch == "keys 0, 1 in the original, 0, 2 in the compressed model"
    tensors = [np.zeros(2, np.float32), np.ones((2, 3), np.float32)]
    assert compare(tensors, [t.copy() for t in tensors]).elements == 8
    fewer = compare(tensors, tensors[:1])
    assert fewer.mismatch == "2 tensors in the original, 1 in the compressed model"


def test_other_shapes_and_kinds_are_reported() -> None:
    found = compare(np.zeros((2, 10)), np.zeros((2, 9)), count=2)
    assert (found.mismatched, found.bit_equal, found.elements) == (1, False, 0)
    assert found.mismatch == "shape [2, 10] in the original, [2, 9] in the compressed model"
    assert compare(np.zeros(3), np.zeros(3, np.int64)).mismatched == 1
    half = compare(np.array([1.0, 2.0], np.float32), np.array([1.0, 2.0], np.float16))
    assert (half.mismatched, half.bit_equal, half.max_abs, half.cosine) == (0, False, 0.0, 1.0)


def test_padding_is_left_out() -> None:
    x = np.ones((2, 3, 4), np.float32)
    y = x.copy()
    y[1, 2] = 100
    valid = np.array([[True, True, True], [True, True, False]])
    found = compare(x, y, count=2, valid={"out": valid})
    assert (found.elements, found.max_abs, found.equal) == (20, 0.0, 1.0)


def test_zero_vectors_and_tiny_differences() -> None:
    zeros = compare(np.zeros(3), np.array([0.0, 0.0, 1.0]))
    assert (zeros.cosine, zeros.sqnr_db, zeros.max_relative) == (0.0, -math.inf, math.inf)
    signed = compare(np.array([0.0]), np.array([-0.0]))
    assert (signed.bit_equal, signed.max_abs, signed.cosine, signed.equal) == (False, 0.0, 1.0, 1.0)


def test_large_outputs_go_through_in_blocks() -> None:
    generator = np.random.default_rng(0)
    x = generator.standard_normal((3, 1_500_000)).astype(np.float32)
    y = x + np.float32(0.5)
    found = compare(x, y, count=3)
    assert found.elements == 4_500_000
    assert found.mean_abs == pytest.approx(0.5, abs=1e-6)
    assert all(w.rms == pytest.approx(0.5, abs=1e-6) for w in found.worst)
    assert len(json.dumps([w.index for w in found.worst])) == len("[0, 1, 2]")
