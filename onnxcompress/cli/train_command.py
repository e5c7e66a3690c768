"""`onnxcompress train`."""

from __future__ import annotations

import pathlib
from typing import Any

import click

from onnxcompress import registry
from onnxcompress.cli import options, running


@click.command("train")
@click.argument("model", type=options.MODEL)
@options.out_option
@options.training_options(registry.load("finetune"))
def command(model: pathlib.Path, out: pathlib.Path, **given: Any) -> int:
    """Train MODEL on labels, or a language model on its next tokens; from scratch with `--init random`.

    What compression fixed stays fixed: zeros, codes, integers.
    """
    return running.run_training(None, model, out, **given)
