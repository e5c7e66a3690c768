"""A lane: room for the gradient of some of a step's calls, and the bindings that fill it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from onnxcompress.errors import ModelError
from onnxcompress.runtime.session import Session, first_line
from onnxcompress.training.step import GRADIENT, LOSS, TrainingGraph
from onnxcompress.training.storage import Buffer, View
from onnxcompress.training.update import Store

Feeds = Mapping[str, np.ndarray]


class Lane:
    """Runs calls one after the other and adds up their gradients.

    `inputs`, `outputs`: what stays bound, beside parameters and gradients, once for each direction in which state that
    the forward pass moves swaps between two buffers; elsewhere there is one direction.
    """

    def __init__(
        self,
        graph: TrainingGraph,
        session: Session,
        stores: Sequence[Store],
        inputs: Sequence[Mapping[str, Any]],
        outputs: Sequence[Mapping[str, View]],
    ) -> None:
        self._graph, self.session, self._stores = graph, session, stores
        self._inputs, self._outputs = inputs, outputs
        self._known = {port.name for port in session.inputs}
        kind = graph.model.graph.outputs[0].dtype
        assert kind is not None
        self._loss = Buffer(1, kind.numpy(), "cpu")
        self.gradients = [store.buffer() for store in stores]
        self._first = self._bindings(self.gradients)
        self._spare: list[Buffer] = []  # kept here: a binding holds only addresses
        self._later: list[Any] = []
        self._adding: list[Callable[[], None]] = []

    def run(self, calls: Sequence[Feeds], direction: int = 0) -> list[float]:
        """The losses of `calls`; their gradients are added up in `gradients`.

        Raises:
            ModelError: a node failed.
        """
        losses = []
        for index, feeds in enumerate(calls):
            if index and not self._later:
                self._spare = [store.buffer() for store in self._stores]
                self._later = self._bindings(self._spare)
                pairs = zip(self._stores, self.gradients, self._spare, strict=True)
                self._adding = [store.adding(total, other) for store, total, other in pairs]
            bindings = self._later if index else self._first
            losses.append(self._call(bindings[(direction + index) % len(bindings)], feeds))
            if index:
                for add in self._adding:
                    add()
        return losses

    def _call(self, binding: Any, feeds: Feeds) -> float:
        # not ascontiguousarray, which makes an array of a scalar
        kept = {name: np.asarray(array, order="C") for name, array in feeds.items() if name in self._known}
        for name, array in kept.items():
            binding.bind_cpu_input(name, array)
        try:
            self.session.raw.run_with_iobinding(binding)
        except Exception as error:
            raise ModelError(f"the training step failed: {first_line(error)}") from error
        return float(self._loss.read()[0])

    def _bindings(self, gradients: Sequence[Buffer]) -> list[Any]:
        made = []
        for inputs, outputs in zip(self._inputs, self._outputs, strict=True):
            binding = self.session.raw.io_binding()
            for name, value in inputs.items():
                if name in self._known and isinstance(value, View):
                    value.bind_input(binding, name)
                elif name in self._known:
                    binding.bind_ortvalue_input(name, value)
            for name, view in outputs.items():
                view.bind_output(binding, name)
            self._loss.view(0).bind_output(binding, LOSS)
            for store, buffer in zip(self._stores, gradients, strict=True):
                for name, start in store.layout.starts.items():
                    buffer.view(start, *self._graph.shapes[name]).bind_output(binding, GRADIENT + name)
            made.append(binding)
        return made
