"""One pass over the data with both models on the CPU, and the compressed one on every other provider asked for."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from onnxcompress.contract import Progress
from onnxcompress.data.batch import Batch, Data
from onnxcompress.runtime.session import Session
from onnxcompress.validation.agreement import Agreement
from onnxcompress.validation.metric import BatchMetric, Collector
from onnxcompress.validation.pairing import feeds_for
from onnxcompress.validation.place import Place
from onnxcompress.validation.portable import Portable
from onnxcompress.validation.samples import Evaluator, RunModel, Samples
from onnxcompress.validation.sequential import Sequential
from onnxcompress.validation.values import Positions, RealRows
from onnxcompress.validation.verdict import Score


class Comparison:
    """One pass over the data with every session, and the metric where it scores batch by batch."""

    def __init__(
        self,
        sessions: tuple[Session, Session],
        places: Sequence[Place],
        data: Data,
        evaluator: Evaluator | None,
        limit: int | None,
        sequential: Sequential | None = None,
        portable: Portable | None = None,
    ) -> None:
        self._sessions, self._places, self._data = sessions, places, data
        self.evaluator, self._limit, self._sequential, self._portable = evaluator, limit, sequential, portable
        self._names = [port.name for port in sessions[0].outputs]
        self._records = (Collector(), Collector())
        self.agreement = Agreement()
        self.first: Batch | None = None
        self.seen = self.calls = 0
        self.partial = False  # not all samples were seen
        self.cut = False  # what follows on the pass was interrupted
        self.early: Score | None = None  # what decided before all samples were seen

    def stream(self, progress: Progress) -> None:
        """Run every batch through both models, until an early look decides or an interrupt ends it."""
        total = self._data.len_hint() or 0
        progress.start("comparing", min(total, self._limit) if self._limit else total)
        rows, positions = RealRows(self._data), Positions(self._sessions[0])
        try:
            for batch in self._data:
                if self._limit is not None and self.seen >= self._limit:
                    break
                self._batch(batch, rows, positions)
                progress.step(batch.count)
                if self._sequential is not None and self._sequential.due(self.seen):
                    self.early = self._sequential.look(self.samples)
                    if self.early is not None:
                        break
        except KeyboardInterrupt:
            self.partial = True
        progress.done()

    def _batch(self, batch: Batch, rows: RealRows, positions: Positions) -> None:
        pair = [
            rows.cut(session.run(feeds_for(session, batch.feeds), self._names), batch) for session in self._sessions
        ]
        valid = {name: positions.of(name, batch) for name in self._names} if batch.valid is not None else None
        where: dict[str, Any] = {"start": batch.start, "count": batch.count, "valid": valid}
        self.agreement.update(pair[0], pair[1], **where)
        if isinstance(self.evaluator, BatchMetric) and not self.agreement.misfit:
            scored = [self.evaluator.columns(outputs, batch) for outputs in pair]
            for records, columns in zip(self._records, scored, strict=True):
                records.add(columns)
        for place in self._places:
            place.see(batch, pair[0], rows, self._names, where, self.evaluator)
        if self._portable is not None:
            scorer = None if self.agreement.misfit else self.evaluator
            self._portable.see(batch, pair[1], rows, self._names, where, scorer)
        if self._sequential is not None:
            self._sequential.order.update(None if batch.labels is None else batch.labels[: batch.count])
        self.first = self.first or batch
        self.seen += batch.count
        self.calls += 1

    def samples(self) -> tuple[Samples, Samples] | None:
        """The records of both models; None without a metric, when outputs do not fit, or when interrupted too early."""
        if self.evaluator is None or self.agreement.misfit:
            return None
        if isinstance(self.evaluator, BatchMetric):
            if not self.seen:
                return None
            first, second = (records.columns() for records in self._records)
            n = min(len(column) for column in (*first.values(), *second.values()))  # an interrupt may fall between two
            cut = [{name: column[:n] for name, column in columns.items()} for columns in (first, second)]
            evaluator = copy.copy(self.evaluator)  # what a look settles on few samples must not bind the next
            return evaluator.finish(cut[0]), evaluator.finish(cut[1])
        if self.partial:
            return None
        try:
            first_whole = self.evaluator(_runner(self._sessions[0]), self._data)
            return first_whole, self.evaluator(_runner(self._sessions[1]), self._data)
        except KeyboardInterrupt:
            self.partial = True
            return None


def _runner(session: Session) -> RunModel:
    return lambda feeds: session.run(feeds_for(session, feeds))
