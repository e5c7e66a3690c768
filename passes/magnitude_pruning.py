"""Magnitude pruning: the weights closest to zero become zero, and are known to be so from then on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from onnxcompress.contract import Coverage, Left, Pass, Reason, Run, Touched, parameter
from onnxcompress.encodings import Masked, Sparse
from onnxcompress.errors import RecipeError
from onnxcompress.model.roles import WEIGHT_ROLES
from onnxcompress.model.spill import collect
from onnxcompress.model.weights import Weight, weights
from onnxcompress.numerics.chunks import flat, slices
from onnxcompress.numerics.importance import (
    Threshold,
    global_threshold,
    lamp_scores,
    layer_mask,
    scale_of,
    threshold_mask,
)
from onnxcompress.numerics.transforms import is_transform

EMPTIED = 0.95  # a layer that loses more than this share is warned about
SPARSE_OPSET = 11  # CumSum
SPARSE_BYTES = 200  # a call node and the headers of its constants, beside their names


@dataclasses.dataclass(frozen=True, kw_only=True)
class MagnitudePruning(Pass):
    """Set the given share of weights to zero (Han, Pool, Tran, Dally, 2015).

    1. Only weights of convolutions, matrix products, embeddings and recurrent cells are pruned; fixed transforms in
       their place (a Fourier basis, a filter bank) are left.
    2. `scope: layer` takes the same share of every weight. `scope: global` takes the least of all of them together,
       made comparable first: by layer-adaptive scores (`normalize: lamp`), or by the weight's root mean square or
       standard deviation. One raw threshold (`none`) empties layers whose weights are small.
    3. Weights that are zero already count towards the share, and stay zero.
    4. `storage: masked` keeps the dense tensor (no smaller file, but it packs well, and later passes and training keep
       the zeros); `storage: sparse` stores a bit mask and the non-zero values where that is smaller (opset 11).
    """

    name: ClassVar[str] = "magnitude-pruning"

    sparsity: float = parameter(0.5, "share of the weights to set to zero", ge=0.0, le=1.0)
    scope: Literal["global", "layer"] = parameter(
        "global", "one threshold for all, or one a weight", choices=("global", "layer")
    )
    normalize: Literal["lamp", "rms", "std", "none"] = parameter(
        "lamp", "what makes magnitudes comparable (scope global)", choices=("lamp", "rms", "std", "none")
    )
    storage: Literal["masked", "sparse"] = parameter(
        "masked", "dense with zeros, or a bit mask and the values left", choices=("masked", "sparse")
    )

    def __post_init__(self) -> None:
        """Refuse what has no meaning for single weights.

        Raises:
            RecipeError: a parameter out of bounds, or an override of `normalize`.
        """
        super().__post_init__()
        for pattern, values in self.select.overrides.items():
            if "normalize" in values:
                raise RecipeError(f"{self.name}: select: overrides: {pattern}: normalize holds for all weights or none")

    def apply(self, model: ir.Model, run: Run) -> Coverage:
        coverage, chosen = Coverage(), []
        for weight in weights(model, run.work):
            refused = self.refuses(weight)
            if refused is None:
                chosen.append(weight)
            else:
                coverage.left.append(Left(weight.key, weight.nbytes, *refused))
        run.progress.start(self.name, len(chosen))
        for weight, own, mask in self._masks(chosen):
            own._prune(weight, mask, coverage, run)
            run.progress.step()
        run.progress.done()
        return coverage

    def refuses(self, weight: Weight) -> tuple[Reason, str] | None:
        if weight.attribute is not None:
            return Reason.ATTRIBUTE, "lives in an attribute of an ai.onnx.ml operator"
        if not self.select.allows(weight):
            return Reason.EXCLUDED, ""
        if weight.encoding.kind in ("codebook", "affine"):
            return Reason.ALREADY_ENCODED, f"is stored as {weight.encoding.kind}; prune before sharing or quantizing"
        if weight.role not in WEIGHT_ROLES:
            return Reason.ROLE, f"{weight.role}: is no weight of a layer"
        if is_transform(weight.array(), weight.axis()):
            return Reason.ROLE, "a fixed transform (Fourier, filter bank), not learned"
        if weight.value.is_graph_output():
            return Reason.GRAPH_OUTPUT, "is itself an output"
        if not all(
            np.isfinite(part).all() for part in np.array_split(weight.array().reshape(-1), 1 + weight.size // (1 << 24))
        ):
            return Reason.NOT_FINITE, "holds NaN or Inf; mend the model or exclude it"
        return None

    def _masks(self, chosen: list[Weight]) -> Iterator[tuple[Weight, MagnitudePruning, np.ndarray]]:
        """Each weight with what holds for it and its mask (True: keep).

        Weights whose share is overridden get their own threshold.
        """
        given = {id(w): self.select.parameters(w) for w in chosen}
        own = {key: dataclasses.replace(self, **values) for key, values in given.items()}
        together = [w for w in chosen if own[id(w)].scope == "global" and "sparsity" not in given[id(w)]]
        threshold = Threshold(0.0, 0)
        if together:
            threshold = global_threshold(lambda: (self._scores(w) for w in together), self.sparsity)
        shared = {id(w) for w in together}
        for weight in chosen:
            if id(weight) in shared:
                mask, threshold = self._mask(weight, threshold)
            else:
                mask = layer_mask(weight.array(), own[id(weight)].sparsity)
            yield weight, own[id(weight)], mask

    def _mask(self, weight: Weight, threshold: Threshold) -> tuple[np.ndarray, Threshold]:
        scores, scale = self._scores(weight)
        return threshold_mask(scores, threshold, scale)

    def _scores(self, weight: Weight) -> tuple[np.ndarray, float]:
        """What is compared between weights, and what it is divided by first."""
        array = weight.array()
        if self.normalize == "lamp":
            return lamp_scores(array), 1.0
        return array, scale_of(array, self.normalize)

    def _prune(self, weight: Weight, mask: np.ndarray, coverage: Coverage, run: Run) -> None:
        array, before = weight.array(), weight.nbytes
        if mask.all():
            coverage.left.append(Left(weight.key, before, Reason.BUDGET, "none of its elements is among the least"))
            return
        sums = np.zeros(2)
        new: Masked | Sparse = Masked(collect(array.shape, array.dtype, _masked(array, mask, sums), run.work))
        kept = np.count_nonzero(new.values)
        lost, detail = 1.0 - kept / mask.size, f"{1.0 - kept / mask.size:.1%} zero"
        error = float(np.sqrt(sums[0] / sums[1])) if sums[1] else 0.0
        sparse_fits = weight.model.opset_imports.get("", 1) >= SPARSE_OPSET
        if sparse_fits and (self.storage == "sparse" or weight.encoding.kind == "sparse"):
            packed = Sparse.pack(new.values)
            new = packed if packed.nbytes + SPARSE_BYTES < new.nbytes else new
        elif self.storage == "sparse":
            detail += f", stored dense: the sparse form needs opset {SPARSE_OPSET}"
        if new.kind == weight.encoding.kind and kept == np.count_nonzero(array):
            coverage.left.append(Left(weight.key, before, Reason.BUDGET, f"is {detail} already"))
            return
        weight.replace(new)
        coverage.touched.append(Touched(weight.key, before, new.nbytes, error, detail))
        if lost > EMPTIED and lost > self.sparsity + 0.02:
            coverage.warnings.append(f"{weight.key}: loses {lost:.1%} of its elements; exclude it or use scope layer")


def _masked(array: np.ndarray, mask: np.ndarray, sums: np.ndarray) -> Iterator[np.ndarray]:
    """`Masked.apply`, a piece at a time; `sums` grows by the squares of what is lost and of all elements."""
    values, keep = flat(array), flat(mask)
    for part in slices(values.size):
        squares = np.square(values[part], dtype=np.float64)
        sums += float(np.sum(squares[~keep[part]])), float(np.sum(squares))
        yield Masked.apply(values[part], keep[part]).values
