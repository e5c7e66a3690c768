"""Finetuning: the compressed model learns from labels alone, and keeps its zeros, codes and integers."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import onnx_ir as ir

from onnxcompress.contract import Coverage, Needs, Pass, Run, parameter
from onnxcompress.passes.training.fit import fit
from onnxcompress.training.distill import Settings
from onnxcompress.training.optimizers import OPTIMIZERS
from onnxcompress.training.targets import LOSSES, Objective


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finetune(Pass):
    """Train every weight on labels.

    1. Labels come with the data (`y`); a causal language model without any learns the next tokens.
    2. What the passes before fixed stays fixed: pruned weights stay zero, shared ones keep their codes, quantized ones
       their scales; only what an encoding offers for training is trained.
    3. Running statistics, fixed transforms and constants that are no weights are left.
    """

    name: ClassVar[str] = "finetune"
    needs: ClassVar[Needs] = Needs(gradients=True, labels=True)

    data: str = parameter("", "training data with labels; the calibration data where none is given")
    epochs: int = parameter(3, "passes over the data", ge=1)
    batch: int = parameter(32, "samples an update", ge=1)
    lr: float | None = parameter(None, "peak learning rate; 1e-3 for adamw, 1e-2 for sgd", gt=0)
    optimizer: Literal["adamw", "sgd"] = parameter("adamw", "how weights are updated", choices=OPTIMIZERS)
    loss: Literal["auto", "classes", "binary", "values", "cosine"] = parameter(
        "auto", "what the outputs are", choices=LOSSES
    )

    def apply(self, model: ir.Model, run: Run) -> Coverage:
        settings = Settings(
            epochs=self.epochs,
            batch=self.batch,
            lr=self.lr,
            optimizer=self.optimizer,
            seed=run.seed,
            select=self.select,
        )
        return fit(None, model, run, self.data, Objective(self.loss), settings)
