"""1-D k-means against an exact dynamic program, and what its interface promises."""

from __future__ import annotations

import itertools
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxcompress.numerics import distinct, kmeans, partition
from onnxcompress.numerics.kmeans import Clusters, kmeans1d, kmeans_rows

Array = npt.NDArray[Any]
BOUND = 1.001


def optimum(values: Array, k: int, weights: Array | None = None, *, pinned: bool = False) -> float:
    """Least squared error of k intervals: dynamic program over all pairs, errors by Welford's update."""
    x: Array = np.asarray(values, np.float32).astype(np.float64).reshape(-1)
    mass: Array = np.ones(len(x)) if weights is None else np.asarray(weights, np.float64).reshape(-1)
    x, where = np.unique(x + 0.0, return_inverse=True)
    mass = np.bincount(where, mass, minlength=len(x))
    if pinned and not (x == 0).any():
        at = int(np.searchsorted(x, 0.0))
        x, mass = np.insert(x, at, 0.0), np.insert(mass, at, 0.0)
    n = len(x)
    if n <= k:
        return 0.0
    cost = np.full((n + 1, n + 1), np.inf)  # [from, to]
    cost[np.arange(n + 1), np.arange(n + 1)] = 0.0
    mean, total, error, around_zero = np.zeros(n), np.zeros(n), np.zeros(n), np.zeros(n)
    zero = int(np.flatnonzero(x == 0)[0]) if pinned else -1
    for j in range(n):
        head = slice(0, j + 1)
        new = total[head] + mass[j]
        delta = x[j] - mean[head]
        share = np.divide(mass[j], new, out=np.zeros(j + 1), where=new > 0)
        error[head] += delta * delta * total[head] * share
        mean[head] += delta * share
        total[head] = new
        around_zero[head] += mass[j] * x[j] ** 2
        cost[head, j + 1] = error[head]
        if 0 <= zero <= j:
            cost[: zero + 1, j + 1] = around_zero[: zero + 1]
    best = cost[0]
    turned = np.ascontiguousarray(cost.T)
    for _ in range(k - 1):
        best = (turned + best).min(axis=1)
    return float(best[n])


def slack(values: Array, weights: Array | float = 1.0) -> float:
    """What rounding the codebook to float32 may add: half a unit in the last place of each centre, squared."""
    x = np.asarray(values, np.float32).astype(np.float64)
    return float((weights * (x**2 * 2.0**-48 + 2.0**-300)).sum()) * 1.0001


def check(values: Array, found: Clusters, k: int) -> None:
    codebook, codes = found.codebook, found.codes
    assert codebook.dtype == np.float32
    assert codes.dtype == np.uint8
    assert codes.shape == values.shape
    assert 1 <= len(codebook) <= k
    assert (np.diff(codebook) > 0).all()
    if values.size:
        assert codes.max() < len(codebook)
        x = np.asarray(values, np.float32).astype(np.float64)
        distance = np.abs(x[..., None] - codebook.astype(np.float64))
        np.testing.assert_array_equal(
            np.take_along_axis(distance, codes[..., None].astype(int), -1)[..., 0], distance.min(-1)
        )


def nasty() -> dict[str, Array]:
    """Shapes of data on which histogram, quantile or Lloyd initializations are known to fail."""
    rng = np.random.default_rng(7)
    normal = (rng.standard_normal(1500) * 0.05).astype(np.float32)
    clumps = (rng.integers(0, 40, 1500) ** 2 + rng.standard_normal(1500) * 1e-3).astype(np.float32)
    return {
        "normal": normal,
        "uniform": rng.uniform(-1, 1, 1200).astype(np.float32),
        "laplace": rng.laplace(0, 0.1, 1500).astype(np.float32),
        "cauchy": rng.standard_cauchy(1500).astype(np.float32),
        "lognormal": np.exp(rng.standard_normal(1500) * 4).astype(np.float32),
        "outlier": np.append(normal, np.float32(1e4)),
        "outliers both sides": np.append(normal * np.float32(0.02), np.array([-65504, 65504, 3e4], np.float32)),
        "bimodal": np.concatenate([normal[:700] - 1000, normal[700:] + 1]).astype(np.float32),
        "tight pair": np.concatenate([1 + normal[:700] * 1e-4, -1 + normal[700:] * 1e-5]).astype(np.float32),
        "clumps": clumps,
        "denormals": (rng.integers(-3000, 3000, 1500) * np.float64(1.4e-45)).astype(np.float32),
        "huge": (normal * np.float32(1e39 / 50)).astype(np.float32),
        "mostly zero": np.where(rng.random(1500) < 0.9, 0, normal).astype(np.float32),
        "int8 grid": rng.integers(-127, 128, 1500).astype(np.float32) * np.float32(0.01),
        "geometric": (2.0 ** -np.arange(100)).astype(np.float32),
        "narrow": (1 + np.arange(1000) * 2.0**-23).astype(np.float32),
    }


NASTY = nasty()


@pytest.mark.parametrize("k", [2, 3, 16, 64])
@pytest.mark.parametrize("name", list(NASTY))
def test_error_is_near_the_optimum_on_nasty_data(name: str, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partition, "EXACT_WORK", 0)  # the way of large tensors
    values = NASTY[name]
    found = kmeans1d(values, k)
    check(values, found, k)
    rounding = slack(values)
    assert found.error <= BOUND * optimum(values, k) + rounding


def test_near_rivals_among_few_points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partition, "EXACT_WORK", 0)
    rng = np.random.default_rng(5)
    for trial in range(60):
        shapes = (rng.standard_normal(400), rng.standard_t(2, 400), rng.laplace(size=400))
        values = shapes[trial % 3].astype(np.float32)
        k = [2, 3, 4, 8][trial % 4]
        assert kmeans1d(values, k).error <= BOUND * optimum(values, k), (trial, k)


@pytest.mark.parametrize("k", [2, 5, 16])
@pytest.mark.parametrize("name", list(NASTY))
def test_pinned_zero_is_near_its_own_optimum(name: str, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partition, "EXACT_WORK", 0)
    values = NASTY[name]
    found = kmeans1d(values, k, pinned_zero=True)
    check(values, found, k)
    assert (found.codebook == 0).sum() == 1
    rounding = slack(values)
    assert found.error <= BOUND * optimum(values, k, pinned=True) + rounding


@pytest.mark.parametrize("k", [2, 16, 64])
def test_large_float32_tensors_are_binned_without_loss(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, values in NASTY.items():
        many = np.tile(values, 3)
        by_sorting = kmeans1d(many, k).error
        with monkeypatch.context() as patch:
            patch.setattr(distinct, "SORT_LIMIT", 0)
            patch.setattr(distinct, "HEAVY", 64)
            patch.setattr(kmeans, "TABLE_FROM", 0)
            found = kmeans1d(many, k)
        check(many, found, k)
        rounding = slack(many)
        # 64 bins instead of the 1024 of real use: each keeps only 12 bits, hence the wider bound
        assert found.error <= 1.005 * by_sorting + rounding, name


def test_a_million_weights_reach_the_known_optimum_of_a_normal_density() -> None:
    values = np.random.default_rng(0).standard_normal(1 << 20).astype(np.float32)
    # Max, "Quantizing for minimum distortion", 1960, table I: mean squared error of the best 16-level quantizer
    assert kmeans1d(values, 16).error / values.size == pytest.approx(0.009497, rel=0.01)
    assert kmeans1d(values, 4).error / values.size == pytest.approx(0.1175, rel=0.01)


floats = st.floats(-1e4, 1e4, width=32)
FEW = st.sampled_from([-1.5, -0.0, 0.0, 1e-40, 0.1, 3.0, 1e30])


@settings(max_examples=150, deadline=None)
@given(hnp.arrays(np.float32, st.integers(1, 40), elements=floats), st.integers(1, 20), st.booleans(), st.booleans())
def test_small_tensors_are_exact(values: Array, k: int, pinned: bool, windows: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if windows:
            patch.setattr(partition, "EXACT_WORK", 0)
        found = kmeans1d(values, k, pinned_zero=pinned)
    check(values, found, k)
    rounding = slack(values)
    assert found.error <= (BOUND if windows else 1 + 1e-9) * optimum(values, k, pinned=pinned) + rounding
    if pinned:
        assert (found.codebook[found.codes[values == 0]] == 0).all()
        assert (found.codebook == 0).any()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60).flatmap(lambda n: st.tuples(
    hnp.arrays(np.float32, n, elements=st.floats(-8, 8, width=16)),
    hnp.arrays(np.float64, n, elements=st.sampled_from([0.0, 0.25, 1.0, 50.0])),
)), st.integers(1, 8), st.booleans())  # fmt: skip
def test_weights_are_minimized(both: tuple[Array, Array], k: int, pinned: bool) -> None:
    values, weights = both
    found = kmeans1d(values, k, weights=weights, pinned_zero=pinned)
    check(values, found, k)
    used = weights if weights.any() else np.ones_like(weights)
    x = values.astype(np.float64)
    assert found.error == pytest.approx(
        float((used * (x - found.codebook[found.codes]) ** 2).sum()), rel=1e-9, abs=1e-30
    )
    keep = used > 0
    assert found.error <= (1 + 1e-9) * optimum(values[keep], k, used[keep], pinned=pinned) + slack(values, used)


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.float32, st.integers(1, 60), elements=FEW),
    st.booleans(),
)
def test_few_distinct_values_are_kept_exactly(values: Array, pinned: bool) -> None:
    found = kmeans1d(values, 8, pinned_zero=pinned)
    assert found.error == 0.0
    np.testing.assert_array_equal(found.codebook[found.codes], values)
    if not pinned:
        assert len(found.codebook) == len(np.unique(values))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_floats_cluster_as_their_float32_values(dtype: Any) -> None:
    values = (np.random.default_rng(3).standard_normal(100_000) * 0.05).astype(dtype)
    found, same = kmeans1d(values, 16), kmeans1d(values.astype(np.float32), 16)
    np.testing.assert_allclose(found.codebook, same.codebook, rtol=1e-6)
    assert found.error == pytest.approx(same.error, rel=1e-6)


def test_same_input_same_bytes_and_order_does_not_matter() -> None:
    values = np.random.default_rng(1).standard_normal((300, 200)).astype(np.float32)
    one, two = kmeans1d(values, 16), kmeans1d(values.copy(), 16)
    assert one.codebook.tobytes() == two.codebook.tobytes()
    assert one.codes.tobytes() == two.codes.tobytes()
    turned = kmeans1d(values[::-1, ::-1], 16)
    assert one.codebook.tobytes() == turned.codebook.tobytes()
    np.testing.assert_array_equal(turned.codes[::-1, ::-1], one.codes)


def test_the_lookup_table_assigns_as_the_search_does() -> None:
    rng = np.random.default_rng(5)
    values = np.concatenate(
        [rng.standard_normal(4000), rng.standard_cauchy(4000) * 1e-3, [0.0, -0.0, 1e-45, -1e-45]]
    ).astype(np.float32)
    for k, pinned in itertools.product([1, 2, 16, 256], [False, True]):
        codebook = kmeans1d(values, k, pinned_zero=pinned).codebook
        threshold = (codebook[1:].astype(np.float64) + codebook[:-1]) / 2
        near = threshold.astype(np.float32)
        probe = np.concatenate(
            [values, codebook, near, np.nextafter(near, np.float32(9e9)), np.nextafter(near, np.float32(-9e9))]
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kmeans, "TABLE_FROM", 0)
            codes, _ = kmeans._assign(probe, codebook, None)
        np.testing.assert_array_equal(codes, np.searchsorted(threshold, probe.astype(np.float64)))


def test_degenerate_and_refused_input() -> None:
    assert kmeans1d(np.zeros((0, 3), np.float32), 4).codes.shape == (0, 3)
    assert kmeans1d(np.array(2.5, np.float32), 4).codebook.tolist() == [2.5]
    assert kmeans1d(np.full(9, 3, np.float32), 4, pinned_zero=True).codebook.tolist() == [0.0, 3.0]
    assert kmeans1d(np.array([1, 2, 3], np.float32), 1, pinned_zero=True).codebook.tolist() == [0.0]
    for bad in (np.nan, np.inf, -np.inf):
        for size, dtype in itertools.product((3, 100_000), (np.float32, np.float16, ml_dtypes.bfloat16)):
            values = np.ones(size, dtype)
            values[1] = bad
            with pytest.raises(ValueError, match="NaN or infinity"):
                kmeans1d(values, 4)
    with pytest.raises(ValueError, match="NaN or infinity"):
        kmeans1d(np.array([1.0, 1e300]), 4)
    with pytest.raises(ValueError, match="between 1 and 256"):
        kmeans1d(np.ones(3, np.float32), 257)
    with pytest.raises(ValueError, match="not negative"):
        kmeans1d(np.ones(3, np.float32), 2, weights=np.array([1.0, -1.0, 1.0]))
    with pytest.raises(ValueError, match="NaN or infinity"):
        kmeans_rows(np.array([[1.0, np.nan]], np.float32), 2)


@settings(max_examples=80, deadline=None)
@given(
    hnp.arrays(np.float32, st.tuples(st.integers(0, 5), st.integers(1, 30)), elements=st.one_of(floats, st.just(0.0))),
    st.integers(1, 20),
    st.booleans(),
)
def test_rows_are_each_as_good_as_alone(values: Array, k: int, pinned: bool) -> None:
    found = kmeans_rows(values, k, pinned_zero=pinned)
    assert found.codebook.shape == (len(values), k)
    assert found.codes.shape == values.shape
    for row in range(len(values)):
        codebook, codes = found.codebook[row], found.codes[row]
        assert (np.diff(codebook) >= 0).all()
        x = values[row].astype(np.float64)
        distance = np.abs(x[:, None] - codebook)
        np.testing.assert_array_equal(distance[np.arange(len(x)), codes], distance.min(1))
        rounding = slack(values[row])
        assert found.errors[row] <= (1 + 1e-9) * optimum(values[row], k, pinned=pinned) + rounding
        assert found.errors[row] == pytest.approx(float((distance.min(1) ** 2).sum()), rel=1e-9, abs=1e-300)
        if pinned:
            assert (codebook == 0).any()
            assert (codebook[codes[values[row] == 0]] == 0).all()


@pytest.mark.parametrize("pinned", [False, True])
def test_long_rows_of_different_kinds(pinned: bool) -> None:
    kinds = [np.resize(values, 1000) for values in NASTY.values()]
    values = np.stack(kinds).astype(np.float32)
    found = kmeans_rows(values, 16, pinned_zero=pinned)
    for row, name in enumerate(NASTY):
        rounding = slack(values[row])
        # rows among many get narrower windows
        assert found.errors[row] <= 1.005 * optimum(values[row], 16, pinned=pinned) + rounding, name
