"""Activations and products that ONNX Runtime's optimizers fuse."""

from __future__ import annotations

import math

import onnx_ir as ir

from onnxcompress.autodiff.builder import Builder
from onnxcompress.autodiff.definition import Call, Outputs, define
from onnxcompress.autodiff.tensor import Tensor


def _gelu(b: Builder, x: Tensor) -> Tensor:
    if b.opset >= 20:
        return x.map("Gelu")
    return x * 0.5 * (1 + (x * math.sqrt(0.5)).map("Erf"))


@define("Gelu")
@define("BiasGelu")
def bias_gelu(b: Builder, call: Call) -> Outputs:
    return [_gelu(b, call.plus(call[0], 1))]


@define("FastGelu")
def fast_gelu(b: Builder, call: Call) -> Outputs:
    x = call.plus(call[0], 1)
    return [x * 0.5 * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x))).map("Tanh"))]


@define("QuickGelu")
def quick_gelu(b: Builder, call: Call) -> Outputs:
    return [call[0] * (call[0] * call.attr("alpha", 1.702)).map("Sigmoid")]


def _activated(b: Builder, t: Tensor, call: Call) -> Tensor | None:
    """`t` through the activation that was fused into a node; None where it is unknown."""
    name = str(call.attr("activation", ""))
    parameters = list(call.attr("activation_params") or [])
    if name in ("", "Relu", "Sigmoid", "Tanh"):
        return t.map(name) if name else t
    if name == "Clip":
        return b.op("Clip", t, *(t.operand(p) for p in parameters), shape=t.shape)
    if name == "LeakyRelu":
        return t.map(name, alpha=parameters[0] if parameters else 0.01)
    if name == "HardSigmoid":
        alpha, beta = parameters or (0.2, 0.5)
        return t.map(name, alpha=alpha, beta=beta)
    return None


@define("FusedConv")
def fused_conv(b: Builder, call: Call) -> Outputs | None:
    """Conv, an addend, an activation."""
    keep = call.keep("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")
    y = b.op("Conv", call[0], call[1], call[2] if call.has(2) else None, **keep)
    activated = _activated(b, call.plus(y, 3), call)
    return None if activated is None else [activated]


@define("FusedGemm")
def fused_gemm(b: Builder, call: Call) -> Outputs | None:
    keep = call.keep("alpha", "beta", "transA", "transB")
    y = b.op("Gemm", call[0], call[1], call[2] if call.has(2) else None, **keep)
    alpha, beta = call.attr("activation_alpha"), call.attr("activation_beta")
    if alpha is not None:
        call.node.attributes["activation_params"] = ir.AttrFloat32s("activation_params", [alpha, beta or 0.5])
    activated = _activated(b, y, call)
    return None if activated is None else [activated]


@define("FusedMatMul")
def fused_matmul(b: Builder, call: Call) -> Outputs | None:
    """alpha A' B', where A' and B' may be transposed in their last two axes."""
    if call.attr("transBatchA", 0) or call.attr("transBatchB", 0):
        return None
    operands = []
    for index, name in enumerate(("transA", "transB")):
        t = call[index]
        if call.attr(name, 0) and t.rank is None:
            return None
        operands.append(t.swap() if call.attr(name, 0) and t.rank != 1 else t)
    y, alpha = operands[0] @ operands[1], call.attr("alpha", 1.0)
    return [y * alpha if alpha != 1 else y]
