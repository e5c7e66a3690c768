"""One training from file to file: what the command line does, for Python."""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any

import onnx_ir as ir

from onnxcompress.api import DataOptions
from onnxcompress.contract import Progress, Silent
from onnxcompress.data.batch import Data
from onnxcompress.data.source import open_data
from onnxcompress.data.specs import input_specs
from onnxcompress.errors import DataError, MetricError, PassError
from onnxcompress.model import bridge, provenance
from onnxcompress.model.load import load, source_of
from onnxcompress.model.save import Saved, refuse_bad_target, save
from onnxcompress.proof import Prover
from onnxcompress.resume import workplace
from onnxcompress.runtime.session import open_session
from onnxcompress.training.checkpoint import Epoch
from onnxcompress.training.distill import Conditions, Evaluation, Settings, Trained, distill, write
from onnxcompress.training.initial import randomize
from onnxcompress.training.runner import cores
from onnxcompress.training.targets import Objective
from onnxcompress.validation.metrics import metric_named

Path = str | os.PathLike[str]


def train(
    teacher: Path | None,
    student: Path,
    out: Path,
    *,
    data: Any,
    reading: DataOptions | None = None,
    settings: Settings | None = None,
    objective: Objective | None = None,
    evaluate: Any = None,
    metric: Any = None,
    provider: str = "cpu",
    threads: int | None = None,
    resume: bool = False,
    init: str = "keep",
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Train the model at `student` and save it at `out`; returns the report.

    `init` "random" draws the weights anew first (`initial.randomize`); BatchNormalization is then trained, too, where
    the settings do not say. `evaluate`, `metric`: what the best epoch is kept by; the weights that came in are epoch 0,
    so that the result is never worse than they are, but with random ones and with gradual pruning. `threads`: None for
    as many as there are cores; the result does not depend on it.

    Raises:
        OnnxCompressError: one line; nothing is written.
    """
    objective, threads = objective or Objective(), threads or cores()
    settings = settings or Settings()
    if init == "random" and settings.batch_norm is None:
        settings = dataclasses.replace(settings, batch_norm="trained")
    _check(objective, settings, evaluate, metric, init, teacher)
    work = _read(teacher, student, pathlib.Path(out), data, evaluate, reading or DataOptions(), settings.batch)
    work.identity |= {"metric": str(metric), "init": init, "provider": provider}
    if init == "random":
        randomize(work.student, settings.seed)
    with workplace(work.out, work.identity, resume=resume) as place:
        conditions = Conditions(
            provider=provider,
            threads=threads,
            work=place.state("training") or place.folder,
            resume=resume,
            progress=progress or Silent(),
            on_epoch=lambda epoch: say(_told(epoch)),
            say=say,
            identity=work.identity,
        )
        evaluation, before = None, None
        if work.judged is not None:
            evaluation = _evaluation(work.student, work.judged, metric)
            before = evaluation.before
            say(f"before: score {before:.4f}")
            if init == "random":  # what was drawn is no model that anybody came with
                evaluation = dataclasses.replace(evaluation, before=None)
        done = distill(
            work.teacher,
            work.student,
            work.data,
            objective=objective,
            settings=settings,
            evaluation=evaluation,
            conditions=conditions,
        )
        saved, changes = _save(work, done, settings, conditions.work)
    say(_summary(done))
    if evaluation is not None and before is not None:
        say(_choice(done, before, evaluation.higher_is_better))
    say(f"{saved.path}: saved, {saved.bytes:,} bytes")
    used = {**done.used, "init": init, "provider": provider, "metric": None if metric is None else str(metric)}
    digests = {name: work.identity[name] for name in ("teacher", "student", "data", "evaluate")}
    return {
        **_report(done, changes),
        "before": before,
        "kept_epoch": done.kept,
        "settings": used,
        "sha256": digests,
        "versions": provenance.versions(),
    }


@dataclasses.dataclass
class _Work:
    """What was read. `identity`: digests of all of it, which a checkpoint must have been made with."""

    teacher: ir.Model | None
    student: ir.Model
    out: pathlib.Path
    data: Data
    judged: Data | None
    identity: dict[str, Any]


def _read(
    teacher: Path | None, student: Path, out: pathlib.Path, data: Any, evaluate: Any, reading: DataOptions, batch: int
) -> _Work:
    """Models and data, opened; `out` is refused where it cannot be written or would destroy what is read."""
    model = load(student)
    original = load(teacher) if teacher is not None else None
    for read in (model, original):
        if read is not None:
            refuse_bad_target(out, read)
    specs = input_specs(model)
    options: dict[str, Any] = {"mapping": reading.mapping, "preprocess": reading.preprocess, "labels": reading.labels}
    source = open_data(data, specs, **options, batch=batch, limit=reading.limit, trim=False, last="fill")
    judged = open_data(evaluate, specs, **options, last="fill") if evaluate is not None else None
    digests = {"student": _digest(model), "teacher": _digest(original), "data": source.digest()}
    digests["evaluate"] = judged.digest() if judged is not None else ""
    return _Work(original, model, out, source, judged, digests)


def _save(
    work: _Work, done: Trained, settings: Settings, folder: pathlib.Path | None
) -> tuple[Saved, dict[str, float]]:
    """Put what was learned into a copy of the student, prove it, sign it and save it; how far each weight moved."""
    trained = bridge.clone(work.student)
    changes = write(trained, done.parameters, folder)
    _prove(work.student, trained, work.data)
    text = f"distill {sorted(done.losses.items())} {settings}" if work.teacher is not None else f"train {settings}"
    found = provenance.Provenance(
        parent=work.identity["student"],
        recipe=text,
        data=work.identity["data"],
        versions=provenance.versions(),
        seed=settings.seed,
    )
    provenance.write(trained, found)
    return save(trained, work.out), changes


def _choice(done: Trained, before: float, higher: bool) -> str:
    """Which epoch was kept, in words."""
    scores = [epoch.score for epoch in done.epochs if epoch.score is not None and not math.isnan(epoch.score)]
    best = (max if higher else min)(scores, default=math.nan)
    if done.kept == 0:
        return f"kept the model as it came in, which scores {before:.4f}: the best epoch scores {best:.4f}"
    if done.kept is None:
        return f"warning: no epoch has a score; the last one is kept, the model before scores {before:.4f}"
    score = done.epochs[done.kept - 1].score
    assert score is not None
    told = f"kept epoch {done.kept}, which scores {score:.4f}, {before:.4f} before"
    is_worse = score < before if higher else score > before
    return f"warning: {told}: it is worse" if is_worse else told


def _check(
    objective: Objective, settings: Settings, evaluate: Any, metric: Any, init: str, teacher: Path | None
) -> None:
    if init not in ("keep", "random"):
        raise PassError(f"init: wanted keep or random, got {init!r}")
    if teacher is None and any("=" in name for name in settings.outputs):
        raise PassError(f"--output {settings.outputs[0]}: names a teacher's output, and there is no teacher")
    if (evaluate is None) != (metric is None):
        raise MetricError("--eval and --metric go together: the data to evaluate on, and what to measure")
    if settings.patience is not None and evaluate is None:
        raise MetricError("--patience needs --eval and --metric: a score to wait for")


def _digest(model: ir.Model | None) -> str:
    source = source_of(model) if model is not None else None
    return source.sha256 if source is not None else ""


def _evaluation(model: ir.Model, source: Data, metric: Any) -> Evaluation:
    """What epochs are judged by, with the score before the first.

    On one thread: which epoch is best must not depend on the last bit.
    """
    _, evaluator = metric_named(metric)
    with open_session(model) as session:
        first = evaluator(session.run, source)

    def score(candidate: ir.Model) -> float:
        with open_session(candidate) as session:
            return evaluator(session.run, source).score()

    return Evaluation(score, first.higher_is_better, first.score())


def _prove(before: ir.Model, after: ir.Model, source: Any) -> None:
    """Check, load and run what came out.

    Raises:
        PassError: it does not hold.
    """
    feeds = next(iter(source), None)
    if feeds is None:
        raise DataError("data: holds no whole batch")
    with Prover(before, [feeds.feeds]) as prover:
        prover.prove(after)


def _told(epoch: Epoch) -> str:
    score = "" if epoch.score is None else f", score {epoch.score:.4f}"
    return f"epoch {epoch.number} of {epoch.planned}: loss {epoch.loss:.4f}{score}, {epoch.seconds:.0f} s"


def _summary(done: Trained) -> str:
    learned = "; ".join(f"{output}: {said}" for output, said in done.losses.items())
    return f"trained {len(done.parameters)} weights in {done.steps} steps, left {len(done.left)} ({learned})"


def _report(done: Trained, errors: dict[str, float]) -> dict[str, Any]:
    return {
        "schema": 1,
        "steps": done.steps,
        "losses": done.losses,
        "epochs": [
            {"epoch": e.number, "loss": e.loss, "score": e.score, "seconds": round(e.seconds, 3)} for e in done.epochs
        ],
        "touched": [{"weight": key, "change": change} for key, change in errors.items()],
        "left": [{"weight": key, "reason": reason} for key, reason in done.left.items()],
    }
