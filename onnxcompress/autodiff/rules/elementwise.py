"""Elementwise operators: one line each, from (g, inputs, output); the engine's side undoes the broadcasting.

At a kink the derivative is the one PyTorch takes: zero at Relu's corner, one on Clip's bounds, equal shares for Max.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from onnxcompress.autodiff.rule import Context, Grads, elementwise, rule
from onnxcompress.autodiff.tensor import Operand, Tensor

# Arithmetic ----------------------------------------------------------------------------------------------------------

elementwise("Add", "da = g, db = g", lambda g, a, b, y: g, lambda g, a, b, y: g)
elementwise("Sub", "da = g, db = -g", lambda g, a, b, y: g, lambda g, a, b, y: -g)
elementwise("Mul", "da = g b, db = g a", lambda g, a, b, y: g * b, lambda g, a, b, y: g * a)
elementwise("Div", "da = g / b, db = -g y / b", lambda g, a, b, y: g / b, lambda g, a, b, y: -(g * y / b))
elementwise("Mod", "da = g, db = -g (a - y) / b", lambda g, a, b, y: g, lambda g, a, b, y: -(g * ((a - y) / b)))
elementwise("Neg", "dx = -g", lambda g, x, y: -g)
elementwise("Abs", "dx = g sign x", lambda g, x, y: g * x.map("Sign"))
elementwise("Reciprocal", "dx = -g y^2", lambda g, x, y: -(g * (y * y)))
elementwise("Identity", "dx = g", lambda g, x, y: g)

# Powers, exponentials, logarithms ------------------------------------------------------------------------------------


def above_zero(root: Tensor) -> Tensor:
    """A square root to divide by, a tiny number where it is zero.

    An infinite slope would turn the zero by which a Relu, Clip or Where before the root stops it into NaN.
    """
    return root.b.op("Max", root, root.operand(_floor(root.dtype)), shape=root.shape)


def _floor(dtype: ir.DataType) -> float:
    """Less than the root of any positive number of this type (float16: of 2^-24; float32: of 2^-149)."""
    return 2.0**-14 if dtype == ir.DataType.FLOAT16 else 2.0**-100


elementwise("Exp", "dx = g y", lambda g, x, y: g * y)
elementwise("Log", "dx = g / x", lambda g, x, y: g / x)
elementwise("Sqrt", "dx = g / (2 y); at zero y counts as a tiny number", lambda g, x, y: g * 0.5 / above_zero(y))
elementwise(
    "Erf", "dx = g 2 / sqrt(pi) exp(-x^2)", lambda g, x, y: g * (2 / math.sqrt(math.pi) * (-(x * x)).map("Exp"))
)


@rule("Pow")
def pow_(c: Context) -> Grads:
    """dx = g p x^(p-1), zero where p is; dp = g y log x, zero where x is not positive"""
    g, (x, p) = c.g, c.x
    log = c.b.where(x > 0, x, 1.0).map("Log")
    dp = (g * c.y[0] * log).unbroadcast(p).cast(p.dtype) if c.needs[1] else None
    exponent = c.constant(1)
    if exponent is not None and exponent.size == 1 and not c.needs[1]:
        return [(g * _slope_of_power(x, float(exponent.reshape(-1)[0]))).unbroadcast(x), dp]
    q = p.cast(x.dtype)
    slope = c.b.where(q.equals(0.0), 0.0, q * x ** (q - 1))  # x^0 is constant, at zero too
    return [(g * slope).unbroadcast(x), dp]


def _slope_of_power(x: Tensor, n: float) -> Operand:
    """n x^(n-1)."""
    if n in (0, 1):
        return n
    if n == 2:
        return x * 2
    power = x ** (n - 1)
    if 0 < n < 1:  # a root: infinite at zero
        power = x.b.op("Min", power, x.operand(1 / _floor(x.dtype)), shape=x.shape)
    return n * power


# Trigonometry --------------------------------------------------------------------------------------------------------

elementwise("Sin", "dx = g cos x", lambda g, x, y: g * x.map("Cos"))
elementwise("Cos", "dx = -g sin x", lambda g, x, y: -(g * x.map("Sin")))
elementwise("Tan", "dx = g (1 + y^2)", lambda g, x, y: g * (1 + y * y))
elementwise("Asin", "dx = g / sqrt(1 - x^2)", lambda g, x, y: g / above_zero((1 - x * x).map("Sqrt")))
elementwise("Acos", "dx = -g / sqrt(1 - x^2)", lambda g, x, y: -(g / above_zero((1 - x * x).map("Sqrt"))))
elementwise("Atan", "dx = g / (1 + x^2)", lambda g, x, y: g / (1 + x * x))
elementwise("Sinh", "dx = g cosh x", lambda g, x, y: g * x.map("Cosh"))
elementwise("Cosh", "dx = g sinh x", lambda g, x, y: g * x.map("Sinh"))
elementwise("Tanh", "dx = g (1 - y^2)", lambda g, x, y: g * (1 - y * y))
elementwise("Asinh", "dx = g / sqrt(x^2 + 1)", lambda g, x, y: g / (x * x + 1).map("Sqrt"))
elementwise("Acosh", "dx = g / sqrt(x^2 - 1)", lambda g, x, y: g / above_zero((x * x - 1).map("Sqrt")))
elementwise("Atanh", "dx = g / (1 - x^2)", lambda g, x, y: g / (1 - x * x))

# Activations ---------------------------------------------------------------------------------------------------------

elementwise("Relu", "dx = g where y > 0", lambda g, x, y: g * (y > 0))
elementwise("Sigmoid", "dx = g y (1 - y)", lambda g, x, y: g * (y * (1 - y)))
elementwise("Softplus", "dx = g sigmoid x", lambda g, x, y: g * x.map("Sigmoid"))
elementwise(
    "PRelu",
    "dx = g where x > 0, else g s; ds = g x where x < 0",
    lambda g, x, s, y: g * x.b.where(x > 0, 1.0, s),
    lambda g, x, s, y: g * x * (x < 0),
)


def _slopes(c: Context, positive: Operand, negative: Operand) -> Grads:
    """A gradient scaled by one of two factors, by the sign of the input."""
    return [c.g * c.b.where(c.x[0] > 0, c.x[0].operand(positive), c.x[0].operand(negative))]


@rule("LeakyRelu")
def leaky_relu(c: Context) -> Grads:
    """dx = g where x > 0, else alpha g"""
    return _slopes(c, 1.0, c.attr("alpha", 0.01))


@rule("Elu")
def elu(c: Context) -> Grads:
    """dx = g where x > 0, else g (y + alpha)"""
    return _slopes(c, 1.0, c.y[0] + c.attr("alpha", 1.0))


@rule("Selu")
def selu(c: Context) -> Grads:
    """dx = gamma g where x > 0, else g (y + alpha gamma)"""
    alpha, gamma = c.attr("alpha", 1.67326319217681884765625), c.attr("gamma", 1.05070102214813232421875)
    return _slopes(c, gamma, c.y[0] + alpha * gamma)


@rule("Celu")
def celu(c: Context) -> Grads:
    """dx = g where x > 0, else g (y / alpha + 1)"""
    return _slopes(c, 1.0, c.y[0] / c.attr("alpha", 1.0) + 1)


@rule("ThresholdedRelu")
def thresholded_relu(c: Context) -> Grads:
    """dx = g where x > alpha"""
    return [c.g * (c.x[0] > c.attr("alpha", 1.0))]


@rule("Shrink")
def shrink(c: Context) -> Grads:
    """dx = g where |x| > lambd"""
    return [c.g * (c.x[0].map("Abs") > c.attr("lambd", 0.5))]


@rule("Softsign")
def softsign(c: Context) -> Grads:
    """dx = g / (1 + |x|)^2"""
    scale = 1 + c.x[0].map("Abs")
    return [c.g / (scale * scale)]


@rule("HardSigmoid")
def hard_sigmoid(c: Context) -> Grads:
    """dx = alpha g where 0 < y < 1"""
    y = c.y[0]
    return [c.g * ((y > 0) & (y < 1)) * c.attr("alpha", 0.2)]


@rule("HardSwish")
def hard_swish(c: Context) -> Grads:
    """dx = g (clip(x/6 + 1/2, 0, 1) + x/6 where that is not clipped)"""
    x = c.x[0]
    line = c.b.op("Clip", x / 6 + 0.5, x.operand(0.0), x.operand(1.0), shape=x.shape)
    return [c.g * (line + x / 6 * ((x > -3) & (x < 3)))]


@rule("Swish")
def swish(c: Context) -> Grads:
    """dx = g (s + alpha y (1 - s)), s = sigmoid(alpha x)"""
    a, x = c.attr("alpha", 1.0), c.x[0]
    s = (x * a if a != 1 else x).map("Sigmoid")
    return [c.g * (s + a * c.y[0] * (1 - s))]


@rule("Mish")
def mish(c: Context) -> Grads:
    """dx = g (t + x (1 - t^2) sigmoid x), t = tanh(softplus x)"""
    x = c.x[0]
    t = x.map("Softplus").map("Tanh")
    return [c.g * (t + x * (1 - t * t) * x.map("Sigmoid"))]


@rule("Gelu")
def gelu(c: Context) -> Grads:
    """dx = g (P(x) + x P'(x)), P the normal distribution function or, as asked, its approximation by tanh
    (Hendrycks and Gimpel 2016).
    """
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
    """Passes where the value was kept; elsewhere it belongs to the bound, the upper one where they cross."""
    x, y, g = c.x[0], c.y[0], c.g
    low = high = None
    if c.has(1) and c.needs[1]:
        low = (g * ((x < c.x[1]) & ~(c.x[1] > c.x[2]) if c.has(2) else x < c.x[1])).sum(keep=False).reshape_like(c.x[1])
    if c.has(2) and c.needs[2]:
        above = c.b.op("Max", x, c.x[1], shape=x.shape) if c.has(1) else x
        high = (g * (above > c.x[2])).sum(keep=False).reshape_like(c.x[2])
    return [g * x.equals(y), low, high]


@rule("Max", "Min")
def extremum(c: Context) -> Grads:
    """Shared equally among the inputs that hold the extreme value."""
    if len(c.x) == 1:
        return [c.g]
    winners = [x.equals(c.y[0]).cast(c.g.dtype) for x in c.x]
    share = c.g / c.b.sum([winner.expand_like(c.y[0]) for winner in winners])
    return [(share * winner).unbroadcast(x) for x, winner in zip(c.x, winners, strict=True)]


@rule("Where")
def where(c: Context) -> Grads:
    """To a where the condition holds, to b elsewhere."""
    condition, a, b = c.x
    return [None, (c.g * condition).unbroadcast(a), (c.g * ~condition).unbroadcast(b)]


@rule("Sum")
def sum_(c: Context) -> Grads:
    """dx = g for every input"""
    return [c.g.unbroadcast(x) for x in c.x]


@rule("Mean")
def mean(c: Context) -> Grads:
    """dx = g / n for each of n inputs"""
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
    """As Cast."""
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
        kept = 1 - float(ratio if ratio is not None else 0.5)
        scale: Operand = 1 / kept if kept else 0.0
    else:
        scale = 1 / (1 - c.x[1].cast(c.g.dtype))
    if training is None:
        scale = c.b.where(c.x[2], c.g.operand(scale), 1.0)
    return [c.g * mask * scale]
