"""What the student learns from: for each output a loss, and the arrays that loss is fed with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import onnx_ir as ir

from onnxcompress.autodiff.tensor import Tensor
from onnxcompress.errors import PassError
from onnxcompress.training import losses
from onnxcompress.training.heads import Head
from onnxcompress.training.readings import Reading, written
from onnxcompress.training.step import Inputs, WriteLoss

FeatureLoss = Literal["values", "cosine"]
FEATURE_LOSSES: tuple[str, ...] = ("values", "cosine")
Loss = Literal["auto", "classes", "binary", "values", "cosine"]
LOSSES: tuple[str, ...] = ("auto", "classes", "binary", "values", "cosine")
IGNORED = -100
TEMPERATURE, ALPHA = 2.0, 0.1
HOTTEST = 1e6  # at which soft targets are flat in single precision, long before T^2 leaves it


@dataclasses.dataclass(frozen=True)
class Objective:
    """How hard labels and the teacher are mixed.

    `temperature`: T of the soft targets; None is 2, or as much as brings the teacher's logits to a standard deviation
    of 1 (some models' logits go to the thousands, and their softmax is no softer than a label). `alpha`: the share of
    the labels' loss; None is 0.1. `squared`: multiply the soft loss by T^2. `smoothing`: of the labels.
    `features`: tensors within the models, "STUDENT" or "STUDENT=TEACHER", whose distance is added `feature_weight`
    times: mean squared error or 1 - cosine along the features. `l1`: what the sum of the absolute values of layers'
    weights is added by.
    """

    loss: Loss = "auto"
    temperature: float | None = None
    alpha: float | None = None
    squared: bool = True
    smoothing: float = 0.0
    features: tuple[str, ...] = ()
    feature_loss: FeatureLoss = "values"
    feature_weight: float = 1.0
    l1: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what no loss can be.

        Raises:
            PassError: a number out of its range, or a word that is none of those there are.
        """
        for name, choices in (("loss", LOSSES), ("feature_loss", FEATURE_LOSSES)):
            if (found := getattr(self, name)) not in choices:
                raise PassError(f"{name}: wanted {', '.join(choices)}, got {found!r}")
        if self.temperature is not None and not 0 < self.temperature <= HOTTEST:
            raise PassError(f"temperature: wanted a number above 0 and up to {HOTTEST:g}, got {self.temperature}")
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise PassError(f"alpha: wanted a share from 0 to 1, got {self.alpha}")
        if not 0 <= self.smoothing < 1:
            raise PassError(f"smoothing: wanted a share from 0 to below 1, got {self.smoothing}")

    @property
    def share(self) -> float:
        """The `alpha` that is used where there are labels and a teacher."""
        return ALPHA if self.alpha is None else self.alpha

    def temperature_for(self, logits: np.ndarray, axis: int, kind: str = "classes") -> float:
        """The T that is used for a teacher's logits of a kind; the spread of binary ones is about 0, which is even."""
        if self.temperature is not None:
            return self.temperature
        wide = logits.astype(np.float64)
        spread = float(np.std(wide, axis=axis).mean()) if kind == "classes" else float(np.abs(wide).mean())
        return min(max(TEMPERATURE, spread), HOTTEST)


@dataclasses.dataclass(frozen=True)
class Target:
    """One output of the student and what it is to become.

    `kind`: the loss. `axis`: of the classes or features. `shape`: of the logits. `labels`: one row a sample, shaped
    like the logits without `axis` (int64) or, for "binary", "values" and distributions, like the logits; None: the
    teacher alone.
    `teacher`: logits of every sample, None: computed call by call, or no teacher (`soft` False). `along`: the axis of
    the model's own output along which samples lie; here, everywhere else, it is the first.
    `reading`, `teacher_reading`: how student and teacher give what the loss takes as logits.
    """

    index: int
    head: Head
    kind: str
    axis: int
    shape: tuple[int, ...]
    labels: np.ndarray | None
    soft: bool
    temperature: float
    teacher: np.ndarray | None = None
    along: int = 0
    reading: Reading = "logits"
    teacher_reading: Reading = "logits"

    @property
    def value(self) -> str:
        """The name of the student's value that is read, in a model from `heads.laid_out`."""
        return self.head.laid if self.reading == "logits" else self.head.scores

    def write(self, inputs: Inputs, z: Tensor, objective: Objective) -> Tensor:
        """The loss, from the student's `value`."""
        if self.along:
            z = z.transpose([self.along, *(axis for axis in range(len(self.shape)) if axis != self.along)])
        dims: list[int | str | None] = ["train/batch", *self.shape[1:]]
        if self._ragged(z):
            dims[1] = "train/positions"
        if z.shape is None and not self.is_feature:  # which axis is the classes', only the logits that were seen tell
            z.value.shape = ir.Shape(dims)
        z = written(z.cast(ir.DataType.FLOAT), self.reading)
        if self.axis >= len(self.shape):  # one number a sample
            z = z.unsqueeze(self.axis)
        if self.is_feature and z.shape is not None:  # as free as the student's own
            dims[1:] = [d if isinstance(d, int) else f"train/{self.index}/{i}" for i, d in enumerate(z.shape)][1:]
        whole = [*dims, 1] if self.axis >= len(self.shape) else dims
        positions = [d for i, d in enumerate(whole) if i != self.axis]
        where = f"train/{self.index}"
        weight = inputs(f"{where}/weight", ir.DataType.FLOAT, positions)
        soft = hard = None
        if self.soft:
            t = inputs(f"{where}/teacher", ir.DataType.FLOAT, whole)
            soft = self._soft(z, t, weight, objective)
        if self.labels is not None:
            counted = inputs(f"{where}/counted", ir.DataType.FLOAT, positions)
            kind = ir.DataType.INT64 if self.is_indexed else ir.DataType.FLOAT
            labels = inputs(f"{where}/labels", kind, positions if self.is_indexed else whole)
            hard = self._hard(z, labels, counted, objective)
        return losses.mix(hard, soft, objective.share)

    @property
    def is_feature(self) -> bool:
        """Whether it is a tensor within the model, not an output."""
        return self.head.kind == "feature"

    @property
    def is_indexed(self) -> bool:
        """Whether a label is the index of a class, not a distribution over classes or the values themselves."""
        return self.kind == "classes" and self.labels is not None and self.labels.ndim < len(self.shape)

    def _ragged(self, z: Tensor) -> bool:
        return len(self.shape) >= 3 and (z.shape is None or not isinstance(z.shape[1], int))

    def _soft(self, z: Tensor, t: Tensor, weight: Tensor, objective: Objective) -> Tensor:
        if self.kind == "classes":
            return losses.soft_targets(z, t, weight, self.axis, self.temperature, objective.squared)
        if self.kind == "binary":
            return losses.binary_soft_targets(z, t, weight, self.axis, self.temperature, objective.squared)
        distance = losses.cosine_distance if self.kind == "cosine" else losses.squared_error
        return distance(z, t, weight, self.axis)

    def _hard(self, z: Tensor, labels: Tensor, counted: Tensor, objective: Objective) -> Tensor:
        if self.kind == "classes" and not self.is_indexed:
            return losses.cross_entropy_of(z, labels, counted, self.axis, objective.smoothing)
        if self.kind == "classes":
            return losses.cross_entropy(z, labels, counted, self.axis, objective.smoothing)
        if self.kind == "binary":
            return losses.binary_cross_entropy(z, labels, counted, self.axis, objective.smoothing)
        distance = losses.cosine_distance if self.kind == "cosine" else losses.squared_error
        return distance(z, labels, counted, self.axis)

    def feeds(
        self, chosen: np.ndarray, logits: np.ndarray | None, valid: np.ndarray | None, cut: tuple[int, int] | None
    ) -> dict[str, np.ndarray]:
        """Arrays for the samples `chosen`; `logits` of a teacher that is not cached.

        `valid`: real positions. `cut`: (positions the samples have, positions of this call).
        """
        where = f"train/{self.index}"
        teacher = logits if logits is not None else None if self.teacher is None else self.teacher[chosen]
        labels = None if self.labels is None else self.labels[chosen]
        if not self.is_feature:
            teacher, labels = (_cut(a, cut, len(self.shape)) for a in (teacher, labels))
        wide = self.axis >= len(self.shape)
        if wide:
            teacher = None if teacher is None else teacher[..., None]
            labels = labels[..., None] if labels is not None and not self.is_indexed else labels
        like = teacher.shape if teacher is not None else None
        if like is None:
            assert labels is not None
            like = _with_axis(labels.shape, self.axis) if self.is_indexed else labels.shape
        positions = tuple(d for i, d in enumerate(like) if i != self.axis)
        weight = np.ones(positions, np.float32)
        if valid is not None and positions[:2] == valid.shape:
            weight *= valid.reshape(valid.shape + (1,) * (len(positions) - 2))
        found = {f"{where}/weight": weight}
        if self.soft:
            assert teacher is not None
            found[f"{where}/teacher"] = np.asarray(teacher, np.float32)
        if labels is not None and self.is_indexed:
            told = labels != IGNORED
            found[f"{where}/counted"] = weight * told
            found[f"{where}/labels"] = np.where(told, labels, 0).astype(np.int64)
        elif labels is not None:
            found[f"{where}/counted"] = weight
            found[f"{where}/labels"] = np.asarray(labels, np.float32)
        return found


def write_all(targets: Sequence[Target], objective: Objective) -> WriteLoss:
    """The sum of the targets' losses, as `step.build` takes it."""

    def write(inputs: Inputs, values: Mapping[str, Tensor]) -> Tensor:
        parts = []
        for target in targets:
            part = target.write(inputs, values[target.value], objective)
            parts.append(part * objective.feature_weight if target.is_feature else part)
        return inputs.b.sum(parts)

    return write


def _with_axis(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], 1, *shape[axis:])


def _cut(array: np.ndarray | None, cut: tuple[int, int] | None, rank: int) -> np.ndarray | None:
    """Drop the positions that were trimmed from the feeds."""
    if array is None or cut is None or rank < 3 or array.ndim < 2 or array.shape[1] != cut[0]:
        return array
    return array[:, : cut[1]]
