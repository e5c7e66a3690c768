"""`onnxcompress compress`."""

from __future__ import annotations

import pathlib
from typing import Any

import click

from onnxcompress.api import DEFAULT_RECIPE
from onnxcompress.cli import common
from onnxcompress.recipe import Recipe


@click.command("compress")
@click.argument("model", type=common.MODEL)
@common.out_option
@click.option(
    "--recipe",
    metavar="NAME|FILE",
    help=f"lossless, int8, int8-static, small or a YAML file  [default: {DEFAULT_RECIPE}]",
)
@click.option(
    "--calibration", metavar="DATA", help=".npz, folder, or file.py:function, for passes that measure activations"
)
@click.option("--eval", "evaluate", metavar="DATA", help="data to score the model on after every pass")
@click.option("--metric", metavar="M", help="accuracy, f1, spearman, perplexity, ... or file.py:function")
@click.option("--output", metavar="NAME", help="the output the metric reads")
@click.option(
    "--max-drop", type=float, metavar="X", help="the budget: exit status 1 unless the drop is shown to stay below"
)
@click.option("--target", type=common.TARGETS, help="where the model will run  [default: the recipe's, or cpu]")
@click.option("--prefer", type=click.Choice(["size", "speed"]), help="what to choose where they conflict")
@click.option("--resume", is_flag=True, help="go on where an interrupted run stopped")
@common.data_options
@common.common_options
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
    **options: Any,
) -> int:
    """Run a recipe of passes over MODEL and save the result.

    After every pass the model is checked, loaded and run by ONNX Runtime beside the original. Without --recipe the
    built-in recipe int8 runs: 8-bit weights, no data needed.
    """
    report = common.Report(json_file, quiet, verbose)
    common.keep_inputs(report, out, recipe, preprocess)
    chosen = Recipe.load(recipe or DEFAULT_RECIPE)
    passes = " -> ".join(step.name for step in chosen.steps)
    report.say(f"recipe {chosen.name}{' (the default)' if recipe is None else ''}: {passes}")
    data = common.reading(labels, mapping, preprocess, batch, limit)
    return common.finish(common.run_compress(model, chosen, report, out=out, data_options=data, **options), report)
