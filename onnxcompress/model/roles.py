"""What a constant is to the operators that consume it: followed through everything that only moves or casts its
elements.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

import onnx_ir as ir

Role = Literal["conv", "matmul", "gemm", "embedding", "recurrent", "bias", "norm", "other"]
WEIGHT_ROLES: tuple[Role, ...] = ("conv", "matmul", "gemm", "embedding", "recurrent")

# Elements keep their order and axes.
SAME_AXES = {"Identity", "Cast", "CastLike", "Dropout", "QuantizeLinear", "DequantizeLinear", "Clip"}
# Elements are moved, cut or joined; which axis is which is no longer known.
MOVED = {"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Concat", "Split", "Expand", "Tile", "Pad", "Gather"}
NORMALIZATION = {
    "BatchNormalization", "LayerNormalization", "InstanceNormalization", "GroupNormalization",
    "RMSNormalization",
    "SimplifiedLayerNormalization", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "GroupNorm",
    "SkipGroupNorm",
}  # fmt: skip
CONVOLUTIONS = {"Conv", "FusedConv", "ConvInteger", "NhwcConv", "DeformConv"}
RECURRENT = {"LSTM", "GRU", "RNN", "DynamicQuantizeLSTM"}


@dataclasses.dataclass(frozen=True)
class Use:
    """One operator that consumes a weight.

    `path`: the nodes in between, from the weight on. `output_axis`: the axis of the stored weight along which outputs
    (channels, units) lie;
    `input_axes`: those that are summed over; None and () where a reshape in between hides them.
    """

    node: ir.Node
    index: int
    role: Role
    output_axis: int | None = None
    input_axes: tuple[int, ...] = ()
    path: tuple[ir.Node, ...] = ()

    @property
    def node_name(self) -> str:
        """Name of the consumer; that of its first output where it has none."""
        return self.node.name or (self.node.outputs[0].name or "" if self.node.outputs else "")

    @property
    def op_type(self) -> str:
        """Operator of the consumer, with its domain unless it is ONNX's own."""
        return f"{self.node.domain}::{self.node.op_type}" if self.node.domain else self.node.op_type


class Tracer:
    """Finds the uses of values in one model."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.parents: dict[int, ir.Node] = {}
        for root in [model.graph, *(f.graph for f in model.functions.values())]:
            for node in ir.traversal.RecursiveGraphIterator(root):
                for graph in subgraphs(node):
                    self.parents[id(graph)] = node

    def uses(self, value: ir.Value, rank: int) -> tuple[Use, ...]:
        """Every consumer of `value`, a tensor of `rank` axes, through views, casts, branches and function calls."""
        found: list[Use] = []
        seen: set[int] = set()
        todo: list[tuple[ir.Value, tuple[int, ...] | None, tuple[ir.Node, ...]]] = [(value, tuple(range(rank)), ())]
        while todo:
            at, axes, path = todo.pop()
            if id(at) in seen:
                continue
            seen.add(id(at))
            todo += [(output, axes, path) for output in self._outer(at)]
            for use in at.uses():
                node, index = use.node, use.idx
                moved = self._through(node, index, axes)
                if moved is not None:
                    outputs, after = moved
                    todo += [(output, after, (*path, node)) for output in outputs]
                else:
                    found.append(_use(node, index, axes, path))
        return tuple(found)

    def _outer(self, value: ir.Value) -> Iterator[ir.Value]:
        """Where an output of a branch comes out."""
        graph = value.graph
        if graph is None or not value.is_graph_output() or (node := self.parents.get(id(graph))) is None:
            return
        if node.op_type == "If":
            for i, output in enumerate(graph.outputs):
                if output is value:
                    yield node.outputs[i]

    def _through(
        self, node: ir.Node, index: int, axes: tuple[int, ...] | None
    ) -> tuple[list[ir.Value], tuple[int, ...] | None] | None:
        """Outputs where the elements go on and their axes, or None when `node` consumes them."""
        if node.domain not in ("", "ai.onnx"):
            function = self.model.functions.get(node.op_identifier())
            if function is None or index >= len(function.inputs):
                return None
            return [function.inputs[index]], axes
        if node.op_type in SAME_AXES and index == 0:
            return list(node.outputs[:1]), axes
        if node.op_type == "Transpose":
            perm = node.attributes.get("perm")
            if axes is None:
                return list(node.outputs), None
            order = perm.as_ints() if perm is not None else range(len(axes))[::-1]
            return list(node.outputs), tuple(axes[i] for i in order)
        if node.op_type == "Gather":
            # Rows picked by constant indices are a slice of the weight; by computed ones it is an embedding.
            chosen = node.inputs[1]
            constant = chosen is not None and (chosen.is_initializer() or _is_constant_node(chosen))
            return (list(node.outputs), None) if index == 0 and constant else None
        if node.op_type == "Pad" and _pads_activation(node):
            return None
        if node.op_type in MOVED and (index == 0 or node.op_type == "Concat"):
            return list(node.outputs), None
        return None


def _is_constant_node(value: ir.Value) -> bool:
    node = value.producer()
    return node is not None and node.op_type == "Constant"


def _pads_activation(node: ir.Node) -> bool:
    source = node.inputs[0]
    return source is not None and source.producer() is not None


def subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    """The graphs in a node's attributes (branches, bodies)."""
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def _use(node: ir.Node, index: int, axes: tuple[int, ...] | None, path: tuple[ir.Node, ...]) -> Use:
    role, out, ins = _classify(node, index, len(axes) if axes is not None else None)
    if axes is None:
        return Use(node, index, role, None, (), path)
    output = axes[out] if out is not None and -len(axes) <= out < len(axes) else None
    return Use(node, index, role, output, tuple(axes[i] for i in ins if i < len(axes)), path)


def _classify(node: ir.Node, index: int, rank: int | None) -> tuple[Role, int | None, tuple[int, ...]]:
    """Role, output axis and input axes of input `index` of `node`, for a tensor of `rank` axes."""
    op, n = node.op_type, rank or 0
    if op in CONVOLUTIONS or op == "QLinearConv":
        if index == (3 if op == "QLinearConv" else 1):
            return "conv", 0, tuple(range(1, n))
        return ("bias" if index in (2, 8) else "other"), None, ()
    if op == "ConvTranspose":
        if index == 1:
            group = node.attributes.get("group")
            plain = group is None or group.as_int() == 1
            return "conv", (1 if plain else None), ((0, *range(2, n)) if plain else ())
        return "bias", None, ()
    if op in ("MatMul", "MatMulInteger", "FusedMatMul", "QLinearMatMul"):
        if n < 2:
            return "matmul", None, tuple(range(n))
        second = index == (3 if op == "QLinearMatMul" else 1)
        return ("matmul", n - 1, (n - 2,)) if second else ("matmul", n - 2, (n - 1,))
    if op in ("Gemm", "FusedGemm"):
        if index == 2:
            return "bias", None, ()
        flag = node.attributes.get("transB" if index == 1 else "transA")
        turned = flag is not None and bool(flag.as_int())
        return ("gemm", 0, (1,)) if turned == (index == 1) else ("gemm", 1, (0,))
    if op in RECURRENT:
        return ("recurrent", 1, (2,)) if index in (1, 2) else (("bias" if index == 3 else "other"), None, ())
    if op in NORMALIZATION:
        return "norm", None, ()
    if op == "Gather" and index == 0:
        return ("embedding", 1, (0,)) if rank is None or n >= 2 else ("other", None, ())
    if op == "EmbedLayerNormalization":
        return ("embedding", 1, (0,)) if index in (2, 3, 4) else ("norm", None, ())
    if op == "Einsum":
        return "matmul", None, ()
    if op in ("Attention", "DecoderMaskedSelfAttention", "LongformerAttention") and node.domain == "com.microsoft":
        return ("matmul", 1, (0,)) if index == 1 else (("bias" if index == 2 else "other"), None, ())
    if op in ("Add", "Sub", "BiasGelu", "FastGelu", "BiasAdd"):
        return ("bias" if _is_vector(node.inputs[index]) else "other"), None, ()
    return "other", None, ()


def _is_vector(value: ir.Value | None) -> bool:
    shape = value.shape if value is not None else None
    return shape is not None and sum(1 for d in shape if d != 1) <= 1
