"""`onnxcompress compress`."""

from __future__ import annotations

import pathlib
from typing import Any

import click

from onnxcompress.api import DEFAULT_RECIPE
from onnxcompress.cli import options, running
from onnxcompress.cli.report import Report
from onnxcompress.recipe import Recipe, built_in


@click.command("compress")
@click.argument("model", type=options.MODEL)
@options.out_option
@click.option(
    "--recipe",
    metavar="NAME|FILE",
    help=f"{', '.join(built_in())}, or a YAML file  [default: {DEFAULT_RECIPE}]",
)
@click.option(
    "--calibration",
    metavar="DATA",
    help=".npz, folder, or file.py:function, for passes that measure activations or train",
)
@click.option("--eval", "evaluate", metavar="DATA", help="data to score the model on after every pass")
@options.metric_option
@click.option("--output", metavar="NAME", help="the output the metric reads")
@click.option(
    "--max-drop", type=float, metavar="X", help="the budget: exit status 1 unless the drop is shown to stay below"
)
@click.option("--target", type=options.TARGETS, help="where the model will run  [default: the recipe's, or cpu]")
@click.option("--prefer", type=click.Choice(["size", "speed"]), help="what to choose where they conflict")
@options.resume_option
@options.data_options
@options.common_options
def command(
    model: pathlib.Path,
    out: pathlib.Path,
    recipe: str | None,
    labels: str | None,
    mapping: tuple[str, ...],
    preprocess: pathlib.Path | None,
    batch: int | None,
    limit: int | None,
    json_file: pathlib.Path | None,
    quiet: bool,
    verbose: bool,
    **given: Any,
) -> int:
    """Run a recipe of passes over MODEL and save the result.

    After every pass the model is checked, loaded and run by ONNX Runtime beside the original. Without --recipe the
    built-in recipe int8 runs: 8-bit weights, no data needed.
    """
    report = Report(json_file, quiet, verbose)
    running.keep_inputs(report, out, recipe, preprocess)
    chosen = Recipe.load(recipe or DEFAULT_RECIPE)
    passes = " -> ".join(step.name for step in chosen.steps)
    report.say(f"recipe {chosen.name}{' (the default)' if recipe is None else ''}: {passes}")
    data = options.reading(labels, mapping, preprocess, limit, batch)
    done = running.run_compress(model, chosen, report, out=out, data_options=data, **given)
    return running.finish(done, report)
