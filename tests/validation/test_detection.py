"""Mean average precision against pycocotools' values and against cases counted by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from onnxcompress.data.batch import Batch
from onnxcompress.errors import MetricError
from onnxcompress.validation.detection import overlaps
from onnxcompress.validation.metric import BatchMetric
from onnxcompress.validation.metrics import metric_named
from onnxcompress.validation.samples import Samples

Array = npt.NDArray[Any]


def evaluate(name: str, outputs: dict[str, Any], labels: Array, output: str | None = None) -> Samples:
    _, metric = metric_named(name, output)
    assert isinstance(metric, BatchMetric)
    return metric.finish(metric.columns(outputs, Batch({}, labels, None, len(labels), 0)))


def made(images: int = 12, seed: int = 0) -> tuple[Array, Array]:
    """Labels (images, 9, 5) of three classes and detections (images, 30, 6) around them, some of them wrong."""
    generator = np.random.default_rng(seed)
    labels, found = np.full((images, 9, 5), -1.0), np.zeros((images, 30, 6), np.float32)
    for row in range(images):
        count = int(generator.integers(1, 10))
        corner, size = generator.uniform(0, 80, (count, 2)), generator.uniform(5, 20, (count, 2))
        boxes = np.concatenate([corner, corner + size], axis=1)
        classes = generator.integers(0, 3, count)
        labels[row, :count] = np.concatenate([boxes, classes[:, None]], axis=1)
        own = generator.integers(0, count, 30)
        near = boxes[own] + generator.normal(0, 1.2, (30, 4))
        kinds = np.where(generator.random(30) < 0.8, classes[own], generator.integers(0, 3, 30))
        found[row] = np.concatenate([near, generator.random((30, 1)), kinds[:, None]], axis=1)
    return labels, found


def test_as_coco_counts() -> None:
    labels, found = made()
    # stats[0] and stats[1] of pycocotools 2.0.11, COCOeval(iouType="bbox").
    assert evaluate("map", {"rows": found}, labels).score() == pytest.approx(0.27905497, abs=1e-6)
    assert evaluate("map50", {"rows": found}, labels).score() == pytest.approx(0.5466197, abs=1e-6)


def test_a_resample_counts_images_as_often_as_it_drew_them() -> None:
    labels, found = made()
    whole = evaluate("map", {"rows": found}, labels)
    drawn = [0, 0, 3, 5, 5, 5, 11]
    again = evaluate("map", {"rows": found[drawn]}, labels[drawn])
    counts = np.bincount(drawn, minlength=12).astype(np.float64)[None]
    assert whole.reduce(whole.columns, counts)[0] == pytest.approx(again.score(), abs=1e-3)  # the order of ties differs


def test_perfect_and_missing_boxes() -> None:
    labels = np.array([[[0, 0, 10, 10, 1], [20, 20, 30, 30, 2]], [[5, 5, 9, 9, 1], [-1, -1, -1, -1, -1]]], np.float64)
    rows = np.zeros((2, 2, 6), np.float32)
    rows[:, :, :4], rows[:, :, 4], rows[:, :, 5] = labels[:, :, :4], 0.9, labels[:, :, 4]
    assert evaluate("map", {"o": rows}, labels).score() == 1.0
    # One of two boxes of class 1 found: precision 1 up to recall 1/2, so at 51 of 101 recalls.
    rows[1, 0, 4] = np.nan
    assert evaluate("map50", {"o": rows}, labels).score() == pytest.approx((51 / 101 + 1) / 2)


def test_outputs_of_every_form_agree() -> None:
    labels, found = made(6, seed=4)
    expected = evaluate("map", {"rows": found}, labels).score()
    boxes, scores, kinds = found[:, :, :4], found[:, :, 4], found[:, :, 5].astype(np.int64)
    forms = {"boxes": boxes, "labels": kinds, "scores": scores}
    assert evaluate("map", forms, labels).score() == pytest.approx(expected, abs=1e-12)
    one = {"boxes": boxes[0], "labels": kinds[0], "scores": scores[0]}
    alone = evaluate("map", {"rows": found[:1]}, labels[:1]).score()
    assert evaluate("map", one, labels[:1]).score() == pytest.approx(alone, abs=1e-12)
    # Raw scores of all classes, one box an object and a copy of it with a lower score, which goes.
    raw_boxes = np.repeat(np.maximum(labels[:, :, :4], 0), 2, axis=1).astype(np.float32)
    raw = np.zeros((6, 18, 4), np.float32)
    classes = np.repeat(labels[:, :, 4].astype(int), 2, axis=1)
    np.put_along_axis(raw, np.maximum(classes, 0)[:, :, None], 0.9 - 0.3 * (np.arange(18) % 2)[None, :, None], axis=2)
    raw[classes < 0] = 0
    assert evaluate("map50", {"scores": raw, "boxes": raw_boxes}, labels).score() > 0.9
    bare = evaluate("map50", {"scores": raw[:, :, :2].max(axis=2, keepdims=True), "boxes": raw_boxes}, labels[:, :, :4])
    assert 0 < bare.score() <= 1


def test_overlaps() -> None:
    one, other = np.array([[0.0, 0, 2, 2]]), np.array([[1.0, 1, 3, 3], [0, 0, 2, 2], [5, 5, 6, 6], [0, 0, 0, 0]])
    assert overlaps(one, other)[0].tolist() == pytest.approx([1 / 7, 1, 0, 0])


def test_what_does_not_fit() -> None:
    labels, found = made(2)
    with pytest.raises(MetricError, match=r"needs labels \(samples, boxes, 5\)"):
        evaluate("map", {"rows": found}, labels[:, :, 0])
    with pytest.raises(MetricError, match="finds no boxes among the outputs logits"):
        evaluate("map", {"logits": found[:, :, 0]}, labels)
    with pytest.raises(MetricError, match="no label holds a box"):
        evaluate("map", {"rows": found}, np.full((2, 3, 5), -1.0))
