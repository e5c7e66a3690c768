"""An LSTM that keeps its gates and cell states."""

from __future__ import annotations

import onnx_ir as ir

from onnxcompress.autodiff.builder import Builder
from onnxcompress.autodiff.errors import NoGradient
from onnxcompress.autodiff.rule import rule
from onnxcompress.autodiff.rules import recurrent as rules
from onnxcompress.training.fusing.domain import DOMAIN
from onnxcompress.training.fusing.patterns import context, put, text

rule("LSTM", domain=DOMAIN)(rules.lstm_with_kept)


def lstm(b: Builder, node: ir.Node) -> bool:
    """7: where its gradient has a rule."""
    if node.op_type != "LSTM" or node.inputs[0] is None or node.inputs[0].dtype is None:
        return False
    try:
        rules.check(context(b, node), rules.LSTM_ACTIVATIONS)
    except NoGradient:
        return False
    ways = 2 if text(node, "direction", "forward") == "bidirectional" else 1
    hidden = node.attributes.get_int("hidden_size", 0)
    count = 3 + ways * rules.KEPT
    fused = ir.Node(DOMAIN, "LSTM", node.inputs, list(node.attributes.values()), num_outputs=count, name=node.name)
    for i, output in enumerate(fused.outputs):
        given = node.outputs[i] if i < len(node.outputs) else None
        output.name = given.name if given is not None and given.name else f"{node.outputs[0].name}/kept_{i}"
        output.type, output.shape = ir.TensorType(node.inputs[0].dtype), None if given is None else given.shape
        if i >= 3:
            output.shape = ir.Shape([None, None, 3 * hidden if (i - 3) % rules.KEPT == 0 else hidden])
    put(node.graph, node, [fused], fused.outputs[: len(node.outputs)])  # type: ignore[arg-type]
    return True
