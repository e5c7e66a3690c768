"""Named arrays with samples along their first axis, wherever they lie: an .npz, a folder of .npy, or memory."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import IO, Protocol

import numpy as np

from onnxcompress.data.npz import Cursor, NpzFile, open_npy
from onnxcompress.errors import DataError


@dataclasses.dataclass(frozen=True)
class Header:
    """Element type and full shape of a stored array."""

    dtype: np.dtype
    shape: tuple[int, ...]


class Reader(Protocol):
    """One pass over a table's arrays."""

    def rows(self, name: str, start: int, stop: int) -> np.ndarray: ...
    def whole(self, name: str) -> np.ndarray: ...
    def close(self) -> None: ...


class Table(Protocol):
    """Named arrays. `where`: how messages call it."""

    where: str

    @property
    def names(self) -> list[str]: ...
    def header(self, name: str) -> Header: ...
    def reader(self) -> Reader: ...


class ArrayTable:
    """Arrays in memory."""

    where = "data"

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._arrays = dict(arrays)

    @property
    def names(self) -> list[str]:
        return list(self._arrays)

    def header(self, name: str) -> Header:
        return Header(self._arrays[name].dtype, self._arrays[name].shape)

    def reader(self) -> Reader:
        return self

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return self._arrays[name][start:stop]

    def whole(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def close(self) -> None:
        """Nothing to give back."""


class NpzTable:
    """The arrays of an .npz file; a header is read when it is asked for, so arrays nobody wants may be anything."""

    def __init__(self, path: pathlib.Path) -> None:
        self.where, self._path = str(path), path
        self._headers: dict[str, Header] = {}
        with NpzFile(path) as file:
            self._names = file.names

    @property
    def names(self) -> list[str]:
        return list(self._names)

    def header(self, name: str) -> Header:
        if name not in self._headers:
            with NpzFile(self._path) as file:
                member = file.member(name)
            self._headers[name] = Header(member.dtype, member.shape)
        return self._headers[name]

    def reader(self) -> Reader:
        return _NpzReader(self._path)


class _NpzReader(NpzFile):
    def whole(self, name: str) -> np.ndarray:
        cursor = self.cursor(name)
        try:
            return cursor.whole()
        finally:
            cursor.close()


class NpyTable:
    """.npy files, each one array named as its file."""

    def __init__(self, where: str, files: Mapping[str, pathlib.Path]) -> None:
        self.where, self._files = where, dict(files)

    @property
    def names(self) -> list[str]:
        return list(self._files)

    def header(self, name: str) -> Header:
        member, stream = open_npy(self._files[name], name)
        stream.close()
        return Header(member.dtype, member.shape)

    def reader(self) -> Reader:
        return _NpyReader(self._files)


class _NpyReader:
    def __init__(self, files: Mapping[str, pathlib.Path]) -> None:
        self._files = files
        self._cursors: dict[str, Cursor] = {}

    def _cursor(self, name: str) -> Cursor:
        if name not in self._cursors:
            stream: IO[bytes]
            member, stream = open_npy(self._files[name], name)
            self._cursors[name] = Cursor(member, stream)
        return self._cursors[name]

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return self._cursor(name).rows(start, stop)

    def whole(self, name: str) -> np.ndarray:
        return self._cursor(name).whole()

    def close(self) -> None:
        for cursor in self._cursors.values():
            cursor.close()


def folder_tables(folder: pathlib.Path) -> list[Table]:
    """A folder of .npy files is one table; a folder of .npz files one table a file, in the order of their names.

    Raises:
        DataError: neither, or both.
    """
    npy = sorted(folder.glob("*.npy"))
    npz = sorted(folder.glob("*.npz"))
    if npy and npz:
        raise DataError(
            f"{folder}: holds both .npy and .npz files; keep one kind, so that it is clear which are the samples"
        )
    if npy:
        return [NpyTable(str(folder), {path.stem: path for path in npy})]
    if not npz:
        raise DataError(f"{folder}: holds neither .npy files named as the inputs nor .npz files")
    return [NpzTable(path) for path in npz]
