"""Convolutions. The gradients of one are convolutions again; how they are written decides a training step's speed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from onnxcompress.autodiff.rule import Context, Grads, rule
from onnxcompress.autodiff.rules.windows import Window, halves, kernel_of
from onnxcompress.autodiff.tensor import Size, Tensor

Formulation = Callable[[Window, Tensor, Tensor, int, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class WeightGradient:
    """What a weight's gradient is, left under `KEY` in the `meta` of the node that gives it, for a faster form.

    dW [M, C/G, ...]: the windows over `image` [N, C, ...] that give the results whose gradient is `g` [N, M, ...]; both
    are names, so that a copy of the graph can be asked.
    """

    KEY: ClassVar[str] = "gradient of a convolution's weight"
    image: str
    g: str
    group: int
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...] | None


@rule("Conv", refuses="a kernel whose size is unknown")
def conv(c: Context) -> Grads:
    """Image: the transposed convolution of g. Weight: image and g correlated. Bias: g summed."""
    x, w, g = c.x[0], c.x[1], c.g
    window, group = Window(c, x, g, kernel_of(c, 1)), c.attr("group", 1)
    dx = window.spread(g, w, group) if c.needs[0] else None
    dw = weight_gradient(window, x, g, group, w) if c.needs[1] else None
    return [dx, dw, bias_gradient(window, g)]


@rule("ConvTranspose", refuses="a kernel whose size is unknown")
def conv_transpose(c: Context) -> Grads:
    """The mirror image of Conv: what was the image is the result, and the reverse."""
    x, w, g = c.x[0], c.x[1], c.g
    window, group = Window(c, g, x, kernel_of(c, 1)), c.attr("group", 1)
    _transposed_padding(c, window)
    image = window.pad(g) if window.pads is None else g
    dx = c.b.op("Conv", image, w, pads=window.pads, group=group, shape=x.shape, **window.attributes)
    if any(o >= s for o, s in zip(c.attr("output_padding") or (), window.strides, strict=False)):
        dx = dx.slice(window.spatial, [0] * window.rank, [x.size(axis) for axis in window.spatial])
    dw = weight_gradient(window, g, x, group, w) if c.needs[1] else None
    return [dx, dw, bias_gradient(window, g)]


def _transposed_padding(c: Context, window: Window) -> None:
    """ConvTranspose derives its padding from the size it is to produce (auto_pad, output_shape)."""
    auto, wanted = str(c.attr("auto_pad", "NOTSET")), c.attr("output_shape")
    if not wanted and not auto.startswith("SAME"):
        return
    extra = c.attr("output_padding") or [0] * window.rank
    for i, axis in enumerate(window.spatial):
        size: Size = c.x[0].size(axis)
        total: Size
        if wanted:
            total = (size - 1) * window.strides[i] + (extra[i] + window.spans[i] - wanted[i])
        else:
            total = extra[i] + window.spans[i] - window.strides[i]
        low, high = halves(total)
        window.before[i], window.after[i] = (low, high) if auto == "SAME_UPPER" else (high, low)


def bias_gradient(window: Window, g: Tensor) -> Tensor:
    """g summed over batch and space."""
    return g.sum(0, *window.spatial, keep=False)


def by_taps(window: Window, image: Tensor, g: Tensor, group: int, w: Tensor) -> Tensor:
    """One matrix product a kernel element: g [M, N L] times what that element sees [C, N L] transposed.

    Channels go first once for all taps; each tap is then a slice and a product (a stack of products for groups).
    """
    b, m, per_group = window.b, w.size(0), w.size(1)
    channels_first = [1, 0, *window.spatial]
    rows = g.transpose(channels_first)
    columns = window.pad(image).transpose(channels_first)
    rows = rows.reshape([m, -1]) if group == 1 else rows.reshape([group, _share(m, group), -1])
    taps = []
    for place in window.places():
        seen = window.tap(columns, place)
        if group == 1:
            tap = b.op("Gemm", rows, seen.reshape([per_group, -1]), transB=1, shape=(None, None))
        else:
            stack = b.op("Reshape", seen, b.ints([group, per_group, -1]), shape=(group, None, None))
            tap = rows @ stack.swap()
        taps.append(tap.reshape([m, per_group, 1]))
    joined = taps[0] if len(taps) == 1 else b.op("Concat", *taps, axis=2)
    return joined.reshape([m, per_group, *window.kernel])


def by_convolution(window: Window, image: Tensor, g: Tensor, group: int, w: Tensor) -> Tensor:
    """One convolution with the batch as its channels: image [C/G, G N, ...] by g [M, N, ...], strides and dilations
    exchanged.
    """
    b, per_group = window.b, w.size(1)
    kernels = g.transpose([1, 0, *window.spatial])
    if group == 1:
        swapped = image.transpose([1, 0, *window.spatial])
    else:
        sizes = [image.size(axis) for axis in window.spatial]
        n = image.size(0)
        split = b.op("Reshape", image, b.ints([n, group, per_group, *sizes]), shape=(None,) * (3 + window.rank))
        turned = split.transpose([2, 1, 0, *(axis + 1 for axis in window.spatial)])
        swapped = b.op("Reshape", turned, b.ints([per_group, -1, *sizes]), shape=(None,) * (2 + window.rank))
    pads = window.pads
    if pads is None:
        swapped = window.pad(swapped)
    common: dict[str, Any] = {"strides": window.dilations, "dilations": window.strides, "group": group}
    dw = b.op("Conv", swapped, kernels, pads=pads, shape=(None,) * (2 + window.rank), **common)
    if any(stride > 1 for stride in window.strides):  # rows at the end that no window sees make it too large
        dw = dw.slice(window.spatial, [0] * window.rank, window.kernel)
    return dw.transpose([1, 0, *window.spatial])


def _share(channels: Size, group: int) -> Size:
    return channels // group if isinstance(channels, int) else channels / group


def weight_gradient(window: Window, image: Tensor, g: Tensor, group: int, w: Tensor) -> Tensor:
    """The formulation in use. By taps is the faster one on one thread in ONNX Runtime 1.32 for 1x1 and 3x3 kernels, by
    1.3 to 2.4 times, except with three input channels or a strided depthwise kernel, where they are equal.
    """
    found = by_taps(window, image, g, group, w)
    pads = None if window.pads is None else tuple(window.pads)
    form = WeightGradient(
        str(image.value.name),
        str(g.value.name),
        group,
        tuple(window.kernel),
        tuple(window.strides),
        tuple(window.dilations),
        pads,
    )
    producer = found.value.producer()
    if producer is not None:
        producer.meta[WeightGradient.KEY] = form
    return found


@rule("Col2Im", refuses="a block shape known only at run time")
def col2im(c: Context) -> Grads:
    """Every block takes what its elements were added to."""
    block = c.constant(2)
    if block is None:
        raise c.refuse("a block shape known only at run time has no rule")
    kernel = [int(size) for size in block.reshape(-1)]
    rank, b = len(kernel), c.b
    strides, dilations = (list(c.attr(name) or [1] * rank) for name in ("strides", "dilations"))
    pads = list(c.attr("pads") or [0] * 2 * rank)
    image = b.op("Pad", c.g, b.ints([0, 0, *pads[:rank], 0, 0, *pads[rank:]]), shape=(None,) * (rank + 2))
    axes = list(range(2, 2 + rank))
    taps = []
    for place in np.ndindex(*kernel):
        starts = [p * d for p, d in zip(place, dilations, strict=True)]
        rests = [(k - 1) * d - start for k, d, start in zip(kernel, dilations, starts, strict=True)]
        seen = image.slice(axes, list(starts), [-rest if rest else 2**31 for rest in rests], strides)
        taps.append(seen.reshape([0, 0, 1, -1]))
    return [b.op("Concat", *taps, axis=2).reshape_like(c.x[0]), None, None]
