"""Operators of ONNX Runtime's own domain, and one of the standard, written in operators that have rules.

A definition gets a builder and the node and returns the node's outputs, None for those it leaves out; None altogether
where this form of the node needs no definition or has none. It takes the node's place before differentiation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir

from onnxcompress.autodiff.builder import Builder
from onnxcompress.autodiff.tensor import Tensor

Outputs = Sequence["Tensor | None"]
Definition = Callable[[Builder, "Call"], "Outputs | None"]
DEFINITIONS: dict[tuple[str, str], Definition] = {}
MICROSOFT = "com.microsoft"


class Call:
    """A node to be defined: its inputs as tensors and its attributes."""

    def __init__(self, b: Builder, node: ir.Node) -> None:
        self.node, self._b = node, b

    def __getitem__(self, index: int) -> Tensor:
        value = self.node.inputs[index]
        assert value is not None
        return self._b.wrap(value)

    def has(self, index: int) -> bool:
        """True when input `index` is given."""
        return index < len(self.node.inputs) and self.node.inputs[index] is not None

    def attr(self, name: str, default: Any = None) -> Any:
        """An attribute's value."""
        attribute = self.node.attributes.get(name)
        return default if attribute is None else attribute.value

    def keep(self, *names: str) -> dict[str, Any]:
        """The node's attributes of these names, for another node."""
        return {name: self.node.attributes[name] for name in names if name in self.node.attributes}

    def plus(self, t: Tensor, index: int) -> Tensor:
        """`t`, with optional input `index` added."""
        return t + self[index] if self.has(index) else t


def define(op_type: str, domain: str = MICROSOFT) -> Callable[[Definition], Definition]:
    """Register a definition."""

    def register(function: Definition) -> Definition:
        DEFINITIONS[domain, op_type] = function
        return function

    return register


@define("BatchNormalization", "")
def batch_normalization(b: Builder, call: Call) -> Outputs | None:
    """In training: y = (x - mean) factor + bias by the statistics of the batch. Running ones move by 1 - momentum.

    Spelled out because ONNX Runtime 1.32 on the CPU overwrites the running mean it is given, even a graph input.
    """
    x = call[0]
    if not call.attr("training_mode", 0) or x.rank is None:
        return None
    axes, momentum = [0, *range(2, x.rank)], call.attr("momentum", 0.9)
    along = [1, -1, *[1] * (x.rank - 2)]
    mean = x.mean(*axes)
    centred = x - mean
    variance = centred.reduce("ReduceSumSquare", axes) / x.count(axes)
    scale, bias = (call[i].reshape(along).cast(x.dtype) for i in (1, 2))
    factor = scale / (variance + call.attr("epsilon", 1e-5)).map("Sqrt")
    flat = [t.reshape([-1]).cast(call[3].dtype) for t in (mean, variance)]
    return [centred * factor + bias, *(call[3 + i] * momentum + flat[i] * (1 - momentum) for i in range(2))]


# Activations ---------------------------------------------------------------------------------------------------------


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


# Products ------------------------------------------------------------------------------------------------------------


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


# Normalizations ------------------------------------------------------------------------------------------------------


@define("SkipLayerNormalization")
def skip_layer_normalization(b: Builder, call: Call) -> Outputs:
    """LayerNormalization of the sum of input, skip and bias; the sum is the fourth output."""
    total = call.plus(call[0] + call[1], 4)
    beta = call[3] if call.has(3) else None
    y = b.op("LayerNormalization", total, call[2], beta, shape=total.shape, axis=-1, **call.keep("epsilon"))
    return [y, None, None, total][: len(call.node.outputs)]


@define("SkipSimplifiedLayerNormalization")
def skip_simplified_layer_normalization(b: Builder, call: Call) -> Outputs:
    total = call.plus(call[0] + call[1], 3)
    y = _root_mean_square(total, call[2], [-1], call.attr("epsilon", 1e-5))
    return [y, None, None, total][: len(call.node.outputs)]


@define("SimplifiedLayerNormalization", "")
@define("SimplifiedLayerNormalization")
def simplified_layer_normalization(b: Builder, call: Call) -> Outputs | None:
    """x / sqrt(mean x^2 + epsilon) times scale, over the axes from `axis` on."""
    x, axis = call[0], call.attr("axis", -1)
    if axis >= 0 and x.rank is None:
        return None
    axes = list(range(axis, 0)) if axis < 0 else list(range(axis, x.rank or 0))
    return [_root_mean_square(x, call[1], axes, call.attr("epsilon", 1e-5))]


def _root_mean_square(x: Tensor, scale: Tensor, axes: Sequence[int], epsilon: float) -> Tensor:
    return x / ((x * x).mean(*axes) + epsilon).map("Sqrt") * scale


@define("EmbedLayerNormalization")
def embed_layer_normalization(b: Builder, call: Call) -> Outputs | None:
    """The sum of word, position and segment rows, normalized. Masks as indices (second output) have no definition."""
    node = call.node
    if len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output()):
        return None
    words = call[2].take(call[0])
    steps = call[0].size(1)
    places = call[3].take(call[8]) if call.has(8) else call[3].slice([0], [0], [steps])
    total = words + places
    if call.has(1) and call.has(4):
        total = total + call[4].take(call[1])
    total.shaped(None, None, None)
    y = b.op("LayerNormalization", total, call[5], call[6], shape=total.shape, axis=-1, **call.keep("epsilon"))
    return [y, None, total][: len(node.outputs)]
