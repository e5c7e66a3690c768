"""Distillation and finetuning: a student learns from a teacher, from labels, or from both, and keeps its structure.

G. Hinton, O. Vinyals, J. Dean: Distilling the knowledge in a neural network, 2015. What the encodings of the student's
weights fix (zeros, codes, integers) stays fixed: the optimizer only sees their parameters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxcompress.data.batch import Data
from onnxcompress.errors import PassError
from onnxcompress.model import bridge
from onnxcompress.training import feeding, heads, matching, optimizers, samples, step, targets
from onnxcompress.training.average import Average
from onnxcompress.training.checkpoint import Checkpoints
from onnxcompress.training.feeding import Feeder
from onnxcompress.training.gradual import Gradual, restated, rise
from onnxcompress.training.heads import Head
from onnxcompress.training.loop import Loop, Plan, is_better
from onnxcompress.training.order import Order
from onnxcompress.training.result import Trained, told, write
from onnxcompress.training.runner import Runner
from onnxcompress.training.schedules import Schedule
from onnxcompress.training.settings import Conditions, Evaluation, Settings, identity, pace
from onnxcompress.training.step import TrainingGraph
from onnxcompress.training.targets import Objective, Target
from onnxcompress.training.teacher import Teacher
from onnxcompress.training.words import used
from onnxcompress.training.zeros import Keeping

__all__ = ["Conditions", "Evaluation", "Settings", "Trained", "distill", "write"]


def distill(
    original: ir.Model | None,
    student: ir.Model,
    data: Data,
    *,
    objective: Objective | None = None,
    settings: Settings | None = None,
    evaluation: Evaluation | None = None,
    reference: ir.Model | None = None,
    conditions: Conditions | None = None,
) -> Trained:
    """Train `student` on `data` against the outputs of `original`, and against labels where the data has them.

    `original` None: labels alone. Neither model is changed. Labels are not needed with a teacher; a causal language
    model without any learns its own next tokens beside the teacher's. `reference`: what the student was made from,
    where that is not the teacher; it tells pruned zeros from others.

    Where the evaluation knows the score `before`, the student as it came in is epoch 0: where it scores better than
    every epoch, no parameters are returned. An epoch that scores the same goes before it. With gradual pruning there is
    no epoch 0, since it has not the sparsity that is asked for.

    Raises:
        ModelError: teacher and student do not fit.
        DataError: the data lacks an input, labels fit no output or are out of range.
        PassError: nothing can be trained, or the loss is no longer finite.
        NoGradient: an operator between weights and loss has no gradient.
    """
    objective, settings = objective or Objective(), settings or Settings()
    conditions = conditions or Conditions()
    inputs = matching.inputs_of(original, data.specs, settings.inputs)
    all_samples = samples.collect(data, conditions.work)
    pairs, alone = _paired(original, student, objective, settings)
    size = matching.batch_of(student, original, all_samples.count)
    provider, threads = conditions.provider, conditions.threads
    with contextlib.ExitStack() as stack:
        source, theirs = original if original is not None else student, [head for _, head in pairs]
        guide = stack.enter_context(Teacher(source, theirs, inputs=inputs, provider=provider, threads=threads))
        soft = original is not None
        chosen = matching.matched(pairs, student, guide, all_samples, objective, size, soft=soft, provider=provider)
        keeping = Keeping(settings.keep_zeros, student, original if reference is None else reference)
        graph = _graph(student, data, chosen, objective, settings, keeping)
        batch = _batch(settings.batch, all_samples.count, size, is_whole=bool(graph.running))
        chosen = feeding.cached(chosen, pairs, guide, all_samples, size or batch, conditions)
        whole = bool(graph.running) or provider != "cpu"  # statistics of a batch are of all of it
        plan = Plan(
            settings.epochs_of(all_samples.count / batch),
            size or (batch if whole else samples.call_size(batch)),
            settings.patience,
            evaluation.higher_is_better if evaluation else True,
        )
        feeder = Feeder(chosen, {s.output: t.output for s, t in pairs}, guide, all_samples)
        order = Order(all_samples.count, batch, settings.seed, all_samples.lengths)
        runner = stack.enter_context(
            Runner(graph, provider=provider, threads=threads, same_shapes=not all_samples.groups)
        )
        known = identity(settings, objective, conditions.identity)
        checkpoints = Checkpoints(conditions.work, known, pace(settings))
        score = _scorer(student, graph, evaluation)
        loop = _loop(stack, graph, runner, order, feeder, plan, checkpoints, score, settings, conditions)
        values = loop.run(resume=conditions.resume)
    parameters, left, kept = graph.trained(values), graph.left, loop.kept
    before = evaluation.before if evaluation is not None and settings.sparsity is None else None
    if before is not None and is_better(before, loop.score, plan.higher_is_better):
        why = "left as it came in: no epoch scores as well"
        parameters, left, kept = {}, {**left, **dict.fromkeys(parameters, why)}, 0
    losses = _said(chosen, pairs, alone, objective, soft=soft)
    in_force = used(settings, objective, chosen, epochs=plan.epochs, batch=batch)
    return Trained(parameters, loop.history, left, losses, loop.steps, kept, in_force)


def _graph(
    student: ir.Model,
    data: Data,
    chosen: Sequence[Target],
    objective: Objective,
    settings: Settings,
    keeping: Keeping,
) -> TrainingGraph:
    """The step that trains `student` on what was chosen."""
    return step.build(
        step.forward(heads.laid_out(student, [target.head for target in chosen]), data.feeds()),
        [target.value for target in chosen],
        targets.write_all(chosen, objective),
        optimizers.named(settings.optimizer, settings.weight_decay, settings.momentum),
        l1=objective.l1,
        clip=settings.clip,
        relative=settings.relative and settings.optimizer == "adamw",
        batch_statistics=settings.batch_norm == "trained",
        allows=settings.select.allows,
        learn_scales=settings.learn_scales,
        restate=keeping if settings.sparsity is None else restated(keeping),
    )


def _scorer(
    student: ir.Model, graph: TrainingGraph, evaluation: Evaluation | None
) -> Callable[[Mapping[str, np.ndarray]], float] | None:
    """From values of a step to the score of the student that they make; None where nothing is evaluated."""
    if evaluation is None:
        return None

    def score(values: Mapping[str, np.ndarray]) -> float:
        candidate = bridge.clone(student)
        write(candidate, graph.trained(values))
        return evaluation.score(candidate)

    return score


def _loop(
    stack: contextlib.ExitStack,
    graph: TrainingGraph,
    runner: Runner,
    order: Order,
    feeder: Feeder,
    plan: Plan,
    checkpoints: Checkpoints,
    score: Callable[[Mapping[str, np.ndarray]], float] | None,
    settings: Settings,
    conditions: Conditions,
) -> Loop:
    """The loop with all that moves in it: learning rate, average, masks that grow."""
    total = order.updates(plan.epochs)
    schedule = Schedule(settings.peak, total, settings.schedule, settings.warmup)
    average = gradual = None
    if settings.ema is not None:
        average = Average(graph, runner, settings.ema, conditions.provider, conditions.threads)
        stack.callback(average.close)
    if settings.sparsity is not None:
        gradual = Gradual(graph, rise(settings.sparsity, total, settings.sparsity_until))
    if conditions.resume and checkpoints.foreign:
        conditions.say("what was kept is of other settings, data or versions: starting over")
    elif conditions.resume and (changed := checkpoints.changed):
        words = (f"{name} {now or 0:g} in place of {kept or 0:g}" for name, (kept, now) in changed.items())
        conditions.say(f"going on with {', '.join(words)}")
    told = conditions.on_epoch
    return Loop(
        graph, runner, order, feeder, plan, schedule, checkpoints, conditions.progress, score, told, average, gradual
    )


def _said(
    chosen: Sequence[Target],
    pairs: Sequence[tuple[Head, Head]],
    alone: Sequence[str],
    objective: Objective,
    *,
    soft: bool,
) -> dict[str, str]:
    """What each output was trained on, in words; those of the student that were not, with the reason."""
    losses = {target.head.output: told(target, objective) for target in chosen}
    losses |= dict.fromkeys(alone, "not learned, the teacher has no such output")
    if not soft:
        (labelled,) = losses
        others = (head.output for head, _ in pairs if head.output != labelled)
        losses |= dict.fromkeys(others, f"not learned, the labels are {labelled}'s")
    return losses


def _paired(
    original: ir.Model | None, student: ir.Model, objective: Objective, settings: Settings
) -> tuple[list[tuple[Head, Head]], list[str]]:
    """The student's heads and features, each with the teacher's; and its outputs that the teacher has not.

    Without a teacher each stands beside itself.
    """
    mine = heads.chosen(heads.heads(student), settings.outputs, "the student")
    pairs = [(head, head) for head in mine]
    if original is not None:
        pairs = heads.pairs(mine, heads.heads(original), settings.outputs)
    alone = [head.output for head in mine if all(head is not paired for paired, _ in pairs)]
    return pairs + heads.features(objective.features, student, original), alone


def _batch(wanted: int, count: int, size: int | None, *, is_whole: bool) -> int:
    """Samples an update: as many as `wanted` and `count` have room for, in whole calls of `size`.

    Raises:
        PassError: it is one sample, of which a normalization shall take statistics (`is_whole`).
    """
    unit = size or 1
    batch = max(min(wanted, count) // unit, 1) * unit
    if is_whole and (size == 1 or batch == 1):
        why = "a batch that is fixed to 1 sample: free the batch" if size == 1 else "batches of 1 sample: take more"
        raise PassError(f"BatchNormalization cannot be trained on {why}, or keep its statistics frozen")
    return batch
