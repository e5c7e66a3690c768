"""Teacher, student and data brought together: whether they fit, and what each output is trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxcompress.data.axes import batch_axes
from onnxcompress.data.cast import is_float
from onnxcompress.data.specs import InputSpec, input_specs
from onnxcompress.errors import DataError, ModelError, PassError
from onnxcompress.training import causal
from onnxcompress.training.choice import Output, Side, choose
from onnxcompress.training.heads import Head
from onnxcompress.training.readings import Reading, look
from onnxcompress.training.samples import Samples
from onnxcompress.training.targets import Objective, Target
from onnxcompress.training.teacher import Teacher

PROBED = 32  # samples from which the losses and the temperature are chosen


def matched(
    pairs: Sequence[tuple[Head, Head]],
    student: ir.Model,
    guide: Teacher,
    all_samples: Samples,
    objective: Objective,
    size: int | None,
    *,
    soft: bool,
    provider: str = "cpu",
) -> list[Target]:
    """What each output is trained on, from what both models give for a few samples; `guide` then reads it so.

    Raises:
        ModelError: the outputs do not fit, or a model fails.
        DataError: the labels fit no output.
    """
    count = size or PROBED
    looks = [np.arange(at, at + count) % all_samples.count for at in range(0, PROBED, count)]
    calls = [all_samples.rows(look) for look in looks]
    theirs = _sides(guide, [teacher for _, teacher in pairs], calls)
    own = theirs
    if soft:
        with Teacher(student, [mine for mine, _ in pairs], provider=provider) as reader:
            own = _sides(reader, [mine for mine, _ in pairs], calls)
    outputs = [Output(mine, other) for mine, other in zip(own, theirs, strict=True)]
    for output in outputs:
        _check_shapes(output)
    tokens = None
    if all_samples.labels is None and objective.loss in ("auto", "classes"):
        tokens = _next_tokens(outputs, guide, calls[0], all_samples)

    def logits(output: Output, reading: Reading) -> np.ndarray:
        name = output.teacher.head.output
        guide.readings[name] = reading
        return np.concatenate([guide.logits(feeds)[name] for feeds in calls])

    chosen = choose(outputs, logits, all_samples, objective, soft=soft, next_tokens=tokens)
    guide.readings = {outputs[each.index].teacher.head.output: each.teacher_reading for each in chosen}
    return chosen


def _sides(reader: Teacher, heads: Sequence[Head], calls: Sequence[Mapping[str, np.ndarray]]) -> list[Side]:
    """What a model gives for each of its `heads`."""
    seen = [reader.scores(feeds) for feeds in calls]
    looks = {name: look(np.concatenate([each[name] for each in seen])) for name in seen[0]}
    return [Side(head, looks[head.output], reader.along(head.output)) for head in heads]


def _next_tokens(
    outputs: Sequence[Output], guide: Teacher, feeds: Mapping[str, np.ndarray], all_samples: Samples
) -> tuple[str, np.ndarray] | None:
    """The tokens that an output predicts, of the teacher if it is a causal language model."""
    found = sorted((o for o in outputs if not o.is_feature), key=lambda output: -output.certainty)
    for output in found:
        axis = len(output.shape) - 1
        guide.readings[output.teacher.head.output] = output.reading("classes", axis, of_student=False)
    teacher_of = {output.name: output.teacher.head.output for output in found}
    shapes = {output.name: output.shape for output in found}
    return causal.next_tokens(guide.logits, feeds, all_samples, shapes, teacher_of)


def _check_shapes(output: Output) -> None:
    """Raises ModelError where student and teacher give tensors of different shapes for the same samples."""
    mine, theirs = output.student, output.teacher
    if mine.look.shape[1:] == theirs.look.shape[1:]:
        return
    what = "tensor" if output.is_feature else "output"
    own, other = (side.head.output.removeprefix("feature ") for side in (mine, theirs))
    raise ModelError(
        f"the student's {what} {own!r} is {_told(mine.look.shape)}, the teacher's {other!r} is "
        f"{_told(theirs.look.shape)}: they do not fit"
    )


def _told(shape: tuple[int, ...]) -> str:
    """The shape for any number of samples."""
    return f"[{', '.join(['n', *(str(dim) for dim in shape[1:])])}]" if shape else "[]"


def inputs_of(teacher: ir.Model | None, specs: Sequence[InputSpec], wanted: Sequence[str] = ()) -> dict[str, str]:
    """The teacher's inputs -> those of the student `specs` that they are fed with: the ones `wanted` names
    ("STUDENT=TEACHER"), those of the same names, and of the others the only one of the same type and shape.

    Raises:
        ModelError: the teacher has an input that none or several of the student's fit.
        PassError: there is no teacher to name inputs of.
    """
    if teacher is None:
        if wanted:
            raise PassError(f"--input {wanted[0]}: names a teacher's input, and there is no teacher")
        return {}
    theirs, known = input_specs(teacher), [spec.name for spec in specs]
    names = [spec.name for spec in theirs]
    found = {}
    for text in wanted:
        mine, _, its = text.partition("=")
        for name, there, whose in ((mine, known, "the student"), (its, names, "the teacher")):
            if name not in there:
                raise ModelError(f"--input {text}: {whose} has no such input, only {', '.join(there)}")
        found[its] = mine
    found |= {name: name for name in names if name in known and name not in found}
    free = [spec for spec in specs if spec.name not in found.values()]
    missing = [spec for spec in theirs if spec.name not in found]
    for spec in missing:
        fitting = [mine.name for mine in free if _fits(mine, spec)]
        rivals = [other.name for other in missing if any(_fits(mine, other) for mine in free if mine.name in fitting)]
        if len(fitting) != 1 or len(rivals) != 1:
            raise ModelError(
                f"the teacher wants an input {spec.name!r} that the student does not have "
                f"({', '.join(sorted(known))}): name the one it is fed with, --input STUDENT={spec.name}"
            )
        found[spec.name] = fitting[0]
    return found


def _fits(mine: InputSpec, theirs: InputSpec) -> bool:
    """Whether two inputs may hold the same arrays."""
    kinds = [None if spec.dtype is None else "float" if is_float(spec.dtype) else spec.dtype for spec in (mine, theirs)]
    if kinds[0] != kinds[1] or mine.rank != theirs.rank:
        return False
    pairs = zip(mine.shape or (), theirs.shape or (), strict=True)
    return all(a == b for a, b in pairs if isinstance(a, int) and isinstance(b, int))


def batch_of(student: ir.Model, teacher: ir.Model | None, count: int) -> int | None:
    """How many of `count` samples every call takes, None where it may take any number.

    Raises:
        ModelError: student and teacher are fixed to different numbers.
        DataError: there are fewer samples, or a model has no axis along which samples lie.
    """
    mine, theirs = fixed_batch(student), fixed_batch(teacher)
    if mine and theirs and mine != theirs:
        raise ModelError(
            f"the student takes {mine} samples a call, the teacher {theirs}: they do not fit; free the batch of one"
        )
    size = mine or theirs
    if size and count < size:
        raise DataError(f"data: holds {count} samples, and the model takes {size} a call")
    return size


def fixed_batch(model: ir.Model | None) -> int | None:
    """The fixed size of the inputs' batch axes, None where it is free.

    Raises:
        DataError: inputs do not agree on it.
    """
    if model is None:
        return None
    specs = input_specs(model)
    axes = batch_axes(specs)
    firsts = {spec.name: spec.shape[axes[spec.name]] for spec in specs if spec.shape and spec.name in axes}
    fixed = {name: dim for name, dim in firsts.items() if isinstance(dim, int)}
    sizes = set(fixed.values())
    if len(sizes) > 1 or (len(fixed) < len(firsts) and max(sizes, default=1) > 1):
        told = ", ".join(f"{name!r} {firsts[name] if name in fixed else 'any number'}" for name in firsts)
        raise DataError(f"the inputs' axes of samples do not agree ({told}): such a model cannot be trained in batches")
    return next(iter(sizes), None)
