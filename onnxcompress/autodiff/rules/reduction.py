"""Reductions: a gradient is spread back over the axes that were reduced away."""

from __future__ import annotations

from collections.abc import Sequence

from onnxcompress.autodiff.builder import Builder
from onnxcompress.autodiff.rule import Context, Grads, rule
from onnxcompress.autodiff.rules.recurrent import scan
from onnxcompress.autodiff.tensor import Operand, Tensor


class Reduced:
    """The axes a reduction went over, whichever form its opset gives them."""

    def __init__(self, c: Context) -> None:
        self.c = c
        self.keep = bool(c.attr("keepdims", 1))
        given = c.attr("axes")
        self.dynamic: Tensor | None = None  # axes known at run time only
        if c.has(1):
            constant = c.constant(1)
            given = None if constant is None else constant.reshape(-1).tolist()
            self.dynamic = c.x[1] if constant is None else None
        self.nothing = not given and self.dynamic is None and bool(c.attr("noop_with_empty_axes", 0))
        self.axes: Sequence[int] | None = None  # None: all of them, or not known
        if given:  # with an unknown rank they stay as they are given, which serves as well
            rank = c.x[0].rank
            self.axes = sorted(int(axis) % rank if rank else int(axis) for axis in given)

    def kept(self, t: Tensor) -> Tensor:
        """`t`, shaped like the output, with the reduced axes of size 1, so that it broadcasts against the input."""
        if self.keep or self.nothing:
            return t
        if self.dynamic is not None:
            return self.c.b.op("Unsqueeze", t, self.dynamic)
        if self.axes is None:
            return t
        return t.unsqueeze(*self.axes) if self.c.x[0].rank else self.c.b.op("Unsqueeze", t, self.c.b.ints(self.axes))

    def count(self) -> Operand:
        """How many elements were reduced to one."""
        x, y = self.c.x[0], self.c.y[0]
        if self.nothing:
            return 1
        if self.dynamic is None and (self.axes is not None or x.rank is not None):
            return x.count(self.axes if self.axes is not None else range(x.rank or 0))
        sizes = [self.c.b.op("Size", t, shape=()).cast(x.dtype) for t in (x, y)]
        return sizes[0] / sizes[1]

    def sum(self, t: Tensor) -> Tensor:
        """The sum of `t`, shaped like the input, over the reduced axes, which stay with size 1."""
        return self._again("ReduceSum", t)

    def product(self, t: Tensor) -> Tensor:
        """The product, likewise."""
        return self._again("ReduceProd", t)

    def _again(self, op_type: str, t: Tensor) -> Tensor:
        if self.nothing:
            return t
        if self.dynamic is not None:
            return self.c.b.op(op_type, t, self.dynamic, keepdims=1)
        return t.reduce(op_type, self.axes or ())


@rule("ReduceSum")
def reduce_sum(c: Context) -> Grads:
    """g to every element that was summed."""
    return [Reduced(c).kept(c.g).expand_like(c.x[0])]


@rule("ReduceMean")
def reduce_mean(c: Context) -> Grads:
    """g / n to each of n elements."""
    r = Reduced(c)
    return [(r.kept(c.g) / r.count()).expand_like(c.x[0])]


@rule("ReduceSumSquare")
def reduce_sum_square(c: Context) -> Grads:
    """dx = 2 g x"""
    return [c.x[0] * (Reduced(c).kept(c.g) * 2)]


@rule("ReduceL1")
def reduce_l1(c: Context) -> Grads:
    """dx = g sign x"""
    return [Reduced(c).kept(c.g) * c.x[0].map("Sign")]


@rule("ReduceL2")
def reduce_l2(c: Context) -> Grads:
    """dx = g x / y, zero where the norm y is"""
    r, y = Reduced(c), c.y[0]
    return [r.kept(c.b.where(y.equals(0.0), 0.0, c.g / y)) * c.x[0]]


@rule("ReduceLogSum")
def reduce_log_sum(c: Context) -> Grads:
    """dx = g / exp y"""
    r = Reduced(c)
    return [r.kept(c.g / c.y[0].map("Exp")).expand_like(c.x[0])]


@rule("ReduceLogSumExp")
def reduce_log_sum_exp(c: Context) -> Grads:
    """dx = g exp(x - y)"""
    r = Reduced(c)
    return [r.kept(c.g) * (c.x[0] - r.kept(c.y[0])).map("Exp")]


@rule("ReduceProd")
def reduce_prod(c: Context) -> Grads:
    """g times the product over the other elements, which is zero where another one is."""
    r, x = Reduced(c), c.x[0]
    zero = x.equals(0.0).cast(x.dtype)
    filled = x + zero
    without_zeros = r.kept(c.g) * r.product(filled) / filled
    return [without_zeros * (r.sum(zero) - zero).equals(0.0)]


@rule("ReduceMax", "ReduceMin")
def reduce_extremum(c: Context) -> Grads:
    """Shared equally among the elements that hold the extreme value."""
    r = Reduced(c)
    winners = c.x[0].equals(r.kept(c.y[0])).cast(c.g.dtype)
    return [r.kept(c.g) / r.sum(winners) * winners]


@rule("CumSum")
def cum_sum(c: Context) -> Grads:
    """Every element went into the sums at and after it: the sum from the other end."""
    reverse, exclusive = c.attr("reverse", 0), c.attr("exclusive", 0)
    return [c.b.op("CumSum", c.g, c.x[1], reverse=1 - reverse, exclusive=exclusive), None]


@rule("CumProd", refuses="an axis known only at run time")
def cum_prod(c: Context) -> Grads:
    """The product of what came before times r, r = g + x' r' with x' and r' of the next element; zeros do no harm."""
    axis, exclusive, reverse = c.constant(1), c.attr("exclusive", 0), c.attr("reverse", 0)
    if axis is None:
        raise c.refuse("an axis known only at run time has no rule")
    x, b, along = c.x[0], c.b, int(axis.reshape(-1)[0]) % c.rank()
    before = b.op("CumProd", x, c.x[1], exclusive=1, reverse=reverse, shape=x.shape)
    order = [along, *(i for i in range(c.rank()) if i != along)]

    def back(_: Builder, states: Sequence[Tensor], now: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        (later,), (x, g) = states, now
        return ([g + x * later], [later]) if exclusive else ([x * (g + later)], [g + later])

    turned = [t.transpose(order) for t in (x, c.g)]
    nothing = turned[0].at(0, 0) * 0
    found = scan(b, back, [nothing], turned, not reverse)[1].shaped(*(None for _ in order))
    return [before * found.transpose([order.index(i) for i in range(len(order))]), None]


@rule("LpNormalization")
def lp_normalization(c: Context) -> Grads:
    """dx = (g - n' sum(g y)) / n, n the norm along an axis, n' = sign x or y; where n is 0, so is the output"""
    axis, p, x = c.axis(-1), c.attr("p", 2), c.x[0]
    norm = x.reduce("ReduceL1" if p == 1 else "ReduceL2", [axis])
    norm = norm + norm.equals(0.0)
    slope = x.map("Sign") if p == 1 else c.y[0]
    return [(c.g - slope * (c.g * c.y[0]).sum(axis)) / norm]
