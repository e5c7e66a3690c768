"""Run two models on the same data and say whether the compressed one still holds."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx
import onnx_ir as ir

from onnxcompress.contract import Progress, Silent
from onnxcompress.data.batch import Batch, Data
from onnxcompress.data.preprocess import Preprocess
from onnxcompress.data.sizes import candidate_sizes
from onnxcompress.data.source import open_data
from onnxcompress.data.specs import input_specs
from onnxcompress.data.synthetic import synthetic_feeds
from onnxcompress.errors import DataError, MetricError, ModelError
from onnxcompress.model.cost import NodeCost, costs
from onnxcompress.model.load import Loadable, load, source_of
from onnxcompress.model.sizes import saved_bytes
from onnxcompress.runtime.choice import Choice
from onnxcompress.runtime.footprint import Footprint
from onnxcompress.runtime.footprint import footprint as of_file
from onnxcompress.runtime.providers import PROVIDERS, short_name
from onnxcompress.runtime.session import Session, open_session
from onnxcompress.validation import timing
from onnxcompress.validation.comparison import Comparison
from onnxcompress.validation.metric import BatchMetric
from onnxcompress.validation.metrics import Whole, metric_named
from onnxcompress.validation.pairing import check_fit, feeds_for, narrowed
from onnxcompress.validation.place import Place
from onnxcompress.validation.placement import ProviderRow, judge_row
from onnxcompress.validation.portable import SATURATION, Portable, judge_integers
from onnxcompress.validation.result import Result, Size, Timing
from onnxcompress.validation.samples import Evaluator
from onnxcompress.validation.sequential import Sequential
from onnxcompress.validation.verdict import Finding, Score, Verdict, judge, judge_agreement, overall, score

_CPU = Choice(PROVIDERS["cpu"])


def validate(
    original: Loadable,
    compressed: Loadable,
    *,
    data: Any = None,
    labels: str | None = None,
    metric: str | Evaluator | Callable[..., Any] | None = None,
    output: str | None = None,
    max_drop: float | None = None,
    providers: Sequence[str] = ("cpu",),
    threads: int = 1,
    seed: int = 0,
    limit: int | None = None,
    progress: Progress | None = None,
    mapping: Mapping[str, str] | None = None,
    preprocess: Preprocess | None = None,
    batch: int | None = None,
    latency: bool = True,
    stop_early: bool = False,
    saturation: float = SATURATION,
    footprint: bool = False,
) -> Result:
    """Compare `compressed` with `original` on `data`; nothing of the data is held but sums and a few numbers a sample.

    `original`, `compressed`: path, bytes, ModelProto or ir.Model. `data`: what `open_data` takes, or `Data`; None makes
    up inputs, which shows agreement only. `labels`, `mapping`, `preprocess`, `batch`, `limit`: see `open_data`.
    `metric`: see `metric_named`; `output`: `NAME` or `NAME[COLUMN]`, else by rule (`validation.metric`).
    `max_drop`: budget of the drop of the metric, absolute; for metrics where lower is better of the relative rise.
    `providers`: where the compressed model is to run beside the CPU, with options if need be (`tensorrt:fp16`, see
    `runtime.choice`); one that did not run it, or none of its multiply-accumulates, fails the validation.
    `stop_early`: look at the metric at doubling sample counts and stop once it is decided (`validation.sequential`);
    samples must be in random order, and what is said of the outputs then speaks of those seen.
    `saturation`: what share of an output may be lost where integer sums are cut off, here or on a CPU without VNNI
    (`validation.portable`); infinity only reports it.
    `threads`: 1 gives the same bits every time. `latency`: also time both, for about two seconds. `footprint`: measure
    load time and memory of both files on the CPU, each in a new process.

    An interrupt (Ctrl-C) ends it early: what was measured so far is reported, marked `partial`.

    Raises:
        ModelError: a model cannot be loaded or run, or their inputs and outputs differ.
        DataError: the data does not fit the inputs.
        MetricError: unknown metric, no labels, or outputs and labels that do not fit it; a budget without a metric.
        OnnxCompressError: unknown provider.
    """
    wanted = list(dict.fromkeys(Choice.of(name) for name in providers))
    name, evaluator = metric_named(metric, output) if metric is not None else ("", None)
    _check_question(evaluator, name, data, output, max_drop, saturation)
    with contextlib.ExitStack() as stack:
        first, second = _Side(original), _Side(compressed)
        sessions = (stack.enter_context(first.open(threads)), stack.enter_context(second.open(threads)))
        check_fit(*sessions)
        feeder: Data
        if isinstance(data, Data):
            feeder = data
        elif data is None:
            feeder = _made_up(first.model, sessions, seed)
        else:
            specs = narrowed(input_specs(first.model), sessions[1])
            settings: dict[str, Any] = {"labels": labels, "mapping": mapping, "preprocess": preprocess}
            feeder = open_data(data, specs, **settings, batch=batch, limit=limit, last="fill")
        if isinstance(evaluator, BatchMetric) and evaluator.needs_labels and not feeder.has_labels:
            raise MetricError(f"metric {name} needs labels, but the data has none: an array `y`, or --labels KEY")
        known = second.costs() if any(short_name(choice.provider) != "cpu" for choice in wanted) else []
        places: list[Place] = []
        for choice in wanted:
            places.append(Place(choice, functools.partial(second.open, threads), known, sessions[1].inputs))
            stack.callback(places[-1].close)
        portable = Portable(
            second.model, feeder, lambda config: second.open(threads, config=config), limit=saturation, threads=threads
        )
        stack.callback(portable.close)
        same = first.same_as(second)
        size = Size(first.bytes, second.bytes, second.bytes / max(1, first.bytes))
        first.release()
        if not any(place.reopens for place in places):
            second.release()
        looks = _looks(feeder, evaluator, name, limit, max_drop, seed) if stop_early else None
        work = Comparison(sessions, places, feeder, evaluator, limit, looks, portable)
        shown = progress or Silent()
        work.stream(shown)
        found, timed, loads = work.early, None, None
        try:
            found = found or _scored(work, looks, name, max_drop, seed)
            timed = _timed(sessions, work.first, threads) if latency and not work.partial else None
            loads = _footprints(original, compressed, sessions, work, threads) if footprint else None
            _finish(places, work, found, feeder, seed, latency)
            portable.score(evaluator)
        except KeyboardInterrupt:
            work.cut = True
        unmeasured = [Finding(Verdict.PASS, (loads,))] if isinstance(loads, str) else []
        rows = tuple(place.row() for place in places)
    integers = portable.result(name)
    agreement = tuple(work.agreement.results())
    findings = _findings(work, found, rows, same, data is None, bool(name)) + unmeasured
    if looks is not None:
        findings.append(Finding(Verdict.PASS, (looks.story(work.early is not None),)))
    if integers is not None and (said := judge_integers(integers)) is not None:
        findings.append(said)
    finding = overall(findings)
    return Result(
        verdict=finding.verdict,
        reasons=finding.reasons,
        score=found,
        agreement=agreement,
        providers=rows,
        latency=timed,
        size=size,
        samples=work.seen,
        calls=work.calls,
        inputs="synthetic" if data is None else "data",
        same_bytes=same,
        partial=work.partial or work.cut,
        stopped_early=work.early is not None,
        integers=integers,
        footprints=None if isinstance(loads, str) else loads,
    )


def _looks(
    data: Data, evaluator: Evaluator | None, name: str, limit: int | None, max_drop: float | None, seed: int
) -> Sequential | None:
    """The looks of this comparison.

    Raises:
        MetricError: there is nothing that a look could decide, or no telling when to look.
    """
    if max_drop is None:
        raise MetricError("--stop-early stops once the budget is decided: give one (--metric, --max-drop)")
    if not isinstance(evaluator, BatchMetric):
        raise MetricError(f"--stop-early: metric {name} owns its calls, so it cannot be looked at on the way")
    hint = data.len_hint()
    total = min(hint, limit) if hint is not None and limit is not None else hint if hint is not None else limit
    if total is None:
        raise MetricError(
            "--stop-early plans its looks by the number of samples, which this data does not tell: --limit"
        )
    return Sequential(name, total, max_drop, seed=seed)


def _scored(work: Comparison, looks: Sequential | None, name: str, max_drop: float | None, seed: int) -> Score | None:
    pair = work.samples()
    if pair is None:
        return None
    if looks is not None and not work.partial:
        return looks.last(pair)
    return score(name, *pair, max_drop=max_drop, seed=seed)


def _finish(
    places: Sequence[Place], work: Comparison, found: Score | None, data: Data, seed: int, latency: bool
) -> None:
    """Score every place on the samples that the CPU was scored on, held to the same level, and time it."""
    pair = work.samples() if found is not None and any(place.session is not None for place in places) else None
    for place in places:
        own = place.samples(work.evaluator, data, pair[0].n) if pair is not None and work.evaluator else None
        if pair is not None and found is not None and own is not None:
            level = 1 - found.confidence
            place.score = score(found.metric, pair[0], own, max_drop=found.max_drop, seed=seed, alpha=level)
        if latency and not work.partial and work.first is not None:
            place.time(work.first)


def _timed(sessions: tuple[Session, Session], batch: Batch | None, threads: int) -> Timing | None:
    if batch is None:
        return None
    feeds = (feeds_for(sessions[0], batch.feeds), feeds_for(sessions[1], batch.feeds))
    return timing.measure(*sessions, feeds, threads=threads, batch=batch.count)


def _footprints(
    original: Loadable, compressed: Loadable, sessions: tuple[Session, Session], work: Comparison, threads: int
) -> tuple[Footprint, Footprint] | str | None:
    """Load time and memory of two files, or why not; None where one lies in memory, or after an interrupt."""
    files = [given for given in (original, compressed) if isinstance(given, str | os.PathLike)]
    if len(files) < 2 or work.first is None or work.partial:
        return None
    feeds = work.first.feeds
    try:
        first, second = (
            of_file(file, feeds_for(session, feeds), threads=threads)
            for file, session in zip(files, sessions, strict=True)
        )
    except (DataError, ModelError) as error:
        return f"load time and memory were not measured: {error}"
    return first, second


def _check_question(
    evaluator: Evaluator | None, name: str, data: Any, output: str | None, max_drop: float | None, saturation: float
) -> None:
    if evaluator is None:
        if max_drop is not None:
            raise MetricError("--max-drop is the budget of a metric: say which (--metric)")
        if output is not None:
            raise MetricError("--output is the output a metric reads: say which metric (--metric)")
    elif data is None and not isinstance(evaluator, Whole):
        needs = "data with labels" if getattr(evaluator, "needs_labels", True) else "data"
        raise MetricError(f"metric {name} needs {needs}: give some (--data)")
    if not saturation >= 0:
        raise DataError(f"--saturation: wanted a number of at least 0, got {saturation}")
    if max_drop is not None and not (math.isfinite(max_drop) and max_drop >= 0):
        raise MetricError(f"--max-drop: wanted a number of at least 0, got {max_drop}")


class _Side:
    """One of the two models: how to open it, and what its files say."""

    def __init__(self, source: Loadable) -> None:
        self.model = load(source)
        self._given = source
        found = source_of(self.model)
        self._in_memory = isinstance(source, ir.Model | onnx.ModelProto) or found is None
        self.bytes = saved_bytes(self.model) if self._in_memory or found is None else found.bytes
        self._source = None if self._in_memory else found

    def open(
        self,
        threads: int,
        choice: Choice = _CPU,
        config: Mapping[str, str] | None = None,
        profile: pathlib.Path | None = None,
        sizes: Mapping[str, int] | None = None,
    ) -> Session:
        given, digest = self._given, self._source.sha256 if self._source is not None else ""
        quantized = any(node.op_type == "QuantizeLinear" for node in self.model.graph)
        settings: dict[str, Any] = {"config": config} if profile is None else {"config": config, "profile": profile}
        options = choice.provider_options(digest, quantized=quantized)
        model = given if isinstance(given, str | os.PathLike | bytes) else self.model
        settings |= {"provider_options": options} if options else {}
        settings |= {"sizes": sizes} if sizes else {}
        return open_session(model, provider=short_name(choice.provider), threads=threads, **settings)

    def costs(self) -> list[NodeCost]:
        """Multiply-accumulates of every node, for one sample."""
        return costs(self.model)

    def same_as(self, other: _Side) -> bool:
        """True when both are the same bytes."""
        if self._source is None or other._source is None:
            return self._in_memory and self._given is other._given
        return self.bytes == other.bytes and self._source.sha256 == other._source.sha256

    def release(self) -> None:
        """Let go of the loaded model; the sessions hold what they need."""
        del self.model, self._given


def _findings(
    work: Comparison, found: Score | None, rows: Sequence[ProviderRow], same: bool, synthetic: bool, metric: bool
) -> list[Finding]:
    findings = [judge_agreement(work.agreement.results())]
    for row in rows:
        findings.append(judge_row(row))
        if row.ran and row.agreement:
            findings.append(judge_agreement(row.agreement, f"provider {row.provider}"))
        if row.ran and row.score is not None:
            own = judge(row.score)
            if own.verdict is not Verdict.PASS:
                said = tuple(f"provider {row.provider}: {reason}" for reason in own.reasons)
                findings.append(Finding(own.verdict, said))
    if found is not None:
        findings.append(judge(found, same_bytes=same))
    elif not metric and all(finding.verdict is Verdict.PASS for finding in findings):
        findings.append(Finding(Verdict.PASS, ("outputs fit and are finite; no metric was asked for (--metric)",)))
    if work.partial:
        reason = f"interrupted after {work.seen:,} samples: this result speaks of those alone"
        findings.append(Finding(Verdict.INCONCLUSIVE, (reason,)))
    if work.cut:
        reason = "interrupted after all samples were compared: what follows on that was not all measured"
        findings.append(Finding(Verdict.PASS, (reason,)))
    if metric and found is None:
        findings.append(Finding(Verdict.INCONCLUSIVE, ("the metric was not computed",)))
    if synthetic:
        reason = "made-up inputs: they show how far the outputs agree, and nothing of accuracy; give --data"
        findings.append(Finding(Verdict.PASS, (reason,)))
    if same:
        findings.append(Finding(Verdict.PASS, ("both models are the same, byte for byte",)))
    return [dataclasses.replace(finding, reasons=tuple(dict.fromkeys(finding.reasons))) for finding in findings]


def _made_up(model: ir.Model, sessions: Sequence[Session], seed: int) -> Data:
    """Synthetic feeds in sizes that the original accepts."""
    refused: Exception | None = None
    for sizes in candidate_sizes(model):
        data = synthetic_feeds(model, seed=seed, sizes=sizes)
        try:
            for batch in data:
                for session in sessions:
                    session.run(feeds_for(session, batch.feeds))
        except (DataError, ModelError) as error:
            refused = refused or error
            continue
        return data
    raise DataError(f"made-up inputs do not fit this model, give --data; first refusal: {refused}")
