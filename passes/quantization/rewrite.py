"""Small steps that every rewrite of a graph takes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxcompress.encodings import recognize
from onnxcompress.encodings.base import Tape
from onnxcompress.model.roles import Use


def take_over(tape: Tape, node: ir.Node, fresh: ir.Value) -> None:
    """Let `fresh`, recorded on `tape`, stand for the first output of `node`, under its name; remove `node`."""
    old = node.outputs[0]
    name = old.name
    old.name = f"{name}.replaced"
    fresh.name, fresh.shape, fresh.type = name, old.shape, old.type
    fresh.metadata_props.update(old.metadata_props)
    made = fresh.producer()
    if made is not None and not made.name:
        made.name = node.name
    tape.place(node)
    old.replace_all_uses_with(fresh, replace_graph_outputs=True)
    owner, inputs = node.graph, list(node.inputs)
    assert owner is not None
    owner.remove(node, safe=True)
    for value in inputs:
        drop(value)


def drop(value: ir.Value | None) -> None:
    """Remove a value that nothing uses any more, and what made it for it alone."""
    if value is None or value.uses() or value.is_graph_output():
        return
    node = value.producer()
    if node is None:
        graph = value.graph
        if value.is_initializer() and isinstance(graph, ir.Graph):
            if value.is_graph_input():
                graph.inputs.remove(value)
            graph.initializers.pop(value.name or "", None)
        return
    if node.graph is None or any(output.uses() or output.is_graph_output() for output in node.outputs):
        return
    inputs = list(node.inputs)
    node.graph.remove(node, safe=True)
    for source in inputs:
        drop(source)


def after(value: ir.Value, owner: ir.Graph) -> ir.Node | None:
    """The node of `owner` before which something made of `value` is inserted, ahead of all its uses there.

    None: `value` comes out of the last node, or `owner` has none.
    """
    node = value.producer()
    nodes = iter(owner)
    if node is not None and node.graph is owner:
        for candidate in nodes:
            if candidate is node:
                break
    return next(nodes, None)


def as_seen(use: Use, array: np.ndarray) -> np.ndarray | None:
    """The weight as its consumer sees it, through casts and transposes; None where anything else lies in between."""
    graph = use.node.graph
    for node in use.path:
        if node.graph is not graph or node.domain not in ("", "ai.onnx"):
            return None
        if node.op_type == "Cast":
            array = array.astype(ir.DataType(node.attributes["to"].as_int()).numpy())
        elif node.op_type == "Transpose":
            perm = node.attributes.get("perm")
            array = array.transpose(perm.as_ints() if perm is not None else None)
        elif node.op_type != "Identity":
            return None
    return array


def integer(node: ir.Node, name: str, default: int) -> int:
    """An integer attribute, or what it is when not given."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def real(node: ir.Node, name: str, default: float) -> float:
    """A float attribute, or what it is when not given."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_float()


def plain_gemm(node: ir.Node) -> bool:
    """True for a Gemm that is A x B + C: nothing scaled, A not turned."""
    return not integer(node, "transA", 0) and real(node, "alpha", 1.0) == 1.0 and real(node, "beta", 1.0) == 1.0


def is_constant(value: ir.Value | None) -> bool:
    """True for an initializer or Constant."""
    return recognize.constant(value) is not None
