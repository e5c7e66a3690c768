"""The pass `simplify`: the same function in fewer nodes and bytes."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from onnxcompress.contract import Coverage, Left, Pass, Reason, Run, Touched, parameter
from onnxcompress.encodings.functions import lift_ir_version
from onnxcompress.model.weights import Weight, weights
from onnxcompress.passes.simplification.bench import INITIALIZERS_ARE_CONSTANT, Bench
from onnxcompress.passes.simplification.branches import Branches
from onnxcompress.passes.simplification.dead import DeadCode
from onnxcompress.passes.simplification.duplicates import Duplicates
from onnxcompress.passes.simplification.folding import Folding
from onnxcompress.passes.simplification.identities import Identities
from onnxcompress.passes.simplification.norm import BatchNorms

_ROUNDS = 20  # each round removes something, and real models settle in three


@dataclasses.dataclass(frozen=True, kw_only=True)
class Simplify(Pass):
    """Rewrites a model into fewer nodes and bytes that compute the same; the file never grows.

    1. Initializers that are also graph inputs become constants, which exporters mean them to be.
    2. Nodes that change nothing go (`simplification/identities.py`).
    3. What depends on constants alone is computed (`folding.py`); an `If` with a constant condition becomes the branch
       it selects (`branches.py`).
    4. BatchNormalization is folded into the convolution or Gemm before it (`norm.py`).
    5. Equal constants and equal nodes are kept once (`duplicates.py`).
    6. What nothing needs is removed (`dead.py`).

    Rules 1, 2, 3, 5 and 6 keep every output bit for bit; rule 4 keeps it to rounding. Names of inputs, outputs and of
    all nodes and tensors that survive stay. Encodings and quantization are left as they are.
    """

    name: ClassVar[str] = "simplify"

    fold_constants: bool = parameter(True, "compute what depends on constants alone")
    fold_batch_norm: bool = parameter(True, "fold BatchNormalization into the operator before it")
    deduplicate: bool = parameter(True, "keep equal constants and equal nodes once")
    remove_dead: bool = parameter(True, "remove nodes, constants and functions that nothing needs")
    freeze_initializers: bool = parameter(True, "make constants of initializers that are also graph inputs")

    def apply(self, model: ir.Model, run: Run) -> Coverage:
        """Simplify `model` in place until nothing changes any more."""
        coverage = Coverage()
        before = weights(model)
        sizes = {weight.key: weight.nbytes for weight in before}
        protected = frozenset(id(weight.value) for weight in before if not self.select.allows(weight))
        bench = Bench(model, run.work, protected)
        if self.freeze_initializers:
            self._freeze(bench, coverage)
        for _ in range(_ROUNDS):
            if not self._round(bench):
                break
        coverage.rewrites = {rule: count for rule, count in sorted(bench.counts.items()) if count}
        self._account(bench, before, sizes, coverage)
        return coverage

    def _round(self, bench: Bench) -> bool:
        """Every rule once; True when any changed anything."""
        changed = Identities(bench).run()
        if self.fold_constants:
            folded = Folding(bench).run()
            bench.counts["fold-constants"] += folded
            changed |= bool(folded) | Branches(bench).run()
        if self.fold_batch_norm:
            changed |= BatchNorms(bench).run()
        if self.deduplicate:
            changed |= Duplicates(bench).run()
        if self.remove_dead:
            changed |= DeadCode(bench).run()
        return changed

    def _freeze(self, bench: Bench, coverage: Coverage) -> None:
        """Rule 1. Below IR 4 the format demands the listing and runtimes take them as constants all the same."""
        model = bench.model
        listed = [value for value in model.graph.inputs if value.is_initializer()]
        if not listed:
            return
        if model.ir_version < INITIALIZERS_ARE_CONSTANT:
            lift_ir_version(model, INITIALIZERS_ARE_CONSTANT)
        else:
            for value in listed:
                model.graph.inputs.remove(value)
            coverage.warnings.append(
                f"{len(listed)} initializers were also graph inputs, which a caller could override "
                f"({listed[0].name}, ...); they are constants now. To keep them: freeze_initializers: false"
            )
        bench.counts["freeze-initializers"] += len(listed)

    def _account(self, bench: Bench, before: list[Weight], sizes: dict[str, int], coverage: Coverage) -> None:
        """Say of every weight there was whether it is still there as it was."""
        after = {_place(weight): weight for weight in weights(bench.model)}
        # Weights the pass made; the first of those that went into one carries its bytes.
        made = {id(weight.value): weight for weight in after.values()}
        for weight in before:
            made.pop(id(weight.value), None)
        for weight in before:
            key, size, now = weight.key, sizes[weight.key], after.get(_place(weight))
            detail, into = bench.notes.get(id(weight.value), ("", None))
            if now is not None and now.key == key and not detail:
                reason = Reason.EXCLUDED if id(weight.value) in bench.protected else Reason.UNTOUCHED
                coverage.left.append(Left(key, size, reason))
                continue
            result = now if now is not None else made.pop(id(into), None)
            if not detail:
                detail = f"is now {now.key}" if now is not None else "nothing used it"
            coverage.touched.append(Touched(key, size, result.nbytes if result is not None else 0, detail=detail))


def _place(weight: Weight) -> tuple[int, str]:
    """What identifies a weight while the graph around it changes."""
    return id(weight.value), weight.attribute[1] if weight.attribute is not None else ""
