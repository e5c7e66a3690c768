"""Data that comes as dicts, one at a time: callables, generators, onnxruntime's CalibrationDataReader, any iterable."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import pathlib
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from onnxcompress.errors import DataError

Record = dict[str, "np.ndarray | list[np.ndarray]"]
"""One dict as the user gave it, as arrays; a list holds rows of different shapes."""

_SPOOL_BYTES = 64 << 20  # kept in memory before a stream that cannot be rewound goes to a temporary file


class Records:
    """A re-iterable of records over anything that yields dicts. What can be read once only is kept aside on the way.

    Raises (while iterating):
        DataError: the user's code raised, or yields something else than dicts of arrays.
    """

    def __init__(self, source: Any, where: str) -> None:
        self._where = where
        if isinstance(source, type) or (callable(source) and not hasattr(source, "get_next")):
            self._start: Callable[[], Iterator[Any]] = lambda: _pass_over(source(), where)
        elif _only_once(source):
            kept = _Spool(_taking(_pass_over(source, where), where))
            self._start = lambda: iter(kept)
        else:
            self._start = lambda: _pass_over(source, where)

    def __iter__(self) -> Iterator[Record]:
        yield from _taking(self._begin(), self._where)

    def _begin(self) -> Iterator[Any]:
        try:
            return iter(self._start())
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"{self._where}: {describe(error)}") from error


def _only_once(source: Any) -> bool:
    if hasattr(source, "get_next"):
        return not callable(getattr(source, "rewind", None))
    return isinstance(source, Iterator)


def _pass_over(source: Any, where: str) -> Iterator[Any]:
    if hasattr(source, "get_next"):
        if callable(getattr(source, "rewind", None)):
            source.rewind()
        return _read(source)
    if isinstance(source, Mapping):
        return iter([source])
    if not isinstance(source, Iterable):
        raise DataError(f"{where}: wanted dicts of arrays, got {type(source).__name__}")
    return iter(source)


def _read(reader: Any) -> Iterator[Any]:
    while item := reader.get_next():  # None or an empty dict ends the data, as in onnxruntime's own calibrator
        yield item


def _taking(items: Iterator[Any], where: str) -> Iterator[Record]:
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"{where}: {describe(error)}") from error
        if not isinstance(item, Mapping):
            raise DataError(f"{where}: wanted dicts (input name -> array), got {type(item).__name__}")
        yield {str(name): _array(value, str(name), where) for name, value in item.items()}


def _array(value: Any, name: str, where: str) -> np.ndarray | list[np.ndarray]:
    ragged = (
        isinstance(value, np.ndarray)
        and value.dtype == object
        and not all(isinstance(x, (str, bytes)) for x in value.flat)
    )
    if not ragged:
        try:
            array = np.asarray(value)
        except ValueError:
            ragged = True
        except Exception as error:
            raise DataError(f"{where}: {name!r}: cannot be read as an array: {describe(error)}") from error
        else:
            if array.dtype != object or isinstance(value, np.ndarray):
                return np.array([str(x) for x in array.flat]).reshape(array.shape) if array.dtype == object else array
    if not isinstance(value, (np.ndarray, Sequence)) or (isinstance(value, np.ndarray) and value.ndim != 1):
        raise DataError(f"{where}: {name!r}: wanted an array or a list of arrays, got {type(value).__name__}")
    try:
        rows = [np.asarray(item) for item in value]
    except ValueError:
        rows = []
    if not rows or any(row.dtype == object for row in rows):
        raise DataError(f"{where}: {name!r}: wanted an array or a list of arrays of numbers, got nested objects")
    return rows


class _Spool:
    """Keeps the records of a stream that can be read once, and gives them again; read only as far as asked for."""

    def __init__(self, items: Iterator[Record]) -> None:
        self._items = items
        self._file = tempfile.SpooledTemporaryFile(max_size=_SPOOL_BYTES)  # noqa: SIM115 - lives as long as the data
        self._offsets: list[int] = []

    def __iter__(self) -> Iterator[Record]:
        at = 0
        while True:
            if at < len(self._offsets):
                record = self._load(self._offsets[at])
            else:
                try:
                    record = next(self._items)
                except StopIteration:
                    return
                self._store(record)
            at += 1
            yield record

    def _store(self, record: Record) -> None:
        self._offsets.append(self._file.seek(0, io.SEEK_END))
        layout = {name: len(value) if isinstance(value, list) else -1 for name, value in record.items()}
        self._file.write(json.dumps(layout).encode() + b"\n")
        for value in record.values():
            for array in value if isinstance(value, list) else [value]:
                np.lib.format.write_array(self._file, array, allow_pickle=False)

    def _load(self, offset: int) -> Record:
        self._file.seek(offset)
        layout: dict[str, int] = json.loads(self._file.readline())
        return {
            name: self._one() if count < 0 else [self._one() for _ in range(count)] for name, count in layout.items()
        }

    def _one(self) -> np.ndarray:
        return np.lib.format.read_array(self._file, allow_pickle=False)


def describe(error: BaseException) -> str:
    """What the user's code raised and where, in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    line = f" (line {frames[-1].lineno} of {pathlib.Path(frames[-1].filename).name})" if frames else ""
    return f"raised {type(error).__name__}: {' '.join(str(error).split())}{line}"


def split_reference(text: str) -> tuple[pathlib.Path, str] | None:
    """The parts of `file.py:function`, None when `text` is something else."""
    file, colon, function = text.rpartition(":")
    if not colon or not file.endswith(".py") or not function.isidentifier():
        return None
    return pathlib.Path(file), function


def load_function(path: pathlib.Path, name: str) -> Callable[..., Any]:
    """Import `path` by itself and return its function `name`. The file's own folder can be imported from meanwhile.

    Raises:
        DataError: no such file or function, or the file raised.
    """
    where = f"{path}:{name}"
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    module_name = "_onnxcompress_data_" + hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise DataError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and typing look their module up by name
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        sys.modules.pop(module_name, None)
        raise DataError(f"{where}: {describe(error)}") from error
    finally:
        if folder in sys.path:
            sys.path.remove(folder)
    function = getattr(module, name, None)
    if not callable(function):
        raise DataError(f"{path}: has no function {name!r}")
    return function  # type: ignore[no-any-return]
