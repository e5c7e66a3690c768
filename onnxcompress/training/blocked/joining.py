"""Joins a blocked convolution with what follows it: the sum with another image, then Relu, as ONNX Runtime does itself
where weights are constants (its NchwcTransformer)."""

from __future__ import annotations

import onnx_ir as ir

from onnxcompress.training.blocked.layout import DOMAIN

SUMMAND = 3  # the convolution's input that is added to its result


def join(graph: ir.Graph) -> None:
    """Take Add and Relu into the convolutions before them, in place."""
    order = {node: index for index, node in enumerate(graph)}
    for node in list(graph):
        if node.op_type != "Conv" or node.domain != DOMAIN:
            continue
        following = _only_use(node)
        if following is not None and following.op_type == "Add" and _take_sum(node, following, order):
            following = _only_use(node)
        if following is not None and following.op_type == "Relu":
            node.attributes.add(ir.AttrString("activation", "Relu"))
            _replace(following, node)


def _only_use(node: ir.Node) -> ir.Node | None:
    """The node that alone takes the result, in the same graph."""
    result = node.outputs[0]
    uses = list(result.uses())
    if len(uses) != 1 or result.is_graph_output() or uses[0].node.graph is not node.graph or uses[0].node.domain:
        return None
    return uses[0].node


def _take_sum(node: ir.Node, following: ir.Node, order: dict[ir.Node, int]) -> bool:
    """Add the other operand within the convolution, if it is there in time and of the same shape."""
    (other,) = [x for x in following.inputs if x is not node.outputs[0]] or [None]
    result = node.outputs[0]
    if other is None or other.shape != result.shape or following.outputs[0].shape != result.shape:
        return False
    producer = other.producer()
    if producer is not None and order.get(producer, len(order)) >= order[node]:
        return False
    node.resize_inputs(SUMMAND + 1)
    node.replace_input_with(SUMMAND, other)
    _replace(following, node)
    return True


def _replace(following: ir.Node, node: ir.Node) -> None:
    """`node` gives what `following` gave."""
    name, graph = following.outputs[0].name, following.graph
    following.outputs[0].replace_all_uses_with(node.outputs[0], replace_graph_outputs=True)
    assert graph is not None
    graph.remove(following, safe=True)
    if node.outputs[0].is_graph_output():
        node.outputs[0].name = name
