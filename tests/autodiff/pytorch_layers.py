"""The ONNX operators that are layers, by PyTorch's: convolutions, poolings, normalizations, attention, recurrence."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

T = Any
Node = Any  # tests.autodiff.pytorch.Node
LAYERS: dict[str, Callable[[Node], Any]] = {}


def layer(*names: str) -> Callable[[Callable[[Node], Any]], Callable[[Node], Any]]:
    def register(function: Callable[[Node], Any]) -> Callable[[Node], Any]:
        LAYERS.update(dict.fromkeys(names, function))
        return function

    return register


# Windows -------------------------------------------------------------------------------------------------------------


def _window(n: Node, kernel: list[int], auto: bool = True) -> tuple[list[int], list[int], list[int], list[int]]:
    """Strides, dilations, padding before and after, with auto_pad worked out."""
    rank, sizes = len(kernel), n[0].shape[2:]
    strides, dilations = n.attr("strides", [1] * rank), n.attr("dilations", [1] * rank)
    pads, mode = list(n.attr("pads", [0] * 2 * rank)), n.attr("auto_pad", "NOTSET")
    if auto and mode.startswith("SAME"):
        total = [
            max((-(-i // s) - 1) * s + (k - 1) * d + 1 - i, 0)
            for i, s, k, d in zip(sizes, strides, kernel, dilations, strict=True)
        ]
        small, large = [t // 2 for t in total], [t - t // 2 for t in total]
        pads = [*small, *large] if mode == "SAME_UPPER" else [*large, *small]
    return strides, dilations, pads[:rank], pads[rank:]


def _padded(x: T, before: list[int], after: list[int], value: float = 0.0) -> T:
    flat = [p for pair in zip(before[::-1], after[::-1], strict=True) for p in pair]
    return F.pad(x, flat, value=value) if any(flat) else x


@layer("Conv")
def conv(n: Node) -> T:
    strides, dilations, before, after = _window(n, list(n[1].shape[2:]))
    function = [F.conv1d, F.conv2d, F.conv3d][len(strides) - 1]
    if before == after:
        return function(n[0], n[1], n[2], strides, before, dilations, n.attr("group", 1))
    return function(_padded(n[0], before, after), n[1], n[2], strides, 0, dilations, n.attr("group", 1))


@layer("ConvTranspose")
def conv_transpose(n: Node) -> T:
    """PyTorch's with no padding at all, then the room for output_padding, then the padding cut off."""
    rank, kernel = n[0].ndim - 2, list(n[1].shape[2:])
    strides, dilations, before, after = _window(n, kernel, auto=False)
    function = [F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d][rank - 1]
    y = function(n[0], n[1], None, strides, 0, 0, n.attr("group", 1), dilations)
    extra = n.attr("output_padding", [0] * rank)
    mode, wanted = n.attr("auto_pad", "NOTSET"), n.attr("output_shape")
    if mode.startswith("SAME"):
        wanted = [i * s for i, s in zip(n[0].shape[2:], strides, strict=True)]
    if wanted is not None:
        total = [max(size + o - w, 0) for size, o, w in zip(y.shape[2:], extra, wanted, strict=True)]
        small, large = [t // 2 for t in total], [t - t // 2 for t in total]
        before, after = (small, large) if mode == "SAME_UPPER" else (large, small)
    y = _padded(y, [0] * rank, list(extra))
    for axis in range(rank):
        y = y.narrow(axis + 2, before[axis], y.shape[axis + 2] - before[axis] - after[axis])
    return y if n[2] is None else y + n[2].reshape(-1, *[1] * rank)


@layer("MaxPool")
def max_pool(n: Node) -> T:
    kernel = n.attr("kernel_shape")
    strides, dilations, before, after = _window(n, kernel)
    function = [F.max_pool1d, F.max_pool2d, F.max_pool3d][len(kernel) - 1]
    ceil = bool(n.attr("ceil_mode", 0))
    if before == after and all(2 * p <= k for p, k in zip(before, kernel, strict=True)):
        return function(n[0], kernel, strides, before, dilations, ceil)
    assert not ceil
    return function(_padded(n[0], before, after, -math.inf), kernel, strides, 0, dilations)


def _average(n: Node, x: T, kernel: list[int]) -> T:
    """Averages over windows, with padding on one side by the counts of what is no padding."""
    strides, dilations, before, after = _window(n, kernel)
    assert set(dilations) == {1}
    function = [F.avg_pool1d, F.avg_pool2d, F.avg_pool3d][len(kernel) - 1]
    ceil, counted = bool(n.attr("ceil_mode", 0)), bool(n.attr("count_include_pad", 0))
    if before == after:
        return function(x, kernel, strides, before, ceil, counted)
    assert not ceil
    y = function(_padded(x, before, after), kernel, strides)
    return y if counted else y / function(_padded(torch.ones_like(x), before, after), kernel, strides)


LAYERS["AveragePool"] = lambda n: _average(n, n[0], n.attr("kernel_shape"))


@layer("LpPool")
def lp_pool(n: Node) -> T:
    p, kernel = n.attr("p", 2), n.attr("kernel_shape")
    mean = _average(n, n[0].abs() ** p, kernel)
    return (torch.sign(mean) * F.relu(mean.abs()) * math.prod(kernel)) ** (1 / p)  # as F.lp_pool2d


@layer("GlobalLpPool")
def global_lp_pool(n: Node) -> T:
    return torch.linalg.vector_norm(n[0], n.attr("p", 2), tuple(range(2, n[0].ndim)), keepdim=True)


@layer("MaxUnpool")
def max_unpool(n: Node) -> T:
    return F.max_unpool2d(n[0], n[1], n.attr("kernel_shape"), n.attr("strides"))


@layer("Resize")
def resize(n: Node) -> T:
    """The last axes of at least three; PyTorch's names for the ways to place samples."""
    where, mode = n.attr("coordinate_transformation_mode", "half_pixel"), n.attr("mode", "nearest")
    spatial = n[0].ndim - 2
    kind = {"linear": ["linear", "bilinear", "trilinear"][spatial - 1], "cubic": "bicubic"}.get(mode, mode)
    if mode == "nearest":
        assert (where, n.attr("nearest_mode")) == ("asymmetric", "floor")
    else:
        assert where in ("half_pixel", "align_corners")
    options: dict[str, Any] = {"mode": kind}
    if mode != "nearest":
        options["align_corners"] = where == "align_corners"
    if n.attr("antialias", 0):
        options["antialias"] = True
    if n[3] is not None:
        sizes = n.ints(3)[-spatial:]
        return F.interpolate(n[0], size=sizes, **options)
    scales = [float(s) for s in n[2].tolist()][-spatial:]
    return F.interpolate(n[0], scale_factor=scales, recompute_scale_factor=False, **options)


# Normalizations ------------------------------------------------------------------------------------------------------


@layer("LayerNormalization")
def layer_normalization(n: Node) -> T:
    axis, epsilon = n.attr("axis", -1) % n[0].ndim, n.attr("epsilon", 1e-5)
    y = F.layer_norm(n[0], n[0].shape[axis:], n[1], n[2], epsilon)
    axes = list(range(axis, n[0].ndim))
    var, mean = torch.var_mean(n[0], axes, correction=0, keepdim=True)
    return y, mean, torch.rsqrt(var + epsilon)


@layer("BatchNormalization")
def batch_normalization(n: Node) -> T:
    """PyTorch's own has no gradient for the statistics."""
    x, scale, bias, mean, var = n.x
    epsilon = n.attr("epsilon", 1e-5)
    if n.attr("training_mode", 0):
        return F.batch_norm(x, None, None, scale, bias, training=True, eps=epsilon)
    if not (mean.requires_grad or var.requires_grad):
        return F.batch_norm(x, mean, var, scale, bias, eps=epsilon)
    along = [-1, *[1] * (x.ndim - 2)]
    inverse = torch.rsqrt(var + epsilon)
    return (x - mean.reshape(along)) * (inverse * scale).reshape(along) + bias.reshape(along)


@layer("GroupNormalization")
def group_normalization(n: Node) -> T:
    """Up to opset 20 one scale a group, since then one a channel."""
    groups, channels = n.attr("num_groups"), n[0].shape[1]
    scale, bias = (t.repeat_interleave(channels // t.shape[0]) for t in (n[1], n[2]))
    return F.group_norm(n[0], groups, scale, bias, n.attr("epsilon", 1e-5))


@layer("LRN")
def lrn(n: Node) -> T:
    alpha, beta, bias = n.attr("alpha", 1e-4), n.attr("beta", 0.75), n.attr("bias", 1.0)
    return F.local_response_norm(n[0], n.attr("size"), alpha, beta, bias)


@layer("RMSNormalization")
def rms_normalization(n: Node) -> T:
    axis = n.attr("axis", -1) % n[0].ndim
    shape = n[0].shape[axis:]
    return F.rms_norm(n[0], shape, None, n.attr("epsilon", 1e-5)) * n[1]


@layer("MeanVarianceNormalization")
def mean_variance_normalization(n: Node) -> T:
    axes = n.attr("axes", [0, 2, 3])
    spread = torch.sqrt(n[0].var(axes, correction=0, keepdim=True)) + 1e-9
    return (n[0] - n[0].mean(axes, keepdim=True)) / spread


LAYERS["InstanceNormalization"] = lambda n: F.instance_norm(
    n[0], None, None, n[1], n[2], True, 0, n.attr("epsilon", 1e-5)
)


# Attention, losses ---------------------------------------------------------------------------------------------------


@layer("Attention")
def attention(n: Node) -> T:
    heads = n.attr("q_num_heads"), n.attr("kv_num_heads"), n.attr("kv_num_heads")
    q, k, v = n.x[:3]
    joined = q.ndim == 3
    if joined:
        q, k, v = (t.unflatten(-1, (h, -1)).transpose(1, 2) for t, h in zip((q, k, v), heads, strict=True))
    mask = n[3]
    y = F.scaled_dot_product_attention(
        q,
        k,
        v,
        mask,
        is_causal=bool(n.attr("is_causal", 0)),
        scale=n.attr("scale"),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return y.transpose(1, 2).flatten(-2) if joined else y


@layer("RotaryEmbedding")
def rotary_embedding(n: Node) -> T:
    """Pairs (first half, second half) as complex numbers, turned."""
    x, cos, sin = n[0], n[1], n[2]
    if n[3] is not None:
        cos, sin = cos[n[3]], sin[n[3]]
    assert x.ndim == 4
    turned = torch.complex(*x.chunk(2, -1)) * torch.complex(cos, sin).unsqueeze(1)
    return torch.cat([turned.real, turned.imag], -1)


@layer("SoftmaxCrossEntropyLoss", "NegativeLogLikelihoodLoss")
def loss(n: Node) -> T:
    function = F.cross_entropy if n.proto.op_type.startswith("Softmax") else F.nll_loss
    ignored = n.attr("ignore_index", -100)
    return function(n[0], n[1], n[2], ignore_index=ignored, reduction=n.attr("reduction", "mean"))


# Quantization --------------------------------------------------------------------------------------------------------


@layer("DequantizeLinear")
def dequantize(n: Node) -> T:
    scale = n[1]
    shape = [-1 if i == n.attr("axis", 1) % n[0].ndim else 1 for i in range(n[0].ndim)] if scale.ndim else []
    zero = torch.zeros_like(scale) if n[2] is None else n[2].to(scale.dtype)
    return (n[0].to(scale.dtype) - zero.reshape(shape)) * scale.reshape(shape)


# Recurrence ----------------------------------------------------------------------------------------------------------

# Where PyTorch has each of ONNX's gates: i, o, f, c -> i, f, c, o; z, r, h -> r, z, h.
GATES = {"LSTM": [0, 2, 3, 1], "GRU": [1, 0, 2], "RNN": [0]}


@layer("LSTM", "GRU", "RNN")
def recurrent(n: Node) -> tuple[T, ...]:
    """One direction after the other; a reverse one sees the sequence backwards."""
    kind, hidden = n.proto.op_type, n.attr("hidden_size")
    direction = n.attr("direction", "forward")
    x, w, r, b, _, h, c = (n[i] for i in range(7))
    ways, order = w.shape[0], GATES[kind]
    ys, hs, cs = [], [], []
    for k in range(ways):
        back = direction == "reverse" or k == 1

        def gates(t: T) -> T:
            return torch.cat([t.split(hidden)[i] for i in order])

        zeros = x.new_zeros(x.shape[1], hidden)
        bias = x.new_zeros(2 * len(order) * hidden) if b is None else b[k]
        weights = [gates(w[k]), gates(r[k]), *(gates(t) for t in bias.chunk(2))]
        start = zeros if h is None else h[k]
        sequence = x.flip(0) if back else x
        if kind == "LSTM":
            cell = zeros if c is None else c[k]
            y, last, cell = torch._VF.lstm(
                sequence, (start[None], cell[None]), weights, True, 1, 0.0, False, False, False
            )
            cs.append(cell[0])
        else:
            y, last = _single(n, kind, sequence, start, weights)
        ys.append(y.flip(0) if back else y)
        hs.append(last[0])
    return torch.stack(ys, 1), torch.stack(hs), *([torch.stack(cs)] if cs else [])


def _single(n: Node, kind: str, x: T, h: T, weights: list[T]) -> tuple[T, T]:
    """GRU and RNN. PyTorch's GRU is the one with linear_before_reset; its RNN has Tanh and Relu."""
    activation = (n.attr("activations") or [b"Tanh"])[0].decode() if kind == "RNN" else ""
    if kind == "GRU" and n.attr("linear_before_reset", 0):
        return tuple(torch._VF.gru(x, h[None], weights, True, 1, 0.0, False, False, False))
    if activation in ("Tanh", "Relu"):
        function = torch._VF.rnn_tanh if activation == "Tanh" else torch._VF.rnn_relu
        return tuple(function(x, h[None], weights, True, 1, 0.0, False, False, False))
    w, r, wb, rb = weights
    steps = []
    for now in x:
        if kind == "RNN":
            h = torch.sigmoid(F.linear(now, w, wb) + F.linear(h, r, rb))
        else:
            (wr, wz, wn), (rr, rz, rn), (rrb, rzb, rnb) = F.linear(now, w, wb).chunk(3, -1), r.chunk(3), rb.chunk(3)
            reset, z = torch.sigmoid(wr + F.linear(h, rr, rrb)), torch.sigmoid(wz + F.linear(h, rz, rzb))
            h = (1 - z) * torch.tanh(wn + F.linear(reset * h, rn, rnb)) + z * h
        steps.append(h)
    return torch.stack(steps), h[None]
