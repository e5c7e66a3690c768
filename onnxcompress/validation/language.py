"""Perplexity of causal language models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from onnxcompress.data.batch import Batch
from onnxcompress.data.cast import is_integer
from onnxcompress.errors import MetricError
from onnxcompress.validation import samples
from onnxcompress.validation.metric import BatchMetric, prefer_tokens
from onnxcompress.validation.samples import IGNORED, Columns, Samples
from onnxcompress.validation.values import Array, is_distribution, log_probabilities


class Perplexity(BatchMetric):
    """exp(mean negative log likelihood a token).

    Without labels the target of a position is the next token of `input_ids`. Labels (n, length) are the targets of
    their own positions; labels that repeat the input ids are shifted by one, as training code does. Positions with
    target -100, and padding (attention mask 0), count for nothing.
    """

    name = "perplexity"
    higher_is_better: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False

    def __init__(self, output: str | None = None) -> None:
        super().__init__(output)
        self._distribution: bool | None = None

    def columns(self, outputs: Mapping[str, Any], batch: Batch) -> Columns:
        name, scores, _ = self.value(outputs, prefer_tokens)
        if scores.ndim != 3:
            raise MetricError(f"metric perplexity needs (samples, positions, tokens); {name!r} is {list(scores.shape)}")
        targets, counted = self._targets(batch, scores, name)
        if self._distribution is None:
            self._distribution = is_distribution(scores[0])
        wrong = counted & ((targets < 0) | (targets >= scores.shape[2]))
        if wrong.any():
            sample = batch.start + int(np.argwhere(wrong)[0][0])
            raise MetricError(
                f"metric perplexity: target {targets[wrong][0]} of sample {sample} "
                f"is not one of the {scores.shape[2]} tokens of output {name!r}"
            )
        loss, tokens = np.zeros(batch.count), counted.sum(axis=1)
        for row in range(batch.count):  # one sample at a time: a vocabulary in float64 is large
            chosen = np.nonzero(counted[row])[0]
            logs = log_probabilities(scores[row, chosen], self._distribution) if len(chosen) else np.zeros((0, 1))
            loss[row] = -logs[np.arange(len(chosen)), targets[row, chosen]].sum() if len(chosen) else 0.0
        return {"loss": loss, "tokens": tokens}

    def finish(self, columns: Columns) -> Samples:
        reduce = samples.ratio_of("loss", "tokens", lambda mean: np.asarray(np.exp(mean), np.float64))
        return Samples(columns, reduce, self.higher_is_better)

    def _targets(self, batch: Batch, scores: Array, name: str) -> tuple[Array, Array]:
        """Targets (n, length) and which of them count."""
        n, length = batch.count, scores.shape[1]
        ids = _token_ids(batch, n, length)
        real = _real(batch, n, length)
        labels = None if batch.labels is None else np.asarray(batch.labels)
        if labels is not None and labels.ndim == 2 and labels.shape[1] >= length:
            labels = labels[:, :length].astype(np.int64)
            told = labels != IGNORED
            if ids is None or not np.array_equal(labels[told], ids[told]):
                return labels, told & real
            targets, told = _next(labels), _next(told.astype(np.int64)) == 1
            return targets, told & real & _shifted(real)
        if labels is not None:
            raise MetricError(
                f"metric perplexity: labels of shape {list(labels.shape)} do not fit output {name!r} of shape "
                f"{list(scores.shape)}"
            )
        if ids is None:
            raise MetricError("metric perplexity needs labels, or an integer input `input_ids` to take targets from")
        return _next(ids), real & _shifted(real)


def _token_ids(batch: Batch, n: int, length: int) -> Array | None:
    fitting = {
        name: array[:n]
        for name, array in batch.feeds.items()
        if array.ndim == 2 and is_integer(array.dtype) and len(array) >= n and array.shape[1] == length
    }
    if "input_ids" in fitting:
        return fitting["input_ids"].astype(np.int64)
    plain = [name for name in fitting if not any(word in name.lower() for word in ("mask", "type", "position"))]
    return fitting[plain[0]].astype(np.int64) if len(plain) == 1 else None


def _real(batch: Batch, n: int, length: int) -> Array:
    for name, array in batch.feeds.items():
        if "attention_mask" in name.lower() and array.ndim == 2 and array.shape[1] == length:
            return np.asarray(array[:n] != 0)
    for valid in (batch.valid or {}).values():
        if valid.shape[1] == length:
            return valid[:n]
    return np.ones((n, length), bool)


def _next(values: Array) -> Array:
    """Each row shifted left by one; the last position has no next."""
    return np.concatenate([values[:, 1:], np.zeros_like(values[:, :1])], axis=1)


def _shifted(real: Array) -> Array:
    """Positions whose next one exists and is real."""
    return np.concatenate([real[:, 1:], np.zeros((len(real), 1), bool)], axis=1)
