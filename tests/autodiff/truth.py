"""Operators in float64 that the reference evaluator of onnx 1.23 lacks, computes in float32, or has wrong."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx.reference.op_run import OpRun


class Operator(OpRun):
    """The evaluator sets a node's attributes as attributes of its implementation."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


class Erf(Operator):
    """The reference evaluator's own computes in float32."""

    op_domain = ""

    def _run(self, x: np.ndarray) -> tuple[np.ndarray]:
        return (np.vectorize(math.erf, otypes=[np.float64])(x).astype(x.dtype),)


class Gelu(Operator):
    """The same."""

    op_domain = ""

    def _run(self, x: np.ndarray, approximate: str | None = None) -> tuple[np.ndarray]:
        if approximate == "tanh":
            return ((0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))).astype(x.dtype),)
        erf = np.vectorize(math.erf, otypes=[np.float64])(x / np.sqrt(2))
        return ((0.5 * x * (1 + erf)).astype(x.dtype),)


class ConvTranspose(Operator):
    """The reference evaluator's own is wrong for groups and a batch above one (onnx 1.23)."""

    op_domain = ""

    def _run(self, x: np.ndarray, w: np.ndarray, bias: np.ndarray | None = None, **attributes: Any) -> Any:
        given = {**self.__dict__, **{name: value for name, value in attributes.items() if value is not None}}

        def attr(name: str, default: Any) -> Any:
            value = given.get(name)
            return default if value is None else value

        n, group, d = x.ndim - 2, attr("group", 1), x.shape[2:]
        kernel = w.shape[2:]
        strides, dilations = attr("strides", [1] * n), attr("dilations", [1] * n)
        extra, auto = attr("output_padding", [0] * n), attr("auto_pad", "NOTSET")
        pads = list(attr("pads", [0] * 2 * n))
        full = [
            s * (i - 1) + (k - 1) * e + 1 + o
            for s, i, k, e, o in zip(strides, d, kernel, dilations, extra, strict=True)
        ]
        wanted = attr("output_shape", None) or (
            [i * s for i, s in zip(d, strides, strict=True)] if "SAME" in auto else None
        )
        if wanted is not None:
            total = [max(f - o, 0) for f, o in zip(full, wanted[-n:], strict=True)]
            small, large = [t // 2 for t in total], [t - t // 2 for t in total]
            pads = [*small, *large] if auto == "SAME_UPPER" else [*large, *small]
        share, per = w.shape[1], x.shape[1] // group
        out = np.zeros((x.shape[0], share * group, *full), x.dtype)
        for place in np.ndindex(*kernel):
            spots = [
                slice(p * e, p * e + s * (i - 1) + 1, s)
                for p, e, s, i in zip(place, dilations, strides, d, strict=True)
            ]
            for k in range(group):
                rows = slice(k * per, (k + 1) * per)
                part = np.einsum("nc...,cm->nm...", x[:, rows], w[(rows, slice(None), *place)])
                out[(slice(None), slice(k * share, (k + 1) * share), *spots)] += part
        inside = [slice(p, f - q) for p, q, f in zip(pads[:n], pads[n:], full, strict=True)]
        out = out[(slice(None), slice(None), *inside)]
        return (out if bias is None else out + bias.reshape(1, -1, *[1] * n),)


class MaxPool(Operator):
    """The reference evaluator's own gives indices that are not those of the standard for one axis."""

    op_domain = ""

    def _run(self, x: np.ndarray, **attributes: Any) -> Any:
        given = {**self.__dict__, **{name: value for name, value in attributes.items() if value is not None}}

        def attr(name: str, default: Any) -> Any:
            value = given.get(name)
            return default if value is None else value

        n, sizes, kernel = x.ndim - 2, x.shape[2:], self.kernel_shape
        strides, dilations, auto = attr("strides", [1] * n), attr("dilations", [1] * n), attr("auto_pad", "NOTSET")
        spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
        pads = list(attr("pads", [0] * 2 * n))
        if "SAME" in auto:
            counts = [-(-i // s) for i, s in zip(sizes, strides, strict=True)]
            total = [max((o - 1) * s + k - i, 0) for o, s, k, i in zip(counts, strides, spans, sizes, strict=True)]
            small, large = [t // 2 for t in total], [t - t // 2 for t in total]
            pads = [*small, *large] if auto == "SAME_UPPER" else [*large, *small]
        else:
            counts = []
            for i in range(n):
                room = sizes[i] + pads[i] + pads[n + i] - spans[i]
                windows = (-(-room // strides[i]) if attr("ceil_mode", 0) else room // strides[i]) + 1
                if (windows - 1) * strides[i] >= sizes[i] + pads[i]:  # the last one must start inside
                    windows -= 1
                counts.append(windows)
        best = np.full((*x.shape[:2], *counts), -np.inf)
        where = np.zeros(best.shape, np.int64)
        positions = np.arange(x.size).reshape(x.shape)
        for window in np.ndindex(*counts):
            cut: list[Any] = []
            for i in range(n):
                first = window[i] * strides[i] - pads[i]
                cut.append([p for p in range(first, first + spans[i], dilations[i]) if 0 <= p < sizes[i]])
            inside: Any = (slice(None), slice(None), *np.ix_(*cut))
            seen, places = (t[inside].reshape(*x.shape[:2], -1) for t in (x, positions))
            winner = seen.argmax(-1)[..., None]
            best[(..., *window)] = np.take_along_axis(seen, winner, -1)[..., 0]
            where[(..., *window)] = np.take_along_axis(places, winner, -1)[..., 0]
        return (best.astype(x.dtype), where)[: len(self.onnx_node.output)]


class GlobalLpPool(Operator):
    """Missing from the reference evaluator."""

    op_domain = ""

    def _run(self, x: np.ndarray, p: int = 2) -> tuple[np.ndarray]:
        return ((np.abs(x) ** p).sum(axis=tuple(range(2, x.ndim)), keepdims=True) ** (1 / p),)


class LpNormalization(Operator):
    """The reference evaluator's own forgets the absolute values for p = 1."""

    op_domain = ""

    def _run(self, x: np.ndarray, axis: int | None = None, p: int | None = None) -> tuple[np.ndarray]:
        order, along = 2 if p is None else p, -1 if axis is None else axis
        return (x / (np.abs(x) ** order).sum(along, keepdims=True) ** (1 / order),)


class Pad(Operator):
    """The reference evaluator's own refuses negative padding."""

    op_domain = ""

    def _run(
        self,
        data: np.ndarray,
        pads: np.ndarray,
        value: np.ndarray | None = None,
        axes: np.ndarray | None = None,
        mode: str | None = None,
    ) -> tuple[np.ndarray]:
        over = [int(a) % data.ndim for a in axes] if axes is not None else list(range(data.ndim))
        width, cut = [(0, 0)] * data.ndim, [slice(None)] * data.ndim
        for axis, low, high in zip(over, pads[: len(over)].tolist(), pads[len(over) :].tolist(), strict=True):
            width[axis] = (max(low, 0), max(high, 0))
            cut[axis] = slice(max(-low, 0), min(high, 0) or None)
        if mode in (None, "constant"):
            fill = 0 if value is None else np.asarray(value).reshape(-1)[0]
            return (np.pad(data, width, constant_values=fill)[tuple(cut)].astype(data.dtype),)
        return (np.pad(data, width, mode=mode)[tuple(cut)],)  # type: ignore[call-overload]


class GatherElements(Operator):
    """The reference evaluator's own refuses indices smaller than the data."""

    op_domain = ""

    def _run(self, data: np.ndarray, indices: np.ndarray, axis: int = 0) -> tuple[np.ndarray]:
        part = tuple(slice(None) if i == axis % data.ndim else slice(n) for i, n in enumerate(indices.shape))
        return (np.take_along_axis(data[part], indices, axis),)


class MeanVarianceNormalization(Operator):
    """By definition the reference evaluator adds a float32 constant."""

    op_domain = ""

    def _run(self, x: np.ndarray, axes: Sequence[int] | None = None) -> tuple[np.ndarray]:
        over = tuple(axes or (0, 2, 3))
        return ((x - x.mean(over, keepdims=True)) / (x.std(over, keepdims=True) + 1e-9),)


class Scan(Operator):
    """The reference evaluator's own knows neither other axes nor directions."""

    op_domain = ""

    def need_context(self) -> bool:
        return True

    def _run(self, *args: np.ndarray, context: Any = None, **given: Any) -> Any:
        body = self.body
        sliced = self.num_scan_inputs
        states, stacks = list(args[: len(args) - sliced]), list(args[len(args) - sliced :])
        results = len(body.output_names) - len(states)
        axes = self.scan_input_axes or [0] * sliced
        stacks = [np.moveaxis(t, a, 0) for t, a in zip(stacks, axes, strict=True)]
        stacks = [t[::-1] if d else t for t, d in zip(stacks, self.scan_input_directions or [0] * sliced, strict=True)]
        found: list[list[np.ndarray]] = [[] for _ in range(results)]
        for step in range(len(stacks[0])):
            feeds = dict(context or {})
            feeds.update(zip(body.input_names, [*states, *(t[step] for t in stacks)], strict=True))
            outputs = self._run_body(feeds)
            states = outputs[: len(states)]
            for kept, new in zip(found, outputs[len(states) :], strict=True):
                kept.append(new)
        ways, out_axes = self.scan_output_directions or [0] * results, self.scan_output_axes or [0] * results
        whole = [
            np.stack(kept[::-1] if way else kept, axis) for kept, way, axis in zip(found, ways, out_axes, strict=True)
        ]
        return tuple(np.asarray(t) for t in (*states, *whole))


class Loop(Operator):
    """The reference evaluator's own joins what the steps return along an axis they have, instead of a new one."""

    op_domain = ""

    def need_context(self) -> bool:
        return True

    def _run(self, count: Any, condition: Any, *states: np.ndarray, context: Any = None, **given: Any) -> Any:
        body, now, step = self.body, list(states), 0
        kept: list[list[np.ndarray]] = [[] for _ in range(len(body.output_names) - 1 - len(now))]
        going = True if condition is None else bool(np.asarray(condition).item())

        def run() -> Any:
            feeds = dict(context or {})
            feeds.update(zip(body.input_names, [np.array(step), np.array(going), *now], strict=True))
            return self._run_body(feeds)

        while going and (count is None or step < int(np.asarray(count).item())):
            outputs = run()
            going, now, step = bool(outputs[0]), list(outputs[1 : 1 + len(now)]), step + 1
            for stack, new in zip(kept, outputs[1 + len(now) :], strict=True):
                stack.append(new)
        if not step:  # one that does not count says what shapes there would be
            return (*now, *(np.zeros((0, *new.shape), new.dtype) for new in run()[1 + len(now) :]))
        return (*now, *(np.stack(stack) for stack in kept))


def _sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


class _Recurrent(Operator):
    """The reference evaluator's own have one direction, and forward only."""

    op_domain = ""
    gates = 1

    def _run(self, x: Any, w: Any, r: Any, b: Any = None, lengths: Any = None, *rest: Any, **given: Any) -> Any:
        for name, value in given.items():
            if value is not None:
                setattr(self, name, value)
        hidden, d = self.hidden_size, w.shape[0]
        initial = [t for t in rest if t is not None][: 2 if self.gates == 4 else 1]
        while len(initial) < (2 if self.gates == 4 else 1):
            initial.append(np.zeros((d, x.shape[1], hidden), x.dtype))
        b = b if b is not None else np.zeros((d, 2 * self.gates * hidden), x.dtype)
        y = np.zeros((x.shape[0], d, x.shape[1], hidden), x.dtype)
        last = []
        for k in range(d):
            state = [t[k] for t in initial]
            back = self.direction == "reverse" or k == 1
            for t in range(x.shape[0])[:: -1 if back else 1]:
                state = self.step(x[t], state, w[k], r[k], *np.split(b[k], 2))
                y[t, k] = state[0]
            last.append(state)
        finals = [np.stack([state[i] for state in last]) for i in range(len(last[0]))]
        return tuple([y, *finals][: len(self.onnx_node.output)])

    def step(self, x: Any, state: Any, w: Any, r: Any, wb: Any, rb: Any) -> list[np.ndarray]:
        raise NotImplementedError


class LSTM(_Recurrent):
    gates = 4

    def step(self, x: Any, state: Any, w: Any, r: Any, wb: Any, rb: Any) -> list[np.ndarray]:
        h, c = state
        i, o, f, g = np.split(x @ w.T + h @ r.T + wb + rb, 4, -1)
        c = _sigmoid(f) * c + _sigmoid(i) * np.tanh(g)
        return [_sigmoid(o) * np.tanh(c), c]


class GRU(_Recurrent):
    gates = 3

    def step(self, x: Any, state: Any, w: Any, r: Any, wb: Any, rb: Any) -> list[np.ndarray]:
        (h,) = state
        wz, wr, wh = np.split(x @ w.T + wb, 3, -1)
        rz, rr, rh = np.split(h @ r.T + rb, 3, -1)
        z, reset = _sigmoid(wz + rz), _sigmoid(wr + rr)
        size = h.shape[-1]
        inner = reset * rh if self.linear_before_reset else (reset * h) @ r[2 * size :].T + rb[2 * size :]
        return [(1 - z) * np.tanh(wh + inner) + z * h]


class RNN(_Recurrent):
    def step(self, x: Any, state: Any, w: Any, r: Any, wb: Any, rb: Any) -> list[np.ndarray]:
        slope: dict[str, Any] = {"Tanh": np.tanh, "Relu": lambda t: np.maximum(t, 0), "Sigmoid": _sigmoid}
        return [slope[(self.activations or ["Tanh"])[0]](x @ w.T + state[0] @ r.T + wb + rb)]


class GridSample(Operator):
    """The reference evaluator's own computes places in float32, and pads them for cubic, too, unlike ONNX Runtime."""

    op_domain = ""

    def _run(self, x: np.ndarray, grid: np.ndarray, **attributes: Any) -> tuple[np.ndarray]:
        given = {**self.__dict__, **{name: value for name, value in attributes.items() if value is not None}}
        out = np.zeros((*x.shape[:2], *grid.shape[1:-1]), x.dtype)
        for n, *at in np.ndindex(*grid.shape[:-1]):
            taps = [self._taps(u, size, given) for u, size in zip(grid[(n, *at)][::-1], x.shape[2:], strict=True)]
            for combination in itertools.product(*taps):
                pixel = tuple(i for i, _ in combination)
                out[(n, slice(None), *at)] += x[(n, slice(None), *pixel)] * math.prod(w for _, w in combination)
        return (out,)

    def _taps(self, u: float, size: int, given: dict[str, Any]) -> list[tuple[int, float]]:
        mode, padding, aligned = given["mode"], given["padding_mode"], given["align_corners"]
        p = (u + 1) / 2 * (size - 1) if aligned else ((u + 1) * size - 1) / 2

        def back(i: float) -> float:
            if padding == "reflection":
                low, high = (0, size - 1) if aligned else (-0.5, size - 0.5)
                while not low <= i <= high:
                    i = 2 * low - i if i < low else 2 * high - i
            return i if padding == "zeros" else min(max(i, 0), size - 1)

        if "cubic" in mode:
            found = [(back(np.floor(p) + k), _keys(abs(p - np.floor(p) - k))) for k in (-1, 0, 1, 2)]
        elif "linear" in mode:
            p = back(p)
            found = [(np.floor(p) + k, 1 - abs(p - np.floor(p) - k)) for k in (0, 1)]
        else:
            found = [(np.rint(back(p)), 1.0)]
        return [(int(i), w) for i, w in found if 0 <= i < size]


def _keys(d: float, a: float = -0.75) -> float:
    """Keys 1981."""
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a


OWN: list[type[OpRun]] = [
    GridSample,
    MaxPool,
    Scan,
    Loop,
    LSTM,
    GRU,
    RNN,
    Pad,
    LpNormalization,
    GatherElements,
    MeanVarianceNormalization,
    Erf,
    Gelu,
    ConvTranspose,
    GlobalLpPool,
]
