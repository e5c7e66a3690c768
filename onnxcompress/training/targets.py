"""What the student learns from: for each output the loss that fits it, and the arrays that loss is fed with.

Which loss: what stands behind the logits (Softmax, ArgMax: classes; Sigmoid: yes or no by itself) and the labels
decide; where both are silent, a causal language model's next tokens, then the output's name, and else its values are
matched.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import onnx_ir as ir

from onnxcompress.autodiff.tensor import Tensor
from onnxcompress.errors import DataError
from onnxcompress.training import losses
from onnxcompress.training.heads import Head
from onnxcompress.training.samples import Samples
from onnxcompress.training.step import Inputs, WriteLoss

FeatureLoss = Literal["values", "cosine"]
FEATURE_LOSSES: tuple[str, ...] = ("values", "cosine")
Loss = Literal["auto", "classes", "binary", "values", "cosine"]
LOSSES: tuple[str, ...] = ("auto", "classes", "binary", "values", "cosine")
IGNORED = -100
TEMPERATURE, ALPHA = 4.0, 0.1
_NAMED = re.compile(r"logit|score|class|prob|pred", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Objective:
    """How hard labels and the teacher are mixed.

    `temperature`: T of the soft targets; None is 4, or as much as brings the teacher's logits to a standard deviation
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

    @property
    def share(self) -> float:
        """The `alpha` that is used where there are labels and a teacher."""
        return ALPHA if self.alpha is None else self.alpha

    def temperature_for(self, logits: np.ndarray, axis: int) -> float:
        """The T that is used for a teacher's logits."""
        if self.temperature is not None:
            return self.temperature
        spread = float(np.std(logits, axis=axis).mean()) if axis < logits.ndim else float(np.abs(logits).mean())
        return max(TEMPERATURE, spread)


@dataclasses.dataclass(frozen=True)
class Target:
    """One output of the student and what it is to become.

    `kind`: the loss. `axis`: of the classes or features. `rank`: of the logits. `labels`: one row a sample, shaped like
    the logits without `axis` (int64) or, for "binary" and "values", like the logits; None: the teacher alone.
    `teacher`: logits of every sample, None: computed call by call, or no teacher (`soft` False).
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

    def write(self, inputs: Inputs, z: Tensor, objective: Objective) -> Tensor:
        """The loss, from the student's logits `z`."""
        z = z.cast(ir.DataType.FLOAT)
        if self.axis >= len(self.shape):  # one number a sample
            z = z.unsqueeze(self.axis)
        dims: list[int | str | None] = ["train/batch", *self.shape[1:]]
        if self._ragged(z):
            dims[1] = "train/positions"
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
            kind = ir.DataType.INT64 if self.kind == "classes" else ir.DataType.FLOAT
            labels = inputs(f"{where}/labels", kind, positions if self.kind == "classes" else whole)
            hard = self._hard(z, labels, counted, objective)
        return losses.mix(hard, soft, objective.share)

    @property
    def is_feature(self) -> bool:
        """Whether it is a tensor within the model, not an output."""
        return self.head.kind == "feature"

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
        if self.kind == "classes":
            return losses.cross_entropy(z, labels, counted, self.axis, objective.smoothing)
        if self.kind == "binary":
            return losses.binary_cross_entropy(z, labels, counted, self.axis)
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
            labels = labels[..., None] if labels is not None and self.kind != "classes" else labels
        like = teacher.shape if teacher is not None else None
        if like is None:
            assert labels is not None
            like = _with_axis(labels.shape, self.axis) if self.kind == "classes" else labels.shape
        positions = tuple(d for i, d in enumerate(like) if i != self.axis)
        weight = np.ones(positions, np.float32)
        if valid is not None and positions[:2] == valid.shape:
            weight *= valid.reshape(valid.shape + (1,) * (len(positions) - 2))
        found = {f"{where}/weight": weight}
        if self.soft:
            assert teacher is not None
            found[f"{where}/teacher"] = np.asarray(teacher, np.float32)
        if labels is not None and self.kind == "classes":
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
            part = target.write(inputs, values[target.head.logits], objective)
            parts.append(part * objective.feature_weight if target.is_feature else part)
        return inputs.b.sum(parts)

    return write


def choose(
    pairs: Sequence[tuple[Head, Head]],
    logits: Mapping[str, np.ndarray],
    samples: Samples,
    objective: Objective,
    *,
    soft: bool,
    next_tokens: np.ndarray | None = None,
) -> list[Target]:
    """The targets of the student's heads. `pairs`: (student, teacher). `logits`: the teacher's for
    some samples, by student output.

    `next_tokens`: int64 [samples, positions], when the model is a causal language model and there are no labels.

    Raises:
        DataError: the labels fit no output, are out of range, or are needed and missing.
    """
    found, given = [], samples.labels
    for index, (student, teacher) in enumerate(pairs):
        shape = logits[student.output].shape
        if student.kind == "feature":
            axis = 1 if len(shape) > 3 or len(shape) == 1 else len(shape) - 1
            found.append(Target(index, student, objective.feature_loss, axis, shape, None, soft, 1.0))
            continue
        kind, axis, labels = _kind(student, teacher, shape, given, next_tokens, objective.loss)
        if labels is not None:
            given = next_tokens = None  # the labels are of one output
        temperature = objective.temperature_for(logits[student.output], axis)
        found.append(Target(index, student, kind, axis, shape, labels, soft, temperature))
    if samples.labels is not None and given is not None:
        outputs = [student.output for student, _ in pairs if student.kind != "feature"]
        told = ", ".join(f"{output} {list(logits[output].shape)}" for output in outputs)
        raise DataError(f"labels of shape {list(samples.labels.shape)} ({samples.labels.dtype}) fit no output: {told}")
    if not soft:
        found = [target for target in found if target.labels is not None]
        if not found:
            raise DataError("training without a teacher needs labels: an array `y` in the data, or --labels KEY")
    return found


def _kind(
    student: Head,
    teacher: Head,
    shape: tuple[int, ...],
    labels: np.ndarray | None,
    next_tokens: np.ndarray | None,
    wanted: str,
) -> tuple[str, int, np.ndarray | None]:
    """(loss, axis, labels as this output's loss takes them or None)."""
    told = next((h for h in (student, teacher) if h.kind != "values"), student)
    kind = told.kind if wanted == "auto" else wanted
    rank = len(shape)
    axis = rank if rank == 1 else (told.axis % rank if told.axis is not None else rank - 1 if rank <= 3 else 1)
    if labels is not None and labels.ndim == 2 and labels.shape[1] == 1 and rank <= 2:
        labels = labels[:, 0]
    integral = labels is not None and labels.dtype.kind in "iub"
    if labels is not None and wanted == "auto" and kind == "values":
        if integral and rank >= 2 and _class_axis(labels.shape, shape, axis) is not None and shape[axis] > 1:
            kind = "classes"
        elif integral and np.isin(labels, (0, 1)).all() and labels.shape[1:] == _squeezed(shape)[1:]:
            kind = "binary"
    if labels is None and next_tokens is not None and rank == 3:
        return "classes", 2, next_tokens
    if kind == "values" and wanted == "auto" and labels is None and rank >= 2 and shape[axis] > 1:
        kind = "classes" if _NAMED.search(student.output) else kind
    if labels is None:
        return kind, axis, None
    if kind == "classes":
        at = _class_axis(labels.shape, shape, axis)
        if at is not None and (integral or (labels.dtype.kind == "f" and (labels == np.rint(labels)).all())):
            return kind, at, _checked(labels.astype(np.int64), shape[at], student.output)
        return kind, axis, None
    if labels.dtype.kind not in "iubf" or labels.shape[1:] != _squeezed(shape)[1:]:
        return kind, axis, None
    return kind, axis, labels.reshape(labels.shape[0], *shape[1:]).astype(np.float32)


def _class_axis(labels: tuple[int, ...], logits: tuple[int, ...], preferred: int) -> int | None:
    """The axis without which the logits' shape is the labels'."""
    for axis in (preferred, len(logits) - 1, 1):
        if 0 < axis < len(logits) and labels[1:] == tuple(d for i, d in enumerate(logits) if i != axis)[1:]:
            return axis
    return None


def _checked(labels: np.ndarray, classes: int, output: str) -> np.ndarray:
    wrong = (labels != IGNORED) & ((labels < 0) | (labels >= classes))
    if wrong.any():
        at = np.argwhere(wrong)[0]
        raise DataError(
            f"label {labels[tuple(at)]} of sample {at[0]} is out of range: output {output!r} has classes 0 to "
            f"{classes - 1} ({IGNORED} leaves one out)"
        )
    return labels


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:-1] if len(shape) == 2 and shape[1] == 1 else shape


def _with_axis(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], 1, *shape[axis:])


def _cut(array: np.ndarray | None, cut: tuple[int, int] | None, rank: int) -> np.ndarray | None:
    """Drop the positions that were trimmed from the feeds."""
    if array is None or cut is None or rank < 3 or array.ndim < 2 or array.shape[1] != cut[0]:
        return array
    return array[:, : cut[1]]
