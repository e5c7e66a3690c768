"""Elementwise operators: one line each, from (g, inputs, output); the engine's side undoes the broadcasting.

At a kink the derivative is that of the side PyTorch takes: zero at Relu's corner, one on Clip's bounds.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from onnxcompress.autodiff.rule import Context, Grads, elementwise, rule
from onnxcompress.autodiff.tensor import Operand, Tensor

# Arithmetic ----------------------------------------------------------------------------------------------------------

elementwise("Add", lambda g, a, b, y: g, lambda g, a, b, y: g)
elementwise("Sub", lambda g, a, b, y: g, lambda g, a, b, y: -g)
elementwise("Mul", lambda g, a, b, y: g * b, lambda g, a, b, y: g * a)
elementwise("Div", lambda g, a, b, y: g / b, lambda g, a, b, y: -(g * y / b))
elementwise("Mod", lambda g, a, b, y: g, lambda g, a, b, y: -(g * ((a - y) / b)))
elementwise("Neg", lambda g, x, y: -g)
elementwise("Abs", lambda g, x, y: g * x.map("Sign"))
elementwise("Reciprocal", lambda g, x, y: -(g * (y * y)))
elementwise("Identity", lambda g, x, y: g)

# Powers, exponentials, logarithms ------------------------------------------------------------------------------------

elementwise("Exp", lambda g, x, y: g * y)
elementwise("Log", lambda g, x, y: g / x)
elementwise("Sqrt", lambda g, x, y: g * 0.5 / y)
elementwise("Erf", lambda g, x, y: g * (2 / math.sqrt(math.pi) * (-(x * x)).map("Exp")))


@rule("Pow")
def pow_(c: Context) -> Grads:
    """x^p: p x^(p-1) and x^p log x, the latter zero where x is not positive."""
    g, (x, p) = c.g, c.x
    exponent = c.constant(1)
    if exponent is not None and exponent.size == 1:
        n = float(exponent.reshape(-1)[0])
        power = x if n == 2 else c.y[0] if n == 1 else x ** (n - 1)
        return [(g * (n * power)).unbroadcast(x) if n != 1 else g.unbroadcast(x), None]
    q = p.cast(x.dtype)
    log = c.b.where(x > 0, x, 1.0).map("Log")
    power = c.b.where(q.equals(0.0), 0.0, q * x ** (q - 1))  # x^0 is constant, at zero too
    return [(g * power).unbroadcast(x), (g * c.y[0] * log).unbroadcast(p).cast(p.dtype)]


# Trigonometry --------------------------------------------------------------------------------------------------------

elementwise("Sin", lambda g, x, y: g * x.map("Cos"))
elementwise("Cos", lambda g, x, y: -(g * x.map("Sin")))
elementwise("Tan", lambda g, x, y: g * (1 + y * y))
elementwise("Asin", lambda g, x, y: g / (1 - x * x).map("Sqrt"))
elementwise("Acos", lambda g, x, y: -(g / (1 - x * x).map("Sqrt")))
elementwise("Atan", lambda g, x, y: g / (1 + x * x))
elementwise("Sinh", lambda g, x, y: g * x.map("Cosh"))
elementwise("Cosh", lambda g, x, y: g * x.map("Sinh"))
elementwise("Tanh", lambda g, x, y: g * (1 - y * y))
elementwise("Asinh", lambda g, x, y: g / (x * x + 1).map("Sqrt"))
elementwise("Acosh", lambda g, x, y: g / (x * x - 1).map("Sqrt"))
elementwise("Atanh", lambda g, x, y: g / (1 - x * x))

# Activations ---------------------------------------------------------------------------------------------------------

elementwise("Relu", lambda g, x, y: g * (y > 0))
elementwise("Sigmoid", lambda g, x, y: g * (y * (1 - y)))
elementwise("Softplus", lambda g, x, y: g * x.map("Sigmoid"))
elementwise("PRelu", lambda g, x, s, y: g * x.b.where(x > 0, 1.0, s), lambda g, x, s, y: g * x * (x < 0))


def _slopes(c: Context, positive: Operand, negative: Operand) -> Grads:
    """A gradient scaled by one of two factors, by the sign of the input."""
    return [c.g * c.b.where(c.x[0] > 0, c.x[0].operand(positive), c.x[0].operand(negative))]


@rule("LeakyRelu")
def leaky_relu(c: Context) -> Grads:
    return _slopes(c, 1.0, c.attr("alpha", 0.01))


@rule("Elu")
def elu(c: Context) -> Grads:
    return _slopes(c, 1.0, c.y[0] + c.attr("alpha", 1.0))


@rule("Selu")
def selu(c: Context) -> Grads:
    alpha, gamma = c.attr("alpha", 1.67326319217681884765625), c.attr("gamma", 1.05070102214813232421875)
    return _slopes(c, gamma, c.y[0] + alpha * gamma)


@rule("Celu")
def celu(c: Context) -> Grads:
    return _slopes(c, 1.0, c.y[0] / c.attr("alpha", 1.0) + 1)


@rule("ThresholdedRelu")
def thresholded_relu(c: Context) -> Grads:
    return [c.g * (c.x[0] > c.attr("alpha", 1.0))]


@rule("Shrink")
def shrink(c: Context) -> Grads:
    return [c.g * (c.x[0].map("Abs") > c.attr("lambd", 0.5))]


@rule("Softsign")
def softsign(c: Context) -> Grads:
    scale = 1 - c.y[0].map("Abs")
    return [c.g * (scale * scale)]


@rule("HardSigmoid")
def hard_sigmoid(c: Context) -> Grads:
    y = c.y[0]
    return [c.g * ((y > 0) & (y < 1)) * c.attr("alpha", 0.2)]


@rule("HardSwish")
def hard_swish(c: Context) -> Grads:
    """x clip(x/6 + 1/2, 0, 1): the clipped line, and x/6 where it is not clipped."""
    x = c.x[0]
    line = c.b.op("Clip", x / 6 + 0.5, x.operand(0.0), x.operand(1.0), shape=x.shape)
    return [c.g * (line + x / 6 * ((x > -3) & (x < 3)))]


@rule("Swish")
def swish(c: Context) -> Grads:
    """x s(ax): s + a y (1 - s)."""
    a, x = c.attr("alpha", 1.0), c.x[0]
    s = (x * a if a != 1 else x).map("Sigmoid")
    return [c.g * (s + a * c.y[0] * (1 - s))]


@rule("Mish")
def mish(c: Context) -> Grads:
    """x tanh(softplus x): t + x (1 - t^2) sigmoid x."""
    x = c.x[0]
    t = x.map("Softplus").map("Tanh")
    return [c.g * (t + x * (1 - t * t) * x.map("Sigmoid"))]


@rule("Gelu")
def gelu(c: Context) -> Grads:
    """x P(x), P the normal distribution function or its approximation by tanh (Hendrycks and Gimpel 2016)."""
    x = c.x[0]
    if str(c.attr("approximate", "none")) == "tanh":
        k, a = math.sqrt(2 / math.pi), 0.044715
        t = (k * (x + a * (x * x * x))).map("Tanh")
        return [c.g * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * (k * (1 + 3 * a * (x * x))))]
    return [c.g * (0.5 * (1 + (x * math.sqrt(0.5)).map("Erf")) + x * normal_density(x))]


def normal_density(x: Tensor) -> Tensor:
    """exp(-x^2/2) / sqrt(2 pi)."""
    return (x * x * -0.5).map("Exp") * (1 / math.sqrt(2 * math.pi))


# Choice --------------------------------------------------------------------------------------------------------------


@rule("Clip")
def clip(c: Context) -> Grads:
    """Passes where the value was kept; elsewhere it belongs to the bound."""
    x, y, g = c.x[0], c.y[0], c.g
    low = (g * (x < c.x[1])).sum(keep=False).reshape_like(c.x[1]) if c.has(1) and c.needs[1] else None
    high = (g * (x > c.x[2])).sum(keep=False).reshape_like(c.x[2]) if c.has(2) and c.needs[2] else None
    return [g * x.equals(y), low, high]


@rule("Max", "Min")
def extremum(c: Context) -> Grads:
    """To the first of the inputs that hold the extreme value."""
    if len(c.x) == 1:
        return [c.g]
    found: list[Tensor | None] = []
    free: Tensor | None = None  # where no earlier input took the gradient
    for x in c.x:
        takes = x.equals(c.y[0])
        found.append((c.g * (takes if free is None else takes & free)).unbroadcast(x))
        free = ~takes if free is None else free & ~takes
    return found


@rule("Where")
def where(c: Context) -> Grads:
    condition, a, b = c.x
    return [None, (c.g * condition).unbroadcast(a), (c.g * ~condition).unbroadcast(b)]


@rule("Sum")
def sum_(c: Context) -> Grads:
    return [c.g.unbroadcast(x) for x in c.x]


@rule("Mean")
def mean(c: Context) -> Grads:
    share = c.g * (1 / len(c.x))
    return [share.unbroadcast(x) for x in c.x]


# Types and training-time noise ---------------------------------------------------------------------------------------


@rule("Cast")
def cast(c: Context) -> Grads:
    """In the type of the input; what came out of QuantizeLinear keeps the type of its gradient."""
    x = c.x[0]
    return [c.g.cast(x.dtype) if x.dtype.is_floating_point() else c.g]


@rule("CastLike")
def cast_like(c: Context) -> Grads:
    return [*cast(c), None]


@rule("Dropout")
def dropout(c: Context) -> Grads:
    """The kept elements, scaled as in the forward pass; outside training all of them."""
    training, ratio = c.constant(2), c.constant(1)
    if not c.has(2) or (training is not None and not training.any()):
        return [c.g]
    c.only()
    mask = c.output(1, ir.DataType.BOOL)
    if ratio is not None or not c.has(1):
        scale: Operand = 1 / (1 - float(ratio if ratio is not None else 0.5))
    else:
        scale = 1 / (1 - c.x[1].cast(c.g.dtype))
    if training is None:
        scale = c.b.where(c.x[2], c.g.operand(scale), 1.0)
    return [c.g * mask * scale]
