"""Taps: make any value of a model an extra output, also inside If, Loop and Scan, without copying weights.

A value of a body must leave through its node. An If gets one more output: the other branch gives an empty placeholder,
and a second output says which branch ran. A Loop or Scan gets one more scan output, the iterations stacked along a new
first axis.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

from onnxcompress.errors import ModelError
from onnxcompress.model import bridge
from onnxcompress.model.shapes import ShapeInfo, shapes, values


@dataclasses.dataclass(frozen=True)
class Tapped:
    """A model with taps.

    `outputs`: tapped name -> output name. `valid`: tapped name -> bool output that is false where the value was not
    computed (values inside an If). `left`: names that cannot leave their scope, with the reason.
    """

    model: ir.Model
    outputs: dict[str, str]
    valid: dict[str, str]
    left: dict[str, str]


def tap(model: ir.Model, names: Sequence[str]) -> Tapped:
    """A copy of `model` with `names` as outputs, the tensors shared and external data where it was.

    A name is a value's own, with the path of its scope before it (`bridge.scopes`) for a value in a subgraph; without a
    path it finds a value in a subgraph if there is only one of that name. What a Loop or Scan yields has one more axis
    in front for each of them around the value.

    Raises:
        ModelError: no such value.
    """
    return _Tapper(model).tap(names)


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a scope hangs: the node and attribute that hold it, and the scope around it."""

    owner: ir.Graph | ir.Function
    node: ir.Node | None = None
    attribute: str = ""
    outer: _Place | None = None


class _Tapper:
    def __init__(self, model: ir.Model) -> None:
        self._original = model
        self._model = bridge.clone(model)
        self._places: dict[str, tuple[_Place, ir.Value]] = {}
        self._short: dict[str, list[str]] = {}
        self._taken: set[str] = set()
        self._index("", _Place(self._model.graph))
        for function in self._model.functions.values():
            self._index(f"{function.domain}::{function.name}/", _Place(function))

    @functools.cached_property
    def _known(self) -> dict[str, ShapeInfo]:
        return shapes(self._original)

    def _index(self, path: str, place: _Place) -> None:
        for value in values(place.owner):
            if value.name:
                self._places.setdefault(f"{path}{value.name}", (place, value))
                self._short.setdefault(value.name, []).append(f"{path}{value.name}")
                self._taken.add(value.name)
        for node in place.owner:
            for inner, graph, attribute in bridge.subscopes(path, node):
                self._index(inner, _Place(graph, node, attribute, place))

    def tap(self, names: Iterable[str]) -> Tapped:
        done = Tapped(self._model, {}, {}, {})
        for name in dict.fromkeys(names):
            key = self._find(name)
            place, value = self._places[key]
            try:
                output, flag = self._lift(place, value, key)
            except _CannotLeave as reason:
                done.left[name] = str(reason)
                continue
            done.outputs[name] = _name(self._expose(output))
            if flag is not None:
                done.valid[name] = _name(self._expose(flag))
        return done

    def _find(self, name: str) -> str:
        if name in self._places:
            return name
        found = self._short.get(name, [])
        if len(found) == 1:
            return found[0]
        if found:
            raise ModelError(f"value {name!r} is in {len(found)} subgraphs: name one of them, as in {found[0]!r}")
        raise ModelError(f"no value {name!r} in the model; `onnxcompress inspect` lists what there is")

    def _expose(self, value: ir.Value) -> ir.Value:
        """Make a value of the main graph an output of the model."""
        if any(value is output for output in self._model.graph.outputs):
            return value
        if value.producer() is None:  # an input or initializer: ORT wants outputs that a node makes
            value = self._identity(self._model.graph, value)
        self._model.graph.outputs.append(value)
        return value

    # Out of one scope after the other ------------------------------------------------------------------------------

    def _lift(self, place: _Place, value: ir.Value, key: str) -> tuple[ir.Value, ir.Value | None]:
        """Bring `value` to the main graph; a second value says whether it was computed, None where it always is."""
        chain = []
        step = place
        while step.node is not None and step.outer is not None:
            chain.append(step)
            step = step.outer
        if isinstance(step.owner, ir.Function):
            raise _CannotLeave("it is inside a function; inline the function to see it")
        for step in chain:
            if step.node is not None and step.node.op_type not in ("If", "Loop", "Scan"):
                raise _CannotLeave(f"it is inside the unknown control flow operator {step.node.op_type}")
        if not chain:
            return value, None
        info = self._known.get(key)
        dtype = info.dtype if info is not None and info.dtype is not None else value.dtype
        if dtype is None or (value.type is not None and not isinstance(value.type, ir.TensorType)):
            raise _CannotLeave("its element type is not known, and the other branch must match it")
        rank = len(info.dims) if info is not None and info.dims is not None else 1
        flag: ir.Value | None = None
        flag_rank = 0
        for step in chain:
            assert step.node is not None
            assert isinstance(step.owner, ir.Graph)
            if step.node.op_type == "If":
                flag = flag if flag is not None else self._constant(step.owner, np.array(True), f"{key}/valid")
                value = self._through_if(step.node, step.owner, value, _empty(dtype, rank), key)
                never = ir.tensor(np.zeros((0,) * flag_rank, np.bool_))  # of rank 0: false
                flag = self._through_if(step.node, step.owner, flag, never, f"{key}/valid")
            else:
                value = self._through_loop(step.node, step.owner, value, dtype, key)
                rank += 1
                if flag is not None:
                    flag_rank += 1
                    flag = self._through_loop(step.node, step.owner, flag, ir.DataType.BOOL, f"{key}/valid")
        return value, flag

    def _through_if(
        self, node: ir.Node, branch: ir.Graph, value: ir.Value, placeholder: ir.TensorProtocol, key: str
    ) -> ir.Value:
        for attribute in list(node.attributes.values()):
            graph = attribute.as_graph()
            if graph is branch:
                graph.outputs.append(self._output(branch, value, placeholder.dtype))
            else:
                graph.outputs.append(self._constant(graph, placeholder, key))
        return self._grow(node, placeholder.dtype, key)

    def _through_loop(self, node: ir.Node, body: ir.Graph, value: ir.Value, dtype: ir.DataType, key: str) -> ir.Value:
        if node.op_type == "Scan":
            if self._model.graph.opset_imports.get("", 1) < 9:
                raise _CannotLeave("it is inside a Scan of opset 8, which has other outputs; convert the model first")
            for name in ("scan_output_axes", "scan_output_directions"):
                if name in node.attributes:
                    node.attributes[name] = ir.AttrInt64s(name, [*node.attributes[name].as_ints(), 0])
        body.outputs.append(self._output(body, value, dtype))
        return self._grow(node, dtype, key)

    def _output(self, graph: ir.Graph, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """`value` as it can leave `graph`: made by a node in it, and not an output already."""
        if value.producer() is None or any(value is output for output in graph.outputs):
            value = self._identity(graph, value)
        # No shape: an If merges those of its branches, and the placeholder's would contradict.
        value.type = ir.TensorType(dtype)
        return value

    def _grow(self, node: ir.Node, dtype: ir.DataType, key: str) -> ir.Value:
        node.resize_outputs(len(node.outputs) + 1)
        output = node.outputs[-1]
        output.name = self._fresh(key)
        output.type = ir.TensorType(dtype)
        return output

    def _identity(self, graph: ir.Graph, value: ir.Value) -> ir.Value:
        output = ir.Value(name=self._fresh(_name(value)), type=value.type)
        graph.append(ir.Node("", "Identity", [value], outputs=[output], name=self._fresh(f"{_name(value)}/node")))
        return output

    def _constant(self, graph: ir.Graph, array: np.ndarray | ir.TensorProtocol, key: str) -> ir.Value:
        tensor = ir.tensor(array) if isinstance(array, np.ndarray) else array
        output = ir.Value(name=self._fresh(key), type=ir.TensorType(tensor.dtype))
        attributes = [ir.AttrTensor("value", tensor)]
        graph.append(ir.Node("", "Constant", [], attributes, outputs=[output], name=self._fresh(f"{key}/node")))
        return output

    def _fresh(self, name: str) -> str:
        candidate, count = f"{name}/tap", 2
        while candidate in self._taken:
            candidate, count = f"{name}/tap{count}", count + 1
        self._taken.add(candidate)
        return candidate


class _CannotLeave(Exception):
    """Why a value cannot be made an output."""


def _empty(dtype: ir.DataType, rank: int) -> ir.TensorProtocol:
    """A tensor of no elements (rank 0 has none such: one zero)."""
    shape = (0,) * rank
    if dtype == ir.DataType.STRING:
        return ir.tensor(np.zeros(shape, dtype=object) if rank else np.array("", dtype=object), dtype=dtype)
    return ir.tensor(np.zeros(shape, dtype=dtype.numpy()), dtype=dtype)


def _name(value: ir.Value) -> str:
    assert value.name
    return value.name
