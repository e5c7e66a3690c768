"""Fewer passes over activations in a training step: an elementwise operator costs what it reads and writes.

`part` and `fuse` rewrite the forward graph before it is differentiated, `lower` replaces afterwards what ONNX
has no operator for:

1. Broadcasts of equal free dimensions keep their name (onnx 1.23 loses it), so no gradient is summed at run time to
   undo a broadcast that was none.
2. Reshape, Transpose, Reshape around the last two axes (how exporters transpose keys) is one Transpose.
3. Constants that scale both sides of a product scale one.
4. x times a function of x (Gelu by the error function, SiLU) becomes one node with a gradient of its own.
5. Scale and bias of a LayerNormalization that only layers read go into these: n (g W) + b W, which is work on weights.
6. Softmax and the product after it become one node: sum(dP P) of Softmax's gradient is sum(dO O), which is smaller.
7. An LSTM keeps its gates and cell states, which ONNX Runtime's own operator does not give.
8. A layer whose result is split becomes as many layers (`part`): weights are split, not activations, nor their
   gradients joined.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from onnxcompress.autodiff.builder import Builder
from onnxcompress.autodiff.engine import backward
from onnxcompress.autodiff.errors import NoGradient
from onnxcompress.autodiff.rule import PARTIALS, Context, Grads, rule
from onnxcompress.autodiff.rules import recurrent
from onnxcompress.autodiff.rules.linear import stacked_product
from onnxcompress.autodiff.tensor import Tensor, broadcast

DOMAIN = "onnxcompress.training"
MOST_PARTS = 4
ELEMENTWISE = {*(op for domain, op in PARTIALS if not domain), "Where", "Pow", "Max", "Min", "Sum"}


def part(model: ir.Model) -> None:
    """Rewrites 5 and 8, in place, in this order, so that a normalization goes into one layer and not into three.

    Before `narrow`: the queries of the last layer may be wanted for one position only.
    """
    b = Builder(model.graph, model.opset_imports[""])
    for rewrite in (_normalized, _parted):
        for node in [node for node in model.graph if not node.domain]:
            rewrite(b, node)


def fuse(model: ir.Model) -> None:
    """Rewrite the main graph in place; types and shapes must be on its values."""
    graph = model.graph
    b = Builder(graph, model.opset_imports[""])
    for node in list(graph):
        if node.domain:
            continue
        if node.op_type in ELEMENTWISE:
            _name_sizes(node)
    for node in [node for node in graph if node.inputs]:
        for rewrite in (_transposed, _scaled, _gelu, _silu, _attention, _lstm):
            if node.graph is graph and not node.domain and rewrite(b, node):
                break
    if any(node.domain == DOMAIN for node in graph):
        model.opset_imports[DOMAIN] = 1


# The rewrites, each from the last node of what it looks for -----------------------------------------------------------


def _name_sizes(node: ir.Node) -> None:
    """1: names of free dimensions."""
    y = node.outputs[0]
    if y.shape is None or all(isinstance(size, int) or size.value for size in y.shape) or None in node.inputs:
        return
    wrap = [Tensor(None, x).shape for x in node.inputs if x is not None]  # type: ignore[arg-type]
    found = wrap[0]
    for other in wrap[1:]:
        found = broadcast(found, other)
    if found is not None:
        y.shape = ir.Shape(found)


def _transposed(b: Builder, node: ir.Node) -> bool:
    """2: [.., r, c] -> [m, r, c] -> [m, c, r] -> [.., c, r]."""
    turn = _producer(node, 0, "Transpose")
    merge = _producer(turn, 0, "Reshape")
    if node.op_type != "Reshape" or turn is None or merge is None or _perm(turn) != [0, 2, 1]:
        return False
    x, y = merge.inputs[0], node.outputs[0]
    first, middle, last = (_sizes(v) for v in (x, merge.outputs[0], y))
    if x is None or len(first) != len(last) or len(first) < 3 or not (_alone(turn) and _alone(merge)):
        return False
    # One size of the stack may be unknown: as much lies in it before and after.
    unlike = sum(a != b or a is None for a, b in zip(first[:-2], last[:-2], strict=True))
    if unlike > 1 or None in first[-2:] or first[-2:] != middle[-2:] or last[-2:] != first[:-3:-1]:
        return False
    _replace(b, node, lambda b: [b.wrap(x).swap()])
    return True


def _parted(b: Builder, node: ir.Node) -> bool:
    """8: x (W1 W2 W3) + b, then split, as queries, keys and values are."""
    plus = _producer(node, 0, "Add")
    if node.op_type != "Split" or plus is None or not _alone(plus):
        return False
    layer = _producer(plus, 0, "MatMul") or _producer(plus, 1, "MatMul")
    if layer is None or not _alone(layer):
        return False
    bias, x, w = _other(plus, layer.outputs[0]), layer.inputs[0], layer.inputs[1]
    rank = len(_sizes(x))
    if bias is None or x is None or w is None or len(_sizes(w)) != 2 or len(_sizes(bias)) != 1 or rank < 2:
        return False
    if node.attributes.get_int("axis", 0) % rank != rank - 1:
        return False
    sizes = [size for y in node.outputs if isinstance(size := _sizes(y)[-1], int)]
    if len(sizes) < len(node.outputs) or len(sizes) > MOST_PARTS:
        return False

    def write(b: Builder) -> list[Tensor]:
        cut = b.ints(sizes)
        ws = b.ops("Split", b.wrap(w), cut, outputs=len(sizes), axis=1)
        bs = b.ops("Split", b.wrap(bias), cut, outputs=len(sizes), axis=0)
        found = []
        for part, shift, size in zip(ws, bs, sizes, strict=True):
            found.append(b.wrap(x) @ part.shaped(_sizes(w)[0], size) + shift.shaped(size))
        return found

    _replace(b, node, write)
    return True


def _scaled(b: Builder, node: ir.Node) -> bool:
    """3: (a s) (b t) = (a st) b."""
    sides = [found for i in range(2) if (found := _scale(node, i))] if node.op_type == "MatMul" else []
    if len(sides) < 2 or sides[0][0].dtype is None:
        return False
    (left, s), (right, t) = sides
    kind = left.dtype or ir.DataType.FLOAT
    (product,) = _before(b, node, lambda b: [b.wrap(left) * b.constant(np.float64(s * t), kind)])
    before = [x.producer() for x in node.inputs if x is not None]
    node.replace_input_with(0, product)
    node.replace_input_with(1, right)
    for other in before:
        _remove_dead(other)
    return True


def _gelu(b: Builder, node: ir.Node) -> bool:
    """4: x (1 + erf(x / sqrt 2)) / 2, in whichever order it is multiplied; the standard's own Gelu."""
    if node.op_type == "Gelu" and _text(node, "approximate", "none") == "none":
        return _become(node, node.inputs[0], "Gelu")
    if node.op_type != "Erf":
        return False
    scaled = _factor(node, 0)
    plus = _only_user(node, "Add")
    if scaled is None or not math.isclose(scaled[1], math.sqrt(0.5), rel_tol=1e-5) or plus is None:
        return False
    x, one = scaled[0], _other(plus, node.outputs[0])
    first = _only_user(plus, "Mul")
    if _number(one) != 1 or first is None:
        return False
    beside = _other(first, plus.outputs[0])
    half = beside.producer() if beside is not None else None
    if half is not None and _alone(half) and _multiple(half) == (x, 0.5):
        return _become(first, x, "Gelu")
    second = _only_user(first, "Mul")
    if second is None or {_number(beside), _number(_other(second, first.outputs[0]))} != {0.5, None}:
        return False
    if x not in (beside, _other(second, first.outputs[0])):
        return False
    return _become(second, x, "Gelu")


def _silu(b: Builder, node: ir.Node) -> bool:
    """4: x sigmoid(x)."""
    product = _only_user(node, "Mul") if node.op_type == "Sigmoid" else None
    if product is None or _other(product, node.outputs[0]) is not node.inputs[0]:
        return False
    return _become(product, node.inputs[0], "Swish")


def _normalized(b: Builder, node: ir.Node) -> bool:
    """5: only where every reader is a layer.

    Not after an addition of which nothing else is needed: ONNX Runtime 1.32 would take both for a
    SkipLayerNormalization, which runs five times as long on narrow rows.
    """
    added = _producer(node, 0, "Add")
    if added is not None and _alone(added):
        return False
    if node.op_type != "LayerNormalization" or len(_sizes(node.inputs[1])) != 1 or node.outputs[0].is_graph_output():
        return False
    (width,), y = _sizes(node.inputs[1]), node.outputs[0]
    scale, bias = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
    layers = [use.node for use in y.uses() if use.node.op_type == "MatMul" and use.idx == 0 and not use.node.domain]
    sizes = [_sizes(layer.inputs[1]) for layer in layers]
    if not layers or len(layers) < len(y.uses()) or any(extra.uses() for extra in node.outputs[1:]):
        return False
    if scale is None or not isinstance(width, int) or _ones(scale) or any(len(size) != 2 for size in sizes):
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
    (product,) = _before(b, layer, lambda b: [b.wrap(w) * b.wrap(scale).unsqueeze(1)])
    layer.replace_input_with(1, product)
    if bias is None:
        return
    plus, y = _only_user(layer, "Add"), layer.outputs[0]
    other = None if plus is None else _other(plus, y)
    if plus is not None and other is not None and len(_sizes(other)) == 1:
        (shift,) = _before(b, plus, lambda b: [b.wrap(other) + (b.wrap(bias).unsqueeze(0) @ b.wrap(w)).squeeze(0)])
        plus.replace_input_with(1 if plus.inputs[1] is other else 0, shift)
        return
    x = layer.inputs[0]
    assert x is not None
    _replace(b, layer, lambda b: [b.wrap(x) @ b.wrap(product) + (b.wrap(bias).unsqueeze(0) @ b.wrap(w)).squeeze(0)])


def _attention(b: Builder, node: ir.Node) -> bool:
    """6: of the scores along their last axis, times a stack of values."""
    last = node.attributes.get_int("axis", -1) in (-1, len(_sizes(node.inputs[0])) - 1)
    product = _only_user(node, "MatMul") if node.op_type == "Softmax" and last else None
    scores = node.inputs[0] if product is not None else None
    if product is None or scores is None or product.inputs[0] is not node.outputs[0] or len(_sizes(scores)) < 3:
        return False
    values, y = product.inputs[1], product.outputs[0]
    if values is None or len(_sizes(values)) != len(_sizes(scores)):
        return False
    fused = ir.Node(DOMAIN, "Attention", [scores, values], num_outputs=2, name=product.name)
    fused.outputs[0].name, fused.outputs[0].type, fused.outputs[0].shape = y.name, y.type, y.shape
    p = node.outputs[0]
    fused.outputs[1].name, fused.outputs[1].type, fused.outputs[1].shape = f"{p.name}/factor", p.type, p.shape
    _put(product.graph, product, [fused], fused.outputs[:1])  # type: ignore[arg-type]
    return True


def _lstm(b: Builder, node: ir.Node) -> bool:
    """7: where its gradient has a rule."""
    if node.op_type != "LSTM" or node.inputs[0] is None or node.inputs[0].dtype is None:
        return False
    try:
        recurrent.check(_context(b, node), recurrent.LSTM_ACTIVATIONS)
    except NoGradient:
        return False
    ways = 2 if _text(node, "direction", "forward") == "bidirectional" else 1
    hidden = node.attributes.get_int("hidden_size", 0)
    count = 3 + ways * recurrent.KEPT
    fused = ir.Node(DOMAIN, "LSTM", node.inputs, list(node.attributes.values()), num_outputs=count, name=node.name)
    for i, output in enumerate(fused.outputs):
        given = node.outputs[i] if i < len(node.outputs) else None
        output.name = given.name if given is not None and given.name else f"{node.outputs[0].name}/kept_{i}"
        output.type, output.shape = ir.TensorType(node.inputs[0].dtype), None if given is None else given.shape
        if i >= 3:
            output.shape = ir.Shape([None, None, 3 * hidden if (i - 3) % recurrent.KEPT == 0 else hidden])
    _put(node.graph, node, [fused], fused.outputs[: len(node.outputs)])  # type: ignore[arg-type]
    return True


def _context(b: Builder, node: ir.Node) -> Context:
    """What a rule gets, for reading a node."""
    x = [b.wrap(value) if value is not None else None for value in node.inputs]
    return Context(b, node, x, [b.wrap(y) for y in node.outputs], [], [], backward)  # type: ignore[arg-type]


def _become(last: ir.Node, x: ir.Value | None, kind: str) -> bool:
    """The node `kind` takes the place of `last`; with the function of x and what the gradient needs besides."""
    graph, y = last.graph, last.outputs[0]
    if x is None or not isinstance(graph, ir.Graph):
        return False
    node = ir.Node(DOMAIN, kind, [x], num_outputs=3, name=last.name)
    for output, end in zip(node.outputs, ("", "/factor", "/scaled"), strict=True):
        output.name, output.type, output.shape = f"{y.name}{end}", y.type, x.shape
    _put(graph, last, [node], node.outputs[:1])
    return True


# Gradients, and what the fused nodes stand for ------------------------------------------------------------------------


@rule("Gelu", domain=DOMAIN)
def gelu_gradient(c: Context) -> Grads:
    """P(x) + x p(x), P and p the normal distribution and its density; 1 / sqrt(2 pi) goes into the exponent."""
    x, u = c.x[0], c.y[2]
    density = (-math.log(math.sqrt(2 * math.pi)) - u * u).map("Exp")
    return [c.g * (c.y[1] + density * x)]


@rule("Swish", domain=DOMAIN)
def silu_gradient(c: Context) -> Grads:
    """s + y (1 - s)."""
    y, s = c.y[0], c.y[1]
    return [c.g * (s + y * (1 - s))]


@rule("Attention", domain=DOMAIN)
def attention_gradient(c: Context) -> Grads:
    """O = P V, P = softmax(S): dS = P (dP - sum(dO O)) with dP = dO V^T."""
    v, (o, p), g = c.x[1], c.y, c.g
    return [p * (g @ v.swap() - (g * o).sum(-1)), stacked_product(p, g, v).unbroadcast(v)]


rule("LSTM", domain=DOMAIN)(recurrent.lstm_with_kept)


def _lowered_attention(b: Builder, scores: Tensor, values: Tensor) -> list[Tensor]:
    p = b.op("Softmax", scores, shape=scores.shape, axis=-1)
    return [p @ values, p]


def _lowered_gelu(b: Builder, x: Tensor) -> list[Tensor]:
    u = x * math.sqrt(0.5)
    p = u.map("Erf").map("HardSigmoid", alpha=0.5, beta=0.5)  # (1 + erf) / 2 in one pass
    return [x * p, p, u]


def _lowered_silu(b: Builder, x: Tensor) -> list[Tensor]:
    s = x.map("Sigmoid")
    return [x * s, s, x]


_LOWERED: dict[str, Callable[..., list[Tensor]]] = {
    "Attention": _lowered_attention,
    "Gelu": _lowered_gelu,
    "Swish": _lowered_silu,
}


def lower(model: ir.Model) -> None:
    """Replace the nodes of `fuse` by standard operators."""
    b = Builder(model.graph, model.opset_imports[""])
    for node in list(model.graph):
        if node.domain == DOMAIN:
            _replace(b, node, functools.partial(_written, node))
    model.opset_imports.pop(DOMAIN, None)


def _written(node: ir.Node, b: Builder) -> list[Tensor]:
    if node.op_type == "LSTM":
        return recurrent.lstm_forward(_context(b, node))
    return _LOWERED[node.op_type](b, *(b.wrap(x) for x in node.inputs if x is not None))


# Looking around in a graph --------------------------------------------------------------------------------------------


def _replace(b: Builder, node: ir.Node, write: Callable[[Builder], Sequence[Tensor]]) -> None:
    """What `write` writes takes the place of `node`."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    scratch = b.inside(ir.Graph([], [], nodes=[]))
    scratch.scope = node.name or str(node.outputs[0].name)
    results = [tensor.value for tensor in write(scratch)]
    nodes = list(scratch.graph)
    scratch.graph.remove(nodes)
    _put(graph, node, nodes, results)


def _before(b: Builder, node: ir.Node, write: Callable[[Builder], Sequence[Tensor]]) -> list[ir.Value]:
    """What `write` writes, put before `node`."""
    scratch = b.inside(ir.Graph([], [], nodes=[]))
    scratch.scope = node.name or str(node.outputs[0].name)
    results = [tensor.value for tensor in write(scratch)]
    nodes = list(scratch.graph)
    scratch.graph.remove(nodes)
    assert isinstance(node.graph, ir.Graph)
    node.graph.insert_before(node, nodes)
    return results


def _put(graph: ir.Graph, old: ir.Node, nodes: Sequence[ir.Node], results: Sequence[ir.Value]) -> None:
    """`nodes` with `results` take the place of `old`, and of what it alone used."""
    before = [x.producer() for x in old.inputs if x is not None]
    shapes = [value.shape for value in results]
    ir.convenience.replace_nodes_and_values(graph, old, [old], nodes, old.outputs[: len(results)], results)
    for value, shape in zip(results, shapes, strict=True):
        value.shape = shape or value.shape
    for other in before:
        _remove_dead(other)


def _remove_dead(node: ir.Node | None) -> None:
    """Remove a node without users, then what it alone used."""
    if node is None or not isinstance(node.graph, ir.Graph):
        return
    if any(y.uses() or y.is_graph_output() for y in node.outputs):
        return
    feeding = [x.producer() for x in node.inputs if x is not None]
    node.graph.remove(node, safe=True)
    for other in feeding:
        _remove_dead(other)


def _alone(node: ir.Node) -> bool:
    """One output with one use, none of the graph's."""
    y = node.outputs[0]
    return len(node.outputs) == 1 and len(y.uses()) == 1 and not y.is_graph_output()


def _only_user(node: ir.Node, op_type: str) -> ir.Node | None:
    user = next(iter(node.outputs[0].uses())).node if _alone(node) else None
    return user if user is not None and user.op_type == op_type and not user.domain else None


def _producer(node: ir.Node | None, index: int, op_type: str) -> ir.Node | None:
    value = node.inputs[index] if node is not None and len(node.inputs) > index else None
    found = value.producer() if value is not None else None
    return found if found is not None and found.op_type == op_type and not found.domain else None


def _other(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """The operand beside `value`."""
    return node.inputs[1] if node.inputs[0] is value else node.inputs[0]


def _number(value: ir.Value | None) -> float | None:
    """The constant scalar that a value holds."""
    tensor = None if value is None or value.is_graph_input() else ir.convenience.get_const_tensor(value)
    return float(tensor.numpy().reshape(-1)[0]) if tensor is not None and tensor.size == 1 else None


def _ones(value: ir.Value) -> bool:
    tensor = None if value.is_graph_input() else ir.convenience.get_const_tensor(value)
    return tensor is not None and bool((tensor.numpy() == 1).all())


def _multiple(node: ir.Node) -> tuple[ir.Value, float] | None:
    """x and s of a node that makes x * s or x / (1 / s)."""
    if node.domain or node.op_type not in ("Mul", "Div"):
        return None
    a, b = node.inputs
    for x, s in ((a, _number(b)), (b, _number(a))):
        if x is not None and s is not None and (node.op_type == "Mul" or x is a) and s != 0:
            return x, s if node.op_type == "Mul" else 1 / s
    return None


def _factor(node: ir.Node, index: int) -> tuple[ir.Value, float] | None:
    value = node.inputs[index]
    made = value.producer() if value is not None else None
    return None if made is None else _multiple(made)


def _scale(node: ir.Node, index: int) -> tuple[ir.Value, float] | None:
    """A factor that may be moved, since nobody else uses its product, and that adds no axes."""
    found, value = _factor(node, index), node.inputs[index]
    made = value.producer() if value is not None else None
    if found is None or made is None or not _alone(made) or len(_sizes(found[0])) != len(_sizes(value)):
        return None
    return found


def _sizes(value: ir.Value | None) -> list[int | str | None]:
    if value is None or value.shape is None:
        return []
    return [size if isinstance(size, int) else size.value for size in value.shape]


def _perm(node: ir.Node) -> list[int]:
    return [int(i) for i in node.attributes.get_ints("perm") or ()]


def _text(node: ir.Node, name: str, default: str) -> str:
    attribute = node.attributes.get(name)
    return default if attribute is None else str(attribute.value)
