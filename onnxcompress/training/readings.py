"""How logits are read off what a model gives: as they are, or out of probabilities.

softmax(log(p) / T) is the renormalized p^(1/T) and sigmoid(log(p / (1 - p))) is p: with these in the place of logits
every loss is that of the model's probabilities, and the same whether student and teacher are both read so, or one.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from onnxcompress.autodiff.tensor import Tensor
from onnxcompress.validation.values import is_distribution

Reading = Literal["logits", "output", "log", "logit"]
"""Of one output of one model: the logits behind its head; the output as it is; log p of it; log(p / (1 - p)) of it."""

LEAST_LOG = 1e-30
LEAST_LOGIT = 1e-7  # 1 - p has no finer steps in single precision


@dataclasses.dataclass(frozen=True)
class Look:
    """What was seen of an output for some samples, which lie along its first axis.

    `shares`: axes along which it is a distribution; `logs`: those of a distribution's logarithms. `is_unit`: no number
    is outside of 0 to 1.
    """

    shape: tuple[int, ...]
    shares: tuple[int, ...]
    logs: tuple[int, ...]
    is_unit: bool


def look(scores: np.ndarray) -> Look:
    """What `scores` look like."""
    if not scores.size:
        return Look(scores.shape, (), (), False)
    axes = [axis for axis in range(1, scores.ndim) if scores.shape[axis] > 1]
    least, most = float(scores.min()), float(scores.max())
    shares = [axis for axis in axes if least >= 0 and _is_share(scores, axis)]
    logs = [axis for axis in axes if most <= 0 and _is_share(np.exp(scores), axis)]
    return Look(scores.shape, tuple(shares), tuple(logs), least >= 0 and most <= 1)


def _is_share(array: np.ndarray, axis: int) -> bool:
    moved = np.moveaxis(array, axis, -1)
    return is_distribution(moved[:1]) and is_distribution(moved)


def as_logits(array: np.ndarray, reading: Reading) -> np.ndarray:
    """float32, in numpy."""
    if reading == "log":
        return np.asarray(np.log(np.maximum(array, LEAST_LOG)))
    if reading == "logit":
        return np.asarray(np.log(np.maximum(array, LEAST_LOGIT)) - np.log(np.maximum(1 - array, LEAST_LOGIT)))
    return array


def written(z: Tensor, reading: Reading) -> Tensor:
    """The same as nodes of the training graph; `z` in single precision."""

    def log(p: Tensor, least: float) -> Tensor:
        return z.b.op("Max", p, z.b.constant(least, p.dtype), shape=p.shape).map("Log")

    if reading == "log":
        return log(z, LEAST_LOG)
    if reading == "logit":
        return log(z, LEAST_LOGIT) - log(1 - z, LEAST_LOGIT)
    return z
