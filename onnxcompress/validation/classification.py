"""Metrics of classifiers: accuracy, top5, f1 (macro), auc."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from onnxcompress.data.batch import Batch
from onnxcompress.errors import MetricError
from onnxcompress.validation import samples
from onnxcompress.validation.metric import BatchMetric, prefer_labels, prefer_scores
from onnxcompress.validation.samples import IGNORED, Columns, Samples
from onnxcompress.validation.values import Array, kind_of

_CLASSES = 1000  # counted a sample, where labels are one a position


class Accuracy(BatchMetric):
    """Share of samples whose predicted class is the label; labels a position (n, length) count a share a sample."""

    name = "accuracy"

    def __init__(self, output: str | None = None) -> None:
        super().__init__(output)
        self._threshold: float | None = None

    def columns(self, outputs: Mapping[str, Any], batch: Batch) -> Columns:
        name, array, keys = self.value(outputs, prefer_labels)
        labels = self.labels(batch)
        array = _rows(array, labels, name, self.name)
        if kind_of(array) == "float" and array.ndim == 1:
            labels = _whole(_single(labels), self.name)
            _in_range(labels, 2, name, batch, self.name)
            return {"raw": array, "label": labels}  # logit or probability: known when all are seen
        predicted = _predicted(array, keys)
        labels = _classes(labels, predicted, array, name, self.name)
        if keys is None and kind_of(array) == "float":
            _in_range(labels, array.shape[-1], name, batch, self.name)
        classes = array.shape[-1] if kind_of(array) == "float" and keys is None else None
        return {"predicted": predicted, "label": labels} if labels.ndim == 1 else self.fold(predicted, labels, classes)

    def fold(self, predicted: Array, labels: Array, classes: int | None) -> Columns:
        """Records (n,) or (n, classes) of predictions and labels (n, ...): an image's pixels are too many to keep."""
        counted, axes = labels != IGNORED, tuple(range(1, labels.ndim))
        return {"right": ((predicted == labels) & counted).sum(axis=axes), "counted": counted.sum(axis=axes)}

    def finish(self, columns: Columns) -> Samples:
        if "counted" in columns:
            return Samples(columns, samples.ratio_of("right", "counted"))
        settled = self._settle(columns)
        right = settled["predicted"] == settled["label"]
        return Samples({"right": right}, samples.mean_of("right"), proportion="right")

    def _settle(self, columns: Columns) -> Columns:
        """Turn single scores into classes: probabilities at 1/2, logits at 0, as the original's range tells."""
        if "raw" not in columns:
            return columns
        raw = columns["raw"]
        if self._threshold is None:
            self._threshold = 0.5 if ((raw >= 0) & (raw <= 1)).all() else 0.0
        predicted = np.where(np.isnan(raw), -1, raw > self._threshold)
        return {"predicted": predicted, "label": columns["label"]}


class F1(Accuracy):
    """Mean over the classes of the harmonic mean of precision and recall (macro F1)."""

    name = "f1"

    def fold(self, predicted: Array, labels: Array, classes: int | None) -> Columns:
        if classes is None or classes > _CLASSES:
            return {"predicted": predicted, "label": labels}
        counted, index = labels != IGNORED, np.arange(len(labels)).reshape(-1, *[1] * (labels.ndim - 1)) * (classes + 1)
        kinds = (labels[counted], predicted[counted], predicted[counted & (predicted == labels)])
        own = np.broadcast_to(index, labels.shape)
        rows = (own[counted], own[counted], own[counted & (predicted == labels)])
        sums = [
            np.bincount(row + np.where(kind < 0, classes, kind), minlength=len(labels) * (classes + 1))
            for row, kind in zip(rows, kinds, strict=True)
        ]
        true, found, right = (part.reshape(len(labels), classes + 1)[:, :classes] for part in sums)
        return {"right": right, "total": true + found}

    def finish(self, columns: Columns) -> Samples:
        if "total" in columns:
            return Samples(columns, samples.f1_of_counts)
        return Samples(self._settle(columns), samples.f1_macro)


class Top5(BatchMetric):
    """Share of samples whose label is among the five highest scores."""

    name = "top5"

    def columns(self, outputs: Mapping[str, Any], batch: Batch) -> Columns:
        name, array, keys = self.value(outputs, prefer_scores)
        labels = self.labels(batch)
        array = _rows(array, labels, name, self.name)
        if array.ndim != 2 or array.shape[1] < 6:
            raise MetricError(f"metric top5 needs scores of six classes or more; {name!r} is {list(array.shape)}")
        index = _score_columns(labels, array, keys, name, batch, self.name)
        own = np.take_along_axis(array, index[:, None], axis=1)
        # Equal scores are settled by position, as a stable sort would.
        before = (array > own) | ((array == own) & (np.arange(array.shape[1])[None, :] < index[:, None]))
        return {"right": (before.sum(axis=1) < 5) & ~np.isnan(array).any(axis=1)}

    def finish(self, columns: Columns) -> Samples:
        return Samples(columns, samples.mean_of("right"), proportion="right")


class Auc(BatchMetric):
    """Area under the ROC curve; with more than two classes the mean of each class against the rest."""

    name = "auc"

    def columns(self, outputs: Mapping[str, Any], batch: Batch) -> Columns:
        name, array, keys = self.value(outputs, prefer_scores)
        labels = self.labels(batch)
        array = _rows(array, labels, name, self.name)
        if array.ndim > 2:
            raise MetricError(f"metric auc needs one row of scores a sample; {name!r} is {list(array.shape)}")
        scores = np.where(np.isnan(array), -np.inf, array)
        if array.ndim == 1:
            labels = _whole(_single(labels), self.name)
            _in_range(labels, 2, name, batch, self.name)
            return {"score": scores, "label": labels}
        index = _score_columns(labels, array, keys, name, batch, self.name)
        if array.shape[1] == 2:
            # Logits rank by their difference; for probabilities that is the same order.
            scores = scores[:, 1].astype(np.float64) - scores[:, 0]
        return {"score": scores, "label": index}

    def finish(self, columns: Columns) -> Samples:
        found = Samples(columns, samples.auc)
        if found.n and len(np.unique(columns["label"])) < 2:
            raise MetricError("metric auc needs samples of two classes, but all labels are the same")
        return found


def _rows(array: Array, labels: Array, name: str, metric: str) -> Array:
    """One row a sample, axes of size one behind it dropped."""
    if array.ndim == 0:
        array = array.reshape(1)
    if len(array) != len(labels):
        raise MetricError(
            f"metric {metric}: output {name!r} has {len(array)} rows for {len(labels)} labels; name another with "
            "--output, or write a metric of your own (--metric file.py:function)"
        )
    if array.ndim >= 2 and labels.ndim <= 2 and (labels.ndim == 1 or labels.shape[1] == 1):
        keep = [size for size in array.shape[1:] if size != 1]
        if len(keep) <= 1:
            return array.reshape(len(array), *keep)
    return array


def _predicted(array: Array, keys: list[Any] | None) -> Array:
    """The classes that (n,) labels or (n, ..., classes) scores name; -1 where a score is NaN."""
    if kind_of(array) != "float":
        return array
    best: Array = array.argmax(axis=-1)
    spoilt = np.isnan(array).any(axis=-1)
    if keys is not None:
        named = np.array(keys, object if isinstance(keys[0], str) else None)[best]
        return np.where(spoilt, "" if isinstance(keys[0], str) else np.iinfo(np.int64).min, named)
    return np.where(spoilt, -1, best)


def _classes(labels: Array, predicted: Array, array: Array, name: str, metric: str) -> Array:
    """Labels in the shape and kind of the predictions; one-hot rows become classes."""
    labels = _single(labels)
    if labels.ndim == array.ndim == predicted.ndim + 1 and labels.shape == array.shape:
        labels = labels.argmax(axis=-1)
    if labels.shape != predicted.shape:
        raise MetricError(
            f"metric {metric}: labels of shape {list(labels.shape)} do not fit output {name!r} of shape "
            f"{list(array.shape)}"
        )
    if kind_of(predicted) == "string":
        return labels.astype(object)
    if kind_of(labels) == "string":
        raise MetricError(f"metric {metric}: the labels are strings, but output {name!r} holds {predicted.dtype}")
    return _whole(labels, metric)


def _single(labels: Array) -> Array:
    return labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels


def _whole(labels: Array, metric: str) -> Array:
    """Labels as int64."""
    if kind_of(labels) == "string":
        raise MetricError(f"metric {metric}: the labels are strings, but the output holds numbers")
    if labels.dtype.kind == "f" and not np.array_equal(labels, np.rint(labels)):
        raise MetricError(
            f"metric {metric} needs class labels, but the labels are real numbers such as {labels.flat[0]}"
        )
    return labels.astype(np.int64)


def _in_range(labels: Array, classes: int, name: str, batch: Batch, metric: str) -> None:
    wrong = (labels < 0) | (labels >= classes)
    if labels.ndim > 1:
        wrong &= labels != IGNORED
    if wrong.any():
        sample = int(np.argwhere(wrong)[0][0])
        raise MetricError(
            f"metric {metric}: label {labels[wrong].flat[0]} of sample {batch.start + sample} is not one of the "
            f"{classes} classes of output {name!r} (0 to {classes - 1})"
        )


def _score_columns(labels: Array, array: Array, keys: list[Any] | None, name: str, batch: Batch, metric: str) -> Array:
    """For each sample the column of its label's score."""
    labels = _single(labels)
    if labels.ndim == 2 and labels.shape == array.shape:
        labels = labels.argmax(axis=1)
    if labels.ndim != 1:
        raise MetricError(f"metric {metric}: labels of shape {list(labels.shape)} do not fit output {name!r}")
    if keys is None:
        labels = _whole(labels, metric)
        _in_range(labels, array.shape[1], name, batch, metric)
        return labels
    known = {key: at for at, key in enumerate(keys)}
    found = [known.get(label, -1) for label in labels.tolist()]
    if -1 in found:
        raise MetricError(f"metric {metric}: label {labels[found.index(-1)]!r} is not one of output {name!r}'s classes")
    return np.array(found, np.int64)
