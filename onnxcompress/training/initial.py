"""Fresh weights for training from scratch: the architecture stays, what it had learned goes."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import onnx_ir as ir

from onnxcompress.encodings import Dense
from onnxcompress.model.roles import WEIGHT_ROLES
from onnxcompress.model.weights import Weight, weights
from onnxcompress.training.parameters import behind_weights, refusal


def randomize(model: ir.Model, seed: int) -> int:
    """Draw every trainable dense weight of `model` anew, in place; how many there were.

    Layers: normal with variance 2 / fan-in (He et al., 2015). Embeddings: normal, 0.02. Recurrent weights: uniform
    within 1 / sqrt(hidden). Biases: 0. Normalizations and other vectors keep their values, as only those that scale
    would start at 1. Each weight's draw depends on the seed and its name alone.
    """
    found = weights(model)
    behind = behind_weights(model, found)
    count = 0
    for weight in found:
        if weight.encoding.kind != "dense" or refusal(weight, behind):
            continue
        fresh = _drawn(weight, seed)
        if fresh is not None:
            weight.replace(Dense(fresh.astype(weight.dtype)))
            count += 1
    return count


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
