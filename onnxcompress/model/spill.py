"""Large arrays move to files of the work folder and come back as memory maps, so that only one is ever held."""

from __future__ import annotations

import pathlib
import tempfile

import numpy as np

LEAST_BYTES = 1 << 20


def spill(array: np.ndarray, folder: pathlib.Path) -> np.ndarray:
    """`array` as a read-only memory map of a new file in `folder`; itself when it is small or is one already."""
    if array.nbytes < LEAST_BYTES or _is_mapped(array):
        return array
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".spill", delete=False) as file:
        np.ascontiguousarray(array).tofile(file)
    mapped = np.memmap(file.name, dtype=np.uint8, mode="r")
    return np.asarray(mapped).view(array.dtype).reshape(array.shape)


def _is_mapped(array: np.ndarray) -> bool:
    base: object = array
    while isinstance(base, np.ndarray):
        if isinstance(base, np.memmap):
            return True
        base = base.base
    return False
