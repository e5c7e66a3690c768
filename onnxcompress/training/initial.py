"""Fresh weights for training from scratch: the architecture stays, what it had learned goes."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import onnx_ir as ir

from onnxcompress.encodings import Dense
from onnxcompress.model import bridge
from onnxcompress.model.roles import RECURRENT, WEIGHT_ROLES, Use
from onnxcompress.model.weights import Weight, weights
from onnxcompress.training.hoist import hoist
from onnxcompress.training.learned import Learned, is_vector

TABLE = 0.02  # standard deviation of embeddings, positions and tokens (A. Radford et al., 2019; J. Devlin et al., 2019)
SLOPE = 0.25  # of a PRelu (K. He et al., 2015)

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
_NORMALIZED = {"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "SkipLayerNormalization"}
_RECURRENCE = 2  # the input of recurrent operators that holds the weights of the state before
_PASSED_ON = {"Identity", "Cast", "Dropout", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze"}


def randomize(model: ir.Model, seed: int) -> int:
    """Draw every trainable dense weight of `model` anew, in place; how many there were.

    Layers: normal with variance 2 / fan-in (He et al., 2015), where the 2 makes up for rectified inputs; behind a
    LayerNormalization or an attention, which rectify nothing, 2 / (fan-in + fan-out) (Glorot, Bengio, 2010).
    Recurrent layers: what goes round orthogonal, gate by gate (Saxe et al., 2014), the rest uniform within
    1 / sqrt(hidden). Embeddings, positions, tokens: normal, 0.02. Biases: 0.
    Normalizations: scale 1, shift 0, running mean 0, running variance 1. PRelu: slope 0.25. Of what other constants
    change before it is used, vectors (temperatures) keep their values and tables their root mean square. Each weight's
    draw depends on the seed and its name alone.
    """
    judged = model
    if model.functions:  # weights in functions are judged where training has them
        judged = bridge.clone(model)
        hoist(judged)
    known = weights(judged)
    learned, by_key = Learned(judged, known), {weight.key: weight for weight in known}
    count = 0
    for weight in weights(model):
        seen = by_key.get(weight.key)
        if weight.encoding.kind != "dense" or weight.attribute is not None or seen is None:
            continue
        fresh = _neutral(seen)
        if fresh is None and not learned.refusal(seen):
            fresh = _drawn(seen, learned, _generator(seed, weight.key))
        if fresh is not None:
            weight.replace(Dense(fresh.astype(weight.dtype)))
            count += 1
    return count


def _generator(seed: int, key: str) -> np.random.Generator:
    return np.random.default_rng([seed, int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")])


def _neutral(weight: Weight) -> np.ndarray | None:
    """What leaves a normalization's result as it is; None where `weight` is no part of one, or of several kinds."""
    values = {_NEUTRAL.get(use.op_type, {}).get(use.index) for use in weight.uses}
    value = values.pop() if len(values) == 1 else None
    movable = weight.attribute is None and not weight.value.is_graph_output()
    return None if value is None or not movable else np.full(weight.shape, value)


def _drawn(weight: Weight, learned: Learned, generator: np.random.Generator) -> np.ndarray | None:
    """A draw for a learned weight; None where it keeps its values."""
    shape, uses = weight.shape, learned.meets(weight)
    if weight.role not in WEIGHT_ROLES and learned.is_behind_arithmetic(weight):
        return None if is_vector(weight) else _like(weight, generator)
    if any(use.role == "embedding" for use in uses):
        return generator.normal(0, TABLE, shape)
    layers = [use for use in uses if use.role in WEIGHT_ROLES]
    if not layers:
        return _beside_layers(weight, uses, generator)
    if weight.role == "recurrent":
        return _recurrent(shape, next(use for use in layers if use.role == "recurrent"), generator)
    return generator.normal(0, _deviation(weight, all(_is_even(use) for use in layers)), shape)


def _beside_layers(weight: Weight, uses: list[Use], generator: np.random.Generator) -> np.ndarray | None:
    """A bias, the scale of a normalization that is written out, a slope, a token, a table of positions."""
    shape, operators = weight.shape, {use.op_type for use in uses}
    if weight.role == "bias":
        return np.zeros(shape)
    if operators <= {"PRelu"}:
        return np.full(shape, SLOPE)
    if is_vector(weight) and operators <= {"Mul"}:
        return np.ones(shape)
    if not is_vector(weight) or "Concat" in operators:
        return generator.normal(0, TABLE, shape)
    return None


def _like(weight: Weight, generator: np.random.Generator) -> np.ndarray:
    """Normal with the weight's own root mean square: what is done with it expects that scale."""
    rms = float(np.sqrt(np.mean(np.square(weight.array(), dtype=np.float64))))
    return generator.normal(0, rms or TABLE, weight.shape)


def _deviation(weight: Weight, even: bool) -> float:
    """The standard deviation for a layer's weight. `even`: its inputs are as often below as above their mean."""
    shape, axis = weight.shape, weight.axis()
    outputs = shape[axis] if axis is not None else shape[-1]
    fan_in = max(1, weight.size // max(1, outputs))
    return math.sqrt(2 / (fan_in + outputs)) if even else math.sqrt(2 / fan_in)


def _recurrent(shape: tuple[int, ...], use: Use, generator: np.random.Generator) -> np.ndarray:
    """`shape`: [.., gates x hidden, inputs or hidden], also where directions are joined later."""
    hidden = use.node.attributes.get_int("hidden_size") or shape[-1]
    if use.index == _RECURRENCE and use.op_type in RECURRENT and shape[-1] == hidden and shape[-2] % hidden == 0:
        gates, triangular = np.linalg.qr(generator.normal(size=(math.prod(shape) // hidden**2, hidden, hidden)))
        signs = np.sign(np.diagonal(triangular, axis1=-2, axis2=-1))[:, None, :]  # else not all are equally likely
        return np.asarray((gates * signs).reshape(shape))
    bound = 1 / math.sqrt(hidden)
    return generator.uniform(-bound, bound, shape)


def _is_even(use: Use) -> bool:
    """True for a matrix product with what a LayerNormalization gives, or a product of two activations (attention)."""
    if use.role not in ("matmul", "gemm") or use.index != 1:
        return False
    value = use.node.inputs[0]
    while value is not None and (node := value.producer()) is not None:
        if node.op_type in _NORMALIZED:
            return True
        if node.op_type == "MatMul":
            return not any(each is None or each.is_initializer() or each.producer() is None for each in node.inputs)
        if node.op_type not in _PASSED_ON:
            return False
        value = node.inputs[0]
    return False
