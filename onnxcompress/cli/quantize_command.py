"""`onnxcompress quantize`."""

from __future__ import annotations

import pathlib
from typing import Any

import click

from onnxcompress import registry
from onnxcompress.cli import options, running
from onnxcompress.cli.report import Report
from onnxcompress.recipe import make_pass


@click.command("quantize")
@click.argument("model", type=options.MODEL)
@options.out_option
@click.option(
    "--mode",
    type=click.Choice(["dynamic", "static"]),
    required=True,
    help="activations measured at run time, or on calibration data",
)
@click.option("--calibration", metavar="DATA", help=".npz, folder, or file.py:function (static)")
@click.option("--method", type=click.Choice(["minmax"]), help="how ranges are chosen (static)  [default: minmax]")
@click.option("--target", type=options.TARGETS, help="where the model will run  [default: cpu]")
@options.select_options
@options.data_options
@options.common_options
def command(
    model: pathlib.Path,
    out: pathlib.Path,
    mode: str,
    method: str | None,
    calibration: str | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    labels: str | None,
    mapping: tuple[str, ...],
    preprocess: pathlib.Path | None,
    batch: int | None,
    limit: int | None,
    json_file: pathlib.Path | None,
    quiet: bool,
    verbose: bool,
    **rest: Any,
) -> int:
    """Store the weights of MODEL as 8-bit integers, and compute with integers where that is fast."""
    if mode == "static" and calibration is None:
        raise click.UsageError("--mode static measures activations and needs data: --calibration DATA")
    if method is not None and mode != "static":
        raise click.UsageError("--method belongs to --mode static")
    given: dict[str, Any] = {"select": options.select_of(include, exclude)}
    if method is not None:
        given["method"] = method
    chosen = make_pass(registry.load(f"{mode}-quantization"), given, "quantize")
    data = options.reading(labels, mapping, preprocess, limit, batch)
    report = Report(json_file, quiet, verbose)
    return running.single_pass(model, out, chosen, report, calibration=calibration, data_options=data, **rest)
