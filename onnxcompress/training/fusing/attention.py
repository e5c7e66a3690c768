"""Products of stacks: keys turned once, scales in one place, Softmax with the product after it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxcompress.autodiff.builder import Builder
from onnxcompress.autodiff.rule import Context, Grads, rule
from onnxcompress.autodiff.rules.linear import stacked_product
from onnxcompress.autodiff.tensor import Tensor
from onnxcompress.training.fusing.domain import DOMAIN
from onnxcompress.training.fusing.patterns import (
    alone,
    before,
    movable_factor,
    only_user,
    perm,
    producer,
    put,
    remove_dead,
    replace,
    sizes,
)


def transposed(b: Builder, node: ir.Node) -> bool:
    """2: [.., r, c] -> [m, r, c] -> [m, c, r] -> [.., c, r]."""
    turn = producer(node, 0, "Transpose")
    merge = producer(turn, 0, "Reshape")
    if node.op_type != "Reshape" or turn is None or merge is None or perm(turn) != [0, 2, 1]:
        return False
    x, y = merge.inputs[0], node.outputs[0]
    first, middle, last = (sizes(v) for v in (x, merge.outputs[0], y))
    if x is None or len(first) != len(last) or len(first) < 3 or not (alone(turn) and alone(merge)):
        return False
    # One size of the stack may be unknown: as much lies in it before and after.
    unlike = sum(a != b or a is None for a, b in zip(first[:-2], last[:-2], strict=True))
    if unlike > 1 or None in first[-2:] or first[-2:] != middle[-2:] or last[-2:] != first[:-3:-1]:
        return False
    replace(b, node, lambda b: [b.wrap(x).swap()])
    return True


def scaled(b: Builder, node: ir.Node) -> bool:
    """3: (a s) (b t) = (a st) b."""
    sides = [found for i in range(2) if (found := movable_factor(node, i))] if node.op_type == "MatMul" else []
    if len(sides) < 2 or sides[0][0].dtype is None:
        return False
    (left, s), (right, t) = sides
    kind = left.dtype or ir.DataType.FLOAT
    (product,) = before(b, node, lambda b: [b.wrap(left) * b.constant(np.float64(s * t), kind)])
    feeding = [x.producer() for x in node.inputs if x is not None]
    node.replace_input_with(0, product)
    node.replace_input_with(1, right)
    for made in feeding:
        remove_dead(made)
    return True


def attention(b: Builder, node: ir.Node) -> bool:
    """6: of the scores along their last axis, times a stack of values."""
    last = node.attributes.get_int("axis", -1) in (-1, len(sizes(node.inputs[0])) - 1)
    product = only_user(node, "MatMul") if node.op_type == "Softmax" and last else None
    scores = node.inputs[0] if product is not None else None
    if product is None or scores is None or product.inputs[0] is not node.outputs[0] or len(sizes(scores)) < 3:
        return False
    values, y = product.inputs[1], product.outputs[0]
    if values is None or len(sizes(values)) != len(sizes(scores)):
        return False
    fused = ir.Node(DOMAIN, "Attention", [scores, values], num_outputs=2, name=product.name)
    fused.outputs[0].name, fused.outputs[0].type, fused.outputs[0].shape = y.name, y.type, y.shape
    p = node.outputs[0]
    fused.outputs[1].name, fused.outputs[1].type, fused.outputs[1].shape = f"{p.name}/factor", p.type, p.shape
    put(product.graph, product, [fused], fused.outputs[:1])  # type: ignore[arg-type]
    return True


@rule("Attention", domain=DOMAIN)
def attention_gradient(c: Context) -> Grads:
    """O = P V, P = softmax(S): dS = P (dP - sum(dO O)) with dP = dO V^T."""
    v, (o, p), g = c.x[1], c.y, c.g
    return [p * (g @ v.swap() - (g * o).sum(-1)), stacked_product(p, g, v).unbroadcast(v)]


def lowered_attention(b: Builder, scores: Tensor, values: Tensor) -> list[Tensor]:
    p = b.op("Softmax", scores, shape=scores.shape, axis=-1)
    return [p @ values, p]
