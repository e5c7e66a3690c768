"""Whether a constant was learned: the one place that decides what training moves and what it leaves.

A model's file does not say so. What a constant is used for does, and where that is not enough, its values.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxcompress.encodings import Dense, Masked
from onnxcompress.model.roles import RECURRENT, WEIGHT_ROLES, Use
from onnxcompress.model.weights import Weight
from onnxcompress.numerics.positions import is_table_of_positions
from onnxcompress.numerics.transforms import is_transform
from onnxcompress.training.flow import Flow

_MASK_LIKE = 1e4  # a constant of larger magnitude is an attention mask, not a weight
_STATISTICS = {("BatchNormalization", 3), ("BatchNormalization", 4)}
_SETTINGS = {"Resize", "Upsample", "OneHot", "Clip", "Pad", "Dropout", "Range", "RoiAlign", "NonMaxSuppression"}
_TABLES = {"GatherND", "GatherElements"}  # rows of it are looked up, as PyTorch's exporter writes table[indices]
_INITIAL = (5, 6, 7)  # inputs of recurrent layers: first states, peepholes


class Learned:
    """What was learned of `found`, the weights of `model`.

    1. A layer's weight or bias and a normalization's scale and shift were, also behind arithmetic with other constants
       (weight normalization, 1 + w). Running statistics, Fourier and mel transforms and frequencies were not.
    2. A vector (one axis that is not 1) was where it scales, shifts or joins what comes from a layer: what it meets
       before any layer is the mean or the deviation of the inputs.
    3. A table (two axes and more: positions, relative positions, queries) was where it lies between layers: behind the
       last one there are anchors and units. Not one of at most two values (a mask), nor one computed from positions
       (sinusoids, coordinates, slopes).
    4. Nothing with values of 1e4 and more was: such a constant masks.
    """

    def __init__(self, model: ir.Model, found: Sequence[Weight]) -> None:
        self._flow = Flow(model, found)

    def refusal(self, weight: Weight) -> str:
        """Why `weight` is not trained; "" when it is."""
        if weight.attribute is not None:
            return "lives in an attribute of a node"
        if isinstance(weight.root, ir.Function):
            return "lives in a function of the model"
        if weight.value.is_graph_output():
            return "is itself an output"
        if getattr(weight.encoding, "form", None) == "integer":
            return "its consumer takes integers, which no gradient passes"
        if self._is_measured(weight):
            return "running statistics, measured and not learned"
        array = weight.array()
        if not np.isfinite(array.astype(np.float32, copy=False)).all():
            return "holds values that are not finite"
        meets = [use for use in self._flow.meets(weight) if use.op_type not in _SETTINGS or use.index == 0]
        if _is_looked_up(weight, meets) and is_table_of_positions(array):
            return "computed from positions, not learned"
        if any(use.role in WEIGHT_ROLES for use in meets):
            return self._refused_layer(weight, array, meets)
        if any(use.role == "norm" or _is_bias_of_layer(use) for use in meets):
            return ""
        if not meets or np.abs(array).max() >= _MASK_LIKE:
            return "a constant, no weight of a layer"
        refused = self._refused_vector if is_vector(weight) else self._refused_table
        return refused(weight, array, meets)

    def is_layer(self, weight: Weight) -> bool:
        """True for a weight of a layer or a table, which decays and moves relative to its size; not a bias or scale."""
        return len(weight.shape) > 1 and (
            weight.role in WEIGHT_ROLES or (weight.role == "other" and not is_vector(weight))
        )

    def is_behind_arithmetic(self, weight: Weight) -> bool:
        """True when other constants change `weight` before it is used."""
        return any(True for _ in self._flow.arithmetic(weight))

    def meets(self, weight: Weight) -> list[Use]:
        """The operators in which `weight` meets what depends on an input."""
        return self._flow.meets(weight)

    def onward(self, use: Use) -> list[Use]:
        """What takes the result of `use`, through all that only moves elements."""
        return list(self._flow.onward(use.node))

    def _is_measured(self, weight: Weight) -> bool:
        """Statistics of a normalization; written out, the variance goes through a root before anything else."""
        if any((use.op_type, use.index) in _STATISTICS for use in weight.uses):
            return True
        computed = list(self._flow.arithmetic(weight))
        after = {use.op_type for node in computed for use in self._flow.onward(node) if node.op_type == "Add"}
        rooted = (node.op_type == "Sqrt" or (node.op_type == "Add" and after == {"Sqrt"}) for node in computed)
        return is_vector(weight) and bool(computed) and all(rooted)

    def _refused_layer(self, weight: Weight, array: np.ndarray, meets: Sequence[Use]) -> str:
        if weight.role in WEIGHT_ROLES and is_transform(array, weight.axis()):
            return "a fixed transform, not learned"
        onward = [after.op_type for use in meets for after in self.onward(use)]
        if is_vector(weight) and onward and set(onward) <= {"Sin", "Cos"}:
            return "frequencies, not learned"
        if weight.role not in WEIGHT_ROLES and _is_mask(weight, array):
            return "a mask, not learned"
        return ""

    def _refused_vector(self, weight: Weight, array: np.ndarray, meets: Sequence[Use]) -> str:
        if any(id(use.node) in self._flow.behind for use in meets):
            return ""
        if any(_is_initial(use) for use in meets) and np.ptp(array) > 0:
            return ""
        return "a constant, no weight of a layer"

    def _refused_table(self, weight: Weight, array: np.ndarray, meets: Sequence[Use]) -> str:
        if _is_mask(weight, array):
            return "a mask, not learned"
        if is_table_of_positions(array):
            return "computed from positions, not learned"
        between = (id(use.node) in self._flow.behind and id(use.node) in self._flow.before for use in meets)
        if any(between) or any(_is_initial(use) or use.op_type in _TABLES for use in meets):
            return ""
        return "a constant, no weight of a layer"


def is_vector(weight: Weight) -> bool:
    """True for one axis at most that is not 1."""
    return sum(1 for d in weight.shape if d != 1) <= 1


def _is_bias_of_layer(use: Use) -> bool:
    return use.role == "bias" and use.op_type not in ("Add", "Sub")


def _is_looked_up(weight: Weight, meets: Sequence[Use]) -> bool:
    return weight.role == "embedding" or any(use.op_type in _TABLES and use.index == 0 for use in meets)


def _is_initial(use: Use) -> bool:
    return use.op_type in RECURRENT and use.index in _INITIAL


def _is_mask(weight: Weight, array: np.ndarray) -> bool:
    """At most two values, where nobody has reduced the weight to few values for its size."""
    if is_vector(weight) or not isinstance(weight.encoding, Dense | Masked):
        return False
    others = array[array != array.flat[0]]
    return not others.size or bool((others == others[0]).all())
