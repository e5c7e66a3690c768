"""Scales and zero points of activations, as far as they show without data."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from onnxcompress.encodings import recognize
from onnxcompress.model import bridge
from onnxcompress.verification.result import Problem

NOT_NEGATIVE = ("Relu", "Sigmoid", "Softmax", "Exp", "Abs", "HardSigmoid", "Softplus", "Sqrt")


def check(model: ir.Model) -> Iterator[Problem]:
    """What contradicts itself: a pair that quantizes and dequantizes otherwise, a bias of another scale than its
    layer, a zero point in the middle of what is never negative, a scale that is no positive number."""
    for path, owner in bridge.scopes(model):
        for node in owner:
            if node.op_type == "DequantizeLinear":
                yield from _pair(path, node)
                yield from _bias(path, node)
            elif node.op_type == "QuantizeLinear":
                yield from _sign(path, node)


def _array(node: ir.Node, index: int) -> np.ndarray | None:
    tensor = recognize.constant(node.inputs[index]) if index < len(node.inputs) else None
    return None if tensor is None else tensor.numpy()


def _pair(path: str, node: ir.Node) -> Iterator[Problem]:
    made = node.inputs[0].producer() if node.inputs[0] is not None else None
    if made is None or made.op_type != "QuantizeLinear":
        return
    source = made.inputs[0]
    layer = path + _name(source)
    for index, what in ((1, "scale"), (2, "zero point")):
        one, other = _array(made, index), _array(node, index)
        if (one is None) != (other is None) or (one is not None and not np.array_equal(one, np.asarray(other))):
            message = f"is quantized with one {what} and dequantized with another"
            yield Problem("activation", layer, message, _fed(path, node) or (layer,))
    scale = _array(node, 1)
    if scale is not None and not (np.isfinite(scale).all() and (scale > 0).all()):
        yield Problem("activation", layer, "its scale is no positive number", (layer,))


def _bias(path: str, node: ir.Node) -> Iterator[Problem]:
    """An int32 bias counts in steps of its layer's products: x_scale * w_scale."""
    stored, scale = recognize.constant(node.inputs[0]), _array(node, 1)
    if stored is None or stored.dtype != ir.DataType.INT32 or scale is None:
        return
    for use in node.outputs[0].uses():
        if use.idx != 2:
            continue
        sides = [value.producer() for value in use.node.inputs[:2] if value is not None]
        scales = [_array(side, 1) for side in sides if side is not None and side.op_type == "DequantizeLinear"]
        if len(scales) == 2 and scales[0] is not None and scales[1] is not None:
            wanted = scales[0].astype(np.float64).reshape(-1) * scales[1].astype(np.float64).reshape(-1)
            if not np.allclose(wanted, scale.astype(np.float64).reshape(-1), rtol=1e-5, atol=0):
                layer = path + _name(use.node.outputs[0])
                message = "its integer bias has another scale than its activation times its weight"
                yield Problem("activation", layer, message, (layer,))


def _sign(path: str, node: ir.Node) -> Iterator[Problem]:
    source, zero = node.inputs[0], _array(node, 2)
    made = source.producer() if source is not None else None
    if made is None or made.op_type not in NOT_NEGATIVE or zero is None or zero.dtype != np.uint8:
        return
    if np.any(zero != 0):
        layer = path + _name(source)
        message = f"comes out of {made.op_type}, never negative, and has the zero point {int(zero.max())} instead of 0"
        fed = [_fed(path, use.node) for use in node.outputs[0].uses()]
        yield Problem("activation", layer, message, (layer, *(name for names in fed for name in names)))


def _fed(path: str, node: ir.Node) -> tuple[str, ...]:
    """Outputs of the operators that take what `node` makes."""
    return tuple(path + _name(use.node.outputs[0]) for use in node.outputs[0].uses())


def _name(value: ir.Value | None) -> str:
    return (value.name or "") if value is not None else ""
