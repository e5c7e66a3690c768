"""What the built-in metrics share: they score batch by batch, so that two models go through one pass over the data.

Which output a metric reads: the one named (`NAME`, or `NAME[COLUMN]` for one column of its last axis), or by rule, on
the first batch of the original model:

- labels (accuracy, f1): an integer or string output with one value a sample whose name says label, class or pred;
- class scores (accuracy, f1, top5, auc): the first float output of two axes, then a sequence of maps, then any float;
- values (spearman, pearson, mse, mae, r2, si-sdr): the first float output;
- language models (perplexity): the first float output of three axes.
"""

from __future__ import annotations

import abc
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from onnxcompress.data.batch import Batch, Data
from onnxcompress.errors import MetricError
from onnxcompress.validation.samples import Columns, RunModel, Samples
from onnxcompress.validation.values import Array, RealRows, flatten, kind_of


class BatchMetric(abc.ABC):
    """A metric that scores each sample from the outputs and labels of its own call.

    One instance serves one comparison: what it settles on the original's outputs (which output, logits or
    probabilities) holds for the compressed model too, which is therefore evaluated second.
    """

    name: str
    higher_is_better: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = True

    def __init__(self, output: str | None = None) -> None:
        self._wanted = output
        self._chosen: tuple[str, int | None] | None = None

    @abc.abstractmethod
    def columns(self, outputs: Mapping[str, Any], batch: Batch) -> Columns:
        """Records of one call, one row for each of the batch's real samples.

        Raises:
            MetricError: outputs and labels do not fit.
        """

    @abc.abstractmethod
    def finish(self, columns: Columns) -> Samples:
        """The records of all calls with how they reduce."""

    def __call__(self, run: RunModel, data: Data) -> Samples:
        """Evaluate one model by itself."""
        collector, rows = Collector(), RealRows(data)
        for batch in data:
            collector.add(self.columns(rows.cut(run(batch.feeds), batch), batch))
        return self.finish(collector.columns())

    def labels(self, batch: Batch) -> Array:
        """The labels of a batch, one row a sample.

        Raises:
            MetricError: there are none.
        """
        if batch.labels is None:
            raise MetricError(f"metric {self.name} needs labels: an array `y` in the data, or --labels KEY")
        return np.asarray(batch.labels)

    def value(
        self, outputs: Mapping[str, Any], prefer: Callable[[str, Any], int]
    ) -> tuple[str, Array, list[Any] | None]:
        """Name, array and (for sequences of maps) keys of the output to score. `prefer`: a rank, 0 first, -1 never.

        Raises:
            MetricError: there is no such output, or none that fits.
        """
        if self._chosen is None:
            self._chosen = self._choose(outputs, prefer)
        name, column = self._chosen
        flat = flatten(outputs[name])
        if len(flat.arrays) != 1:
            raise MetricError(f"metric {self.name}: output {name!r} is a sequence of {len(flat.arrays)} tensors")
        array = flat.arrays[0]
        if column is None:
            return name, array, None if flat.keys is None else list(flat.keys)
        if array.ndim == 0 or not -array.shape[-1] <= column < array.shape[-1]:
            raise MetricError(
                f"metric {self.name}: output {name!r} of shape {list(array.shape)} has no column {column}"
            )
        return f"{name}[{column}]", array[..., column], None

    def _choose(self, outputs: Mapping[str, Any], prefer: Callable[[str, Any], int]) -> tuple[str, int | None]:
        if self._wanted is not None:
            match = re.fullmatch(r"(.+)\[(-?\d+)\]", self._wanted)
            if self._wanted in outputs:
                return self._wanted, None
            if match and match.group(1) in outputs:
                return match.group(1), int(match.group(2))
            raise MetricError(f"--output {self._wanted}: the model has no such output, only {', '.join(outputs)}")
        ranked = [(rank, name) for name, value in outputs.items() if (rank := prefer(name, value)) >= 0]
        if not ranked:
            raise MetricError(
                f"metric {self.name} fits none of the outputs {', '.join(outputs)}; name one with --output, "
                "or write a metric of your own (--metric file.py:function)"
            )
        least = min(rank for rank, _ in ranked)
        return next(name for rank, name in ranked if rank == least), None


class Collector:
    """Gathers the records of one model over all calls."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Array]] = {}

    def add(self, columns: Columns) -> None:
        """The records of one call."""
        for name, column in columns.items():
            self._parts.setdefault(name, []).append(np.array(column))  # a copy: a view would keep its whole batch

    def columns(self) -> dict[str, Array]:
        """All records so far."""
        try:
            return {name: np.concatenate(parts) for name, parts in self._parts.items()}
        except ValueError as error:
            raise MetricError(f"the per-sample records of two calls do not fit together: {error}") from error


def prefer_labels(name: str, value: Any) -> int:
    """Rank for metrics that want predicted classes."""
    array = value if isinstance(value, np.ndarray) else None
    if array is not None and kind_of(array) in ("integer", "string", "bool"):
        told = re.search(r"label|class|pred", name.lower()) is not None
        single = array.ndim == 1 or (array.ndim == 2 and array.shape[1] == 1)
        return (0 if told else 3) if single else (4 if told else -1)
    rank = prefer_scores(name, value)
    return rank + 1 if rank >= 0 else -1


def prefer_scores(name: str, value: Any) -> int:
    """Rank for metrics that want one score a class."""
    if isinstance(value, list):
        return 1 if value and isinstance(value[0], Mapping) else -1
    if not isinstance(value, np.ndarray) or kind_of(value) != "float" or value.ndim == 0:
        return -1
    return 0 if value.ndim == 2 and value.shape[1] >= 2 else 4


def prefer_values(name: str, value: Any) -> int:
    """Rank for metrics that want real numbers: any float output."""
    if not isinstance(value, np.ndarray) or kind_of(value) != "float":
        return -1
    return 0


def prefer_tokens(name: str, value: Any) -> int:
    """Rank for metrics that want scores over a vocabulary at every position."""
    return 0 if isinstance(value, np.ndarray) and kind_of(value) == "float" and value.ndim == 3 else -1
