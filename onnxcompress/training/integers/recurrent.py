"""DynamicQuantizeLSTM as an LSTM of dequantized weights.

What it takes is quantized as the operator does it. The operator also quantizes its hidden state before each step, which
no operator of a whole sequence can do: in training the state stays as it is, in steps of at most 1/127 of its range.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxcompress.autodiff.tensor import Tensor
from onnxcompress.encodings.affine import Affine
from onnxcompress.training.integers.call import Call, Refused, Table
from onnxcompress.training.integers.places import Place
from onnxcompress.training.integers.products import quantized_at_run_time


def dynamic_quantize_lstm(call: Call) -> Sequence[Tensor]:
    """W [directions, input, 4 hidden] and R [directions, hidden, 4 hidden] lie transposed."""
    weights = [_weight(call, index, scale) for index, scale in ((1, 8), (2, 10))]
    given = [call.x(i) if call.has(i) else None for i in range(3, 8)]
    attributes = call.keep(
        "activations", "activation_alpha", "activation_beta", "clip", "direction", "hidden_size", "input_forget"
    )
    outputs = len(call.node.outputs)
    return call.b.ops("LSTM", quantized_at_run_time(call, 0), *weights, *given, outputs=outputs, **attributes)


def _weight(call: Call, index: int, scale: int) -> Tensor:
    """W or R [directions, 4 hidden, inputs], with one scale, one a direction, or one a gate and unit of each."""
    q, scales, zero = call.constant(index), call.constant(scale), call.constant(scale + 1)
    if q is None or scales is None or (zero is None and call.has(scale + 1)):
        raise Refused("and computes its weight")
    directions, inputs, gates = q.shape
    if scales.size != directions * gates:
        return call.weight(index, call.value(scale), call.given(scale + 1), 0).transpose([0, 2, 1])

    def pack(merged: np.ndarray) -> np.ndarray:
        return merged.reshape(inputs, directions, gates).transpose(1, 0, 2)

    columns = q.transpose(1, 0, 2).reshape(inputs, -1)  # scales of two axes become those of one
    zeros = None if zero is None else np.broadcast_to(zero.reshape(-1), scales.size)
    encoding = Affine(columns, scales.reshape(-1), zeros, 1)
    merged = call.train(Place(call.key(index), call.name(index), call.name(scale), encoding, pack))
    return merged.reshape([inputs, directions, gates]).transpose([1, 2, 0])


TABLE: Table = {("com.microsoft", "DynamicQuantizeLSTM"): dynamic_quantize_lstm}
