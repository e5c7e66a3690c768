"""What stands behind an output: the logits in front of Softmax, Sigmoid and ArgMax.

They are seen through what only moves elements (Reshape, Transpose, Slice, ...) or hardly changes them (Cast, quantize
and dequantize), and where Softmax and Sigmoid are written out in simpler operators.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

import onnx_ir as ir

Kind = Literal["classes", "binary", "values", "feature"]

_EQUAL = {"Identity", "Cast", "Dropout"}
_NEARLY = {*_EQUAL, "QuantizeLinear", "DequantizeLinear"}
_MOVING = {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Gather"}
_LAYER = re.compile(r"Gemm|MatMul|Conv|^QLinearAdd$|Normalization$")
_ARITHMETIC = {"Add", "Sub", "Sum", "Mul", "Div"}  # of a bias, a residual, a scale
_OF_INTEGERS: dict[str, Kind] = {"QLinearSoftmax": "classes", "QLinearSigmoid": "binary"}
_FAR = 6  # of these, at most


@dataclasses.dataclass(frozen=True)
class Behind:
    """What an output is made of.

    `kind`: what its head makes it. `scores`: its numbers, the output itself or what ArgMax and ZipMap take. `logits`:
    what the head takes, `scores` where there is none. `moves`: the nodes that then move elements, in their order.
    `axis`: of the classes in `scores`, None where nothing says or elements were moved. `is_linear`: its numbers are a
    layer's, and no probabilities. `is_opaque`: the head takes integers, and all there is to read are its probabilities.
    """

    kind: Kind
    scores: ir.Value
    logits: ir.Value
    moves: tuple[ir.Node, ...] = ()
    axis: int | None = None
    is_linear: bool = False
    is_opaque: bool = False


def behind(output: ir.Value, opset: int) -> Behind:
    """What the graph says of an output of it, in a model of standard operator set `opset`."""
    scores, label_axis = _scores(output)
    moves: list[ir.Node] = []
    value = scores
    while (node := _producer(value)) is not None:
        head = _head(node)
        if head is not None:
            kind, logits = head
            axis = label_axis if label_axis is not None or moves else _axis(node, opset)
            if logits is None:
                return Behind(kind, scores, scores, (), axis, is_opaque=True)
            return Behind(kind, scores, logits, tuple(reversed(moves)), axis)
        if node.op_type in _MOVING:
            moves.append(node)
        elif node.op_type not in {*_NEARLY, "Log"}:
            break
        value = _first(node)
    kind = "values" if label_axis is None else "classes"
    return Behind(kind, scores, _without(_EQUAL, scores), (), label_axis, _is_linear(scores))


def _scores(output: ir.Value) -> tuple[ir.Value, int | None]:
    """The numbers an output is made from, and the axis along which ArgMax takes the largest."""
    value = output
    while (node := _producer(value)) is not None:
        if node.op_type == "ArgMax":
            return _first(node), node.attributes.get_int("axis", 0)
        if node.op_type == "ZipMap":
            return _first(node), None
        if node.op_type not in _EQUAL | _MOVING:
            break
        value = _first(node)
    return output, None


def _head(node: ir.Node) -> tuple[Kind, ir.Value | None] | None:
    """What `node` makes of which logits, if it is a head; None of integers."""
    if node.op_type in _OF_INTEGERS:
        return _OF_INTEGERS[node.op_type], None
    if node.op_type in ("Softmax", "LogSoftmax"):
        return "classes", _first(node)
    if node.op_type == "Sigmoid":
        return "binary", _first(node)
    if (logits := _softmax_written_out(node)) is not None:
        return "classes", logits
    if (logits := _sigmoid_written_out(node)) is not None:
        return "binary", logits
    return None


def _axis(node: ir.Node, opset: int) -> int | None:
    """The axis of a Softmax; before opset 13 it is over all axes from there on, which is one only with sizes of 1."""
    if node.op_type not in ("Softmax", "LogSoftmax"):
        return None
    axis = node.attributes.get_int("axis", -1 if opset >= 13 else 1)
    shape = _first(node).shape
    if opset >= 13 or axis == -1:
        return axis
    return axis if shape is not None and all(dim == 1 for dim in list(shape)[axis:][1:]) else None


def _softmax_written_out(node: ir.Node) -> ir.Value | None:
    """x of exp(x) / sum(exp(x)), or of exp(x - max(x)) / ...; the division may be by a Reciprocal."""
    if node.op_type not in ("Div", "Mul"):
        return None
    powers, total = node.inputs[0], node.inputs[1]
    if node.op_type == "Mul":
        reciprocal = next((v for v in node.inputs if _is(v, "Reciprocal")), None)
        powers = next((v for v in node.inputs if v is not reciprocal), None)
        total = None if reciprocal is None else _input(reciprocal)
    if not _is(powers, "Exp") or not _is(total, "ReduceSum") or _input(total) is not powers:
        return None
    x = _input(powers)
    if _is(x, "Sub"):
        shifted, largest = x.producer().inputs  # type: ignore[union-attr]
        if _is(largest, "ReduceMax") and _input(largest) is shifted:
            return shifted
    return x


def _sigmoid_written_out(node: ir.Node) -> ir.Value | None:
    """x of 1 / (1 + exp(-x))."""
    if node.op_type == "Div" and _is_one(node.inputs[0]):
        below = node.inputs[1]
    elif node.op_type == "Reciprocal":
        below = node.inputs[0]
    else:
        return None
    if not _is(below, "Add"):
        return None
    terms = below.producer().inputs  # type: ignore[union-attr]
    power = next((v for v in terms if _is(v, "Exp")), None)
    if power is None or not any(_is_one(v) for v in terms) or not _is(_input(power), "Neg"):
        return None
    return _input(_input(power))


def _is_linear(value: ir.Value, far: int = _FAR) -> bool:
    """Whether numbers come from a layer with nothing but sums and products behind it."""
    node = _without(_NEARLY | _MOVING, value).producer()
    if node is None or far == 0:
        return False
    operands = [v for v in node.inputs if v is not None and node.op_type in _ARITHMETIC]
    return _LAYER.search(node.op_type) is not None or any(_is_linear(v, far - 1) for v in operands)


def _without(operators: set[str], value: ir.Value) -> ir.Value:
    """What `operators` were given, one after the other."""
    while (node := _producer(value)) is not None and node.op_type in operators:
        value = _first(node)
    return value


def _producer(value: ir.Value) -> ir.Node | None:
    """The node that computes `value` from a first input, if it does."""
    node = value.producer()
    return node if node is not None and node.inputs and node.inputs[0] is not None else None


def _first(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value


def _is(value: ir.Value | None, op_type: str) -> bool:
    node = _producer(value) if value is not None else None
    return node is not None and node.op_type == op_type


def _input(value: ir.Value | None) -> ir.Value | None:
    node = _producer(value) if value is not None else None
    return None if node is None else _first(node)


def _is_one(value: ir.Value | None) -> bool:
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return tensor is not None and tensor.size == 1 and float(tensor.numpy().reshape(())) == 1
