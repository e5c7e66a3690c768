"""Which loss fits an output.

What stands behind the logits (Softmax, ArgMax: classes; Sigmoid: yes or no by itself) and the labels decide; where both
are silent, a causal language model's next tokens, then the output's name, and else its values are matched.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from onnxcompress.errors import DataError
from onnxcompress.training.heads import Head
from onnxcompress.training.samples import Samples
from onnxcompress.training.targets import IGNORED, Objective, Target

_NAMED = re.compile(r"logit|score|class|prob|pred", re.IGNORECASE)


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
        DataError: the labels fit no output, are out of range or no numbers, or are needed and missing.
    """
    found, given = [], samples.labels
    _check_finite(given)
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
        what = f"labels of shape {list(samples.labels.shape)} ({samples.labels.dtype})"
        if samples.labels.dtype.kind == "f" and not np.array_equal(samples.labels, np.rint(samples.labels)):
            what += ", not all of them whole numbers, as those of classes are,"
        raise DataError(f"{what} fit no output: {told}")
    if not soft:
        found = [target for target in found if target.labels is not None]
        if not found:
            raise DataError("training without a teacher needs labels: an array `y` in the data, or --labels KEY")
        if all(target.is_indexed and np.all(target.labels == IGNORED) for target in found):
            raise DataError(f"every label is {IGNORED}, which leaves a sample out: there is nothing to learn")
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
    whole = integral or (labels is not None and labels.dtype.kind == "f" and np.array_equal(labels, np.rint(labels)))
    if labels is not None and wanted == "auto" and kind == "values":
        if whole and rank >= 2 and _class_axis(labels.shape, shape, axis) is not None and shape[axis] > 1:
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
        if at is not None and whole:
            return kind, at, _checked(labels.astype(np.int64), shape[at], student.output)
        if labels.shape[1:] == shape[1:] and labels.dtype.kind in "iubf":
            return kind, axis, _distributions(labels.astype(np.float32), axis)
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


def _check_finite(labels: np.ndarray | None) -> None:
    if labels is None or labels.dtype.kind != "f" or np.isfinite(labels).all():
        return
    sample, *at = np.argwhere(~np.isfinite(labels))[0]
    raise DataError(
        f"the label of sample {sample} holds {labels[(sample, *at)]}: mend it, or leave the sample out of the data"
    )


def _checked(labels: np.ndarray, classes: int, output: str) -> np.ndarray:
    wrong = (labels != IGNORED) & ((labels < 0) | (labels >= classes))
    if wrong.any():
        at = np.argwhere(wrong)[0]
        raise DataError(
            f"label {labels[tuple(at)]} of sample {at[0]} is out of range: output {output!r} has classes 0 to "
            f"{classes - 1} ({IGNORED} leaves one out)"
        )
    return labels


def _distributions(labels: np.ndarray, axis: int) -> np.ndarray:
    sums = labels.sum(axis)
    wrong = (np.abs(sums - 1) > 1e-3) | (labels < 0).any(axis)
    if wrong.any():
        at = np.argwhere(wrong)[0]
        raise DataError(
            f"label of sample {at[0]} is no distribution: it sums up to {sums[tuple(at)]:g} (for several labels a "
            "sample, --loss binary)"
        )
    return labels


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:-1] if len(shape) == 2 and shape[1] == 1 else shape
