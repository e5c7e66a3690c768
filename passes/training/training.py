"""What finetuning and distillation share: the parameters of a training, its data, and the account of every weight."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import onnx_ir as ir

from onnxcompress.contract import Coverage, Left, Needs, Pass, Reason, Run, Touched, parameter
from onnxcompress.data.batch import Data, FeedsOnly
from onnxcompress.data.source import open_data
from onnxcompress.data.specs import input_specs
from onnxcompress.errors import DataError, RecipeError
from onnxcompress.model import bridge
from onnxcompress.model.weights import Weight, weights
from onnxcompress.training.distill import distill, write
from onnxcompress.training.loop import is_better
from onnxcompress.training.optimizers import OPTIMIZERS
from onnxcompress.training.schedules import KINDS
from onnxcompress.training.settings import BATCH_NORMS, RATES, Conditions
from onnxcompress.training.targets import LOSSES
from onnxcompress.training.words import chosen
from onnxcompress.training.zeros import KEEP_ZEROS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training(Pass):
    """Parameters by the names that `training.settings.Settings` and `training.targets.Objective` have for them."""

    needs: ClassVar[Needs] = Needs(gradients=True)

    data: str = parameter("", "training data; the calibration data where none is given", file=True)
    epochs: int | None = parameter(None, "passes over the data; 3, or as many as make 300 updates, at most 30", ge=1)
    batch: int = parameter(32, "samples an update", ge=1)
    lr: float | None = parameter(
        None, "peak learning rate; " + ", ".join(f"{rate:g} for {name}" for name, rate in RATES.items()), gt=0
    )
    optimizer: Literal["adamw", "sgd"] = parameter("adamw", "how weights are updated", choices=OPTIMIZERS)
    momentum: float = parameter(0.9, "of sgd", ge=0, lt=1)
    weight_decay: float | None = parameter(None, "of layers' weights; 0.01 for adamw, 0 for sgd", ge=0)
    relative: bool = parameter(True, "adamw's steps in proportion to each weight's magnitude")
    schedule: Literal["cosine", "linear", "step", "constant"] = parameter(
        "cosine", "of the learning rate", choices=KINDS
    )
    warmup: float = parameter(0.05, "share of the steps in which the learning rate rises", ge=0, lt=1)
    clip: float = parameter(1.0, "norm gradients are clipped to; 0 for none", ge=0)
    ema: float | None = parameter(None, "decay of an average of the weights, which then is the result", gt=0, lt=1)
    l1: float = parameter(0.0, "penalty on the absolute values of layers' weights", ge=0)
    batch_norm: Literal["frozen", "trained"] | None = parameter(
        None, "BatchNormalization by its running statistics, or by those of each batch; frozen", choices=BATCH_NORMS
    )
    keep_zeros: Literal["auto", "always", "never"] = parameter(
        "auto", "zeros that stay: those of pruning, all, or none", choices=KEEP_ZEROS
    )
    sparsity: float | None = parameter(None, "share of zeros to bring layers' weights to on the way", ge=0, lt=1)
    sparsity_until: float = parameter(0.7, "share of the steps in which that share rises", gt=0, le=1)
    learn_scales: bool = parameter(False, "train the scales of quantized weights, too")
    loss: Literal["auto", "classes", "binary", "values", "cosine"] = parameter(
        "auto", "what the outputs are", choices=LOSSES
    )
    smoothing: float = parameter(0.0, "share of a label that goes to all classes alike", ge=0, lt=1)
    outputs: tuple[str, ...] = parameter((), "an output to learn; all where none is given")
    provider: str = parameter("cpu", "where to train: cpu, cuda")

    def __post_init__(self) -> None:
        """Refuse what has no meaning for single weights.

        Raises:
            RecipeError: a parameter out of bounds, or overrides.
        """
        super().__post_init__()
        if self.select.overrides:
            raise RecipeError(f"{self.name}: select: overrides: one training has one setting for all its weights")

    def lacks(self, run: Run) -> str:
        if self.data:
            self._open(input_specs(run.original) if run.original is not None else [], run)
        elif not isinstance(run.feeds, FeedsOnly):
            return "trains and needs data: `data: FILE` in the recipe, or --calibration DATA"
        return ""

    def fit(self, teacher: ir.Model | None, model: ir.Model, run: Run) -> Coverage:
        """Train `model` in place, against `teacher` where there is one.

        Where the run evaluates, a model that scored better before stays as it was; not with gradual pruning, since it
        has not the sparsity that is asked for.

        Raises:
            DataError: there is no data, or it does not fit.
            PassError: nothing can be trained, or the loss is no longer finite.
        """
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        settings, objective = chosen({**given, "seed": run.seed})
        data = self._data(model, run)
        conditions = Conditions(
            provider=self.provider,
            threads=run.threads,
            work=run.state or pathlib.Path(run.work),
            resume=run.state is not None,
            progress=run.progress,
            identity={"data": data.digest()},
        )
        before = run.evaluate(model) if run.evaluate is not None and self.sparsity is None else None
        done = distill(
            teacher,
            model,
            data,
            objective=objective,
            settings=settings,
            reference=run.original,
            conditions=conditions,
        )
        if before is not None and (worse := self._worse(model, done.parameters, before, run)):
            left = [Left(weight.key, weight.nbytes, Reason.WORSE, worse) for weight in weights(model)]
            return Coverage(left=left, warnings=[worse])
        held = {weight.key: (weight.nbytes, self._reason(weight)) for weight in weights(model)}
        errors = write(model, done.parameters, pathlib.Path(run.work))
        after = {weight.key: weight.nbytes for weight in weights(model)}
        coverage = Coverage(rewrites={"training steps": done.steps})
        for key, (size, reason) in held.items():
            if key in errors:
                coverage.touched.append(Touched(key, size, after[key], errors[key], "trained"))
            else:
                coverage.left.append(Left(key, size, reason, done.left.get(key, "has no effect on the loss")))
        return coverage

    def _worse(self, model: ir.Model, trained: Mapping[str, Any], before: float, run: Run) -> str:
        """Why what was learned is not kept, if it is not: `model` scores better as it is.

        Epochs are not chosen by their score, as they are from file to file: the verdict on the recipe's result is of
        the same data, and would no longer be of data that nothing was chosen by.
        """
        assert run.evaluate is not None
        candidate = bridge.clone(model)
        write(candidate, trained, pathlib.Path(run.work))
        score = run.evaluate(candidate)
        if not is_better(before, score, run.higher_is_better):
            return ""
        return f"what was learned is not kept: the score went from {before:.4f} to {score:.4f}"

    def _reason(self, weight: Weight) -> Reason:
        """Why `weight` is left, if it is."""
        if not self.select.allows(weight):
            return Reason.EXCLUDED
        if weight.attribute is not None:
            return Reason.ATTRIBUTE
        if weight.value.is_graph_output():
            return Reason.GRAPH_OUTPUT
        return Reason.OVERRIDABLE if weight.overridable else Reason.ROLE

    def _data(self, model: ir.Model, run: Run) -> Data:
        if self.data:
            return self._open(input_specs(model), run)
        if isinstance(run.feeds, FeedsOnly):
            return run.feeds.data
        raise DataError(self.lacks(run))

    def _open(self, specs: Any, run: Run) -> Data:
        return open_data(self.data, specs, batch=self.batch, trim=False, last="fill", **run.reading)
