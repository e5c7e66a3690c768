"""Metrics of recognized text: wer, cer.

Outputs and labels are strings, one a sample; or token ids (n, length), where negative labels fill up; or the outputs
are scores (n, frames, tokens) of a CTC model, which are decoded greedily (the best token of each frame, repeats merged,
blanks dropped; Graves et al., ICML 2006) and held against label ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from onnxcompress.data.batch import Batch
from onnxcompress.errors import MetricError
from onnxcompress.validation import samples
from onnxcompress.validation.metric import BatchMetric
from onnxcompress.validation.samples import Columns, Samples
from onnxcompress.validation.values import Array, kind_of


class CharacterErrorRate(BatchMetric):
    """Edit distance over the length of the labels, in characters of strings or in token ids.

    `blank`: the id that stands for nothing in a CTC model; None: 0, or the last where the first labels hold a 0.
    """

    name = "cer"
    higher_is_better: ClassVar[bool] = False

    def __init__(self, output: str | None = None, *, blank: int | None = None) -> None:
        super().__init__(output)
        self._blank = blank

    def columns(self, outputs: Mapping[str, Any], batch: Batch) -> Columns:
        name, array, _ = self.value(outputs, _prefer_text)
        labels = self.labels(batch)
        said, meant = self._texts(array, name, labels, batch)
        if len(said) != len(meant):
            raise MetricError(f"metric {self.name}: output {name!r} has {len(said)} rows for {len(meant)} labels")
        pairs = [(self.pieces(one), self.pieces(other)) for one, other in zip(meant, said, strict=True)]
        return {
            "errors": np.array([edit_distance(one, other) for one, other in pairs], np.int64),
            "length": np.array([len(one) for one, _ in pairs], np.int64),
        }

    def finish(self, columns: Columns) -> Samples:
        return Samples(columns, samples.ratio_of("errors", "length"), self.higher_is_better)

    def pieces(self, text: str | Array) -> Sequence[Any]:
        """What counts as one error: a character, a token."""
        return text.strip() if isinstance(text, str) else text.tolist()

    def _texts(self, array: Array, name: str, labels: Array, batch: Batch) -> tuple[list[Any], list[Any]]:
        if kind_of(array) == "string":
            if kind_of(labels) != "string":
                raise MetricError(f"metric {self.name}: output {name!r} holds strings, the labels do not")
            return [str(text) for text in array.reshape(-1)], [str(text) for text in labels.reshape(-1)]
        if kind_of(labels) == "string":
            raise MetricError(
                f"metric {self.name}: the labels are strings, but output {name!r} holds token ids; decode them in a "
                "metric of your own (--metric file.py:function), or give the labels as ids"
            )
        if labels.ndim != 2 or kind_of(labels) != "integer":
            raise MetricError(f"metric {self.name} needs label ids (samples, length), these are {list(labels.shape)}")
        meant = [row[row >= 0] for row in labels]
        if kind_of(array) == "integer" and array.ndim == 2:
            return [row[row >= 0] for row in array], meant
        if array.ndim != 3:
            raise MetricError(
                f"metric {self.name} needs strings, ids (samples, length) or scores (samples, frames, tokens); "
                f"{name!r} is {list(array.shape)}"
            )
        return self._decoded(array, labels, batch), meant

    def _decoded(self, scores: Array, labels: Array, batch: Batch) -> list[Array]:
        if self._blank is None:
            self._blank = scores.shape[2] - 1 if (labels == 0).any() else 0
        if (labels == self._blank).any():
            raise MetricError(
                f"metric {self.name}: a label of samples {batch.start} to {batch.start + batch.count - 1} is "
                f"{self._blank}, the blank; write {type(self).__name__}(blank=ID) in a file and name it with --metric"
            )
        best = scores.argmax(axis=2)
        fresh = np.concatenate([np.ones((len(best), 1), bool), best[:, 1:] != best[:, :-1]], axis=1)
        return [row[keep & (row != self._blank)] for row, keep in zip(best, fresh, strict=True)]


class WordErrorRate(CharacterErrorRate):
    """Edit distance in words over the number of words in the labels; of token ids `separator` parts the words."""

    name = "wer"

    def __init__(self, output: str | None = None, *, blank: int | None = None, separator: int | None = None) -> None:
        super().__init__(output, blank=blank)
        self._separator = separator

    def pieces(self, text: str | Array) -> Sequence[Any]:
        if isinstance(text, str):
            return text.split()
        if self._separator is None:
            raise MetricError(
                "metric wer: nothing tells where words of token ids end; write WordErrorRate(separator=ID) in a file "
                "and name it with --metric, or use cer"
            )
        words = np.split(text, np.nonzero(text == self._separator)[0])
        found = [tuple(word[word != self._separator].tolist()) for word in words]
        return [word for word in found if word]


def edit_distance(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Least number of insertions, deletions and substitutions that turn `one` into `other` (Levenshtein 1966)."""
    codes: dict[Any, int] = {}
    first, second = (np.array([codes.setdefault(x, len(codes)) for x in side], np.int64) for side in (one, other))
    steps = np.arange(len(second) + 1)
    row = steps.copy()
    for at, piece in enumerate(first, 1):
        least = np.concatenate([[at], np.minimum(row[1:] + 1, row[:-1] + (second != piece))])
        row = np.minimum.accumulate(least - steps) + steps  # insertions: one more for every step to the right
    return int(row[-1])


def _prefer_text(name: str, value: Any) -> int:
    if not isinstance(value, np.ndarray):
        return -1
    kind = kind_of(value)
    if kind == "string":
        return 0
    if kind == "integer" and value.ndim == 2:
        return 1
    return 2 if kind == "float" and value.ndim == 3 else -1
