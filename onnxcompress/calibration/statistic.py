"""Streaming statistics of activations: what they must offer, and the range."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Protocol

import numpy as np


class Statistic(Protocol):
    """A monoid: any order of updates and merges, over any number of threads, gives the same result."""

    def update(self, batch: np.ndarray, valid: np.ndarray | None = None) -> None:
        """Take in one batch. `valid`: booleans over its leading axes, False on padding."""

    def merge(self, other: Any) -> None:
        """Take in all that `other`, of the same kind, has seen."""


@dataclasses.dataclass
class MinMax:
    """Least and greatest value seen; `count` elements. `finite`: False once NaN or infinity was among them."""

    least: float = math.inf
    most: float = -math.inf
    count: int = 0
    finite: bool = True

    def update(self, batch: np.ndarray, valid: np.ndarray | None = None) -> None:
        """See `Statistic.update`; an empty batch changes nothing."""
        values = masked(batch, valid)
        if values.size:
            self.update_bounds(float(values.min()), float(values.max()), int(values.size))

    def update_bounds(self, least: float, most: float, count: int) -> None:
        """Take in `count` elements of which only the bounds are known."""
        if not (math.isfinite(least) and math.isfinite(most)):
            self.finite = False
            return
        self.least, self.most, self.count = min(self.least, least), max(self.most, most), self.count + count

    def merge(self, other: MinMax) -> None:
        """See `Statistic.merge`."""
        self.least, self.most = min(self.least, other.least), max(self.most, other.most)
        self.count += other.count
        self.finite = self.finite and other.finite

    @property
    def known(self) -> bool:
        """True when there is a range to quantize."""
        return self.count > 0 and self.finite


def masked(batch: np.ndarray, valid: np.ndarray | None) -> np.ndarray:
    """The elements of `batch` that are no padding: all of them where `valid` does not fit its leading axes."""
    if valid is None or batch.shape[: valid.ndim] != valid.shape:
        return batch
    return np.asarray(batch[valid])
