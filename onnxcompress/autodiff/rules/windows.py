"""The geometry that convolutions and poolings share: kernel, strides, dilations, padding, and moving between the two
sides of a window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from onnxcompress.autodiff.rule import Context
from onnxcompress.autodiff.tensor import Size, Tensor


class Window:
    """A window sliding over the spatial axes of `image` [N, C, ...], giving `result` [N, M, ...].

    `kernel`, `strides`, `dilations`: numbers per spatial axis; `before`, `after`: padding, which for auto_pad SAME may
    be known at run time only. `spans`: how far a dilated kernel reaches.
    """

    def __init__(self, c: Context, image: Tensor, result: Tensor, kernel: Sequence[int]) -> None:
        self.b, self.image, self.result = c.b, image, result
        self.kernel = list(kernel)
        self.rank = len(self.kernel)
        self.strides = list(c.attr("strides") or [1] * self.rank)
        self.dilations = list(c.attr("dilations") or [1] * self.rank)
        self.spans = [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True)]
        self.before: list[Size] = [0] * self.rank
        self.after: list[Size] = [0] * self.rank
        auto = str(c.attr("auto_pad", "NOTSET") or "NOTSET")
        if auto.startswith("SAME"):
            for i in range(self.rank):
                low, high = self._same(i)
                upper = auto == "SAME_UPPER"
                self.before[i], self.after[i] = (low, high) if upper else (high, low)
        elif auto == "NOTSET" and c.attr("pads"):
            pads = list(c.attr("pads"))
            self.before, self.after = pads[: self.rank], pads[self.rank :]

    def _same(self, i: int) -> tuple[Size, Size]:
        """Half of the padding that gives ceil(size / stride) windows, rounded down and up."""
        size, windows = self.image.size(i + 2), self.result.size(i + 2)
        if isinstance(size, int) and isinstance(windows, int):
            return halves((windows - 1) * self.strides[i] + self.spans[i] - size)
        if self.strides[i] == 1:
            return (self.spans[i] - 1) // 2, self.spans[i] - 1 - (self.spans[i] - 1) // 2
        b = self.b
        reach = (b.ints([windows]) - 1) * self.strides[i] + self.spans[i] - b.ints([size])
        return halves(reach)

    @property
    def attributes(self) -> dict[str, Any]:
        """Kernel, strides and dilations as a convolution takes them."""
        return {"strides": self.strides, "dilations": self.dilations, "kernel_shape": self.kernel}

    @property
    def spatial(self) -> list[int]:
        """The spatial axes."""
        return list(range(2, 2 + self.rank))

    @property
    def padded(self) -> bool:
        """True when there is any padding."""
        return any(not isinstance(p, int) or p for p in (*self.before, *self.after))

    @property
    def pads(self) -> list[int] | None:
        """The padding as an attribute; None where it is known at run time only."""
        pads = [*self.before, *self.after]
        return [p for p in pads if isinstance(p, int)] if all(isinstance(p, int) for p in pads) else None

    def pad(self, t: Tensor) -> Tensor:
        """`t`, spatially like the image, with the padding around it."""
        if not self.padded:
            return t
        pads = self.b.ints([0, 0, *self.before, 0, 0, *self.after])
        front = t.shape[:2] if t.shape is not None else (None, None)
        return self.b.op("Pad", t, pads, shape=(*front, *[None] * self.rank))

    def tap(self, t: Tensor, place: Sequence[int]) -> Tensor:
        """What the kernel element at `place` sees of the padded `t`: one value for every window."""
        starts = [p * d for p, d in zip(place, self.dilations, strict=True)]
        if not any(starts) and all(s == 1 for s in self.strides) and all(k == 1 for k in self.kernel):
            return t
        ends: list[Size] = []
        for axis, start, stride in zip(self.spatial, starts, self.strides, strict=True):
            windows = self.result.size(axis)
            if isinstance(windows, int):
                ends.append(start + (windows - 1) * stride + 1)
            else:
                ends.append((windows - 1) * stride + (start + 1))
        return t.slice(self.spatial, list(starts), ends, self.strides)

    def places(self) -> list[tuple[int, ...]]:
        """Every kernel element."""
        return [tuple(int(i) for i in place) for place in np.ndindex(*self.kernel)]

    def spread(self, g: Tensor, weight: Tensor, group: int = 1) -> Tensor:
        """Every result's value back over its window, weighted: the transpose of the convolution by `weight`.

        The size of the image is exact. Where strides leave a rest at the end, it gets zeros.
        """
        b, sizes = self.b, [self.image.size(axis) for axis in self.spatial]
        common: dict[str, Any] = {**self.attributes, "group": group}
        shape = (None,) * (2 + self.rank)
        rests = self._rests()
        if rests is not None and self.pads is not None:
            extra = rests if any(rests) else None
            return b.op("ConvTranspose", g, weight, shape=shape, pads=self.pads, output_padding=extra, **common)
        whole = b.op("ConvTranspose", g, weight, shape=shape, **common)
        room = [0] * (self.rank + 4) + [stride - 1 for stride in self.strides]
        whole = b.op("Pad", whole, b.ints(room), shape=shape) if any(room) else whole
        ends = [before + size for before, size in zip(self.before, sizes, strict=True)]
        return whole.slice(self.spatial, self.before, ends)

    def _rests(self) -> list[int] | None:
        """How many elements at the end of each axis no window sees; None where that is known at run time only."""
        found = []
        for i, axis in enumerate(self.spatial):
            size, windows = self.image.size(axis), self.result.size(axis)
            before, after = self.before[i], self.after[i]
            if self.strides[i] == 1:
                found.append(0)
            elif (
                isinstance(size, int)
                and isinstance(windows, int)
                and isinstance(before, int)
                and isinstance(after, int)
            ):
                found.append(size + before + after - (windows - 1) * self.strides[i] - self.spans[i])
            else:
                return None
        return found if all(rest >= 0 for rest in found) else None

    def ones(self, value: float, like: Tensor) -> Tensor:
        """A kernel [1, 1, ...] filled with `value`."""
        return self.b.constant(np.full([1, 1, *self.kernel], value), like.dtype)

    def channelwise(self, t: Tensor) -> Tensor:
        """[N, C, ...] as [N * C, 1, ...]: each channel an image of its own."""
        return t.reshape([-1, 1, *(t.size(axis) for axis in self.spatial)])

    @property
    def volume(self) -> int:
        """How many elements the kernel has."""
        return math.prod(self.kernel)


def halves(total: Size) -> tuple[Size, Size]:
    """Half of a padding, not less than nothing, rounded down and up."""
    if isinstance(total, int):
        return max(total, 0) // 2, max(total, 0) - max(total, 0) // 2
    most = total.b.op("Max", total, total.b.ints([0]))
    return most / 2, most - most / 2


def kernel_of(c: Context, weight: int | None = None) -> list[int]:
    """The kernel's sizes, from the attribute or from the weight's shape."""
    given = c.attr("kernel_shape")
    if given:
        return list(given)
    shape = c.x[weight].shape if weight is not None else None
    if shape is None or not all(isinstance(size, int) for size in shape[2:]):
        raise c.refuse("the size of its kernel is unknown")
    return [size for size in shape[2:] if isinstance(size, int)]
