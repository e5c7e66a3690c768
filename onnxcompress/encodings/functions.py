"""The local functions in which encodings run: one readable node a weight, expanded and folded by ONNX Runtime at load.

All of them use operators that exist since opset 9 (without channels: 7) in one form, but for the tail cut of an odd
element count (Slice with inputs,
opset 10) and the running count of `ExpandSparse` (CumSum, opset 11). A code byte is expanded by a table lookup: 256
rows of 8/bits codes,
which loads faster in ONNX Runtime 1.32 than casting packed 4-bit integers, and needs no lift of the model's opset.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

DOMAIN = "onnxcompress"
LEAST_IR_VERSION = 8  # model-local functions

_DEPALETTIZE = re.compile(r"Depalettize(?P<bits>[1248])(?P<channels>Channels)?(?P<padded>Padded)?(?P<float>Float)?$")


def depalettize(bits: int, *, channels: bool, padded: bool, to_float: bool) -> str:
    """Name of the function that turns packed codes and a codebook into a weight.

    `channels`: an own codebook per index of one axis. `padded`: the last byte holds unused codes.
    `to_float`: the codebook is stored as float16, the weight is float32.
    """
    return f"Depalettize{bits}" + "Channels" * channels + "Padded" * padded + "Float" * to_float


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
    used = {
        node.op_type
        for root in [model.graph, *(f.graph for f in model.functions.values())]
        for node in ir.traversal.RecursiveGraphIterator(root)
        if node.domain == DOMAIN
    }
    for key in [k for k in model.functions if k[0] == DOMAIN]:
        if key[1] in used:
            model.functions[key] = build(key[1], model.opset_imports.get("", 1))
        else:
            del model.functions[key]
    if not used:
        for imports in [model.opset_imports, *(f.opset_imports for f in model.functions.values())]:
            imports.pop(DOMAIN, None)


def build(name: str, opset: int) -> ir.Function:
    """The function `name` in terms of standard operators of `opset`."""
    if match := _DEPALETTIZE.match(name):
        return _depalettize(
            name, opset, int(match["bits"]), bool(match["channels"]), bool(match["padded"]), bool(match["float"])
        )
    return {"Dequantize": _dequantize, "DequantizeHalf": _dequantize, "ExpandSparse": _expand_sparse}[name](name, opset)


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


def _depalettize(name: str, opset: int, bits: int, channels: bool, padded: bool, to_float: bool) -> ir.Function:
    body = _Body(["codes", "codebook", "shape", *(["channel"] if channels else [])])
    codes, codebook, shape = (body.inputs[n] for n in ("codes", "codebook", "shape"))
    at = body.op("Cast", codes, to=ir.DataType.INT32)
    table = body.table(bits, opset) if bits < 8 else None
    if channels:
        index = at if table is None else body.op("Gather", table, at, axis=0)
        if padded:
            index = _cut(body, body.op("Reshape", index, body.constant(_int64(-1))), shape)
        index = body.op("Reshape", index, shape)
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
        if padded:
            out = _cut(body, body.op("Reshape", out, body.constant(_int64(-1))), shape)
        out = body.op("Reshape", out, shape)
    if to_float:
        out = body.op("Cast", out, to=ir.DataType.FLOAT)
    return body.function(name, opset, out)


def _dequantize(name: str, opset: int) -> ir.Function:
    """(q - zero_point) * scale in float32, then to float16 where the name says so; unlike DequantizeLinear it folds at
    load.
    """
    body = _Body(["q", "scale", "zero_point"])
    q, scale, zero_point = body.inputs.values()
    centred = body.op(
        "Sub", body.op("Cast", q, to=ir.DataType.FLOAT), body.op("Cast", zero_point, to=ir.DataType.FLOAT)
    )
    out = body.op("Mul", centred, scale)
    if name.endswith("Half"):
        out = body.op("Cast", out, to=ir.DataType.FLOAT16)
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
