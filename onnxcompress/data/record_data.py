"""`Data` over dicts that come one at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from onnxcompress.data.batch import Batch, ContentHash, Data
from onnxcompress.data.batching import Batcher, Piece, default_batch
from onnxcompress.data.plan import Plan
from onnxcompress.data.records import Record, Records
from onnxcompress.errors import DataError


class RecordData(Data):
    """Batches out of dicts. A dict is a call (its arrays have the inputs' ranks), several calls (one axis more), or
    one sample (one axis less); samples are collected into batches, padded where the model has a mask, else with their
    equals only."""

    def __init__(self, records: Records, plan: Plan, where: str) -> None:
        self._records, self._plan, self._where = records, plan, where
        self.specs = plan.specs
        self.ignored: list[str] = []
        self.has_labels = False

    def len_hint(self) -> int | None:
        """None: only a pass over the dicts tells."""
        return None

    def __iter__(self) -> Iterator[Batch]:
        plan, empty = self._plan, True
        batcher: Batcher | None = None
        collect = plan.fixed is not None or plan.options.batch is not None
        for piece, sample in self._pieces(prepared=True):
            if piece.whole or not (sample or collect):
                if batcher is not None:
                    yield from self._finished(batcher.flush(), batcher)
                yield plan.finish(piece, None, self._where)
            else:
                if batcher is None:
                    largest = max((array.nbytes for array in piece.feeds.values()), default=1) // max(1, piece.units)
                    batcher = plan.batcher(plan.fixed or plan.options.batch or default_batch(largest, None))
                yield from self._finished(batcher.push(piece), batcher)
            empty = False
        if batcher is not None:
            yield from self._finished(batcher.flush(), batcher)
        if empty:
            raise DataError(f"{self._where}: holds no samples")

    def _finished(self, pieces: Iterator[Piece], batcher: Batcher) -> Iterator[Batch]:
        for piece in pieces:
            yield self._plan.finish(piece, batcher, self._where)

    def digest(self) -> str:
        """The sha256 (hex) of the content, as it is yielded, and of the preprocessing."""
        found = ContentHash()
        if self._plan.options.preprocess is not None:
            found.text("preprocess", self._plan.options.preprocess.canonical())
        for piece, _ in self._pieces(prepared=False):
            for name, array in piece.feeds.items():
                single = piece.whole or name in piece.constants
                (found.value if single else found.rows)(f"input {name}", array)
            if piece.labels is not None:
                found.rows("labels", piece.labels)
        return found.hexdigest()

    def _pieces(self, *, prepared: bool) -> Iterator[tuple[Piece, bool]]:
        """The pieces, up to the limit, and whether each is a single sample that came without a batch axis."""
        start, limit = 0, self._plan.options.limit
        for record in self._records:
            keys = self._plan.keys(list(record), self._where)
            self.ignored, self.has_labels = keys.ignored, keys.labels is not None
            wanted = {name: record[key] for name, key in keys.inputs.items()}
            labels = record[keys.labels] if keys.labels is not None else None
            for one, label in _rows_apart(wanted, labels, self._where):
                for piece, sample in self._cut(one, label, start, prepared=prepared):
                    units = piece.units if limit is None else min(piece.units, limit - start)
                    if units <= 0:
                        return
                    yield piece.cut(0, units, self._plan.multiplicity), sample
                    start += units

    def _cut(
        self, feeds: dict[str, np.ndarray], labels: np.ndarray | None, start: int, *, prepared: bool
    ) -> Iterator[tuple[Piece, bool]]:
        more = self._axes_more(feeds)
        scalars = {name: array for name, array in feeds.items() if self._plan.is_scalar(name, array.ndim)}
        arrays = {name: array for name, array in feeds.items() if name not in scalars}
        if more == 1:
            yield from ((piece, False) for piece in self._calls(arrays, scalars, labels, start, prepared=prepared))
            return
        if more == -1:
            arrays = {name: array[None] for name, array in arrays.items()}
            labels = None if labels is None else labels[None]
        values = {name: self._value(name, array) for name, array in scalars.items()}
        counts = {len(array) / self._plan.multiplicity.get(name, 1) for name, array in arrays.items() if array.ndim}
        # Rows disagree, or lie along other axes: a call with state, passed as it is.
        elsewhere = more == 0 and any(self._plan.axes.get(name) for name in arrays)
        whole = elsewhere or len(counts) != 1 or not next(iter(counts)).is_integer()
        units = 1 if whole else int(next(iter(counts)))
        if labels is not None and not labels.ndim:
            labels = labels[None]
        if whole and labels is not None:
            units = len(labels)
        if labels is not None and len(labels) != units:
            raise DataError(f"{self._where}: {len(labels)} labels for {units} samples in one dict")
        if units:
            ready = self._prepare({**arrays, **values}, prepared)
            yield Piece(ready, labels, units, start, frozenset(values), whole), more == -1

    def _calls(
        self,
        arrays: dict[str, np.ndarray],
        scalars: dict[str, np.ndarray],
        labels: np.ndarray | None,
        start: int,
        *,
        prepared: bool,
    ) -> Iterator[Piece]:
        counts = {len(array) for array in arrays.values()}
        if len(counts) != 1:
            raise DataError(f"{self._where}: the inputs of one dict hold different numbers of calls: {sorted(counts)}")
        for at in range(counts.pop()):
            feeds = {name: array[at] for name, array in arrays.items()}
            for name, array in scalars.items():
                feeds[name] = np.asarray(array[at]) if array.ndim and len(array) > at else self._value(name, array)
            label = None if labels is None else labels[at : at + 1]
            yield Piece(self._prepare(feeds, prepared), label, 1, start + at, frozenset(scalars), whole=True)

    def _prepare(self, feeds: dict[str, np.ndarray], prepared: bool) -> dict[str, np.ndarray]:
        return {name: self._plan.prepare(name, array) for name, array in feeds.items()} if prepared else feeds

    def _value(self, name: str, array: np.ndarray) -> np.ndarray:
        if array.ndim <= 1 and array.size and (array == array.flat[0]).all():
            return np.asarray(array.flat[0])
        raise DataError(
            f"{self._where}: input {name!r}: wanted one value for each call, got {array.dtype}{list(array.shape)}"
        )

    def _axes_more(self, feeds: dict[str, np.ndarray]) -> int:
        """How many axes more than the inputs the arrays have: 0, 1 or -1."""
        found = {}
        for name, array in feeds.items():
            rank = self._plan.spec(name).rank
            if rank:
                found[name] = array.ndim - rank
        for name, more in found.items():
            if more not in (-1, 0, 1):
                self._plan.check(name, feeds[name].shape, feeds[name].dtype, self._where)
        if len(set(found.values())) > 1:
            shapes = ", ".join(f"{name} {list(feeds[name].shape)}" for name in found)
            raise DataError(f"{self._where}: the arrays of one dict mix samples and whole batches: {shapes}")
        return next(iter(found.values()), 0)


def _rows_apart(
    feeds: Record, labels: np.ndarray | list[np.ndarray] | None, where: str
) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray | None]]:
    """Dicts whose values are plain arrays: a dict with rows of different shapes is taken apart into one dict a row."""
    lists = [value for value in (*feeds.values(), labels) if isinstance(value, list)]
    if not lists:
        yield {name: np.asarray(value) for name, value in feeds.items()}, None if labels is None else np.asarray(labels)
        return
    count = len(lists[0])
    for name, value in {**feeds, **({} if labels is None else {"labels": labels})}.items():
        if np.ndim(value[0] if isinstance(value, list) and value else value) and len(value) != count:
            raise DataError(f"{where}: {name!r} holds {len(value)} rows, others {count}")
    for at in range(count):
        row = {name: value[at] if isinstance(value, list) or value.ndim else value for name, value in feeds.items()}
        label = (
            None if labels is None else np.asarray(labels[at] if isinstance(labels, list) or labels.ndim else labels)
        )
        yield {name: np.asarray(value) for name, value in row.items()}, label
