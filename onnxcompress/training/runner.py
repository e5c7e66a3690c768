"""Runs training steps: state stays on the device and swaps between two sets of buffers.

ONNX Runtime may write an output before it has read an input, so no buffer is ever both: a step reads one set and writes
the other. The bindings of both directions are made once; a step only binds its feeds.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcompress.errors import ModelError
from onnxcompress.runtime.session import first_line, onnxruntime, open_session
from onnxcompress.training.step import LOSS, LR, NEXT, NORM, SHARE, T, TrainingGraph

# Fake quantization of weights must stay a pair of nodes; spinning would burn the other cores between short steps.
_CONFIG = {"session.disable_quant_qdq": "1"}


class Bound:
    """One session whose state swaps between two sets of buffers.

    `state`: input name -> first value; the session's output `<name>.next` is its next value. `shared`: state of another
    `Bound` that this one reads. `results`: names of its other outputs.
    """

    def __init__(
        self,
        model: ir.Model,
        state: Mapping[str, np.ndarray],
        constants: Mapping[str, np.ndarray],
        results: Sequence[str],
        provider: str,
        threads: int,
    ) -> None:
        self._session = open_session(model, provider=provider, threads=threads, config=_CONFIG)
        self._device = "cuda" if "CUDAExecutionProvider" in self._session.providers else "cpu"
        self._inputs = {port.name for port in self._session.inputs}
        self._results = list(results)
        self._sets = [{name: self._on_device(array) for name, array in state.items()} for _ in range(2)]
        self._now = 0
        self._constants = {name: self._on_device(array) for name, array in constants.items() if name in self._inputs}
        self._bindings = [self._bind(self._sets[i], self._sets[1 - i]) for i in range(2)]

    def run(self, feeds: Mapping[str, np.ndarray], others: Mapping[str, Any] | None = None) -> dict[str, np.ndarray]:
        """One step. `others`: device values of inputs that are another's state.

        Raises:
            ModelError: a node failed.
        """
        binding = self._bindings[self._now]
        for name, array in feeds.items():
            if name in self._inputs:
                binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for name, value in (others or {}).items():
            if name in self._inputs:
                binding.bind_ortvalue_input(name, value)
        for name in self._results:
            binding.bind_output(name, "cpu")
        try:
            self._session.raw.run_with_iobinding(binding)
        except Exception as error:
            raise ModelError(f"the training step failed: {first_line(error)}") from error
        self._now = 1 - self._now
        # State outputs were bound first, so the results are the last of them.
        values = binding.get_outputs()[-len(self._results) :] if self._results else []
        return {name: value.numpy() for name, value in zip(self._results, values, strict=True)}

    @property
    def values(self) -> dict[str, Any]:
        """The state as it stands, on the device."""
        return self._sets[self._now]

    def read(self) -> dict[str, np.ndarray]:
        """The state as arrays of its own."""
        return {name: np.array(value.numpy()) for name, value in self.values.items()}

    def previous(self) -> dict[str, np.ndarray]:
        """The state before the last step, which the next one will overwrite."""
        return {name: np.array(value.numpy()) for name, value in self._sets[1 - self._now].items()}

    def write(self, state: Mapping[str, np.ndarray]) -> None:
        """Set the state."""
        for name, array in state.items():
            self.values[name].update_inplace(np.ascontiguousarray(array))

    def set_constants(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Change inputs that no step changes."""
        for name, array in arrays.items():
            if name in self._constants:
                self._constants[name].update_inplace(np.ascontiguousarray(array))

    def close(self) -> None:
        """Release the session."""
        self._bindings = []
        self._session.close()

    def _bind(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> Any:
        binding = self._session.raw.io_binding()
        for name, value in self._constants.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in old.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name + NEXT, new[name])
        return binding

    def _on_device(self, array: np.ndarray) -> Any:
        return onnxruntime().OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array).copy(), self._device, 0)


class Runner:
    """Steps of one training graph on one provider; gradients are summed over several calls where the graph says so."""

    def __init__(self, graph: TrainingGraph, *, provider: str = "cpu", threads: int = 1) -> None:
        self._graph = graph
        self._before: dict[str, np.ndarray] = {}  # running statistics at the begin of a step of several calls
        state = {**{leaf.name: leaf.initial for leaf in graph.leaves}, **graph.state}
        if graph.update is None:
            state |= graph.running
            self._step = Bound(graph.model, state, graph.buffers, [LOSS, NORM], provider, threads)
            self._sum: Bound | None = None
        else:
            self._sum = Bound(graph.model, graph.sums | graph.running, graph.buffers, [LOSS], provider, threads)
            self._step = Bound(graph.update, state, {}, [NORM], provider, threads)

    def step(self, calls: Sequence[Mapping[str, np.ndarray]], lr: float, t: int) -> tuple[float, float]:
        """One update from one or several calls' feeds; `t` counts from 1. Returns the loss and the gradient's norm."""
        scalars = {LR: np.array(lr, np.float32), T: np.array(t, np.float32)}
        if self._sum is None:
            (feeds,) = calls
            found = self._step.run({**feeds, **scalars})
            return float(found[LOSS]), float(found[NORM])
        self._before = self._running()
        self._sum.write(self._graph.sums)
        share, loss = np.array(1.0 / len(calls), np.float32), 0.0
        parameters = {leaf.name: self._step.values[leaf.name] for leaf in self._graph.leaves}
        for feeds in calls:
            loss += float(self._sum.run({**feeds, SHARE: share}, parameters)[LOSS]) / len(calls)
        found = self._step.run(scalars, self._sum.values)
        return loss, float(found[NORM])

    @property
    def values(self) -> dict[str, Any]:
        """Parameters and running statistics as they stand, on the device."""
        found = self._step.values if self._sum is None else {**self._step.values, **self._sum.values}
        return {name: found[name] for name in (*(leaf.name for leaf in self._graph.leaves), *self._graph.running)}

    def read(self) -> dict[str, np.ndarray]:
        """Parameters, optimizer state and running statistics by input name."""
        return {**self._step.read(), **self._running()}

    def previous(self) -> dict[str, np.ndarray]:
        """The same as it was before the last step."""
        return {**self._step.previous(), **self._before}

    def write(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from a state that `read` gave."""
        apart = self._graph.running if self._sum is not None else {}
        self._step.write({name: array for name, array in state.items() if name not in apart})
        if self._sum is not None:
            self._sum.write({name: array for name, array in state.items() if name in apart})

    def set_buffers(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Change buffers (masks), which stay in a step: a schedule needs no new session."""
        for bound in (self._step, self._sum):
            if bound is not None:
                bound.set_constants(arrays)

    def _running(self) -> dict[str, np.ndarray]:
        """Running statistics that are kept apart from the parameters."""
        if self._sum is None:
            return {}
        return {name: np.array(self._sum.values[name].numpy()) for name in self._graph.running}

    def close(self) -> None:
        """Release the sessions."""
        self._step.close()
        if self._sum is not None:
            self._sum.close()

    def __enter__(self) -> Runner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.close()
