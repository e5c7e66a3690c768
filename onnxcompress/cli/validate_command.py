"""`onnxcompress validate`."""

from __future__ import annotations

import pathlib
from typing import Any

import click

from onnxcompress.cli import common
from onnxcompress.validation.validate import validate


@click.command("validate")
@click.argument("original", type=common.MODEL)
@click.argument("compressed", type=common.MODEL)
@click.option("--data", metavar="DATA", help=".npz, folder, or file.py:function; without it inputs are made up")
@click.option("--metric", metavar="M", help="accuracy, f1, spearman, perplexity, ... or file.py:function")
@click.option("--output", metavar="NAME", help="the output the metric reads")
@click.option("--max-drop", type=float, metavar="X", help="the budget: PASS only when the drop is shown to stay below")
@click.option(
    "--provider",
    "providers",
    multiple=True,
    metavar="P",
    help="cpu, cuda, tensorrt, ...; may be repeated  [default: cpu]",
)
@common.data_options
@common.common_options
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
    **options: Any,
) -> int:
    """Compare COMPRESSED with ORIGINAL: outputs, metric with a bound on its drop, providers, latency, size.

    Exit status 0 for PASS; 1 for FAIL, INCONCLUSIVE, or a provider that did not run.
    """
    report = common.Report(json_file, quiet, verbose)
    report.check(original, compressed)
    common.keep_inputs(report, None, options["data"], preprocess)
    data = common.reading(labels, mapping, preprocess, batch, limit)
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
        progress=common.progress(quiet),
        **options,
    )
    report.write(result.to_json())
    if not quiet:
        import rich.console

        result.to_table(rich.console.Console())
    return 0 if result.passed else 1
