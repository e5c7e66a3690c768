"""Optimizers as nodes of the training graph: new parameters and state out of old ones, the gradient and two scalars.

`lr` and `t` (the step, from 1) are graph inputs, so that a schedule needs no new session. `scale` is what clipping
multiplies every gradient by: it is folded into scalars, so that no gradient is written a second time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

from onnxcompress.autodiff.builder import Builder
from onnxcompress.autodiff.tensor import Operand, Tensor
from onnxcompress.errors import OnnxCompressError


@dataclasses.dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov, Hutter, 2019).

    m' = b1 m + (1 - b1) g;  v' = b2 v + (1 - b2) g^2;
    w' = (1 - lr decay) w - lr (m' / (1 - b1^t)) / (sqrt(v' / (1 - b2^t)) + eps)
    """

    slots: ClassVar[tuple[str, ...]] = ("m", "v")
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01

    def prepare(self, lr: Tensor, t: Tensor) -> Scalars:
        """What all parameters share: the step size and epsilon, each with its bias correction."""
        b = lr.b
        rest1 = 1 - b.op("Pow", b.constant(self.beta1, lr.dtype), t, shape=())
        rest2 = (1 - b.op("Pow", b.constant(self.beta2, lr.dtype), t, shape=())).map("Sqrt")
        return Scalars(lr, lr * rest2 / rest1, rest2 * self.eps)

    def update(
        self, w: Tensor, g: Tensor, state: Sequence[Tensor], shared: Scalars, scale: Tensor | None, decay: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """(w', [m', v']) for one parameter; `decay`: whether weight decay applies to it."""
        m, v = state
        first: Operand = 1 - self.beta1 if scale is None else scale * (1 - self.beta1)
        second: Operand = 1 - self.beta2 if scale is None else scale * scale * (1 - self.beta2)
        m = m * self.beta1 + g * first
        v = v * self.beta2 + g * g * second
        change = m / (v.map("Sqrt") + shared.eps) * shared.size
        if decay and self.weight_decay:
            w = w * (1 - shared.lr * self.weight_decay)
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

    def prepare(self, lr: Tensor, t: Tensor) -> Scalars:
        """What all parameters share."""
        return Scalars(lr, lr, lr)

    def update(
        self, w: Tensor, g: Tensor, state: Sequence[Tensor], shared: Scalars, scale: Tensor | None, decay: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """(w', [m']) for one parameter."""
        if scale is not None:
            g = g * scale
        if decay and self.weight_decay:
            g = g + w * self.weight_decay
        if not self.momentum:
            return w - g * shared.lr, []
        m = state[0] * self.momentum + g
        along = g + m * self.momentum if self.nesterov else m
        return w - along * shared.lr, [m]


@dataclasses.dataclass(frozen=True)
class Scalars:
    """Scalars of a step: the learning rate, and AdamW's corrected step size and epsilon."""

    lr: Tensor
    size: Tensor
    eps: Tensor


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


def norm(b: Builder, gradients: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, a scalar."""
    squares = [b.op("ReduceSumSquare", g, shape=(), keepdims=0) for g in gradients]
    return b.sum(squares).map("Sqrt")


def clip_scale(total: Tensor, limit: float) -> Tensor:
    """min(1, limit / norm): what brings gradients of this norm down to `limit` (Pascanu et al., 2013)."""
    b = total.b
    return b.op("Min", b.constant(1.0, total.dtype), limit / (total + 1e-6), shape=())
