"""Large arrays move to files of the work folder and come back as memory maps, so that only one is ever held."""

from __future__ import annotations

import pathlib
import tempfile

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


def _is_mapped(array: np.ndarray) -> bool:
    base: object = array
    while isinstance(base, np.ndarray):
        if isinstance(base, np.memmap):
            return True
        base = base.base
    return False
