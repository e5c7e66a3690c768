"""Runs a recipe's passes over a model: checks, accounts, undoes what fails, and resumes what was interrupted."""

from __future__ import annotations

import dataclasses
import pathlib
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir as ir

from onnxcompress.contract import Coverage, Feeder, Left, Pass, Progress, Reason, Run, Silent
from onnxcompress.encodings import functions
from onnxcompress.errors import DataError, OnnxCompressError, PassError
from onnxcompress.lift import lift
from onnxcompress.model import bridge
from onnxcompress.model.sizes import marked_bytes, saved_bytes
from onnxcompress.model.weights import weights
from onnxcompress.proof import Prover
from onnxcompress.recipe import Recipe, Step, parameters
from onnxcompress.resume import Workplace
from onnxcompress.steps import StepReport

WORTH_KEEPING = 2.0  # seconds of work from which the model after a pass is stored for --resume


@dataclasses.dataclass
class Outcome:
    """The model a recipe made, and what each step did."""

    model: ir.Model
    steps: list[StepReport]

    @property
    def changed(self) -> bool:
        """True when any pass changed anything."""
        return any(step.coverage.changed for step in self.steps if step.skipped is None)


@dataclasses.dataclass
class Conditions:
    """Everything around a recipe: see `contract.Run` for what passes get to see of it.

    `sample`: where the one call comes from on which the model is compared after each pass; made up when None.
    `reading`: how data is read, for passes that open some of their own.
    """

    target: str = "cpu"
    seed: int = 0
    threads: int = 1
    prefer: str = "size"
    feeds: Feeder | None = None
    sample: Feeder | None = None
    reading: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    evaluate: Callable[[ir.Model], float] | None = None
    higher_is_better: bool = True
    score_before: float | None = None
    progress: Progress = dataclasses.field(default_factory=Silent)
    on_step: Callable[[StepReport], None] | None = None


def run(
    model: ir.Model, recipe: Recipe, conditions: Conditions, workplace: Workplace, *, resume: bool = False
) -> Outcome:
    """Run `recipe` over `model`, which is changed in place as far as its passes go.

    After each pass the model is checked, loaded and run by ONNX Runtime beside the original; a model above 2 GB once,
    at the end. A pass that fails, or whose result is larger than before, is undone.

    Raises:
        PassError: a pass failed and its step says `on_error: stop`; its message names the pass.
        OnnxCompressError: the model cannot be run at all, or calibration data is missing.
    """
    run_of = Run(
        work=workplace.folder,
        target=conditions.target,
        seed=conditions.seed,
        threads=conditions.threads,
        prefer=conditions.prefer,
        progress=conditions.progress,
        feeds=conditions.feeds,
        evaluate=conditions.evaluate,
        higher_is_better=conditions.higher_is_better,
        original=copy(model),
        reading=conditions.reading,
    )
    _check_needs(recipe, run_of)
    steps: list[StepReport] = []
    start = time.perf_counter()
    with Prover(model, conditions.sample or conditions.feeds, conditions.seed, workplace.folder) as prover:
        if resume and (found := workplace.resume(recipe)) is not None:
            model, steps = found
            for step in steps:
                _tell(conditions, step)
        for index in range(len(steps), len(recipe.steps)):
            last = index == len(recipe.steps) - 1
            run_of.state = workplace.state_of(recipe, index)
            model, report = _one(model, recipe.steps[index], run_of, prover, _score(steps, conditions))
            if last and prover.large:
                _prove_large(model, [*steps, report], prover, run_of)
            steps.append(report)
            _tell(conditions, report)
            if not last and time.perf_counter() - start > WORTH_KEEPING:
                workplace.keep(model, recipe, steps)
    return Outcome(model, steps)


def _check_needs(recipe: Recipe, run_of: Run) -> None:
    for step in recipe.steps:
        lacking = step.run.lacks(run_of)
        if lacking:
            raise DataError(f"{step.name} {lacking}")


def _tell(conditions: Conditions, step: StepReport) -> None:
    if conditions.on_step is not None:
        conditions.on_step(step)


def _score(steps: list[StepReport], conditions: Conditions) -> float | None:
    """The score of the model as it stands after `steps`."""
    return next((step.score for step in reversed(steps) if step.score is not None), conditions.score_before)


def _prove_large(model: ir.Model, steps: list[StepReport], prover: Prover, run_of: Run) -> None:
    """Prove, once at the end, a model too large to be proved after each pass, whichever pass was the last to change it.

    Raises:
        PassError: it does not hold; all that was done is lost, since nobody knows which pass broke it.
    """
    changed = [step for step in steps if step.coverage.changed and step.skipped is None]
    if not changed:
        return
    try:
        changed[-1].proof = prover.prove(model)
    except PassError as error:
        raise PassError(f"{', '.join(step.name for step in changed)}: {error}") from error
    if run_of.evaluate is not None:
        changed[-1].score = run_of.evaluate(model)


def _one(model: ir.Model, step: Step, run_of: Run, prover: Prover, score: float | None) -> tuple[ir.Model, StepReport]:
    """Run one step; returns the model to go on with (the one before it, if the step was undone) and its report."""
    start = time.perf_counter()
    before = {weight.key: weight.nbytes for weight in weights(model)}
    size = saved_bytes(model)
    backup = copy(model)
    report = StepReport(step.name, parameters(step.run), 0.0, size, size, Coverage(), score_before=score)
    try:
        report.coverage = _apply(step.run, model, run_of, prover)
        functions.refresh(model)
        check_coverage(step.run, before, report.coverage)
        report.bytes_after = saved_bytes(model)
        if report.bytes_after > size + marked_bytes(model):
            raise _Grew(f"would make the file larger ({size:,} -> {report.bytes_after:,} bytes)")
        if report.coverage.changed and not prover.large:
            report.proof = prover.prove(model)
            if run_of.evaluate is not None:
                report.score = run_of.evaluate(model)
    except _Grew as grew:
        model = _undo(backup, report, before, size, str(grew), Reason.TOO_SMALL)
    except MemoryError:
        raise
    except Exception as error:
        known = error if isinstance(error, OnnxCompressError) else _surprise(error)
        if step.on_error == "stop":
            raise type(known)(f"{step.name}: {known}") from error
        model = _undo(backup, report, before, size, str(known), Reason.FAILED)
    report.seconds = time.perf_counter() - start
    return model, report


def _apply(the_pass: Pass, model: ir.Model, run_of: Run, prover: Prover) -> Coverage:
    """The pass's work, on a model lifted to the opset it needs.

    Raises:
        PassError: the model has an older opset and cannot be lifted.
    """
    opset, needed = model.opset_imports.get("", 1), the_pass.needs.opset
    if opset < needed:
        why = lift(model, needed, [prover.feeds])
        if why:
            raise PassError(f"needs opset {needed}, the model has {opset} and cannot be lifted: {why}")
    return the_pass.apply(model, run_of)


def _surprise(error: Exception) -> PassError:
    """What no pass should raise, as an error that says where it came from."""
    at = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{pathlib.Path(at.filename).name}:{at.lineno}"
    return PassError(f"raised {type(error).__name__}: {error} (at {where}; a bug of the pass)")


class _Grew(Exception):
    """The pass's result is larger than what it was given."""


def _undo(
    backup: ir.Model, report: StepReport, before: dict[str, int], size: int, why: str, reason: Reason
) -> ir.Model:
    report.skipped, report.bytes_after, report.proof, report.score = why, size, None, None
    report.coverage = Coverage(
        left=[Left(key, count, reason, why) for key, count in before.items()], warnings=[f"undone: {why}"]
    )
    return backup


def copy(model: ir.Model) -> ir.Model:
    """A model that can be changed without changing `model`; tensors are shared."""
    return bridge.clone(model)


def check_coverage(of: Pass, before: dict[str, int], coverage: Coverage) -> None:
    """Every weight there was must be touched or left.

    Raises:
        PassError: the pass lost count of a weight, tells two things of one, or speaks of one there was not.
    """
    counted = Counter([t.key for t in coverage.touched] + [entry.key for entry in coverage.left])
    twice = [key for key, count in counted.items() if count > 1]
    if twice:
        raise PassError(f"accounts for the weight {twice[0]!r} more than once (a bug of the pass)")
    told = coverage.keys()
    lost = [key for key in before if key not in told]
    if lost:
        raise PassError(f"does not say what it did to {len(lost)} weights, {lost[0]!r} among them (a bug of the pass)")
    unknown = sorted(told - before.keys())
    if unknown:
        raise PassError(f"speaks of a weight {unknown[0]!r} that the model does not have (a bug of the pass)")
