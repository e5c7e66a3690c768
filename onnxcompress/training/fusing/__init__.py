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
from collections.abc import Callable

import onnx_ir as ir

from onnxcompress.autodiff.builder import Builder
from onnxcompress.autodiff.rule import PARTIALS
from onnxcompress.autodiff.rules.recurrent import lstm_forward
from onnxcompress.autodiff.tensor import Tensor, broadcast
from onnxcompress.training.fusing import activations, attention, layers, recurrent
from onnxcompress.training.fusing.domain import DOMAIN as DOMAIN
from onnxcompress.training.fusing.patterns import context, replace

ELEMENTWISE = {*(op for domain, op in PARTIALS if not domain), "Where", "Pow", "Max", "Min", "Sum"}
_REWRITES = (
    attention.transposed,
    attention.scaled,
    activations.gelu,
    activations.silu,
    attention.attention,
    recurrent.lstm,
)
_LOWERED: dict[str, Callable[..., list[Tensor]]] = {
    "Attention": attention.lowered_attention,
    "Gelu": activations.lowered_gelu,
    "Swish": activations.lowered_silu,
}


def part(model: ir.Model) -> None:
    """Rewrites 5 and 8, in place, in this order, so that a normalization goes into one layer and not into three.

    Before `narrow`: the queries of the last layer may be wanted for one position only.
    """
    b = Builder(model.graph, model.opset_imports[""])
    for rewrite in (layers.normalized, layers.parted):
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
        for rewrite in _REWRITES:
            if node.graph is graph and not node.domain and rewrite(b, node):
                break
    if any(node.domain == DOMAIN for node in graph):
        model.opset_imports[DOMAIN] = 1


def lower(model: ir.Model) -> None:
    """Replace the nodes of `fuse` by standard operators."""
    b = Builder(model.graph, model.opset_imports[""])
    for node in list(model.graph):
        if node.domain == DOMAIN:
            replace(b, node, functools.partial(_written, node))
    model.opset_imports.pop(DOMAIN, None)


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


def _written(node: ir.Node, b: Builder) -> list[Tensor]:
    if node.op_type == "LSTM":
        return lstm_forward(context(b, node))
    return _LOWERED[node.op_type](b, *(b.wrap(x) for x in node.inputs if x is not None))
