"""Looking around in a graph, and putting something else in a node's place."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from onnxcompress.autodiff.builder import Builder
from onnxcompress.autodiff.engine import backward
from onnxcompress.autodiff.rule import Context
from onnxcompress.autodiff.tensor import Tensor

Write = Callable[[Builder], Sequence[Tensor]]


def replace(b: Builder, node: ir.Node, write: Write) -> None:
    """What `write` writes takes the place of `node`."""
    assert isinstance(node.graph, ir.Graph)
    nodes, results = _written(b, node, write)
    put(node.graph, node, nodes, results)


def before(b: Builder, node: ir.Node, write: Write) -> list[ir.Value]:
    """What `write` writes, put before `node`."""
    assert isinstance(node.graph, ir.Graph)
    nodes, results = _written(b, node, write)
    node.graph.insert_before(node, nodes)
    return results


def _written(b: Builder, node: ir.Node, write: Write) -> tuple[list[ir.Node], list[ir.Value]]:
    """Nodes that are in no graph yet, under the name of `node`, and what they make."""
    scratch = b.inside(ir.Graph([], [], nodes=[]))
    scratch.scope = node.name or str(node.outputs[0].name)
    results = [tensor.value for tensor in write(scratch)]
    nodes = list(scratch.graph)
    scratch.graph.remove(nodes)
    return nodes, results


def put(graph: ir.Graph, old: ir.Node, nodes: Sequence[ir.Node], results: Sequence[ir.Value]) -> None:
    """`nodes` with `results` take the place of `old`, and of what it alone used."""
    before = [x.producer() for x in old.inputs if x is not None]
    shapes = [value.shape for value in results]
    ir.convenience.replace_nodes_and_values(graph, old, [old], nodes, old.outputs[: len(results)], results)
    for value, shape in zip(results, shapes, strict=True):
        value.shape = shape or value.shape
    for other in before:
        remove_dead(other)


def remove_dead(node: ir.Node | None) -> None:
    """Remove a node without users, then what it alone used."""
    if node is None or not isinstance(node.graph, ir.Graph):
        return
    if any(y.uses() or y.is_graph_output() for y in node.outputs):
        return
    feeding = [x.producer() for x in node.inputs if x is not None]
    node.graph.remove(node, safe=True)
    for other in feeding:
        remove_dead(other)


def alone(node: ir.Node) -> bool:
    """One output with one use, none of the graph's."""
    y = node.outputs[0]
    return len(node.outputs) == 1 and len(y.uses()) == 1 and not y.is_graph_output()


def only_user(node: ir.Node, op_type: str) -> ir.Node | None:
    user = next(iter(node.outputs[0].uses())).node if alone(node) else None
    return user if user is not None and user.op_type == op_type and not user.domain else None


def producer(node: ir.Node | None, index: int, op_type: str) -> ir.Node | None:
    value = node.inputs[index] if node is not None and len(node.inputs) > index else None
    found = value.producer() if value is not None else None
    return found if found is not None and found.op_type == op_type and not found.domain else None


def other(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """The operand beside `value`."""
    return node.inputs[1] if node.inputs[0] is value else node.inputs[0]


def number(value: ir.Value | None) -> float | None:
    """The constant scalar that a value holds."""
    tensor = None if value is None or value.is_graph_input() else ir.convenience.get_const_tensor(value)
    return float(tensor.numpy().reshape(-1)[0]) if tensor is not None and tensor.size == 1 else None


def ones(value: ir.Value) -> bool:
    tensor = None if value.is_graph_input() else ir.convenience.get_const_tensor(value)
    return tensor is not None and bool((tensor.numpy() == 1).all())


def multiple(node: ir.Node) -> tuple[ir.Value, float] | None:
    """x and s of a node that makes x * s or x / (1 / s)."""
    if node.domain or node.op_type not in ("Mul", "Div"):
        return None
    a, b = node.inputs
    for x, s in ((a, number(b)), (b, number(a))):
        if x is not None and s is not None and (node.op_type == "Mul" or x is a) and s != 0:
            return x, s if node.op_type == "Mul" else 1 / s
    return None


def factor(node: ir.Node, index: int) -> tuple[ir.Value, float] | None:
    value = node.inputs[index]
    made = value.producer() if value is not None else None
    return None if made is None else multiple(made)


def movable_factor(node: ir.Node, index: int) -> tuple[ir.Value, float] | None:
    """A factor that may be moved, since nobody else uses its product, and that adds no axes."""
    found, value = factor(node, index), node.inputs[index]
    made = value.producer() if value is not None else None
    if found is None or made is None or not alone(made) or len(sizes(found[0])) != len(sizes(value)):
        return None
    return found


def sizes(value: ir.Value | None) -> list[int | str | None]:
    if value is None or value.shape is None:
        return []
    return [size if isinstance(size, int) else size.value for size in value.shape]


def perm(node: ir.Node) -> list[int]:
    return [int(i) for i in node.attributes.get_ints("perm") or ()]


def text(node: ir.Node, name: str, default: str) -> str:
    attribute = node.attributes.get(name)
    return default if attribute is None else str(attribute.value)


def context(b: Builder, node: ir.Node) -> Context:
    """What a rule gets, for reading a node."""
    x = [b.wrap(value) if value is not None else None for value in node.inputs]
    return Context(b, node, x, [b.wrap(y) for y in node.outputs], [], [], backward)  # type: ignore[arg-type]
