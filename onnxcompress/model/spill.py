"""Large arrays move to files of the work folder and come back as memory maps, so that only one is ever held."""

from __future__ import annotations

import math
import pathlib
import tempfile
from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcompress.model import bridge

LEAST_BYTES = 1 << 20


def spill(array: np.ndarray, folder: pathlib.Path) -> np.ndarray:
    """`array` as a read-only memory map of a new file in `folder`; itself when it is small or is one already."""
    if array.nbytes < LEAST_BYTES or _is_mapped(array):
        return array
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".spill", delete=False) as file:
        np.ascontiguousarray(array).tofile(file)
    mapped = np.memmap(file.name, dtype=np.uint8, mode="r")
    return np.asarray(mapped).view(array.dtype).reshape(array.shape)


def collect(
    shape: tuple[int, ...], dtype: np.dtype[Any], pieces: Iterable[np.ndarray], folder: pathlib.Path
) -> np.ndarray:
    """An array put together from its consecutive `pieces`; like `spill`, in a file of `folder` when it is large."""
    if math.prod(shape) * dtype.itemsize < LEAST_BYTES:
        return np.concatenate([piece.reshape(-1) for piece in pieces]).astype(dtype, copy=False).reshape(shape)
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".spill", delete=False) as file:
        for piece in pieces:
            np.ascontiguousarray(piece, dtype).tofile(file)
    mapped = np.memmap(file.name, dtype=np.uint8, mode="r")
    return np.asarray(mapped).view(dtype).reshape(shape)


def detach(model: ir.Model) -> None:
    """Read every spilled tensor of `model` into memory, so that the work folder may go."""
    for slot in bridge.slots(model):
        held = slot.tensor.raw if isinstance(slot.tensor, ir.Tensor) else None
        if isinstance(held, np.ndarray) and _is_mapped(held):
            fresh = ir.Tensor(
                np.array(held), dtype=slot.tensor.dtype, shape=ir.Shape(held.shape), name=slot.tensor.name
            )
            fresh.metadata_props.update(slot.tensor.metadata_props)
            slot.put(fresh)


def file_of(array: np.ndarray) -> tuple[pathlib.Path, int] | None:
    """Where the bytes of `array` lie, in C order and without gaps: (file, offset); None when they do not."""
    mapped = _map_of(array)
    if mapped is None or mapped.filename is None or mapped.mode != "r" or not array.flags.c_contiguous:
        return None
    offset = mapped.offset + array.__array_interface__["data"][0] - mapped.__array_interface__["data"][0]
    return pathlib.Path(mapped.filename), offset


def _is_mapped(array: np.ndarray) -> bool:
    return _map_of(array) is not None


def _map_of(array: np.ndarray) -> np.memmap | None:
    """The memory map of the file among those that `array` is a view of, one of another."""
    found: np.memmap | None = None
    base: object = array
    while isinstance(base, np.ndarray):
        if isinstance(base, np.memmap):
            found = base
        base = base.base
    return found
