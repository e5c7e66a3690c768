"""One pass over the data with both models on the CPU, and the compressed one on every other provider asked for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from onnxcompress.contract import Progress
from onnxcompress.data.batch import Batch, Data
from onnxcompress.errors import DataError, ModelError
from onnxcompress.runtime.providers import PROVIDERS, short_name
from onnxcompress.runtime.session import Session
from onnxcompress.validation import placement
from onnxcompress.validation.agreement import Agreement
from onnxcompress.validation.metric import BatchMetric, Collector
from onnxcompress.validation.pairing import feeds_for
from onnxcompress.validation.result import ProviderRow
from onnxcompress.validation.samples import Evaluator, RunModel, Samples
from onnxcompress.validation.sequential import Sequential
from onnxcompress.validation.values import Positions, RealRows
from onnxcompress.validation.verdict import Score


class Place:
    """The compressed model on one requested provider. The CPU is run anyway, as both models' reference."""

    def __init__(self, provider: str, open_it: Callable[[str, Mapping[str, str]], Session]) -> None:
        self.name = short_name(provider)
        self.session: Session | None = None
        self.nodes: dict[str, int] = {}
        self.reason: str | None = None
        self.agreement = Agreement()
        self.cpu = provider == PROVIDERS["cpu"]
        if not self.cpu:
            self.session, nodes, self.reason = placement.attempt(provider, lambda: open_it(self.name, placement.RECORD))
            self.nodes = {short_name(key): count for key, count in nodes.items()}

    def run(self, feeds: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any] | None:
        """The outputs there; None when it does not run."""
        if self.session is None:
            return None
        try:
            return self.session.run(feeds_for(self.session, feeds), names)
        except (ModelError, DataError) as error:
            self.reason, self.session = str(error), None
            return None

    def row(self) -> ProviderRow:
        ran = self.cpu or self.session is not None
        return ProviderRow(self.name, ran, self.reason, self.nodes, tuple(self.agreement.results()))

    def close(self) -> None:
        """Close its session, which `row` still counts as having run."""
        if self.session is not None:
            self.session.close()


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
    ) -> None:
        self._sessions, self._places, self._data = sessions, places, data
        self._evaluator, self._limit, self._sequential = evaluator, limit, sequential
        self._names = [port.name for port in sessions[0].outputs]
        self._records = (Collector(), Collector())
        self.agreement = Agreement()
        self.first: Batch | None = None
        self.seen = self.calls = 0
        self.partial = False
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
        if isinstance(self._evaluator, BatchMetric) and not self.agreement.misfit:
            scored = [self._evaluator.columns(outputs, batch) for outputs in pair]
            for records, columns in zip(self._records, scored, strict=True):
                records.add(columns)
        for place in self._places:
            outputs = place.run(batch.feeds, self._names)
            if outputs is not None:
                place.agreement.update(pair[0], rows.cut(outputs, batch), **where)
        if self._sequential is not None:
            self._sequential.order.update(None if batch.labels is None else batch.labels[: batch.count])
        self.first = self.first or batch
        self.seen += batch.count
        self.calls += 1

    def samples(self) -> tuple[Samples, Samples] | None:
        """The records of both models; None without a metric, when outputs do not fit, or when interrupted too early."""
        if self._evaluator is None or self.agreement.misfit:
            return None
        if isinstance(self._evaluator, BatchMetric):
            if not self.seen:
                return None
            first, second = (records.columns() for records in self._records)
            n = min(len(column) for column in (*first.values(), *second.values()))  # an interrupt may fall between two
            cut = [{name: column[:n] for name, column in columns.items()} for columns in (first, second)]
            evaluator = copy.copy(self._evaluator)  # what a look settles on few samples must not bind the next
            return evaluator.finish(cut[0]), evaluator.finish(cut[1])
        if self.partial:
            return None
        try:
            first_whole = self._evaluator(_runner(self._sessions[0]), self._data)
            return first_whole, self._evaluator(_runner(self._sessions[1]), self._data)
        except KeyboardInterrupt:
            self.partial = True
            return None


def _runner(session: Session) -> RunModel:
    return lambda feeds: session.run(feeds_for(session, feeds))
