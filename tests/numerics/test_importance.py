"""Magnitude thresholds and masks against numpy's own selection."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxcompress.numerics.importance import (
    MagnitudeThreshold,
    RefinedThreshold,
    drop_count,
    global_threshold,
    layer_mask,
    nm_mask,
    scale_of,
    scores,
    threshold_mask,
)

Array = npt.NDArray[Any]
values = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False), st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, 1e-45])
)
tensors = st.lists(
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=6), elements=values),
    max_size=5,
)


@settings(max_examples=200, deadline=None)
@given(tensors, st.floats(0, 1))
def test_threshold_is_the_exact_order_statistic(arrays: list[Array], sparsity: float) -> None:
    found = global_threshold(lambda: [(array, 1.0) for array in arrays], sparsity)
    everything = np.abs(np.concatenate([np.zeros(0, np.float32), *(array.reshape(-1) for array in arrays)]))
    count = drop_count(everything.size, sparsity)
    if count:
        assert found.value == np.partition(everything, count - 1)[count - 1]
        assert (everything < found.value).sum() + found.ties == count
        assert 0 < found.ties <= (everything == found.value).sum()
    dropped = 0
    left = found
    for array in arrays:
        keep, left = threshold_mask(array, left)
        assert keep.shape == array.shape
        dropped += int((~keep).sum())
        assert (np.abs(array[keep]) >= found.value).all()
        assert (np.abs(array[~keep]) <= found.value).all()
    assert dropped == count
    assert left.ties == 0


@settings(max_examples=50, deadline=None)
@given(tensors, st.permutations(range(5)), st.integers(0, 5), st.floats(0, 1))
def test_order_and_grouping_of_merges_do_not_matter(
    arrays: list[Array], order: list[int], split: int, sparsity: float
) -> None:
    expected = global_threshold(lambda: [(array, 1.0) for array in arrays], sparsity)
    shuffled = [arrays[i] for i in order if i < len(arrays)]
    one, two = MagnitudeThreshold(), MagnitudeThreshold()
    for array in shuffled[:split]:
        one.update(array)
    for array in shuffled[split:]:
        two.update(array)
    two.merge(one)
    first, second = two.refine(sparsity), two.refine(sparsity)
    for array in shuffled[:split]:
        second.update(array)
    for array in shuffled[split:]:
        first.update(array)
    first.merge(second)
    assert first.threshold() == expected


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=8), elements=values), st.floats(0, 1))
def test_layer_mask_drops_the_exact_count_lowest_index_first(array: Array, sparsity: float) -> None:
    keep = layer_mask(array, sparsity)
    count = drop_count(array.size, sparsity)
    order = np.argsort(np.abs(array).reshape(-1), kind="stable")
    expected = np.ones(array.size, dtype=bool)
    expected[order[:count]] = False
    np.testing.assert_array_equal(keep.reshape(-1), expected)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_float_types(dtype: Any) -> None:
    array = np.random.default_rng(0).standard_normal((50, 60)).astype(dtype)
    keep = layer_mask(array, 0.37)
    assert (~keep).sum() == 1110
    assert np.abs(array[keep]).min() >= np.abs(array[~keep]).max()


def test_large_arrays_in_pieces_and_float_sparsity_counts() -> None:
    array = np.random.default_rng(0).integers(-50, 50, 3_000_001).astype(np.float32)
    assert (~layer_mask(array, 0.3)).sum() == 900_000
    assert drop_count(100, 0.29) == 29
    assert drop_count(10, 0.3) == 3
    with pytest.raises(ValueError, match="between 0 and 1"):
        drop_count(10, 1.5)


def test_normalized_scores_spare_the_layer_of_small_weights() -> None:
    rng = np.random.default_rng(0)
    small, large = (
        (rng.standard_normal(10_000) * 0.001).astype(np.float32),
        rng.standard_normal(10_000).astype(np.float32),
    )
    raw = global_threshold(lambda: [(small, 1.0), (large, 1.0)], 0.5)
    assert threshold_mask(small, raw)[0].mean() < 0.01
    for how in ("std", "rms"):
        scales = [scale_of(array, how) for array in (small, large)]
        fair = global_threshold(lambda scales=scales: list(zip((small, large), scales, strict=True)), 0.5)  # type: ignore[misc]
        kept = threshold_mask(small, fair, scales[0])[0], threshold_mask(large, fair, scales[1])[0]
        assert kept[0].mean() == pytest.approx(0.5, abs=0.02)
        assert kept[0].sum() + kept[1].sum() == 10_000
    assert scale_of(large + 3, "std") == pytest.approx(float(large.astype(np.float64).std()), rel=1e-6)
    assert scale_of(large + 3, "rms") == pytest.approx(
        float(np.sqrt(np.mean((large.astype(np.float64) + 3) ** 2))), rel=1e-6
    )
    assert scale_of(np.zeros(4, np.float32), "rms") == 1.0
    assert scale_of(large) == 1.0
    with pytest.raises(ValueError, match="none, std or rms"):
        scale_of(large, "max")


def test_refused_input() -> None:
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="NaN or infinite"):
            scores(np.array([1, bad], np.float32))
    first = MagnitudeThreshold()
    first.update(np.arange(10, dtype=np.float32))
    second = first.refine(0.5)
    assert isinstance(second, RefinedThreshold)
    with pytest.raises(ValueError, match="other weights"):
        second.threshold()


@settings(max_examples=100, deadline=None)
@given(
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=3, max_side=9), elements=values),
    st.integers(1, 5),
    st.data(),
)
def test_n_of_m_keeps_the_largest_of_every_group(array: Array, m: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(0, m))
    axis = data.draw(st.integers(-array.ndim, array.ndim - 1))
    keep = nm_mask(array, n, m, axis)
    lines = np.moveaxis(np.abs(array), axis, -1).reshape(-1, array.shape[axis])
    kept = np.moveaxis(keep, axis, -1).reshape(lines.shape)
    for start in range(0, lines.shape[1], m):
        group, chosen = lines[:, start : start + m], kept[:, start : start + m]
        assert (chosen.sum(axis=1) == min(n, group.shape[1])).all()
        for line, mask in zip(group, chosen, strict=True):
            if mask.any() and not mask.all():
                assert line[mask].min() >= line[~mask].max()
