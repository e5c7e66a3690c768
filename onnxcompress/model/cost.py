"""What a model costs to run, node by node: multiply-accumulates and bytes of weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import onnx_ir as ir

from onnxcompress.model import bridge
from onnxcompress.model.shapes import ShapeInfo, shapes, values

Sizes = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class NodeCost:
    """Cost of one node. `macs`: None where a shape is unknown; `weight_bytes`: of the constants it reads, as stored."""

    name: str
    op_type: str
    domain: str
    macs: int | None
    weight_bytes: int


def costs(
    model: ir.Model, known: Mapping[str, ShapeInfo] | None = None, *, free: Mapping[str, int] | int = 1
) -> list[NodeCost]:
    """Cost of every node of the graph and its subgraphs, in their order (a body counts as if it ran once).

    `known`: shapes (default: declared and inferred). `free`: sizes of named free dimensions, or one for all of them
    and for unknown ones. Operators without a rule cost 0 multiply-accumulates; constants that nodes share count at each
    node, and what is computed from constants alone (a decoder of weights) counts at the node that reads the result.
    """
    table = known if known is not None else shapes(model)
    keys = {id(value): f"{path}{value.name}" for path, owner in bridge.scopes(model) for value in values(owner)}
    stored_bytes: dict[int, int | None] = {}
    found = []
    for path, owner in bridge.scopes(model):
        if isinstance(owner, ir.Function):
            continue
        for node in owner:
            if node.op_type == "Constant" or _is_decoder(node, stored_bytes):
                continue
            name = path + (node.name or node.outputs[0].name or "")
            stored = sum(_constant_bytes(value, stored_bytes) or 0 for value in node.inputs if value is not None)
            macs = _macs(_Shapes(node, keys, table, free))
            found.append(NodeCost(name, node.op_type, node.domain, macs, stored))
    return found


def total_macs(found: list[NodeCost]) -> int:
    """Multiply-accumulates of all nodes whose shapes are known."""
    return sum(entry.macs or 0 for entry in found)


def _is_decoder(node: ir.Node, seen: dict[int, int | None]) -> bool:
    return bool(node.inputs) and all(value is None or _constant_bytes(value, seen) is not None for value in node.inputs)


def _constant_bytes(value: ir.Value, seen: dict[int, int | None], depth: int = 0) -> int | None:
    """Bytes of the constants `value` is computed from; None when it depends on an input."""
    if id(value) not in seen:
        seen[id(value)] = None if depth > 16 else _count_bytes(value, seen, depth)  # decoders are a few nodes deep
    return seen[id(value)]


def _count_bytes(value: ir.Value, seen: dict[int, int | None], depth: int) -> int | None:
    if value.const_value is not None and value.is_initializer():
        return value.const_value.nbytes
    node = value.producer()
    if node is None:
        return None
    if node.op_type == "Constant":
        attribute = node.attributes.get("value")
        return int(attribute.value.nbytes) if attribute is not None and not attribute.is_ref() else 0
    if not node.inputs:
        return None
    total = 0
    for source in node.inputs:
        stored = _constant_bytes(source, seen, depth + 1) if source is not None else 0
        if stored is None:
            return None
        total += stored
    return total


class _Shapes:
    """Shapes of one node's inputs and outputs, free dimensions filled in. Raises LookupError for what is unknown."""

    def __init__(
        self,
        node: ir.Node,
        keys: Mapping[int, str],
        table: Mapping[str, ShapeInfo],
        free: Mapping[str, int] | int,
    ) -> None:
        self.node = node
        self._keys = keys
        self._table = table
        self._free = free

    def _of(self, value: ir.Value | None) -> Sizes:
        info = self._table.get(self._keys.get(id(value), "")) if value is not None else None
        if info is None or info.dims is None:
            raise LookupError
        return tuple(self._size(size) for size in info.dims)

    def _size(self, size: int | str | None) -> int:
        if isinstance(size, int):
            return size
        if isinstance(self._free, int):
            return self._free
        if size is None or size not in self._free:
            raise LookupError
        return self._free[size]

    def input(self, index: int) -> Sizes:
        return self._of(self.node.inputs[index] if index < len(self.node.inputs) else None)

    def output(self) -> Sizes:
        return self._of(self.node.outputs[0])

    def attribute(self, name: str, default: int) -> int:
        found = self.node.attributes.get(name)
        return int(found.value) if found is not None and not found.is_ref() else default


def _macs(known: _Shapes) -> int | None:
    rule = _RULES.get(known.node.op_type)
    if rule is None:
        return 0
    try:
        return rule(known)
    except (LookupError, ValueError):  # an unknown shape, or one of another rank than the rule expects
        return None


# One rule an operator: shapes in, multiply-accumulates out (bias additions are not counted).


def _conv(weight: int) -> Callable[[_Shapes], int]:
    return lambda s: math.prod(s.output()) * math.prod(s.input(weight)[1:])


def _conv_transpose(s: _Shapes) -> int:
    return math.prod(s.input(0)) * math.prod(s.input(1)[1:])


def _matmul(s: _Shapes) -> int:
    return math.prod(s.output()) * s.input(0)[-1]


def _gemm(s: _Shapes) -> int:
    rows, columns = s.input(0)
    return math.prod(s.output()) * (rows if s.attribute("transA", 0) else columns)


def _fused_matmul(s: _Shapes) -> int:
    return math.prod(s.output()) * s.input(0)[-2 if s.attribute("transA", 0) else -1]


def _recurrent(s: _Shapes) -> int:
    steps = math.prod(s.input(0)[:2])  # sequence and batch, in either layout
    return steps * (math.prod(s.input(1)) + math.prod(s.input(2)))


def _matmul_nbits(s: _Shapes) -> int:
    return math.prod(s.input(0)) * s.attribute("N", 0)


def _contrib_attention(s: _Shapes) -> int:
    batch, steps, _ = s.input(0)
    inner, three = s.input(1)
    hidden = three // 3
    return batch * steps * inner * three + 2 * batch * steps * steps * hidden


def _attention(s: _Shapes) -> int:
    """Scores and their product with the values, for [batch, steps, hidden] or [batch, heads, steps, head]."""
    query, key = s.input(0), s.input(1)
    return 2 * math.prod(query) * key[-2]


_RULES: dict[str, Callable[[_Shapes], int]] = {
    "Conv": _conv(1),
    "FusedConv": _conv(1),
    "NhwcFusedConv": _conv(1),
    "ConvInteger": _conv(1),
    "QLinearConv": _conv(3),
    "ConvTranspose": _conv_transpose,
    "MatMul": _matmul,
    "MatMulInteger": _matmul,
    "MatMulIntegerToFloat": _matmul,
    "DynamicQuantizeMatMul": _matmul,
    "QLinearMatMul": _matmul,
    "MatMulNBits": _matmul_nbits,
    "FusedMatMul": _fused_matmul,
    "Gemm": _gemm,
    "FusedGemm": _gemm,
    "QGemm": _gemm,
    "LSTM": _recurrent,
    "GRU": _recurrent,
    "RNN": _recurrent,
    "DynamicQuantizeLSTM": _recurrent,
    "Attention": lambda s: _contrib_attention(s) if s.node.domain == "com.microsoft" else _attention(s),
    "MultiHeadAttention": _attention,
    "GroupQueryAttention": _attention,
}
