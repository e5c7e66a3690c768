"""`Data` over arrays with random access to their rows: .npz files, folders, memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np

from onnxcompress.data.batch import Batch, ContentHash, Data
from onnxcompress.data.batching import Piece, default_batch
from onnxcompress.data.layout import Layout, layout_of
from onnxcompress.data.plan import Plan
from onnxcompress.data.tables import Reader, Table
from onnxcompress.errors import DataError

_HASH_BYTES = 1 << 20


class TableData(Data):
    """Batches out of tables that follow one another.

    Raises:
        DataError: a table does not fit the inputs.
    """

    def __init__(self, tables: Sequence[Table], plan: Plan) -> None:
        self._plan = plan
        self.specs = plan.specs
        self._layouts = [layout_of(table, plan) for table in tables]
        self.ignored = sorted({name for layout in self._layouts for name in layout.keys.ignored})
        self.has_labels = all(layout.keys.labels is not None for layout in self._layouts)
        if not self.has_labels and any(layout.keys.labels for layout in self._layouts):
            bare = next(layout.table.where for layout in self._layouts if layout.keys.labels is None)
            raise DataError(f"{bare}: holds no labels, but other files beside it do")
        if len({layout.calls for layout in self._layouts}) > 1:
            raise DataError(f"{self._layouts[0].table.where}: some files beside it hold samples, others whole calls")
        self._total = sum(layout.units for layout in self._layouts)
        if plan.options.limit is not None:
            self._total = min(self._total, plan.options.limit)
        self._size = self._batch_size()
        where = self._layouts[0].table.where
        if not self._total:
            raise DataError(f"{where}: holds no samples")
        if not self._layouts[0].calls and plan.fixed and self._total < plan.fixed and plan.options.last == "drop":
            raise DataError(f"{where}: holds {self._total} samples, but the model's batch is fixed at {plan.fixed}")

    def len_hint(self) -> int:
        """The number of samples (whole calls: of calls)."""
        return self._total

    def __iter__(self) -> Iterator[Batch]:
        left, start = self._total, 0
        batcher = self._plan.batcher(self._size)
        where = self._layouts[0].table.where
        for layout in self._layouts:
            where = layout.table.where
            for piece in self._pieces(layout, min(left, layout.units), start):
                if piece.whole:
                    yield self._plan.finish(piece, None, where)
                    continue
                for whole in batcher.push(piece):
                    yield self._plan.finish(whole, batcher, where)
            start += layout.units
            left = max(0, left - layout.units)
        for rest in batcher.flush():
            yield self._plan.finish(rest, batcher, where)

    def digest(self) -> str:
        """The sha256 (hex) of the content, as it is stored, and of the preprocessing."""
        found = ContentHash()
        if self._plan.options.preprocess is not None:
            found.text("preprocess", self._plan.options.preprocess.canonical())
        left = self._total
        for layout in self._layouts:
            units = min(left, layout.units)
            left -= units
            with contextlib.closing(layout.table.reader()) as reader:
                self._hash(layout, reader, units, found)
        return found.hexdigest()

    def _hash(self, layout: Layout, reader: Reader, units: int, found: ContentHash) -> None:
        names = [
            (f"input {name}", key, layout.step.get(name, 1))
            for name, key in layout.keys.inputs.items()
            if name not in layout.values
        ]
        if layout.keys.labels is not None:
            names.append(("labels", layout.keys.labels, 1))
        for name, value in layout.values.items():
            (found.rows if value.ndim else found.value)(f"input {name}", value)
        for name, key, step in names:
            header = layout.table.header(key)
            row = max(1, int(np.prod(header.shape[1:], dtype=np.int64)) * header.dtype.itemsize)
            block = max(1, _HASH_BYTES // row)
            for at in range(0, units * step, block):
                found.rows(name, reader.rows(key, at, min(at + block, units * step)))

    def _batch_size(self) -> int:
        plan = self._plan
        if plan.fixed is not None:
            return plan.fixed
        if any(layout.varying for layout in self._layouts):
            return 1  # one value a call: then a call is one sample
        if plan.options.batch is not None:
            return plan.options.batch
        largest = 1
        for layout in self._layouts:
            for name in layout.step:
                header, dtype = layout.table.header(layout.keys.inputs[name]), plan.spec(name).dtype
                width = (dtype or header.dtype).itemsize
                largest = max(largest, int(np.prod(header.shape[1:], dtype=np.int64)) * width)
        return default_batch(largest, self._total)

    def _pieces(self, layout: Layout, units: int, start: int) -> Iterator[Piece]:
        with contextlib.closing(layout.table.reader()) as reader:
            if layout.calls:
                for at in range(units):
                    yield self._call(layout, reader, at, start)
            else:
                for at in range(0, units, self._size):
                    yield self._rows(layout, reader, at, min(at + self._size, units), start)

    def _rows(self, layout: Layout, reader: Reader, at: int, stop: int, start: int) -> Piece:
        feeds = {}
        for name, step in layout.step.items():
            feeds[name] = self._plan.prepare(name, reader.rows(layout.keys.inputs[name], at * step, stop * step))
        for name, value in layout.values.items():
            feeds[name] = self._plan.prepare(name, np.asarray(value[at // self._size] if value.ndim else value))
        labels = None if layout.keys.labels is None else reader.rows(layout.keys.labels, at, stop)
        return Piece(feeds, labels, stop - at, start + at, frozenset(layout.values))

    def _call(self, layout: Layout, reader: Reader, at: int, start: int) -> Piece:
        feeds = {}
        for name, key in layout.keys.inputs.items():
            if name in layout.values:
                value = layout.values[name]
                array = np.asarray(value[at] if value.ndim else value)
            elif name in layout.step:
                array = reader.rows(key, at * layout.step[name], (at + 1) * layout.step[name])
            else:
                array = reader.rows(key, at, at + 1)[0]
            feeds[name] = self._plan.prepare(name, array)
        labels = None if layout.keys.labels is None else reader.rows(layout.keys.labels, at, at + 1)
        return Piece(feeds, labels, 1, start + at, frozenset(layout.values), whole=True)
