"""Looks at a paired comparison while it runs, so that clear cases stop early and no more is accepted falsely.

Whoever looks often accepts falsely often: one bound at 95 % every hundred samples lets 27 % of the models through that
lie on the budget. So one error budget is spent over the looks: up to the share t of the planned samples the errors of
all looks together may reach alpha * ln(1 + (e - 1) t), the Pocock-type spending of Lan and DeMets (Biometrika 70,
1983). A look is taken at the level spent since the one before; by the union bound the levels of all looks add up to
alpha at most, whatever the statistic and wherever the looks fall. Doubling sizes keep the looks few, and each of
them worth its level.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from onnxcompress.errors import MetricError
from onnxcompress.validation.samples import Samples
from onnxcompress.validation.values import Array
from onnxcompress.validation.verdict import CONFIDENCE, Look, Score, score

Pair = tuple[Samples, Samples]

FIRST = 100  # samples before the first look
_LEAST = {"tango": 1e-6, "bootstrap": 0.004}  # no quantile of 2,000 resamples is known beyond the eighth from its end
# Far from the middle a bootstrap misses more often than it says, of a hundred skewed samples twice as often, of more
# than five hundred up to a fifth (benchmarks/verdicts.py): so it is taken at four fifths of the level that is its due.
_FEWEST = {"tango": FIRST, "bootstrap": 500}
_TAKEN = {"tango": 1.0, "bootstrap": 0.8}
_ORDERED = 4.0  # standard errors of the likeness of neighbours


def spent(share: float, alpha: float = 1 - CONFIDENCE) -> float:
    """Errors allowed up to `share` (0 to 1) of the planned samples."""
    return alpha * math.log1p((math.e - 1) * min(1.0, max(0.0, share)))


def sizes(total: int, first: int = FIRST) -> list[int]:
    """Sample counts to look at: `total` and its halves, from `first` on."""
    found = [total]
    while found[-1] >= 2 * first:
        found.append(-(-found[-1] // 2))
    return found[::-1]


class Sequential:
    """The looks of one comparison: `due` asks whether it is time, `look` looks, `last` looks at all there is.

    `total`: how many samples are planned. Both errors are held to `alpha`: a PASS beyond the budget, a FAIL within it.
    """

    def __init__(
        self, metric: str, total: int, max_drop: float, *, seed: int = 0, alpha: float = 1 - CONFIDENCE
    ) -> None:
        self._metric, self._total, self._budget, self._seed, self._alpha = metric, total, max_drop, seed, alpha
        self._sizes = sizes(total)
        self._spent = 0.0
        self._looks: list[Look] = []
        self.order = Order()
        self.skipped = False  # a look that fell due found the data in order

    def due(self, seen: int) -> bool:
        """True once at each planned size before the last, as soon as so many samples were seen."""
        passed = [size for size in self._sizes[:-1] if size <= seen < self._total]
        self._sizes = self._sizes[len(passed) :]
        return bool(passed)

    def look(self, records: Callable[[], Pair | None]) -> Score | None:
        """The score if it decides now, else None. `records`: of both models so far."""
        try:
            pair = records()
        except MetricError:  # labels of one class so far, say
            return None
        if pair is None or not pair[0].n or pair[0].single:
            return None
        if self.order.found:
            self.skipped = True
            return None
        level = spent(pair[0].n / self._total, self._alpha) - self._spent
        method = _method(pair)
        if level < _LEAST[method] or pair[0].n < _FEWEST[method]:
            return None  # what it would have spent is left to the next
        found = self._score(pair, level)
        return found if found.decided else None

    def last(self, pair: Pair) -> Score:
        """The score on all samples, at the level that is left."""
        return self._score(pair, self._alpha - self._spent)

    def story(self, stopped: bool) -> str:
        """How the looks went, in words."""
        if self.skipped:
            return (
                "no early look was taken: neighbouring samples are alike, so the data is in no random order; shuffle it"
            )
        if not self._looks:
            return "no look was taken"
        taken = f"look {len(self._looks)} at {self._looks[-1].n:,} of {self._total:,} samples"
        return (
            f"{'stopped early, by ' if stopped else ''}{taken}; errors of all looks together at most {self._alpha:.0%}"
        )

    def _score(self, pair: Pair, level: float) -> Score:
        taken = level * _TAKEN[_method(pair)]
        found = score(self._metric, *pair, max_drop=self._budget, seed=self._seed, alpha=taken)
        self._spent += level
        self._looks.append(Look(found.n, taken, found.bound, found.lower))
        return dataclasses.replace(found, looks=tuple(self._looks))


def _method(pair: Pair) -> str:
    return "bootstrap" if pair[0].proportion is None else "tango"


class Order:
    """Tells data that lies in order (by class, by value) from data in random order, by how alike neighbours are.

    Early samples of sorted data say nothing about the rest. Labels of one class alone count as sorted.
    """

    def __init__(self) -> None:
        self._labels: list[Array] = []

    def update(self, labels: Array | None) -> None:
        """The labels of one call; more than one value a sample tell nothing."""
        array = np.zeros(0) if labels is None else np.asarray(labels)
        if array.ndim == 2 and array.shape[1] == 1:
            array = array[:, 0]
        if array.ndim == 1 and array.dtype.kind in "biufOSU":
            self._labels.append(np.array(array))

    @property
    def found(self) -> bool:
        """True when the labels seen so far lie in order."""
        labels = np.concatenate(self._labels) if self._labels else np.zeros(0)
        if len(labels) < 2:
            return False
        values, codes, counts = np.unique(labels, return_inverse=True, return_counts=True)
        if len(values) == 1:
            return True
        pairs = len(labels) - 1
        if labels.dtype.kind == "f" and len(values) > len(labels) / 4:
            ranks = codes - codes.mean()
            likeness = float((ranks[1:] * ranks[:-1]).sum() / (ranks * ranks).sum())
            return likeness * math.sqrt(pairs) > _ORDERED
        chance = float(((counts / len(labels)) ** 2).sum())
        alike = int(np.count_nonzero(codes[1:] == codes[:-1]))
        return alike - pairs * chance > _ORDERED * math.sqrt(pairs * chance * (1 - chance))
