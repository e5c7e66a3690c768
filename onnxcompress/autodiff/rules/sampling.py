"""Resize, in all its modes.

Resizing is linear and goes axis by axis, so along each axis it is a product with a matrix. Which matrix, for which
mode, coordinate transformation, rounding and antialiasing, the operator says itself: it resizes the identity. The
gradient is the product with the transposed matrices.
"""

from __future__ import annotations

import numpy as np

from onnxcompress.autodiff.rule import Context, Grads, rule
from onnxcompress.autodiff.tensor import Size, Tensor

_SAME = (
    "antialias",
    "coordinate_transformation_mode",
    "cubic_coeff_a",
    "exclude_outside",
    "mode",
    "nearest_mode",
)
SCALES, SIZES = 2, 3


@rule("Resize", refuses="tf_crop_and_resize; keep_aspect_ratio_policy other than stretch")
def resize(c: Context) -> Grads:
    """A product with a matrix along each axis; its transpose, which the operator gives by resizing the identity."""
    if str(c.attr("coordinate_transformation_mode", "half_pixel")) == "tf_crop_and_resize":
        raise c.refuse("tf_crop_and_resize has no rule")
    if str(c.attr("keep_aspect_ratio_policy", "stretch")) != "stretch":
        raise c.refuse("only keep_aspect_ratio_policy 'stretch' has a rule")
    g = c.g
    for axis, place in _resized(c):
        g = _along(g, _matrix(c, axis, place), axis, c.rank())
    return [g, None, None, None]


def _resized(c: Context) -> list[tuple[int, int]]:
    """The axes whose size changes, and where `scales` or `sizes` have theirs.

    Sizes known at run time only are taken to leave batch and channels alone.
    """
    rank, x, y = c.rank(), c.x[0], c.y[0]
    axes = [int(a) % rank for a in c.attr("axes") or range(rank)]
    scales = c.constant(SCALES)
    if scales is not None and scales.size:
        return [(axis, i) for i, axis in enumerate(axes) if scales[i] != 1]
    found = []
    for i, axis in enumerate(axes):
        before, after = x.shape and x.shape[axis], y.shape and y.shape[axis]
        known = isinstance(before, int) and isinstance(after, int)
        if (known and before != after) or (not known and axis > 1):
            found.append((axis, i))
    return found


def _matrix(c: Context, axis: int, place: int) -> Tensor:
    """[size before, size after]: the identity, resized along its last axis as the node resizes `axis`."""
    b, size = c.b, c.x[0].size(axis)
    if isinstance(size, int):
        eye = b.constant(np.eye(size)[None, None], c.g.dtype)
    else:
        eye = b.op("EyeLike", b.zeros(b.ints([size, size]), c.g.dtype)).shaped(None, None).unsqueeze(0, 1)
    attributes = {name: c.node.attributes[name] for name in _SAME if name in c.node.attributes}
    scales = c.constant(SCALES)
    if c.has(SCALES) and (scales is None or scales.size):
        one = c.x[SCALES].slice([0], [place], [place + 1])
        factors = b.op("Concat", b.constant(np.ones(3, np.float32)), one.cast(c.x[SCALES].dtype), axis=0)
        wide = b.op("Resize", eye, None, factors, **attributes)  # type: ignore[arg-type]
    else:
        sizes: list[Size] = [1, 1, size, c.y[0].size(axis)]
        wide = b.op("Resize", eye, None, None, b.ints(sizes), **attributes)  # type: ignore[arg-type]
    return b.op("Squeeze", wide, b.ints([0, 1]), shape=(None, None))


def _along(g: Tensor, matrix: Tensor, axis: int, rank: int) -> Tensor:
    """The product with `matrix` over `axis` of `g`."""
    free = (None,) * rank
    if axis == rank - 2:
        return g.b.op("MatMul", matrix, g, shape=free)
    order = [i for i in range(rank) if i != axis] + [axis]
    product = g.b.op("MatMul", g.transpose(order), matrix.swap(), shape=free)
    return product.transpose([int(i) for i in np.argsort(order)])
