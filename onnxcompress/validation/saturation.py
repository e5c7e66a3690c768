"""What 16-bit saturation would do to a model's products on given data, computed on any machine.

Only neighbours that can overflow (`validation.integers`) are summed as a CPU without VNNI sums them; the rest is exact
there too. Nodes are looked at one by one, on activations that are exact themselves: errors do not add up.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.calibration.feeding import outputs
from onnxcompress.calibration.sites import Sites
from onnxcompress.numerics.affine import choose_scale, quantize
from onnxcompress.validation.integers import LIMIT, Codes, Product, bounded, convolves, paired, products

_CALLS = 8  # calls of the model that are looked at
_ROWS = 256  # rows of a product (positions of a convolution) that are looked at in each call


@dataclasses.dataclass(frozen=True)
class Saturation:
    """What saturation does to the output of one node.

    `relative_error`: root mean square of what is cut off, over that of the exact output (both as integers, without
    bias), the worse of the orders in which kernels pair. `share`: of all pair sums that are cut. `rows`: rows of the
    product that were looked at; 0 where its activation cannot be seen from outside, and then the rest says nothing.
    """

    node: str
    relative_error: float
    share: float
    rows: int


def saturations(
    model: ir.Model, feeder: Iterable[Any], *, calls: int = _CALLS, rows: int = _ROWS, threads: int = 1
) -> list[Saturation]:
    """One entry for each product of `model` that can overflow (`PairBound.at_risk`), in its order.

    `feeder`: calls of the model (`Data`, or an iterable of feeds), of which the first `calls` are run; of each, at most
    `rows` rows of a product are looked at.

    Raises:
        DataError: the feeds do not fit.
        ModelError: ONNX Runtime refuses the model.
    """
    risky = [_Watched(product) for product in products(model) if bounded(product).at_risk]
    names = list(dict.fromkeys(name for entry in risky for name in entry.wanted))
    if names:
        tapped, where, computed = Sites(model).seen(names)
        seen = list(dict.fromkeys([*where.values(), *computed.values()]))
        for results, _ in outputs(tapped, seen, feeder, limit=calls, threads=threads) if seen else ():
            found = {
                name: np.asarray(results[at])
                for name, at in where.items()
                if name not in computed or np.any(results[computed[name]])
            }
            for entry in risky:
                entry.update(found, rows)
    return [entry.result() for entry in risky]


class _Watched:
    """Sums over all calls for one product."""

    def __init__(self, product: Product) -> None:
        self._product = product
        self._orders = len(product.rows or ())
        self._error = [0.0] * self._orders
        self._cut = [0] * self._orders
        self._energy = 0.0
        self._pairs = self._rows = 0

        self._zero = self._activation = ""
        self._locate()

    @property
    def wanted(self) -> list[str]:
        """The values to look at, with their paths; none where they would not tell."""
        return [name for name in (self._activation, self._zero) if name]

    def _locate(self) -> None:
        product = self._product
        stacked = product.weight_codes is None or (product.weight_codes.ndim != 2 and not convolves(product))
        if stacked or product.operator == "DynamicQuantizeLSTM":  # whose codes depend on the state it carries
            return
        self._activation = product.real if product.codes is None else f"{product.path}{product.codes.name}"
        if product.zero is not None and product.zero_point is None:
            self._zero = f"{product.path}{product.zero.name}"

    def update(self, found: Mapping[str, Codes], most: int) -> None:
        """One call: what was seen of `wanted`."""
        product = self._product
        weight = product.weight_codes
        if (
            product.rows is None
            or weight is None
            or not self._activation
            or any(name not in found for name in self.wanted)
        ):
            return
        codes, zero = found[self._activation], float(product.zero_point or 0)
        if not codes.size:
            return
        if product.codes is None:
            codes, zero = _dynamic(codes)
        elif self._zero:
            zero = float(found[self._zero].reshape(-1)[0])
        if codes.dtype != np.uint8 or (convolves(product) and codes.ndim != weight.ndim):
            return
        for part, channels in matrices(product, codes, int(zero), most):
            centered = part.astype(np.float64) - zero
            self._energy += float(np.square(centered @ product.rows[0][channels].T.astype(np.float64)).sum())
            self._rows += len(part) if channels.start in (0, None) else 0
            for order in range(self._orders):
                turned = part if order == 0 else _innermost(part, product)
                error, cut, pairs = cut_off(turned, product.rows[order][channels])
                self._error[order] += error
                self._cut[order] += cut
                self._pairs += pairs if order == 0 else 0

    def result(self) -> Saturation:
        """Over all calls so far."""
        if not self._rows:
            return Saturation(self._product.name, 0.0, 0.0, 0)
        error = max(self._error)
        relative = math.sqrt(error / self._energy) if self._energy else (math.inf if error else 0.0)
        return Saturation(self._product.name, relative, max(self._cut) / max(1, self._pairs), self._rows)


def cut_off(activation: Codes, weight: Codes) -> tuple[float, int, int]:
    """Activation codes [rows, K] times weight codes [channels, K], neighbours along K summed in 16 bits.

    Returns the sum over all results of the squared amount that is cut off, how many pair sums were cut, and how many
    there are.
    """
    first, second = (part.astype(np.int32) for part in paired(activation))
    one, two = (part.astype(np.int32) for part in paired(weight))
    most = 255 * (np.maximum(one, 0) + np.maximum(two, 0))
    least = 255 * (np.minimum(one, 0) + np.minimum(two, 0))
    risky = (most > LIMIT) | (least < -LIMIT - 1)
    error, cut = 0.0, 0
    for channel in np.flatnonzero(risky.any(axis=1)):
        at = np.flatnonzero(risky[channel])
        sums = first[:, at] * one[channel, at] + second[:, at] * two[channel, at]
        lost = sums - np.clip(sums, -LIMIT - 1, LIMIT)
        error += float(np.square(lost.sum(axis=1, dtype=np.float64)).sum())
        cut += int(np.count_nonzero(lost))
    return error, cut, len(activation) * one.size


def matrices(product: Product, codes: Codes, zero: int, most: int) -> list[tuple[Codes, slice]]:
    """The activation as rows [at most `most`, K] evenly taken, with the output channels that they are multiplied by.

    One entry for each group of a convolution, which is padded with `zero`, along K in the order of the stored weight.
    """
    node, weight = product.node, product.weight_codes
    assert weight is not None
    if not convolves(product):
        turned = product.operator == "Gemm" and _ints(node, "transA", [0])[0]
        rows = (codes.T if turned else codes).reshape(-1, codes.shape[-2 if turned else -1])
        return [(rows[_evenly(len(rows), most)], slice(None))]
    kernel, axes = weight.shape[2:], weight.ndim - 2
    strides, dilations = (_ints(node, name, [1] * axes) for name in ("strides", "dilations"))
    reach = [(size - 1) * step + 1 for size, step in zip(kernel, dilations, strict=True)]
    pads = _pads(node, codes.shape[2:], reach, strides)
    padded = np.pad(codes, [(0, 0), (0, 0), *pads], constant_values=zero)
    view = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=tuple(range(2, 2 + axes)))
    steps = (slice(None), slice(None), *(slice(None, None, s) for s in strides))
    view = np.moveaxis(view[(*steps, *(slice(None, None, d) for d in dilations))], 1, 1 + axes)
    positions = np.unravel_index(_evenly(math.prod(view.shape[: 1 + axes]), most), view.shape[: 1 + axes])
    taken = view[positions]  # [positions, channels, *kernel]
    groups = _ints(node, "group", [1])[0]
    inputs, channels = weight.shape[1], weight.shape[0] // groups
    return [
        (
            taken[:, group * inputs : (group + 1) * inputs].reshape(len(taken), -1),
            slice(group * channels, (group + 1) * channels),
        )
        for group in range(groups)
    ]


def _innermost(part: Codes, product: Product) -> Codes:
    """Rows along channels, then kernel, turned to kernel, then channels."""
    assert product.weight_codes is not None
    inputs = product.weight_codes.shape[1]
    return part.reshape(len(part), inputs, -1).transpose(0, 2, 1).reshape(len(part), -1)


def _pads(node: ir.Node, sizes: tuple[int, ...], reach: list[int], strides: list[int]) -> list[tuple[int, int]]:
    attribute = node.attributes.get("auto_pad")
    kind = attribute.as_string() if attribute is not None else "NOTSET"
    axes = len(reach)
    if kind in ("SAME_UPPER", "SAME_LOWER"):
        total = [
            max(0, (math.ceil(size / step) - 1) * step + width - size)
            for size, width, step in zip(sizes, reach, strides, strict=True)
        ]
        upper = kind == "SAME_UPPER"
        return [(t // 2, t - t // 2) if upper else (t - t // 2, t // 2) for t in total]
    pads = [0] * (2 * axes) if kind == "VALID" else _ints(node, "pads", [0] * (2 * axes))
    return list(zip(pads[:axes], pads[axes:], strict=True))


def _dynamic(activation: npt.NDArray[Any]) -> tuple[Codes, float]:
    """As DynamicQuantizeLinear quantizes: uint8 over the range of the tensor and zero; codes and zero point."""
    low, high = float(activation.min()), float(activation.max())
    scale, zero = choose_scale(low, high, dtype="uint8", symmetric=False)
    return np.asarray(quantize(activation.astype(np.float32), scale, zero, "uint8")), float(zero)


def _evenly(count: int, most: int) -> npt.NDArray[np.int64]:
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64)) if count else np.zeros(0, np.int64)


def _ints(node: ir.Node, name: str, default: list[int]) -> list[int]:
    attribute = node.attributes.get(name)
    if attribute is None:
        return default
    return [int(attribute.as_int())] if attribute.type == ir.AttributeType.INT else list(attribute.as_ints())
