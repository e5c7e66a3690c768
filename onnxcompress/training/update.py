"""The optimizer's step on flat buffers, run by run: gradients of all lanes added, their norm, new parameters and state.

It is done in place: every gradient is there before the first parameter changes, and within a run each new value is
written after the last node that reads the old one. Runs do not depend on each other, so workers share them; how the
elements are cut into runs never depends on how many workers there are, and so no sum does.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcompress.autodiff.builder import Builder
from onnxcompress.autodiff.tensor import Tensor
from onnxcompress.runtime.session import Session, open_session
from onnxcompress.training.optimizers import Given, Numbers, Optimizer
from onnxcompress.training.parameters import Parameter
from onnxcompress.training.storage import Buffer, Layout, View

RUN = 1 << 17  # elements: with state and temporaries what a core's cache holds
OPSET, IR_VERSION = 17, 8
_HEAD = ("scale", "eps", "decay", "still")  # scalars before the sizes of the runs


@dataclasses.dataclass(frozen=True)
class Run:
    """Elements `start` to `start + size`, all of parameters that decay or of none. `factors`: of the step's size, one
    or one an element."""

    start: int
    size: int
    decay: bool
    factors: np.ndarray


def runs(leaves: Sequence[Parameter], layout: Layout, relative: bool) -> list[Run]:
    """Large parameters in equal parts, small ones several together. `leaves`: in the order of `layout`."""
    found: list[Run] = []
    waiting: list[Parameter] = []

    def together() -> None:
        if waiting:
            first = layout.starts[waiting[0].name]
            end = layout.starts[waiting[-1].name] + waiting[-1].initial.size
            factors = np.ones(end - first)
            for leaf in waiting:
                at = layout.starts[leaf.name] - first
                factors[at : at + leaf.initial.size] = leaf.relative if relative else 1.0
            same = len({leaf.relative for leaf in waiting}) == 1 or not relative
            found.append(Run(first, end - first, waiting[0].decay, factors[:1] if same else factors))
            waiting.clear()

    for leaf in leaves:
        start, size = layout.starts[leaf.name], leaf.initial.size
        if waiting and (waiting[0].decay != leaf.decay or start + size - layout.starts[waiting[0].name] > RUN):
            together()
        if size <= RUN:
            waiting.append(leaf)
            continue
        parts = -(-size // RUN)
        edges = [start + size * i // parts for i in range(parts + 1)]
        factor = np.array([leaf.relative if relative else 1.0])
        found += [Run(a, b - a, leaf.decay, factor) for a, b in itertools.pairwise(edges)]
    together()
    return found


class Store:
    """The parameters of one type with their state, and what updates them."""

    def __init__(
        self,
        leaves: Sequence[Parameter],
        optimizer: Optimizer,
        *,
        clips: bool,
        relative: bool,
        provider: str,
        device: str,
    ) -> None:
        leaves = sorted(leaves, key=lambda leaf: (leaf.decay, leaf.initial.size > RUN))
        self.layout = Layout.of({leaf.name: leaf.initial.shape for leaf in leaves})
        self.dtype = leaves[0].initial.dtype
        self._device, self._provider, self._slots = device, provider, optimizer.slots
        self.parameters = self.buffer()
        self.state = {slot: self.buffer() for slot in optimizer.slots}
        start = self.layout.joined({leaf.name: leaf.initial for leaf in leaves}, self.parameters.read())
        self.parameters.write(start)
        self._runs = runs(leaves, self.layout, relative)
        factors = [np.zeros(len(_HEAD)), *(run.factors for run in self._runs)]
        self._factors = np.concatenate(factors)
        self._sizes = np.cumsum([len(part) for part in factors])[:-1]
        self._numbers = Buffer(len(self._factors), self.dtype, device)
        self._squares = Buffer(len(self._runs), self.dtype, "cpu")
        self._steps = self._open(_step_model(optimizer, clips, self.dtype))
        self._step_bindings: list[Any] = []
        self._sums: Session | None = None
        self._adds: Session | None = None
        self._sum_bindings: list[Any] = []

    def buffer(self) -> Buffer:
        """Room for one number an element of the parameters."""
        return Buffer(self.layout.size, self.dtype, self._device)

    def bind(self, gradients: Sequence[Buffer]) -> None:
        """Make ready for the gradients of these lanes."""
        self._sums = self._open(_sum_model(len(gradients), self.dtype))
        self._sum_bindings, self._step_bindings = [], []
        for index, run in enumerate(self._runs):
            binding = self._sums.raw.io_binding()
            for lane, buffer in enumerate(gradients):
                buffer.view(run.start, run.size).bind_input(binding, f"g{lane}")
            if len(gradients) > 1:
                gradients[0].view(run.start, run.size).bind_output(binding, "g")
            self._squares.view(index).bind_output(binding, "square")
            self._sum_bindings.append(binding)
            binding = self._steps.raw.io_binding()
            named = {"w": self.parameters, **self.state}
            inputs = {port.name for port in self._steps.inputs}
            for name, buffer in {"g": gradients[0], **named}.items():
                buffer.view(run.start, run.size).bind_input(binding, name)
            for name, buffer in named.items():
                buffer.view(run.start, run.size).bind_output(binding, f"{name}.next")
            decay = "decay" if run.decay else "still"
            for name, at in {"scale": 0, "eps": 1, "decay": _HEAD.index(decay)}.items():
                if name in inputs:
                    self._numbers.view(at).bind_input(binding, name)
            self._numbers.view(int(self._sizes[index]), len(run.factors)).bind_input(binding, "size")
            self._step_bindings.append(binding)

    def adding(self, total: Buffer, other: Buffer) -> Callable[[], None]:
        """Work that adds a gradient to another, in place."""
        if self._adds is None:
            self._adds = self._open(_sum_model(2, self.dtype, square=False))
        binding = self._adds.raw.io_binding()
        for name, buffer in {"g0": total, "g1": other}.items():
            buffer.view(0, self.layout.size).bind_input(binding, name)
        total.view(0, self.layout.size).bind_output(binding, "g")
        return _running(self._adds, binding)

    def sums(self) -> list[Callable[[], None]]:
        """Work that adds up the lanes' gradients, into the first lane's."""
        assert self._sums is not None
        return [_running(self._sums, binding) for binding in self._sum_bindings]

    @property
    def square(self) -> float:
        """The sum of the squares of the gradient, after `sums`."""
        return float(self._squares.read().astype(np.float64).sum())

    def steps(self, numbers: Numbers, scale: float) -> list[Callable[[], None]]:
        """Work that makes the step. `scale`: of the gradient."""
        array = self._factors * numbers.size
        array[: len(_HEAD)] = scale, numbers.eps, numbers.decay, numbers.still
        self._numbers.write(array)
        return [_running(self._steps, binding) for binding in self._step_bindings]

    @property
    def values(self) -> dict[str, View]:
        """The parameters on the device."""
        return self.layout.views(self.parameters)

    def read(self) -> dict[str, np.ndarray]:
        """Parameters and state by name."""
        found = self.layout.split(self.parameters.read())
        for slot, buffer in self.state.items():
            found |= {f"state/{name}/{slot}": array for name, array in self.layout.split(buffer.read()).items()}
        return found

    def write(self, state: Mapping[str, np.ndarray]) -> None:
        """Set what of `state` is its own."""
        for slot, buffer in {"": self.parameters, **self.state}.items():
            named = {name: f"state/{name}/{slot}" if slot else name for name in self.layout.starts}
            mine = {name: state[key] for name, key in named.items() if key in state}
            buffer.write(self.layout.joined(mine, buffer.read()))

    def close(self) -> None:
        """Release the sessions."""
        self._step_bindings, self._sum_bindings = [], []
        for session in (self._steps, self._sums, self._adds):
            if session is not None:
                session.close()

    def _open(self, model: ir.Model) -> Session:
        return open_session(model, provider=self._provider, threads=1)


def _running(session: Session, binding: Any) -> Callable[[], None]:
    return lambda: session.raw.run_with_iobinding(binding)


class _Writer:
    """A small graph over runs of elements."""

    def __init__(self, name: str, dtype: np.dtype[Any]) -> None:
        self.graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name=name)
        self.b = Builder(self.graph, OPSET)
        self._dtype = ir.DataType.from_numpy(dtype)

    def given(self, name: str, *shape: str) -> Tensor:
        value = ir.Value(name=name, type=ir.TensorType(self._dtype), shape=ir.Shape(shape))
        self.graph.inputs.append(value)
        return self.b.wrap(value)

    def result(self, tensor: Tensor, name: str) -> None:
        tensor.value.name = name
        self.graph.outputs.append(tensor.value)

    def model(self) -> ir.Model:
        return ir.Model(self.graph, ir_version=IR_VERSION)


def _sum_model(lanes: int, dtype: np.dtype[Any], square: bool = True) -> ir.Model:
    """g0, g1, ... -> g, the sum (in this order); square, the sum of its squares."""
    writer = _Writer("sum", dtype)
    total, *rest = [writer.given(f"g{lane}", "n") for lane in range(lanes)]
    for other in rest:
        total = total + other
    if rest:
        writer.result(total, "g")
    if square:
        writer.result(writer.b.op("ReduceSumSquare", total, shape=(), keepdims=0), "square")
    return writer.model()


def _step_model(optimizer: Optimizer, clips: bool, dtype: np.dtype[Any]) -> ir.Model:
    """g, w, state, numbers -> w.next, state.next."""
    writer = _Writer("update", dtype)
    g, w = writer.given("g", "n"), writer.given("w", "n")
    state = [writer.given(slot, "n") for slot in optimizer.slots]
    given = Given(writer.given("size", "k"), writer.given("eps"), writer.given("decay"))
    if clips:
        g = g * writer.given("scale")
    new, fresh = optimizer.update(w, g, state, given)
    writer.result(new, "w.next")
    for slot, tensor in zip(optimizer.slots, fresh, strict=True):
        writer.result(tensor, f"{slot}.next")
    return writer.model()
