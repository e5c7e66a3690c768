"""Finetuning: the compressed model learns from labels alone, and keeps its zeros, codes and integers."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from onnxcompress.contract import Coverage, Needs, Run
from onnxcompress.passes.training.training import Training


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finetune(Training):
    """Train every weight on labels.

    1. Labels come with the data (`y`); a causal language model without any learns the next tokens.
    2. What the passes before fixed stays fixed: pruned weights stay zero, shared ones keep their codes, quantized ones
       their scales; only what an encoding offers for training is trained.
    3. Running statistics, fixed transforms and constants that are no weights are left.
    """

    name: ClassVar[str] = "finetune"
    needs: ClassVar[Needs] = Needs(gradients=True, labels=True)

    def apply(self, model: ir.Model, run: Run) -> Coverage:
        return self.fit(None, model, run)
