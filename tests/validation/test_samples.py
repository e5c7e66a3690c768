"""Reductions: against textbook formulas, and weights that count samples against samples that are repeated."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from onnxcompress.errors import MetricError
from onnxcompress.validation import samples
from onnxcompress.validation.samples import Columns, Samples

GENERATOR = np.random.default_rng(0)
N = 80
SCORE = np.round(GENERATOR.standard_normal(N), 1)  # with ties
REAL: Columns = {"score": SCORE, "label": np.round(SCORE + GENERATOR.standard_normal(N), 1)}
BINARY: Columns = {"score": SCORE, "label": (SCORE + GENERATOR.standard_normal(N) > 0).astype(np.int64)}
CLASSES: Columns = {"predicted": GENERATOR.integers(0, 3, N), "label": GENERATOR.integers(0, 4, N)}
SCORES: Columns = {"score": GENERATOR.standard_normal((N, 3)), "label": GENERATOR.integers(0, 3, N)}
R2: Columns = {"squared": GENERATOR.random((N, 2)), "label": GENERATOR.standard_normal((N, 2)) * 3 + 50}
TOKENS: Columns = {"loss": GENERATOR.random(N) * 9, "tokens": GENERATOR.integers(1, 9, N)}


def perplexity(columns: Columns, weights: samples.Floats) -> samples.Floats:
    return samples.ratio_of("loss", "tokens", lambda mean: np.asarray(np.exp(mean), np.float64))(columns, weights)


def middle_ranks(values: samples.Array) -> list[float]:
    return [sum(v < w for v in values) + (sum(v == w for v in values) + 1) / 2 for w in values]


def one(reduce: samples.Reduce, columns: Columns) -> float:
    return Samples(columns, reduce).score()


def test_spearman_and_pearson() -> None:
    assert one(samples.pearson, REAL) == pytest.approx(np.corrcoef(REAL["score"], REAL["label"])[0, 1])
    expected = np.corrcoef(middle_ranks(REAL["score"]), middle_ranks(REAL["label"]))[0, 1]
    assert one(samples.spearman, REAL) == pytest.approx(expected)


def test_auc_counts_pairs() -> None:
    positive, negative = SCORE[BINARY["label"] == 1], SCORE[BINARY["label"] == 0]
    pairs = [(p > q) + 0.5 * (p == q) for p in positive for q in negative]
    assert one(samples.auc, BINARY) == pytest.approx(np.mean(pairs))


def test_f1_macro() -> None:
    expected = []
    for kind in range(4):
        own, true = CLASSES["predicted"] == kind, CLASSES["label"] == kind
        expected.append(2 * (own & true).sum() / (own.sum() + true.sum()))
    assert one(samples.f1_macro, CLASSES) == pytest.approx(np.mean(expected))


def test_r2_and_perplexity() -> None:
    about = ((R2["label"] - R2["label"].mean(axis=0)) ** 2).sum(axis=0)
    assert one(samples.r2, R2) == pytest.approx((1 - R2["squared"].sum(axis=0) / about).mean())
    assert one(perplexity, TOKENS) == pytest.approx(math.exp(TOKENS["loss"].sum() / TOKENS["tokens"].sum()))


@pytest.mark.parametrize(
    ("reduce", "columns"),
    [
        (samples.pearson, REAL),
        (samples.spearman, REAL),
        (samples.auc, BINARY),
        (samples.auc, SCORES),
        (samples.f1_macro, CLASSES),
        (samples.r2, R2),
        (perplexity, TOKENS),
        (samples.mean_of("score"), REAL),
    ],
)
def test_a_weight_is_a_repetition(reduce: Callable[..., samples.Floats], columns: Columns) -> None:
    generator = np.random.default_rng(9)
    weights = generator.integers(0, 4, (5, N)).astype(np.float64)
    found = reduce(columns, weights)
    for row, counts in enumerate(weights.astype(int)):
        repeated = {name: np.repeat(column, counts, axis=0) for name, column in columns.items()}
        assert found[row] == pytest.approx(one(reduce, repeated), rel=1e-9)


def test_makers() -> None:
    mean = Samples.of([0.5, 1.0, 0.0])
    assert (mean.score(), mean.n, mean.proportion) == (0.5, 3, None)
    assert Samples.of(np.array([True, False, True, True])).proportion == "score"
    assert Samples.of(np.array([[1.0, 3.0], [5.0, 7.0]])).score() == 4.0
    assert Samples.number(0.75).single
    median = Samples.function({"score": np.arange(9.0)}, lambda columns: float(np.median(columns["score"])))
    assert median.score() == 4.0
    assert median.reduce(median.columns, np.eye(9)[[8]])[0] == 8.0
    assert math.isnan(Samples.of(np.zeros(0)).score())
    with pytest.raises(MetricError, match="wanted numbers"):
        Samples.of(np.array(["a"]))
