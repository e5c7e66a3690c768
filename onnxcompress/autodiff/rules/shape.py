"""Operators that move elements about without changing them: the gradient moves back."""

from __future__ import annotations

import numpy as np

from onnxcompress.autodiff.rule import Context, Grads, rule
from onnxcompress.autodiff.rules.positions import scatter_back
from onnxcompress.autodiff.tensor import Size


@rule("Reshape", "Squeeze", "Unsqueeze", "Flatten")
def reshape(c: Context) -> Grads:
    """g in the shape of the input."""
    return [c.g.reshape_like(c.x[0])]


@rule("Transpose")
def transpose(c: Context) -> Grads:
    """Transposed back."""
    perm = c.attr("perm", None) or list(range(c.rank()))[::-1]
    return [c.g.transpose([int(i) for i in np.argsort(perm)])]


@rule("Expand")
def expand(c: Context) -> Grads:
    """Summed over the repeats."""
    return [c.g.unbroadcast(c.x[0])]


@rule("Concat")
def concat(c: Context) -> Grads:
    """Split where it was joined."""
    axis = c.axis()
    if len(c.x) == 1:
        return [c.g]
    sizes = c.b.ints([x.size(axis) for x in c.x])
    return c.b.ops("Split", c.g, sizes, outputs=len(c.x), axis=axis)


@rule("Split")
def split(c: Context) -> Grads:
    """Joined again, zeros for parts nothing depends on."""
    dtype = c.x[0].dtype
    parts = [c.b.zeros(c.output(i).sizes(), dtype) if g is None else g for i, g in enumerate(c.grads)]
    return [c.b.op("Concat", *parts, axis=c.axis())]


@rule("Slice")
def slice_(c: Context) -> Grads:
    """Zeros around the part that was cut out; with steps or negative ones, every element back to its position."""
    rank, x, g, b = c.x[0].rank, c.x[0], c.g, c.b
    starts, ends, axes, steps = (c.constant(i) for i in range(1, 5))
    strided = c.has(4) and (steps is None or np.any(steps != 1))
    if rank is None or strided or starts is None or (c.has(3) and axes is None):
        return [scatter_back(c)]
    before: list[Size] = [0] * rank
    after: list[Size] = [0] * rank
    for i, start in enumerate(starts.reshape(-1).tolist()):
        axis = int(axes.reshape(-1)[i]) % rank if axes is not None else i
        size = x.size(axis)
        if isinstance(size, int):
            begin = min(max(start + size if start < 0 else start, 0), size)
            first: Size = begin
            end = None if ends is None else int(ends.reshape(-1)[i])
            if end is None:
                after[axis] = size - begin - b.ints([g.size(axis)])
            else:
                after[axis] = size - max(min(max(end + size if end < 0 else end, 0), size), begin)
        else:
            if start < 0:
                first = b.op("Max", size + start, b.ints([0]))
            else:
                first = start if start == 0 else b.op("Min", b.ints([start]), size)
            after[axis] = size - first - b.ints([c.y[0].size(axis)])
        before[axis] = first
    return [b.op("Pad", g, b.ints([*before, *after]), shape=x.shape)]


@rule("Pad", refuses="axes known only at run time")
def pad(c: Context) -> Grads:
    """What was there before; other modes than zeros add what was copied to where it came from."""
    if str(c.attr("mode", "constant")) != "constant":
        return [scatter_back(c)]
    rank, x, b = c.rank(), c.x[0], c.b
    pads, axes = c.constant(1), c.constant(3)
    if c.has(3) and axes is None:
        raise c.refuse("axes known only at run time have no rule")
    over = [int(a) % rank for a in axes.reshape(-1)] if axes is not None else list(range(rank))
    if pads is not None:
        front, back = pads.reshape(2, -1)
        if not pads.any():
            dx = c.g
        elif (pads >= 0).all():
            used = [(a, int(p)) for a, p, q in zip(over, front, back, strict=True) if p or q]
            ends: list[Size] = [p + x.size(a) for a, p in used]
            dx = c.g.slice([a for a, _ in used], [p for _, p in used], ends)
        else:
            dx = b.op("Pad", c.g, b.constant(-pads), None, c.x[3] if c.has(3) else None)
    else:
        dx = b.op("Pad", c.g, -c.x[1], None, c.x[3] if c.has(3) else None)
    outside = None
    if c.has(2) and c.needs[2]:
        outside = (c.g.sum(keep=False) - dx.sum(keep=False)).reshape_like(c.x[2])
    return [dx, None, outside]


@rule("Tile")
def tile(c: Context) -> Grads:
    """Summed over the repeats: [r0 * d0, r1 * d1, ...] is seen as [r0, d0, r1, d1, ...]."""
    rank, x, b = c.rank(), c.x[0], c.b
    pairs = b.op("Concat", c.x[1].reshape([rank, 1]), x.sizes().reshape([rank, 1]), axis=1)
    folded = b.op("Reshape", c.g, pairs.reshape([2 * rank]), shape=(None,) * (2 * rank))
    return [folded.sum(*range(0, 2 * rank, 2), keep=False).reshape_like(x)]


@rule("DepthToSpace")
def depth_to_space(c: Context) -> Grads:
    """SpaceToDepth undoes the mode DCR; CRD has the two halves of its channel axis the other way round."""
    size = c.attr("blocksize")
    back = c.b.op("SpaceToDepth", c.g, blocksize=size, shape=(None,) * 4)
    if str(c.attr("mode", "DCR")) == "CRD":
        n, channels = (c.y[0].size(i) for i in range(2))
        back = back.reshape([n, size * size, channels, -1]).transpose([0, 2, 1, 3])
    return [back.reshape_like(c.x[0])]


@rule("SpaceToDepth")
def space_to_depth(c: Context) -> Grads:
    """By DepthToSpace."""
    return [c.b.op("DepthToSpace", c.g, blocksize=c.attr("blocksize"), mode=str(c.attr("mode", "DCR")))]


@rule("Trilu")
def trilu(c: Context) -> Grads:
    """The same triangle."""
    k = c.x[1] if c.has(1) else None
    return [c.b.op("Trilu", c.g, k, upper=c.attr("upper", 1)), None]


@rule("ReverseSequence")
def reverse_sequence(c: Context) -> Grads:
    """Reversed once more."""
    batch, time = c.attr("batch_axis", 1), c.attr("time_axis", 0)
    return [c.b.op("ReverseSequence", c.g, c.x[1], batch_axis=batch, time_axis=time), None]


@rule("Compress")
def compress(c: Context) -> Grads:
    """Back to where it came from, among zeros."""
    return [scatter_back(c)]
