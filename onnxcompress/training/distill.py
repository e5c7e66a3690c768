"""Distillation and finetuning: a student learns from a teacher, from labels, or from both, and keeps its structure.

G. Hinton, O. Vinyals, J. Dean: Distilling the knowledge in a neural network, 2015. What the encodings of the student's
weights fix (zeros, codes, integers) stays fixed: the optimizer only sees their parameters.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcompress.contract import Progress, Select, Silent
from onnxcompress.data.batch import Data
from onnxcompress.data.specs import input_specs
from onnxcompress.errors import DataError, ModelError, PassError
from onnxcompress.model import bridge, provenance
from onnxcompress.model.weights import weights
from onnxcompress.numerics.error import relative_rms
from onnxcompress.training import causal, heads, optimizers, samples, step, targets, teacher
from onnxcompress.training.checkpoint import Checkpoints
from onnxcompress.training.heads import Head
from onnxcompress.training.loop import Epoch, Loop, Plan
from onnxcompress.training.runner import Runner
from onnxcompress.training.samples import Samples
from onnxcompress.training.schedules import Kind, Schedule
from onnxcompress.training.targets import Objective, Target
from onnxcompress.training.teacher import Teacher

PROBED = 32  # samples from which the losses and the temperature are chosen
RATES = {"adamw": 1e-3, "sgd": 1e-2}


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to train. The defaults heal a compressed model without tuning.

    `batch`: samples an update. `lr`: peak learning rate; None is 1e-3 for AdamW, 1e-2 for SGD. `clip`: the norm
    gradients are clipped to, None for not at all. `relative`: AdamW's steps are in proportion to each weight's
    magnitude, so that one learning rate serves every model; False gives textbook AdamW.
    `outputs`: names of the student's outputs to learn, empty for all. `patience`: see `loop.Plan`.
    """

    epochs: int = 3
    batch: int = 32
    lr: float | None = None
    optimizer: str = "adamw"
    weight_decay: float | None = None
    momentum: float = 0.9
    schedule: Kind = "cosine"
    warmup: float = 0.05
    clip: float | None = 1.0
    relative: bool = True
    seed: int = 0
    outputs: tuple[str, ...] = ()
    patience: int | None = None
    select: Select = dataclasses.field(default_factory=Select)

    @property
    def peak(self) -> float:
        """The learning rate that is used."""
        return RATES[self.optimizer] if self.lr is None else self.lr


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A score to keep the best epoch by. `patience` of the settings counts epochs without a better one."""

    score: Callable[[ir.Model], float]
    higher_is_better: bool = True


@dataclasses.dataclass(frozen=True)
class Trained:
    """What was learned.

    `parameters`: weight key -> part of its encoding -> array. `left`: weights that were not trained, with the reason.
    `losses`: what each output was trained on, in words.
    """

    parameters: dict[str, dict[str, np.ndarray]]
    epochs: list[Epoch]
    left: dict[str, str]
    losses: dict[str, str]
    steps: int


@dataclasses.dataclass(frozen=True)
class Conditions:
    """Where and how a training runs; nothing of it but `provider` and `threads` may change the result.

    `work`: folder for checkpoints and large arrays; None keeps no checkpoint.
    """

    provider: str = "cpu"
    threads: int = 1
    work: pathlib.Path | None = None
    resume: bool = False
    progress: Progress = dataclasses.field(default_factory=Silent)
    on_epoch: Callable[[Epoch], None] | None = None
    identity: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def distill(
    original: ir.Model | None,
    student: ir.Model,
    data: Data,
    *,
    objective: Objective | None = None,
    settings: Settings | None = None,
    evaluation: Evaluation | None = None,
    conditions: Conditions | None = None,
) -> Trained:
    """Train `student` on `data` against the outputs of `original`, and against labels where the data has them.

    `original` None: labels alone. Neither model is changed. Labels are not needed with a teacher; a causal language
    model without any learns its own next tokens beside the teacher's.

    Raises:
        ModelError: teacher and student do not fit.
        DataError: the data lacks an input, labels fit no output or are out of range.
        PassError: nothing can be trained, or the loss is no longer finite.
        NoGradient: an operator between weights and loss has no gradient.
    """
    objective, settings = objective or Objective(), settings or Settings()
    conditions = conditions or Conditions()
    if original is not None:
        _check_inputs(original, data)
    all_samples = samples.collect(data, conditions.work)
    mine = heads.chosen(heads.heads(student), settings.outputs, "the student")
    pairs = [(head, head) for head in mine]
    if original is not None:
        pairs = heads.pairs(mine, heads.heads(original))
    size = _fixed_batch(student) or _fixed_batch(original)
    with contextlib.ExitStack() as stack:
        source = original if original is not None else student
        guide = stack.enter_context(
            Teacher(source, [t for _, t in pairs], provider=conditions.provider, threads=conditions.threads)
        )
        chosen = _targets(pairs, student, guide, all_samples, objective, size, soft=original is not None)
        graph = step.build(
            step.forward(student, data.feeds()),
            [target.head.logits for target in chosen],
            targets.write_all(chosen, objective),
            optimizers.named(settings.optimizer, settings.weight_decay, settings.momentum),
            clip=settings.clip,
            relative=settings.relative and settings.optimizer == "adamw",
            accumulate=size is not None and settings.batch > size,
            allows=settings.select.allows,
        )
        chosen = _cached(chosen, pairs, guide, all_samples, size or settings.batch, conditions)
        feeder = _Feeder(chosen, {s.output: t.output for s, t in pairs}, guide, all_samples)
        plan = Plan(
            settings.epochs,
            max(settings.batch, size or 1) // (size or 1) * (size or 1),
            size or settings.batch,
            settings.seed,
            settings.patience,
            evaluation.higher_is_better if evaluation else True,
        )
        total = plan.steps(all_samples) * plan.epochs
        schedule = Schedule(settings.peak, total, settings.schedule, settings.warmup)
        runner = stack.enter_context(Runner(graph, provider=conditions.provider, threads=conditions.threads))
        history: list[Epoch] = []

        def finished(epoch: Epoch) -> None:
            history.append(epoch)
            if conditions.on_epoch is not None:
                conditions.on_epoch(epoch)

        def score(values: Mapping[str, np.ndarray]) -> float:
            assert evaluation is not None
            candidate = bridge.clone(student)
            write(candidate, graph.trained(values))
            return evaluation.score(candidate)

        loop = Loop(
            graph,
            runner,
            all_samples,
            feeder,
            plan,
            schedule,
            Checkpoints(conditions.work, _identity(settings, objective, conditions.identity)),
            conditions.progress,
            score if evaluation is not None else None,
            finished,
        )
        values = loop.run(resume=conditions.resume)
    losses = {target.head.output: _said(target, objective) for target in chosen}
    return Trained(graph.trained(values), history, graph.left, losses, total)


def write(
    model: ir.Model, trained: Mapping[str, Mapping[str, np.ndarray]], work: pathlib.Path | None = None
) -> dict[str, float]:
    """Put trained parameters into the encodings of `model`'s weights, in place; the relative change of each weight."""
    errors = {}
    found = {weight.key: weight for weight in weights(model, work)}
    for key, parts in trained.items():
        if key not in found:
            raise PassError(f"the weight {key!r} was lost in training (a bug)")
        weight = found[key]
        before = weight.array()
        new = weight.encoding.updated(parts)
        errors[key] = relative_rms(before, new.decode())
        weight.replace(new)
    return errors


class _Feeder:
    """All inputs of a call: the samples', and the targets'."""

    def __init__(
        self, chosen: Sequence[Target], teacher_of: Mapping[str, str], guide: Teacher, all_samples: Samples
    ) -> None:
        self._targets, self._teacher_of, self._guide, self._samples = chosen, teacher_of, guide, all_samples
        self._lengths = {n: a.shape[1] for n, a in all_samples.feeds.items() if a.ndim >= 2}

    def __call__(self, indices: np.ndarray) -> Mapping[str, np.ndarray]:
        feeds, valid = self._samples.call(indices)
        cut = None
        for name, length in self._lengths.items():
            if feeds[name].shape[1] != length:
                cut = (length, feeds[name].shape[1])
        live = None
        if any(target.soft and target.teacher is None for target in self._targets):
            live = self._guide.logits(feeds)
        for target in self._targets:
            logits = None if live is None or not target.soft else live[self._teacher_of[target.head.output]]
            feeds |= target.feeds(indices, logits, valid, cut)
        return feeds


def _targets(
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
    calls = [
        {name: np.asarray(a[look]) for name, a in all_samples.feeds.items()} | all_samples.constants for look in looks
    ]
    seen = [guide.logits(feeds) for feeds in calls]
    found = {s.output: np.concatenate([each[t.output] for each in seen]) for s, t in pairs}
    shapes = {name: array.shape for name, array in found.items()}
    _check_shapes(pairs, shapes, student)
    tokens = None
    if all_samples.labels is None and objective.loss in ("auto", "classes"):
        outputs = {s.output: t.output for s, t in pairs}
        tokens = causal.next_tokens(guide.logits, calls[0], all_samples, shapes, outputs)
    return targets.choose(pairs, found, all_samples, objective, soft=soft, next_tokens=tokens)


def _check_shapes(pairs: Sequence[tuple[Head, Head]], shapes: Mapping[str, tuple[int, ...]], student: ir.Model) -> None:
    declared = {value.name: value.shape for value in student.graph.outputs}
    for head, theirs in pairs:
        mine, given = declared.get(head.output), shapes[head.output]
        if mine is None or (head.kind != "values" and len(mine) != len(given)):
            continue
        fixed = [(a, b) for a, b in list(zip(mine, given, strict=False))[1:] if isinstance(a, int) and a > 0]
        if len(mine) != len(given) or any(a != b for a, b in fixed):
            raise ModelError(
                f"the student's output {head.output!r} is [{', '.join(str(d) for d in mine)}], "
                f"the teacher's {theirs.output!r} is {list(given)}: they do not fit"
            )


def _cached(
    chosen: Sequence[Target],
    pairs: Sequence[tuple[Head, Head]],
    guide: Teacher,
    all_samples: Samples,
    size: int,
    conditions: Conditions,
) -> list[Target]:
    if not any(target.soft for target in chosen):
        return list(chosen)
    stored = teacher.cache(guide, all_samples, size, conditions.work, conditions.progress)
    if stored is None:
        return list(chosen)
    teacher_of = {s.output: t.output for s, t in pairs}
    return [dataclasses.replace(target, teacher=stored[teacher_of[target.head.output]]) for target in chosen]


def _check_inputs(original: ir.Model, data: Data) -> None:
    """The teacher runs on the student's feeds."""
    known = {spec.name for spec in data.specs}
    for spec in input_specs(original):
        if spec.name not in known:
            raise ModelError(
                f"the teacher wants an input {spec.name!r} that the student does not have "
                f"({', '.join(sorted(known))}): they do not fit"
            )


def _fixed_batch(model: ir.Model | None) -> int | None:
    """The fixed first axis of a model's inputs, None where it is free."""
    if model is None:
        return None
    firsts = [spec.shape[0] for spec in input_specs(model) if spec.shape]
    sizes = {dim for dim in firsts if isinstance(dim, int)}
    if len(sizes) > 1:
        raise DataError("inputs with different fixed first axes cannot be trained in batches")
    return next(iter(sizes), None)


def _identity(settings: Settings, objective: Objective, rest: Mapping[str, Any]) -> str:
    what = {
        "settings": dataclasses.asdict(settings),
        "objective": dataclasses.asdict(objective),
        "versions": provenance.versions(),
        **rest,
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()


def _said(target: Target, objective: Objective) -> str:
    """One target in words."""
    parts = []
    if target.labels is not None:
        alpha = objective.share if target.soft else 1.0
        names = {"classes": "cross-entropy", "binary": "binary cross-entropy", "values": "squared error"}
        parts.append(f"{alpha:g} x {names.get(target.kind, target.kind)}")
    if target.soft:
        share = f"{1 - objective.share:g} x " if parts else ""
        soft = target.kind in ("classes", "binary")
        parts.append(f"{share}{f'soft targets at T = {target.temperature:.4g}' if soft else target.kind}")
    return " + ".join(parts)
