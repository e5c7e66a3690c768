"""Which weights were pruned: whose zeros are structure, and not numbers like any other."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxcompress.encodings import Affine, Dense, Masked, Sparse, recognize
from onnxcompress.encodings.affine import stand_out
from onnxcompress.model import provenance
from onnxcompress.model.roles import WEIGHT_ROLES
from onnxcompress.model.weights import Weight, weights

SHARE = 0.2  # of zeros, from which a float weight is taken for pruned
ALIKE = 0.5  # cosine from which a weight is taken for what became of another
HALF = 0.51  # of a step is what rounding can do, and a little for its arithmetic
NEARER = 2  # times less error with a factor a channel, from which one is taken to be folded in


class Pruned:
    """Whether a weight of `model`, or of a copy of it, was pruned; all its zeros are structure then.

    1. A sparse weight was, and any of which the file says so.
    2. A float weight was where `reference` (what the model was made from) has other values than its zeros, where at
       least 20 % are zero, or 1 % and this project wrote the model. A layer may have some zeros for other reasons: the
       row of a padding token, values that underflowed.
    3. A weight in integers was where its zeros stand out (`Affine.shows_zeros`). Else `reference` tells: it has values
       at zeros that round to other levels, and at nothing but zeros, or so many that they stand out; for training, too,
       moves elements to zero, but no more of them than to the levels beside.
    """

    def __init__(self, model: ir.Model, reference: ir.Model | None = None) -> None:
        self._reference = reference
        self._ours = provenance.read(model) is not None
        # By key, as a copy that was lifted to another opset has lost what its tensors said.
        self._noted = {weight.key for weight in weights(model) if recognize.is_noted(weight.value)}
        self._known: dict[str, Weight] | None = None

    def __call__(self, weight: Weight) -> bool:
        """Whether `weight` was pruned. One that is no layer's weight was only where the file says so."""
        found = weight.encoding
        if isinstance(found, Sparse) or weight.key in self._noted or recognize.is_noted(weight.value):
            return True
        if weight.role not in WEIGHT_ROLES or len(weight.shape) < 2:
            return False
        if isinstance(found, Affine):
            return found.shows_zeros() or self._has_lost(weight, found)
        return isinstance(found, Dense | Masked) and self._has_zeros_of_pruning(weight, found)

    def _has_zeros_of_pruning(self, weight: Weight, found: Dense | Masked) -> bool:
        zero = found.decode() == 0
        if isinstance(found, Masked) and (self._ours or float(np.mean(zero)) >= SHARE):
            return True
        before = self._before(weight) if zero.any() else None
        return before is not None and before.shape == found.shape and bool(np.any(before[zero]))

    def _has_lost(self, weight: Weight, found: Affine) -> bool:
        """Whether the elements that are not the reference's, rounded, are zeros, or zeros stand out among them."""
        before = self._before(weight)
        if before is None:
            return False
        w, axis = found.decode().astype(np.float32), weight.axis()
        for known in (before, before.T) if before.ndim == 2 else (before,):
            fitted = _fitted(known.astype(np.float32), w, found.axis if axis is None else axis)
            if fitted is not None:
                others = found.levels()[np.abs(w - fitted) > HALF * found.steps()]
                return others.size > 0 and (not others.any() or stand_out(others))
        return False

    def _before(self, weight: Weight) -> np.ndarray | None:
        if self._reference is None:
            return None
        if self._known is None:
            self._known = {known.key: known for known in weights(self._reference)}
        before = self._known.get(weight.key)
        return before.array() if before is not None else None


def _fitted(known: np.ndarray, w: np.ndarray, axis: int | None) -> np.ndarray | None:
    """`known` as it is, or with a factor for each index of `axis` where that brings it much nearer to `w` (a
    normalization was folded in); None where the two are not alike."""
    if known.shape != w.shape:
        return None
    others = tuple(i for i in range(w.ndim) if i != axis)
    squares = np.sum(known * known, axis=others, keepdims=True)
    products = np.sum(known * w, axis=others, keepdims=True)
    folded = known * np.divide(products, squares, out=np.zeros_like(products), where=squares != 0)
    fitted = folded if np.linalg.norm(w - known) > NEARER * np.linalg.norm(w - folded) else known
    lengths = np.linalg.norm(fitted) * np.linalg.norm(w)
    return fitted if lengths > 0 and float(np.vdot(fitted, w)) >= ALIKE * lengths else None
