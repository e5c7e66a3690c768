"""`onnxcompress distill`."""

from __future__ import annotations

import pathlib
from typing import Any

import click

from onnxcompress import registry
from onnxcompress.cli import options, running


@click.command("distill")
@click.argument("teacher", type=options.MODEL)
@click.argument("student", type=options.MODEL)
@options.out_option
@options.training_options(registry.load("distill"))
def command(teacher: pathlib.Path, student: pathlib.Path, out: pathlib.Path, **given: Any) -> int:
    """Heal STUDENT: train it to give TEACHER's outputs, and the labels where the data has them.

    What compression fixed stays fixed: zeros, codes, integers. The teacher is the original model, or any other with the
    same outputs.
    """
    return running.run_training(teacher, student, out, **given)
