"""What the data layer hands out: batches of feeds, and the data that yields them."""

from __future__ import annotations

import abc
import dataclasses
import hashlib
from collections.abc import Iterator

import numpy as np

from onnxcompress.data.specs import InputSpec


@dataclasses.dataclass(frozen=True)
class Batch:
    """One call of the model.

    `feeds`: graph input -> array. `labels`: one row a real sample, None without labels. `valid`: for each input along
    whose second axis sequences were padded, booleans (rows, length), False on padding; None when nothing is padded.
    `count`: how many samples are real; rows after them repeat the last one to fill a fixed batch. `start`: index of
    the first sample.
    """

    feeds: dict[str, np.ndarray]
    labels: np.ndarray | None
    valid: dict[str, np.ndarray] | None
    count: int
    start: int


class Data(abc.ABC):
    """Calibration or evaluation data: every iteration starts again and yields the same batches.

    `ignored`: arrays of the source that are no input of the model.
    """

    specs: list[InputSpec]
    ignored: list[str]
    has_labels: bool

    @abc.abstractmethod
    def __iter__(self) -> Iterator[Batch]:
        """One pass over the data, from the start."""

    @abc.abstractmethod
    def digest(self) -> str:
        """The sha256 (hex) of the content: names, types, shapes and values, wherever and however they are stored."""

    @abc.abstractmethod
    def len_hint(self) -> int | None:
        """The number of samples, None when only a pass over the data would tell."""

    def feeds(self) -> FeedsOnly:
        """The same data as plain feeds, one dict a call."""
        return FeedsOnly(self)


class FeedsOnly:
    """Adapts `Data` to `onnxcompress.contract.Feeder`: iterating yields one call's feeds, padding mask and labels
    left out."""

    def __init__(self, data: Data) -> None:
        self.data = data

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for batch in self.data:
            yield batch.feeds

    def digest(self) -> str:
        """The digest of the data behind."""
        return self.data.digest()


class ContentHash:
    """A running sha256 of named rows: the same for the same rows however they are cut into pieces or stored."""

    def __init__(self) -> None:
        self._streams: dict[str, hashlib._Hash] = {}
        self._headers: dict[str, str] = {}

    def rows(self, name: str, array: np.ndarray) -> None:
        """Add the rows (first axis) of `array` under `name`."""
        self._add(name, array, array.shape[1:])

    def value(self, name: str, array: np.ndarray) -> None:
        """Add `array` as one item under `name`."""
        self._add(name, array[None], array.shape)

    def text(self, name: str, text: str) -> None:
        """Add a setting that decides what the rows mean."""
        self._stream(name).update(text.encode())

    def hexdigest(self) -> str:
        """The digest over all names, independent of their order."""
        total = hashlib.sha256()
        for name in sorted(self._streams):
            total.update(f"{name}\0{self._streams[name].hexdigest()}\n".encode())
        return total.hexdigest()

    def _stream(self, name: str) -> hashlib._Hash:
        return self._streams.setdefault(name, hashlib.sha256())

    def _add(self, name: str, rows: np.ndarray, shape: tuple[int, ...]) -> None:
        stream = self._stream(name)
        text = rows.dtype.kind in "OSU"
        kind = "text" if text else rows.dtype.newbyteorder("<").str if rows.dtype.kind in "biufc" else str(rows.dtype)
        header = f"{kind}{shape}\0"
        if self._headers.get(name) != header:
            self._headers[name] = header
            stream.update(header.encode())
        if text:
            for item in rows.reshape(-1).tolist():
                raw = item if isinstance(item, bytes) else str(item).encode()
                stream.update(len(raw).to_bytes(8, "little") + raw)
        else:
            if rows.dtype.byteorder == ">":
                rows = rows.astype(rows.dtype.newbyteorder("<"))
            stream.update(np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data)
