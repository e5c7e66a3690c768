"""`onnxcompress train`."""

from __future__ import annotations

import pathlib
import sys
from typing import Any

import click

from onnxcompress.cli import common
from onnxcompress.training.optimizers import OPTIMIZERS
from onnxcompress.training.schedules import KINDS
from onnxcompress.training.targets import LOSSES


@click.command("train")
@click.argument("model", type=common.MODEL)
@common.out_option
@click.option("--data", required=True, metavar="DATA", help="training data: .npz, folder, or file.py:function")
@click.option(
    "--init", type=click.Choice(["keep", "random"]), default="keep", show_default=True, help="weights to start from"
)
@click.option("--epochs", type=click.IntRange(min=1), default=3, show_default=True, help="passes over the data")
@click.option("--batch", type=click.IntRange(min=1), default=32, show_default=True, help="samples an update")
@click.option("--lr", type=float, metavar="X", help="peak learning rate  [default: 1e-3 adamw, 1e-2 sgd]")
@click.option("--optimizer", type=click.Choice(OPTIMIZERS), default="adamw", show_default=True)
@click.option("--schedule", type=click.Choice(KINDS), default="cosine", show_default=True, help="of the learning rate")
@click.option("--loss", type=click.Choice(LOSSES), default="auto", show_default=True, help="what the outputs are")
@click.option("--output", "outputs", multiple=True, metavar="NAME", help="an output to learn; may be repeated")
@click.option("--clip", type=float, default=1.0, show_default=True, help="norm gradients are clipped to, 0 for none")
@click.option("--weight-decay", type=float, help="[default: 0.01 adamw, 0 sgd]")
@click.option("--eval", "evaluate", metavar="DATA", help="data to keep the best epoch by; needs --metric")
@click.option("--metric", metavar="M", help="accuracy, f1, spearman, perplexity, ... or file.py:function")
@click.option("--patience", type=click.IntRange(min=1), help="stop after so many epochs without a better score")
@click.option("--provider", default="cpu", show_default=True, help="where to train: cpu, cuda")
@click.option("--resume", is_flag=True, help="go on where an interrupted run stopped")
@common.select_options
@click.option("--labels", metavar="KEY", help="array that holds the labels  [default: y]")
@click.option("--map", "mapping", multiple=True, metavar="KEY=INPUT", help="array KEY feeds INPUT; may be repeated")
@click.option("--preprocess", type=common.MODEL, metavar="FILE", help="YAML with transpose, scale, mean, std, dtype")
@click.option("--limit", type=click.IntRange(min=1), help="use at most so many samples")
@common.common_options
def command(
    model: pathlib.Path,
    out: pathlib.Path,
    json_file: pathlib.Path | None,
    quiet: bool,
    verbose: bool,
    labels: str | None,
    mapping: tuple[str, ...],
    preprocess: pathlib.Path | None,
    limit: int | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    **options: Any,
) -> int:
    """Train MODEL on labels, or a language model on its next tokens; from scratch with `--init random`.

    What compression fixed stays fixed: zeros, codes, integers.
    """
    from onnxcompress.healing import train

    report = common.Report(json_file, quiet, verbose)
    report.check(model, out)
    shown = common.progress(quiet)
    try:
        done = train(
            None,
            model,
            out,
            reading=common.reading(labels, mapping, preprocess, None, limit),
            select=common.select_of(include, exclude),
            progress=shown,
            say=report.say,
            **options,
        )
    except KeyboardInterrupt:
        shown.done()
        click.echo("interrupted, nothing was written; the same command with --resume goes on", err=True)
        sys.exit(130)
    finally:
        shown.done()
    report.write(done)
    return 0
