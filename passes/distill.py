"""Distillation: the compressed model learns to give its original's outputs, and keeps its zeros, codes and integers."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import onnx_ir as ir

from onnxcompress.contract import Coverage, Run, parameter
from onnxcompress.errors import PassError
from onnxcompress.model.load import load
from onnxcompress.passes.training.training import Training
from onnxcompress.training.targets import ALPHA, FEATURE_LOSSES, HOTTEST, TEMPERATURE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distill(Training):
    """Train every weight against a teacher's outputs (Hinton, Vinyals, Dean, 2015).

    1. The teacher is the model the recipe started from, or the file `teacher` names.
    2. Labels are used where the data has them (`alpha`), and not needed.
    3. What the passes before fixed stays fixed: pruned weights stay zero, shared ones keep their codes, quantized ones
       their scales; only what an encoding offers for training is trained.
    4. Running statistics, fixed transforms and constants that are no weights are left.
    """

    name: ClassVar[str] = "distill"

    teacher: str = parameter("", "model to learn from; the recipe's input where none is given", file=True)
    temperature: float | None = parameter(
        None, f"of the soft targets; {TEMPERATURE:g}, or the logits' spread where that is more", gt=0, le=HOTTEST
    )
    alpha: float | None = parameter(None, f"share of the labels' loss; {ALPHA:g}", ge=0, le=1)
    squared: bool = parameter(True, "multiply the soft targets' loss by T^2")
    outputs: tuple[str, ...] = parameter((), "an output to learn, NAME or STUDENT=TEACHER; all where none is given")
    inputs: tuple[str, ...] = parameter((), "an input that the teacher calls otherwise, STUDENT=TEACHER")
    features: tuple[str, ...] = parameter((), "a tensor within to match too, NAME or STUDENT=TEACHER")
    feature_loss: Literal["values", "cosine"] = parameter(
        "values", "squared error of the features, or 1 - cosine", choices=FEATURE_LOSSES
    )
    feature_weight: float = parameter(1.0, "what the features' loss is multiplied by", ge=0)

    def lacks(self, run: Run) -> str:
        if self.teacher:
            load(self.teacher)
        return super().lacks(run)

    def apply(self, model: ir.Model, run: Run) -> Coverage:
        teacher = load(self.teacher) if self.teacher else run.original
        if teacher is None:
            raise PassError("the run does not know the model it started from: give `teacher: FILE`")
        return self.fit(teacher, model, run)
