"""LSTM, GRU and RNN: backpropagation through time with everything that need not be sequential done at once.

The forward operator gives all hidden states; from them the gates of all steps are recomputed in one product. Only two
things run step by step, in a Scan: LSTM's cell state, and the gradient of the hidden state going back. The gradients of
weights, biases and inputs are again one product over all steps.

Shapes: T steps, N batch, I inputs, H hidden, D directions. Gates in ONNX order: LSTM i, o, f, c; GRU z, r, h.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import onnx_ir as ir

from onnxcompress.autodiff.builder import Builder
from onnxcompress.autodiff.rule import Context, Grads, rule
from onnxcompress.autodiff.tensor import Tensor

Step = Callable[[Builder, Sequence[Tensor], Sequence[Tensor]], tuple[Sequence[Tensor], Sequence[Tensor]]]
LSTM_ACTIVATIONS = ("Sigmoid", "Tanh", "Tanh")
_REFUSED = "sequence_lens; batches first (layout 1); clipped gates; "
INPUT, WEIGHT, RECURRENT, BIAS, LENGTHS, STATE, CELL, PEEPHOLES = range(8)


def scan(b: Builder, body: Step, states: Sequence[Tensor], sequences: Sequence[Tensor], reverse: bool) -> list[Tensor]:
    """Run `body(builder, states, slices) -> (states, results)` along the first axis; results stacked at their steps.

    `reverse`: from the last step to the first. Returns the final states, then the stacked results.
    """
    inputs = [_slot(b, t, t.shape) for t in states]
    inputs += [_slot(b, t, None if t.shape is None else t.shape[1:]) for t in sequences]
    graph = ir.Graph(inputs, [], nodes=[], name=b.name("grad/step"))
    inner = b.inside(graph)
    inner.scope = b.scope
    slots = [inner.wrap(value) for value in inputs]
    after, results = body(inner, slots[: len(states)], slots[len(states) :])
    given: set[ir.Value] = set()
    for t in (*after, *results):  # a copy only of what the body did not make, or gives twice
        own = t.value.producer() is not None and t.value.producer().graph is graph and t.value not in given  # type: ignore[union-attr]
        graph.outputs.append(t.value if own else inner.op("Identity", t, shape=t.shape).value)
        given.add(t.value)
    way = [int(reverse)]
    return b.ops(
        "Scan",
        *states,
        *sequences,
        outputs=len(after) + len(results),
        dtype=states[0].dtype,
        body=graph,
        num_scan_inputs=len(sequences),
        scan_input_directions=way * len(sequences),
        scan_output_directions=way * len(results) or None,
    )


def _slot(b: Builder, t: Tensor, shape: Sequence[int | str | None] | None) -> ir.Value:
    value = ir.Value(name=b.name("grad/slot"), type=ir.TensorType(t.dtype))
    value.shape = None if shape is None else ir.Shape(shape)
    return value


@dataclasses.dataclass
class Direction:
    """One direction of a recurrent layer, its operands with the direction axis gone.

    `x` [T, N, I]; `w` [G H, I]; `r` [G H, H]; `wb`, `rb` [G H] or None; `h` [T, N, H] all hidden states; `before` the
    hidden state each step started from; `h0`, `c0` [N, H]; `reverse`: runs from the last step to the first.
    """

    c: Context
    index: int
    reverse: bool
    gates: int
    forward: bool = False  # before there are hidden states

    def __post_init__(self) -> None:
        c, d = self.c, self.index
        self.b = c.b
        self.hidden = _hidden_size(c)
        self.rows = self.gates * self.hidden
        self.x = c.x[INPUT].shaped(None, None, None)
        self.w = c.x[WEIGHT].at(0, d).shaped(self.rows, None)
        self.r = c.x[RECURRENT].at(0, d).shaped(self.rows, self.hidden)
        self.wb = self.rb = None
        if c.has(BIAS):
            both = c.x[BIAS].at(0, d).shaped(2 * self.rows)
            self.wb, self.rb = both.slice([0], [0], [self.rows]), both.slice([0], [self.rows], [2 * self.rows])
        self.h0 = self._initial(STATE)
        if not self.forward:
            self.h = c.output(0).at(1, d).shaped(None, None, self.hidden)
            self.before = self.shifted(self.h, self.h0)

    def _initial(self, index: int) -> Tensor:
        c = self.c
        if c.has(index):
            return c.x[index].at(0, self.index).shaped(None, self.hidden)
        sizes = self.b.ints([self.x.size(1), self.hidden])
        return self.b.zeros(sizes, self.x.dtype).shaped(None, self.hidden)

    def cell(self) -> Tensor:
        """The initial cell state."""
        return self._initial(CELL)

    def shifted(self, states: Tensor, first: Tensor) -> Tensor:
        """`states` [T, N, H] one step later: what each step started from."""
        b = self.b
        if self.reverse:
            return b.op("Concat", states.slice([0], [1], [2**31]), first.unsqueeze(0), axis=0, shape=(None,) * 3)
        return b.op("Concat", first.unsqueeze(0), states.slice([0], [0], [-1]), axis=0, shape=(None,) * 3)

    def affine(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        """x w^T + bias."""
        y = (x @ w.transpose([1, 0])).shaped(None, None, w.shape[0] if w.shape else None)
        return y if bias is None else y + bias

    def split(self, t: Tensor, axis: int, parts: int | None = None) -> list[Tensor]:
        """The gates of `t` along `axis`."""
        parts = parts or self.gates
        shape = None if t.rank is None else tuple(self.hidden if i == axis % t.rank else None for i in range(t.rank))
        return self.b.ops("Split", t, self.b.ints([self.hidden] * parts), outputs=parts, axis=axis, shape=shape)

    def incoming(self) -> tuple[Tensor, Tensor]:
        """Gradients from outside: of all hidden states [T, N, H], and of the last one [N, H]."""
        grads, b = self.c.grads, self.b
        every = grads[0].at(1, self.index) if grads[0] is not None else b.zeros(self.h.sizes(), self.x.dtype)
        return every.shaped(None, None, self.hidden), self.final(1)

    def apart(self, every: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """What the way back starts with, and the gradients from outside that each of its steps is to hand on.

        A step hands on those of the step before it in time, so that they are added by the product that ends it.
        """
        end = every.at(0, 0 if self.reverse else -1).shaped(None, self.hidden)
        return last + end, self.shifted(every, self.b.zeros(self.h0.sizes(), self.x.dtype).shaped(None, self.hidden))

    def final(self, output: int) -> Tensor:
        """The gradient of the last state in `output`, or zeros."""
        g = self.c.grads[output] if output < len(self.c.grads) else None
        last = g.at(0, self.index) if g is not None else self.b.zeros(self.h0.sizes(), self.x.dtype)
        return last.shaped(None, self.hidden)

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        """Sum over steps and batch of left^T right: [A, B] from [T, N, A] and [T, N, B]."""
        flat = (left.reshape([-1, left.size(2)]), right.reshape([-1, right.size(2)]))
        return self.b.op("Gemm", *flat, transA=1)


def _hidden_size(c: Context) -> int:
    """The attribute, or the last size of the recurrent weight, which it may be left to."""
    shape = c.x[RECURRENT].shape
    found = c.attr("hidden_size", shape[-1] if shape else None)
    if not isinstance(found, int):
        raise c.refuse("its hidden size is unknown; add the attribute hidden_size")
    return found


Gradients = dict[int, Tensor]  # by input, the direction axis restored


def _layer(c: Context, gates: int, activations: Sequence[str], one: Callable[[Direction], Gradients]) -> Grads:
    """The gradients of all directions put together."""
    check(c, activations)
    found = [one(way) for way in _directions(c, gates)]
    result: list[Tensor | None] = []
    for index in range(len(c.node.inputs)):
        parts = [grads[index] for grads in found if index in grads]
        if not parts or not c.has(index):
            result.append(None)
        elif index == INPUT:
            result.append(c.b.sum(parts))
        else:
            stacked = [part.b.op("Unsqueeze", part, c.b.ints([0])) for part in parts]
            result.append(c.b.op("Concat", *stacked, axis=0) if len(stacked) > 1 else stacked[0])
    return result


def _directions(c: Context, gates: int, forward: bool = False) -> list[Direction]:
    reverse = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}
    ways = enumerate(reverse[str(c.attr("direction", "forward"))])
    return [Direction(c, i, back, gates, forward) for i, back in ways]


def check(c: Context, activations: Sequence[str]) -> None:
    if c.has(LENGTHS):
        raise c.refuse("sequence_lens has no rule; mask the outputs instead, or cut the sequences to one length")
    if c.has(PEEPHOLES):
        raise c.refuse("peephole weights have no rule")
    if c.attr("layout", 0):
        raise c.refuse("layout 1 (batch first) has no rule; transpose around it")
    if c.attr("clip"):
        raise c.refuse("clipped gates have no rule")
    if c.attr("input_forget", 0):
        raise c.refuse("coupled input and forget gates have no rule")
    given = [str(a).lower() for a in c.attr("activations") or ()]
    directions = 2 if str(c.attr("direction", "forward")) == "bidirectional" else 1
    if given and given != [a.lower() for a in activations] * directions:
        raise c.refuse(f"activations {given} have no rule; only {list(activations)}")


def _bias(way: Direction, gates: Tensor, recurrent: Tensor | None = None) -> Tensor:
    """The gradient of the bias [2 G H] from those of the gates [T, N, G H]: W's half, then R's, where that differs."""
    halves = [t.sum(0, 1, keep=False) for t in (gates, gates if recurrent is None else recurrent)]
    return way.b.op("Concat", *halves, axis=0)


@rule(
    "LSTM",
    refuses=_REFUSED + "peephole weights; coupled input and forget gates; other activations than sigmoid, tanh, tanh",
)
def lstm(c: Context) -> Grads:
    """Through time: gates are computed again at once, cell states and their gradients step by step.

    h = o tanh(C), C = f C' + i g; Hochreiter and Schmidhuber 1997, with forget gates.
    """
    return _layer(c, 4, LSTM_ACTIVATIONS, lambda way: _lstm(way, _recomputed(way)))


KEPT = 3  # values a direction of an LSTM keeps for its gradient


def lstm_with_kept(c: Context) -> Grads:
    """The same, of a node that gives what `lstm_forward` keeps as outputs after its three."""

    def one(way: Direction) -> Gradients:
        sigmoids, g, cells = c.y[3 + KEPT * way.index :][:KEPT]
        i, o, f = way.split(sigmoids, 2, 3)
        return _lstm(way, (i, o, f, g, cells))

    return _layer(c, 4, LSTM_ACTIVATIONS, one)


def lstm_forward(c: Context) -> list[Tensor]:
    """Y, Y_h, Y_c of an LSTM node step by step, then of each direction: i, o, f; g; the cell states."""
    b, found, kept = c.b, [], []
    for way in _directions(c, 4, forward=True):
        h, rest = way.hidden, 3 * way.hidden

        def step(
            local: Builder,
            states: Sequence[Tensor],
            now: Sequence[Tensor],
            way: Direction = way,
            h: int = h,
            rest: int = rest,
        ) -> tuple[list[Tensor], list[Tensor]]:
            pre = local.op("Gemm", states[0], way.r, now[0], transB=1)
            sigmoids, g = local.ops("Split", pre, local.ints([rest, h]), outputs=2, axis=1)
            sigmoids, g = sigmoids.map("Sigmoid"), g.map("Tanh")
            i, o, f = local.ops("Split", sigmoids, local.ints([h] * 3), outputs=3, axis=1)
            cell = f * states[1] + i * g
            hidden = o * cell.map("Tanh")
            return [hidden, cell], [hidden, sigmoids, g, cell]

        bias = None if way.wb is None or way.rb is None else way.wb + way.rb
        last, cell, every, *keep = scan(b, step, [way.h0, way.cell()], [way.affine(way.x, way.w, bias)], way.reverse)
        found.append([every.shaped(None, None, h).unsqueeze(1), last.unsqueeze(0), cell.unsqueeze(0)])
        kept += keep
    if len(found) == 1:
        return [*found[0], *kept]
    return [
        *(b.op("Concat", *pair, axis=i) for pair, i in zip(zip(*found, strict=True), (1, 0, 0), strict=True)),
        *kept,
    ]


Saved = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # the gates i, o, f, g and the cell states, [T, N, H] each


def _recomputed(way: Direction) -> Saved:
    b = way.b
    bias = None if way.wb is None or way.rb is None else way.wb + way.rb
    pre = (way.affine(way.x, way.w, bias) + way.affine(way.before, way.r, None)).shaped(None, None, way.rows)
    i, o, f, g = way.split(pre, 2)
    i, o, f, g = i.map("Sigmoid"), o.map("Sigmoid"), f.map("Sigmoid"), g.map("Tanh")

    def advance(local: Builder, states: Sequence[Tensor], now: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        cell = now[0] * states[0] + now[1]
        return [cell], [cell]

    cells = scan(b, advance, [way.cell()], [f, i * g], way.reverse)[1]
    return i, o, f, g, cells.shaped(None, None, way.hidden)


def _lstm(way: Direction, saved: Saved) -> Gradients:
    b, (i, o, f, g, cells) = way.b, saved
    old = way.shifted(cells, way.cell())
    t = cells.map("Tanh")
    # Per step: dC += dh o (1 - t^2); then every gate's gradient is a factor known beforehand times dC or dh.
    from_h = o * (1 - t * t)
    parts = g * i * (1 - i), t * o * (1 - o), old * f * (1 - f), i * (1 - g * g)
    factors = b.op("Concat", *parts, axis=2, shape=(None, None, way.rows))

    def back(local: Builder, states: Sequence[Tensor], now: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        dh, dc = states
        earlier, toward_c, factor, keep = now
        dc = dc + dh * toward_c
        gates = local.op("Concat", dc, dh, dc, dc, axis=1) * factor
        return [local.op("Gemm", gates, way.r, earlier), dc * keep], [gates]

    every, last = way.incoming()
    first, earlier = way.apart(every, last)
    dh0, dc0, gates = scan(b, back, [first, way.final(2)], [earlier, from_h, factors, f], not way.reverse)
    gates.shaped(None, None, way.rows)
    found = {
        INPUT: gates @ way.w,
        WEIGHT: way.product(gates, way.x),
        RECURRENT: way.product(gates, way.before),
        STATE: dh0,
        CELL: dc0,
    }
    return {**found, BIAS: _bias(way, gates)} if way.c.has(BIAS) else found


@rule("GRU", refuses=_REFUSED + "other activations than sigmoid, tanh")
def gru(c: Context) -> Grads:
    """Through time: gates are computed again at once, gradients step by step; for both places of the reset gate.

    h = (1 - z) n + z h'; Cho et al. 2014. linear_before_reset: n = tanh(Wx + r (R h' + rb)), else of R (r h').
    """
    return _layer(c, 3, ["Sigmoid", "Tanh"], _gru)


def _gru(way: Direction) -> Gradients:
    b, linear = way.b, bool(way.c.attr("linear_before_reset", 0))
    before = way.before
    wz, wr, wh = way.split(way.affine(way.x, way.w, way.wb), 2)
    rz, rr, rh = way.split(way.r, 0)
    bz, br, bh = way.split(way.rb, 0) if way.rb is not None else (None, None, None)
    z = (wz + way.affine(before, rz, bz)).map("Sigmoid")
    r = (wr + way.affine(before, rr, br)).map("Sigmoid")
    inner = way.affine(before, rh, bh) if linear else r * before
    n = (wh + r * inner if linear else wh + way.affine(inner, rh, bh)).map("Tanh")
    to_n, to_z = (1 - z) * (1 - n * n), (before - n) * z * (1 - z)
    to_r = (inner if linear else before) * r * (1 - r)

    def back(local: Builder, states: Sequence[Tensor], now: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        every, kn, kz, kr, zt, rt = now
        dh = states[0] + every
        dn, dz = dh * kn, dh * kz
        if linear:
            dr, reset = dn * kr, dn * rt
            recurrent = local.op("Concat", dz, dr, reset, axis=1)
            return [dh * zt + recurrent @ way.r], [recurrent, dn]
        through = dn @ rh
        dr = through * kr
        passed = dz @ rz + dr @ rr + through * rt
        return [dh * zt + passed], [local.op("Concat", dz, dr, dn, axis=1), dn]

    every, last = way.incoming()
    dh0, gates, dn = scan(b, back, [last], [every, to_n, to_z, to_r, z, r], not way.reverse)
    gates, dn = gates.shaped(None, None, way.rows), dn.shaped(None, None, way.hidden)
    dz, dr, _ = way.split(gates, 2)
    from_x = b.op("Concat", dz, dr, dn, axis=2, shape=(None, None, way.rows)) if linear else gates
    if linear:
        d_r = way.product(gates, before)
    else:
        upper = way.product(b.op("Concat", dz, dr, axis=2, shape=(None, None, 2 * way.hidden)), before)
        d_r = b.op("Concat", upper, way.product(dn, inner), axis=0)
    found = {INPUT: from_x @ way.w, WEIGHT: way.product(from_x, way.x), RECURRENT: d_r, STATE: dh0}
    return {**found, BIAS: _bias(way, from_x, gates)} if way.c.has(BIAS) else found


@rule("RNN", refuses=_REFUSED + "other activations than one of tanh, relu and sigmoid for all directions")
def rnn(c: Context) -> Grads:
    """Through time, step by step: the slope of the activation from h itself.

    h = tanh(W x + R h' + b), Elman 1990, or with Relu or Sigmoid.
    """
    given = [str(a) for a in c.attr("activations") or ("Tanh",)]
    if len(set(given)) > 1 or given[0] not in _SLOPES:
        raise c.refuse(f"activations {given} have no rule; only {list(_SLOPES)}")
    return _layer(c, 1, [given[0]], lambda way: _rnn(way, given[0]))


_SLOPES: dict[str, Callable[[Tensor], Tensor]] = {
    "Tanh": lambda h: 1 - h * h,
    "Sigmoid": lambda h: h * (1 - h),
    "Relu": lambda h: (h > 0).cast(h.dtype),
}


def _rnn(way: Direction, activation: str) -> Gradients:
    def back(local: Builder, states: Sequence[Tensor], now: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        d = (states[0] + now[0]) * now[1]
        return [d @ way.r], [d]

    every, last = way.incoming()
    dh0, d = scan(way.b, back, [last], [every, _SLOPES[activation](way.h)], not way.reverse)
    d = d.shaped(None, None, way.rows)
    found = {INPUT: d @ way.w, WEIGHT: way.product(d, way.x), RECURRENT: way.product(d, way.before), STATE: dh0}
    return {**found, BIAS: _bias(way, d)} if way.c.has(BIAS) else found
