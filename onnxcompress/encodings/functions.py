"""The local functions in which encodings run: one readable node a weight, expanded and folded by ONNX Runtime at load.

All of them use operators that exist since opset 7 (with channels: 9) in one form, but for the cut and the running count
of `ExpandSparse` (Slice with inputs, opset 10; CumSum, opset 11). A code byte is expanded by a table lookup: 256 rows
of 8/bits codes, which loads faster in ONNX Runtime 1.32 than casting packed 4-bit integers, and needs no lift of the
model's opset.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir

DOMAIN = "onnxcompress"
LEAST_IR_VERSION = 8  # model-local functions

_DEPALETTIZE = re.compile(r"Depalettize(?P<bits>[1248])(?P<channels>Channels)?(?P<tail>Tail)?(?P<float>Float)?$")


# Dequantize functions: suffix of the name -> element type of the weight.
DEQUANTIZE = {
    "": ir.DataType.FLOAT,
    "Half": ir.DataType.FLOAT16,
    "BFloat": ir.DataType.BFLOAT16,
    "Double": ir.DataType.DOUBLE,
}
EXPAND_SPARSE = "ExpandSparse"


class Depalettize(NamedTuple):
    """What the name of a `Depalettize...` function says; see `depalettize`."""

    bits: int
    channels: bool
    tail: bool
    to_float: bool


def depalettize(bits: int, *, channels: bool, tail: bool, to_float: bool) -> str:
    """Name of the function that turns packed codes and a codebook into a weight.

    `channels`: an own codebook per index of one axis. `tail`: the codes that fill no whole byte come apart.
    `to_float`: the codebook is stored as float16 (or bfloat16), the weight is float32.
    """
    return f"Depalettize{bits}" + "Channels" * channels + "Tail" * tail + "Float" * to_float


def parse_depalettize(name: str) -> Depalettize:
    """Inverse of `depalettize`.

    Raises:
        ValueError: `name` is no such function's.
    """
    match = _DEPALETTIZE.match(name)
    if match is None:
        raise ValueError(f"{name} is no function of this package")
    return Depalettize(int(match["bits"]), bool(match["channels"]), bool(match["tail"]), bool(match["float"]))


def inputs_of(name: str) -> int | None:
    """How many inputs the encoding function `name` has; None for any other name."""
    if _DEPALETTIZE.match(name):
        call = parse_depalettize(name)
        return 3 + call.channels + call.tail
    dequantize = name.startswith("Dequantize") and name.removeprefix("Dequantize") in DEQUANTIZE
    return 3 if name == EXPAND_SPARSE or dequantize else None


def unpack_table(bits: int) -> np.ndarray:
    """uint8 [256, 8 / bits]: the codes in each byte, lowest bits first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint16)
    return ((np.arange(256, dtype=np.uint16)[:, None] >> shifts) & ((1 << bits) - 1)).astype(np.uint8)


def require(model: ir.Model, owner: ir.Graph | ir.Function, name: str) -> None:
    """Make function `name` callable from `owner`: define it, import its domain, lift the IR version to one with
    functions.
    """
    key = (DOMAIN, name, "")
    if key not in model.functions:
        model.functions[key] = build(name, model.opset_imports.get("", 1))
    model.opset_imports[DOMAIN] = 1
    if isinstance(owner, ir.Function):
        owner.opset_imports[DOMAIN] = 1
    if model.ir_version < LEAST_IR_VERSION:
        lift_ir_version(model)


def lift_ir_version(model: ir.Model, version: int = LEAST_IR_VERSION) -> None:
    """Raise the IR version; the meaning stays.

    Below IR 4 every initializer must be listed as a graph input and is nevertheless constant to ONNX Runtime. From 4
    on a listed initializer is a default that the caller may override, so the lists go.
    """
    if model.ir_version < 4:
        for value in [v for v in model.graph.inputs if v.is_initializer()]:
            model.graph.inputs.remove(value)
    model.ir_version = max(model.ir_version or 0, version)


def refresh(model: ir.Model) -> None:
    """Build the model's functions again, after its opset changed; drop those nobody calls."""
    used = {node.op_type for node in _nodes(model) if node.domain == DOMAIN}
    for key in _keys(model):
        if key[1] in used:
            model.functions[key] = build(key[1], model.opset_imports.get("", 1))
        else:
            del model.functions[key]
    _drop_unused_imports(model)


def release(model: ir.Model, name: str) -> None:
    """Drop function `name` unless some node still calls it."""
    if not any(node.domain == DOMAIN and node.op_type == name for node in _nodes(model)):
        model.functions.pop((DOMAIN, name, ""), None)
        _drop_unused_imports(model)


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    for root in [model.graph, *(f.graph for f in model.functions.values())]:
        yield from ir.traversal.RecursiveGraphIterator(root)


def _keys(model: ir.Model) -> list[tuple[str, str, str]]:
    return [key for key in model.functions if key[0] == DOMAIN and inputs_of(key[1]) is not None]


def _drop_unused_imports(model: ir.Model) -> None:
    if not any(key[0] == DOMAIN for key in model.functions):
        for imports in [model.opset_imports, *(f.opset_imports for f in model.functions.values())]:
            imports.pop(DOMAIN, None)


def build(name: str, opset: int) -> ir.Function:
    """The function `name` in terms of standard operators of `opset`."""
    if name == EXPAND_SPARSE:
        return _expand_sparse(name, opset)
    if name.startswith("Dequantize"):
        return _dequantize(name, opset)
    return _depalettize(name, opset, parse_depalettize(name))


class _Body:
    """A function body in the making."""

    def __init__(self, inputs: Sequence[str]) -> None:
        self.inputs = {name: ir.Value(name=name) for name in inputs}
        self.nodes: list[ir.Node] = []

    def op(self, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        node = ir.Node(
            "",
            op_type,
            inputs,
            attributes=ir.convenience.convert_attributes(attributes),
            outputs=[ir.Value(name=f"v{len(self.nodes)}")],
            name="",
        )
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, array: np.ndarray) -> ir.Value:
        return self.op("Constant", value=ir.tensor(array))

    def table(self, bits: int, opset: int) -> ir.Value:
        """The int32 unpack table; stored a byte an entry where Constant may hold bytes."""
        array = unpack_table(bits)
        return self.op("Cast", self.constant(array if opset >= 9 else array.astype(np.float32)), to=ir.DataType.INT32)

    def function(self, name: str, opset: int, output: ir.Value) -> ir.Function:
        graph = ir.Graph(list(self.inputs.values()), [output], nodes=self.nodes, opset_imports={"": opset}, name=name)
        return ir.Function(DOMAIN, name, graph=graph, attributes=[])


def _int64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def _cut(body: _Body, flat: ir.Value, shape: ir.Value) -> ir.Value:
    """The first prod(shape) elements of `flat`."""
    return body.op("Slice", flat, body.constant(_int64(0)), body.op("ReduceProd", shape, keepdims=1))


def _depalettize(name: str, opset: int, call: Depalettize) -> ir.Function:
    names = ["codes", "codebook", "shape", *(["channel"] if call.channels else []), *(["tail"] if call.tail else [])]
    body = _Body(names)
    codes, codebook, shape = (body.inputs[n] for n in ("codes", "codebook", "shape"))
    at = body.op("Cast", codes, to=ir.DataType.INT32)
    tail = body.op("Cast", body.inputs["tail"], to=ir.DataType.INT32) if call.tail else None
    table = body.table(call.bits, opset) if call.bits < 8 else None
    if call.channels:
        index = at if table is None else body.op("Gather", table, at, axis=0)
        index = body.op("Reshape", _joined(body, index, tail), shape)
        # `channel` numbers the indices of the channel axis and is 1 long on all others. It is stored: ONNX Runtime
        # 1.32 does not fold NonZero.
        width = body.op(
            "Cast", body.op("Gather", body.op("Shape", codebook), body.constant(_int64(1))), to=ir.DataType.INT32
        )
        start = body.op("Mul", body.op("Cast", body.inputs["channel"], to=ir.DataType.INT32), width)
        index = body.op("Add", index, start)
        out = body.op("Gather", body.op("Reshape", codebook, body.constant(_int64(-1))), index, axis=0)
    else:
        rows = codebook if table is None else body.op("Gather", codebook, table, axis=0)
        out = body.op("Gather", rows, at, axis=0)
        rest = None if tail is None else body.op("Gather", codebook, tail, axis=0)
        out = body.op("Reshape", _joined(body, out, rest), shape)
    if call.to_float:
        out = body.op("Cast", out, to=ir.DataType.FLOAT)
    return body.function(name, opset, out)


def _joined(body: _Body, rows: ir.Value, tail: ir.Value | None) -> ir.Value:
    """[bytes, codes a byte] and [up to 7] as one row; `rows` itself when there is no tail."""
    if tail is None:
        return rows
    # Flatten, as a Reshape to -1 would need an int64 Constant, which opsets 7 and 8 do not have.
    return body.op("Concat", body.op("Flatten", rows, axis=0), body.op("Flatten", tail, axis=0), axis=1)


def _dequantize(name: str, opset: int) -> ir.Function:
    """(q - zero_point) * scale in float32, then to the type in the name; unlike DequantizeLinear it folds at load."""
    body = _Body(["q", "scale", "zero_point"])
    q, scale, zero_point = body.inputs.values()
    centred = body.op(
        "Sub", body.op("Cast", q, to=ir.DataType.FLOAT), body.op("Cast", zero_point, to=ir.DataType.FLOAT)
    )
    out = body.op("Mul", centred, scale)
    to = DEQUANTIZE[name.removeprefix("Dequantize")]
    if to != ir.DataType.FLOAT:
        out = body.op("Cast", out, to=to)
    return body.function(name, opset, out)


def _expand_sparse(name: str, opset: int) -> ir.Function:
    """Bit mask and packed non-zero values to a dense weight: element i is values[count of set bits up to i] or 0."""
    body = _Body(["mask", "values", "shape"])
    mask, values, shape = body.inputs.values()
    bits = body.op("Gather", body.table(1, opset), body.op("Cast", mask, to=ir.DataType.INT32), axis=0)
    bits = _cut(body, body.op("Reshape", bits, body.constant(_int64(-1))), shape)
    index = body.op("Mul", body.op("CumSum", bits, body.constant(np.array(0, np.int32))), bits)
    # values[0] is the zero that unset bits point at.
    return body.function(name, opset, body.op("Reshape", body.op("Gather", values, index, axis=0), shape))
