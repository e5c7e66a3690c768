"""Per-sample records of an evaluation, and how they reduce to one score."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from onnxcompress.data.batch import Data
from onnxcompress.errors import MetricError

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Outputs = Mapping[str, Any]
Columns = Mapping[str, Array]
RunModel = Callable[[Mapping[str, Any]], Outputs]
Reduce = Callable[[Columns, Floats], Floats]
"""Columns of n rows, and weights (b, n): how often each sample counts in each of b resamples -> b scores."""


@dataclasses.dataclass(frozen=True)
class Samples:
    """What an evaluation found, one row a sample.

    `columns`: name -> array (n, ...), numbers or booleans. `reduce`: columns and weights (b, n) -> b scores; all ones
    give the score itself, counts of a resample give the score of that resample. `proportion`: the boolean column whose
    mean is the score; then the bound on the drop is exact pair counting (Tango) and not a bootstrap. `single`: the
    score is one number without samples, so there is no bound.
    """

    columns: Columns
    reduce: Reduce
    higher_is_better: bool = True
    proportion: str | None = None
    single: bool = False

    @property
    def n(self) -> int:
        """How many samples."""
        return min((len(column) for column in self.columns.values()), default=0)

    def score(self) -> float:
        """The score over all samples; NaN when it is not defined (no samples, only one class)."""
        if not self.n:
            return float("nan")
        with np.errstate(all="ignore"):
            return float(self.reduce(self.columns, np.ones((1, self.n)))[0])

    @classmethod
    def of(cls, scores: Sequence[float] | Array, *, higher_is_better: bool = True) -> Samples:
        """One score a sample, (n,) or (n, ...) averaged over the rest; the score is their mean. Booleans: a share."""
        array = np.asarray(scores)
        if array.ndim == 0 or array.dtype.kind not in "biuf":
            raise MetricError(f"per-sample scores: wanted numbers, one a sample, got {array.dtype}{list(array.shape)}")
        if array.ndim > 1:
            array = array.reshape(len(array), -1).astype(np.float64).mean(axis=1)
        proportion = "score" if array.dtype.kind == "b" else None
        return cls({"score": array}, mean_of("score"), higher_is_better, proportion)

    @classmethod
    def number(cls, score: float, *, higher_is_better: bool = True) -> Samples:
        """One number for the whole data."""
        return cls({"score": np.array([score], np.float64)}, mean_of("score"), higher_is_better, single=True)

    @classmethod
    def function(
        cls, columns: Columns, function: Callable[[Columns], float], *, higher_is_better: bool = True
    ) -> Samples:
        """Any function of the columns that does not depend on the order of the samples."""

        def reduce(given: Columns, weights: Floats) -> Floats:
            scores = np.empty(len(weights))
            for row, counts in enumerate(weights):
                chosen = np.repeat(np.arange(len(counts)), counts.astype(np.int64))
                scores[row] = function({name: column[chosen] for name, column in given.items()})
            return scores

        return cls(columns, reduce, higher_is_better)


class Evaluator(Protocol):
    """Owns the calls of one evaluation: `run` is one model, `data` yields batches; called once for each model."""

    def __call__(self, run: RunModel, data: Data) -> Samples: ...


def mean_of(name: str) -> Reduce:
    """The mean of a column."""

    def reduce(columns: Columns, weights: Floats) -> Floats:
        found: Floats = weights @ columns[name].astype(np.float64) / weights.sum(axis=1)
        return found

    return reduce


def ratio_of(numerator: str, denominator: str, then: Callable[[Floats], Floats] | None = None) -> Reduce:
    """The sum of a column over the sum of another, and a function of it (exp for perplexity)."""

    def reduce(columns: Columns, weights: Floats) -> Floats:
        top = weights @ columns[numerator].astype(np.float64)
        found: Floats = top / (weights @ columns[denominator].astype(np.float64))
        return found if then is None else then(found)

    return reduce


def pearson(columns: Columns, weights: Floats) -> Floats:
    """Correlation of the columns `score` and `label`."""
    return _correlation(_repeat(columns["score"], weights), _repeat(columns["label"], weights), weights)


def spearman(columns: Columns, weights: Floats) -> Floats:
    """Rank correlation of the columns `score` and `label`, ties at their middle rank (Spearman 1904)."""
    return _correlation(ranks(columns["score"], weights), ranks(columns["label"], weights), weights)


def ranks(values: Array, weights: Floats) -> Floats:
    """Ranks (b, n) of `values` (n,) in b resamples, each value counting `weights` times, ties at their middle."""
    _, inverse = np.unique(values.astype(np.float64), return_inverse=True)
    groups = int(inverse.max()) + 1
    sums = _grouped(inverse, groups, weights)
    middle = np.cumsum(sums, axis=1) - (sums - 1) / 2
    found: Floats = middle[:, inverse]
    return found


def auc(columns: Columns, weights: Floats) -> Floats:
    """Area under the ROC curve by the Mann-Whitney statistic; several score columns: mean of one class against rest."""
    scores, labels = columns["score"], columns["label"]
    if scores.ndim == 1:
        return _auc(scores, labels == 1, weights)
    present = np.unique(labels)
    found = np.stack([_auc(scores[:, int(c)], labels == c, weights) for c in present])
    # A class that a resample missed has no curve there.
    return np.asarray(np.nanmean(found, axis=0), np.float64)


def f1_macro(columns: Columns, weights: Floats) -> Floats:
    """Mean over the classes of 2 tp / (2 tp + fp + fn); classes neither predicted nor present are left out."""
    predicted, labels = columns["predicted"].reshape(-1), columns["label"].reshape(-1)
    repeat = len(predicted) // max(1, len(columns["label"]))
    weights = np.repeat(weights, repeat, axis=1) if repeat != 1 else weights
    seen = (labels != IGNORED) if labels.dtype.kind in "iu" else np.ones(len(labels), bool)
    predicted, labels, weights = predicted[seen], labels[seen], weights[:, seen]
    _, inverse = np.unique(np.concatenate([predicted, labels]), return_inverse=True)
    groups = int(inverse.max()) + 1 if len(inverse) else 0
    own, true = inverse[: len(predicted)], inverse[len(predicted) :]
    right = _grouped(true, groups, weights * (own == true))
    total = _grouped(own, groups, weights) + _grouped(true, groups, weights)
    share = np.where(total > 0, 2 * right / np.where(total > 0, total, 1), np.nan)
    return np.asarray(np.nanmean(share, axis=1), np.float64)


def f1_of_counts(columns: Columns, weights: Floats) -> Floats:
    """`f1_macro` of counts (n, classes) a sample: `right` predictions, and `total` = predicted + present."""
    right, total = (weights @ columns[name].astype(np.float64) for name in ("right", "total"))
    share = np.where(total > 0, 2 * right / np.where(total > 0, total, 1), np.nan)
    return np.asarray(np.nanmean(share, axis=1), np.float64)


def r2(columns: Columns, weights: Floats) -> Floats:
    """1 - sum of squared errors / sum of squares about the mean label, averaged over the label's columns."""
    errors, labels = columns["squared"], columns["label"].astype(np.float64)
    labels = labels - labels.mean(axis=0)  # the difference of large sums would lose digits
    total = weights.sum(axis=1)[:, None]
    about = weights @ (labels * labels) - (weights @ labels) ** 2 / total
    found: Floats = (1 - (weights @ errors) / about).mean(axis=1)
    return found


IGNORED = -100  # the label of positions that count for nothing, as PyTorch's cross entropy has it


def _repeat(values: Array, weights: Floats) -> Floats:
    return np.broadcast_to(values.astype(np.float64), weights.shape)


def _correlation(x: Floats, y: Floats, weights: Floats) -> Floats:
    total = weights.sum(axis=1, keepdims=True)
    x = x - (weights * x).sum(axis=1, keepdims=True) / total
    y = y - (weights * y).sum(axis=1, keepdims=True) / total
    top = (weights * x * y).sum(axis=1)
    found: Floats = top / np.sqrt((weights * x * x).sum(axis=1) * (weights * y * y).sum(axis=1))
    return found


def _auc(scores: Array, positive: Array, weights: Floats) -> Floats:
    ones = weights * positive
    count, rest = ones.sum(axis=1), (weights * ~positive).sum(axis=1)
    found: Floats = ((ones * ranks(scores, weights)).sum(axis=1) - count * (count + 1) / 2) / (count * rest)
    return found


def _grouped(group: Array, groups: int, weights: Floats) -> Floats:
    """Sums (b, groups) of weights (b, n) by group."""
    offsets = np.arange(len(weights))[:, None] * groups + group[None, :]
    sums = np.bincount(offsets.reshape(-1), weights.reshape(-1), minlength=len(weights) * groups)
    return np.asarray(sums.reshape(len(weights), groups), np.float64)
