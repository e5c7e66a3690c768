"""Weights of local functions brought to the main graph, where they can be trained.

Each becomes an input of its function that every call is given, so that a function called twice has one weight whose
gradients add up. It keeps its key, so what is learned goes back into the function of the original model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common

from onnxcompress.autodiff.engine import named
from onnxcompress.encodings import functions
from onnxcompress.encodings.base import Encoding, Tape
from onnxcompress.errors import ModelError
from onnxcompress.model.weights import Weight, weights


def hoist(model: ir.Model) -> None:
    """Move the weights out of the functions of `model` and put the functions in the place of their calls.

    Functions in which weights are encoded stay calls.

    Raises:
        ModelError: a function cannot be inlined.
    """
    given: dict[int, list[tuple[ir.Value, ir.Value]]] = {}
    taken = set(named(model.graph))
    for weight in weights(model):
        if _is_movable(weight):
            passed = _Passed(weight.encoding, [])
            weight.replace(passed)
            tape = Tape(model, model.graph, taken=taken)
            outer = _emitted(passed, tape, weight.key)
            given.setdefault(id(weight.root), []).append((passed.inputs[0], outer))
    if given:
        _pass_on(model, given)
    own = [f for f in model.functions.values() if f.domain != functions.DOMAIN]
    if not own:
        return
    try:
        ir.passes.common.InlinePass(criteria=lambda function: function.domain != functions.DOMAIN)(model)
    except Exception as error:
        raise ModelError(f"a local function cannot be inlined: {error.__cause__ or error}") from error
    model.graph.sort()


@dataclasses.dataclass(frozen=True, eq=False)
class _Passed(Encoding):
    """A weight that a function is given by its caller. `inputs`: the function's new input, once it is emitted."""

    kind: ClassVar[str] = "passed"
    inner: Encoding
    inputs: list[ir.Value]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.inner.dtype

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes

    def emit(self, tape: Tape, name: str) -> ir.Value:
        value = ir.Value(name=name)
        assert isinstance(tape.root, ir.Function)
        tape.root.inputs.append(value)
        self.inputs.append(value)
        return value


def _emitted(passed: _Passed, tape: Tape, key: str) -> ir.Value:
    """The weight, emitted in the main graph under its key."""
    inner = passed.inner
    value = inner.emit(tape, key)
    value.shape, value.type = ir.Shape(inner.shape), ir.TensorType(ir.DataType.from_numpy(inner.dtype))
    tape.place()
    return value


def _is_movable(weight: Weight) -> bool:
    return (
        isinstance(weight.root, ir.Function)
        and weight.attribute is None
        and getattr(weight.encoding, "form", None) != "integer"
        and not weight.value.is_graph_output()
    )


def _pass_on(model: ir.Model, given: dict[int, list[tuple[ir.Value, ir.Value]]]) -> None:
    """Extend every call by what its function now wants; a call within a function makes that want it, too."""
    sites: dict[Any, list[tuple[ir.Node, ir.Function | None]]] = {}
    for node, root in _calls(model):
        sites.setdefault(node.op_identifier(), []).append((node, root))
    for function in _callees_first(model, sites):
        wanted = given.get(id(function), [])
        for node, root in sites.get(function.identifier(), []) if wanted else []:
            node.resize_inputs(len(function.inputs))
            for inner, outer in wanted:
                at = next(i for i, value in enumerate(function.inputs) if value is inner)
                node.replace_input_with(at, outer if root is None else _own(root, inner, outer, given))


def _own(
    function: ir.Function, inner: ir.Value, outer: ir.Value, given: dict[int, list[tuple[ir.Value, ir.Value]]]
) -> ir.Value:
    """The input of `function` by which it is handed `outer`."""
    mine = given.setdefault(id(function), [])
    for value, source in mine:
        if source is outer:
            return value
    value = ir.Value(name=f"{outer.name}/passed", type=inner.type, shape=inner.shape)
    function.inputs.append(value)
    mine.append((value, outer))
    return value


def _calls(model: ir.Model) -> Iterator[tuple[ir.Node, ir.Function | None]]:
    """Every node with the function it lies in, None in the main graph."""
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        yield node, None
    for function in model.functions.values():
        for node in ir.traversal.RecursiveGraphIterator(function):
            yield node, function


def _callees_first(
    model: ir.Model, sites: dict[Any, list[tuple[ir.Node, ir.Function | None]]]
) -> Iterator[ir.Function]:
    """The functions, each before those that call it."""
    callers = {
        key: {root.identifier() for _, root in sites.get(key, []) if root is not None} for key in model.functions
    }
    left = dict(model.functions)
    while left:
        free = [key for key in left if not any(key in callers[other] for other in left if other != key)]
        if not free:
            return  # functions that call each other cannot be inlined, which is said there
        for key in free:
            yield left.pop(key)
