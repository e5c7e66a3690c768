"""What a session returns, as plain arrays: maps and sequences flattened, rows that only fill a batch cut off."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcompress.data.batch import Batch, Data
from onnxcompress.data.cast import is_float, is_integer
from onnxcompress.runtime.session import Session

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Flat:
    """One output as arrays. `keys`: what the columns of a sequence of maps stand for, sorted; None for tensors."""

    arrays: tuple[Array, ...]
    keys: tuple[Any, ...] | None = None


def flatten(value: Any) -> Flat:
    """An output of onnxruntime: array, list of arrays, list of dicts (scikit-learn's ZipMap), dict, or None."""
    if value is None:
        return Flat(())
    if isinstance(value, Mapping):
        value = [value]
    if isinstance(value, list):
        if value and all(isinstance(item, Mapping) for item in value):
            return _columns(value)
        return Flat(tuple(np.asarray(item) for item in value))
    return Flat((np.asarray(value),))


def _columns(maps: list[Mapping[Any, Any]]) -> Flat:
    keys = tuple(sorted({key for item in maps for key in item}))
    first = next((item[key] for item in maps for key in item), 0.0)
    if isinstance(first, str):
        return Flat((np.array([[item.get(key, "") for key in keys] for item in maps], object),), keys)
    kind = np.int64 if isinstance(first, int | np.integer) else np.float32
    missing = 0 if kind is np.int64 else np.nan
    return Flat((np.array([[item.get(key, missing) for key in keys] for item in maps], kind),), keys)


def kind_of(array: Array) -> str:
    """`float`, `integer`, `bool` or `string`."""
    if array.dtype.kind == "b":
        return "bool"
    if array.dtype.kind in "OSU":
        return "string"
    if is_integer(array.dtype):
        return "integer"
    return "float" if is_float(array.dtype) else array.dtype.name


class RealRows:
    """Cuts outputs to the rows of real samples, where the last batch was filled up to the model's fixed batch.

    Feed it every batch of one pass, in order: a short batch is a filled one only when full ones came before it (or it
    is all there is), for whole calls of models with state may have any first axis.
    """

    def __init__(self, data: Data) -> None:
        sizes = {spec.shape[0] for spec in data.specs if spec.shape and isinstance(spec.shape[0], int)}
        self._fixed = sizes.pop() if len(sizes) == 1 else None
        self._total = data.len_hint()
        self._full = False

    def cut(self, outputs: Mapping[str, Any], batch: Batch) -> dict[str, Any]:
        """`outputs` less the rows after the real samples."""
        rows = self.filled(batch)
        return (
            dict(outputs) if rows is None else {name: _cut(value, rows, batch.count) for name, value in outputs.items()}
        )

    def filled(self, batch: Batch) -> int | None:
        """The number of rows of a filled batch, None when all rows are real."""
        self._full |= batch.count == self._fixed
        if self._fixed is None or batch.count >= self._fixed:
            return None
        alone = self._total == batch.count > 1
        return self._fixed if self._full or alone else None


def _cut(value: Any, rows: int, count: int) -> Any:
    if isinstance(value, np.ndarray):
        return value[:count] if value.ndim and len(value) == rows else value
    if isinstance(value, list) and len(value) == rows and all(isinstance(item, Mapping) for item in value):
        return value[:count]
    return value


class Positions:
    """Which positions of an output are real: outputs that share the symbol of a padded input's second axis."""

    def __init__(self, session: Session) -> None:
        inputs = {port.name: _second(port.shape) for port in session.inputs}
        self._inputs = {
            port.name: [name for name, symbol in inputs.items() if symbol == _second(port.shape) is not None]
            for port in session.outputs
        }

    def of(self, output: str, batch: Batch) -> Array | None:
        """Booleans (samples, length), False on padding; None when nothing of this output is padding."""
        if batch.valid is None:
            return None
        for name in self._inputs.get(output, []):
            if name in batch.valid:
                return batch.valid[name][: batch.count]
        return None


def _second(shape: tuple[int | str | None, ...]) -> str | None:
    return shape[1] if len(shape) > 1 and isinstance(shape[1], str) else None


def is_distribution(rows: Array) -> bool:
    """True when every row (n, classes) is nonnegative and sums to one, to within the precision of float16."""
    values = rows.astype(np.float64)
    return bool(values.size and (values >= 0).all() and (np.abs(values.sum(axis=-1) - 1) < 5e-3).all())


def log_probabilities(rows: Array, distribution: bool) -> Floats:
    """Natural logarithms of the class probabilities along the last axis, of probabilities or of logits."""
    values = rows.astype(np.float64)
    if distribution:
        return np.asarray(np.log(np.maximum(values, 1e-12)), np.float64)
    values -= values.max(axis=-1, keepdims=True)
    return np.asarray(values - np.log(np.exp(values).sum(axis=-1, keepdims=True)), np.float64)
