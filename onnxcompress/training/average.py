"""An exponential moving average of the parameters, which generalizes better than where the last step happened to end.

B. Polyak, A. Juditsky, 1992; with the warm-up of TensorFlow's ExponentialMovingAverage. It is a small graph of its own
that reads the parameters where they are, on the device, after each step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcompress.autodiff.builder import Builder
from onnxcompress.errors import ModelError
from onnxcompress.runtime.session import first_line, onnxruntime, open_session
from onnxcompress.training.runner import Runner
from onnxcompress.training.step import NEXT, TrainingGraph
from onnxcompress.training.storage import View

PREFIX, DECAY = "average/", "average.decay"


class Average:
    """a' = d a + (1 - d) w with d = min(decay, (1 + t) / (10 + t)), for parameters and running statistics."""

    def __init__(self, graph: TrainingGraph, runner: Runner, decay: float, provider: str, threads: int) -> None:
        initial = {**{leaf.name: leaf.initial for leaf in graph.leaves}, **graph.running}
        model = _model(initial, graph.model.opset_imports[""], graph.model.ir_version)
        self._runner, self._decay = runner, decay
        state = {PREFIX + name: array for name, array in initial.items()}
        self._bound = _Bound(model, state, provider, threads)

    def update(self, t: int) -> None:
        """Take in the parameters after step `t` (from 1)."""
        decay = min(self._decay, (1 + t) / (10 + t))
        self._bound.run({DECAY: np.array(decay, np.float32)}, self._runner.values)

    def values(self) -> dict[str, np.ndarray]:
        """The averages by the names of what they are of."""
        return {name.removeprefix(PREFIX): array for name, array in self._bound.read().items()}

    def state(self) -> dict[str, np.ndarray]:
        """The averages by names of their own, for a checkpoint."""
        return self._bound.read()

    def write(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from what `state` gave; other names are left out."""
        self._bound.write({name: array for name, array in state.items() if name.startswith(PREFIX)})

    def close(self) -> None:
        """Release the session."""
        self._bound.close()


def _model(initial: Mapping[str, np.ndarray], opset: int, ir_version: int) -> ir.Model:
    graph = ir.Graph([], [], nodes=[], opset_imports={"": opset}, name="average")
    b = Builder(graph, opset)
    b.scope = "average"

    def given(name: str, like: np.ndarray) -> ir.Value:
        kind = ir.TensorType(ir.DataType.from_numpy(like.dtype))
        value = ir.Value(name=name, type=kind, shape=ir.Shape(like.shape))
        graph.inputs.append(value)
        return value

    decay = b.wrap(given(DECAY, np.zeros((), np.float32)))
    for name, array in initial.items():
        w, a = b.wrap(given(name, array)), b.wrap(given(PREFIX + name, array))
        after = w + (a - w) * decay.cast(w.dtype)
        after.value.name = PREFIX + name + NEXT
        graph.outputs.append(after.value)
    return ir.Model(graph, ir_version=ir_version)


class _Bound:
    """One session whose state swaps between two sets of buffers: its output `<name>.next` is the next `name`."""

    def __init__(self, model: ir.Model, state: Mapping[str, np.ndarray], provider: str, threads: int) -> None:
        self._session = open_session(model, provider=provider, threads=threads)
        device = "cuda" if "CUDAExecutionProvider" in self._session.providers else "cpu"
        self._inputs = {port.name for port in self._session.inputs}
        of_numpy = onnxruntime().OrtValue.ortvalue_from_numpy
        self._sets = [
            {name: of_numpy(np.array(array, order="C"), device, 0) for name, array in state.items()} for _ in range(2)
        ]
        self._now = 0
        self._bindings = [self._bind(self._sets[i], self._sets[1 - i]) for i in range(2)]

    def run(self, feeds: Mapping[str, np.ndarray], others: Mapping[str, View]) -> None:
        """One step. `others`: device values of inputs that are another's state.

        Raises:
            ModelError: a node failed.
        """
        binding = self._bindings[self._now]
        for name, array in feeds.items():
            if name in self._inputs:
                binding.bind_cpu_input(name, array)
        for name, view in others.items():
            if name in self._inputs:
                view.bind_input(binding, name)
        try:
            self._session.raw.run_with_iobinding(binding)
        except Exception as error:
            raise ModelError(f"averaging failed: {first_line(error)}") from error
        self._now = 1 - self._now

    def read(self) -> dict[str, np.ndarray]:
        """The state as arrays of its own."""
        return {name: np.array(value.numpy()) for name, value in self._sets[self._now].items()}

    def write(self, state: Mapping[str, np.ndarray]) -> None:
        """Set the state."""
        for name, array in state.items():
            self._sets[self._now][name].update_inplace(np.asarray(array, order="C"))

    def close(self) -> None:
        """Release the session."""
        self._bindings = []
        self._session.close()

    def _bind(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> Any:
        binding = self._session.raw.io_binding()
        for name, value in old.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name + NEXT, new[name])
        return binding
