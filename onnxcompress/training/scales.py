"""Learned step sizes: the scales of quantized weights as parameters.

S. Esser et al.: Learned step size quantization, ICLR 2020. With the straight-through rules of QuantizeLinear and
DequantizeLinear, a scale's gradient is the sum of g (q - w / s) over its elements inside the range and g q over those
outside, which is the paper's equation 3.
"""

from __future__ import annotations

import math

from onnxcompress.encodings import Affine
from onnxcompress.encodings.affine import limits
from onnxcompress.encodings.base import Encoding

_ROUNDED = ("int8", "uint8", "int4", "uint4", "int2", "uint2")


def gradient_scale(encoding: Encoding) -> float | None:
    """1 / sqrt(N Q): what the gradient of a scale of N elements is multiplied by; None where scales are not learned.

    Q is the largest level on the positive side. Not learned: scales of biases and other wide integers, which are not
    rounded in training, and of blocks that do not divide their axis, which have no gradient.
    """
    if not isinstance(encoding, Affine) or encoding.q.dtype.name not in _ROUNDED:
        return None
    q, scale, axis, block = encoding.q, encoding.scale, encoding.axis, encoding.block
    if block is not None and axis is not None and q.shape[axis] % block:
        return None
    low, high = limits(q.dtype)
    return 1 / math.sqrt(q.size / scale.size * max(1, (high - low) // 2))
