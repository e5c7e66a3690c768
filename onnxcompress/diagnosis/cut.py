"""A model cut at named values: each piece takes what another model computed there, and gives what it makes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from onnxcompress.model import bridge

GIVEN = "/given"  # what the input that stands for a value is called


def cut(model: ir.Model, types: Mapping[str, ir.DataType]) -> ir.Model:
    """A copy of `model` in which whatever reads one of the values `types` reads an input `<name>/given` instead.

    The values themselves are outputs. `types`: names of values of the main graph, with their element types.
    """
    copied = bridge.clone(model)
    made = {value.name: value for node in copied.graph for value in node.outputs}
    outputs = {id(value) for value in copied.graph.outputs}
    for name, dtype in types.items():
        value = made[name]
        given = ir.Value(name=f"{name}{GIVEN}", type=ir.TensorType(dtype))
        for use in list(value.uses()):
            use.node.replace_input_with(use.idx, given)
        copied.graph.inputs.append(given)
        if id(value) not in outputs:
            value.type = ir.TensorType(dtype)
            value.shape = None
            copied.graph.outputs.append(value)
    return copied


def exposed(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """A copy of `model` with `names`, values of its main graph, among its outputs."""
    copied = bridge.clone(model)
    outputs = {value.name for value in copied.graph.outputs}
    made = {value.name: value for node in copied.graph for value in node.outputs}
    for name in names:
        if name not in outputs:
            made[name].shape = None
            copied.graph.outputs.append(made[name])
    return copied
