"""Stream the arrays of .npy and .npz files row by row.

numpy's own loader reads a whole member of an .npz at once; here memory is bounded by the rows asked for. Pickled
(object) arrays are never read.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import zipfile
import zlib
from collections.abc import Mapping
from types import TracebackType
from typing import IO

import numpy as np

from onnxcompress.errors import DataError

_CHUNK = 1 << 20  # bytes a read
_MAX_DEFLATE_RATIO = 1100  # deflate cannot expand more than 1032 times: a header that claims more lies
_BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError, RuntimeError, KeyError)


@dataclasses.dataclass(frozen=True)
class NpzMember:
    """The header of one stored array: element type, full shape (first axis = rows) and where its data starts."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    where: str

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        size = self.dtype.itemsize
        for dim in self.shape[1:]:
            size *= dim
        return size


class Cursor:
    """Rows of one stored array, read from a stream; reading onwards never goes back to the start."""

    def __init__(self, member: NpzMember, stream: IO[bytes]) -> None:
        self._member, self._stream, self._at = member, stream, -1

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of the first axis, C order, writable.

        Raises:
            DataError: the file ends early, or its checksum does not hold.
        """
        member = self._member
        stop = max(start, min(stop, member.shape[0]))
        found = np.empty((stop - start, *member.shape[1:]), member.dtype)
        self._read(found, member.offset + start * member.row_bytes)
        return found

    def whole(self) -> np.ndarray:
        """The whole array; the way to read one without axes."""
        found = np.empty(self._member.shape, self._member.dtype)
        self._read(found, self._member.offset)
        return found

    def _read(self, found: np.ndarray, offset: int) -> None:
        if not found.size:
            return
        view = found.reshape(-1).view(np.uint8)
        try:
            if offset != self._at:
                self._stream.seek(offset)
            done = 0
            while done < len(view):
                piece = self._stream.read(min(_CHUNK, len(view) - done))
                if not piece:
                    raise EOFError("the file ends early")
                view[done : done + len(piece)] = np.frombuffer(piece, np.uint8)
                done += len(piece)
        except _BROKEN as error:
            raise DataError(f"{self._member.where}: cannot be read: {_reason(error)}") from error
        self._at = offset + len(view)

    def close(self) -> None:
        """Give the stream back."""
        self._stream.close()


class NpzFile:
    """An open .npz file: the headers of its arrays, and their rows on demand. A context manager.

    Raises:
        DataError: not an .npz, broken, truncated, or holding arrays that cannot be streamed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = pathlib.Path(path)
        self._cursors: dict[str, Cursor] = {}
        self._headers: dict[str, NpzMember] = {}
        try:
            self._zip = zipfile.ZipFile(self.path)
        except FileNotFoundError:
            raise DataError(f"{self.path}: no such file") from None
        except _BROKEN as error:
            raise DataError(f"{self.path}: not a readable .npz file: {_reason(error)}") from error
        self._members = {info.filename.removesuffix(".npy"): info for info in self._zip.infolist() if not info.is_dir()}

    @property
    def names(self) -> list[str]:
        """The names of the arrays, in the file's order."""
        return list(self._members)

    def member(self, name: str) -> NpzMember:
        """The header of array `name`."""
        if name not in self._headers:
            if name not in self._members:
                raise DataError(f"{self.path}: holds no array {name!r}, only {', '.join(self._members) or 'nothing'}")
            info, where = self._members[name], f"{self.path}: array {name!r}"
            with self._stream(name) as stream:
                self._headers[name] = read_header(stream, name, where, self._size(info, where))
        return self._headers[name]

    def cursor(self, name: str) -> Cursor:
        """A reader of array `name`, independent of every other."""
        return Cursor(self.member(name), self._stream(name))

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of array `name`; cheap when each call goes on where the last one ended."""
        if name not in self._cursors:
            self._cursors[name] = self.cursor(name)
        return self._cursors[name].rows(start, stop)

    def close(self) -> None:
        """Close the file and every reader of it."""
        for cursor in self._cursors.values():
            cursor.close()
        self._zip.close()

    def __enter__(self) -> NpzFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _stream(self, name: str) -> IO[bytes]:
        try:
            return self._zip.open(self._members[name])
        except _BROKEN as error:
            raise DataError(f"{self.path}: array {name!r} cannot be read: {_reason(error)}") from error

    def _size(self, info: zipfile.ZipInfo, where: str) -> int:
        """The member's uncompressed size, once it is plausible: nothing is allocated on a lie."""
        stored = info.compress_type == zipfile.ZIP_STORED
        most = info.compress_size if stored else info.compress_size * _MAX_DEFLATE_RATIO + _CHUNK
        if info.file_size > most or info.compress_size > self.path.stat().st_size:
            raise DataError(f"{where}: the zip directory claims {info.file_size} bytes, more than the file can hold")
        return info.file_size


def read_header(stream: IO[bytes], name: str, where: str, size: int) -> NpzMember:
    """Read the .npy header at the start of `stream`, whose whole length is `size` bytes.

    Raises:
        DataError: not a .npy array, object or structured elements, Fortran order, or a shape that `size` does not hold.
    """
    try:
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        elif version == (2, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(stream)
        else:
            raise ValueError(f"format version {version[0]}.{version[1]}")
        offset = stream.tell()
    except (
        Exception
    ) as error:  # numpy parses the header with ast and tokenize, which raise whatever broken text makes them
        raise DataError(f"{where}: not a .npy array that can be streamed: {_reason(error)}") from error
    if dtype.hasobject:
        raise DataError(
            f"{where}: holds Python objects, which are never unpickled; save rows of one length, padded with "
            "their mask, or pass a callable (file.py:function)"
        )
    if dtype.fields is not None:
        raise DataError(f"{where}: has structured elements ({dtype}); save one plain array a name")
    if fortran:
        raise DataError(
            f"{where}: is stored in Fortran order, so its rows cannot be streamed; save np.ascontiguousarray"
        )
    member = NpzMember(name, dtype, tuple(int(dim) for dim in shape), offset, where)
    count = 1
    for dim in member.shape:
        count *= dim
    if offset + count * dtype.itemsize != size:
        raise DataError(f"{where}: shape {member.shape} of {dtype} does not fit its {size} bytes: broken or truncated")
    return member


def open_npy(path: str | os.PathLike[str], name: str | None = None) -> tuple[NpzMember, IO[bytes]]:
    """The header of a .npy file and the stream it was read from."""
    path = pathlib.Path(path)
    try:
        stream = path.open("rb")
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {_reason(error)}") from error
    try:
        return read_header(stream, name or path.stem, str(path), size), stream
    except DataError:
        stream.close()
        raise


def headers(path: str | os.PathLike[str]) -> Mapping[str, NpzMember]:
    """The header of every array in an .npz file."""
    with NpzFile(path) as file:
        return {name: file.member(name) for name in file.names}


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())
