"""`onnxcompress bench`."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import click

from onnxcompress.benchmarking import Bench, Cost, Row, bench
from onnxcompress.cli import options, running
from onnxcompress.cli.progress import progress
from onnxcompress.cli.report import Report, size


@click.command("bench")
@click.argument("models", type=options.MODEL, nargs=-1, required=True, metavar="MODEL...")
@click.option(
    "--batch", "batches", type=click.IntRange(min=1), multiple=True, metavar="N", help="samples a call; may be repeated"
)
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="of each session")
@click.option("--provider", default="cpu", metavar="P", show_default=True, help="cpu, cuda, tensorrt:fp16, ...")
@click.option("--data", metavar="DATA", help=".npz, folder, or file.py:function; without it inputs are made up")
@click.option("--map", "mapping", multiple=True, metavar="KEY=INPUT", help="array KEY feeds INPUT; may be repeated")
@click.option("--preprocess", type=options.MODEL, metavar="FILE", help="YAML with transpose, scale, mean, std, dtype")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=2.0,
    show_default=True,
    help="of timing, for each model and batch size",
)
@click.option(
    "--starts",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    help="new processes a model, to measure load time and memory in",
)
@click.option("--json", "json_file", type=options.MODEL, metavar="FILE", help="write the full report here")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="of made-up inputs")
@click.option("-q", "--quiet", is_flag=True, help="print errors alone")
@click.option("-v", "--verbose", is_flag=True, help="print runs and warm-up too")
def command(
    models: tuple[pathlib.Path, ...],
    batches: tuple[int, ...],
    threads: int,
    provider: str,
    data: str | None,
    mapping: tuple[str, ...],
    preprocess: pathlib.Path | None,
    seconds: float,
    starts: int,
    json_file: pathlib.Path | None,
    seed: int,
    quiet: bool,
    verbose: bool,
) -> int:
    """Time MODELs that take the same inputs, in turn; the first is what the others are held to.

    \b
    onnxcompress bench model.onnx small.onnx --batch 1 --batch 32 --data eval.npz
    """
    report = Report(json_file, quiet, verbose)
    report.check(*models)
    running.keep_inputs(report, None, data, preprocess, models=list(models))
    reading = options.reading(None, mapping, preprocess, None)
    shown = progress(quiet)
    try:
        found = bench(
            models,
            batches=batches or (1,),
            threads=threads,
            provider=provider,
            data=data,
            mapping=reading.mapping,
            preprocess=reading.preprocess,
            seed=seed,
            seconds=seconds,
            starts=starts,
            progress=shown,
        )
    finally:
        shown.done()
    report.write(found.to_json())
    for line in _lines(found, verbose):
        report.say(line)
    return 0


def _lines(found: Bench, verbose: bool) -> Iterator[str]:
    machine = found.machine
    busy = f", load {machine.load}" if machine.load is not None else ""
    yield (
        f"{machine.cpu_class}, {_count(machine.cores, 'core')}{busy}; onnxruntime {machine.onnxruntime}, provider "
        f"{machine.provider}, {_count(machine.threads, 'thread')}, {_INPUTS[found.inputs]}"
    )
    for cost in found.costs:
        yield f"{cost.model}: {', '.join(_cost(cost))}"
    width = max(len(row.model) for row in found.rows)
    before = None
    for row in found.rows:
        if row.batch != before:
            before = row.batch
            unsettled = "" if row.stable else ": still becoming faster when timing began"
            more = f" ({row.runs} runs after {row.warmup})" if verbose else ""
            yield f"batch {row.batch}{more}{unsettled}"
        yield f"  {row.model:{width}s}  {_row(row)}"
    for reason in found.skipped.values():
        yield f"left out: {reason}"
    if machine.load is not None and machine.load > machine.cores * 0.5:
        yield "note: the machine was busy; trust ratios and their ranges before times"


def _cost(cost: Cost) -> Iterator[str]:
    yield size(cost.bytes)
    if len(cost.nodes) > 1:
        yield "nodes on " + ", ".join(f"{name} {count}" for name, count in cost.nodes.items())
    if cost.footprint is not None:
        yield f"loads in {_time(cost.footprint.load)}"
        yield f"first run {_time(cost.footprint.first)}"
        if cost.footprint.peak is not None and cost.footprint.held is not None:
            yield f"memory {size(cost.footprint.peak)} at most, {size(max(0, cost.footprint.held))} after two runs"


def _row(row: Row) -> str:
    text = f"p50 {_time(row.p50):>8s}  p90 {_time(row.p90):>8s}  p99 {_time(row.p99):>8s}  {row.throughput:>9,.0f}/s"
    if row.ratio is None:
        return text
    text += f"  {row.ratio:.2f} x as fast"
    return text + (f" ({row.ratio_low:.2f} to {row.ratio_high:.2f})" if row.ratio_low is not None else "")


_INPUTS = {"data": "on your data", "synthetic": "on made-up inputs"}


def _time(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"
