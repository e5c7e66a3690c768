"""Gradual pruning: masks that grow during training, as buffers of the one training graph.

M. Zhu, S. Gupta: To prune, or not to prune, 2017: the sparsity rises as a cubic from what a weight has to what it shall
have, so that most is pruned while much is left to choose from, and each weight loses its elements of least magnitude.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import numpy as np

from onnxcompress.encodings import Affine, Codebook, Masked
from onnxcompress.encodings.base import Encoding
from onnxcompress.errors import PassError
from onnxcompress.model.weights import Weight
from onnxcompress.training.parameters import is_prunable
from onnxcompress.training.step import TrainingGraph

UPDATES = 50  # changes of the masks on the way


@dataclasses.dataclass(frozen=True)
class Rise:
    """From a weight's own sparsity at step 0 to `sparsity` at step `end`."""

    sparsity: float
    end: int

    def at(self, step: int, first: float) -> float:
        """s + (first - s) (1 - step / end)^3; never less than what was there."""
        way = min(1.0, step / self.end)
        return max(first, self.sparsity + (first - self.sparsity) * (1 - way) ** 3)

    def is_due(self, step: int) -> bool:
        """Whether masks change before this step."""
        return step == self.end or (step < self.end and step % max(1, self.end // UPDATES) == 0)


def rise(sparsity: float, total: int, until: float) -> Rise:
    """The rise over the share `until` of `total` steps; at least one step trains with the last masks.

    Raises:
        PassError: no share of a weight.
    """
    if not 0 <= sparsity < 1 or not 0 < until <= 1:
        raise PassError(f"gradual pruning wants shares between 0 and 1, got sparsity {sparsity} until {until}")
    return Rise(sparsity, max(1, min(math.ceil(until * total), total - 1)))


def restated(encode: Callable[[Weight], Encoding]) -> Callable[[Weight], Encoding]:
    """`encode`, but layers' weights with a mask that can grow; embeddings and codebooks stay as they are."""

    def masked(weight: Weight) -> Encoding:
        found = encode(weight)
        if not is_prunable(weight) or isinstance(found, Codebook):
            return found
        return dataclasses.replace(found, masked=True) if isinstance(found, Affine) else Masked(found.decode())

    return masked


class Gradual:
    """The masks of one training, by buffer name."""

    def __init__(self, graph: TrainingGraph, rise: Rise) -> None:
        self._graph, self.rise = graph, rise
        self.masks = {
            name: np.array(graph.buffers[name])
            for leaf in graph.leaves
            if leaf.prunable and (name := leaf.mask) in graph.buffers
        }
        if not self.masks:
            raise PassError("gradual pruning: no layer's weight that is trained is stored in a way that it can prune")
        self._first = {name: 1 - float(np.mean(mask)) for name, mask in self.masks.items()}

    def is_reached(self, step: int) -> bool:
        """Whether a model after `step` steps has the sparsity that was asked for."""
        return step > self.rise.end

    def grow(self, step: int, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The masks for this step, from the parameters by leaf."""
        for leaf in self._graph.leaves:
            name = leaf.mask
            if name in self.masks:
                array = values[leaf.name]
                self.masks[name] = _grown(self.masks[name], array, self.rise.at(step, self._first[name]))
        return self.masks


def _grown(mask: np.ndarray, array: np.ndarray, sparsity: float) -> np.ndarray:
    """`mask` without the elements of least magnitude, so that a share `sparsity` is gone; what is gone stays gone."""
    count = round(sparsity * mask.size)
    if count <= mask.size - np.count_nonzero(mask):
        return mask
    magnitude = np.where(mask, np.abs(array), -1).reshape(-1)
    grown = np.ones(mask.size, bool)
    grown[np.argpartition(magnitude, count - 1)[:count]] = False
    return grown.reshape(mask.shape)
