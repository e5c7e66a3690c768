"""The blocked layout: how images move in and out of it, and how a weight is stored for its kernels.

An image [N, C, H, W] is kept as [N, C/B, H, W, B], B channels side by side, C rounded up to a multiple of B; ONNX
Runtime's CPU kernels of the domain com.microsoft.nchwc take it under the shape [N, C rounded up, H, W]. B depends on
the processor: 16 with AVX-512, 8 with AVX2 (MlasNchwcGetBlockSize).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcompress.autodiff.builder import Builder
from onnxcompress.autodiff.tensor import Tensor
from onnxcompress.errors import OnnxCompressError
from onnxcompress.runtime.session import open_session

DOMAIN = "com.microsoft.nchwc"
_LARGEST = 64
_WHOLE = 4  # ReorderInput takes channels in multiples of this


@functools.cache
def block_size() -> int:
    """B of this machine's kernels, read off how they lay out a small image; 0 where there are none."""
    image = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, _LARGEST, 1, 2]))
    graph = ir.Graph([image], [], nodes=[], opset_imports={"": 17, DOMAIN: 1}, name="probe")
    b = Builder(graph, 17)
    result = node(b, "ReorderInput", b.wrap(image), shape=(1, _LARGEST, 1, 2))
    graph.outputs.append(result.value)
    try:
        with open_session(ir.Model(graph, ir_version=8)) as session:
            x = np.arange(2 * _LARGEST, dtype=np.float32).reshape(1, _LARGEST, 1, 2)
            (y,) = session.run({"x": x}).values()
    except OnnxCompressError:
        return 0
    # The second column of the first channel follows the first column of a whole block.
    found = int(np.argmax(y.reshape(-1) == x[0, 0, 0, 1]))
    whole = y.reshape(-1)[: 2 * found]
    fits = found and np.array_equal(whole, x[0, :found, 0].T.reshape(-1))
    return found if fits and found in (4, 8, 16, 32) else 0


def node(b: Builder, op_type: str, *inputs: Tensor | None, shape: Sequence[int], **attributes: Any) -> Tensor:
    """A node of the blocked domain."""
    result = b.op(op_type, *inputs, dtype=ir.DataType.FLOAT, shape=tuple(shape), **attributes)
    made = result.value.producer()
    assert made is not None
    made.domain = DOMAIN
    return result


class Layout:
    """Moves values of one graph into and out of blocks of `size` channels."""

    def __init__(self, b: Builder, size: int) -> None:
        self.b, self.size = b, size

    def padded(self, channels: int) -> int:
        """`channels`, rounded up to whole blocks."""
        return -(-channels // self.size) * self.size

    def enter(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> blocked, the channels that were added zero."""
        n, c, h, w = sizes(x)
        if c % _WHOLE:
            x = self.channels(x, 1)
        return node(self.b, "ReorderInput", x, shape=(n, self.padded(c), h, w))

    def leave(self, x: Tensor, channels: int) -> Tensor:
        """Blocked -> [N, channels, H, W]."""
        n, _, h, w = sizes(x)
        return node(self.b, "ReorderOutput", x, shape=(n, channels, h, w), channels=channels)

    def channels_last(self, x: Tensor, channels: int) -> Tensor:
        """Blocked -> [N, H, W, channels]."""
        n, _, h, w = sizes(x)
        return node(self.b, "ReorderOutput", x, shape=(n, h, w, channels), channels=channels, channels_last=1)

    def open(self, x: Tensor) -> Tensor:
        """Blocked -> the same bytes as [N, C/B, H, W, B]."""
        n, c, h, w = sizes(x)
        return x.reshape([n, c // self.size, h, w, self.size])

    def close(self, x: Tensor) -> Tensor:
        """[N, C/B, H, W, B] -> the same bytes under the shape the kernels want."""
        n, c, h, w, size = sizes(x)
        return x.reshape([n, c * size, h, w])

    def channels(self, x: Tensor, axis: int) -> Tensor:
        """`x` with zeros after it along `axis`, up to whole blocks."""
        shape = sizes(x)
        room = self.padded(shape[axis]) - shape[axis]
        if not room:
            return x
        pads = [0] * (2 * len(shape))
        pads[len(shape) + axis] = room
        grown = tuple(size + room if i == axis else size for i, size in enumerate(shape))
        return self.b.op("Pad", x, self.b.ints(pads), shape=grown)

    def weight(self, w: Tensor, *, transposed: bool) -> Tensor:
        """W [M, C, h, w] for kernels over blocked images (OIHWBiBo).

        `transposed`: of the convolution from M to C channels that runs backwards, with every kernel turned around.
        """
        w = self.channels(self.channels(turned(w) if transposed else w, 0), 1)
        m, c, h, k = sizes(w)
        size = self.size
        # In two moves, each of which ONNX Runtime copies in runs; one move of all axes goes element by element.
        if transposed and h * k == 1:
            return w.reshape([m, c // size, size]).transpose([1, 0, 2]).reshape([c, m, h, k])
        if transposed:
            last = w.reshape([m, c, h * k]).transpose([0, 2, 1]).reshape([m // size, size, h * k, c // size, size])
            return last.transpose([3, 0, 2, 1, 4]).reshape([c, m, h, k])
        last = w.reshape([m // size, size, c * h * k]).transpose([0, 2, 1])
        if h * k == 1:
            return last.reshape([m, c, h, k])
        return last.reshape([m // size, c // size, size, h * k, size]).transpose([0, 1, 3, 2, 4]).reshape([m, c, h, k])

    def weight_by_outputs(self, w: Tensor, *, transposed: bool = False) -> Tensor:
        """W [M, C, h, w] blocked by outputs alone (OIHWBo): for plain images with few channels, and depthwise."""
        w = self.channels(turned(w) if transposed else w, 0)
        m, c, h, k = sizes(w)
        blocks = w.reshape([m // self.size, self.size, c * h * k])
        return blocks.transpose([0, 2, 1]).reshape([m, c, h, k])


def turned(w: Tensor) -> Tensor:
    """Kernels turned around: the last element first, along both axes."""
    axes = [axis for axis in (2, 3) if sizes(w)[axis] > 1]
    if not axes:
        return w
    count = len(axes)
    found = w.slice(axes, [-1] * count, [-(1 << 31)] * count, [-1] * count)
    found.value.shape = ir.Shape(sizes(w))
    return found


def sizes(x: Tensor) -> list[int]:
    """The shape of a tensor all of whose sizes are known."""
    assert x.shape is not None
    return [size for size in x.shape if isinstance(size, int)]
