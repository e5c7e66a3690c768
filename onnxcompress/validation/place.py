"""The compressed model on one requested provider: opened with no way back to the CPU, proved, compared, timed."""

from __future__ import annotations

import pathlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from onnxcompress.data.batch import Batch, Data
from onnxcompress.errors import DataError, MetricError, ModelError, RuntimeUnavailable
from onnxcompress.model.cost import NodeCost
from onnxcompress.runtime import memory, nvidia
from onnxcompress.runtime.choice import Choice
from onnxcompress.runtime.obstacles import NVIDIA
from onnxcompress.runtime.providers import PROVIDERS, short_name
from onnxcompress.runtime.session import Port, Session
from onnxcompress.validation import placement
from onnxcompress.validation.agreement import Agreement
from onnxcompress.validation.metric import BatchMetric, Collector
from onnxcompress.validation.pairing import feeds_for
from onnxcompress.validation.placement import ProviderRow
from onnxcompress.validation.samples import Evaluator, Samples
from onnxcompress.validation.values import RealRows
from onnxcompress.validation.verdict import Score

# Provider, session config, file for the profile, sizes of free dimensions.
Open = Callable[[Choice, Mapping[str, str], pathlib.Path, Mapping[str, int]], Session]


_SHAPES = 16  # so many times a model is opened for a provider that takes fixed shapes alone


class Place:
    """One requested provider. The CPU is run anyway, as both models' reference, and needs no proof.

    Nothing here raises for what the provider cannot do: `reason` says it, and `row` tells that it did not run.
    A provider that takes fixed shapes alone gets those of the first batch; later ones are filled up to it.
    `costs`: of the model's nodes. `inputs`: of its session on the CPU.
    """

    def __init__(
        self, choice: Choice, open_it: Open, costs: Sequence[NodeCost] = (), inputs: Sequence[Port] = ()
    ) -> None:
        self.name, self.provider = choice.name, short_name(choice.provider)
        self.session: Session | None = None
        self.nodes: list[placement.Node] = []
        self.reason: str | None = None
        self.agreement = Agreement()
        self.score: Score | None = None
        self.cpu = choice.provider == PROVIDERS["cpu"]
        self._records = Collector()
        self._costs = costs
        self._kernels: dict[str, int] | None = None
        self._free: list[str] = []
        self._seconds: float | None = None
        self._batch: int | None = None
        self._reopen: Callable[[Mapping[str, int]], None] | None = None
        self._at: dict[str, int] = {}
        self._shapes = 0
        self._named = {port.name: port.shape for port in inputs}
        self._grown: tuple[int | None, int | None] = (None, None)
        if not self.cpu:
            self._folder = pathlib.Path(tempfile.mkdtemp(prefix="onnxcompress-"))
            self._used = self._memory(choice.provider)
            self._device = choice.provider
            if self.provider in placement.FIXED and any(
                isinstance(size, str) for port in inputs for size in port.shape
            ):
                self._reopen = lambda sizes: self._start(choice, open_it, sizes)
            else:
                self._start(choice, open_it)

    @property
    def reopens(self) -> bool:
        """True when it opens the model at the shapes of the data, again where they change."""
        return self._reopen is not None

    def see(
        self,
        batch: Batch,
        reference: Mapping[str, Any],
        rows: RealRows,
        names: Sequence[str],
        where: Mapping[str, Any],
        evaluator: Evaluator | None,
    ) -> None:
        """Run one batch there, compare it with the `reference` and score it."""
        if self._reopen is not None and self.reason is None:
            self._fit(self._reopen, self._sizes(batch.feeds))
        if self.session is None:
            return
        try:
            outputs = rows.cut(self._run(batch.feeds, names), batch)
        except (ModelError, DataError) as error:
            self._stop(str(error))
            return
        if self._kernels is None and not self._prove():
            return
        self.agreement.update(reference, outputs, **where)
        if isinstance(evaluator, BatchMetric) and not self.agreement.misfit:
            self._records.add(evaluator.columns(outputs, batch))

    def samples(self, evaluator: Evaluator, data: Data, n: int) -> Samples | None:
        """The records there of the first `n` samples; None when there are none."""
        if self.session is None or self.agreement.misfit:
            return None
        try:
            if not isinstance(evaluator, BatchMetric):
                return evaluator(self._run, data)
            columns = self._records.columns()
            if any(len(column) < n for column in columns.values()):  # an interrupt fell between two
                return None
            return evaluator.finish({name: column[:n] for name, column in columns.items()})
        except (ModelError, DataError, MetricError) as error:
            self._stop(str(error))
            return None

    def time(self, batch: Batch, *, budget: float = 1.0, most: int = 50) -> None:
        """Time one call on `batch`, for `budget` seconds or `most` calls, warm from the runs before."""
        if self.session is None:
            return
        start = time.perf_counter()
        times: list[float] = []
        try:
            while len(times) < most and (len(times) < 3 or time.perf_counter() - start < budget):
                begun = time.perf_counter()
                self._run(batch.feeds)
                times.append(time.perf_counter() - begun)
        except (ModelError, DataError) as error:
            self._stop(str(error))
            return
        self._seconds, self._batch = statistics.median(times), batch.count

    def row(self) -> ProviderRow:
        """What was found; to be asked before `close`."""
        if self.session is not None and self._kernels is None:
            self._stop("no call was made there")
        fallen = () if self.cpu else placement.fallen(self.provider, self.nodes, free=self._free)
        return ProviderRow(
            provider=self.name,
            ran=self.cpu or self.session is not None,
            reason=self.reason,
            nodes=placement.counted(self.nodes),
            agreement=tuple(self.agreement.results()),
            macs=placement.macs_shares(self.nodes, self._costs),
            kernels=self._kernels or None,
            fell_back=fallen,
            score=self.score,
            latency_p50=self._seconds,
            batch=self._batch,
            memory=self._grown[0],
            device_memory=self._grown[1],
        )

    def close(self) -> None:
        """Close its session and remove its files."""
        if self.session is not None:
            self.session.close()
        if not self.cpu:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _run(self, feeds: Mapping[str, Any], names: Sequence[str] | None = None) -> dict[str, Any]:
        """Run `feeds`, filled up to the session's batch where that is fixed and the model's is free."""
        assert self.session is not None
        given, real, full = feeds_for(self.session, feeds), None, None
        for port in self.session.inputs:
            size, own = port.shape[0] if port.shape else None, self._named.get(port.name, ())
            array = given.get(port.name)
            free = bool(own) and isinstance(own[0], str)
            if free and isinstance(size, int) and isinstance(array, np.ndarray) and 0 < len(array) < size:
                real, full = len(array), size
                given[port.name] = np.concatenate([array, np.repeat(array[-1:], size - len(array), axis=0)])
        outputs = self.session.run(given, names)
        if full is None:
            return outputs
        return {
            name: value[:real] if isinstance(value, np.ndarray) and value.ndim and len(value) == full else value
            for name, value in outputs.items()
        }

    def _fit(self, reopen: Callable[[Mapping[str, int]], None], sizes: Mapping[str, int]) -> None:
        """Open the model at these sizes, unless it is open at them or with a larger batch."""
        first = {shape[0] for shape in self._named.values() if shape}
        if self._at and all(n == self._at[name] or (name in first and n < self._at[name]) for name, n in sizes.items()):
            return
        if self.session is not None:
            self.session.close()
        self._shapes += 1
        if self._shapes > _SHAPES:
            self._stop(f"{self.provider} takes fixed shapes alone, and the data comes in more than {_SHAPES}")
            return
        self._kernels = None
        self._at = {name: max(n, self._at.get(name, 0)) if name in first else n for name, n in sizes.items()}
        reopen(self._at)

    def _sizes(self, feeds: Mapping[str, Any]) -> dict[str, int]:
        """Sizes of the model's free dimensions in these feeds, by name."""
        found: dict[str, int] = {}
        for name, shape in self._named.items():
            if isinstance(feeds.get(name), np.ndarray):
                found |= {size: n for size, n in zip(shape, feeds[name].shape, strict=False) if isinstance(size, str)}
        return found

    def _start(self, choice: Choice, open_it: Open, sizes: Mapping[str, int] | None = None) -> None:
        try:
            self.session = open_it(choice, placement.RECORD, self._folder / "profile.json", sizes or {})
        except (RuntimeUnavailable, ModelError) as error:
            self.reason = str(error)
            return
        self._free = [
            port.name for port in self.session.inputs if any(not isinstance(size, int) for size in port.shape)
        ]
        nodes = placement.placed(self.session)
        self.nodes = nodes or []
        if not any(node.provider == self.provider for node in self.nodes):
            self._stop(placement.took_none(self.provider, nodes, free=self._free))

    def _prove(self) -> bool:
        """After the first call: what did it execute? False when nothing of it ran there."""
        assert self.session is not None
        profile = self.session.end_profile()
        self._kernels = (placement.executed(profile) if profile is not None else None) or {}
        own, device = self._memory(self._device)
        self._grown = (_growth(self._used[0], own), _growth(self._used[1], device))
        if self._kernels and not self._kernels.get(self.provider):
            ran = ", ".join(f"{name}: {count}" for name, count in self._kernels.items())
            self._stop(f"was given nodes and executed none of them (kernels that ran: {ran})")
            return False
        return True

    def _stop(self, reason: str) -> None:
        session, self.session, self.reason = self.session, None, reason
        if session is not None:
            session.close()

    @staticmethod
    def _memory(provider: str) -> tuple[int | None, int | None]:
        return memory.rss_anon(), nvidia.memory_used() if provider in NVIDIA else None


def _growth(before: int | None, after: int | None) -> int | None:
    return None if before is None or after is None else max(0, after - before)
