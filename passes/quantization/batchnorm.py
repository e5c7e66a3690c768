"""Convolutions take in the BatchNormalization behind them, so that one integer operator does both."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxcompress.encodings import recognize
from onnxcompress.encodings.dense import Dense, Masked
from onnxcompress.model.weights import Weight
from onnxcompress.passes.quantization.job import Job
from onnxcompress.passes.quantization.rewrite import drop, integer, real


def fold(found: list[Weight], job: Job) -> None:
    """Fold every inference BatchNormalization that alone consumes a Conv with constant weights of its own.

    w' = w * gamma / sqrt(variance + epsilon),  b' = (b - mean) * gamma / sqrt(variance + epsilon) + beta
    """
    for weight in found:
        if weight.role != "conv" or weight.attribute is not None or weight.encoding.kind not in ("dense", "masked"):
            continue
        if len(weight.uses) == 1 and not weight.uses[0].path and isinstance(weight.owner, ir.Graph):
            conv = weight.uses[0].node
            if conv.op_type == "Conv" and not conv.domain and _fold(weight, conv, job):
                job.count("BatchNormalization folded")


def _fold(weight: Weight, conv: ir.Node, job: Job) -> bool:
    y, graph = conv.outputs[0], conv.graph
    users = list(y.uses())
    if len(users) != 1 or y.is_graph_output() or not isinstance(graph, ir.Graph) or weight.owner is not graph:
        return False
    norm = users[0].node
    if norm.op_type != "BatchNormalization" or norm.domain or norm.graph is not graph or users[0].idx != 0:
        return False
    if integer(norm, "training_mode", 0) or any(output.uses() for output in norm.outputs[1:]):
        return False
    bias_value = conv.inputs[2] if len(conv.inputs) > 2 else None
    constants = [recognize.constant(value) for value in norm.inputs[1:5]]
    bias = recognize.constant(bias_value)
    if any(tensor is None for tensor in constants) or (bias_value is not None and bias is None):
        return False
    gamma, beta, mean, variance = (t.numpy().astype(np.float64) for t in constants if t is not None)
    factor = gamma / np.sqrt(variance + real(norm, "epsilon", 1e-5))
    array = weight.array()
    shift = (0.0 if bias is None else bias.numpy().astype(np.float64)) - mean
    folded = array.astype(np.float64) * factor.reshape(-1, *([1] * (array.ndim - 1)))
    if len(factor) != len(array) or not np.isfinite(folded).all():
        return False
    job.note_overridable(weight)
    folded = folded.astype(array.dtype)
    weight.replace(Masked(folded) if isinstance(weight.encoding, Masked) else Dense(folded))
    if weight.value.is_graph_input():
        graph.inputs.remove(weight.value)
    old, out = list(norm.inputs), norm.outputs[0]
    name, y.shape, y.type = out.name, out.shape, out.type
    out.name = f"{name}.folded"
    y.name = name
    out.replace_all_uses_with(y, replace_graph_outputs=True)
    graph.remove(norm, safe=True)
    conv.resize_inputs(3)
    conv.replace_input_with(2, None)
    for value in [*old[1:], bias_value]:
        drop(value)
    job.forget(value.name or "" for value in old[1:] if value is not None and value.graph is None)
    tape = job.tape(graph)
    conv.replace_input_with(2, tape.constant((shift * factor + beta).astype(array.dtype), f"{name}.bias"))
    tape.place(conv)
    return True
