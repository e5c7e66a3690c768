"""The Python interface: the same words as the command line and the recipe."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import pathlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from onnxcompress import pipeline
from onnxcompress.contract import Feeder, Pass, Progress, Silent
from onnxcompress.data.batch import Data
from onnxcompress.data.preprocess import Preprocess
from onnxcompress.data.source import open_data
from onnxcompress.data.specs import input_specs
from onnxcompress.errors import MetricError, ModelError, NothingToDo
from onnxcompress.model import provenance
from onnxcompress.model.load import Loadable, load, source_of
from onnxcompress.model.save import Saved, refuse_bad_target, save, to_bytes
from onnxcompress.model.sizes import payload_bytes, saved_bytes
from onnxcompress.pipeline import Conditions
from onnxcompress.recipe import Recipe
from onnxcompress.resume import workplace
from onnxcompress.steps import StepReport
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
    chosen = Recipe.load(recipe)
    _check_question(evaluate, metric, output, max_drop)
    target = target or chosen.target or "cpu"
    seed = seed if seed is not None else chosen.seed or 0
    original = load(model)
    if out is not None:
        refuse_bad_target(pathlib.Path(out), original)
    source = source_of(original)
    before = source.bytes if source is not None else saved_bytes(original)
    feeds = _feeds(original, calibration, data_options)
    evaluation = _open(original, evaluate, data_options, last="fill") if evaluate is not None else None
    scorer = _Scorer(evaluation, metric, output) if evaluation is not None else None
    conditions = Conditions(
        target=target,
        seed=seed,
        threads=threads,
        prefer=prefer or chosen.prefer or "size",
        feeds=feeds,
        sample=feeds or (evaluation.feeds() if evaluation is not None else None),
        evaluate=scorer,
        reading={
            "labels": data_options.labels,
            "mapping": data_options.mapping,
            "preprocess": data_options.preprocess,
        },
        progress=progress or Silent(),
        on_step=on_step,
    )

    def judged(compressed: Loadable) -> Result | None:
        if evaluation is None:
            return None
        return validate(
            model,
            compressed,
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

    path = pathlib.Path(out) if out is not None else None
    digest = feeds.digest() if feeds is not None and path is not None else ""
    identity: dict[str, Any] = {"data": digest, "seed": seed, "target": target, "prefer": conditions.prefer}
    if path is not None:
        identity["parent"] = _content(original) if isinstance(model, ir.Model) else source.sha256 if source else ""
        identity["evaluation"] = [evaluation.digest() if evaluation is not None else "", _named(metric), output]
        identity["batch"] = data_options.batch
    with workplace(path, identity, resume=resume) as place:
        score_before = conditions.score_before = scorer(original) if scorer is not None else None
        conditions.higher_is_better = scorer is None or scorer.higher_is_better
        outcome = pipeline.run(pipeline.copy(original), chosen, conditions, place, resume=resume)
        if refuse_nothing and not outcome.changed:
            raise NothingToDo(nothing(outcome.steps))
        done = Compressed(outcome.model, chosen, outcome.steps, before, before, score_before)
        if path is None:
            done.bytes_after = saved_bytes(outcome.model)
            done.result = judged(outcome.model)
            return _detached(done)
        in_place = source is not None and source.path is not None and path.exists() and path.samefile(source.path)
        if in_place:  # once saved, there is nothing left to compare with
            done.result = judged(outcome.model)
            if done.result is not None and done.result.partial:
                raise KeyboardInterrupt
        _sign(done, source.sha256 if source is not None else str(identity["parent"]), digest, seed)
        done.saved = save(outcome.model, path)
        done.bytes_after = payload_bytes(path)
    if not in_place:
        done.result = judged(path)
    return done


def _check_question(evaluate: Any, metric: Any, output: str | None, max_drop: float | None) -> None:
    """Refuse a budget that nothing would be held to, before anything runs."""
    if evaluate is not None and metric is None:
        raise MetricError("evaluation data needs a metric: --metric accuracy, ... or file.py:function")
    if evaluate is None and metric is not None:
        raise MetricError(f"metric {_named(metric)} needs data: --eval DATA")
    if evaluate is None and max_drop is not None:
        raise MetricError("--max-drop is the budget of a metric: say which (--metric), and on what data (--eval)")
    if evaluate is None and output is not None:
        raise MetricError(
            "--output is the output a metric reads: say which metric (--metric), and on what data (--eval)"
        )
    if max_drop is not None and not (math.isfinite(max_drop) and max_drop >= 0):
        raise MetricError(f"--max-drop: wanted a number of at least 0, got {max_drop}")


def _named(metric: Any) -> str:
    return str(metric) if isinstance(metric, str | None) else getattr(metric, "__qualname__", type(metric).__qualname__)


def _content(model: ir.Model) -> str:
    """Digest of a model in memory, whatever it was loaded from; of one too large to serialize, never the same twice."""
    try:
        return hashlib.sha256(to_bytes(model)).hexdigest()
    except ModelError:
        return secrets.token_hex(32)


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


def _open(model: ir.Model, data: Any, options: DataOptions, **settings: Any) -> Data:
    if isinstance(data, Data):
        return data
    return open_data(
        data,
        input_specs(model),
        labels=options.labels,
        mapping=options.mapping,
        preprocess=options.preprocess,
        batch=options.batch,
        limit=options.limit,
        **settings,
    )


def _feeds(model: ir.Model, calibration: Any, options: DataOptions) -> Feeder | None:
    if calibration is None:
        return None
    return _open(model, calibration, options).feeds()


class _Scorer:
    """Scores models with the same inputs on the evaluation data.

    It does so on one thread: ONNX Runtime's last bit depends on their number, and a pass may decide by a score.
    `higher_is_better`: of the metric, known once a model has been scored.
    """

    def __init__(self, data: Data, metric: Any, output: str | None) -> None:
        from onnxcompress.validation.metrics import metric_named

        self._data, (_, self._evaluator) = data, metric_named(metric, output)
        self.higher_is_better = True

    def __call__(self, model: ir.Model) -> float:
        from onnxcompress.runtime.session import open_session

        with open_session(model, threads=1) as session:
            found = self._evaluator(session.run, self._data)
        self.higher_is_better = found.higher_is_better
        return found.score()


def _sign(done: Compressed, parent: str, data: str, seed: int) -> None:
    """Write what the model was made from into its metadata: nothing that depends on time, place or threads."""
    import json

    scores = {} if done.score_before is None else {"before": done.score_before}
    last = next((step.score for step in reversed(done.steps) if step.score is not None), None)
    if last is not None:
        scores["after"] = last
    text = json.dumps([step.canonical() for step in done.recipe.steps], separators=(",", ":"))
    found = provenance.Provenance(
        parent=parent,
        recipe=text,
        data=data,
        versions=provenance.versions(),
        seed=seed,
        metrics=scores,
    )
    provenance.write(done.model, found)


def _detached(done: Compressed) -> Compressed:
    """The result with spilled tensors read into memory, since their folder goes."""
    from onnxcompress.model.spill import detach

    detach(done.model)
    return done
