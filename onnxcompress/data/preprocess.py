"""Turn stored samples into what the model wants: `transpose`, then `(x * scale - mean) / std`, then `cast`.

A YAML or JSON file holds these keys for every input, or per input under `inputs` (which then replaces the general
ones):

    transpose: [2, 0, 1]          # of the axes of one sample (H, W, C -> C, H, W), or of the whole array [0, 3, 1, 2]
    scale: 1/255
    mean: [0.485, 0.456, 0.406]   # a number, or one a channel
    std: [0.229, 0.224, 0.225]
    axis: 1                       # the channel axis of the whole, transposed array; found by its length when left out
    inputs:
      token_ids: {cast: int64}    # float to integer drops the fraction here, because it was asked for
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import yaml

from onnxcompress.data.cast import is_float, safe_cast
from onnxcompress.errors import DataError

_KEYS = ("scale", "mean", "std", "transpose", "axis", "cast")
_MAX_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Step:
    """What is done to one input. Empty or None means: not done."""

    scale: tuple[float, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    transpose: tuple[int, ...] = ()
    axis: int | None = None
    cast: str | None = None

    def permutation(self, rank: int, name: str) -> tuple[int, ...] | None:
        """The permutation of all axes of an array of `rank` axes whose first is the samples'.

        Raises:
            DataError: it fits neither the sample's axes nor the whole array's, or would move the samples.
        """
        given = self.transpose
        if not given:
            return None
        if len(given) == rank - 1:
            return (0, *(axis + 1 for axis in given))
        if len(given) != rank or given[0] != 0:
            raise DataError(
                f"preprocess: transpose {list(given)} of input {name!r}: wanted {rank - 1} axes "
                f"of one sample, or {rank} with 0 first"
            )
        return given

    def apply(self, array: np.ndarray, name: str) -> np.ndarray:
        """Treat `array` (samples along the first axis)."""
        order = self.permutation(array.ndim, name)
        if order is not None:
            array = array.transpose(order)
        if self.scale or self.mean or self.std:
            if array.dtype.kind not in "biuf" and not is_float(array.dtype):
                raise DataError(f"preprocess: input {name!r} holds {array.dtype}, not numbers")
            array = array.astype(np.float64 if array.dtype == np.float64 else np.float32)
            if self.scale:
                array *= self._channels(self.scale, "scale", array, name)
            if self.mean:
                array -= self._channels(self.mean, "mean", array, name)
            if self.std:
                array /= self._channels(self.std, "std", array, name)
        if self.cast is not None:
            if is_float(array.dtype) and np.dtype(self.cast).kind in "iu":
                array = np.trunc(array)
            array = safe_cast(array, np.dtype(self.cast), name)
        return np.ascontiguousarray(array)

    def shape(self, shape: tuple[int, ...], name: str) -> tuple[int, ...]:
        """The shape that `apply` makes of `shape`."""
        order = self.permutation(len(shape), name)
        return shape if order is None else tuple(shape[axis] for axis in order)

    def _channels(self, values: tuple[float, ...], key: str, array: np.ndarray, name: str) -> np.ndarray:
        constants = np.asarray(values, array.dtype)
        if len(values) == 1:
            return constants.reshape(())
        if self.axis is not None:
            fits = [self.axis % array.ndim] if -array.ndim <= self.axis < array.ndim else []
            fits = [axis for axis in fits if array.shape[axis] == len(values)]
        else:
            fits = [
                axis for axis in {1: 0, array.ndim - 1: 0} if axis < array.ndim and array.shape[axis] == len(values)
            ]
        if len(fits) != 1:
            problem = "more than one axis fits, say axis:" if fits else "no channel axis has that length"
            raise DataError(
                f"preprocess: {key} of input {name!r} has {len(values)} values, shape {array.shape}: {problem}"
            )
        return constants.reshape([-1 if axis == fits[0] else 1 for axis in range(array.ndim)])


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """The treatment of every input: `inputs[name]` where given, else `general`."""

    general: Step = Step()
    inputs: Mapping[str, Step] = dataclasses.field(default_factory=dict)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Preprocess:
        """Read a YAML or JSON file.

        Raises:
            DataError: unreadable, unknown keys, values out of bounds.
        """
        path = pathlib.Path(path)
        try:
            if path.stat().st_size > _MAX_BYTES:
                raise DataError(f"{path}: larger than {_MAX_BYTES} bytes: not a preprocess file")
            text = path.read_text(encoding="utf-8")
            content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        except (OSError, UnicodeDecodeError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise DataError(f"{path}: not a readable preprocess file: {' '.join(str(error).split())}") from error
        return cls.parse({} if content is None else content, str(path))

    @classmethod
    def parse(cls, content: Any, where: str = "preprocess") -> Preprocess:
        """Check and take over the content of a preprocess file."""
        if not isinstance(content, Mapping):
            raise DataError(f"{where}: wanted keys {', '.join(_KEYS)}, inputs; got {type(content).__name__}")
        general = {key: value for key, value in content.items() if key != "inputs"}
        inputs = content.get("inputs") or {}
        if not isinstance(inputs, Mapping):
            raise DataError(f"{where}: inputs: wanted one entry an input, got {type(inputs).__name__}")
        return cls(
            _step(general, where, ("inputs",)),
            {str(name): _step(step, f"{where}: inputs: {name}") for name, step in inputs.items()},
        )

    def step(self, name: str) -> Step:
        """What is done to input `name`."""
        return self.inputs.get(name, self.general)

    def check(self, names: Sequence[str]) -> None:
        """Refuse entries for inputs the model does not have."""
        for name in self.inputs:
            if name not in names:
                raise DataError(f"preprocess: the model has no input {name!r}{suggestion(name, names)}")

    def canonical(self) -> str:
        """A text that is equal for equal treatments; part of the data's digest."""
        steps = {name: dataclasses.asdict(step) for name, step in self.inputs.items()}
        return json.dumps([dataclasses.asdict(self.general), steps], sort_keys=True)


def suggestion(name: str, names: Sequence[str]) -> str:
    """` (did you mean 'x'?)`, or all names there are."""
    close = difflib.get_close_matches(str(name), list(names), 1)
    return f" (did you mean {close[0]!r}?)" if close else f", only {', '.join(map(repr, names)) or 'none'}"


def _step(content: Any, where: str, also: Sequence[str] = ()) -> Step:
    if not isinstance(content, Mapping):
        raise DataError(f"{where}: wanted keys {', '.join(_KEYS)}; got {content!r}")
    for key in content:
        if key not in _KEYS:
            raise DataError(f"{where}: unknown key {key!r}{suggestion(key, (*_KEYS, *also))}")
    std = _numbers(content.get("std"), f"{where}: std")
    if 0.0 in std:
        raise DataError(f"{where}: std: must not be zero")
    order = content.get("transpose")
    if order is not None and (
        not isinstance(order, Sequence) or sorted(map(str, order)) != sorted(map(str, range(len(order))))
    ):
        raise DataError(f"{where}: transpose: wanted each axis from 0 once, like [2, 0, 1]; got {order!r}")
    axis = content.get("axis")
    if axis is not None and (not isinstance(axis, int) or isinstance(axis, bool)):
        raise DataError(f"{where}: axis: wanted a whole number, got {axis!r}")
    return Step(
        scale=_numbers(content.get("scale"), f"{where}: scale"),
        mean=_numbers(content.get("mean"), f"{where}: mean"),
        std=std,
        transpose=tuple(int(item) for item in order or ()),
        axis=axis,
        cast=_dtype(content.get("cast"), f"{where}: cast"),
    )


def _numbers(value: Any, where: str) -> tuple[float, ...]:
    if value is None:
        return ()
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    if not items:
        raise DataError(f"{where}: wanted a number or a list of numbers, got an empty list")
    return tuple(_number(item, where) for item in items)


def _number(value: Any, where: str) -> float:
    try:
        if isinstance(value, bool):
            raise ValueError
        if isinstance(value, str) and "/" in value:
            above, below = value.split("/")
            number = float(above) / float(below)
        else:
            number = float(value)
    except (TypeError, ValueError, ZeroDivisionError):
        raise DataError(f"{where}: wanted a number or a fraction like 1/255, got {value!r}") from None
    if not math.isfinite(number):
        raise DataError(f"{where}: wanted a finite number, got {value!r}")
    return number


def _dtype(value: Any, where: str) -> str | None:
    if value is None:
        return None
    try:
        dtype = np.dtype(value) if isinstance(value, str) else None
    except TypeError:
        dtype = None
    if dtype is None or dtype.kind not in "biuf":
        raise DataError(f"{where}: wanted an element type like float32, uint8 or int64, got {value!r}")
    return dtype.name
