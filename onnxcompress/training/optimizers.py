"""Optimizers as elementwise nodes over runs of elements: new parameters and state out of old ones and the gradient.

What changes from step to step comes in as numbers, so that a schedule needs no new session; what of the formula
depends on them alone is worked out before, in double precision.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar, Literal

from onnxcompress.autodiff.tensor import Tensor
from onnxcompress.errors import OnnxCompressError


@dataclasses.dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov, Hutter, 2019).

    m' = b1 m + (1 - b1) g;  v' = b2 v + (1 - b2) g^2;
    w' = (1 - lr decay) w - lr (m' / (1 - b1^t)) / (sqrt(v' / (1 - b2^t)) + eps)

    The state is m / (1 - b1) and v / (1 - b2), which saves a pass through memory for each.
    """

    slots: ClassVar[tuple[str, ...]] = ("m", "v")
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01

    def numbers(self, lr: float, t: int) -> Numbers:
        """Those of step `t` (from 1)."""
        rest = math.sqrt((1 - self.beta2**t) / (1 - self.beta2))
        size = lr * rest * (1 - self.beta1) / (1 - self.beta1**t)
        return Numbers(size, self.eps * rest, 1 - lr * self.weight_decay, 1.0)

    def update(self, w: Tensor, g: Tensor, state: Sequence[Tensor], given: Given) -> tuple[Tensor, list[Tensor]]:
        """(w', [m', v'])."""
        m, v = state
        m = m * self.beta1 + g
        v = v * self.beta2 + g * g
        change = m / (v.map("Sqrt") + given.eps) * given.size
        if self.weight_decay:
            w = w * given.decay
        return w - change, [m, v]


@dataclasses.dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent with momentum; decay is added to the gradient.

    m' = momentum m + g + decay w;  w' = w - lr m'  (nesterov: w - lr (g + decay w + momentum m'))
    """

    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0

    @property
    def slots(self) -> tuple[str, ...]:
        """The state kept for a parameter."""
        return ("m",) if self.momentum else ()

    def numbers(self, lr: float, t: int) -> Numbers:
        """Those of step `t` (from 1)."""
        return Numbers(lr, 0.0, self.weight_decay, 0.0)

    def update(self, w: Tensor, g: Tensor, state: Sequence[Tensor], given: Given) -> tuple[Tensor, list[Tensor]]:
        """(w', [m'])."""
        if self.weight_decay:
            g = g + w * given.decay
        if not self.momentum:
            return w - g * given.size, []
        m = state[0] * self.momentum + g
        along = g + m * self.momentum if self.nesterov else m
        return w - along * given.size, [m]


@dataclasses.dataclass(frozen=True)
class Numbers:
    """What a step is made with: its size, AdamW's epsilon in the units of its state, and the factor by which weights
    that decay take part, `still` for those that do not."""

    size: float
    eps: float
    decay: float
    still: float


@dataclasses.dataclass(frozen=True)
class Given:
    """The same as tensors, for one run of elements: scalars, or `size` one an element."""

    size: Tensor
    eps: Tensor
    decay: Tensor


Optimizer = AdamW | SGD
Name = Literal["adamw", "sgd"]
OPTIMIZERS: tuple[str, ...] = ("adamw", "sgd")


def named(name: str, weight_decay: float | None = None, momentum: float = 0.9) -> Optimizer:
    """An optimizer by name; without a decay its own default.

    Raises:
        OnnxCompressError: no such optimizer.
    """
    if name == "adamw":
        return AdamW() if weight_decay is None else AdamW(weight_decay=weight_decay)
    if name == "sgd":
        return SGD(momentum=momentum, weight_decay=weight_decay or 0.0)
    raise OnnxCompressError(f"--optimizer {name}: known: {', '.join(OPTIMIZERS)}")


def clip_scale(norm: float, limit: float | None) -> float:
    """min(1, limit / norm): what brings gradients of this norm down to `limit` (Pascanu et al., 2013)."""
    return 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))
