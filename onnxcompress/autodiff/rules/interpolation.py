"""GridSample and RoiAlign: values between the pixels, at places that are themselves data."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir

from onnxcompress.autodiff.rule import Context, Grads, rule
from onnxcompress.autodiff.rules.recomputed import recomputed
from onnxcompress.autodiff.tensor import Operand, Size, Tensor

Taps = list[tuple[Tensor, Tensor]]  # along one axis: pixels and their weights
INT64 = ir.DataType.INT64


@rule("GridSample")
def grid_sample(c: Context) -> Grads:
    """Image: g to the pixels around each place, weighted. Grid: g times the slope of the weights; none where nearest.

    As in PyTorch, a place on the border or beyond has no slope where the padding is border or reflection.
    """
    return recomputed(c, lambda: _grid_sample(c))


def _grid_sample(c: Context) -> Tensor:
    """Pixels [N, K P, C] of all K taps around P places, weighted and summed."""
    x, b, axes = c.x[0], c.b, c.rank() - 2
    grid = c.x[1].reshape([0, -1, axes])
    # The last number of a place belongs to the first axis.
    taps = [_taps(c, grid.at(2, axes - 1 - axis), x.size(2 + axis)) for axis in range(axes)]
    indices, weights = [], []
    for combination in itertools.product(*taps):
        flat, weight = combination[0]
        for axis, (index, share) in enumerate(combination[1:], 1):
            flat, weight = flat * x.size(2 + axis) + index, weight * share
        indices.append(flat)
        weights.append(weight)
    flattened = x.reshape([0, 0, -1]).transpose([0, 2, 1])
    every = b.op("Concat", *indices, axis=1, shape=(None, None)).unsqueeze(2)
    pixels = b.op("GatherND", flattened, every, batch_dims=1, shape=(None, None, None))
    shares = b.op("Concat", *weights, axis=1, shape=(None, None)).unsqueeze(2).cast(x.dtype)
    summed = (pixels * shares).reshape([0, len(indices), -1, x.size(1)]).sum(1, keep=False)
    return summed.transpose([0, 2, 1]).reshape_like(c.y[0])


def _taps(c: Context, u: Tensor, size: Size) -> Taps:
    """The pixels along one axis that the values at `u` [N, P], from -1 to 1, are made of."""
    mode, padding = str(c.attr("mode", "linear")), str(c.attr("padding_mode", "zeros"))
    aligned, number = bool(c.attr("align_corners", 0)), _number(size, u)
    last = number - 1
    ends = (0.0, last) if aligned else (-0.5, number)  # where reflection turns, and how far it is to the other end
    place = (u + 1) / 2 * last if aligned else ((u + 1) * number - 1) / 2
    cubic = "cubic" in mode  # then every pixel is brought back, otherwise the place
    if padding == "reflection" and not cubic:
        place = _reflected(place, *ends)
    if padding != "zeros" and not cubic:
        place = _within(place, last)
    found: Taps = []
    for pixel, share in _cubic(place) if cubic else _linear(place) if "linear" in mode else _nearest(place):
        if padding == "reflection" and cubic:
            pixel = _reflected(pixel, *ends)
        inside = u.b.op("Clip", pixel, pixel.operand(0.0), _scalar(pixel.operand(last)), shape=pixel.shape)
        found.append((inside.cast(INT64), share * inside.equals(pixel) if padding == "zeros" else share))
    return found


def _nearest(place: Tensor) -> Taps:
    pixel = place.map("Round")
    return [(pixel, pixel.equals(pixel).cast(pixel.dtype))]


def _linear(place: Tensor) -> Taps:
    base = place.map("Floor")
    t = place - base
    return [(base, 1 - t), (base + 1, t)]


def _cubic(place: Tensor) -> Taps:
    """Keys 1981: Cubic convolution interpolation, with a = -0.75, for distances up to 1 and from 1 to 2."""
    base, a = place.map("Floor"), -0.75
    t = place - base

    def near(d: Tensor) -> Tensor:
        return ((a + 2) * d - (a + 3)) * d * d + 1

    def far(d: Tensor) -> Tensor:
        return ((a * d - 5 * a) * d + 8 * a) * d - 4 * a

    return [(base - 1, far(t + 1)), (base, near(t)), (base + 1, near(1 - t)), (base + 2, far(2 - t))]


def _number(size: Size, like: Tensor) -> Operand:
    """A size to compute with."""
    return float(size) if isinstance(size, int) else size.cast(like.dtype)


def _scalar(t: Tensor) -> Tensor:
    """A tensor of one element as a scalar."""
    return t if t.rank == 0 else t.reshape([])


def _within(place: Tensor, last: Operand) -> Tensor:
    """`place` between 0 and `last`, constant from these on."""
    b = place.b
    above = b.where(place > 0, place, 0.0)
    return b.where(above < last, above, last)


def _reflected(place: Tensor, low: float, span: Operand) -> Tensor:
    """`place` mirrored at `low` and `low + span` until it lies between them."""
    # A single pixel has no span; clipping does the rest.
    span = place.b.op("Max", span, span.operand(1.0), shape=span.shape) if isinstance(span, Tensor) else max(span, 1.0)
    beyond = (place - low).map("Abs")
    turns = (beyond / span).map("Floor")
    rest = beyond - turns * span
    odd = turns - (turns / 2).map("Floor") * 2
    return rest + odd * (span - rest * 2) + low


@rule("RoiAlign", refuses="mode max")
def roi_align(c: Context) -> Grads:
    """dx = A' g B for each region, A and B the averaged weights of its samples along each axis; regions through these.

    y = A x B' with A [height, H] and B [width, W]. Regions of several images take a copy of their image each.
    """
    if str(c.attr("mode", "avg")) != "avg":
        raise c.refuse("mode max has no rule")

    def write() -> Tensor:
        x = c.x[0]
        images = x if x.shape and x.shape[0] == 1 else x.take(c.x[2]).shaped(None, None, None, None)
        rows, columns = (_samples(c, axis).unsqueeze(1) for axis in (0, 1))
        return rows @ images @ columns.transpose([0, 1, 3, 2])

    return recomputed(c, write)


def _samples(c: Context, axis: int) -> Tensor:
    """The weights [R, output size, size] of all pixels along one axis, 0 for the height, averaged over the samples."""
    b, size, regions = c.b, c.x[0].size(2 + axis), c.x[1]
    half, cells = str(c.attr("coordinate_transformation_mode", "half_pixel")) == "half_pixel", _cells(c, axis)
    low, high = (regions.at(1, i) * float(c.attr("spatial_scale", 1.0)) - (0.5 if half else 0.0) for i in _sides(axis))
    extent = high - low
    if not half:
        extent = b.op("Max", extent, extent.operand(1.0), shape=extent.shape)
    step, ratio = extent / cells, int(c.attr("sampling_ratio", 0))
    count: Operand = float(ratio)
    if not ratio:
        count = b.op("Max", step.map("Ceil"), step.operand(0.0), shape=step.shape).reshape([-1, 1, 1])
    most = b.ints([ratio]) if not isinstance(count, Tensor) else count.reduce("ReduceMax", [0]).cast(INT64).reshape([1])
    k = _line(b.ints([most]), step.dtype)
    cell = b.constant(np.arange(cells).reshape(-1, 1), step.dtype)
    place = low.reshape([-1, 1, 1]) + (cell + (k + 0.5) / count) * step.reshape([-1, 1, 1])  # [R, cells, samples]
    last = _number(size, place) - 1
    counted = (place >= -1) & (place <= last + 1)
    if isinstance(count, Tensor):
        counted = counted & (k < count)
        count = b.op("Max", count, count.operand(1.0), shape=count.shape)
    pixel = _line(b.ints([size]), place.dtype)
    inside = b.op("Clip", place, place.operand(0.0), _scalar(place.operand(last)), shape=place.shape)
    near = (1 - (inside.unsqueeze(3) - pixel).map("Abs")).map("Relu")
    shares = b.where(counted.unsqueeze(3), near, 0.0)
    return (shares.sum(2, keep=False) / count).shaped(None, cells, None)


def _cells(c: Context, axis: int) -> int:
    return int(c.attr(("output_height", "output_width")[axis], 1))


def _sides(axis: int) -> tuple[int, int]:
    """Where a region [x1, y1, x2, y2] has its ends along an axis."""
    return (1, 3) if axis == 0 else (0, 2)


def _line(size: Tensor, dtype: ir.DataType) -> Tensor:
    """0, 1, ... up to `size` [1]."""
    b = size.b
    line = b.op("Range", b.constant(np.int64(0)), size.reshape([]), b.constant(np.int64(1)), shape=(None,))
    return line.cast(dtype)
