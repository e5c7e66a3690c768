"""The built-in metrics on outputs of every form, and users' own."""

from __future__ import annotations

import math
import pathlib
from typing import Any

import numpy as np
import pytest

from onnxcompress.data.batch import Batch
from onnxcompress.errors import MetricError
from onnxcompress.validation.metric import BatchMetric
from onnxcompress.validation.metrics import METRICS, metric_named
from onnxcompress.validation.samples import Samples


def batch(labels: Any, feeds: dict[str, Any] | None = None, count: int | None = None) -> Batch:
    array = None if labels is None else np.asarray(labels)
    size = count if count is not None else len(array) if array is not None else 1
    return Batch({name: np.asarray(value) for name, value in (feeds or {}).items()}, array, None, size, 100)


def evaluate(name: str, outputs: dict[str, Any], given: Batch, output: str | None = None) -> Samples:
    _, metric = metric_named(name, output)
    assert isinstance(metric, BatchMetric)
    return metric.finish(metric.columns(outputs, given))


SCORES = np.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]], np.float32)


@pytest.mark.parametrize(
    "outputs",
    [
        {"logits": SCORES},
        {"boxes": np.zeros(3), "logits": SCORES},
        {"logits": SCORES.reshape(4, 2, 1, 1)},
        {"label": np.array([1, 0, 1, 0]), "probabilities": SCORES[:, ::-1]},
        {"label": np.array([[1], [0], [1], [0]])},
        {"probabilities": [{0: 1 - p, 1: p} for p in SCORES[:, 1].tolist()]},
        {"probability": SCORES[:, 1]},
        {"probability": SCORES[:, 1:]},
        {"logit": np.log(SCORES[:, 1] / SCORES[:, 0])},
    ],
)
def test_accuracy_reads_every_form_of_prediction(outputs: dict[str, Any]) -> None:
    found = evaluate("accuracy", outputs, batch([1, 0, 0, 0]))
    assert found.score() == 0.75
    assert found.proportion == "right"
    assert found.columns["right"].tolist() == [True, True, False, True]


def test_labels_in_other_forms() -> None:
    assert evaluate("accuracy", {"o": SCORES}, batch([[0, 1], [1, 0], [1, 0], [1, 0]])).score() == 0.75
    assert evaluate("accuracy", {"o": SCORES}, batch([[1.0], [0.0], [0.0], [0.0]])).score() == 0.75
    words = {"output_label": np.array(["cat", "dog"], object)}
    assert evaluate("accuracy", words, batch(np.array(["cat", "cat"]))).score() == 0.5
    maps = {"p": [{"cat": 0.9, "dog": 0.1}, {"cat": 0.2, "dog": 0.8}]}
    assert evaluate("accuracy", maps, batch(np.array(["cat", "cat"]))).score() == 0.5


def test_a_label_a_position() -> None:
    logits = np.zeros((2, 3, 4), np.float32)
    logits[:, :, 1] = 1
    found = evaluate("accuracy", {"o": logits}, batch([[1, 1, -100], [1, 0, 2]]))
    assert found.score() == pytest.approx(3 / 5)
    assert found.proportion is None


def test_labels_a_position_keep_a_few_numbers_a_sample() -> None:
    generator = np.random.default_rng(2)
    logits = generator.standard_normal((4, 6, 5, 3)).astype(np.float32)
    labels = generator.integers(0, 3, (4, 6, 5))
    labels[generator.random(labels.shape) < 0.2] = -100
    for name in ("accuracy", "f1"):
        found = evaluate(name, {"o": logits}, batch(labels))
        whole = evaluate(name, {"o": logits.reshape(-1, 3)[labels.ravel() >= 0]}, batch(labels[labels >= 0]))
        assert found.score() == pytest.approx(whole.score(), abs=1e-12)
        assert all(column.size <= 4 * 3 for column in found.columns.values())
    # Twice the first sample is what a resample would count.
    twice = evaluate("f1", {"o": logits[[0, 0, 1]]}, batch(labels[[0, 0, 1]]))
    once = evaluate("f1", {"o": logits[:2]}, batch(labels[:2]))
    assert once.reduce(once.columns, np.array([[2.0, 1.0]]))[0] == pytest.approx(twice.score(), abs=1e-12)


def test_what_does_not_fit_is_one_line() -> None:
    for labels, words in (
        ([1, 0, 2, 0], "label 2 of sample 102 is not one of the 2 classes of output 'o'"),
        ([1, 0, 0, -1], "label -1 of sample 103"),
        ([0.5, 1, 0, 0], "class labels, but the labels are real numbers such as 0.5"),
        (np.array(["a", "b", "c", "d"]), "the labels are strings"),
        ([1, 0, 0], "4 rows for 3 labels"),
    ):
        with pytest.raises(MetricError, match=words) as caught:
            evaluate("accuracy", {"o": SCORES}, batch(labels))
        assert "\n" not in str(caught.value)
    with pytest.raises(MetricError, match="needs labels"):
        evaluate("accuracy", {"o": SCORES}, batch(None))
    with pytest.raises(MetricError, match="only o"):
        evaluate("accuracy", {"o": SCORES}, batch([1, 0, 0, 0]), output="p")
    with pytest.raises(MetricError, match="fits none of the outputs"):
        evaluate("perplexity", {"o": SCORES}, batch(None))
    with pytest.raises(MetricError, match="did you mean 'accuracy'"):
        metric_named("acuracy")


def test_nan_is_wrong_and_never_class_zero() -> None:
    spoilt = SCORES.copy()
    spoilt[1] = np.nan
    assert evaluate("accuracy", {"o": spoilt}, batch([1, 0, 0, 0])).score() == 0.5
    assert evaluate("accuracy", {"o": np.full(4, np.nan, np.float32)}, batch([0, 0, 0, 0])).score() == 0.0


def test_the_original_settles_what_single_scores_mean() -> None:
    _, metric = metric_named("accuracy")
    assert isinstance(metric, BatchMetric)
    given = batch([1, 0])
    original = metric.columns({"o": np.array([2.0, -1.0])}, given)
    compressed = metric.columns({"o": np.array([0.3, 0.2])}, given)  # looks like probabilities, is logits
    assert metric.finish(original).score() == 1.0
    assert metric.finish(compressed).columns["right"].tolist() == [True, False]


def test_top5() -> None:
    scores = np.array([np.arange(8.0), np.arange(8.0), np.ones(8)])
    found = evaluate("top5", {"o": scores}, batch([3, 2, 5]))
    assert found.columns["right"].tolist() == [True, False, False]
    with pytest.raises(MetricError, match="six classes"):
        evaluate("top5", {"o": SCORES}, batch([0, 0, 0, 0]))


def test_f1_and_auc() -> None:
    given = batch([1, 0, 0, 0])
    # Class 0: 2*2/(2+3), class 1: 2*1/(2+1).
    assert evaluate("f1", {"o": SCORES}, given).score() == pytest.approx((4 / 5 + 2 / 3) / 2)
    assert evaluate("auc", {"o": SCORES}, given).score() == 1.0
    assert evaluate("auc", {"o": SCORES[:, 1]}, batch([0, 0, 1, 0])).score() == pytest.approx(2 / 3)
    assert (
        evaluate("auc", {"p": [{"n": 0.4, "y": 0.6}, {"n": 0.7, "y": 0.3}]}, batch(np.array(["y", "n"]))).score() == 1
    )
    with pytest.raises(MetricError, match="all labels are the same"):
        evaluate("auc", {"o": SCORES}, batch([0, 0, 0, 0]))


def test_values() -> None:
    outputs, given = {"o": np.array([[1.0], [2.0], [4.0]], np.float32)}, batch([1.0, 3.0, 5.0])
    assert evaluate("mse", outputs, given).score() == pytest.approx(2 / 3)
    assert evaluate("mae", outputs, given).score() == pytest.approx(2 / 3)
    assert not evaluate("mae", outputs, given).higher_is_better
    assert evaluate("r2", outputs, given).score() == pytest.approx(1 - 2 / 8)
    assert evaluate("pearson", outputs, given).score() == pytest.approx(np.corrcoef([1, 2, 4], [1, 3, 5])[0, 1])
    assert evaluate("spearman", outputs, given).score() == pytest.approx(1.0)
    wide = {"o": np.array([[9.0, 1.0], [9.0, 2.0], [9.0, 4.0]])}
    assert evaluate("spearman", wide, given, output="o[1]").score() == pytest.approx(1.0)
    with pytest.raises(MetricError, match=r"--output NAME or NAME\[COLUMN\]"):
        evaluate("spearman", wide, given)
    with pytest.raises(MetricError, match="has no column 2"):
        evaluate("spearman", wide, given, output="o[2]")


def test_si_sdr() -> None:
    clean = np.sin(np.arange(400) / 5)[None]
    noise = np.cos(np.arange(400) / 5)[None] * 0.1
    clean, noise = clean - clean.mean(), noise - noise.mean()
    noise -= (noise @ clean.T) / (clean @ clean.T) * clean
    expected = 10 * math.log10(float((clean**2).sum() / (noise**2).sum()))
    for scale in (1, 7):  # the measure does not see the scale
        assert evaluate("si-sdr", {"o": scale * (clean + noise)}, batch(clean)).score() == pytest.approx(expected)


def log_softmax(x: np.ndarray) -> np.ndarray:
    return np.asarray(x - np.log(np.exp(x).sum(axis=-1, keepdims=True)))


def test_perplexity() -> None:
    logits = np.random.default_rng(0).standard_normal((2, 4, 6))
    ids = np.array([[1, 2, 3, 4], [5, 0, 0, 0]])
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0]])
    logs = log_softmax(logits)
    losses = [-logs[0, 0, 2], -logs[0, 1, 3], -logs[0, 2, 4], -logs[1, 0, 0]]
    expected = math.exp(np.mean(losses))
    feeds = {"input_ids": ids, "attention_mask": mask}
    assert evaluate("perplexity", {"o": logits}, batch(None, feeds, 2)).score() == pytest.approx(expected)
    assert evaluate("perplexity", {"o": np.exp(logs)}, batch(None, feeds, 2)).score() == pytest.approx(expected)
    # Labels at their own positions, labels that repeat the ids.
    targets = [[2, 3, 4, -100], [0, -100, -100, -100]]
    assert evaluate("perplexity", {"o": logits}, batch(targets, feeds)).score() == pytest.approx(expected)
    repeated = np.where(mask == 1, ids, -100)
    assert evaluate("perplexity", {"o": logits}, batch(repeated, feeds)).score() == pytest.approx(expected)
    assert not evaluate("perplexity", {"o": logits}, batch(None, feeds, 2)).higher_is_better
    with pytest.raises(MetricError, match="target 6 of sample 100"):
        evaluate("perplexity", {"o": logits}, batch([[6, 0, 0, 0], [0, 0, 0, 0]], feeds))


def test_own_functions(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def distance(outputs, labels):\n"
        "    return abs(outputs['o'] - labels)\n"
        "distance.higher_is_better = False\n"
        "def whole(run, data):\n"
        "    return 0.5\n"
        "def broken(outputs, labels):\n"
        "    raise KeyError('no')\n"
        "def short(outputs, labels):\n"
        "    return 1.0\n"
    )
    found = evaluate(f"{file}:distance", {"o": np.array([1.0, 2.0])}, batch([1.0, 4.0]))
    assert (found.score(), found.higher_is_better, found.proportion) == (1.0, False, None)
    name, whole = metric_named(f"{file}:whole")
    nothing: Any = None
    assert (name, whole(nothing, nothing).single) == (f"{file}:whole", True)
    with pytest.raises(MetricError, match=r"raised KeyError.*line 7 of mine\.py"):
        evaluate(f"{file}:broken", {"o": np.array([1.0])}, batch([1.0]))
    with pytest.raises(MetricError, match="wanted one score a sample"):
        evaluate(f"{file}:short", {"o": np.array([1.0])}, batch([1.0]))
    with pytest.raises(MetricError, match="has no function 'absent'"):
        metric_named(f"{file}:absent")
    with pytest.raises(MetricError, match="no such file"):
        metric_named(f"{tmp_path / 'none.py'}:f")


def test_every_metric_is_named_as_it_is_called() -> None:
    assert set(METRICS) == {
        "accuracy", "top5", "f1", "auc", "spearman", "pearson", "perplexity", "mse", "mae", "r2", "si-sdr",
        "map", "map50", "wer", "cer",
    }  # fmt: skip
    assert metric_named("SI_SDR")[0] == "si-sdr"
