"""x times a function of x as one node, so that its gradient keeps what it needs and no more."""

from __future__ import annotations

import math

import onnx_ir as ir

from onnxcompress.autodiff.builder import Builder
from onnxcompress.autodiff.rule import Context, Grads, rule
from onnxcompress.autodiff.tensor import Tensor
from onnxcompress.training.fusing.domain import DOMAIN
from onnxcompress.training.fusing.patterns import alone, factor, multiple, number, only_user, other, put, text


def gelu(b: Builder, node: ir.Node) -> bool:
    """4: x (1 + erf(x / sqrt 2)) / 2, in whichever order it is multiplied; the standard's own Gelu."""
    if node.op_type == "Gelu" and text(node, "approximate", "none") == "none":
        return _become(node, node.inputs[0], "Gelu")
    if node.op_type != "Erf":
        return False
    scaled = factor(node, 0)
    plus = only_user(node, "Add")
    if scaled is None or not math.isclose(scaled[1], math.sqrt(0.5), rel_tol=1e-5) or plus is None:
        return False
    x, one = scaled[0], other(plus, node.outputs[0])
    first = only_user(plus, "Mul")
    if number(one) != 1 or first is None:
        return False
    beside = other(first, plus.outputs[0])
    half = beside.producer() if beside is not None else None
    if half is not None and alone(half) and multiple(half) == (x, 0.5):
        return _become(first, x, "Gelu")
    second = only_user(first, "Mul")
    if second is None or {number(beside), number(other(second, first.outputs[0]))} != {0.5, None}:
        return False
    if x not in (beside, other(second, first.outputs[0])):
        return False
    return _become(second, x, "Gelu")


def silu(b: Builder, node: ir.Node) -> bool:
    """4: x sigmoid(x)."""
    product = only_user(node, "Mul") if node.op_type == "Sigmoid" else None
    if product is None or other(product, node.outputs[0]) is not node.inputs[0]:
        return False
    return _become(product, node.inputs[0], "Swish")


def _become(last: ir.Node, x: ir.Value | None, kind: str) -> bool:
    """The node `kind` takes the place of `last`; with the function of x and what the gradient needs besides."""
    graph, y = last.graph, last.outputs[0]
    if x is None or not isinstance(graph, ir.Graph):
        return False
    node = ir.Node(DOMAIN, kind, [x], num_outputs=3, name=last.name)
    for output, end in zip(node.outputs, ("", "/factor", "/scaled"), strict=True):
        output.name, output.type, output.shape = f"{y.name}{end}", y.type, x.shape
    put(graph, last, [node], node.outputs[:1])
    return True


@rule("Gelu", domain=DOMAIN)
def gelu_gradient(c: Context) -> Grads:
    """P(x) + x p(x), P and p the normal distribution and its density; 1 / sqrt(2 pi) goes into the exponent."""
    x, u = c.x[0], c.y[2]
    density = (-math.log(math.sqrt(2 * math.pi)) - u * u).map("Exp")
    return [c.g * (c.y[1] + density * x)]


@rule("Swish", domain=DOMAIN)
def silu_gradient(c: Context) -> Grads:
    """s + y (1 - s)."""
    y, s = c.y[0], c.y[1]
    return [c.g * (s + y * (1 - s))]


def lowered_gelu(b: Builder, x: Tensor) -> list[Tensor]:
    u = x * math.sqrt(0.5)
    p = u.map("Erf").map("HardSigmoid", alpha=0.5, beta=0.5)  # (1 + erf) / 2 in one pass
    return [x * p, p, u]


def lowered_silu(b: Builder, x: Tensor) -> list[Tensor]:
    s = x.map("Sigmoid")
    return [x * s, s, x]
