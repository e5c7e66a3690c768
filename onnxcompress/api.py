"""The Python interface: the same words as the command line and the recipe."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from onnxcompress import pipeline
from onnxcompress.contract import Feeder, Pass, Progress, Silent
from onnxcompress.data.batch import Data
from onnxcompress.data.preprocess import Preprocess
from onnxcompress.data.source import open_data
from onnxcompress.data.specs import input_specs
from onnxcompress.errors import MetricError, NothingToDo
from onnxcompress.model import provenance
from onnxcompress.model.load import Loadable, load, source_of
from onnxcompress.model.save import Saved, save
from onnxcompress.model.sizes import payload_bytes, saved_bytes
from onnxcompress.pipeline import Conditions, StepReport
from onnxcompress.recipe import Recipe
from onnxcompress.resume import workplace
from onnxcompress.validation.validate import validate as validate

if TYPE_CHECKING:
    from onnxcompress.validation.result import Result

DEFAULT_RECIPE = "int8"


@dataclasses.dataclass
class Compressed:
    """What `compress` made. `result`: the validation against the original, when evaluation data was given."""

    model: ir.Model
    recipe: Recipe
    steps: list[StepReport]
    bytes_before: int
    bytes_after: int
    score_before: float | None = None
    saved: Saved | None = None
    result: Result | None = None

    @property
    def ratio(self) -> float:
        """Bytes after / bytes before; provenance metadata (up to 2 KiB) does not count."""
        return self.bytes_after / max(1, self.bytes_before)

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            "schema": 1,
            "recipe": self.recipe.name,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "ratio": self.ratio,
            "score_before": self.score_before,
            "passes": [step.to_json() for step in self.steps],
            "validation": self.result.to_json() if self.result is not None else None,
        }


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """How data is read, for calibration and evaluation alike (see `open_data`)."""

    labels: str | None = None
    mapping: Mapping[str, str] | None = None
    preprocess: Preprocess | None = None
    batch: int | None = None
    limit: int | None = None


def compress(
    model: Loadable,
    recipe: str | os.PathLike[str] | Mapping[str, Any] | Sequence[Any] | Recipe | Pass = DEFAULT_RECIPE,
    *,
    out: str | os.PathLike[str] | None = None,
    calibration: Any = None,
    evaluate: Any = None,
    metric: str | Callable[..., Any] | None = None,
    output: str | None = None,
    max_drop: float | None = None,
    target: str | None = None,
    seed: int | None = None,
    prefer: str | None = None,
    threads: int = 1,
    resume: bool = False,
    data_options: DataOptions = DataOptions(),
    progress: Progress | None = None,
    on_step: Callable[[StepReport], None] | None = None,
    refuse_nothing: bool = False,
) -> Compressed:
    """Run a recipe over a model, check and compare after every pass, and save the result.

    Args:
        model: path, bytes, ModelProto or ir.Model; it is not changed.
        recipe: name of a built-in recipe, YAML file, list of passes, one pass, or `Recipe`.
        out: where to save; None only returns the model.
        calibration: data for passes that measure activations (anything `open_data` takes).
        evaluate: data to score the model on after each pass and to validate the result on; needs `metric`.
        metric, output, max_drop: see `validate`.
        target, seed, prefer: override the recipe's; "cpu", 0 and "size" where neither says.
        resume: go on from the work folder an interrupted run left beside `out`.
        refuse_nothing: raise when no pass changed anything, instead of saving the model as it was.

    Raises:
        NothingToDo: with `refuse_nothing`; the message says why.
        OnnxCompressError: anything else that is wrong with model, recipe, data or machine.
    """
    chosen = Recipe.load([recipe] if isinstance(recipe, Pass) else recipe)
    target = target or chosen.target or "cpu"
    seed = seed if seed is not None else chosen.seed or 0
    original = load(model)
    feeds = _feeds(original, calibration, data_options)
    scorer = _scorer(original, evaluate, metric, output, data_options, threads)
    source = source_of(original)
    before = source.bytes if source is not None else saved_bytes(original)
    conditions = Conditions(
        target=target,
        seed=seed,
        threads=threads,
        prefer=prefer or chosen.prefer or "size",
        feeds=feeds,
        evaluate=scorer,
        progress=progress or Silent(),
        on_step=on_step,
    )
    path = pathlib.Path(out) if out is not None else None
    data_digest = feeds.digest() if feeds is not None and path is not None else ""
    identity = {"data": data_digest, "seed": seed, "target": target, "prefer": conditions.prefer}
    identity["parent"] = source.sha256 if source is not None and path is not None else ""
    with workplace(path, identity, resume=resume) as place:
        score_before = scorer(original) if scorer is not None else None
        outcome = pipeline.run(pipeline.copy(original), chosen, conditions, place, resume=resume)
        if refuse_nothing and not outcome.changed:
            raise NothingToDo(nothing(outcome.steps))
        done = Compressed(outcome.model, chosen, outcome.steps, before, before, score_before)
        if path is None:
            done.bytes_after = saved_bytes(outcome.model)
            return _detached(done)
        _sign(done, identity)
        done.saved = save(outcome.model, path)
        done.bytes_after = payload_bytes(path)
    if evaluate is not None and metric is not None:
        done.result = validate(
            model,
            path,
            data=evaluate,
            labels=data_options.labels,
            metric=metric,
            output=output,
            max_drop=max_drop,
            threads=threads,
            seed=seed,
            mapping=data_options.mapping,
            preprocess=data_options.preprocess,
            batch=data_options.batch,
            limit=data_options.limit,
        )
    return done


def nothing(steps: Sequence[StepReport]) -> str:
    """One line that says why no pass changed anything."""
    undone = [step.skipped for step in steps if step.skipped]
    if undone:
        return f"{steps[-1].name}: nothing changed: {undone[-1]}"
    counted: dict[str, int] = {}
    for entry in (entry for step in steps for entry in step.coverage.left):
        words = entry.detail or entry.reason.value
        counted[words] = counted.get(words, 0) + 1
    names = ", ".join(step.name for step in steps)
    if not counted:
        return f"{names}: the model holds no weights"
    told = "; ".join(f"{n} x {words}" for words, n in sorted(counted.items(), key=lambda item: -item[1])[:4])
    return f"{names}: can touch none of the {sum(counted.values())} weights: {told}"


def _feeds(model: ir.Model, calibration: Any, options: DataOptions) -> Feeder | None:
    if calibration is None:
        return None
    if isinstance(calibration, Data):
        return calibration.feeds()
    data = open_data(
        calibration,
        input_specs(model),
        labels=options.labels,
        mapping=options.mapping,
        preprocess=options.preprocess,
        batch=options.batch,
        limit=options.limit,
    )
    return data.feeds()


def _scorer(
    model: ir.Model, data: Any, metric: Any, output: str | None, options: DataOptions, threads: int
) -> Callable[[ir.Model], float] | None:
    """A function that scores any model with the same inputs on the evaluation data."""
    if metric is None and data is None:
        return None
    if metric is None:
        raise MetricError("evaluation data needs a metric: --metric accuracy, ... or file.py:function")
    from onnxcompress.runtime.session import open_session
    from onnxcompress.validation.metrics import metric_named

    if data is None:
        raise MetricError(f"metric {metric} needs data: --eval DATA")
    _, evaluator = metric_named(metric, output)
    opened = open_data(
        data,
        input_specs(model),
        labels=options.labels,
        mapping=options.mapping,
        preprocess=options.preprocess,
        batch=options.batch,
        limit=options.limit,
        last="fill",
    )

    def score(candidate: ir.Model) -> float:
        with open_session(candidate, threads=threads) as session:
            return evaluator(session.run, opened).score()

    return score


def _sign(done: Compressed, identity: Mapping[str, Any]) -> None:
    """Write what the model was made from into its metadata: nothing that depends on time, place or threads."""
    import json

    scores = {} if done.score_before is None else {"before": done.score_before}
    last = next((step.score for step in reversed(done.steps) if step.score is not None), None)
    if last is not None:
        scores["after"] = last
    text = json.dumps([step.canonical() for step in done.recipe.steps], separators=(",", ":"))
    found = provenance.Provenance(
        parent=str(identity["parent"]),
        recipe=text,
        data=str(identity["data"]),
        versions=provenance.versions(),
        seed=int(identity["seed"]),
        metrics=scores,
    )
    provenance.write(done.model, found)


def _detached(done: Compressed) -> Compressed:
    """The result with spilled tensors read into memory, since their folder goes."""
    from onnxcompress.model.spill import detach

    detach(done.model)
    return done
