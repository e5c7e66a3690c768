"""BatchNormalization trained: the statistics of each batch in the forward pass, running ones moved as state.

S. Ioffe, C. Szegedy: Batch normalization, 2015. The autodiff definitions spell the training form out (ReduceMean, then
the inference operator): ONNX Runtime 1.32 on the CPU silently overwrites the running mean its own training mode is fed.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from onnxcompress.encodings import Dense
from onnxcompress.errors import PassError
from onnxcompress.model.weights import Weight, weights

PREFIX, NEXT = "running/", ".next"
MEAN, VARIANCE = 3, 4  # inputs of BatchNormalization


@dataclasses.dataclass(frozen=True)
class Running:
    """Running statistics as graph inputs `running/<weight>`; `<input>.next` is the value that they move to."""

    initial: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def outputs(self) -> list[str]:
        """The values that hold the moved statistics."""
        return [name + NEXT for name in self.initial]

    @staticmethod
    def key(name: str) -> str:
        """The weight that the input `name` stands for."""
        return name.removeprefix(PREFIX)


def track(model: ir.Model) -> Running:
    """Put every BatchNormalization of the main graph, in place, into its training form (`spelled_out` must follow).

    running' = momentum running + (1 - momentum) of the batch, its variance divided by n, as the operator defines it.
    Left as they are: nodes whose statistics other nodes use too, or are no plain constants.
    """
    held: dict[tuple[int, int], Weight] = {}
    for weight in weights(model):
        if _is_own(weight, model):
            held[id(weight.uses[0].node), weight.uses[0].index] = weight
    running = Running()
    for node in model.graph:
        mean, variance = held.get((id(node), MEAN)), held.get((id(node), VARIANCE))
        if node.op_type != "BatchNormalization" or node.domain or mean is None or variance is None:
            continue
        node.attributes.add(ir.AttrInt64("training_mode", 1))
        node.resize_outputs(3)
        for at, weight in ((MEAN, mean), (VARIANCE, variance)):
            array = np.array(weight.array())
            array = array.astype(np.float32) if array.dtype.name in ("float16", "bfloat16") else array
            kind = ir.TensorType(ir.DataType.from_numpy(array.dtype))
            value = ir.Value(name=PREFIX + weight.key, type=kind, shape=ir.Shape(array.shape))
            model.graph.inputs.append(value)
            node.replace_input_with(at, value)
            output = node.outputs[at - MEAN + 1]
            output.name, output.type, output.shape = f"{value.name}{NEXT}", kind, ir.Shape(array.shape)
            running.initial[str(value.name)] = array
            _drop(weight.value)
    return running


def spelled_out(model: ir.Model) -> None:
    """Refuse a graph that would run ONNX Runtime's own training mode.

    Raises:
        PassError: the rank of a BatchNormalization's input is unknown, so it was not spelled out.
    """
    for node in model.graph:
        if node.op_type == "BatchNormalization" and node.attributes.get_int("training_mode"):
            name = node.name or node.outputs[0].name
            raise PassError(
                f"{name}: the rank of its input is not known, so its batch statistics cannot be taken; train with "
                "frozen statistics"
            )


def _is_own(weight: Weight, model: ir.Model) -> bool:
    return (
        weight.owner is model.graph
        and weight.attribute is None
        and len(weight.uses) == 1
        and weight.uses[0].index in (MEAN, VARIANCE)
        and not weight.value.is_graph_output()
        and isinstance(weight.encoding, Dense)
    )


def _drop(value: ir.Value) -> None:
    """Take away a constant that nothing uses any more."""
    graph, node = value.graph, value.producer()
    for use in value.uses():  # behind Identity, or half
        if use.node.op_type in ("Identity", "Cast") and not use.node.outputs[0].uses() and use.node.graph is not None:
            use.node.graph.remove(use.node, safe=True)
    if value.uses() or not isinstance(graph, ir.Graph):
        return
    if node is not None:
        graph.remove(node, safe=True)
    else:
        graph.initializers.pop(str(value.name), None)
