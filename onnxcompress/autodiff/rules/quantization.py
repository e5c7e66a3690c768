"""Quantization by the straight-through estimator: rounding passes the gradient, saturation stops it.

Through a pair x -> QuantizeLinear -> DequantizeLinear this is the gradient of fake quantization (Bengio et al. 2013),
and with respect to the scale that of learned step sizes (Esser et al. 2020): between the two, a gradient is measured
per integer step. Activations keep their integers; nothing is rounded that was not rounded before.
"""

from __future__ import annotations

import onnx_ir as ir

from onnxcompress.autodiff.rule import STRAIGHT_THROUGH, Context, Grads, rule
from onnxcompress.autodiff.tensor import Tensor

STRAIGHT_THROUGH.update({("", "QuantizeLinear"), ("", "DynamicQuantizeLinear")})

_RANGES = {
    ir.DataType.UINT8: (0, 255),
    ir.DataType.INT8: (-128, 127),
    ir.DataType.UINT16: (0, 65535),
    ir.DataType.INT16: (-32768, 32767),
    ir.DataType.UINT4: (0, 15),
    ir.DataType.INT4: (-8, 7),
    ir.DataType.UINT2: (0, 3),
    ir.DataType.INT2: (-2, 1),
}


@rule("QuantizeLinear", refuses="quantization to floats; scales of blocks that do not divide their axis")
def quantize_linear(c: Context) -> Grads:
    """q = clip(round(x/s) + z): dx = g/s inside the range, ds = -g x/s^2 there."""
    x, g = c.x[0], c.g
    kind = c.y[0].dtype
    if kind not in _RANGES:
        raise c.refuse(f"quantization to {kind.name} has no rule")
    scale = _along(c, c.x[1].cast(x.dtype))
    zero = _along(c, c.x[2].cast(x.dtype)) if c.has(2) else None
    steps = x / scale
    low, high = _RANGES[kind]
    reached = steps if zero is None else steps + zero
    inside = (reached >= low - 0.5) & (reached <= high + 0.5)
    passed = g * inside / scale
    return [passed, _gathered(c, -(passed * steps), c.x[1]), None]


@rule("DynamicQuantizeLinear")
def dynamic_quantize_linear(c: Context) -> Grads:
    """q = round(x/s) + z: dx = g/s; the scale is taken as given, all of the range lies inside."""
    return [c.grads[0] / c.y[1] if c.grads[0] is not None else None]


@rule("DequantizeLinear", refuses="scales of blocks that do not divide their axis")
def dequantize_linear(c: Context) -> Grads:
    """y = (q - z) s: dq = g s, ds = g (q - z)."""
    q, g = c.x[0].cast(c.g.dtype), c.g
    scale = _along(c, c.x[1].cast(g.dtype))
    centred = q - _along(c, c.x[2].cast(g.dtype)) if c.has(2) else q
    return [g * scale, _gathered(c, g * centred, c.x[1]), None]


def _along(c: Context, parameter: Tensor) -> Tensor:
    """A scale or zero point shaped to broadcast against the tensor: one for all, per axis, or per block."""
    axis, block = _layout(c, parameter)
    if axis is None:
        return parameter
    rank = c.rank()
    if not block:
        return parameter.reshape([-1 if i == axis else 1 for i in range(rank)])
    wide = c.b.op("Unsqueeze", parameter, c.b.ints([axis + 1]), shape=(None,) * (rank + 1))
    repeats = [block if i == axis + 1 else 1 for i in range(rank + 1)]
    repeated = c.b.op("Expand", wide, c.b.ints(repeats), shape=(None,) * (rank + 1))
    before, after = range(axis), range(axis + 2, rank + 1)
    merged = repeated.reshape([*(repeated.size(i) for i in before), -1, *(repeated.size(i) for i in after)])
    return merged.slice([axis], [0], [c.x[0].size(axis)])  # the last block may be cut short


def _layout(c: Context, parameter: Tensor) -> tuple[int | None, int]:
    """Axis and block size; no axis for one scale in all."""
    block = int(c.attr("block_size", 0) or 0)
    if not block and parameter.rank == 0:
        return None, 0
    return c.axis(1), block


def _gathered(c: Context, g: Tensor, parameter: Tensor) -> Tensor | None:
    """The gradient of a scale: `g`, shaped like the tensor, summed over what shares one."""
    if not c.needs[1]:
        return None
    axis, block = _layout(c, parameter)
    if axis is None:
        return g.sum(keep=False).cast(parameter.dtype)
    if not block:
        over = [i for i in range(c.rank()) if i != axis]
        return (g.sum(*over, keep=False) if over else g).reshape_like(parameter).cast(parameter.dtype)
    size = c.x[0].size(axis)
    if not isinstance(size, int) or size % block:
        raise c.refuse("scales of blocks that do not divide their axis have no gradient")
    sizes = [g.size(i) for i in range(c.rank())]
    folded = g.reshape([*sizes[:axis], size // block, block, *sizes[axis + 1 :]])
    return folded.sum(axis + 1, keep=False).cast(parameter.dtype)
