"""What a decoder with a cache takes beside its tokens, and no text has: the past, whether there is one, positions.

Where the data lacks them, a call starts a text: its past is empty, and its positions count from 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from onnxcompress.data.cast import is_float, is_integer
from onnxcompress.data.sizes import Sizes, axis_key
from onnxcompress.data.specs import InputSpec
from onnxcompress.errors import DataError


class Start:
    """The inputs of `specs` that are known when a text starts.

    `past`: names of those that hold earlier positions along a free axis; without any, there is nothing to be known.
    `flags`: of those that say whether there is a past, once for the whole call. `names`: all of them.
    """

    def __init__(self, specs: Sequence[InputSpec]) -> None:
        self._sizes = Sizes(specs)
        self.past = frozenset(spec.name for spec in specs if self._is_past(spec))
        self.flags = frozenset(spec.name for spec in specs if self.past and _is_flag(spec))
        self.names = self.past | self.flags | {spec.name for spec in specs if self.past and _is_positions(spec)}
        self._specs = [spec for spec in specs if spec.name in self.names]
        self._masks = [spec.name for spec in specs if "mask" in spec.name.lower() and spec.rank == 2]
        self._tokens = [s.name for s in specs if s.rank and s.rank >= 2 and s.name not in {*self.names, *self._masks}]

    def absent(self, given: Sequence[str], where: str) -> frozenset[str]:
        """Which of them data with the inputs `given` leaves to be filled in.

        Raises:
            DataError: it has some of the past, and not all.
        """
        missing = self.names - set(given)
        part = self.past & missing
        if part and part != self.past:
            raise DataError(f"{where}: holds a part of the past, but nothing for input {min(part)!r}")
        return frozenset(missing)

    def completed(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One call's feeds, with those of `names` that are missing."""
        missing = [spec for spec in self._specs if spec.name not in feeds]
        if not missing:
            return dict(feeds)
        (tokens, *_) = [name for name in self._tokens if name in feeds]
        rows, steps = feeds[tokens].shape[:2]
        return {**feeds, **{spec.name: self._value(spec, feeds, rows, steps) for spec in missing}}

    def _value(self, spec: InputSpec, feeds: Mapping[str, np.ndarray], rows: int, steps: int) -> np.ndarray:
        dtype = np.dtype(np.float32) if spec.dtype is None else spec.dtype
        if not _is_positions(spec):
            return np.zeros(self._sizes.shape(spec, rows, 0), dtype)
        mask = next((feeds[name] for name in self._masks if feeds.get(name, np.empty(0)).shape == (rows, steps)), None)
        counted = np.ones((rows, steps), np.int64) if mask is None else (mask != 0).astype(np.int64)
        positions: np.ndarray = np.maximum(counted.cumsum(axis=1) - 1, 0).astype(dtype)
        return positions

    def _is_past(self, spec: InputSpec) -> bool:
        if "past" not in spec.name.lower() or (spec.dtype is not None and not is_float(spec.dtype)):
            return False
        keys = [axis_key(spec, axis) for axis in range(spec.rank or 0)]
        free = [key for key in keys if key is not None]
        return any(key in self._sizes.past for key in free) and set(free) <= self._sizes.past | self._sizes.batch


def _is_flag(spec: InputSpec) -> bool:
    return spec.dtype is not None and spec.dtype.kind == "b" and "cache" in spec.name.lower()


def _is_positions(spec: InputSpec) -> bool:
    whole = spec.dtype is not None and is_integer(spec.dtype)
    return whole and spec.rank == 2 and "position" in spec.name.lower()
