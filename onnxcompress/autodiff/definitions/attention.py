"""ONNX Runtime's own attention operators, as the exporters of language models write them, in standard operators.

A. Vaswani et al.: Attention is all you need, 2017; N. Shazeer: Multi-query attention, 2019, J. Ainslie et al.: GQA,
2023; J. Su et al.: RoFormer (rotary positions), 2021. Stacks of heads are [batch, heads, positions, size of a head].
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
import onnx_ir as ir

from onnxcompress.autodiff.builder import Builder
from onnxcompress.autodiff.definition import Call, Definition, Outputs, define
from onnxcompress.autodiff.tensor import Dims, Size, Tensor

_MASK_RANKS = (2, 3)  # [batch, keys], [batch, queries, keys]


def _sized(definition: Definition) -> Definition:
    """None, too, where a size is unknown that the definition needs: that of a head, or of a table."""

    @functools.wraps(definition)
    def attempt(b: Builder, call: Call) -> Outputs | None:
        try:
            return definition(b, call)
        except _Unknown:
            return None

    return attempt


@define("GroupQueryAttention")
@_sized
def group_query_attention(b: Builder, call: Call) -> Outputs | None:
    """Several heads of queries for one of keys and values, each position seeing those up to its own.

    All samples are taken to have as many positions as the tensors do: rows shorter than that are padded at their end,
    as this operator wants it, and what it makes of the padding differs from the operator's.
    """
    heads, groups = call.attr("num_heads"), call.attr("kv_num_heads")
    quantized = any(call.attr(name, "NONE") not in ("", "NONE") for name in ("k_quant_type", "v_quant_type"))
    if call[0].rank != 3 or quantized or call.attr("qk_output", 0) or call.attr("local_window_size", -1) == 0:
        return None
    if call.has(1):
        q, k, v = _split(call[0], heads), _split(call[1], groups), _split(call[2], groups)
    else:
        width = _width(call[0])
        size = width // (heads + 2 * groups) if width else 0
        if not size:
            return None
        parts = b.ops("Split", call[0], b.ints([heads * size, groups * size, groups * size]), outputs=3, axis=-1)
        shape = (call[0].shape or ())[:2]
        counts = (heads, groups, groups)
        q, k, v = (_split(t.shaped(*shape, n * size), n) for t, n in zip(parts, counts, strict=True))
    past = call[3].size(2) if call.has(3) else 0
    if call.attr("do_rotary", 0):
        positions = _steps(b, past, q.size(2)).unsqueeze(0)
        if call.has(9):
            positions = call[9]
        q, k = (_rotated(t, call[7], call[8], positions, bool(call.attr("rotary_interleaved", 0))) for t in (q, k))
    if call.has(3):
        k, v = (_joined(call[i], t) for i, t in ((3, k), (4, v)))
    scores = Scores(
        scale=call.attr("scale", 0.0),
        causal=True,
        window=call.attr("local_window_size", -1),
        softcap=call.attr("softcap", 0.0),
        bias=call[10] if call.has(10) else None,
        sinks=call[11] if call.has(11) else None,
        smooth=call.attr("smooth_softmax", 0) == 1,
    )
    return [_merged(_attended(b, q, k, v, scores)), k, v][: len(call.node.outputs)]


@define("MultiHeadAttention")
@_sized
def multi_head_attention(b: Builder, call: Call) -> Outputs | None:
    """Queries, keys and values already projected, packed or apart, a bias for the three, a mask of keys, a past."""
    heads = call.attr("num_heads")
    if any(call.has(index) for index in (8, 9)) or len(call.node.outputs) > 3:
        return None
    found = _projected(b, call, heads)
    if found is None:
        return None
    q, k, v = found
    if call.has(6):
        k, v = (_joined(call[i], t) for i, t in ((6, k), (7, v)))
    bias = _biases(b, call, mask=4, bias=5, keys=k.size(2))
    if bias is None:
        return None
    scores = Scores(scale=call.attr("scale", 0.0), causal=bool(call.attr("unidirectional", 0)), bias=bias.tensor)
    return [_merged(_attended(b, q, k, v, scores)), k, v][: len(call.node.outputs)]


@define("Attention")
@_sized
def attention(b: Builder, call: Call) -> Outputs | None:
    """Self-attention with its projection: weights [inputs, queries + keys + values], bias, a mask, a past."""
    heads, x = call.attr("num_heads"), call[0]
    width = _width(call[1])
    if x.rank != 3 or width is None or call.has(6) or call.attr("do_rotary", 0):
        return None
    sizes = list(call.attr("qkv_hidden_sizes") or [width // 3] * 3)
    whole = call.plus(x @ call[1], 2)
    parts = b.ops("Split", whole, b.ints(sizes), outputs=3, axis=-1)
    shape = (x.shape or ())[:2]
    q, k, v = (_split(t.shaped(*shape, size), heads) for t, size in zip(parts, sizes, strict=True))
    if call.has(4):
        k, v = (_joined(call[4].at(0, i), t) for i, t in ((0, k), (1, v)))
    bias = _biases(b, call, mask=3, bias=5, keys=k.size(2))
    if bias is None:
        return None
    scores = Scores(scale=call.attr("scale", 0.0), causal=bool(call.attr("unidirectional", 0)), bias=bias.tensor)
    y = _merged(_attended(b, q, k, v, scores))
    if len(call.node.outputs) < 2:
        return [y]
    return [y, b.op("Concat", k.unsqueeze(0), v.unsqueeze(0), axis=0)]


@define("RotaryEmbedding")
@_sized
def rotary_embedding(b: Builder, call: Call) -> Outputs | None:
    """Pairs of features turned by an angle that grows with the position: x [B, S, D] or [B, heads, S, size]."""
    x, positions, cos = call[0], call[1], call[2]
    if x.rank not in (3, 4) or positions.rank not in (1, 2) or call.attr("is_packed_batching", 0):
        return None
    heads, width = call.attr("num_heads", 0), _width(x)
    if x.rank == 3:
        half = _width(cos)
        if not heads and width is not None and half is not None:
            heads = width // (2 * half)
        if not heads:
            return None
        x = _split(x, heads)
    if positions.rank == 1:  # where the first one stands
        positions = (positions + _steps(b, 0, x.size(2))).unsqueeze(0)
    turned = _rotated(x, cos, call[3], positions, bool(call.attr("interleaved", 0)))
    return [turned if call[0].rank == 4 else _merged(turned)]


# Scores --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Scores:
    """What is made of the products of queries and keys before and in Softmax.

    `scale`: 0 for 1 / sqrt(size of a head). `causal`: a position sees those up to its own, the last `window` of
    them (-1: all). `softcap`: c tanh(s / c). `bias`: is added. `sinks`, `smooth`: a key more, of score `sinks` [heads]
    or 0, that has no value.
    """

    scale: float = 0.0
    causal: bool = False
    window: int = -1
    softcap: float = 0.0
    bias: Tensor | None = None
    sinks: Tensor | None = None
    smooth: bool = False


def _attended(b: Builder, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
    """softmax(q k' scale + bias) v, [B, heads, S, size]. The queries of one group stand below each other, so that
    keys and values need not be repeated."""
    heads, groups, size = _number(q, 1), _number(k, 1), _number(q, 3)
    (batch, _, steps, _), share = q.shape or (None,) * 4, heads // groups
    rows = steps * share if isinstance(steps, int) else None if steps is None else f"{share} x {steps}"
    scale = scores.scale or 1 / math.sqrt(size)
    stacked = _reshaped(q, [0, groups, -1, size], (batch, groups, rows, size)) if share > 1 else q
    s = (stacked * math.sqrt(scale)) @ (k.swap() * math.sqrt(scale))
    if scores.softcap:
        s = (s / scores.softcap).map("Tanh") * scores.softcap
    if scores.causal:
        s = s + _repeated(b, _causal(b, q, k, scores.window), share, rows)
    if scores.bias is not None:
        s = s + (_grouped(b, scores.bias, heads, groups) if share > 1 else scores.bias)
    if scores.sinks is not None or scores.smooth:
        s = _with_sink(b, s, q, groups, share, scores)
    p = b.op("Softmax", s, shape=s.shape, axis=-1)
    if scores.sinks is not None or scores.smooth:
        p = p.slice([3], [0], [-1])
    y = p @ v
    wide = _number(v, 3)
    return _reshaped(y, [0, heads, -1, wide], (batch, heads, steps, wide)) if share > 1 else y


def _causal(b: Builder, q: Tensor, k: Tensor, window: int) -> Tensor:
    """[S, T]: 0 where a query may look, the least number elsewhere. Queries are the last S of the T positions."""
    queries, keys = q.size(2), k.size(2)
    here = _steps(b, _difference(b, keys, queries), queries).unsqueeze(1)
    there = _steps(b, 0, keys).unsqueeze(0)
    allowed = there <= here
    if window > 0:
        allowed = allowed & (there > here - window)
    least = float(np.finfo(np.float32 if q.dtype != ir.DataType.FLOAT16 else np.float16).min)
    found = b.where(allowed, b.constant(0.0, q.dtype), least)
    return found.shaped(*((t.shape or (None,) * 4)[2] for t in (q, k)))


def _repeated(b: Builder, mask: Tensor, share: int, rows: int | str | None) -> Tensor:
    """[S, T] for each of the `share` queries of a group: [share S, T], `rows` of them."""
    if share == 1:
        return mask
    return b.op("Tile", mask, b.ints([share, 1]), shape=(rows, (mask.shape or (None, None))[1]))


def _grouped(b: Builder, bias: Tensor, heads: int, groups: int) -> Tensor:
    """[B or 1, heads or 1, S, T] as [B or 1, groups or 1, heads / groups S, T]."""
    share = heads // groups
    batch, over, _, keys = bias.shape or (None,) * 4
    if over == 1:
        return b.op("Tile", bias, b.ints([1, 1, share, 1]), shape=(batch, 1, None, keys))
    return b.op("Reshape", bias, b.ints([0, groups, -1, bias.size(3)]), shape=(batch, groups, None, keys))


def _with_sink(b: Builder, s: Tensor, q: Tensor, groups: int, share: int, scores: Scores) -> Tensor:
    """`s` with one key more."""
    column = s.slice([3], [0], [1]) * 0.0
    if scores.sinks is not None:
        sink = b.op("Expand", scores.sinks.reshape([groups, share, 1]), b.ints([groups, share, q.size(2)]))
        column = column + sink.reshape([1, groups, -1, 1]).cast(s.dtype)
    return b.op("Concat", s, column, axis=3)


@dataclasses.dataclass(frozen=True)
class _Bias:
    tensor: Tensor | None


def _biases(b: Builder, call: Call, *, mask: int, bias: int, keys: Size) -> _Bias | None:
    """What masks and biases add to the scores; None where their form has no definition."""
    total = call[bias] if call.has(bias) else None
    if call.has(mask):
        given, like = call[mask], call[0]
        filled = float(call.attr("mask_filter_value", -10000.0))
        if given.rank == 1 and given.shape is not None and like.shape is not None and given.shape[0] == like.shape[0]:
            real = _steps(b, 0, keys).unsqueeze(0) < given.cast(ir.DataType.INT64).unsqueeze(1)
        elif given.rank in _MASK_RANKS:
            real = given.cast(ir.DataType.INT64) > 0
        else:
            return None
        real = real.unsqueeze(1) if given.rank == 3 else real.unsqueeze(1, 2)
        added = b.where(real, b.constant(0.0, like.dtype), filled)
        total = added if total is None else total + added
    return _Bias(total)


# Heads ---------------------------------------------------------------------------------------------------------------


def _projected(b: Builder, call: Call, heads: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Queries, keys and values as stacks of heads."""
    q = call[0]
    if q.rank != 3 or not call.has(2):  # packed: no kernel on the CPU to hold it against
        return None
    width = _width(q)
    if call.has(3):
        value = _width(call[2]) if call[2].rank == 3 else width
        if width is None or value is None:
            return None
        shifts = b.ops("Split", call[3], b.ints([width, width, value]), outputs=3, axis=0)
        shifts = [t.shaped(n) for t, n in zip(shifts, (width, width, value), strict=True)]
    else:
        shifts = []
    q = _split(q + shifts[0] if shifts else q, heads)
    k, v = call[1], call[2]
    if k.rank == 4:  # keys and values of another sequence, already apart
        return (q, k, v) if v.rank == 4 and not shifts else None
    if k.rank != 3 or v.rank != 3:
        return None
    k, v = (_split(t + shifts[i] if shifts else t, heads) for i, t in ((1, k), (2, v)))
    return q, k, v


def _split(x: Tensor, heads: int) -> Tensor:
    """[B, S, heads size] -> [B, heads, S, size]."""
    width = _width(x)
    size = width // heads if width is not None else None
    batch, steps = (x.shape or (None, None, None))[:2]
    apart = x.b.op("Reshape", x, x.b.ints([0, 0, heads, size or -1]), shape=(batch, steps, heads, size))
    return apart.transpose([0, 2, 1, 3])


def _merged(x: Tensor) -> Tensor:
    """[B, heads, S, size] -> [B, S, heads size]."""
    batch, heads, steps, size = x.shape or (None,) * 4
    width = heads * size if isinstance(heads, int) and isinstance(size, int) else None
    turned = x.transpose([0, 2, 1, 3])
    return x.b.op("Reshape", turned, x.b.ints([0, 0, width or -1]), shape=(batch, steps, width))


def _joined(past: Tensor, t: Tensor) -> Tensor:
    """The past's positions before the new ones."""
    shape, before = t.shape, (past.shape or (None,) * 4)[2]
    if shape is not None:
        steps = shape[2]
        both = None if None in (before, steps) else f"{before} + {steps}"
        shape = (*shape[:2], before + steps if isinstance(before, int) and isinstance(steps, int) else both, shape[3])
    return t.b.op("Concat", past, t, axis=2, dtype=t.dtype, shape=shape)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """x [B, heads, S, size]: each pair (a, b) of its first features becomes (a cos - b sin, a sin + b cos)."""
    size, half = _number(x, 3), _number(cos, 1)
    turned = _cut(x, 0, 2 * half) if 2 * half < size else x
    batch, heads, steps, _ = x.shape or (None,) * 4
    several = (positions.shape or (None,))[0]
    c, s = (table.take(positions).shaped(several, steps, half).unsqueeze(1) for table in (cos, sin))
    if interleaved:
        pairs = x.b.op("Reshape", turned, x.b.ints([0, 0, 0, half, 2]), shape=(batch, heads, steps, half, 2))
        first, second = pairs.at(4, 0), pairs.at(4, 1)
        parts = [(first * c - second * s).unsqueeze(4), (first * s + second * c).unsqueeze(4)]
        both = x.b.op("Concat", *parts, axis=4, shape=(batch, heads, steps, half, 2))
        found = x.b.op("Reshape", both, x.b.ints([0, 0, 0, 2 * half]), shape=(batch, heads, steps, 2 * half))
    else:
        first, second = (_cut(turned, at, at + half) for at in (0, half))
        found = x.b.op(
            "Concat", first * c - second * s, first * s + second * c, axis=3, shape=(batch, heads, steps, 2 * half)
        )
    if 2 * half == size:
        return found
    return x.b.op("Concat", found, _cut(x, 2 * half, size), axis=3, shape=x.shape)


def _cut(x: Tensor, start: int, end: int) -> Tensor:
    """Some of the features of x [B, heads, S, size]."""
    found = x.slice([3], [start], [end])
    found.value.shape = None if x.shape is None else ir.Shape([*x.shape[:3], end - start])
    return found


# Sizes ---------------------------------------------------------------------------------------------------------------


def _steps(b: Builder, start: Size, count: Size) -> Tensor:
    """int64 [count]: start, start + 1, ..."""
    if isinstance(start, int) and isinstance(count, int):
        return b.constant(np.arange(start, start + count, dtype=np.int64))
    first, size = (b.constant(np.array([n], np.int64)) if isinstance(n, int) else n for n in (start, count))
    end = (first + size).reshape([])
    return b.op("Range", first.reshape([]), end, b.constant(np.int64(1)), shape=(None,))


def _difference(b: Builder, a: Size, less: Size) -> Size:
    if isinstance(a, int) and isinstance(less, int):
        return a - less
    first, second = (b.constant(np.array([n], np.int64)) if isinstance(n, int) else n for n in (a, less))
    return first - second


def _width(x: Tensor) -> int | None:
    """The last size, where it is known."""
    size = x.shape[-1] if x.shape else None
    return size if isinstance(size, int) else None


def _number(x: Tensor, axis: int) -> int:
    size = x.shape[axis] if x.shape is not None else None
    if not isinstance(size, int):
        raise _Unknown
    return size


def _reshaped(x: Tensor, sizes: list[int], shape: Dims) -> Tensor:
    """Reshape to `sizes`, 0 for one that stays, -1 for what is left; known as `shape`."""
    return x.b.op("Reshape", x, x.b.ints(sizes), shape=shape)


class _Unknown(Exception):
    """A size that a definition needs is not known."""
