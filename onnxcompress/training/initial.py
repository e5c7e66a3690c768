"""Fresh weights for training from scratch: the architecture stays, what it had learned goes."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import onnx_ir as ir

from onnxcompress.encodings import Dense
from onnxcompress.model.roles import WEIGHT_ROLES
from onnxcompress.model.weights import Weight, weights
from onnxcompress.training.learned import Learned

_SCALE_SHIFT = {1: 1.0, 2: 0.0}
_NEUTRAL: dict[str, dict[int, float]] = {  # operator -> input -> value
    "BatchNormalization": {**_SCALE_SHIFT, 3: 0.0, 4: 1.0},
    "LayerNormalization": _SCALE_SHIFT,
    "InstanceNormalization": _SCALE_SHIFT,
    "GroupNormalization": _SCALE_SHIFT,
    "RMSNormalization": _SCALE_SHIFT,
    "SimplifiedLayerNormalization": _SCALE_SHIFT,
    "com.microsoft::SkipLayerNormalization": {2: 1.0, 3: 0.0, 4: 0.0},
}


def randomize(model: ir.Model, seed: int) -> int:
    """Draw every trainable dense weight of `model` anew, in place; how many there were.

    Layers: normal with variance 2 / fan-in (He et al., 2015). Embeddings: normal, 0.02. Recurrent weights: uniform
    within 1 / sqrt(hidden). Biases: 0. Normalizations: scale 1, shift 0, running mean 0, running variance 1. Other
    vectors keep their values. Each weight's draw depends on the seed and its name alone.
    """
    found = weights(model)
    learned = Learned(model, found)
    count = 0
    for weight in found:
        if weight.encoding.kind != "dense":
            continue
        fresh = _neutral(weight)
        if fresh is None and not learned.refusal(weight):
            fresh = _drawn(weight, seed)
        if fresh is not None:
            weight.replace(Dense(fresh.astype(weight.dtype)))
            count += 1
    return count


def _neutral(weight: Weight) -> np.ndarray | None:
    """What leaves a normalization's result as it is; None where `weight` is no part of one, or of several kinds."""
    values = {_NEUTRAL.get(use.op_type, {}).get(use.index) for use in weight.uses}
    value = values.pop() if len(values) == 1 else None
    movable = weight.attribute is None and not weight.value.is_graph_output()
    return None if value is None or not movable else np.full(weight.shape, value)


def _drawn(weight: Weight, seed: int) -> np.ndarray | None:
    digest = hashlib.sha256(weight.key.encode()).digest()[:8]
    generator = np.random.default_rng([seed, int.from_bytes(digest, "little")])
    shape = weight.shape
    if weight.role == "bias":
        return np.zeros(shape)
    if weight.role not in WEIGHT_ROLES:
        return None
    if weight.role == "embedding":
        return generator.normal(0, 0.02, shape)
    if weight.role == "recurrent":
        bound = 1 / math.sqrt(shape[-1] if len(shape) == 3 else max(shape))
        return generator.uniform(-bound, bound, shape)
    axis = weight.axis()
    outputs = shape[axis] if axis is not None else shape[-1]
    fan_in = max(1, weight.size // max(1, outputs))
    return generator.normal(0, math.sqrt(2 / fan_in), shape)
