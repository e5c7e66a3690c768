"""Passing over a large array in pieces, so that the extra memory does not grow with the array."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

CHUNK = 1 << 20


def slices(size: int, chunk: int = CHUNK) -> Iterator[slice]:
    """Consecutive slices of at most `chunk` elements that together cover `size`."""
    for start in range(0, size, chunk):
        yield slice(start, min(start + chunk, size))


def flat(array: Array) -> Array:
    """`array` as one dimension in C order: a view where the memory allows it, a copy otherwise."""
    return np.asarray(array).reshape(-1)


def as_float32(array: Array) -> F32:
    """`array` as contiguous float32 (float16 and bfloat16 exactly; float64 and integers rounded to nearest).

    A float64 beyond the range of float32 becomes infinite, silently: whoever refuses infinities refuses it.
    """
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(array, dtype=np.float32)
