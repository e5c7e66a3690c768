"""Which integer products of a model can overflow 16 bits, from the stored weights alone.

x86 CPUs without VNNI multiply unsigned by signed bytes and add neighbouring products in 16 bits that saturate
(`vpmaddubsw`: a0 w0 + a1 w1, clipped to -32,768..32,767). CPUs with VNNI add in 32 bits, so that the same file gives
other answers there, and a test on one cannot show what happens on the other; the largest such sum shows it on any.

1. A product is a MatMul, Conv or Gemm between dequantized inputs, or one of the integer operators
   (MatMulInteger, ConvInteger, QLinearMatMul, QLinearConv, and QGemm, MatMulIntegerToFloat, DynamicQuantizeMatMul,
   QAttention, DynamicQuantizeLSTM of com.microsoft).
2. It is bounded if its left side is unsigned and its right side signed: other pairs of types are added in 32 bits.
3. Kernels pair elements 2i and 2i + 1 along the summed axis. Convolutions run with channels outermost or innermost, so
   both orders count. Other engines may pair otherwise: the largest sum of any two elements of a row is told beside it.
4. Activations take all codes 0..255 unless a calibrated range narrows them; a convolution also reads the zero point,
   as padding. A right side that is computed can hold any int8.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.encodings.recognize import constant
from onnxcompress.model import bridge
from onnxcompress.numerics.affine import pair_sum_bound

LIMIT = 32_767
Codes = npt.NDArray[Any]

# Where an integer operator takes the activation, its scale and zero point, the weight and its zero point.
_OPERATORS: dict[str, tuple[int, int | None, int | None, int, int]] = {
    "MatMulInteger": (0, None, 2, 1, 3),
    "ConvInteger": (0, None, 2, 1, 3),
    "QLinearMatMul": (0, 1, 2, 3, 5),
    "QLinearConv": (0, 1, 2, 3, 5),
    "QGemm": (0, 1, 2, 3, 5),
    "MatMulIntegerToFloat": (0, 2, 4, 1, 5),
    "DynamicQuantizeMatMul": (0, None, None, 1, 3),
    "QAttention": (0, 3, 6, 1, 7),
}
_LSTM_WEIGHTS = (1, 2)
_DYNAMIC = {"DynamicQuantizeMatMul", "DynamicQuantizeLSTM"}  # they quantize their activation themselves, to uint8
_FLOATS = {"MatMul", "Conv", "Gemm"}
_CONVOLUTIONS = {"Conv", "ConvInteger", "QLinearConv"}


@dataclasses.dataclass(frozen=True)
class PairBound:
    """The largest sum of two neighbouring products of one node, over all its output channels.

    `node`: its name with the path of its scope (of its first output, where it has none); `weight`: the name of what
    holds the codes, None where they are computed. `activation`: the name of the activation's codes. `codes`: the least
    and greatest code it takes. `neighbours`: largest |a0 w0 + a1 w1| over neighbours; `any_pair`: over any two elements
    that are summed. `channel`, `channels_at_risk`, `channels`: the output channel of the largest, how many reach above
    `LIMIT`, and how many there are.
    """

    node: str
    op_type: str
    weight: str | None
    activation: str
    codes: tuple[int, int]
    neighbours: int
    any_pair: int
    channel: int
    channels_at_risk: int
    channels: int

    @property
    def at_risk(self) -> bool:
        """True where neighbours can overflow 16 bits."""
        return self.neighbours > LIMIT


@dataclasses.dataclass(frozen=True, eq=False)
class Product:
    """A product of unsigned activation codes and int8 weight codes.

    `codes`: the value that holds the activation's codes; None where the operator quantizes them itself. `types`: of the
    codes on both sides. `real`: the name of the float activation, with path. `scale`, `zero_point`: of the codes, None
    where they are computed or one a channel; `zero`: the value that holds the zero point. `rows`: the weight as
    [channels, K], once in each order in which kernels run along K; None where it is computed.
    """

    path: str
    node: ir.Node
    operator: str
    codes: ir.Value | None
    types: tuple[ir.DataType, ir.DataType]
    real: str
    scale: float | None
    zero_point: int | None
    zero: ir.Value | None
    weight: str | None
    weight_codes: Codes | None
    rows: tuple[Codes, ...] | None

    @property
    def name(self) -> str:
        """The node's name with the path of its scope."""
        return f"{self.path}{self.node.name or self.node.outputs[0].name}"


def pair_bounds(model: ir.Model, ranges: Mapping[str, tuple[float, float]] | None = None) -> list[PairBound]:
    """The bound of every product (rules 1 and 2) of `model`, in its order.

    `ranges`: least and greatest value of float activations, by their names with the path of their scope, as
    `calibration.ranges` finds them (`real_activations` lists those that count); others take 0..255.
    """
    return [bounded(product, (ranges or {}).get(product.real)) for product in products(model)]


def real_activations(model: ir.Model) -> list[str]:
    """The float activations whose calibrated range narrows a bound."""
    return list(dict.fromkeys(product.real for product in products(model) if product.scale is not None))


def bounded(product: Product, real: tuple[float, float] | None = None) -> PairBound:
    """The bound of one product; `real`: the range of its float activation."""
    low, high = _code_range(product, real)
    common: dict[str, Any] = {
        "node": product.name,
        "op_type": product.operator,
        "weight": product.weight,
        "activation": product.real if product.codes is None else f"{product.path}{product.codes.name}",
        "codes": (low, high),
    }
    if product.rows is None:
        most = 2 * high * 128
        return PairBound(**common, neighbours=most, any_pair=most, channel=0, channels_at_risk=1, channels=1)
    first = product.rows[0]
    anyhow = pair_sum_bound(first, axis=1, activation=(low, high), neighbours=False) if first.size else None
    reach = np.max([_neighbours(rows, low, high) for rows in product.rows], axis=0)
    return PairBound(
        **common,
        neighbours=int(reach.max(initial=0)),
        any_pair=max(anyhow.highest, -anyhow.lowest) if anyhow is not None else 0,
        channel=int(reach.argmax()) if reach.size else 0,
        channels_at_risk=int((reach > LIMIT).sum()),
        channels=len(reach),
    )


def has_integers(model: ir.Model) -> bool:
    """True when `model` computes with 8-bit integers, so that its answers may depend on the machine."""
    return next(_all(model, unsigned_only=False), None) is not None


def products(model: ir.Model) -> Iterator[Product]:
    """Every product of unsigned activations and signed weights, in all graphs and functions."""
    return _all(model, unsigned_only=True)


def convolves(product: Product) -> bool:
    """True for a convolution."""
    return product.operator in _CONVOLUTIONS


def paired(rows: Codes) -> tuple[Codes, Codes]:
    """The first and second elements of all neighbours along K: two arrays [channels, ceil(K / 2)]."""
    if rows.shape[1] % 2:
        rows = np.concatenate([rows, np.zeros((len(rows), 1), rows.dtype)], axis=1)
    return rows[:, 0::2], rows[:, 1::2]


def _all(model: ir.Model, *, unsigned_only: bool) -> Iterator[Product]:
    for path, owner in bridge.scopes(model):
        for node in owner:
            for product in _products(path, node):
                if not unsigned_only or product.types == (ir.DataType.UINT8, ir.DataType.INT8):
                    yield product


def _products(path: str, node: ir.Node) -> Iterator[Product]:
    if node.domain in ("", "ai.onnx") and node.op_type in _FLOATS:
        found = _between_dequantized(path, node)
        if found is not None:
            yield found
    elif node.op_type in _OPERATORS and node.domain in ("", "ai.onnx", "com.microsoft"):
        yield _integer_operator(path, node)
    elif node.op_type == "DynamicQuantizeLSTM" and node.domain == "com.microsoft":
        for index in _LSTM_WEIGHTS:
            yield _made(path, node, index, None, node.inputs[0], None, None, _input(node, index), None)


def _between_dequantized(path: str, node: ir.Node) -> Product | None:
    if len(node.inputs) < 2:
        return None
    left, right = _dequantize(node.inputs[0]), _dequantize(node.inputs[1], turned=True)
    if left is None or right is None or constant(left.inputs[0]) is not None:
        return None
    codes = left.inputs[0]
    source = codes.producer() if codes is not None else None
    real = node.inputs[0]
    if source is not None and source.op_type == "QuantizeLinear" and source.inputs[0] is not None:
        real = source.inputs[0]
    weight = right.inputs[0]
    tensor = constant(weight)
    turned = right.outputs[0] is not node.inputs[1]
    array = None if tensor is None else np.asarray(tensor.numpy())
    if array is not None and turned:
        between = node.inputs[1]
        assert between is not None
        transpose = between.producer()
        assert transpose is not None
        order = transpose.attributes.get("perm")
        array = array.transpose(None if order is None else list(order.as_ints()))
    scale, zero = _input(left, 1), _input(left, 2)
    return _made(path, node, 1, codes, real, scale, zero, weight, _input(right, 2), array=array)


def _integer_operator(path: str, node: ir.Node) -> Product:
    at, scale_at, zero_at, weight_at, weight_zero_at = _OPERATORS[node.op_type]
    activation, weight = _input(node, at), _input(node, weight_at)
    codes = None if node.op_type in _DYNAMIC else activation
    real, scale, zero = activation, _input(node, scale_at), _input(node, zero_at)
    source = codes.producer() if codes is not None else None
    if source is not None and source.op_type in ("QuantizeLinear", "DynamicQuantizeLinear"):
        real = source.inputs[0]
        if source.op_type == "QuantizeLinear":
            scale, zero = _input(source, 1), _input(source, 2)
    return _made(path, node, weight_at, codes, real, scale, zero, weight, _input(node, weight_zero_at))


def _made(
    path: str,
    node: ir.Node,
    index: int,
    codes: ir.Value | None,
    real: ir.Value | None,
    scale: ir.Value | None,
    zero: ir.Value | None,
    weight: ir.Value | None,
    weight_zero: ir.Value | None,
    *,
    array: Codes | None = None,
) -> Product:
    tensor = constant(weight)
    if array is None and tensor is not None:
        array = np.asarray(tensor.numpy())
    scale_of, zero_of = _scalar(scale), _scalar(zero)
    held = weight.name if weight is not None and array is not None else None
    return Product(
        path=path,
        node=node,
        operator=node.op_type,
        codes=codes,
        types=(_type(codes, zero), _type(weight, weight_zero)),
        real=f"{path}{real.name}" if real is not None else "",
        scale=scale_of,
        zero_point=int(zero_of) if zero_of is not None else None,
        zero=zero,
        weight=f"{path}{held}" if held else None,
        weight_codes=array,
        rows=None if array is None else _rows(node, index, array),
    )


def _rows(node: ir.Node, index: int, array: Codes) -> tuple[Codes, ...]:
    """The weight as [channels, K] in the orders of rule 3."""
    if array.ndim < 2:
        return (array.reshape(1, -1),)
    if node.op_type in _CONVOLUTIONS:
        taps = array.reshape(array.shape[0], array.shape[1], -1)
        return taps.reshape(len(taps), -1), taps.transpose(0, 2, 1).reshape(len(taps), -1)
    turned = node.op_type in ("Gemm", "QGemm") and _integer(node, "transB")
    order = array if turned else array.swapaxes(-1, -2)
    return (order.reshape(-1, order.shape[-1]),)


def _code_range(product: Product, real: tuple[float, float] | None) -> tuple[int, int]:
    if real is None or product.scale is None or not product.scale > 0:
        return 0, 255
    zero = product.zero_point or 0
    low, high = (int(np.clip(np.rint(end / product.scale) + zero, 0, 255)) for end in real)
    if convolves(product):
        low, high = min(low, zero), max(high, zero)
    return low, high


def _neighbours(rows: Codes, low: int, high: int) -> npt.NDArray[np.int64]:
    """Per channel, the largest |a0 w0 + a1 w1| over neighbours, of codes from `low` to `high`."""
    above, below = _extremes(rows, low, high)
    most = np.add(*paired(above)).max(axis=1, initial=0)
    least = np.add(*paired(below)).min(axis=1, initial=0)
    return np.asarray(np.maximum(most, -least), np.int64)


def _extremes(rows: Codes, low: int, high: int) -> tuple[Codes, Codes]:
    """The greatest and least product of every weight with a code from `low` to `high`."""
    wide = rows.astype(np.int64)
    return np.maximum(wide * low, wide * high), np.minimum(wide * low, wide * high)


def _type(codes: ir.Value | None, zero: ir.Value | None) -> ir.DataType:
    """Of codes: as the value or its zero point says; without either they are uint8, as QuantizeLinear's default."""
    for value in (codes, zero):
        tensor = constant(value)
        kind = tensor.dtype if tensor is not None else value.dtype if value is not None else None
        if kind is not None:
            return kind
    source = codes.producer() if codes is not None else None
    given = source.attributes.get("output_dtype") if source is not None else None
    return ir.DataType(given.as_int()) if given is not None and given.as_int() else ir.DataType.UINT8


def _dequantize(value: ir.Value | None, *, turned: bool = False) -> ir.Node | None:
    """The DequantizeLinear that makes `value` out of 8-bit codes; with `turned`, also behind a Transpose."""
    node = value.producer() if value is not None else None
    if node is not None and turned and node.op_type == "Transpose" and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    if node is None or node.op_type != "DequantizeLinear" or node.domain not in ("", "ai.onnx", "com.microsoft"):
        return None
    return node


def _input(node: ir.Node, index: int | None) -> ir.Value | None:
    return node.inputs[index] if index is not None and index < len(node.inputs) else None


def _scalar(value: ir.Value | None) -> float | None:
    tensor = constant(value)
    return float(np.asarray(tensor.numpy()).reshape(())) if tensor is not None and tensor.size == 1 else None


def _integer(node: ir.Node, name: str) -> int:
    attribute = node.attributes.get(name)
    return 0 if attribute is None else int(attribute.as_int())
