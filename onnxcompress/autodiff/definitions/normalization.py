"""Normalizations: BatchNormalization in training, those of language models, alone or fused with what is before them."""

from __future__ import annotations

from collections.abc import Sequence

from onnxcompress.autodiff.builder import Builder
from onnxcompress.autodiff.definition import Call, Outputs, define
from onnxcompress.autodiff.tensor import Tensor


@define("BatchNormalization", "")
def batch_normalization(b: Builder, call: Call) -> Outputs | None:
    """In training: y = (x - mean) factor + bias by the statistics of the batch. Running ones move by 1 - momentum.

    Spelled out because ONNX Runtime 1.32 on the CPU overwrites the running mean it is given, even a graph input.
    """
    x = call[0]
    if not call.attr("training_mode", 0) or x.rank is None:
        return None
    axes, momentum = [0, *range(2, x.rank)], call.attr("momentum", 0.9)
    along = [1, -1, *[1] * (x.rank - 2)]
    mean = x.mean(*axes)
    centred = x - mean
    variance = centred.reduce("ReduceSumSquare", axes) / x.count(axes)
    scale, bias = (call[i].reshape(along).cast(x.dtype) for i in (1, 2))
    factor = scale / (variance + call.attr("epsilon", 1e-5)).map("Sqrt")
    flat = [t.reshape([-1]).cast(call[3].dtype) for t in (mean, variance)]
    return [centred * factor + bias, *(call[3 + i] * momentum + flat[i] * (1 - momentum) for i in range(2))]


@define("SkipLayerNormalization")
def skip_layer_normalization(b: Builder, call: Call) -> Outputs:
    """LayerNormalization of the sum of input, skip and bias; the sum is the fourth output."""
    total = call.plus(call[0] + call[1], 4)
    beta = call[3] if call.has(3) else None
    y = b.op("LayerNormalization", total, call[2], beta, shape=total.shape, axis=-1, **call.keep("epsilon"))
    return [y, None, None, total][: len(call.node.outputs)]


@define("SkipSimplifiedLayerNormalization")
def skip_simplified_layer_normalization(b: Builder, call: Call) -> Outputs:
    total = call.plus(call[0] + call[1], 3)
    y = _root_mean_square(total, call[2], [-1], call.attr("epsilon", 1e-5))
    return [y, None, None, total][: len(call.node.outputs)]


@define("SimplifiedLayerNormalization", "")
@define("SimplifiedLayerNormalization")
def simplified_layer_normalization(b: Builder, call: Call) -> Outputs | None:
    """x / sqrt(mean x^2 + epsilon) times scale, over the axes from `axis` on."""
    x, axis = call[0], call.attr("axis", -1)
    if axis >= 0 and x.rank is None:
        return None
    axes = list(range(axis, 0)) if axis < 0 else list(range(axis, x.rank or 0))
    return [_root_mean_square(x, call[1], axes, call.attr("epsilon", 1e-5))]


def _root_mean_square(x: Tensor, scale: Tensor, axes: Sequence[int], epsilon: float) -> Tensor:
    return x / ((x * x).mean(*axes) + epsilon).map("Sqrt") * scale


@define("EmbedLayerNormalization")
def embed_layer_normalization(b: Builder, call: Call) -> Outputs | None:
    """The sum of word, position and segment rows, normalized. Masks as indices (second output) have no definition."""
    node = call.node
    if len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output()):
        return None
    words = call[2].take(call[0])
    steps = call[0].size(1)
    places = call[3].take(call[8]) if call.has(8) else call[3].slice([0], [0], [steps])
    total = words + places
    if call.has(1) and call.has(4):
        total = total + call[4].take(call[1])
    total.shaped(None, None, None)
    y = b.op("LayerNormalization", total, call[5], call[6], shape=total.shape, axis=-1, **call.keep("epsilon"))
    return [y, None, total][: len(node.outputs)]
