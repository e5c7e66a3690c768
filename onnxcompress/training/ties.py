"""Vectors that an exporter merged because they happened to be equal, which training would hold equal for ever.

PyTorch's exporter keeps one of all initializers with the same bytes: the scales of freshly made normalizations, biases
of 0, running means. What authors tie on purpose are matrices (embedding and language model head, layers used twice).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxcompress.autodiff.builder import Builder
from onnxcompress.encodings import Dense
from onnxcompress.model.weights import Weight, weights


def untie(model: ir.Model) -> dict[str, str]:
    """Give each use of a merged vector an initializer of its own, in place; new weight -> the one it was merged into.

    1. What goes through Identity was merged, as the exporter leaves the old name there: it takes that name.
    2. A vector of equal numbers (0, 1) that biases and normalizations share directly was, too; `<name>_1`, ... are new.
    3. Other vectors that several nodes use directly, and all matrices, are one weight used several times.
    """
    made: dict[str, str] = {}
    names = Builder(model.graph, 0)
    for weight in weights(model):
        if _is_vector(weight, model):
            _split_identities(weight, made)
            _split_uses(weight, names, made)
    return made


def _is_vector(weight: Weight, model: ir.Model) -> bool:
    return (
        weight.owner is model.graph
        and weight.value.is_initializer()
        and isinstance(weight.encoding, Dense)
        and sum(1 for d in weight.shape if d != 1) <= 1
        and len(weight.uses) > 1
        and not weight.value.is_graph_input()
        and not weight.value.is_graph_output()
        and all(use.role in ("bias", "norm", "other") for use in weight.uses)
    )


def _split_identities(weight: Weight, made: dict[str, str]) -> None:
    graph, waiting = weight.owner, [weight.value]
    assert isinstance(graph, ir.Graph)
    while waiting:
        for node, _ in list(waiting.pop().uses()):
            output = node.outputs[0]
            if node.op_type != "Identity" or node.domain or node.graph is not graph or output.is_graph_output():
                continue
            fresh = _copy(weight, str(output.name))
            output.replace_all_uses_with(fresh)
            graph.remove(node, safe=True)
            graph.register_initializer(fresh)
            made[str(fresh.name)] = weight.key
            waiting.append(fresh)


def _split_uses(weight: Weight, names: Builder, made: dict[str, str]) -> None:
    array = weight.array()
    first = np.asarray(array).reshape(-1)[:1]
    if not np.array_equal(array, np.broadcast_to(first, array.shape)):
        return
    graph = weight.owner
    assert isinstance(graph, ir.Graph)
    direct = {(id(use.node), use.index) for use in weight.uses if use.role in ("bias", "norm")}
    uses = [use for use in weight.value.uses() if (id(use.node), use.idx) in direct and use.node.graph is graph]
    if len(uses) == len(weight.value.uses()):
        uses = uses[1:]
    for use in uses:
        fresh = _copy(weight, names.name(str(weight.value.name)))
        graph.register_initializer(fresh)
        use.node.replace_input_with(use.idx, fresh)
        made[str(fresh.name)] = weight.key


def _copy(weight: Weight, name: str) -> ir.Value:
    tensor = ir.tensor(np.array(weight.array()), name=name)
    return ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(weight.shape))
