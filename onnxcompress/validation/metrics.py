"""Metrics by name, or from a user's file."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from onnxcompress.data.batch import Batch, Data
from onnxcompress.data.records import describe, load_function, split_reference
from onnxcompress.errors import DataError, MetricError, OnnxCompressError
from onnxcompress.validation.classification import F1, Accuracy, Auc, Top5
from onnxcompress.validation.detection import MeanAveragePrecision, MeanAveragePrecision50
from onnxcompress.validation.language import Perplexity
from onnxcompress.validation.metric import BatchMetric
from onnxcompress.validation.regression import R2, Mae, Mse, Pearson, SiSdr, Spearman
from onnxcompress.validation.samples import Columns, Evaluator, RunModel, Samples
from onnxcompress.validation.speech import CharacterErrorRate, WordErrorRate

_KINDS: tuple[type[BatchMetric], ...] = (
    *(Accuracy, Top5, F1, Auc, Spearman, Pearson, Perplexity, Mse, Mae, R2, SiSdr),
    *(MeanAveragePrecision, MeanAveragePrecision50, WordErrorRate, CharacterErrorRate),
)
METRICS: dict[str, type[BatchMetric]] = {kind.name: kind for kind in _KINDS}


def metric_named(metric: str | Evaluator | Callable[..., Any], output: str | None = None) -> tuple[str, Evaluator]:
    """The name and the evaluator of a metric.

    `metric`: a built-in name; `file.py:function`; or a function, or `Evaluator`, itself. A user's function is one of

    - `function(outputs, labels)`: called for every batch with the outputs (name -> array, real samples only) and the
      labels (None without); returns one score a sample, booleans for a share. The score is their mean.
    - `function(run, data)`, first parameter named `run`: owns the calls. `run(feeds)` -> outputs is one model; `data`
      yields batches with `feeds` and `labels`. Returns `Samples`, scores one a sample, or one number; of one number
      there is no bound, so a drop within the budget stays INCONCLUSIVE.

    An attribute `higher_is_better = False` on the function turns its direction.

    Raises:
        MetricError: no such metric or function.
    """
    if not isinstance(metric, str):
        return _custom(getattr(metric, "__name__", type(metric).__name__), metric, output)
    reference = split_reference(metric)
    if reference is not None:
        try:
            return _custom(metric, load_function(*reference), output)
        except DataError as error:
            raise MetricError(f"--metric {error}") from error
    known = metric.strip().lower().replace("_", "-")
    if known in METRICS:
        return known, METRICS[known](output)
    near = difflib.get_close_matches(known, METRICS, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise MetricError(f"unknown metric {metric!r}: {hint}known: {', '.join(METRICS)}, or file.py:function")


class PerSample(BatchMetric):
    """A user's `function(outputs, labels)`."""

    needs_labels = False

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        super().__init__(None)
        self.name, self._function = name, function
        self._higher = bool(getattr(function, "higher_is_better", True))

    def columns(self, outputs: Mapping[str, Any], batch: Batch) -> Columns:
        scores = np.asarray(_call(self.name, self._function, dict(outputs), batch.labels))
        if scores.ndim == 0 or len(scores) != batch.count:
            raise MetricError(
                f"metric {self.name} returned {list(scores.shape)} for {batch.count} samples: wanted one score a sample"
            )
        return {"score": scores}

    def finish(self, columns: Columns) -> Samples:
        return Samples.of(columns.get("score", np.zeros(0)), higher_is_better=self._higher)


class Whole:
    """A user's `function(run, data)`."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name, self._function = name, function
        self._higher = bool(getattr(function, "higher_is_better", True))

    def __call__(self, run: RunModel, data: Data) -> Samples:
        found = _call(self.name, self._function, run, data)
        if isinstance(found, Samples):
            return found
        try:
            array = np.asarray(found)
            if array.ndim == 0 and array.dtype.kind in "biuf":
                return Samples.number(float(array), higher_is_better=self._higher)
            return Samples.of(array, higher_is_better=self._higher)
        except ValueError as error:
            raise MetricError(f"metric {self.name} returned {type(found).__name__}: {error}") from error


def _custom(name: str, function: Any, output: str | None) -> tuple[str, Evaluator]:
    if isinstance(function, BatchMetric):
        return function.name, function
    if isinstance(function, type) and issubclass(function, BatchMetric):
        return function.name, function(output)
    if not callable(function):
        raise MetricError(f"metric {name}: wanted a name or a function, got {type(function).__name__}")
    if output is not None:
        raise MetricError(f"metric {name} chooses its outputs itself: leave out --output")
    try:
        parameters = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        parameters = []
    if len(parameters) != 2:
        raise MetricError(f"metric {name}: wanted function(outputs, labels) or function(run, data)")
    return name, Whole(name, function) if parameters[0] == "run" else PerSample(name, function)


def _call(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except OnnxCompressError:
        raise
    except Exception as error:
        raise MetricError(f"metric {name} {describe(error)}") from error
