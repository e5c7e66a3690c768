"""How far the outputs of two models lie apart, streamed: nothing is kept but sums and the worst samples."""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcompress.validation.values import Array, Flat, flatten, is_distribution, kind_of, log_probabilities

_CELLS = 1 << 20  # elements held in float64 at once
_WORST = 5


@dataclasses.dataclass(frozen=True)
class Worst:
    """A sample (for whole calls: a call) with a large error: its index, and root mean square and largest difference."""

    index: int
    rms: float
    max_abs: float


@dataclasses.dataclass(frozen=True)
class OutputAgreement:
    """One output of the compressed model against the original's, over all samples.

    `kind`: float, integer, bool or string. `elements`: compared pairs, padding left out. `bit_equal`: every byte equal.
    `equal`: share of equal elements. For numbers: `cosine` of all values as one vector; `sqnr_db` = 10 log10(sum x^2 /
    sum (x - y)^2), infinite when equal; largest and mean absolute difference; `max_relative`, the largest difference
    over the largest magnitude of the original; `mean_relative`, the mean difference over the mean magnitude (element by
    element, a relative error only tells how near to zero an element lies). Where the last axis (two or more) can be
    class scores: `top1`, how often the largest entry is the same; `top5`, how often the original's is among the five
    largest; `kl`, the mean of KL(original || compressed) in nats, of softmax where rows are no probabilities. Pairs
    that are both NaN or the same infinity count as equal and enter no sum; `nonfinite_new`: not finite where the
    original is finite.
    `mismatched`: calls whose shapes or types did not fit; `mismatch`: the first of them in words.
    """

    name: str
    kind: str
    calls: int
    elements: int
    bit_equal: bool
    equal: float
    cosine: float | None
    sqnr_db: float | None
    max_abs: float | None
    mean_abs: float | None
    max_relative: float | None
    mean_relative: float | None
    top1: float | None
    top5: float | None
    kl: float | None
    nonfinite_original: int
    nonfinite_compressed: int
    nonfinite_new: int
    mismatched: int
    mismatch: str | None
    worst: tuple[Worst, ...]


class Agreement:
    """Accumulates the agreement of every output: `update` once a call, then `results`."""

    def __init__(self) -> None:
        self._outputs: dict[str, _Output] = {}

    def update(
        self,
        original: Mapping[str, Any],
        compressed: Mapping[str, Any],
        *,
        start: int = 0,
        count: int = 1,
        valid: Mapping[str, Array | None] | None = None,
    ) -> None:
        """Add one call of `count` samples from index `start`. `valid`: output -> (samples, length), padding False."""
        for name, value in original.items():
            output = self._outputs.setdefault(name, _Output(name))
            output.update(flatten(value), flatten(compressed[name]), start, count, (valid or {}).get(name))

    @property
    def misfit(self) -> bool:
        """True when an output of some call could not be compared."""
        return any(output.mismatched for output in self._outputs.values())

    def results(self) -> list[OutputAgreement]:
        """One entry an output, in the model's order."""
        return [output.result() for output in self._outputs.values()]


class _Output:
    def __init__(self, name: str) -> None:
        self.name = name
        self.kind = ""
        self.calls = self.elements = self.equal = self.finite = self.mismatched = 0
        self.bit_equal = True
        self.mismatch: str | None = None
        self.xx = self.yy = self.xy = self.dd = self.abs = self.magnitude = self.max_abs = self.largest = 0.0
        self.bad_original = self.bad_compressed = self.bad_new = 0
        self.rows = self.top1 = self.top5 = self.kl_rows = 0
        self.kl = 0.0
        self.classes = 0
        self.distribution: bool | None = None
        self.worst: list[tuple[float, int, float]] = []

    def update(self, original: Flat, compressed: Flat, start: int, count: int, valid: Array | None) -> None:
        self.calls += 1
        problem = _misfit(original, compressed)
        if problem:
            self.mismatched += 1
            self.bit_equal = False
            self.mismatch = self.mismatch or problem
            return
        for x, y in zip(original.arrays, compressed.arrays, strict=True):
            self._array(x, y, start, count, valid)

    def _array(self, x: Array, y: Array, start: int, count: int, valid: Array | None) -> None:
        self.kind = self.kind or kind_of(x)
        if valid is not None and x.shape[:2] == valid.shape:
            owner = start + np.nonzero(valid)[0]
            x, y = x[valid], y[valid]
        elif x.ndim and len(x) == count:
            owner = start + np.arange(count)
        else:
            owner, x, y = np.array([start]), x[None], y[None]
        self.elements += x.size
        if x.dtype != y.dtype:
            self.bit_equal = False
        if x.size == 0:
            return
        if kind_of(x) in ("bool", "string"):
            same = int(np.count_nonzero(x == y))
            self.equal += same
            self.bit_equal &= same == x.size
            return
        self.bit_equal = self.bit_equal and np.array_equal(_bytes(x), _bytes(y))
        width = x.shape[-1] if x.ndim > 1 else 0
        self._numbers(x.reshape(len(owner), -1), y.reshape(len(owner), -1), owner)
        if width >= 2 and kind_of(x) == "float":
            self._scores(x.reshape(-1, width), y.reshape(-1, width))

    def _numbers(self, x: Array, y: Array, owner: npt.NDArray[np.intp]) -> None:
        squares, peaks, sizes = np.zeros(len(owner)), np.zeros(len(owner)), np.zeros(len(owner))
        rows, columns = max(1, _CELLS // max(1, x.shape[1])), min(_CELLS, x.shape[1])
        for top in range(0, len(x), rows):
            for left in range(0, x.shape[1], columns):
                block = np.s_[top : top + rows, left : left + columns]
                difference, finite = self._block(x[block], y[block])
                squares[top : top + rows] += (difference * difference).sum(axis=1)
                sizes[top : top + rows] += finite.sum(axis=1)
                peaks[top : top + rows] = np.maximum(peaks[top : top + rows], np.abs(difference).max(axis=1))
        samples, index = np.unique(owner, return_inverse=True)
        total, size, peak = np.bincount(index, squares), np.bincount(index, sizes), np.zeros(len(samples))
        np.maximum.at(peak, index, peaks)
        found = [
            (math.sqrt(total[at] / size[at]), int(samples[at]), float(peak[at]))
            for at in np.argsort(-total, kind="stable")[:_WORST]
            if total[at] > 0
        ]
        self.worst = heapq.nlargest(_WORST, self.worst + found, key=lambda entry: (entry[0], -entry[1]))

    def _block(self, x: Array, y: Array) -> tuple[Array, Array]:
        a, b = x.astype(np.float64), y.astype(np.float64)
        good_a, good_b = np.isfinite(a), np.isfinite(b)
        finite = good_a & good_b
        with np.errstate(invalid="ignore"):
            self.equal += int(np.count_nonzero((x == y) | (np.isnan(a) & np.isnan(b))))
        if not finite.all():
            self.bad_original += int(np.count_nonzero(~good_a))
            self.bad_compressed += int(np.count_nonzero(~good_b))
            self.bad_new += int(np.count_nonzero(good_a & ~good_b))
            a, b = np.where(finite, a, 0.0), np.where(finite, b, 0.0)
        with np.errstate(over="ignore", invalid="ignore"):
            d = a - b
            self.finite += int(np.count_nonzero(finite))
            self.xx += float((a * a).sum())
            self.yy += float((b * b).sum())
            self.xy += float((a * b).sum())
            self.dd += float((d * d).sum())
            self.abs += float(np.abs(d).sum())
            self.magnitude += float(np.abs(a).sum())
        self.max_abs = max(self.max_abs, float(np.abs(d).max()))
        self.largest = max(self.largest, float(np.abs(a).max()))
        return d, finite

    def _scores(self, x: Array, y: Array) -> None:
        classes = x.shape[1]
        if self.distribution is None:
            self.distribution = is_distribution(x[: max(1, _CELLS // classes)])
            self.classes = classes
        rows = max(1, _CELLS // classes)
        for top in range(0, len(x), rows):
            a, b = x[top : top + rows], y[top : top + rows]
            finite = np.isfinite(a.astype(np.float64)).all(axis=1) & np.isfinite(b.astype(np.float64)).all(axis=1)
            best = a.argmax(axis=1)
            self.rows += len(a)
            self.top1 += int(np.count_nonzero(best == b.argmax(axis=1)))
            if classes > 5:
                # Fewer than five entries above it: so ties, which argmax settles by position, never count against it.
                chosen = np.take_along_axis(b, best[:, None], axis=1)
                self.top5 += int(np.count_nonzero((b > chosen).sum(axis=1) < 5))
            if finite.any():
                p, q = (log_probabilities(side[finite], self.distribution) for side in (a, b))
                self.kl += float(np.maximum((np.exp(p) * (p - q)).sum(axis=1), 0).sum())
                self.kl_rows += int(np.count_nonzero(finite))

    def result(self) -> OutputAgreement:
        numbers = self.kind in ("float", "integer")
        counted = self.elements > self.bad_original and numbers
        exact = numbers and self.dd == 0 and self.max_abs == 0
        return OutputAgreement(
            name=self.name,
            kind=self.kind or "none",
            calls=self.calls,
            elements=self.elements,
            bit_equal=self.bit_equal,
            equal=self.equal / self.elements if self.elements else float(not self.mismatched),
            cosine=self._cosine(exact) if counted else None,
            sqnr_db=self._sqnr(exact) if counted else None,
            max_abs=self.max_abs if counted else None,
            mean_abs=self.abs / max(1, self.finite) if counted else None,
            max_relative=_ratio(self.max_abs, self.largest) if counted else None,
            mean_relative=_ratio(self.abs, self.magnitude) if counted else None,
            top1=self.top1 / self.rows if self.rows else None,
            top5=self.top5 / self.rows if self.rows and self.classes > 5 else None,
            kl=self.kl / self.kl_rows if self.kl_rows else None,
            nonfinite_original=self.bad_original,
            nonfinite_compressed=self.bad_compressed,
            nonfinite_new=self.bad_new,
            mismatched=self.mismatched,
            mismatch=self.mismatch,
            worst=tuple(Worst(index, rms, peak) for rms, index, peak in self.worst),
        )

    def _cosine(self, exact: bool) -> float:
        if exact:
            return 1.0
        length = math.sqrt(self.xx) * math.sqrt(self.yy)
        return max(-1.0, min(1.0, self.xy / length)) if length > 0 else 0.0

    def _sqnr(self, exact: bool) -> float:
        if exact or self.dd == 0:
            return math.inf
        return 10 * math.log10(self.xx / self.dd) if self.xx > 0 else -math.inf


def _ratio(difference: float, magnitude: float) -> float:
    if difference == 0:
        return 0.0
    return difference / magnitude if magnitude > 0 else math.inf


def _misfit(original: Flat, compressed: Flat) -> str | None:
    """Why two outputs cannot be compared element by element, in words; None when they can."""
    if original.keys != compressed.keys:
        return f"keys {_short(original.keys)} in the original, {_short(compressed.keys)} in the compressed model"
    if len(original.arrays) != len(compressed.arrays):
        return f"{len(original.arrays)} tensors in the original, {len(compressed.arrays)} in the compressed model"
    for x, y in zip(original.arrays, compressed.arrays, strict=True):
        if x.shape != y.shape:
            return f"shape {list(x.shape)} in the original, {list(y.shape)} in the compressed model"
        if kind_of(x) != kind_of(y):
            return f"{x.dtype} in the original, {y.dtype} in the compressed model"
    return None


def _short(keys: tuple[Any, ...] | None) -> str:
    text = "none" if keys is None else ", ".join(map(str, keys))
    return text if len(text) < 60 else text[:57] + "..."


def _bytes(array: Array) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
