"""`onnxcompress share`."""

from __future__ import annotations

import pathlib
from typing import Any

import click

from onnxcompress import registry
from onnxcompress.cli import options, running
from onnxcompress.cli.report import Report
from onnxcompress.recipe import make_pass


@click.command("share")
@click.argument("model", type=options.MODEL)
@options.out_option
@click.option("--bits", type=int, default=4, show_default=True, help="bits a weight: 1, 2, 4 or 8")
@click.option("--clusters", type=int, help="values in a codebook, if fewer than 2^bits")
@click.option(
    "--granularity",
    type=click.Choice(["auto", "tensor", "channel"]),
    default="auto",
    show_default=True,
    help="one codebook a tensor, one an output channel, or as the error asks",
)
@options.select_options
@options.common_options
def command(
    model: pathlib.Path,
    out: pathlib.Path,
    bits: int,
    clusters: int | None,
    granularity: str,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    json_file: pathlib.Path | None,
    quiet: bool,
    verbose: bool,
    **rest: Any,
) -> int:
    """Give every weight in MODEL a small codebook and packed codes.

    ONNX Runtime expands the codes when it loads the model: the file is smaller, speed and memory are those of the
    float model.
    """
    given = {"bits": bits, "clusters": clusters, "granularity": granularity}
    chosen = make_pass(
        registry.load("weight-sharing"), {**given, "select": options.select_of(include, exclude)}, "share"
    )
    return running.single_pass(model, out, chosen, Report(json_file, quiet, verbose), **rest)
