"""What a step is fed with: samples, labels, and the teacher's logits, kept or computed on the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from onnxcompress.training import teacher
from onnxcompress.training.heads import Head
from onnxcompress.training.samples import Samples
from onnxcompress.training.settings import Conditions
from onnxcompress.training.targets import Target
from onnxcompress.training.teacher import Teacher


class Feeder:
    """All inputs of a call: the samples', and the targets'."""

    def __init__(
        self, chosen: Sequence[Target], teacher_of: Mapping[str, str], guide: Teacher, all_samples: Samples
    ) -> None:
        self._targets, self._teacher_of, self._guide, self._samples = chosen, teacher_of, guide, all_samples
        first = {n: a for n, a in all_samples.feeds.items() if a.ndim >= 2 and not all_samples.axes.get(n)}
        self._lengths = {name: array.shape[1] for name, array in first.items()}

    def __call__(self, indices: np.ndarray) -> Mapping[str, np.ndarray]:
        feeds, valid = self._samples.call(indices)
        cut = None
        for name, length in self._lengths.items():
            if feeds[name].shape[1] != length:
                cut = (length, feeds[name].shape[1])
        live = None
        if any(target.soft and target.teacher is None for target in self._targets):
            live = self._guide.logits(feeds)
        for target in self._targets:
            logits = None if live is None or not target.soft else live[self._teacher_of[target.head.output]]
            feeds |= target.feeds(indices, logits, valid, cut)
        return feeds

    def not_finite(self, indices: np.ndarray) -> str:
        """Which of these samples holds a number that is none, and where, in words; nothing where all is finite.

        Samples are counted from 0, as the data has them.
        """
        for name, array in self._samples.feeds.items():
            if told := _first(array[indices], indices):
                return f"{told} in the input {name!r}"
        has_teacher = any(target.soft for target in self._targets)
        logits = self._guide.logits(self._samples.call(indices)[0]) if has_teacher else {}
        for name, array in logits.items():
            if told := _first(array, indices):
                return f"the teacher gives no number: {told} in its output {name!r}"
        return ""


def _first(array: np.ndarray, indices: np.ndarray) -> str:
    """The first sample of `indices` whose row holds nan or an infinity, in words."""
    if array.dtype.kind != "f" or len(array) != len(indices):
        return ""
    rows = np.asarray(array).reshape(len(array), -1)
    bad = ~np.isfinite(rows)
    if not bad.any():
        return ""
    row, at = np.argwhere(bad)[0]
    return f"sample {indices[row]} holds {rows[row, at]}"


def cached(
    chosen: Sequence[Target],
    pairs: Sequence[tuple[Head, Head]],
    guide: Teacher,
    all_samples: Samples,
    size: int,
    conditions: Conditions,
) -> list[Target]:
    """The targets with the teacher's logits of every sample, where they can be kept.

    Features of sequences are not: only the models know along which of their axes positions lie that a call leaves out.
    """
    trimmed = bool(all_samples.groups) and any(target.is_feature for target in chosen)
    if trimmed or not any(target.soft for target in chosen):
        return list(chosen)
    stored = teacher.cache(guide, all_samples, size, conditions.work, conditions.progress)
    if stored is None:
        return list(chosen)
    teacher_of = {s.output: t.output for s, t in pairs}
    return [dataclasses.replace(target, teacher=stored[teacher_of[target.head.output]]) for target in chosen]
