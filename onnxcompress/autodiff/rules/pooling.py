"""Pooling: a window's gradient goes to its largest element, or in shares to all of them."""

from __future__ import annotations

import onnx_ir as ir

from onnxcompress.autodiff.rule import Context, Grads, rule
from onnxcompress.autodiff.rules.positions import add_at
from onnxcompress.autodiff.rules.windows import Window, kernel_of
from onnxcompress.autodiff.tensor import Size, Tensor


@rule("MaxPool", refuses="column-major indices (storage_order 1); a kernel whose size is unknown")
def max_pool(c: Context) -> Grads:
    """To the position the operator itself reports; windows that overlap add up there."""
    c.only()
    if c.attr("storage_order", 0):
        raise c.refuse("column-major indices (storage_order 1) have no rule")
    positions = c.output(1, ir.DataType.INT64)
    window = Window(c, c.x[0], c.g, kernel_of(c))
    overlap = any(span > stride for span, stride in zip(window.spans, window.strides, strict=True))
    return [add_at(c, c.x[0], positions, c.g, overlap)]


@rule("AveragePool", refuses="a kernel whose size is unknown")
def average_pool(c: Context) -> Grads:
    """Equal shares to all elements of the window; padding takes its share where it was counted."""
    x, g = c.x[0], c.g
    window = Window(c, x, g, kernel_of(c))
    counted = bool(c.attr("count_include_pad", 0))
    ceil = bool(c.attr("ceil_mode", 0))
    if not window.padded and not ceil:
        return [_spread(window, g, 1 / window.volume)]
    if counted and not ceil:
        return [_spread(window, g, 1 / window.volume)]
    return [_spread(window, g / _counts(window, x, counted, ceil), 1.0)]


@rule("LpPool", refuses="ceil_mode; a kernel whose size is unknown")
def lp_pool(c: Context) -> Grads:
    """x |x|^(p-2) times the windows' g y^(1-p), zero where y is."""
    x, y, p = c.x[0], c.y[0], c.attr("p", 2)
    window = Window(c, x, c.g, kernel_of(c))
    if c.attr("ceil_mode", 0):
        raise c.refuse("ceil_mode has no rule")
    return [_spread(window, _over_power(c.g, y, p - 1), 1.0) * _signed_power(x, p - 1)]


@rule("GlobalLpPool")
def global_lp_pool(c: Context) -> Grads:
    """The same of one window, the whole image."""
    p = c.attr("p", 2)
    return [_over_power(c.g, c.y[0], p - 1) * _signed_power(c.x[0], p - 1)]


@rule("MaxUnpool", refuses="output_shape")
def max_unpool(c: Context) -> Grads:
    """Every value went to one position."""
    if c.has(2):
        raise c.refuse("output_shape has no rule")
    return [c.g.reshape([-1]).take(c.x[1]), None, None]


@rule("GlobalAveragePool")
def global_average_pool(c: Context) -> Grads:
    """g / n to each of n elements."""
    x = c.x[0]
    return [(c.g / x.count(range(2, c.rank()))).expand_like(x)]


@rule("GlobalMaxPool")
def global_max_pool(c: Context) -> Grads:
    """To the first element that holds the maximum, as MaxPool's."""
    x, b = c.x[0], c.b
    flat = x.reshape([0, 0, -1])
    place = b.op("ArgMax", flat, axis=2, keepdims=1)
    zeros = b.zeros(b.op("Shape", flat), c.g.dtype)
    return [b.op("ScatterElements", zeros, place, c.g.reshape([0, 0, 1]), axis=2).reshape_like(x)]


def _over_power(g: Tensor, y: Tensor, exponent: int) -> Tensor:
    """g / y^exponent, zero where y is."""
    return g.b.where(y.equals(0.0), 0.0, g / (y if exponent == 1 else y**exponent))


def _signed_power(t: Tensor, exponent: int) -> Tensor:
    return t if exponent == 1 else t.map("Sign") * t.map("Abs") ** exponent


def _spread(window: Window, g: Tensor, share: float) -> Tensor:
    """Every window's value times `share` to each of its elements."""
    return window.spread(window.channelwise(g), window.ones(share, g)).reshape_like(window.image)


def _stretch(window: Window) -> None:
    """Count the part of the last window that ceil_mode lets hang over as padding."""
    b = window.b
    for i, axis in enumerate(window.spatial):
        size, windows = window.image.size(axis), window.result.size(axis)
        before = window.before[i]
        if isinstance(size, int) and isinstance(windows, int) and isinstance(before, int):
            reach = (windows - 1) * window.strides[i] + window.spans[i]
            window.after[i] = max(reach - size - before, 0)
        else:
            last = (b.ints([windows]) - 1) * window.strides[i] + window.spans[i]
            window.after[i] = b.op("Max", last - b.ints([size]) - b.ints([before]), b.ints([0]))


def _counts(window: Window, x: Tensor, counted: bool, ceil: bool) -> Tensor:
    """How many elements each window averaged [1, 1, ...]: a convolution of ones by ones."""
    b = window.b
    sizes = b.ints([1, 1, *(x.size(axis) for axis in window.spatial)])
    ones = b.op("Expand", b.constant(1, x.dtype), sizes, shape=(1, 1, *[None] * window.rank))
    if counted:  # the declared padding counts, the overhang does not
        pads = b.ints([0, 0, *window.before, 0, 0, *window.after])
        ones = b.op("Pad", ones, pads, b.constant(1, x.dtype), shape=(1, 1, *[None] * window.rank))
        declared = list(window.after)
        if ceil:
            _stretch(window)
        room = [_at_least_zero(now - was) for now, was in zip(window.after, declared, strict=True)]
        if any(not isinstance(size, int) or size > 0 for size in room):
            ones = b.op("Pad", ones, b.ints([0, 0, *[0] * window.rank, 0, 0, *room]))
    else:
        if ceil:
            _stretch(window)
        ones = window.pad(ones)
    return b.op("Conv", ones, window.ones(1.0, x), shape=(1, 1, *[None] * window.rank), **window.attributes)


def _at_least_zero(size: Size) -> Size:
    if isinstance(size, int):
        return max(size, 0)
    return size.b.op("Max", size, size.b.ints([0]))
