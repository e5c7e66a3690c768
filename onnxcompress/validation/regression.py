"""Metrics of real-valued outputs: mse, mae, r2, pearson, spearman, si-sdr."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from onnxcompress.data.batch import Batch
from onnxcompress.errors import MetricError
from onnxcompress.validation import samples
from onnxcompress.validation.metric import BatchMetric, prefer_values
from onnxcompress.validation.samples import Columns, Samples
from onnxcompress.validation.values import Array, kind_of


class _Values(BatchMetric):
    def pairs(self, outputs: Mapping[str, Any], batch: Batch) -> tuple[Array, Array, str]:
        """Outputs and labels as float64 of the same shape (n, values)."""
        name, array, _ = self.value(outputs, prefer_values)
        labels = self.labels(batch)
        if kind_of(labels) == "string" or kind_of(array) == "string":
            raise MetricError(f"metric {self.name} needs numbers, not strings")
        if labels.size != array.size or not len(labels):
            raise MetricError(
                f"metric {self.name}: labels of shape {list(labels.shape)} do not fit output {name!r} of shape "
                f"{list(array.shape)}; name an output or one of its columns (--output NAME or NAME[COLUMN])"
            )
        n = len(labels)
        return array.reshape(n, -1).astype(np.float64), labels.reshape(n, -1).astype(np.float64), name


class Mse(_Values):
    """Mean squared error."""

    name = "mse"
    higher_is_better: ClassVar[bool] = False

    def columns(self, outputs: Mapping[str, Any], batch: Batch) -> Columns:
        values, labels, _ = self.pairs(outputs, batch)
        return {"error": ((values - labels) ** 2).mean(axis=1)}

    def finish(self, columns: Columns) -> Samples:
        return Samples(columns, samples.mean_of("error"), self.higher_is_better)


class Mae(Mse):
    """Mean absolute error."""

    name = "mae"

    def columns(self, outputs: Mapping[str, Any], batch: Batch) -> Columns:
        values, labels, _ = self.pairs(outputs, batch)
        return {"error": np.abs(values - labels).mean(axis=1)}


class R2(_Values):
    """Coefficient of determination, averaged over the columns of the label."""

    name = "r2"

    def columns(self, outputs: Mapping[str, Any], batch: Batch) -> Columns:
        values, labels, _ = self.pairs(outputs, batch)
        return {"squared": (values - labels) ** 2, "label": labels}

    def finish(self, columns: Columns) -> Samples:
        return Samples(columns, samples.r2)


class Pearson(_Values):
    """Correlation of a single-valued output with the label."""

    name = "pearson"
    reduce = staticmethod(samples.pearson)

    def columns(self, outputs: Mapping[str, Any], batch: Batch) -> Columns:
        values, labels, name = self.pairs(outputs, batch)
        if values.shape[1] != 1:
            raise MetricError(
                f"metric {self.name} needs one value a sample, but {name!r} has {values.shape[1]}; say which: "
                f"--output {name}[COLUMN]"
            )
        return {"score": values[:, 0], "label": labels[:, 0]}

    def finish(self, columns: Columns) -> Samples:
        return Samples(columns, self.reduce)


class Spearman(Pearson):
    """Rank correlation of a single-valued output with the label."""

    name = "spearman"
    reduce = staticmethod(samples.spearman)


class SiSdr(_Values):
    """Scale-invariant signal-to-distortion ratio in dB, means removed (Le Roux et al., ICASSP 2019)."""

    name = "si-sdr"

    def columns(self, outputs: Mapping[str, Any], batch: Batch) -> Columns:
        values, labels, _ = self.pairs(outputs, batch)
        values = values - values.mean(axis=1, keepdims=True)
        labels = labels - labels.mean(axis=1, keepdims=True)
        energy = (labels * labels).sum(axis=1, keepdims=True)
        target = (values * labels).sum(axis=1, keepdims=True) / (energy + 1e-12) * labels
        rest = values - target
        ratio = ((target * target).sum(axis=1) + 1e-12) / ((rest * rest).sum(axis=1) + 1e-12)
        return {"score": 10 * np.log10(ratio)}

    def finish(self, columns: Columns) -> Samples:
        return Samples(columns, samples.mean_of("score"))
