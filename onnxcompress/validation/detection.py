"""Mean average precision of object detectors as COCO counts it: map (IoU 0.50 to 0.95), map50.

Labels: (n, boxes, 5), rows x1, y1, x2, y2, class in the units of the model's boxes, or (n, boxes, 4) of one class; rows
that fill up have class -1 or NaN. Outputs, found by their shapes:

- one of rows x1, y1, x2, y2, score, class: (n, k, 6);
- boxes (n, k, 4), scores (n, k), and classes (n, k) where one is called label or class;
- boxes (n, k, 4) and scores of all classes (n, k, classes), from which overlapping boxes are first removed. Label c is
  column c; a background column is one that no label names.

Labels without classes ask for boxes alone: then no class is looked at, and of scores of all classes the last counts.

A model of one image a call may leave out the first axis.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from onnxcompress.data.batch import Batch
from onnxcompress.errors import MetricError
from onnxcompress.validation.metric import BatchMetric
from onnxcompress.validation.samples import Columns, Floats, Samples
from onnxcompress.validation.values import Array, kind_of

MOST = 300  # detections and labeled boxes an image
_OVERLAP = 0.5  # of two raw boxes of one class, above which the lower score goes
_RAW = 400  # raw boxes of a class looked at
_RECALLS = np.linspace(0, 1, 101)


@dataclasses.dataclass(frozen=True)
class _Found:
    """Detections of one image, highest score first."""

    boxes: Floats
    scores: Floats
    classes: Array

    @classmethod
    def sorted(cls, boxes: Floats, scores: Floats, classes: Array) -> _Found:
        """The best `MOST`; what is not finite is none."""
        good = np.nonzero(np.isfinite(boxes).all(axis=1) & np.isfinite(scores))[0]
        order = good[np.argsort(-scores[good], kind="stable")][:MOST]
        return cls(boxes[order], scores[order], classes[order].astype(np.int64))


class MeanAveragePrecision(BatchMetric):
    """Mean over classes and IoU thresholds 0.50, 0.55, ..., 0.95 of the interpolated precision (Lin et al. 2014)."""

    name = "map"
    thresholds: tuple[float, ...] = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))

    def columns(self, outputs: Mapping[str, Any], batch: Batch) -> Columns:
        labels = self._labels(batch)
        images = self._images(outputs, batch.count, labels.shape[2] == 4)
        n = batch.count
        score, kind = np.full((n, MOST), np.nan, np.float32), np.full((n, MOST), -1, np.int32)
        match, truth = np.zeros((n, MOST), np.uint16), np.full((n, MOST), -1, np.int32)
        for row, found in enumerate(images):
            real = labels[row][np.isfinite(labels[row]).all(axis=1)]
            classes = real[:, 4].astype(np.int64) if real.shape[1] == 5 else np.zeros(len(real), np.int64)
            real, classes = real[classes >= 0], classes[classes >= 0]
            if len(real) > MOST:
                raise MetricError(
                    f"metric {self.name}: sample {batch.start + row} has {len(real)} boxes; at most {MOST}"
                )
            size = len(found.scores)
            score[row, :size], kind[row, :size], truth[row, : len(real)] = found.scores, found.classes, classes
            match[row, :size] = _matches(found, real[:, :4], classes, self.thresholds)
        return {"score": score, "class": kind, "match": match, "truth": truth}

    def finish(self, columns: Columns) -> Samples:
        if columns and not (columns["truth"] >= 0).any():
            raise MetricError(f"metric {self.name}: no label holds a box")
        count = len(self.thresholds)
        return Samples(columns, lambda given, weights: _mean_precision(given, weights, count))

    def _labels(self, batch: Batch) -> Floats:
        labels = self.labels(batch)
        if labels.ndim != 3 or labels.shape[2] not in (4, 5) or kind_of(labels) == "string":
            raise MetricError(
                f"metric {self.name} needs labels (samples, boxes, 5) of x1, y1, x2, y2, class; "
                f"these are {list(labels.shape)}"
            )
        return labels.astype(np.float64)

    def _images(self, outputs: Mapping[str, Any], n: int, unlabeled: bool) -> list[_Found]:
        arrays = {
            name: np.asarray(value)
            for name, value in outputs.items()
            if isinstance(value, np.ndarray) and kind_of(value) in ("float", "integer")
        }
        if self._wanted is not None:
            if self._wanted not in outputs:
                raise MetricError(f"--output {self._wanted}: the model has no such output, only {', '.join(outputs)}")
            arrays = {self._wanted: np.asarray(outputs[self._wanted])}
        rows = next((_batched(array, n, 3) for array in arrays.values() if array.shape[-1:] == (6,)), None)
        if rows is not None and len(arrays) == 1:
            given = rows.astype(np.float64)
            kinds = np.zeros(given.shape[:2]) if unlabeled else np.nan_to_num(given[:, :, 5], nan=-1)
            return [_Found.sorted(given[row, :, :4], given[row, :, 4], kinds[row]) for row in range(n)]
        return self._several(arrays, n, unlabeled)

    def _several(self, arrays: Mapping[str, Array], n: int, unlabeled: bool) -> list[_Found]:
        boxes = self._pick(arrays, n, lambda name, array: array.ndim == 3 and array.shape[2] == 4, "box", "boxes")
        rest = {name: array for name, array in arrays.items() if name != boxes[0]}
        k = boxes[1].shape[1]

        def scores_of(name: str, array: Array) -> bool:
            return kind_of(array) == "float" and array.shape[1:2] == (k,) and not _says(name, "label|class")

        scores = self._pick(rest, n, scores_of, "score|conf|prob", "scores", also=boxes[1].shape[:2])
        values, corners = scores[1].astype(np.float64), boxes[1].astype(np.float64)
        if values.ndim == 3 and values.shape[2] > 1:
            if unlabeled:
                values = values[:, :, -1:]
            return [_suppressed(corners[row], values[row]) for row in range(n)]
        values = values.reshape(n, k)
        named = [array for name, array in rest.items() if _says(name, "label|class") and array.size == n * k]
        classes = np.zeros((n, k)) if unlabeled or not named else np.nan_to_num(named[0].reshape(n, k), nan=-1)
        return [_Found.sorted(corners[row], values[row], classes[row]) for row in range(n)]

    def _pick(
        self, arrays: Mapping[str, Array], n: int, fits: Any, words: str, what: str, also: tuple[int, ...] | None = None
    ) -> tuple[str, Array]:
        ranks = (2, 3) if also is not None else (3,)
        found = []
        for name, array in arrays.items():
            for ndim in ranks:
                batched = _batched(array, n, ndim)
                if batched is not None and fits(name, batched) and (also is None or batched.shape[:2] == also):
                    found.append((not _says(name, words), name, batched))
        if not found:
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
            raise MetricError(
                f"metric {self.name} finds no {what} among the outputs {shapes}; wanted (n, k, 6), or boxes (n, k, 4) "
                "and scores (n, k) or (n, k, classes); write a metric of your own (--metric file.py:function)"
            )
        _, name, batched = min(found, key=lambda entry: entry[0])
        return name, batched


class MeanAveragePrecision50(MeanAveragePrecision):
    """Mean over the classes of the interpolated precision at IoU 0.5."""

    name = "map50"
    thresholds = (0.5,)


def _says(name: str, words: str) -> bool:
    return re.search(words, name.lower()) is not None


def _batched(array: Array, n: int, ndim: int) -> Array | None:
    """The array with its images along the first axis; None where it is of another form."""
    if array.ndim == ndim - 1 and n == 1:
        array = array[None]
    return array if array.ndim == ndim and len(array) == n else None


def overlaps(one: Floats, other: Floats) -> Floats:
    """Intersection over union (a, b) of boxes (a, 4) and (b, 4), corners."""
    low = np.maximum(one[:, None, :2], other[None, :, :2])
    high = np.minimum(one[:, None, 2:], other[None, :, 2:])
    shared = np.prod(np.maximum(high - low, 0), axis=2)
    areas = [np.prod(np.maximum(side[:, 2:] - side[:, :2], 0), axis=1) for side in (one, other)]
    union = areas[0][:, None] + areas[1][None, :] - shared
    return np.asarray(np.where(union > 0, shared / np.where(union > 0, union, 1), 0), np.float64)


def _suppressed(boxes: Floats, scores: Floats) -> _Found:
    """Raw boxes (k, 4) with scores (k, classes) as detections: of those that overlap only the best."""
    kept: list[tuple[Floats, Floats, Array]] = []
    for column in range(scores.shape[1]):
        order = np.argsort(-scores[:, column], kind="stable")[:_RAW]
        alike = overlaps(boxes[order], boxes[order]) > _OVERLAP
        alive = np.ones(len(order), bool)
        for at in range(len(order)):
            if alive[at]:
                alive[at + 1 :] &= ~alike[at, at + 1 :]
        order = order[alive]
        kept.append((boxes[order], scores[order, column], np.full(len(order), column)))
    return _Found.sorted(*(np.concatenate(part) for part in zip(*kept, strict=True)))


def _matches(found: _Found, truth: Floats, classes: Array, thresholds: tuple[float, ...]) -> Array:
    """Bits (k,), bit t set where a detection takes a labeled box at threshold t: each box once, best scores first."""
    bits = np.zeros(len(found.scores), np.uint16)
    if not len(truth) or not len(bits):
        return bits
    likeness = np.where(found.classes[:, None] == classes[None, :], overlaps(found.boxes, truth), -1.0)
    free = np.ones((len(thresholds), len(truth)), bool)
    limits, row = np.array(thresholds)[:, None], np.arange(len(thresholds))
    for at in np.nonzero(likeness.max(axis=1) >= thresholds[0])[0]:
        fit = np.where(free & (likeness[at][None, :] >= limits - 1e-12), likeness[at][None, :], -1.0)
        best = fit.argmax(axis=1)
        took = fit[row, best] >= 0
        free[row[took], best[took]] = False
        bits[at] = int((took * (1 << row)).sum())
    return bits


def _mean_precision(columns: Columns, weights: Floats, thresholds: int) -> Floats:
    """Mean average precision (b,) of images counting `weights` (b, n) times, interpolated at 101 recalls."""
    image, place = np.nonzero(np.isfinite(columns["score"]) & (columns["class"] >= 0))
    scores = columns["score"][image, place]
    classes, bits = columns["class"][image, place], columns["match"][image, place]
    sums, present = np.zeros(len(weights)), np.zeros(len(weights))
    for kind in np.unique(columns["truth"][columns["truth"] >= 0]):
        own = np.nonzero(classes == kind)[0]
        own = own[np.argsort(-scores[own], kind="stable")]
        right = (bits[own][None, :] >> np.arange(thresholds)[:, None]) & 1
        boxes = (columns["truth"] == kind).sum(axis=1)
        for row, counts in enumerate(weights):
            total = float(counts @ boxes)
            if total > 0:  # a class that a resample missed has no precision there
                present[row] += 1
                sums[row] += _precision(right, counts[image[own]], total)
    return np.asarray(sums / np.where(present > 0, present, np.nan), np.float64)


def _precision(right: Array, counts: Floats, total: float) -> float:
    """Mean over thresholds of the area under one class's curve. `right`: (thresholds, detections), by score."""
    if not right.shape[1]:
        return 0.0
    hits, seen = np.cumsum(right * counts, axis=1), np.cumsum(counts)
    precision = hits / np.where(seen > 0, seen, 1)
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    padded = np.concatenate([envelope, np.zeros((len(envelope), 1))], axis=1)
    found = [row[np.searchsorted(hit / total, _RECALLS)].mean() for row, hit in zip(padded, hits, strict=True)]
    return float(np.mean(found))
