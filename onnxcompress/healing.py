"""One training from file to file: what the command line does, for Python."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import onnx_ir as ir

from onnxcompress.contract import Progress, Select, Silent
from onnxcompress.data.source import open_data
from onnxcompress.data.specs import input_specs
from onnxcompress.errors import DataError, MetricError, PassError, SaveError
from onnxcompress.model import bridge, provenance
from onnxcompress.model.load import load, source_of
from onnxcompress.model.save import save
from onnxcompress.proof import Prover
from onnxcompress.resume import Workplace
from onnxcompress.runtime.session import open_session
from onnxcompress.training.checkpoint import FILE
from onnxcompress.training.distill import Conditions, Evaluation, Settings, Trained, distill, write
from onnxcompress.training.initial import randomize
from onnxcompress.training.loop import Epoch
from onnxcompress.training.targets import Objective
from onnxcompress.validation.metrics import metric_named

Path = str | os.PathLike[str]


def train(
    teacher: Path | None,
    student: Path,
    out: Path,
    *,
    data: Any,
    reading: Any,
    epochs: int = 3,
    batch: int = 32,
    lr: float | None = None,
    optimizer: str = "adamw",
    schedule: Any = "cosine",
    temperature: float | None = None,
    alpha: float | None = None,
    loss: Any = "auto",
    literal: bool = False,
    outputs: tuple[str, ...] = (),
    clip: float = 1.0,
    weight_decay: float | None = None,
    evaluate: Any = None,
    metric: Any = None,
    patience: int | None = None,
    provider: str = "cpu",
    threads: int = 1,
    seed: int | None = None,
    resume: bool = False,
    init: str = "keep",
    select: Select | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Train the model at `student` and save it at `out`; returns the report. `reading`: an `api.DataOptions`.

    The arguments are those of `distill.Settings` and `targets.Objective`; `literal` leaves out the factor T^2;
    `init` "random" draws the weights anew first (`initial.randomize`).

    Raises:
        OnnxCompressError: one line; nothing is written.
    """
    _check(temperature, alpha, lr, evaluate, metric)
    model = load(student)
    original = load(teacher) if teacher is not None else None
    specs = input_specs(model)
    options: dict[str, Any] = {"mapping": reading.mapping, "preprocess": reading.preprocess, "labels": reading.labels}
    source = open_data(data, specs, **options, batch=batch, limit=reading.limit, trim=False, last="fill")
    settings = Settings(
        epochs=epochs,
        batch=batch,
        lr=lr,
        optimizer=optimizer,
        weight_decay=weight_decay,
        schedule=schedule,
        clip=clip or None,
        seed=seed or 0,
        outputs=outputs,
        patience=patience,
        select=select or Select(),
    )
    objective = Objective(loss, temperature, alpha, not literal)
    identity = {"student": _digest(model), "teacher": _digest(original), "data": source.digest(), "metric": str(metric)}
    identity["init"] = init
    if init == "random":
        randomize(model, settings.seed)
    target = pathlib.Path(out)
    with _work(target, resume) as work:
        conditions = Conditions(
            provider=provider,
            threads=threads,
            work=work,
            resume=resume,
            progress=progress or Silent(),
            on_epoch=lambda epoch: say(_told(epoch, epochs)),
            identity=identity,
        )
        evaluation = _evaluation(model, evaluate, metric, options, threads) if evaluate is not None else None
        done = distill(
            original,
            model,
            source,
            objective=objective,
            settings=settings,
            evaluation=evaluation,
            conditions=conditions,
        )
        trained = bridge.clone(model)
        errors = write(trained, done.parameters, work)
        _prove(model, trained, source)
        text = f"distill {sorted(done.losses.items())} {settings}" if original else f"train {settings}"
        found = provenance.Provenance(
            parent=identity["student"],
            recipe=text,
            data=identity["data"],
            versions=provenance.versions(),
            seed=settings.seed,
        )
        provenance.write(trained, found)
        saved = save(trained, target)
    say(_summary(done))
    say(f"{saved.path}: saved, {saved.bytes:,} bytes")
    return _report(done, errors)


@contextlib.contextmanager
def _work(out: pathlib.Path, resume: bool) -> Iterator[pathlib.Path]:
    """The work folder beside `out`; after a failure it stays as long as it holds a checkpoint.

    Raises:
        SaveError: the folder cannot be made, or the output could never be written.
    """
    if out.is_dir():
        raise SaveError(f"{out}: is a folder; name a file in it")
    if not out.parent.is_dir():
        raise SaveError(f"{out}: the folder {out.parent} does not exist; create it")
    folder = Workplace.folder_for(out)
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise SaveError(f"{out.parent}: cannot be written: {error.strerror or error}") from error
    for stale in folder.glob("*.spill"):
        stale.unlink(missing_ok=True)
    try:
        yield folder
    except BaseException:
        if not (folder / FILE).is_file():
            shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def _check(temperature: float | None, alpha: float | None, lr: float | None, evaluate: Any, metric: Any) -> None:
    if temperature is not None and not temperature > 0:
        raise PassError(f"--temperature: wanted a number above 0, got {temperature}")
    if alpha is not None and not 0 <= alpha <= 1:
        raise PassError(f"--alpha: wanted a share from 0 to 1, got {alpha}")
    if lr is not None and not lr > 0:
        raise PassError(f"--lr: wanted a number above 0, got {lr}")
    if (evaluate is None) != (metric is None):
        raise MetricError("--eval and --metric go together: the data to evaluate on, and what to measure")


def _digest(model: ir.Model | None) -> str:
    source = source_of(model) if model is not None else None
    return source.sha256 if source is not None else ""


def _evaluation(model: ir.Model, data: Any, metric: Any, options: dict[str, Any], threads: int) -> Evaluation:
    source = open_data(data, input_specs(model), **options, last="fill")
    _, evaluator = metric_named(metric)
    with open_session(model, threads=threads) as session:
        higher = evaluator(session.run, source).higher_is_better

    def score(candidate: ir.Model) -> float:
        with open_session(candidate, threads=threads) as session:
            return evaluator(session.run, source).score()

    return Evaluation(score, higher)


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


def _told(epoch: Epoch, epochs: int) -> str:
    score = "" if epoch.score is None else f", score {epoch.score:.4f}"
    return f"epoch {epoch.number} of {epochs}: loss {epoch.loss:.4f}{score}, {epoch.seconds:.0f} s"


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
