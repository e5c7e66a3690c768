"""`onnxcompress prune`."""

from __future__ import annotations

import pathlib
from typing import Any

import click

from onnxcompress import registry
from onnxcompress.cli import options, running
from onnxcompress.cli.report import Report
from onnxcompress.recipe import make_pass


@click.command("prune")
@click.argument("model", type=options.MODEL)
@options.out_option
@click.option("--sparsity", type=float, default=0.5, show_default=True, help="share of the weights to set to zero")
@click.option(
    "--scope",
    type=click.Choice(["global", "layer"]),
    default="global",
    show_default=True,
    help="one threshold for all weights, or one each",
)
@click.option(
    "--storage",
    type=click.Choice(["masked", "sparse"]),
    default="masked",
    show_default=True,
    help="dense with zeros, or a bit mask and the values left",
)
@options.select_options
@options.common_options
def command(
    model: pathlib.Path,
    out: pathlib.Path,
    sparsity: float,
    scope: str,
    storage: str,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    json_file: pathlib.Path | None,
    quiet: bool,
    verbose: bool,
    **rest: Any,
) -> int:
    """Set the weights of least magnitude in MODEL to zero.

    The file becomes smaller with `--storage sparse`, or when it is packed; later passes and training keep the zeros.
    """
    if sparsity == 1:
        raise click.UsageError("--sparsity 1 leaves no weight of the model; give a share below 1")
    given = {"sparsity": sparsity, "scope": scope, "storage": storage, "select": options.select_of(include, exclude)}
    chosen = make_pass(registry.load("magnitude-pruning"), given, "prune")
    return running.single_pass(model, out, chosen, Report(json_file, quiet, verbose), **rest)
