"""Operators from integers to integers at fixed scales (QLinear...): dequantize, the float operator, quantize."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from onnxcompress.autodiff.tensor import Tensor
from onnxcompress.training.integers.call import Call, Refused, Table

_GEOMETRY = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")
_POOLING = ("auto_pad", "ceil_mode", "count_include_pad", "dilations", "kernel_shape", "pads", "strides")


def qlinear_conv(call: Call) -> Sequence[Tensor]:
    """x, w (one scale, or one an output channel), y, int32 bias in steps of both scales."""
    x, w = call.real(0), call.real(3, 0)
    bias = call.bias(8, 3, 1) if call.has(8) else None
    return [call.quantized(call.b.op("Conv", x, w, bias, **call.keep(*_GEOMETRY)), 6, 7)]


def qlinear_matmul(call: Call) -> Sequence[Tensor]:
    """a, b (one scale, or one a column), y."""
    return [call.quantized(call.real(0) @ call.real(3, -1), 6, 7)]


def qgemm(call: Call) -> Sequence[Tensor]:
    """A, B, int32 bias in steps of both scales; y is float where no scale is given for it."""
    if call.attr("alpha", 1.0) != 1:
        raise Refused("and multiplies by alpha")
    a, b = call.real(0), call.real(3, 0 if call.attr("transB", 0) else 1)
    bias = call.bias(6, 3, 1) if call.has(6) else None
    y = call.b.op("Gemm", a, b, bias, **call.keep("transA", "transB"))
    return [call.quantized(y, 7, 8) if call.has(7) else y]


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Call], Sequence[Tensor]]:
    """a, b, y."""
    return lambda call: [call.quantized(function(call.real(0), call.real(3)), 6, 7)]


def _unary(op_type: str, *attributes: str, **fixed: Any) -> Callable[[Call], Sequence[Tensor]]:
    """x, y."""

    def lift(call: Call) -> Sequence[Tensor]:
        if call.attr("channels_last", 0):
            raise Refused("and its channels lie last")
        return [call.quantized(call.b.op(op_type, call.real(0), **call.keep(*attributes), **fixed), 3, 4)]

    return lift


def qlinear_softmax(call: Call) -> Sequence[Tensor]:
    """x, y."""
    axis, rank = int(call.attr("axis", -1)), call.x(0).rank
    if int(call.attr("opset", 13)) < 13 and axis != -1 and (rank is None or axis != rank - 1):
        raise Refused("and takes the softmax over several axes")
    return [call.quantized(call.b.op("Softmax", call.real(0), axis=axis), 3, 4)]


def qlinear_concat(call: Call) -> Sequence[Tensor]:
    """y's scale and zero point, then each input with its own."""
    parts = [call.real(i) for i in range(2, len(call.node.inputs), 3)]
    return [call.quantized(call.b.op("Concat", *parts, axis=int(call.attr("axis"))), 0, 1)]


def qlinear_reduce_mean(call: Call) -> Sequence[Tensor]:
    """x, y."""
    axes = call.attr("axes") or ()
    return [call.quantized(call.real(0).mean(*axes, keep=bool(call.attr("keepdims", 1))), 3, 4)]


def qlinear_where(call: Call) -> Sequence[Tensor]:
    """condition, x, y, z."""
    return [call.quantized(call.b.where(call.x(0), call.real(1), call.real(4)), 7, 8)]


MICROSOFT = "com.microsoft"
TABLE: Table = {
    ("", "QLinearConv"): qlinear_conv,
    ("", "QLinearMatMul"): qlinear_matmul,
    (MICROSOFT, "QGemm"): qgemm,
    (MICROSOFT, "QLinearAdd"): _binary(lambda a, b: a + b),
    (MICROSOFT, "QLinearMul"): _binary(lambda a, b: a * b),
    (MICROSOFT, "QLinearAveragePool"): _unary("AveragePool", *_POOLING),
    (MICROSOFT, "QLinearGlobalAveragePool"): _unary("GlobalAveragePool"),
    (MICROSOFT, "QLinearLeakyRelu"): _unary("LeakyRelu", "alpha"),
    (MICROSOFT, "QLinearSigmoid"): _unary("Sigmoid"),
    (MICROSOFT, "QLinearSoftmax"): qlinear_softmax,
    (MICROSOFT, "QLinearConcat"): qlinear_concat,
    (MICROSOFT, "QLinearReduceMean"): qlinear_reduce_mean,
    (MICROSOFT, "QLinearWhere"): qlinear_where,
}
