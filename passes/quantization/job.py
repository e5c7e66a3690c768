"""What all parts of one run of a quantization pass share."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import onnx_ir as ir

from onnxcompress.contract import Coverage, Left, Reason, Run, Touched
from onnxcompress.encodings.base import Tape
from onnxcompress.model.pruned import Pruned
from onnxcompress.model.roles import subgraphs
from onnxcompress.model.spill import spill
from onnxcompress.model.weights import Weight
from onnxcompress.targets import Target, find
from onnxcompress.targets.base import Weights8


@dataclasses.dataclass
class Job:
    """One model being quantized: the target's table, the pass's parameters, and the account.

    `is_pruned`: whether a weight's zeros are structure, which its integers then say, too.
    """

    model: ir.Model
    target: Target
    work: pathlib.Path
    weights: Weights8
    per_channel: bool
    min_elements: int
    max_error: float
    is_pruned: Callable[[Weight], bool]
    coverage: Coverage = dataclasses.field(default_factory=Coverage)
    fixed: list[str] = dataclasses.field(default_factory=list)
    _taken: set[str] = dataclasses.field(default_factory=set)

    @classmethod
    def of(cls, model: ir.Model, run: Run, weights: str, per_channel: bool, min_elements: int, max_error: float) -> Job:
        """For the target of `run`; `weights`: a range of integers, or "auto" for the target's.

        Raises:
            RecipeError: no such target.
        """
        target = find(run.target)
        ranges: dict[str, Weights8] = {"full": "full", "neighbours": "neighbours", "reduced": "reduced"}
        levels, pruned = ranges.get(weights, target.weights), Pruned(model, run.original)
        return cls(model, target, run.work, levels, per_channel, min_elements, max_error, pruned)

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

    def tape(self, owner: ir.Graph | ir.Function) -> Tape:
        """To record nodes for `owner`, called by names that nothing of the model has."""
        if not self._taken:
            for root in (self.model.graph, *(function.graph for function in self.model.functions.values())):
                self._taken |= {value.name or "" for value in (*root.inputs, *root.initializers.values())}
                for node in ir.traversal.RecursiveGraphIterator(root):
                    self._taken |= {output.name or "" for output in node.outputs}
                    self._taken |= {name for inner in subgraphs(node) for name in inner.initializers}
        return Tape(self.model, owner, taken=self._taken)

    def forget(self, names: Iterable[str]) -> None:
        """These names are free again."""
        self._taken.difference_update(names)

    def constant(self, tape: Tape, array: np.ndarray, name: str, notes: Mapping[str, str] | None = None) -> ir.Value:
        """A constant on `tape`; a large array moves to the work folder. `notes`: for its metadata."""
        return tape.constant(spill(array, self.work), name, notes)
