"""One training as a step of a recipe: where the data comes from, and the account of every weight."""

from __future__ import annotations

import pathlib
from typing import Any

import onnx_ir as ir

from onnxcompress.contract import Coverage, Left, Reason, Run, Touched
from onnxcompress.data.batch import Data, FeedsOnly
from onnxcompress.data.source import open_data
from onnxcompress.data.specs import input_specs
from onnxcompress.errors import DataError
from onnxcompress.model.weights import weights
from onnxcompress.training.distill import Conditions, Settings, distill, write
from onnxcompress.training.targets import Objective


def fit(
    original: ir.Model | None, model: ir.Model, run: Run, data: str, objective: Objective, settings: Settings
) -> Coverage:
    """Train `model` in place. `data`: a path, or "" for the run's own.

    Raises:
        DataError: there is no data, or it does not fit.
        PassError: nothing can be trained, or the loss is no longer finite.
    """
    conditions = Conditions(threads=run.threads, work=pathlib.Path(run.work), progress=run.progress)
    source = training_data(model, run, data, settings.batch)
    done = distill(original, model, source, objective=objective, settings=settings, conditions=conditions)
    before = {weight.key: weight.nbytes for weight in weights(model)}
    errors = write(model, done.parameters, conditions.work)
    after = {weight.key: weight.nbytes for weight in weights(model)}
    coverage = Coverage(rewrites={"training steps": done.steps})
    for key, size in before.items():
        if key in errors:
            coverage.touched.append(Touched(key, size, after[key], errors[key], "trained"))
        else:
            coverage.left.append(Left(key, size, Reason.ROLE, done.left.get(key, "has no effect on the loss")))
    return coverage


def training_data(model: ir.Model, run: Run, data: str, batch: int) -> Data:
    """The data to train on, with its labels.

    Raises:
        DataError: there is none.
    """
    if data:
        options: dict[str, Any] = {"batch": batch, "trim": False, "last": "fill"}
        return open_data(data, input_specs(model), **options)
    if isinstance(run.feeds, FeedsOnly):
        return run.feeds.data
    raise DataError("training needs data: `data: FILE` in the recipe, or --calibration DATA")
