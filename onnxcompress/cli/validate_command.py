"""`onnxcompress validate`."""

from __future__ import annotations

import pathlib
from typing import Any

import click

from onnxcompress.cli import options, running
from onnxcompress.cli.progress import progress
from onnxcompress.cli.report import Report
from onnxcompress.validation.validate import validate


@click.command("validate")
@click.argument("original", type=options.MODEL)
@click.argument("compressed", type=options.MODEL)
@click.option("--data", metavar="DATA", help=".npz, folder, or file.py:function; without it inputs are made up")
@options.metric_option
@click.option("--output", metavar="NAME", help="the output the metric reads")
@click.option("--max-drop", type=float, metavar="X", help="the budget: PASS only when the drop is shown to stay below")
@click.option(
    "--provider",
    "providers",
    multiple=True,
    metavar="P",
    help="cpu, cuda, tensorrt:fp16, openvino:device_type=GPU, ...; may be repeated  [default: cpu]",
)
@click.option("--stop-early", is_flag=True, help="stop once the budget is decided; the samples must be in random order")
@click.option(
    "--saturation",
    type=float,
    default=0.01,
    show_default=True,
    metavar="X",
    help="share of an output that may be lost where CPUs cut off integer sums; inf only reports it",
)
@click.option(
    "--footprint/--no-footprint",
    default=True,
    show_default=True,
    help="measure load time and memory of both, each in a new process",
)
@options.data_options
@options.common_options
def command(
    original: pathlib.Path,
    compressed: pathlib.Path,
    providers: tuple[str, ...],
    labels: str | None,
    mapping: tuple[str, ...],
    preprocess: pathlib.Path | None,
    batch: int | None,
    limit: int | None,
    json_file: pathlib.Path | None,
    quiet: bool,
    verbose: bool,
    seed: int | None,
    **rest: Any,
) -> int:
    """Compare COMPRESSED with ORIGINAL: outputs, metric with a bound on its drop, providers, latency, size.

    Exit status 0 for PASS; 1 for FAIL, INCONCLUSIVE, or a provider that did not run; 130 when interrupted: the report
    then holds what was measured so far, marked partial.
    """
    report = Report(json_file, quiet, verbose)
    report.check(original, compressed)
    running.keep_inputs(report, None, rest["data"], preprocess, models=[original, compressed])
    data = options.reading(labels, mapping, preprocess, limit, batch)
    result = validate(
        original,
        compressed,
        providers=providers or ("cpu",),
        seed=seed or 0,
        labels=data.labels,
        mapping=data.mapping,
        preprocess=data.preprocess,
        batch=data.batch,
        limit=data.limit,
        progress=progress(quiet),
        **rest,
    )
    report.write(result.to_json())
    report.table(result)
    if result.partial:
        return 130
    return 0 if result.passed else 1
