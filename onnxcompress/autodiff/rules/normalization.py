"""Normalizations and softmax."""

from __future__ import annotations

import onnx_ir as ir

from onnxcompress.autodiff.rule import Context, Grads, rule
from onnxcompress.autodiff.tensor import Tensor


def normalized_gradient(g: Tensor, normal: Tensor, inverse: Tensor, axes: list[int]) -> Tensor:
    """dx for normal = (x - mean) * inverse: inverse * (g - mean(g) - normal * mean(g normal)), all over `axes`."""
    return inverse * (g - g.mean(*axes) - normal * (g * normal).mean(*axes))


@rule("BatchNormalization")
def batch_normalization(c: Context) -> Grads:
    """dx = g scale / sqrt(var + epsilon); of the statistics, too, so that those of a batch can take their place.

    training_mode 1 never comes here: `definitions` spells it out, because ONNX Runtime 1.32 would overwrite the running
    mean it is given.
    """
    x, scale, _, mean, var = c.x
    g, axes = c.g, [0, *range(2, c.rank())]
    along = [1, -1, *[1] * (c.rank() - 2)]

    def channel(t: Tensor) -> Tensor:
        return t.reshape(along).cast(g.dtype)

    inverse = 1 / (var + c.attr("epsilon", 1e-5)).map("Sqrt")
    factor = scale * inverse.cast(scale.dtype)
    total = g.sum(*axes, keep=False)
    with_x = (g * (x - channel(mean))).sum(*axes, keep=False).cast(inverse.dtype)
    return [
        g * channel(factor),
        (with_x * inverse).cast(scale.dtype),
        total.cast(scale.dtype),
        -(total * factor).cast(mean.dtype),
        (with_x * factor * inverse * inverse * -0.5).cast(var.dtype),
    ]


@rule("LayerNormalization")
def layer_normalization(c: Context) -> Grads:
    """s (h - mean h - n mean(h n)), n the normalized input, s the inverse deviation, h = g scale, over the given axes.

    The forward node is made to give mean and inverse deviation. Where these are used themselves: d mean / dx = 1/n,
    d inverse / dx = -inverse^2 normal / n.
    """
    x, scale, axes = c.x[0], c.x[1], c.axes_from(-1)
    of_mean, of_inverse = (c.grads[i] if i < len(c.grads) else None for i in (1, 2))
    g = c.grads[0] if c.grads[0] is not None else c.b.zeros(x.sizes(), x.dtype)
    mean, inverse = (c.output(i, ir.DataType.FLOAT).cast(x.dtype) for i in (1, 2))
    factor = c.constant(1)
    plain = factor is not None and bool((factor == 1).all())  # then the output is the normal itself, without a bias
    normal = c.y[0] if plain and not c.has(2) else (x - mean) * inverse
    normal.value.shape = x.value.shape
    bias = g.unbroadcast(c.x[2]) if c.has(2) else None
    dx = normalized_gradient(g if plain else g * scale, normal, inverse, axes)
    if of_mean is not None:
        dx = dx + of_mean.cast(x.dtype) / x.count(axes)
    if of_inverse is not None:
        dx = dx - of_inverse.cast(x.dtype) * inverse * inverse * normal / x.count(axes)
    return [dx, (g * normal).unbroadcast(scale), bias]


@rule("InstanceNormalization")
def instance_normalization(c: Context) -> Grads:
    """s (h - mean h - n mean(h n)), n the normalized input, s the inverse deviation, h = g scale, over the space."""
    x, scale, _ = c.x
    g, rank = c.g, c.rank()
    axes = list(range(2, rank))
    centred = x - x.mean(*axes)
    inverse = 1 / ((centred * centred).mean(*axes) + c.attr("epsilon", 1e-5)).map("Sqrt")
    normal = centred * inverse
    per_channel = scale.reshape([1, -1, *[1] * (rank - 2)])
    over = [0, *axes]
    return [
        normalized_gradient(g * per_channel, normal, inverse, axes),
        (g * normal).sum(*over, keep=False),
        g.sum(*over, keep=False),
    ]


@rule("RMSNormalization")
def rms_normalization(c: Context) -> Grads:
    """dx = r (h - n mean(h n)), r = 1 / sqrt(mean x^2 + epsilon), n = x r, h = g scale"""
    x, scale, g = c.x[0], c.x[1], c.g
    axes = c.axes_from(-1)
    inverse = 1 / ((x * x).mean(*axes) + c.attr("epsilon", 1e-5)).map("Sqrt")
    normal = x * inverse
    h = g * scale
    return [inverse * (h - normal * (h * normal).mean(*axes)), (g * normal).unbroadcast(scale)]


@rule("LRN")
def lrn(c: Context) -> Grads:
    """dx = g s^-b - 2 a b / n x N(g y / s), s = bias + a/n N(x^2), N the sum over neighbouring channels.

    Krizhevsky et al. 2012: ImageNet classification with deep convolutional neural networks.
    """
    n, x = c.attr("size"), c.x[0]
    alpha, beta, bias = c.attr("alpha", 1e-4), c.attr("beta", 0.75), c.attr("bias", 1.0)
    before, after = (n - 1) // 2, n - 1 - (n - 1) // 2
    s = bias + alpha / n * _neighbours(c, x * x, before, after)
    shared = _neighbours(c, c.g * c.y[0] / s, after, before)
    return [c.g * s**-beta - 2 * alpha * beta / n * x * shared]


def _neighbours(c: Context, t: Tensor, before: int, after: int) -> Tensor:
    """The sum over `before` channels ahead of each one, itself, and `after` behind it."""
    rank = c.rank()
    pads = [0] * (2 * rank)
    pads[1], pads[rank + 1] = before, after
    padded = c.b.op("Pad", t, c.b.ints(pads), shape=(None,) * rank)
    channels = c.b.ints([c.x[0].size(1)])
    parts = [padded.slice([1], [i], [channels + i]) for i in range(before + after + 1)]
    for part in parts:
        part.value.shape = c.x[0].value.shape
    return c.b.sum(parts)


@rule("Softmax")
def softmax(c: Context) -> Grads:
    """dx = y (g - sum(g y))"""
    axis, y = c.axis(-1), c.y[0]
    return [y * (c.g - (c.g * y).sum(axis))]


@rule("LogSoftmax")
def log_softmax(c: Context) -> Grads:
    """dx = g - exp(y) sum(g)"""
    return [c.g - c.y[0].map("Exp") * c.g.sum(c.axis(-1))]
