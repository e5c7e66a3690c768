"""Along which axis of each input samples lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from onnxcompress.data.decoder import Start
from onnxcompress.data.sizes import Sizes, axis_key
from onnxcompress.data.specs import InputSpec


def batch_axes(specs: Sequence[InputSpec]) -> dict[str, int]:
    """Input name -> the axis of its samples. Inputs that hold one value for all samples of a call are left out.

    It is the axis that a symbol calls the batch, and else the first, unless that is fixed where other inputs are free:
    then it is the first that is free (the state of a recurrent layer, [layers, batch, hidden]).
    """
    sizes, flags = Sizes(specs), Start(specs).flags
    free = any(axis_key(spec, 0) in sizes.batch for spec in specs if spec.shape)
    return {spec.name: _axis(spec, sizes, free) for spec in specs if spec.shape != () and spec.name not in flags}


def batch_first(feeds: Mapping[str, np.ndarray], axes: Mapping[str, int]) -> dict[str, np.ndarray]:
    """One call's arrays with their samples along the first axis; those without `axes` stay as they are."""
    return {name: np.moveaxis(array, axes.get(name, 0), 0) if array.ndim else array for name, array in feeds.items()}


def as_wanted(rows: Mapping[str, np.ndarray], axes: Mapping[str, int]) -> dict[str, np.ndarray]:
    """The inverse of `batch_first`: arrays as the model takes them, in memory in that order."""
    moved = {name: axis for name, axis in axes.items() if axis and name in rows and rows[name].ndim}
    return {**rows, **{name: np.ascontiguousarray(np.moveaxis(rows[name], 0, axis)) for name, axis in moved.items()}}


def _axis(spec: InputSpec, sizes: Sizes, free: bool) -> int:
    keys = [axis_key(spec, axis) for axis in range(spec.rank or 0)]
    spoken = [axis for axis, key in enumerate(keys) if key in sizes.batch and _is_spoken(str(key))]
    likely = [axis for axis, key in enumerate(keys) if key in sizes.batch]
    if not likely and free and keys and keys[0] is None:
        likely = [axis for axis, key in enumerate(keys) if key is not None]
    return next(iter([*spoken, *likely]), 0)


def _is_spoken(key: str) -> bool:
    """True for a symbol of the model that is called a batch; a key with a bracket is none."""
    return "[" not in key and ("batch" in key.lower() or key.lower() in ("n", "b", "bs"))
