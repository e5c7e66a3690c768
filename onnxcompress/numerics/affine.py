"""Affine quantization: the one module of its arithmetic.

    q = saturate(round_half_even(x / scale) + zero_point)      ONNX QuantizeLinear
    x = (q - zero_point) * scale                               ONNX DequantizeLinear

Both as ONNX Runtime computes them: in float32, the result of dequantization rounded once to the type of the scale.
Parameters are per tensor (scalars), per channel (one along `axis`) or blocked (one for each `block` elements along
`axis`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from onnxcompress.numerics.chunks import CHUNK, Array

_TYPES: dict[str, tuple[Any, int, int]] = {
    "int2": (ml_dtypes.int2, -2, 1),
    "uint2": (ml_dtypes.uint2, 0, 3),
    "int4": (ml_dtypes.int4, -8, 7),
    "uint4": (ml_dtypes.uint4, 0, 15),
    "int8": (np.int8, -128, 127),
    "uint8": (np.uint8, 0, 255),
    "int16": (np.int16, -(2**15), 2**15 - 1),
    "uint16": (np.uint16, 0, 2**16 - 1),
    "int32": (np.int32, -(2**31), 2**31 - 1),
}


@dataclasses.dataclass(frozen=True)
class AffineParams:
    """Scale and zero point with all it takes to apply them.

    Per tensor (axis None): 0-d arrays. Per channel: 1-d, one entry along `axis`. Blocked: the shape of the tensor
    with `axis` divided by `block`, rounded up.
    """

    scale: Array
    zero_point: Array
    dtype: str = "int8"
    axis: int | None = None
    block: int = 0

    @property
    def qmin(self) -> int:
        """Least integer of the type."""
        return _type(self.dtype)[1]

    @property
    def qmax(self) -> int:
        """Greatest integer of the type."""
        return _type(self.dtype)[2]

    def quantize(self, x: Array) -> Array:
        """See `quantize`."""
        return quantize(x, self.scale, self.zero_point, self.dtype, axis=self.axis, block=self.block)

    def dequantize(self, q: Array) -> Array:
        """See `dequantize`."""
        return dequantize(q, self.scale, self.zero_point, axis=self.axis, block=self.block)


class Quantized(NamedTuple):
    """An integer tensor with its scale and zero point."""

    q: Array
    scale: Array
    zero_point: Array


def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """The numpy (or ml_dtypes) type of an integer type's name."""
    kind: np.dtype[Any] = np.dtype(_type(dtype)[0])
    return kind


def limits(dtype: str, *, symmetric: bool, reduced_range: bool = False) -> tuple[int, int]:
    """Least and greatest integer that quantization uses.

    Symmetric 8- and 16-bit types leave out the least integer, so that a weight and its negative get negative integers;
    below 8 bits that would cost a level out of 16 or 4, and all are used. Reduced range: int8 in [-64, 64] or uint8 in
    [0, 127]; where one operand of a product is so reduced, the sum of two products fits 16 bits (2 * 255 * 64 = 32,640
    and 2 * 127 * 128 = 32,512; see `pair_sum_bound`).

    Raises:
        ValueError: reduced range of another type, unknown type.
    """
    _, low, high = _type(dtype)
    if reduced_range:
        if dtype not in ("int8", "uint8"):
            raise ValueError(f"reduced range is defined for int8 and uint8, not {dtype}")
        return (-64, 64) if dtype == "int8" else (0, 127)
    if symmetric and high - low >= 255:
        return low + 1, high
    return low, high


def choose_scale(
    minimum: Array | float,
    maximum: Array | float,
    *,
    dtype: str = "int8",
    symmetric: bool,
    reduced_range: bool = False,
    scale_dtype: Any = np.float32,
) -> tuple[Array, Array]:
    """Scale and zero point that cover [minimum, maximum] and 0, elementwise over arrays.

    0.0 is always exactly representable. The scale is rounded upwards, so that the whole range is covered and no value
    in it is off by more than scale / 2 (a scale beyond the greatest of `scale_dtype` saturates). It is never below
    the least normal number, so that dividing by it stays finite; a range of only 0 gets scale 1. The symmetric zero
    point is 0 for signed types, the middle of the range for unsigned ones.

    Returns:
        scale of type `scale_dtype`, zero point of the integer type, both in the broadcast shape of the arguments.

    Raises:
        ValueError: a bound not finite, or minimum > maximum.
    """
    low, high = np.broadcast_arrays(np.asarray(minimum, np.float64), np.asarray(maximum, np.float64))
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise ValueError("the range to quantize is not finite")
    if (low > high).any():
        raise ValueError("the range to quantize has a minimum above its maximum")
    low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
    qmin, qmax = limits(dtype, symmetric=symmetric, reduced_range=reduced_range)
    if symmetric:
        middle = 0 if qmin < 0 else (qmin + qmax + 1) // 2
        wanted = np.maximum(high / (qmax - middle), low / (qmin - middle))
        scale = _round_up(wanted, scale_dtype)
        zero_point = np.full(scale.shape, middle)
    else:
        scale = _round_up(high / (qmax - qmin) - low / (qmax - qmin), scale_dtype)
        zero_point = np.clip(np.rint(qmin - low / scale.astype(np.float64)), qmin, qmax)
    return scale, zero_point.astype(np.int64).astype(numpy_dtype(dtype))


def quantize(
    x: Array, scale: Array, zero_point: Array, dtype: str, *, axis: int | None = None, block: int = 0
) -> Array:
    """Integers of `x` as ONNX QuantizeLinear computes them (int32, for biases, in float64). NaN is not looked for.

    Args:
        x: floats of any shape and float type.
        axis: where scale and zero point are 1-d or blocked, the axis they run along.
        block: elements along `axis` that share a scale; 0: not blocked.

    Raises:
        ValueError: shapes of scale or zero point that do not fit.
    """
    kind, qmin, qmax = _type(dtype)
    out = np.empty(x.shape, dtype=kind)
    wide = np.float64 if dtype == "int32" else np.float32
    for source, target, s, z in _pieces(x, out, scale, zero_point, axis, block):
        with np.errstate(over="ignore"):  # infinite, and saturated below, as it should be
            part = source.astype(wide) / s.astype(wide)
        np.rint(part, out=part)
        part += z.astype(wide)
        np.clip(part, qmin, qmax, out=part)
        target[...] = part.astype(np.int32).astype(kind)
    return out


def dequantize(q: Array, scale: Array, zero_point: Array, *, axis: int | None = None, block: int = 0) -> Array:
    """Floats of `q`, in the type of the scale, bit for bit as ONNX Runtime's DequantizeLinear."""
    out = np.empty(q.shape, dtype=np.asarray(scale).dtype)
    for source, target, s, z in _pieces(q, out, scale, zero_point, axis, block):
        part = (source.astype(np.int32) - z.astype(np.int32)).astype(np.float32)
        part *= s.astype(np.float32)
        target[...] = part.astype(out.dtype)
    return out


def quantize_weight(
    x: Array,
    *,
    dtype: str = "int8",
    axis: int | None = None,
    block: int = 0,
    symmetric: bool = True,
    reduced_range: bool = False,
    clip: str = "minmax",
    scale_dtype: Any = np.float32,
) -> Quantized:
    """Quantize a whole weight per tensor, per channel along `axis`, or in blocks along `axis`.

    Args:
        clip: "minmax" covers all values; "mse" shrinks each range by the factor of least squared error, found on a
            geometric grid and refined once (clipping a few large weights buys a finer step for all others).
        scale_dtype: the type the scale is stored in; errors are computed with the stored scale.

    Raises:
        ValueError: x not finite, or an unknown type or clip.
    """
    if clip not in ("minmax", "mse"):
        raise ValueError(f"clip must be minmax or mse, not {clip!r}")
    if block and axis is None:
        raise ValueError("blocks need an axis")
    axis = axis % x.ndim if axis is not None else None
    low, high = _ranges(x, axis, block)
    options: dict[str, Any] = {"dtype": dtype, "symmetric": symmetric, "reduced_range": reduced_range}
    if not x.size:
        low, high = np.zeros_like(low), np.zeros_like(high)
    ratio = np.ones(low.shape)
    bounds = limits(dtype, symmetric=symmetric, reduced_range=reduced_range)

    def chosen(factor: Array) -> tuple[Array, Array]:
        scale, zero = choose_scale(low * factor, high * factor, scale_dtype=scale_dtype, **options)
        return scale, zero

    if clip == "mse" and x.size:
        least = np.full(low.shape, np.inf)
        for grid in (0.9 ** np.arange(25), 0.9 ** (np.arange(-4, 5) / 5)):
            base = ratio.copy()
            for step in grid:
                factor = np.minimum(base * step, 1.0)
                error = _squared_error(x, *chosen(factor), bounds, axis, block)
                better = error < least
                least, ratio = np.where(better, error, least), np.where(better, factor, ratio)
    scale, zero = chosen(ratio)
    q = quantize(x, scale, zero, dtype, axis=axis, block=block)
    if bounds != _type(dtype)[1:]:
        np.clip(q, *(numpy_dtype(dtype).type(bound) for bound in bounds), out=q)
    return Quantized(q, scale, zero)


class PairSums(NamedTuple):
    """Extreme sums of two products (`lowest` <= 0 <= `highest`), and whether they leave the signed 16-bit range."""

    lowest: int
    highest: int
    saturates: bool


def pair_sum_bound(
    weight: Array, *, axis: int, activation: tuple[int, int] = (0, 255), neighbours: bool = True
) -> PairSums:
    """Bound the sums that 8-bit dot products of x86 without VNNI hold in 16 bits (vpmaddubsw saturates silently).

    Two products a0 * w0 + a1 * w1 of unsigned activations and stored signed weights are added before they are widened.
    The sum lies within the returned bounds for all activations in range, and reaches them.

    Args:
        weight: int8 integers.
        axis: the axis summed over (K), in the order in which it runs; move several into one first.
        activation: least and greatest stored activation, within 0..255.
        neighbours: elements 0 and 1, 2 and 3, ... along `axis` meet; False where the order is not known: any two of one
            output may meet, and the bound is over them.

    Raises:
        ValueError: activations out of range or in the wrong order, weight without elements.
    """
    least, most = activation
    if not 0 <= least <= most <= 255:
        raise ValueError(f"stored activations lie between 0 and 255 in ascending order, not {activation}")
    if not weight.size:
        raise ValueError("a weight without elements has no sums")
    along = np.moveaxis(weight, axis, -1).astype(np.int32)
    if along.shape[-1] % 2:
        along = np.concatenate([along, np.zeros((*along.shape[:-1], 1), np.int32)], axis=-1)
    up = np.maximum(along * most, along * least)
    down = np.minimum(along * most, along * least)
    if neighbours:
        highest, lowest = up[..., 0::2] + up[..., 1::2], down[..., 0::2] + down[..., 1::2]
    else:
        highest, lowest = np.sort(up, axis=-1)[..., -2:].sum(axis=-1), np.sort(down, axis=-1)[..., :2].sum(axis=-1)
    top, bottom = max(int(highest.max()), 0), min(int(lowest.min()), 0)
    return PairSums(bottom, top, top > 2**15 - 1 or bottom < -(2**15))


def _type(dtype: str) -> tuple[Any, int, int]:
    if dtype not in _TYPES:
        raise ValueError(f"unknown integer type {dtype!r}: one of {', '.join(_TYPES)}")
    return _TYPES[dtype]


def _round_up(wanted: Array, scale_dtype: Any) -> Array:
    """The least positive normal number of `scale_dtype` that is not below `wanted`; 1 for 0."""
    info: Any = ml_dtypes.finfo(scale_dtype)  # type: ignore[no-untyped-call]
    wanted = np.where(wanted == 0, 1.0, np.maximum(wanted, float(info.smallest_normal)))
    scale = np.atleast_1d(np.minimum(wanted, float(info.max))).astype(scale_dtype)
    bits = scale.view(f"u{scale.dtype.itemsize}")
    bits += (scale.astype(np.float64) < wanted) & (scale < info.max)
    return np.asarray(scale.reshape(wanted.shape))


def _blocked(x: Array, axis: int, block: int) -> tuple[int, int, int, int]:
    outer, inner = int(np.prod(x.shape[:axis])), int(np.prod(x.shape[axis + 1 :]))
    return outer, x.shape[axis], inner, -(-x.shape[axis] // block)


def _ranges(x: Array, axis: int | None, block: int) -> tuple[Array, Array]:
    """Minimum and maximum in the shape of the scale; ValueError where not finite."""
    if axis is None:
        low, high = (np.asarray(f(initial=0.0), np.float64) for f in (x.min, x.max))
    elif block:
        starts = np.arange(0, x.shape[axis], block)
        low, high = np.minimum.reduceat(x, starts, axis=axis), np.maximum.reduceat(x, starts, axis=axis)
    else:
        others = tuple(i for i in range(x.ndim) if i != axis)
        low, high = x.min(axis=others, initial=0.0), x.max(axis=others, initial=0.0)
    low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise ValueError("the weight to quantize holds NaN or infinity")
    return low, high


def _pieces(
    source: Array,
    target: Array | None,
    scale: Array,
    zero_point: Array,
    axis: int | None,
    block: int,
    reduced: Array | None = None,
) -> Iterator[tuple[Array, Array, Array, Array]]:
    """Matching pieces of source, target and their parameters as [outer, channels, inner], bounded in size.

    Target has the shape of source; without one, `reduced` is cut up instead, an array in the shape of the scale.
    """
    scale, zero_point = np.asarray(scale), np.asarray(zero_point)
    if scale.shape != zero_point.shape:
        raise ValueError(f"scale of shape {scale.shape} with a zero point of shape {zero_point.shape}")
    if axis is None:
        if scale.size != 1:
            raise ValueError(f"scale of shape {scale.shape} needs an axis")
        shape, expected, repeat = (1, source.size, 1), (1, 1, 1), 1
    else:
        axis %= source.ndim
        outer, length, inner, blocks = _blocked(source, axis, block or 1)
        shape = (outer, length, inner)
        expected, repeat = ((outer, blocks, inner), block) if block else ((1, length, 1), 1)
        wanted = (*source.shape[:axis], blocks, *source.shape[axis + 1 :]) if block else (length,)
        if scale.shape != wanted:
            raise ValueError(f"scale of shape {scale.shape} where {wanted} is needed for a tensor of {source.shape}")
    x = source.reshape(shape)
    out = x if target is None else target.reshape(shape)
    sums = None if reduced is None else reduced.reshape(expected)
    s, z = scale.reshape(expected), zero_point.reshape(expected)
    rows = max(1, CHUNK // max(1, shape[1] * shape[2]))
    columns = max(1, CHUNK // max(1, rows * shape[2])) // repeat * repeat or repeat
    for i in range(0, shape[0], rows):
        for j in range(0, shape[1], columns):
            at = slice(i, i + rows), slice(j, j + columns)
            mine = (
                slice(None) if expected[0] == 1 else at[0],
                slice(None) if expected[1] == 1 else slice(j // repeat, -(-(j + columns) // repeat)),
            )
            length = x[at].shape[1]
            scales, zeros = s[mine], z[mine]
            if block:
                scales, zeros = (np.repeat(p, repeat, axis=1)[:, :length] for p in (scales, zeros))
            yield x[at], out[at] if sums is None else sums[mine], scales, zeros


def _squared_error(x: Array, scale: Array, zero: Array, bounds: tuple[int, int], axis: int | None, block: int) -> Array:
    """Squared error of quantizing with the given parameters, in the shape of the scale."""
    error = np.zeros(np.asarray(scale).shape)
    for part, target, s, z in _pieces(x, None, scale, zero, axis, block, error):
        values, wide, offset = part.astype(np.float32), s.astype(np.float32), z.astype(np.float32)
        with np.errstate(over="ignore"):
            q = np.rint(values / wide) + offset
        np.clip(q, *bounds, out=q)
        q -= offset
        q *= wide
        q -= values
        square = np.square(q, dtype=np.float64)  # the square of a small float32 error would vanish
        if block:
            target += np.add.reduceat(square, np.arange(0, square.shape[1], block), axis=1)
        else:
            target += square.sum(axis=(0, 1, 2) if axis is None else (0, 2), keepdims=True)
    return error
