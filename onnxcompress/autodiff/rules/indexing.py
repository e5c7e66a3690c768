"""Gather and Scatter: each is the other's gradient."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxcompress.autodiff.rule import Context, Grads, rule
from onnxcompress.autodiff.tensor import Size, Tensor


@rule("Gather")
def gather(c: Context) -> Grads:
    """Rows add up where they came from (the gradient of an embedding); one fixed slice is put back among zeros."""
    x, indices, g, b = c.x[0], c.x[1], c.g, c.b
    rank, axis = c.rank(), c.axis()
    fixed = c.constant(1)
    if fixed is not None and fixed.ndim == 0:
        return [_put_back(c, axis, int(fixed)), None]
    if axis == 0:
        return [add_rows(x, indices, g), None]
    # The gathered axis goes first, is scattered to, and goes back.
    depth = c.rank(1)
    front = [*range(axis, axis + depth), *range(axis), *range(axis + depth, rank - 1 + depth)]
    turned = b.op("Transpose", g, perm=front)
    order = [axis, *(i for i in range(rank) if i != axis)]
    sizes: list[Size] = [x.size(i) for i in order]
    zeros = b.zeros(b.ints(sizes), g.dtype)
    spread = b.op("ScatterND", zeros, indices_last(indices), turned, reduction="add", shape=(None,) * rank)
    return [spread.transpose([int(i) for i in np.argsort(order)]), None]


def _put_back(c: Context, axis: int, index: int) -> Tensor:
    """One slice at `index` along `axis`, zeros around it."""
    rank, x, b = c.rank(), c.x[0], c.b
    size = x.size(axis)
    before: list[Size] = [0] * rank
    after: list[Size] = [0] * rank
    before[axis] = index if index >= 0 else size + index
    after[axis] = size - 1 - index if index >= 0 else -index - 1
    return b.op("Pad", c.g.unsqueeze(axis), b.ints([*before, *after]), shape=x.shape)


def indices_last(indices: Tensor) -> Tensor:
    """int64 indices with an axis of size 1 at the end, as ScatterND wants them."""
    return indices.b.op("Unsqueeze", indices.cast(ir.DataType.INT64), indices.b.ints([-1]))


def add_rows(x: Tensor, indices: Tensor, g: Tensor) -> Tensor:
    """Zeros shaped like `x`, with the rows of `g` added at `indices`."""
    return x.b.op("ScatterND", x.b.zeros(x.sizes(), g.dtype), indices_last(indices), g, reduction="add")


@rule("GatherElements")
def gather_elements(c: Context) -> Grads:
    """Every element adds up where it came from."""
    return [_scatter(c, c.x[1], c.g, c.axis()), None]


def _scatter(c: Context, indices: Tensor, updates: Tensor, axis: int) -> Tensor:
    zeros = c.b.zeros(c.x[0].sizes(), updates.dtype)
    return c.b.op("ScatterElements", zeros, indices, updates, axis=axis, reduction="add")


@rule("TopK")
def top_k(c: Context) -> Grads:
    """The values go back to their indices."""
    return [_scatter(c, c.output(1, ir.DataType.INT64), c.g, c.axis(-1)), None]


@rule("GatherND")
def gather_nd(c: Context) -> Grads:
    """Every slice adds up where it came from; with batch axes, the place in the batch completes the indices."""
    x, batch = c.x[0], int(c.attr("batch_dims", 0))
    indices = c.x[1] if not batch else _with_batch(c, batch)
    zeros = c.b.zeros(x.sizes(), c.g.dtype)
    return [c.b.op("ScatterND", zeros, indices, c.g, reduction="add"), None]


def _with_batch(c: Context, batch: int) -> Tensor:
    b, indices, depth = c.b, c.x[1], c.rank(1)
    sizes = b.ints([*(indices.size(i) for i in range(depth - 1)), 1])
    columns = []
    for axis in range(batch):
        size = b.ints([indices.size(axis)]).reshape([])
        line = b.op("Range", b.constant(np.int64(0)), size, b.constant(np.int64(1)), shape=(None,))
        line = line.reshape([-1 if i == axis else 1 for i in range(depth)])
        columns.append(b.op("Expand", line, sizes))
    return b.op("Concat", *columns, indices, axis=-1)


@rule("ScatterElements", refuses="reductions mul, max and min")
def scatter_elements(c: Context) -> Grads:
    """Overwritten elements lose their gradient to the updates; added ones share it."""
    axis, mode, g = c.axis(), str(c.attr("reduction", "none")), c.g
    if mode not in ("none", "add"):
        raise c.refuse(f"reduction {mode!r} has no rule")
    updates = c.b.op("GatherElements", g, c.x[1], axis=axis)
    if mode == "add":
        return [g, None, updates]
    zeros = c.b.zeros(c.x[2].sizes(), g.dtype)
    return [c.b.op("ScatterElements", g, c.x[1], zeros, axis=axis), None, updates]


@rule("ScatterND", refuses="reductions mul, max and min")
def scatter_nd(c: Context) -> Grads:
    """As ScatterElements."""
    mode, g = str(c.attr("reduction", "none")), c.g
    if mode not in ("none", "add"):
        raise c.refuse(f"reduction {mode!r} has no rule")
    updates = c.b.op("GatherND", g, c.x[1])
    if mode == "add":
        return [g, None, updates]
    zeros = c.b.zeros(c.x[2].sizes(), g.dtype)
    return [c.b.op("ScatterND", g, c.x[1], zeros), None, updates]


@rule("TensorScatter")
def tensor_scatter(c: Context) -> Grads:
    """What was overwritten loses its gradient to the update."""
    g, update, axis, rank, b = c.g, c.x[1], c.axis(-2), c.rank(), c.b
    zero, one = b.constant(np.int64(0)), b.constant(np.int64(1))
    steps = b.op("Range", zero, b.ints([update.size(axis)]).reshape([]), one, shape=(None,))
    places = steps.reshape([-1 if i == axis else 1 for i in range(rank)])
    if c.has(2):
        places = places + c.x[2].cast(ir.DataType.INT64).reshape([-1 if i == 0 else 1 for i in range(rank)])
    if str(c.attr("mode", "linear")) == "circular":
        places = b.op("Mod", places, b.ints([c.x[0].size(axis)]), shape=(None,) * rank)
    places = b.op("Expand", places, update.sizes(), shape=update.shape)
    zeros = b.zeros(update.sizes(), g.dtype)
    past = b.op("ScatterElements", g, places, zeros, axis=axis)
    return [past, b.op("GatherElements", g, places, axis=axis), None]
