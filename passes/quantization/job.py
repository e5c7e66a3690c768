"""What all parts of one run of a quantization pass share."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import onnx_ir as ir

from onnxcompress.contract import Coverage, Left, Reason, Run, Touched
from onnxcompress.encodings.base import Tape
from onnxcompress.model.spill import spill
from onnxcompress.model.weights import Weight
from onnxcompress.targets import Target, find
from onnxcompress.targets.base import Weights8


@dataclasses.dataclass
class Job:
    """One model being quantized: the target's table, the pass's parameters, and the account."""

    model: ir.Model
    target: Target
    work: pathlib.Path
    weights: Weights8
    per_channel: bool
    min_elements: int
    max_error: float
    coverage: Coverage = dataclasses.field(default_factory=Coverage)
    fixed: list[str] = dataclasses.field(default_factory=list)

    @classmethod
    def of(cls, model: ir.Model, run: Run, weights: str, per_channel: bool, min_elements: int, max_error: float) -> Job:
        """For the target of `run`; `weights`: a range of integers, or "auto" for the target's.

        Raises:
            RecipeError: no such target.
        """
        target = find(run.target)
        ranges: dict[str, Weights8] = {"full": "full", "neighbours": "neighbours", "reduced": "reduced"}
        return cls(model, target, run.work, ranges.get(weights, target.weights), per_channel, min_elements, max_error)

    def left(self, weight: Weight, reason: Reason, detail: str) -> None:
        """Account for a weight that stays as it is."""
        self.coverage.left.append(Left(weight.key, weight.nbytes, reason, detail))

    def touched(self, weight: Weight, before: int, after: int, error: float, detail: str) -> None:
        """Account for a weight in its new form."""
        self.coverage.touched.append(Touched(weight.key, before, after, error, detail))

    def note_overridable(self, weight: Weight) -> None:
        """Remember that a weight the caller could replace becomes fixed. To be called before it is rewritten."""
        if weight.overridable:
            self.fixed.append(weight.key)

    def finish(self) -> Coverage:
        """The account, with what a user should know about all weights together."""
        if len(self.fixed) == 1:
            self.coverage.warnings.append(f"{self.fixed[0]}: was also an input of the model and no longer is")
        elif self.fixed:
            many = f"{len(self.fixed)} weights, {self.fixed[0]} among them,"
            self.coverage.warnings.append(f"{many} were also inputs of the model and no longer are")
        return self.coverage

    def count(self, rule: str, times: int = 1) -> None:
        """Count a rewrite."""
        self.coverage.rewrites[rule] = self.coverage.rewrites.get(rule, 0) + times

    def constant(self, tape: Tape, array: np.ndarray, name: str) -> ir.Value:
        """A constant on `tape`; a large array moves to the work folder."""
        return tape.constant(spill(array, self.work), name)
