"""Distillation: the compressed model learns to give its original's outputs, and keeps its zeros, codes and integers."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import onnx_ir as ir

from onnxcompress.contract import Coverage, Needs, Pass, Run, parameter
from onnxcompress.errors import PassError
from onnxcompress.model.load import load, source_of
from onnxcompress.passes.training.fit import fit
from onnxcompress.training.distill import Settings
from onnxcompress.training.optimizers import OPTIMIZERS
from onnxcompress.training.targets import LOSSES, Objective


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distill(Pass):
    """Train every weight against a teacher's outputs (Hinton, Vinyals, Dean, 2015).

    1. The teacher is the model the recipe started from, or the file `teacher` names.
    2. Labels are used where the data has them (`alpha`), and not needed.
    3. What the passes before fixed stays fixed: pruned weights stay zero, shared ones keep their codes, quantized ones
       their scales; only what an encoding offers for training is trained.
    4. Running statistics, fixed transforms and constants that are no weights are left.
    """

    name: ClassVar[str] = "distill"
    needs: ClassVar[Needs] = Needs(gradients=True)

    teacher: str = parameter("", "model to learn from; the recipe's input where none is given")
    data: str = parameter("", "training data; the calibration data where none is given")
    epochs: int = parameter(3, "passes over the data", ge=1)
    batch: int = parameter(32, "samples an update", ge=1)
    lr: float | None = parameter(None, "peak learning rate; 1e-3 for adamw, 1e-2 for sgd", gt=0)
    optimizer: Literal["adamw", "sgd"] = parameter("adamw", "how weights are updated", choices=OPTIMIZERS)
    temperature: float | None = parameter(None, "of the soft targets; 4, or the spread of the logits", gt=0)
    alpha: float | None = parameter(None, "share of the labels' loss; 0.1", ge=0, le=1)
    loss: Literal["auto", "classes", "binary", "values", "cosine"] = parameter(
        "auto", "what the outputs are", choices=LOSSES
    )

    def apply(self, model: ir.Model, run: Run) -> Coverage:
        objective = Objective(self.loss, self.temperature, self.alpha)
        settings = Settings(
            epochs=self.epochs,
            batch=self.batch,
            lr=self.lr,
            optimizer=self.optimizer,
            seed=run.seed,
            select=self.select,
        )
        return fit(self._teacher(model), model, run, self.data, objective, settings)

    def _teacher(self, model: ir.Model) -> ir.Model:
        if self.teacher:
            return load(self.teacher)
        source = source_of(model)
        if source is None or source.path is None:
            raise PassError("the model was not loaded from a file, so its original is not known: give `teacher: FILE`")
        return load(source.path)
