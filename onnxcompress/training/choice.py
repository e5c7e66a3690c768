"""Which loss fits an output, and which of its values that loss takes.

An output is classes, binary (each number yes or no by itself) or values. What stands behind it decides (Softmax:
classes, Sigmoid: binary), in the student or else in the teacher. Else labels decide; without any, what was seen of it
(numbers that add up to 1 are a distribution over classes), that a causal language model predicts next tokens, or the
word "logits" in its name; and where all of that is silent its values are matched.

Logits are read in front of the head, of student and teacher each where they are. A head that is not seen into gives
probabilities: then log p of classes and log(p / (1 - p)) of binary outputs stand for the logits.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence

import numpy as np

from onnxcompress.errors import DataError
from onnxcompress.training import labels as marks
from onnxcompress.training.behind import Kind
from onnxcompress.training.heads import Head
from onnxcompress.training.readings import Look, Reading
from onnxcompress.training.samples import Samples
from onnxcompress.training.targets import IGNORED, Objective, Target

_NAMED = re.compile(r"(^|[^a-z])logits?($|[^a-z])", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Side:
    """One output as one of the two models gives it. `along`: the axis of samples, which is the first in `look`."""

    head: Head
    look: Look
    along: int = 0

    @property
    def class_axis(self) -> int | None:
        """The axis of the classes; None where neither the graph nor what was seen tells of classes."""
        head, rank = self.head, len(self.look.shape)
        if head.kind == "classes" and head.axis is not None:
            axis = head.axis % rank
            return axis + 1 if axis < self.along else axis
        found = self.look.shares or self.look.logs
        return None if not found or head.kind == "binary" else _usual(rank) if _usual(rank) in found else found[0]

    def gives_shares(self, other: Side, axis: int) -> bool:
        """Whether numbers of unknown origin are probabilities of classes: what adds up to 1, or may (rounded to
        integers it does not) while the other model's does."""
        alike = other.head.kind == "classes" or axis in other.look.shares
        return axis in self.look.shares or (alike and self._may_be_probabilities)

    def gives_chances(self, other: Side) -> bool:
        """Whether numbers of unknown origin are probabilities one by one: what may be, where the other model's may be,
        too, or is behind a Sigmoid, or surely logits."""
        return self._may_be_probabilities and (
            other.head.kind == "binary" or other.head.is_linear or other.look.is_unit
        )

    @property
    def _may_be_probabilities(self) -> bool:
        return self.look.is_unit and not self.head.is_linear


@dataclasses.dataclass(frozen=True)
class Output:
    """One output of the student, as both models give it."""

    student: Side
    teacher: Side

    @property
    def name(self) -> str:
        """The student's."""
        return self.student.head.output

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the logits that were seen, samples first."""
        return self.teacher.look.shape

    @property
    def is_feature(self) -> bool:
        """Whether it is a tensor within the models."""
        return self.student.head.kind == "feature"

    @property
    def told(self) -> tuple[Kind, int | None]:
        """The kind that graph and numbers say it is, the student's before the teacher's, and the axis of classes."""
        for side in (self.student, self.teacher):
            if side.class_axis is not None:
                return "classes", side.class_axis
            if side.head.kind == "binary":
                return "binary", None
        return "values", None

    @property
    def has_head(self) -> bool:
        """Whether the graph of one of both tells of classes or binary outputs."""
        return any(side.head.kind in ("classes", "binary") for side in (self.student, self.teacher))

    @property
    def certainty(self) -> int:
        """How much speaks for a loss of labels: a head behind it, 2; the name alone, 1."""
        return 2 if self.told[0] != "values" else int(self.is_named)

    @property
    def is_named(self) -> bool:
        """Whether a name says that it is logits."""
        return any(_NAMED.search(side.head.output) for side in (self.student, self.teacher))

    def reading(self, kind: str, axis: int, *, of_student: bool) -> Reading:
        """Which values of one of the two a loss of `kind` takes."""
        mine, other = (self.student, self.teacher) if of_student else (self.teacher, self.student)
        found, opaque = mine.head.kind, mine.head.is_opaque
        if kind == "classes":
            return "log" if opaque or (found == "values" and mine.gives_shares(other, axis)) else "logits"
        if kind == "binary":
            is_one_class = found == "classes" and mine.class_axis is None
            return "logit" if opaque or is_one_class or (found == "values" and mine.gives_chances(other)) else "logits"
        alike = found == other.head.kind and not opaque and not other.head.is_opaque
        return "logits" if found in ("values", "feature") or (alike and self.told[0] != "values") else "output"


def choose(
    outputs: Sequence[Output],
    logits: Callable[[Output, Reading], np.ndarray],
    samples: Samples,
    objective: Objective,
    *,
    soft: bool,
    next_tokens: tuple[str, np.ndarray] | None = None,
) -> list[Target]:
    """The targets of the student's outputs. `logits`: the teacher's for some samples, as they are read.

    `next_tokens`: where there are no labels, the student's output that predicts them, and int64 [samples, positions].
    Without a teacher (`soft` False) only the output that takes the labels has a target.

    Raises:
        DataError: the labels fit no output, are out of range or no numbers, or are needed and missing.
    """
    marks.check_finite(samples.labels)
    chosen = {output.name: _decided(output, None, objective.loss) for output in outputs if not output.is_feature}
    labelled = _labelled(outputs, samples.labels, next_tokens, objective)
    if labelled is not None:
        chosen[labelled[0]] = labelled[1]
    found = []
    for index, output in enumerate(outputs):
        axis = 1 if len(output.shape) > 3 or len(output.shape) == 1 else len(output.shape) - 1
        made = chosen.get(output.name, _Decided(objective.feature_loss, axis))
        mine, theirs = (output.reading(made.kind, made.axis, of_student=it) for it in (True, False))
        temperature = objective.temperature or 1.0
        if soft and objective.temperature is None and made.kind in ("classes", "binary"):
            temperature = objective.temperature_for(logits(output, theirs), made.axis, made.kind)
        found.append(
            Target(
                index,
                output.student.head,
                made.kind,
                made.axis,
                output.shape,
                made.labels,
                soft,
                temperature,
                along=output.student.along,
                reading=mine,
                teacher_reading=theirs,
            )
        )
    if not soft:
        found = [target for target in found if target.labels is not None]
    _check(found, objective, soft=soft)
    return found


@dataclasses.dataclass(frozen=True)
class _Decided:
    kind: str
    axis: int
    labels: np.ndarray | None = None


def _labelled(
    outputs: Sequence[Output],
    labels: np.ndarray | None,
    next_tokens: tuple[str, np.ndarray] | None,
    objective: Objective,
) -> tuple[str, _Decided] | None:
    """The output that takes the labels, and how: the first that they fit, of those that most speaks for.

    Raises:
        DataError: they fit none.
    """
    if labels is None:
        return None if next_tokens is None else (next_tokens[0], _Decided("classes", 2, next_tokens[1]))
    found = [output for output in outputs if not output.is_feature]
    for output in sorted(found, key=lambda output: -output.certainty):
        made = _decided(output, labels, objective.loss)
        if made.labels is not None:
            return output.name, made
    what = f"labels of shape {list(labels.shape)} ({labels.dtype})"
    if labels.dtype.kind == "f" and not marks.is_whole(labels):
        what += ", not all of them whole numbers, as those of classes are,"
    raise DataError(f"{what} fit no output: {', '.join(f'{each.name} {list(each.shape)}' for each in found)}")


def _decided(output: Output, labels: np.ndarray | None, wanted: str) -> _Decided:
    """The loss of one output, where `labels` are its own, as far as they fit."""
    kind: str
    kind, axis = output.told
    shape, rank = output.shape, len(output.shape)
    usual = _usual(rank) if axis is None else axis
    many = rank >= 2 and shape[usual] > 1
    if wanted != "auto":
        kind = wanted
    elif labels is None:
        kind = "classes" if kind == "values" and many and output.is_named else kind
    elif kind == "values" or not output.has_head:
        kind = _kind_of(labels, shape, usual, many=many) or kind
    if labels is None:
        return _Decided(kind, usual)
    if kind != "classes":
        given = marks.like(labels, shape)
        if given is not None and kind == "binary":
            marks.checked_binary(given, output.name)
        return _Decided(kind, usual, given)
    hard = marks.indexed(labels, shape, (usual,) if axis is not None else (usual, rank - 1, 1))
    if hard is not None:
        return _Decided(kind, hard[0], marks.checked_classes(hard[1], shape[hard[0]], output.name))
    given = marks.like(labels, shape)
    return _Decided(kind, usual, None if given is None else marks.checked_distributions(given, usual))


def _kind_of(labels: np.ndarray, shape: tuple[int, ...], axis: int, *, many: bool) -> str | None:
    """What labels say of an output that nothing else speaks for; None where they do not fit it."""
    if many and marks.indexed(labels, shape, (axis, len(shape) - 1, 1)) is not None:
        return "classes"
    given = marks.like(labels, shape)
    if given is None:
        return None
    if many and marks.are_distributions(given, axis):
        return "classes"
    return "binary" if np.isin(given, (0, 1)).all() else "values"


def _usual(rank: int) -> int:
    """Where classes lie: last, but second in pictures; behind the samples where there is no further axis."""
    return rank if rank == 1 else rank - 1 if rank <= 3 else 1


def _check(found: Sequence[Target], objective: Objective, *, soft: bool) -> None:
    """Refuse what learns nothing.

    Raises:
        DataError: there are no labels where they are needed, or all are left out.
    """
    told = [target for target in found if target.labels is not None]
    if not soft and not told:
        raise DataError("training without a teacher needs labels: an array `y` in the data, or --labels KEY")
    if objective.smoothing and all(target.kind not in ("classes", "binary") for target in told):
        raise DataError("--smoothing: is of labels of classes, and there are none")
    if not soft and all(target.is_indexed and np.all(target.labels == IGNORED) for target in told):
        raise DataError(f"every label is {IGNORED}, which leaves a sample out: there is nothing to learn")
