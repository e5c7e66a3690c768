"""Teacher, student and data brought together: whether they fit, and what each output is trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxcompress.data.axes import batch_axes
from onnxcompress.data.batch import Data
from onnxcompress.data.specs import input_specs
from onnxcompress.errors import DataError, ModelError
from onnxcompress.model.shapes import shapes as inferred
from onnxcompress.training import causal
from onnxcompress.training.choice import choose
from onnxcompress.training.heads import Head
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
) -> list[Target]:
    """What each output is trained on, from what the teacher gives for a few samples."""
    count = size or PROBED
    looks = [np.arange(at, at + count) % all_samples.count for at in range(0, PROBED, count)]
    calls = [all_samples.rows(look) for look in looks]
    seen = [guide.logits(feeds) for feeds in calls]
    found = {s.output: np.concatenate([each[t.output] for each in seen]) for s, t in pairs}
    shapes = {name: array.shape for name, array in found.items()}
    along = {s.output: guide.along(t.output) for s, t in pairs}
    _check_shapes(pairs, shapes, student, along)
    tokens = None
    if all_samples.labels is None and objective.loss in ("auto", "classes"):
        outputs = {s.output: t.output for s, t in pairs if s.kind != "feature"}
        shapes = {name: shapes[name] for name in outputs}
        tokens = causal.next_tokens(guide.logits, calls[0], all_samples, shapes, outputs)
    chosen = choose(pairs, found, all_samples, objective, soft=soft, next_tokens=tokens)
    return [dataclasses.replace(target, along=along[target.head.output]) for target in chosen]


def _check_shapes(
    pairs: Sequence[tuple[Head, Head]],
    shapes: Mapping[str, tuple[int, ...]],
    student: ir.Model,
    along: Mapping[str, int],
) -> None:
    declared: dict[str, Sequence[object] | None]
    declared = {str(v.name): None if v.shape is None else list(v.shape) for v in student.graph.outputs}
    if any(head.kind == "feature" for head, _ in pairs):
        known = inferred(student)
        for head, _ in pairs:
            info = known.get(head.logits)
            if head.kind == "feature" and info is not None:
                declared[head.output] = info.dims
    for head, theirs in pairs:
        mine, given = declared.get(head.output), shapes[head.output]
        if not mine or (head.kind not in ("values", "feature") and len(mine) != len(given)):
            continue
        at = along[head.output]
        mine = [mine[at], *(dim for axis, dim in enumerate(mine) if axis != at)]
        fixed = [(a, b) for a, b in list(zip(mine, given, strict=False))[1:] if isinstance(a, int) and a > 0]
        if len(mine) != len(given) or any(a != b for a, b in fixed):
            what = "tensor" if head.kind == "feature" else "output"
            own, other = (h.output.removeprefix("feature ") for h in (head, theirs))
            raise ModelError(
                f"the student's {what} {own!r} is [{', '.join(str(d) for d in mine)}], "
                f"the teacher's {other!r} is {list(given)}: they do not fit"
            )


def check_inputs(original: ir.Model, data: Data) -> None:
    """The teacher runs on the student's feeds."""
    known = {spec.name for spec in data.specs}
    for spec in input_specs(original):
        if spec.name not in known:
            raise ModelError(
                f"the teacher wants an input {spec.name!r} that the student does not have "
                f"({', '.join(sorted(known))}): they do not fit"
            )


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
