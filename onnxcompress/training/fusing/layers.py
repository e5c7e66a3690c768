"""Work on weights instead of on activations."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxcompress.autodiff.builder import Builder
from onnxcompress.autodiff.tensor import Tensor
from onnxcompress.training.fusing.patterns import alone, before, ones, only_user, other, producer, replace, sizes

MOST_PARTS = 4


def parted(b: Builder, node: ir.Node) -> bool:
    """8: x (W1 W2 W3) + b, then split, as queries, keys and values are."""
    plus = producer(node, 0, "Add")
    if node.op_type != "Split" or plus is None or not alone(plus):
        return False
    layer = producer(plus, 0, "MatMul") or producer(plus, 1, "MatMul")
    if layer is None or not alone(layer):
        return False
    bias, x, w = other(plus, layer.outputs[0]), layer.inputs[0], layer.inputs[1]
    rank = len(sizes(x))
    if bias is None or x is None or w is None or len(sizes(w)) != 2 or len(sizes(bias)) != 1 or rank < 2:
        return False
    if node.attributes.get_int("axis", 0) % rank != rank - 1:
        return False
    widths = [width for y in node.outputs if isinstance(width := sizes(y)[-1], int)]
    if len(widths) < len(node.outputs) or len(widths) > MOST_PARTS:
        return False

    def write(b: Builder) -> list[Tensor]:
        cut = b.ints(widths)
        ws = b.ops("Split", b.wrap(w), cut, outputs=len(widths), axis=1)
        bs = b.ops("Split", b.wrap(bias), cut, outputs=len(widths), axis=0)
        found = []
        for part, shift, width in zip(ws, bs, widths, strict=True):
            found.append(b.wrap(x) @ part.shaped(sizes(w)[0], width) + shift.shaped(width))
        return found

    replace(b, node, write)
    return True


def normalized(b: Builder, node: ir.Node) -> bool:
    """5: only where every reader is a layer.

    Not after an addition of which nothing else is needed: ONNX Runtime 1.32 would take both for a
    SkipLayerNormalization, which runs five times as long on narrow rows.
    """
    added = producer(node, 0, "Add")
    if added is not None and alone(added):
        return False
    if node.op_type != "LayerNormalization" or len(sizes(node.inputs[1])) != 1 or node.outputs[0].is_graph_output():
        return False
    (width,), y = sizes(node.inputs[1]), node.outputs[0]
    scale, bias = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
    layers = [use.node for use in y.uses() if use.node.op_type == "MatMul" and use.idx == 0 and not use.node.domain]
    wide = [sizes(layer.inputs[1]) for layer in layers]
    if not layers or len(layers) < len(y.uses()) or any(extra.uses() for extra in node.outputs[1:]):
        return False
    if scale is None or not isinstance(width, int) or ones(scale) or any(len(size) != 2 for size in wide):
        return False
    for layer in layers:
        _scale_layer(b, layer, scale, bias)
    one = b.constant(np.ones(width), scale.dtype or ir.DataType.FLOAT)
    node.replace_input_with(1, one.value)
    if bias is not None:
        node.resize_inputs(2)
    return True


def _scale_layer(b: Builder, layer: ir.Node, scale: ir.Value, bias: ir.Value | None) -> None:
    """(n g + b) W + c = n (g W) + (b W + c)."""
    w = layer.inputs[1]
    assert w is not None
    (product,) = before(b, layer, lambda b: [b.wrap(w) * b.wrap(scale).unsqueeze(1)])
    layer.replace_input_with(1, product)
    if bias is None:
        return
    plus, y = only_user(layer, "Add"), layer.outputs[0]
    shift_of = None if plus is None else other(plus, y)
    if plus is not None and shift_of is not None and len(sizes(shift_of)) == 1:
        (shift,) = before(b, plus, lambda b: [b.wrap(shift_of) + (b.wrap(bias).unsqueeze(0) @ b.wrap(w)).squeeze(0)])
        plus.replace_input_with(1 if plus.inputs[1] is shift_of else 0, shift)
        return
    x = layer.inputs[0]
    assert x is not None
    replace(b, layer, lambda b: [b.wrap(x) @ b.wrap(product) + (b.wrap(bias).unsqueeze(0) @ b.wrap(w)).squeeze(0)])
