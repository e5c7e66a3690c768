"""Arrays of a training kept in one flat buffer on the device: the step sees tensors in it, the optimizer long runs.

An optimizer is a dozen elementwise nodes, each a pass through memory. Over a run of elements that fits the cache, cut
without regard to where one tensor ends, they take half the time that they take tensor by tensor (ONNX Runtime 1.32).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from onnxcompress.runtime.session import onnxruntime

ALIGNED = 16  # elements: a tensor begins on a cache line


@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """A tensor within a buffer, to bind: no copy."""

    buffer: Buffer
    start: int
    shape: tuple[int, ...]

    def bind_input(self, binding: Any, name: str) -> None:
        """Let an io-binding read it as input `name`."""
        binding.bind_input(name, *self._place())

    def bind_output(self, binding: Any, name: str) -> None:
        """Let an io-binding write output `name` to it."""
        binding.bind_output(name, *self._place())

    def _place(self) -> tuple[str, int, Any, list[int], int]:
        buffer = self.buffer
        address = buffer.address + self.start * buffer.dtype.itemsize
        return buffer.device, 0, buffer.dtype.type, list(self.shape), address


class Buffer:
    """`size` elements of one type on `device`, zero at first."""

    def __init__(self, size: int, dtype: np.dtype[Any], device: str) -> None:
        self.dtype, self.device = np.dtype(dtype), device
        room = np.zeros(max(size, 1) + ALIGNED, dtype)
        skipped = -room.ctypes.data % (ALIGNED * self.dtype.itemsize) // self.dtype.itemsize
        self._array = room[skipped : skipped + max(size, 1)]
        # On the CPU a value shares the array's memory; elsewhere the array is let go.
        self._value = onnxruntime().OrtValue.ortvalue_from_numpy(self._array, device, 0)
        if device != "cpu":
            self._array = self._array[:0]
        self.address = int(self._value.data_ptr())

    def read(self) -> np.ndarray:
        """What it holds; on the CPU not a copy."""
        return self._array if self.device == "cpu" else np.asarray(self._value.numpy())

    def write(self, array: np.ndarray) -> None:
        """Fill it, whole."""
        self._value.update_inplace(np.ascontiguousarray(array, self.dtype))

    def view(self, start: int, *shape: int) -> View:
        """The tensor of `shape` whose first element is at `start`."""
        return View(self, start, shape)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where each array lies in a buffer. `size`: elements in all, with the gaps that alignment leaves."""

    starts: dict[str, int]
    shapes: dict[str, tuple[int, ...]]
    size: int

    @staticmethod
    def of(shapes: Mapping[str, tuple[int, ...]]) -> Layout:
        """One after another, in the order they are given."""
        starts, at = {}, 0
        for name, shape in shapes.items():
            starts[name] = at
            at += -(-math.prod(shape) // ALIGNED) * ALIGNED
        return Layout(starts, dict(shapes), at)

    def views(self, buffer: Buffer) -> dict[str, View]:
        """Every array as a tensor of `buffer`."""
        return {name: buffer.view(at, *self.shapes[name]) for name, at in self.starts.items()}

    def split(self, flat: np.ndarray) -> dict[str, np.ndarray]:
        """Every array, out of what a buffer holds, as copies."""
        return {
            name: flat[at : at + math.prod(self.shapes[name])].reshape(self.shapes[name]).copy()
            for name, at in self.starts.items()
        }

    def joined(self, arrays: Mapping[str, np.ndarray], flat: np.ndarray) -> np.ndarray:
        """What `flat` holds with `arrays` written into it."""
        flat = flat.copy()
        for name, array in arrays.items():
            flat[self.starts[name] : self.starts[name] + array.size] = np.reshape(array, -1)
        return flat
