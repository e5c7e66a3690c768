"""Many rows at once against the best partition of each, on the data of real layers and on data that misleads."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from onnxcompress.numerics import distinct, kmeans
from onnxcompress.numerics.kmeans import kmeans1d, kmeans_rows
from onnxcompress.numerics.partition import Points, exact

Array = npt.NDArray[Any]


def optima(values: Array, k: int, *, pinned: bool = False) -> Array:
    """Least squared error of each row, by the dynamic program over all pairs of its distinct values."""
    errors = []
    for row in values:
        x, count = np.unique(row.astype(np.float64) + 0.0, return_counts=True)
        weight = count.astype(np.float64)
        if pinned and not (x == 0).any():
            at = int(np.searchsorted(x, 0.0))
            x, weight = np.insert(x, at, 0.0), np.insert(weight, at, 0.0)
        if len(x) <= k:
            errors.append(0.0)
            continue
        points = Points.build(x[None], weight[None], np.array([len(x)]), pinned)
        errors.append(float(points.error(exact(points, k))[0]))
    return np.array(errors)


def layer(kind: str, rows: int, length: int) -> Array:
    rng = np.random.default_rng([ord(kind[0]), length])
    draws = {
        "normal": rng.standard_normal((rows, length)),
        "laplace": rng.laplace(size=(rows, length)),
        "student": rng.standard_t(3, (rows, length)),
    }
    return (draws[kind] * 0.05).astype(np.float32)


@pytest.mark.parametrize("k", [2, 4, 8, 16])
@pytest.mark.parametrize(("kind", "length"), [("normal", 72), ("laplace", 144), ("student", 288), ("normal", 400)])
def test_rows_come_near_their_optimum(kind: str, length: int, k: int) -> None:
    values = layer(kind, 40, length)
    found, best = kmeans_rows(values, k).errors, optima(values, k)
    assert found.sum() <= 1.002 * best.sum()
    assert (found <= 1.02 * best).all()
    assert (found >= best * (1 - 1e-6)).all()


def test_short_rows_are_optimal() -> None:
    values = layer("student", 500, 27)
    for k in (2, 4, 8, 16):
        np.testing.assert_allclose(kmeans_rows(values, k).errors, optima(values, k), rtol=1e-6)


def test_a_cluster_over_two_distant_clumps_is_divided() -> None:
    rng = np.random.default_rng(7)
    # 40 clumps far apart, 64 levels: whatever starts out of balance leaves two clumps in one interval
    values = (rng.integers(0, 40, (20, 400)) ** 2 + rng.standard_normal((20, 400)) * 1e-3).astype(np.float32)
    found, best = kmeans_rows(values, 64).errors, optima(values, 64)
    assert (found <= 1.05 * best).all()


def test_many_levels_for_few_values() -> None:
    values = layer("normal", 4, 500)
    found, best = kmeans_rows(values, 200).errors, optima(values, 200)
    assert found.sum() <= 1.02 * best.sum()


@pytest.mark.parametrize(("length", "sparsity"), [(300, 0.5), (420, 0.8), (900, 0.5)])
def test_pruned_rows_keep_their_zeros(length: int, sparsity: float) -> None:
    values = layer("normal", 24, length)
    values[np.abs(values) < np.quantile(np.abs(values), sparsity)] = 0
    for k in (4, 16):
        found = kmeans_rows(values, k, pinned_zero=True)
        best = optima(values, k, pinned=True)
        assert found.errors.sum() <= 1.002 * best.sum()
        assert (found.errors <= 1.02 * best).all()
        decoded = np.take_along_axis(found.codebook, found.codes.astype(np.int64), axis=1)
        assert (decoded[values == 0] == 0).all()


def test_rows_that_fall_apart_are_given_to_the_careful_search() -> None:
    rng = np.random.default_rng(3)
    scales, places = 10.0 ** rng.uniform(-3, 1, (12, 4, 1)), rng.uniform(-20, 20, (12, 4, 1))
    values = (rng.standard_normal((12, 4, 120)) * scales + places).reshape(12, -1).astype(np.float32)
    for k in (4, 8, 16):
        found, best = kmeans_rows(values, k).errors, optima(values, k)
        assert (found <= 1.02 * best).all(), (k, found / best)


def test_long_rows_of_cells_are_as_good_as_every_value() -> None:
    rng = np.random.default_rng(3)
    length = 20_000
    gap = np.concatenate([rng.standard_normal(length // 2) - 50, rng.laplace(size=length // 2)])
    outliers = np.append(rng.standard_normal(length - 2) * 0.05, [7.9, -30.0])
    values = np.stack([gap, outliers, rng.standard_t(3, length), rng.standard_normal(length)]).astype(np.float32)
    for k in (2, 16, 64):
        found = kmeans_rows(values, k).errors
        alone = np.array([kmeans1d(row, k).error for row in values])
        assert (found <= 1.003 * alone).all(), (k, found / alone)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    values = layer("student", 300, 200)
    together = kmeans_rows(values, 16)
    for row in (0, 1, 255, 256, 299):
        alone = kmeans_rows(values[row : row + 1], 16)
        assert alone.codebook[0].tobytes() == together.codebook[row].tobytes()
        assert alone.codes[0].tobytes() == together.codes[row].tobytes()


def test_rows_of_every_kind_side_by_side() -> None:
    rng = np.random.default_rng(1)
    length = 200
    values = np.stack([
        np.zeros(length),
        np.full(length, -3.0),
        rng.integers(0, 16, length),  # as many values as levels
        rng.integers(0, 17, length),
        np.where(rng.random(length) < 0.9, 0, rng.standard_normal(length)),
        rng.standard_normal(length) * 1e30,
        rng.integers(-99, 99, length) * 1.4e-45,
        1 + np.arange(length) * 2.0**-23,
        np.append(rng.standard_normal(length - 1), 1e6),
    ]).astype(np.float32)  # fmt: skip
    found, best = kmeans_rows(values, 16), optima(values, 16)
    slack = 1e-6 * best + length * (np.abs(values).max(axis=1).astype(np.float64) * 2.0**-24) ** 2
    assert (found.errors <= 1.02 * best + slack).all(), found.errors / best
    assert (found.errors[:3] == 0).all()
    assert (np.diff(found.codebook, axis=1) >= 0).all()


@pytest.mark.parametrize("k", [3, 16, 64, 256])
def test_merged_runs_cost_nothing(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(11)
    size = distinct.MERGE_FROM + 12_345
    clumps = rng.integers(0, 40, size) ** 2 + rng.standard_normal(size) * 1e-3
    apart = np.concatenate(
        [rng.standard_normal(size // 3) * scale + at for scale, at in ((1, 0), (0.01, 90), (9, -70))]
    )
    outlier = np.append(rng.standard_normal(size) * 0.05, [1e4, -3e4])
    for values in (clumps, apart, np.resize(apart, 2 * size), outlier, rng.standard_cauchy(size)):
        x = values.astype(np.float32)
        assert len(x) >= 0.99 * distinct.MERGE_FROM
        merged = kmeans1d(x, k).error
        with monkeypatch.context() as patch:
            patch.setattr(distinct, "MERGE_FROM", len(x) + 1)
            every = kmeans1d(x, k).error
        assert merged <= 1.001 * every


def test_counting_thresholds_assigns_as_the_binary_search_does(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.round(layer("normal", 50, 90), 2)  # ties between entries, rows with fewer values than levels
    for k in (1, 2, 7, 16, 32):
        counted = kmeans_rows(values, k)
        with monkeypatch.context() as patch:
            patch.setattr(kmeans, "COUNT_TO", 0)
            searched = kmeans_rows(values, k)
        np.testing.assert_array_equal(counted.codes, searched.codes)
        np.testing.assert_array_equal(counted.errors, searched.errors)
