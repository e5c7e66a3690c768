"""Products and convolutions of integers that are quantized at run time.

What they give is counted in steps of the operands' scales, which the nodes behind them multiply in.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from onnxcompress.autodiff.tensor import Tensor
from onnxcompress.training.integers.call import FLOAT, UINT8, Call, Refused, Table

_GEOMETRY = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")


def matmul_integer(call: Call) -> Sequence[Tensor]:
    """(A - a_zero) (B - b_zero)."""
    if call.constant(0) is not None:
        raise Refused("on the left of a product")
    call.leaves()
    a = call.centred(0, 2)
    if call.constant(1) is None:
        return [a @ call.centred(1, 3)]
    b, scale = call.scaled(1, call.given(3), -1)
    return [a @ b / scale]


def conv_integer(call: Call) -> Sequence[Tensor]:
    """The convolution of x - x_zero, which is padded with 0, with w - w_zero."""
    if call.constant(1) is None:
        raise Refused("and computes its weight")
    call.leaves()
    x, (w, scale) = call.centred(0, 2), call.scaled(1, call.given(3), 0)
    y = call.b.op("Conv", x, w, **call.keep(*_GEOMETRY))
    return [y / call.along(scale, len(w.shape or ()) - 2)]


def dynamic_quantize_matmul(call: Call) -> Sequence[Tensor]:
    """A, quantized as a whole at each call, times B (scale, zero point), plus a bias."""
    return [_plus_bias(call, quantized_at_run_time(call, 0) @ _matrix(call, 1, 2, 3), 4)]


def matmul_integer_to_float(call: Call) -> Sequence[Tensor]:
    """A (scale, zero point) times B (scale, zero point), plus a bias."""
    return [_plus_bias(call, call.dequantized(call.x(0), 2, 4) @ _matrix(call, 1, 3, 5), 6)]


def quantized_at_run_time(call: Call, index: int) -> Tensor:
    """What DynamicQuantizeLinear makes of a float input, as numbers."""
    x = call.x(index)
    q, scale, zero = call.b.ops("DynamicQuantizeLinear", x, outputs=3, dtype=FLOAT)
    q.value.type, q.value.shape, zero.value.type = ir.TensorType(UINT8), x.value.shape, ir.TensorType(UINT8)
    scale.value.shape = zero.value.shape = ir.Shape(())
    return call.b.op("DequantizeLinear", q, scale, zero, dtype=FLOAT, shape=x.shape)


def _matrix(call: Call, index: int, scale: int, zero_point: int) -> Tensor:
    if call.constant(index) is None:
        raise Refused("and computes its weight")
    return call.weight(index, call.value(scale), call.given(zero_point), -1)


def _plus_bias(call: Call, y: Tensor, index: int) -> Tensor:
    return y + call.x(index) if call.has(index) else y


MICROSOFT = "com.microsoft"
TABLE: Table = {
    ("", "MatMulInteger"): matmul_integer,
    ("", "ConvInteger"): conv_integer,
    (MICROSOFT, "DynamicQuantizeMatMul"): dynamic_quantize_matmul,
    (MICROSOFT, "MatMulIntegerToFloat"): matmul_integer_to_float,
}
