"""What a constant is to the operators that consume it: followed through everything that only moves or casts its
elements.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Literal

import onnx_ir as ir

Role = Literal["conv", "matmul", "gemm", "embedding", "recurrent", "bias", "norm", "other"]
WEIGHT_ROLES: tuple[Role, ...] = ("conv", "matmul", "gemm", "embedding", "recurrent")

# Elements keep their order and axes.
SAME_AXES = {"Identity", "Cast", "CastLike", "Dropout", "QuantizeLinear", "DequantizeLinear", "Clip"}
# Elements are moved, cut or joined; which axis is which is no longer known.
MOVED = {"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Concat", "Split", "Expand", "Tile", "Pad", "Gather"}
# Domains whose operators mean what their names say; in any other, a "Conv" may be anything.
KNOWN_DOMAINS = {"", "ai.onnx", "com.microsoft", "com.microsoft.nchwc", "com.ms.internal.nhwc"}
NORMALIZATION = {
    "BatchNormalization", "LayerNormalization", "InstanceNormalization", "GroupNormalization",
    "RMSNormalization",
    "SimplifiedLayerNormalization", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "GroupNorm",
    "SkipGroupNorm",
}  # fmt: skip
CONVOLUTIONS = {"Conv", "FusedConv", "ConvInteger", "NhwcConv", "DeformConv"}
PRODUCTS = {"MatMul", "MatMulInteger", "FusedMatMul", "QLinearMatMul", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"}
RECURRENT = {"LSTM", "GRU", "RNN", "DynamicQuantizeLSTM"}
ATTENTION = {"Attention", "QAttention", "DecoderMaskedSelfAttention", "LongformerAttention"}

Axes = tuple[int, ...] | None


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


@dataclasses.dataclass(frozen=True)
class _Reached:
    """Where the elements of a value go: the uses, and the outputs of the function they leave by."""

    uses: tuple[Use, ...]
    exits: tuple[tuple[int, Axes], ...]


class Tracer:
    """Finds the uses of values in one model."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.parents: dict[int, ir.Node] = {}
        self._calls: dict[int, list[ir.Node]] = {}
        self._function_of: dict[int, ir.Function] = {id(f.graph): f for f in model.functions.values()}
        self._static: set[int] = set()
        self._known: dict[tuple[int, int, int | None, bool], _Reached] = {}
        for root in [model.graph, *(f.graph for f in model.functions.values())]:
            for node in ir.traversal.RecursiveGraphIterator(root):
                for graph in subgraphs(node):
                    self.parents[id(graph)] = node
                function = model.functions.get(node.op_identifier())
                if function is not None:
                    self._calls.setdefault(id(function.graph), []).append(node)
                elif all(v is None or self._fixed(v) for v in node.inputs) and not any(subgraphs(node)):
                    self._static |= {id(v) for v in node.outputs if not node.op_type.startswith("Random")}

    def uses(self, value: ir.Value, shape: Iterable[int] | None) -> tuple[Use, ...]:
        """Every consumer of `value`, a tensor of `shape`, through views, casts, branches and function calls.

        `shape` None: unknown, and so are the axes of the uses.
        """
        dims = None if shape is None else tuple(shape)
        vector = dims is not None and sum(1 for d in dims if d != 1) <= 1
        return self._reach(value, None if dims is None else len(dims), vector, leave=True).uses

    def _fixed(self, value: ir.Value) -> bool:
        return value.is_initializer() or id(value) in self._static

    def _reach(self, value: ir.Value, rank: int | None, vector: bool, leave: bool) -> _Reached:
        """`leave`: an output of a function goes on at every call of it, as for a constant of its body."""
        found: dict[tuple[int, int, int | None, tuple[int, ...]], Use] = {}
        exits: dict[tuple[int, Axes], None] = {}
        seen: set[int] = set()
        axes: Axes = None if rank is None else tuple(range(rank))
        todo: list[tuple[ir.Value, Axes, tuple[ir.Node, ...]]] = [(value, axes, ())]
        while todo:
            at, axes, path = todo.pop()
            if id(at) in seen:
                continue
            seen.add(id(at))
            for node, index in self._outer(at, leave):
                if node is None:
                    exits[index, axes] = None
                else:
                    todo.append((node.outputs[index], axes, path))
            for node, index in at.uses():
                function = self.model.functions.get(node.op_identifier())
                if function is not None:
                    if index < len(function.inputs):
                        inner = self._into(function, index, rank, vector)
                        for use in inner.uses:
                            _add(found, _composed(use, axes, path))
                        todo += [
                            (node.outputs[i], _compose(after, axes), (*path, node))
                            for i, after in inner.exits
                            if i < len(node.outputs)
                        ]
                    continue
                moved = self._through(node, index, axes)
                if moved is not None:
                    outputs, after = moved
                    todo += [(output, after, (*path, node)) for output in outputs]
                else:
                    _add(found, _use(node, index, axes, path, vector))
        return _Reached(tuple(found.values()), tuple(exits))

    def _into(self, function: ir.Function, index: int, rank: int | None, vector: bool) -> _Reached:
        """What happens to input `index` inside `function`, found once: calls may nest to any number of paths."""
        key = (id(function), index, rank, vector)
        if key not in self._known:
            self._known[key] = _Reached((), ())  # functions must not call themselves
            self._known[key] = self._reach(function.inputs[index], rank, vector, leave=False)
        return self._known[key]

    def _outer(self, value: ir.Value, leave: bool) -> Iterator[tuple[ir.Node | None, int]]:
        """(node, output) where an output of a branch or function comes out; (None, output) to stay in the function."""
        graph = value.graph
        if graph is None or not value.is_graph_output():
            return
        function = self._function_of.get(id(graph))
        node = self.parents.get(id(graph))
        for i, output in enumerate(graph.outputs):
            if output is not value:
                continue
            if function is not None and not leave:
                yield None, i
            elif function is not None:
                yield from ((call, i) for call in self._calls.get(id(graph), ()) if i < len(call.outputs))
            elif node is not None and node.op_type == "If":
                yield node, i

    def _through(self, node: ir.Node, index: int, axes: Axes) -> tuple[list[ir.Value], Axes] | None:
        """Outputs where the elements go on and their axes, or None when `node` consumes them."""
        if node.domain not in ("", "ai.onnx"):
            return None
        if node.op_type in SAME_AXES and index == 0:
            return list(node.outputs[:1]), axes
        if node.op_type == "Transpose":
            perm = node.attributes.get("perm")
            if axes is None or (perm is not None and perm.is_ref()):
                return list(node.outputs), None
            order = perm.as_ints() if perm is not None else range(len(axes))[::-1]
            return list(node.outputs), tuple(axes[i] for i in order)
        if node.op_type in ("Loop", "Scan"):
            return _into_body(node, index, axes)
        if node.op_type == "Gather":
            # Rows picked by constant indices are a slice of the weight; by computed ones it is an embedding.
            chosen = node.inputs[1]
            constant = chosen is not None and self._fixed(chosen)
            return (list(node.outputs), None) if index == 0 and constant else None
        if node.op_type == "Concat" and not all(v is None or self._fixed(v) for v in node.inputs):
            return None  # joined with an activation, it goes where that goes
        if node.op_type in MOVED and (index == 0 or node.op_type == "Concat"):
            return list(node.outputs), None
        return None


def subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    """The graphs in a node's attributes (branches, bodies)."""
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def _into_body(node: ir.Node, index: int, axes: Axes) -> tuple[list[ir.Value], Axes] | None:
    """The body's own name for a tensor given to a Loop or Scan; None where it is but the first value of a state."""
    body = next(subgraphs(node), None)
    if body is None or index >= len(body.inputs):
        return None
    inner = body.inputs[index]
    scanned = node.attributes.get("num_scan_inputs")
    if node.op_type == "Scan" and (scanned is None or len(body.inputs) != len(node.inputs)):
        return None  # opset 8, with its batch axis and sequence lengths
    states = len(node.inputs) - (scanned.as_int() if scanned is not None else 0)
    if index >= states:
        axis = node.attributes.get("scan_input_axes")
        at = axis.as_ints()[index - states] if axis is not None else 0
        return [inner], None if axes is None or at >= len(axes) else tuple(a for a in axes if a != axes[at])
    if node.op_type == "Loop" and index < 2:
        return None
    out = body.outputs[index - 1 if node.op_type == "Loop" else index]
    while (producer := out.producer()) is not None and producer.op_type == "Identity" and producer.inputs[0]:
        out = producer.inputs[0]
    return ([inner], axes) if out is inner else None


def _add(found: dict[tuple[int, int, int | None, tuple[int, ...]], Use], use: Use) -> None:
    found.setdefault((id(use.node), use.index, use.output_axis, use.input_axes), use)


def _compose(inner: Axes, outer: Axes) -> Axes:
    return None if inner is None or outer is None else tuple(outer[i] for i in inner if i < len(outer))


def _composed(use: Use, axes: Axes, path: tuple[ir.Node, ...]) -> Use:
    """A use inside a function in terms of the axes of what the call was given."""
    if axes is None:
        return dataclasses.replace(use, output_axis=None, input_axes=(), path=(*path, *use.path))
    output = use.output_axis if use.output_axis is not None and use.output_axis < len(axes) else None
    return dataclasses.replace(
        use,
        output_axis=None if output is None else axes[output],
        input_axes=tuple(axes[i] for i in use.input_axes if i < len(axes)),
        path=(*path, *use.path),
    )


def _use(node: ir.Node, index: int, axes: Axes, path: tuple[ir.Node, ...], vector: bool) -> Use:
    role, out, ins = _classify(node, index, len(axes) if axes is not None else None, vector)
    if axes is None:
        return Use(node, index, role, None, (), path)
    output = axes[out] if out is not None and -len(axes) <= out < len(axes) else None
    return Use(node, index, role, output, tuple(axes[i] for i in ins if i < len(axes)), path)


def _classify(node: ir.Node, index: int, rank: int | None, vector: bool) -> tuple[Role, int | None, tuple[int, ...]]:
    """Role, output axis and input axes of input `index` of `node`, for a tensor of `rank` axes."""
    op, n = node.op_type, rank or 0
    if node.domain not in KNOWN_DOMAINS:
        return "other", None, ()
    if op in CONVOLUTIONS or op == "QLinearConv":
        if index == (3 if op == "QLinearConv" else 1):
            return "conv", 0, tuple(range(1, n))
        return ("bias" if index in (2, 8) else "other"), None, ()
    if op == "ConvTranspose":
        if index == 1:
            plain = _int(node, "group", 1) == 1
            return "conv", (1 if plain else None), ((0, *range(2, n)) if plain else ())
        return ("bias" if index == 2 else "other"), None, ()
    if op in PRODUCTS:
        second = index == (3 if op == "QLinearMatMul" else 1)
        if not second and index != 0:
            return "other", None, ()
        if n < 2:
            return "matmul", None, tuple(range(n))
        return ("matmul", n - 1, (n - 2,)) if second else ("matmul", n - 2, (n - 1,))
    if op == "MatMulNBits":
        return ("matmul", 0, (1,)) if index == 1 else (("bias" if index == 5 else "other"), None, ())
    if op in ("Gemm", "FusedGemm", "QGemm"):
        a, b, c = (0, 3, 6) if op == "QGemm" else (0, 1, 2)
        if index not in (a, b):
            return ("bias" if index == c else "other"), None, ()
        turned = bool(_int(node, "transB" if index == b else "transA", 0))
        return ("gemm", 0, (1,)) if turned == (index == b) else ("gemm", 1, (0,))
    if op in RECURRENT:
        if op == "DynamicQuantizeLSTM" and index in (1, 2):
            return "recurrent", 2, (1,)  # stored transposed
        return ("recurrent", 1, (2,)) if index in (1, 2) else (("bias" if index == 3 else "other"), None, ())
    if op in NORMALIZATION:
        return "norm", None, ()
    if op in ("Gather", "GatherBlockQuantized") and index == 0:
        if rank is not None and n < 2:
            return "other", None, ()
        axis = _int(node, "axis" if op == "Gather" else "gather_axis", 0) % (n or 2)
        return "embedding", 0 if axis else 1, (axis,)
    if op in ("EmbedLayerNormalization", "QEmbedLayerNormalization"):
        return ("embedding", 1, (0,)) if index in (2, 3, 4) else ("norm", None, ())
    if op == "Einsum":
        return "matmul", None, ()
    if op in ATTENTION and node.domain == "com.microsoft":
        return ("matmul", 1, (0,)) if index == 1 else (("bias" if index == 2 else "other"), None, ())
    if op in ("Add", "Sub", "BiasGelu", "FastGelu", "BiasAdd"):
        return ("bias" if vector else "other"), None, ()
    return "other", None, ()


def _int(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None or attribute.is_ref() else attribute.as_int()
