"""Casts that never change a value silently."""

from __future__ import annotations

from typing import Any

import ml_dtypes  # registers bfloat16, float8 and 2/4-bit types with numpy
import numpy as np

from onnxcompress.errors import DataError


def safe_cast(array: np.ndarray, dtype: np.dtype | None, name: str) -> np.ndarray:
    """`array` in element type `dtype` (None: as it is), refusing what would change values beyond rounding.

    Allowed: bool to numbers, integers to floats, floats to floats, integers to integers that hold them, integral
    floats to integers, 0/1 to bool, bytes and text to strings (`object`).

    Raises:
        DataError: naming the input `name`, the types and the first reason.
    """
    source = array.dtype
    if dtype is None or source == dtype:
        return array
    if dtype.kind == "O":
        return _to_text(array, name)
    if source.kind == "V" and not is_float(source) and not is_integer(source) and source.itemsize == dtype.itemsize:
        return array.view(dtype)  # numpy writes bfloat16 and float8 as raw void elements of the same width
    numeric = source.kind == "b" or is_integer(source) or is_float(source)
    if not numeric or dtype.kind == "c" or source.kind == "c":
        if dtype.kind == "c" and (numeric or source.kind == "c"):
            return array.astype(dtype)
        raise DataError(f"input {name!r}: cannot turn {source} into {dtype}")
    if is_float(dtype):
        return _to_float(array, dtype, name)
    return _to_integer(array, dtype, name)


def is_float(dtype: np.dtype) -> bool:
    """True for numpy's floats and the short floats of ml_dtypes."""
    return dtype.kind == "f" or _has(ml_dtypes.finfo, dtype)


def is_integer(dtype: np.dtype) -> bool:
    """True for numpy's integers and the 2- and 4-bit integers of ml_dtypes."""
    return dtype.kind in "iu" or _has(ml_dtypes.iinfo, dtype)


def _has(info: type, dtype: np.dtype) -> bool:
    if dtype.kind not in "Vf":
        return False
    try:
        info(dtype)
    except (TypeError, ValueError, KeyError):
        return False
    return True


def _to_float(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = array.astype(dtype)
    if is_float(array.dtype) and dtype.itemsize < array.dtype.itemsize:
        lost = ~np.isfinite(cast) & np.isfinite(array)
        if lost.any():
            raise DataError(f"input {name!r}: {array[lost][0]!r} does not fit {dtype}; scale the data (--preprocess)")
    return cast


def _to_integer(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    if not array.size:
        return array.astype(dtype)
    if is_float(array.dtype):
        wrong = array != np.rint(array.astype(np.float64))  # NaN compares unequal; infinities fail the range below
        if wrong.any():
            raise DataError(
                f"input {name!r}: wanted {dtype}, got {array.dtype} with values that are not whole "
                f"({array[wrong][0]}); feed integers, or say cast: in --preprocess"
            )
    least, most = _bounds(dtype)
    if is_float(array.dtype):
        wide = array.astype(np.float64)
        low, high = float(wide.min()), float(wide.max())
    else:  # in Python's own integers: the largest of 64 bits are none that a float holds
        low, high = int(array.min()), int(array.max())
    if low < least or high > most:
        raise DataError(
            f"input {name!r}: values {low} to {high} ({array.dtype}) do not fit {dtype} ({least} to {most})"
        )
    return array.astype(dtype)


def _bounds(dtype: np.dtype) -> tuple[int, int]:
    if dtype.kind == "b":
        return 0, 1
    info: Any = ml_dtypes.iinfo
    return int(info(dtype).min), int(info(dtype).max)


def _to_text(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype.kind == "S":
        return np.char.decode(array, "utf-8").astype(object)
    if array.dtype.kind == "U":
        return array.astype(object)
    raise DataError(f"input {name!r}: wanted strings, got {array.dtype}")
