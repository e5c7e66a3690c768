"""Runs training steps: gradients of the calls a batch comes in, several at a time, then the optimizer's step.

The calls of a step are dealt out to lanes, each with a gradient of its own; how many lanes there are follows from the
number of calls alone and each runs on one thread, so that the result does not depend on how many threads run them.
State stays on the device.
"""

from __future__ import annotations

import concurrent.futures
import functools
import math
import os
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from onnxcompress.model import bridge
from onnxcompress.runtime.session import Session, onnxruntime, open_session
from onnxcompress.training import blocked
from onnxcompress.training.lanes import Feeds, Lane
from onnxcompress.training.losses import LEAST, TOTAL
from onnxcompress.training.optimizers import clip_scale
from onnxcompress.training.parameters import Parameter
from onnxcompress.training.step import NEXT, SHARE, TrainingGraph
from onnxcompress.training.storage import Buffer, Layout, View
from onnxcompress.training.update import Store

# Fake quantization of weights must stay a pair of nodes; spinning would burn the other cores between short steps.
_CONFIG = {"session.disable_quant_qdq": "1"}
LANES = 4  # at most: each holds a gradient


def cores() -> int:
    """How many threads this process may run at a time."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Runner:
    """Steps of one training graph on one provider, on `threads` threads.

    `same_shapes`: all calls have the shapes of the first one. Where they do not, which of them comes first, and with it
    the last bits of a result, would depend on where a training was resumed; then nothing is fitted to them.
    """

    def __init__(
        self, graph: TrainingGraph, *, provider: str = "cpu", threads: int = 1, same_shapes: bool = True
    ) -> None:
        self._graph = graph
        self._session = open_session(graph.model, provider=provider, threads=1, config=_CONFIG)
        self._device = "cuda" if "CUDAExecutionProvider" in self._session.providers else "cpu"
        self._fitted: tuple[dict[str, tuple[int, ...]], Session] | None = None
        self._may_fit = provider == "cpu" and same_shapes
        self._known = {port.name for port in self._session.inputs}
        self._totals = [name for name in self._known if name.endswith(TOTAL)]
        by_type: dict[str, list[Parameter]] = {}
        for leaf in graph.leaves:
            by_type.setdefault(leaf.initial.dtype.name, []).append(leaf)
        options = {"clips": graph.clip is not None, "relative": graph.relative}
        self._stores = [
            Store(leaves, graph.optimizer, **options, provider=provider, device=self._device)
            for leaves in by_type.values()
        ]
        self._constants = {name: self._on_device(array) for name, array in graph.buffers.items()}
        self._running = Running(graph.running, self._device)
        self._lanes: list[Lane] = []
        self._threads = threads
        self._pool = concurrent.futures.ThreadPoolExecutor(threads) if threads > 1 else None

    def step(self, calls: Sequence[Feeds], lr: float, t: int) -> tuple[float, float]:
        """One update from one or several calls' feeds; `t` counts from 1. Returns the loss and the gradient's norm.

        Nothing changes where one of them is not finite.

        Raises:
            ModelError: a node failed.
        """
        feeds = [{**call, **self._shared(calls)} for call in calls]
        lanes = self._prepared(feeds)
        before = self._running.read()
        losses: list[list[float]] = [[] for _ in lanes]

        def run(index: int) -> None:
            losses[index] = lanes[index].run(feeds[index :: len(lanes)], self._running.now)

        self._work([functools.partial(run, index) for index in range(len(lanes))])
        self._running.moved(len(calls))
        self._work([work for store in self._stores for work in store.sums()])
        loss = math.fsum(part for found in losses for part in found)
        norm = math.sqrt(sum(store.square for store in self._stores))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._running.write(before)
            return loss, norm
        numbers, scale = self._graph.optimizer.numbers(lr, t), clip_scale(norm, self._graph.clip)
        self._work([work for store in self._stores for work in store.steps(numbers, scale)])
        return loss, norm

    @property
    def values(self) -> dict[str, View]:
        """Parameters and running statistics as they stand, on the device."""
        return {**self._running.views, **{n: v for store in self._stores for n, v in store.values.items()}}

    def read(self) -> dict[str, np.ndarray]:
        """Parameters, optimizer state and running statistics by input name."""
        found = {name: array for store in self._stores for name, array in store.read().items()}
        return found | self._running.read()

    def gradients(self) -> dict[str, np.ndarray]:
        """Those of the last step, by the parameter's name, before clipping."""
        if not self._lanes:
            return {}
        pairs = zip(self._stores, self._lanes[0].gradients, strict=True)
        return {name: array for store, buffer in pairs for name, array in store.layout.split(buffer.read()).items()}

    def inputs(self, calls: Sequence[Feeds]) -> list[dict[str, np.ndarray]]:
        """All that each call of a step is fed with, as arrays: to compute it once more elsewhere."""
        held = {name: value.numpy() for name, value in self._constants.items()} | self.read()
        return [{**held, **call, **self._shared(calls)} for call in calls]

    def write(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from a state that `read` gave."""
        for store in self._stores:
            store.write(state)
        self._running.write(state)

    def set_buffers(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Change buffers (masks), which stay in a step: a schedule needs no new session."""
        for name, array in arrays.items():
            if name in self._constants:
                self._constants[name].update_inplace(np.asarray(array, order="C"))

    def close(self) -> None:
        """Release the sessions."""
        if self._pool is not None:
            self._pool.shutdown()
        self._lanes = []
        for store in self._stores:
            store.close()
        if self._fitted is not None:
            self._fitted[1].close()
        self._session.close()

    def _session_for(self, calls: Sequence[Feeds]) -> Session:
        """The session for calls of these shapes: those of the first step have one whose convolutions run blocked."""
        found = [{name: np.shape(array) for name, array in call.items()} for call in calls]
        shapes, alike = found[0], all(each == found[0] for each in found)
        if self._may_fit and alike:
            self._may_fit = False
            model = bridge.clone(self._graph.model)  # another runner of this graph may be fed with other shapes
            if blocked.lower(model, shapes, blocked.block_size()):
                self._fitted = shapes, open_session(model, threads=1, config=_CONFIG)
        if self._fitted is not None and alike and shapes == self._fitted[0]:
            return self._fitted[1]
        return self._session

    def _prepared(self, calls: Sequence[Feeds]) -> list[Lane]:
        """The lanes for a step of these calls."""
        count = 1 if self._graph.running else min(len(calls), LANES)
        session = self._session_for(calls)
        if len(self._lanes) != count or self._lanes[0].session is not session:
            inputs = [self._constants | self.values for _ in range(2 if self._graph.running else 1)]
            outputs: list[dict[str, View]] = [{}]
            if self._graph.running:
                outputs = [{}, {}]
                for now in range(2):
                    inputs[now] |= self._running.sets[now]
                    outputs[now] = {name + NEXT: view for name, view in self._running.sets[1 - now].items()}
            self._lanes = [Lane(self._graph, session, self._stores, inputs, outputs) for _ in range(count)]
            for index, store in enumerate(self._stores):
                store.bind([lane.gradients[index] for lane in self._lanes])
        return self._lanes

    def _shared(self, calls: Sequence[Feeds]) -> dict[str, np.ndarray]:
        """What all calls of a step are fed with: by what their losses are divided, and which share of it each is."""
        found = {SHARE: np.array(1 / len(calls), np.float32)}
        for name in self._totals:
            weights = [np.asarray(call[name.removesuffix(TOTAL)]) for call in calls]
            total = sum(float(weight.sum(dtype=np.float64)) for weight in weights)
            found[name] = np.array(max(total, LEAST), weights[0].dtype)
        return found

    def _work(self, pieces: Sequence[Callable[[], None]]) -> None:
        """Do independent pieces of work, as many at a time as there are threads."""
        workers = min(self._threads, len(pieces))
        if self._pool is None or workers < 2:
            for piece in pieces:
                piece()
            return

        def share(index: int) -> None:
            for piece in pieces[index::workers]:
                piece()

        list(self._pool.map(share, range(workers)))

    def _on_device(self, array: np.ndarray) -> Any:
        return onnxruntime().OrtValue.ortvalue_from_numpy(np.asarray(array, order="C").copy(), self._device, 0)

    def __enter__(self) -> Runner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.close()


class Running:
    """State that the forward pass itself moves, in two buffers that swap."""

    def __init__(self, initial: Mapping[str, np.ndarray], device: str) -> None:
        self._layout = Layout.of({name: array.shape for name, array in initial.items()})
        kinds = {array.dtype for array in initial.values()} or {np.dtype(np.float32)}
        self._buffers = [Buffer(self._layout.size, max(kinds), device) for _ in range(2)]
        self.sets = [self._layout.views(buffer) for buffer in self._buffers]
        self.now = 0
        self.write(initial)

    @property
    def views(self) -> dict[str, View]:
        """As it stands, on the device."""
        return self.sets[self.now]

    def moved(self, calls: int) -> None:
        """So many calls have swapped the buffers."""
        self.now = (self.now + calls) % 2

    def read(self) -> dict[str, np.ndarray]:
        """As it stands, by name."""
        return self._layout.split(self._buffers[self.now].read())

    def write(self, state: Mapping[str, np.ndarray]) -> None:
        """Set what of `state` is its own."""
        buffer = self._buffers[self.now]
        mine = {name: state[name] for name in self._layout.starts if name in state}
        buffer.write(self._layout.joined(mine, buffer.read()))
