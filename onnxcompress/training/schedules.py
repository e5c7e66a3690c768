"""Learning-rate schedules: plain functions of the step, outside the graph."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

Kind = Literal["cosine", "linear", "step", "constant"]
KINDS: tuple[str, ...] = ("cosine", "linear", "step", "constant")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A linear warm-up over the first `warmup` (share of all steps), then a decline to `floor` x peak.

    "cosine": half a period (Loshchilov, Hutter, 2017). "step": x 0.1 at one half and at three quarters of the way.
    """

    peak: float
    total: int
    kind: Kind = "cosine"
    warmup: float = 0.05
    floor: float = 0.01

    def __call__(self, step: int) -> float:
        """The learning rate of step 0, 1, ..., total - 1."""
        rising = math.ceil(self.warmup * self.total)
        if step < rising:
            return self.peak * (step + 1) / rising
        way = (step - rising) / max(1, self.total - rising)
        return self.peak * self._share(min(1.0, way))

    def _share(self, way: float) -> float:
        if self.kind == "cosine":
            return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * way)) / 2
        if self.kind == "linear":
            return self.floor + (1 - self.floor) * (1 - way)
        if self.kind == "step":
            return 1.0 if way < 0.5 else 0.1 if way < 0.75 else 0.01
        return 1.0
