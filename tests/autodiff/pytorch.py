"""ONNX graphs run by PyTorch, operator by operator, for its gradients: the yardstick of ours.

Needs PyTorch, so no test imports it: `witness.py` and `against_pytorch.py` do, which are scripts. Every operator is
PyTorch's own where it has one; where the two differ (padding on one side, the order of gates) the data is brought into
PyTorch's form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch.nn import functional as F

from tests.autodiff import pytorch_layers as layers

T = Any  # torch.Tensor; PyTorch need not be there when types are checked
OPS: dict[tuple[str, str], Callable[[Node], Any]] = {}
SINGLE, DOUBLE = onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE
MICROSOFT = "com.microsoft"


class Node:
    """One node: `n[0]` is its first input, None where it is left out; `attr` its attributes."""

    def __init__(self, node: onnx.NodeProto, values: dict[str, T], dtype: Any, opset: int) -> None:
        self.proto, self.values, self.dtype, self.opset = node, values, dtype, opset
        self.x: list[T] = [values[name] if name else None for name in node.input]
        self.attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}

    def __getitem__(self, index: int) -> T:
        return self.x[index] if index < len(self.x) else None

    def attr(self, name: str, default: Any = None) -> Any:
        value = self.attributes.get(name, default)
        return value.decode() if isinstance(value, bytes) else value

    def ints(self, index: int, name: str = "") -> list[int] | None:
        """Integers from an input, or from the attribute that older opsets have instead."""
        if self[index] is not None:
            return [int(i) for i in self[index].reshape(-1).tolist()]
        found = self.attr(name) if name else None
        return None if found is None else [int(i) for i in found]


def op(*names: str, domain: str = "") -> Callable[[Callable[[Node], Any]], Callable[[Node], Any]]:
    def register(function: Callable[[Node], Any]) -> Callable[[Node], Any]:
        for name in names:
            OPS[domain, name] = function
        return function

    return register


def run(model: onnx.ModelProto, given: Mapping[str, T], outputs: Sequence[str], dtype: Any) -> list[T]:
    """Values of `model` in `dtype`; `given` holds inputs, and initializers where they shall have gradients."""
    values = {t.name: tensor(numpy_helper.to_array(t), dtype) for t in model.graph.initializer if t.name not in given}
    values.update(given)
    opset = next(entry.version for entry in model.opset_import if not entry.domain)
    _graph(model.graph, values, outputs, dtype, opset)
    return [values[name] for name in outputs]


def tensor(array: np.ndarray, dtype: Any) -> T:
    """An array as a tensor, floats in `dtype`."""
    found = torch.from_numpy(np.array(array))
    return found.to(dtype) if found.is_floating_point() else found


def _graph(graph: onnx.GraphProto, values: dict[str, T], outputs: Sequence[str], dtype: Any, opset: int) -> None:
    for node in _ancestors(graph, outputs):
        results = OPS[node.domain, node.op_type](Node(node, values, dtype, opset))
        results = results if isinstance(results, tuple) else (results,)
        values.update((name, y) for name, y in zip(node.output, results, strict=False) if name)


def _ancestors(graph: onnx.GraphProto, outputs: Sequence[str]) -> list[onnx.NodeProto]:
    needed, kept = set(outputs), []
    for node in reversed(graph.node):
        if needed & set(node.output):
            kept.append(node)
            needed.update(_used(node))
    return kept[::-1]


def _used(node: onnx.NodeProto) -> Iterator[str]:
    yield from node.input
    for attribute in node.attribute:
        for inner in attribute.g.node:
            yield from _used(inner)
        yield from (info.name for info in attribute.g.output)


# Elementwise ---------------------------------------------------------------------------------------------------------

UNARY: dict[str, Callable[[T], T]] = {
    **{n: getattr(torch, n.lower()) for n in ("Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Ceil", "Cos")},
    **{n: getattr(torch, n.lower()) for n in ("Cosh", "Erf", "Exp", "Floor", "Log", "Neg", "Reciprocal", "Relu")},
    **{n: getattr(torch, n.lower()) for n in ("Round", "Sigmoid", "Sign", "Sin", "Sinh", "Sqrt", "Tan", "Tanh")},
    **{n: getattr(F, n.lower()) for n in ("Hardswish", "Mish", "Softplus", "Softsign")},
    "HardSwish": F.hardswish,
    "Identity": lambda x: x,
    "Dropout": lambda x: x,
    "Not": torch.logical_not,
    "Size": lambda x: torch.tensor(x.numel()),
    "GlobalAveragePool": lambda x: x.mean(tuple(range(2, x.ndim)), keepdim=True),
    "GlobalMaxPool": lambda x: getattr(F, f"adaptive_max_pool{x.ndim - 2}d")(x, 1),
}
BINARY: dict[str, Callable[[T, T], T]] = {
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "Pow": torch.pow,
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "And": torch.logical_and,
    "MatMul": torch.matmul,
    "Div": lambda a, b: torch.div(a, b) if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc"),
    "PRelu": lambda x, s: torch.where(x > 0, x, x * s),
}
OPS.update({("", name): lambda n, f=f: f(n[0]) for name, f in UNARY.items()})  # type: ignore[misc]
OPS.update({("", name): lambda n, f=f: f(n[0], n[1]) for name, f in BINARY.items()})  # type: ignore[misc]

OPS["", "Celu"] = lambda n: F.celu(n[0], n.attr("alpha", 1.0))
OPS["", "Elu"] = lambda n: F.elu(n[0], n.attr("alpha", 1.0))
OPS["", "LeakyRelu"] = lambda n: F.leaky_relu(n[0], n.attr("alpha", 0.01))
OPS["", "ThresholdedRelu"] = lambda n: F.threshold(n[0], n.attr("alpha", 1.0), 0)
OPS["", "HardSigmoid"] = lambda n: torch.clamp(n.attr("alpha", 0.2) * n[0] + n.attr("beta", 0.5), 0, 1)
OPS["", "Selu"] = lambda n: n.attr("gamma", 1.0507010221481323) * F.elu(n[0], n.attr("alpha", 1.6732631921768188))
OPS["", "Swish"] = lambda n: n[0] * torch.sigmoid(n.attr("alpha", 1.0) * n[0])
OPS["", "Gelu"] = lambda n: F.gelu(n[0], approximate=n.attr("approximate", "none"))
OPS["", "Mod"] = lambda n: torch.fmod(n[0], n[1]) if n.attr("fmod", 0) else torch.remainder(n[0], n[1])
OPS["", "Clip"] = lambda n: torch.clamp(n[0], n[1], n[2]) if n[1] is not None or n[2] is not None else n[0] * 1
OPS["", "Where"] = lambda n: torch.where(n[0], n[1], n[2])
OPS["", "Sum"] = lambda n: sum(n.x)
OPS["", "Mean"] = lambda n: sum(n.x) / len(n.x)
OPS[MICROSOFT, "Gelu"] = lambda n: F.gelu(n[0])
OPS[MICROSOFT, "BiasGelu"] = lambda n: F.gelu(n[0] + n[1])
OPS[MICROSOFT, "FastGelu"] = lambda n: F.gelu(n[0] if n[1] is None else n[0] + n[1], approximate="tanh")
OPS[MICROSOFT, "QuickGelu"] = lambda n: n[0] * torch.sigmoid(n.attr("alpha", 1.702) * n[0])


@op("Max", "Min")
def extreme(n: Node) -> T:
    found = n[0]
    for x in n.x[1:]:
        found = torch.maximum(found, x) if n.proto.op_type == "Max" else torch.minimum(found, x)
    return found


@op("Shrink")
def shrink(n: Node) -> T:
    low, bias = n.attr("lambd", 0.5), n.attr("bias", 0.0)
    return torch.where(n[0] < -low, n[0] + bias, torch.where(n[0] > low, n[0] - bias, 0.0))


@op("Cast")
def cast(n: Node) -> T:
    to = n.attr("to")
    if to in (SINGLE, DOUBLE):
        return n[0].to(n.dtype)
    return n[0].to(torch.from_numpy(np.zeros(1, helper.tensor_dtype_to_np_dtype(to))).dtype)


# Products, reductions ------------------------------------------------------------------------------------------------


@op("Gemm")
def gemm(n: Node) -> T:
    a = n[0].T if n.attr("transA", 0) else n[0]
    b = n[1].T if n.attr("transB", 0) else n[1]
    y = n.attr("alpha", 1.0) * (a @ b)
    return y if n[2] is None else y + n.attr("beta", 1.0) * n[2]


@op("FusedMatMul", domain=MICROSOFT)
def fused_matmul(n: Node) -> T:
    a, b = (x.transpose(-1, -2) if n.attr(key, 0) else x for x, key in ((n[0], "transA"), (n[1], "transB")))
    return n.attr("alpha", 1.0) * (a @ b)


OPS["", "Einsum"] = lambda n: torch.einsum(n.attr("equation"), *n.x)

REDUCTIONS: dict[str, Callable[[T, list[int], bool], T]] = {
    "ReduceSum": lambda x, a, k: x.sum(a, keepdim=k),
    "ReduceMean": lambda x, a, k: x.mean(a, keepdim=k),
    "ReduceSumSquare": lambda x, a, k: x.square().sum(a, keepdim=k),
    "ReduceL1": lambda x, a, k: torch.linalg.vector_norm(x, 1, a, keepdim=k),
    "ReduceL2": lambda x, a, k: torch.linalg.vector_norm(x, 2, a, keepdim=k),
    "ReduceLogSum": lambda x, a, k: x.sum(a, keepdim=k).log(),
    "ReduceLogSumExp": lambda x, a, k: torch.logsumexp(x, a, keepdim=k),
    "ReduceMax": lambda x, a, k: x.amax(a, keepdim=k),
    "ReduceMin": lambda x, a, k: x.amin(a, keepdim=k),
    "ReduceProd": lambda x, a, k: _product(x, a, k),
}


def _product(x: T, axes: list[int], keep: bool) -> T:
    for axis in sorted((a % x.ndim for a in axes), reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


@op(*REDUCTIONS)
def reduction(n: Node) -> T:
    axes = n.ints(1, "axes")
    if not axes:
        if n.attr("noop_with_empty_axes", 0):
            return n[0]
        axes = list(range(n[0].ndim))
    return REDUCTIONS[n.proto.op_type](n[0], axes, bool(n.attr("keepdims", 1)))


@op("CumSum")
def cumsum(n: Node) -> T:
    axis = int(n[1])
    x = n[0].flip(axis) if n.attr("reverse", 0) else n[0]
    y = x.cumsum(axis) - (x if n.attr("exclusive", 0) else 0)
    return y.flip(axis) if n.attr("reverse", 0) else y


@op("CumProd")
def cumprod(n: Node) -> T:
    axis = int(n[1])
    x = n[0].flip(axis) if n.attr("reverse", 0) else n[0]
    if n.attr("exclusive", 0):
        x = torch.cat([torch.ones_like(x.narrow(axis, 0, 1)), x.narrow(axis, 0, x.shape[axis] - 1)], axis)
    y = x.cumprod(axis)
    return y.flip(axis) if n.attr("reverse", 0) else y


OPS["", "LpNormalization"] = lambda n: F.normalize(n[0], float(n.attr("p", 2)), n.attr("axis", -1), 0.0)
OPS["", "Softmax"] = lambda n: F.softmax(n[0], n.attr("axis", -1))
OPS["", "LogSoftmax"] = lambda n: F.log_softmax(n[0], n.attr("axis", -1))
OPS["", "ArgMax"] = lambda n: n[0].argmax(n.attr("axis", 0), keepdim=bool(n.attr("keepdims", 1)))


@op("TopK")
def topk(n: Node) -> tuple[T, T]:
    found = torch.topk(n[0], int(n[1]), n.attr("axis", -1), bool(n.attr("largest", 1)))
    return found.values, found.indices


# Movement ------------------------------------------------------------------------------------------------------------


@op("Constant")
def constant(n: Node) -> T:
    if n.attr("value") is not None:
        return tensor(numpy_helper.to_array(n.attr("value")), n.dtype)
    ((name, value),) = n.attributes.items()
    return torch.tensor(value, dtype=n.dtype if "float" in name else torch.int64)


@op("Shape")
def shape_(n: Node) -> T:
    return torch.tensor(list(n[0].shape)[n.attr("start", 0) : n.attr("end")], dtype=torch.int64)


@op("ConstantOfShape")
def constant_of_shape(n: Node) -> T:
    value = numpy_helper.to_array(n.attr("value")) if "value" in n.attributes else np.zeros(1, np.float32)
    return tensor(np.full(n.ints(0) or (), value[0]), n.dtype)


@op("Reshape")
def reshape(n: Node) -> T:
    sizes = n.ints(1) or []
    if not n.attr("allowzero", 0):
        sizes = [n[0].shape[i] if size == 0 else size for i, size in enumerate(sizes)]
    return n[0].reshape(tuple(sizes))


@op("Flatten")
def flatten(n: Node) -> T:
    axis = n.attr("axis", 1) % (n[0].ndim + 1)
    return n[0].reshape(int(np.prod(n[0].shape[:axis])), -1)


@op("Squeeze")
def squeeze(n: Node) -> T:
    axes = n.ints(1, "axes")
    return n[0].squeeze() if axes is None else n[0].squeeze(tuple(axes))


@op("Unsqueeze")
def unsqueeze(n: Node) -> T:
    axes = n.ints(1, "axes") or []
    x = n[0]
    for axis in sorted(a % (x.ndim + len(axes)) for a in axes):
        x = x.unsqueeze(axis)
    return x


@op("Expand")
def expand(n: Node) -> T:
    return n[0].expand(torch.broadcast_shapes(n[0].shape, tuple(n.ints(1) or ())))


@op("Split")
def split(n: Node) -> tuple[T, ...]:
    axis, parts = n.attr("axis", 0), len(n.proto.output)
    return tuple(torch.split(n[0], n.ints(1, "split") or -(-n[0].shape[axis] // parts), axis))


@op("Slice")
def slice_(n: Node) -> T:
    starts, ends = n.ints(1, "starts") or [], n.ints(2, "ends") or []
    axes = n.ints(3, "axes") or list(range(len(starts)))
    steps = n.ints(4) or [1] * len(starts)
    x = n[0]
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        places = range(x.shape[axis])[start:end:step]
        x = x.index_select(axis, torch.tensor(list(places), dtype=torch.int64))
    return x


@op("Pad")
def pad(n: Node) -> T:
    """PyTorch lists the last axis first, and its other modes take what has two axes more than are padded."""
    pads, axes = n.ints(1) or [], n.ints(3)
    over = list(range(n[0].ndim)) if axes is None else [a % n[0].ndim for a in axes]
    low, high = [0] * n[0].ndim, [0] * n[0].ndim
    for i, axis in enumerate(over):
        low[axis], high[axis] = pads[i], pads[len(over) + i]
    flat = [p for pair in zip(low[::-1], high[::-1], strict=True) for p in pair]
    mode = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}[
        n.attr("mode", "constant")
    ]
    if mode != "constant":
        last = max(i // 2 + 1 for i, p in enumerate(flat) if p)  # axes; those before them make one
        y = F.pad(n[0].reshape(1, -1, *n[0].shape[-last:]), flat[: 2 * last], mode)
        return y.reshape(*n[0].shape[:-last], *y.shape[2:])
    y = F.pad(n[0], flat)
    return y if n[2] is None else y + n[2] * (1 - F.pad(torch.ones_like(n[0]), flat))


@op("DepthToSpace")
def depth_to_space(n: Node) -> T:
    size = n.attr("blocksize")
    if n.attr("mode", "DCR") == "CRD":
        return F.pixel_shuffle(n[0], size)
    b, c, h, w = n[0].shape
    return F.pixel_shuffle(n[0].reshape(b, size * size, -1, h, w).transpose(1, 2).reshape(b, c, h, w), size)


@op("SpaceToDepth")
def space_to_depth(n: Node) -> T:
    size = n.attr("blocksize")
    y = F.pixel_unshuffle(n[0], size)
    return y.reshape(y.shape[0], -1, size * size, *y.shape[2:]).transpose(1, 2).reshape(y.shape)


@op("Trilu")
def trilu(n: Node) -> T:
    k = 0 if n[1] is None else int(n[1])
    return torch.triu(n[0], k) if n.attr("upper", 1) else torch.tril(n[0], k)


@op("ReverseSequence")
def reverse_sequence(n: Node) -> T:
    assert (n.attr("time_axis", 0), n.attr("batch_axis", 1)) == (0, 1)
    columns = [torch.cat([n[0][:k, i].flip(0), n[0][k:, i]]) for i, k in enumerate(n.ints(1) or [])]
    return torch.stack(columns, 1)


OPS["", "Transpose"] = lambda n: n[0].permute(n.attr("perm", list(range(n[0].ndim))[::-1]))
OPS["", "Concat"] = lambda n: torch.cat(n.x, n.attr("axis"))
OPS["", "Tile"] = lambda n: n[0].repeat(n.ints(1))
OPS["", "Range"] = lambda n: torch.arange(n[0].item(), n[1].item(), n[2].item(), dtype=n[0].dtype)
OPS["", "Compress"] = lambda n: n[0].index_select(n.attr("axis"), torch.nonzero(n[1]).reshape(-1))


# Indexing ------------------------------------------------------------------------------------------------------------


def _wrapped(indices: T, size: int) -> T:
    return torch.where(indices < 0, indices + size, indices).to(torch.int64)


@op("Gather")
def gather(n: Node) -> T:
    axis = n.attr("axis", 0) % n[0].ndim
    at = _wrapped(n[1], n[0].shape[axis])
    if axis == 0 and n[0].ndim == 2 and n[0].is_floating_point():
        return F.embedding(at, n[0])
    found = n[0].index_select(axis, at.reshape(-1))
    return found.reshape((*n[0].shape[:axis], *at.shape, *n[0].shape[axis + 1 :]))


@op("GatherElements")
def gather_elements(n: Node) -> T:
    axis = n.attr("axis", 0)
    return torch.gather(n[0], axis, _wrapped(n[1], n[0].shape[axis]))


@op("GatherND")
def gather_nd(n: Node) -> T:
    if n.attr("batch_dims", 0) == 0:
        return n[0][tuple(n[1].movedim(-1, 0))]
    assert n.attr("batch_dims") == 1
    return torch.stack([x[tuple(i.movedim(-1, 0))] for x, i in zip(n[0], n[1], strict=True)])


@op("ScatterElements")
def scatter_elements(n: Node) -> T:
    axis = n.attr("axis", 0)
    at = _wrapped(n[1], n[0].shape[axis])
    return (torch.scatter_add if n.attr("reduction", "none") == "add" else torch.scatter)(n[0], axis, at, n[2])


@op("ScatterND")
def scatter_nd(n: Node) -> T:
    add = n.attr("reduction", "none") == "add"
    return n[0].index_put(tuple(n[1].movedim(-1, 0)), n[2], accumulate=add)


@op("TensorScatter")
def tensor_scatter(n: Node) -> T:
    axis, (past, update) = n.attr("axis", -2) % n[0].ndim, n.x[:2]
    found = past.clone()
    for row, start in enumerate(n.ints(2) or [0] * len(past)):
        for step in range(update.shape[axis]):
            at = (start + step) % past.shape[axis]
            found[row].select(axis - 1, at).copy_(update[row].select(axis - 1, step))
    return found


# Layers --------------------------------------------------------------------------------------------------------------

OPS.update({("", name): layer for name, layer in layers.LAYERS.items()})


@op("Col2Im")
def col2im(n: Node) -> T:
    """PyTorch pads both sides alike."""
    pads = n.attr("pads", [0] * 4)
    assert pads[:2] == pads[2:]
    strides, dilations = n.attr("strides", [1, 1]), n.attr("dilations", [1, 1])
    return F.fold(n[0], n.ints(1), n.ints(2), dilations, pads[:2], strides)


@op("GridSample")
def grid_sample(n: Node) -> T:
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(n.attr("mode", "linear"), n.attr("mode"))
    return F.grid_sample(n[0], n[1], mode, n.attr("padding_mode", "zeros"), bool(n.attr("align_corners", 0)))


@op("If")
def if_(n: Node) -> tuple[T, ...]:
    branch = n.attributes["then_branch" if bool(n[0]) else "else_branch"]
    inner = {**n.values, **{t.name: tensor(numpy_helper.to_array(t), n.dtype) for t in branch.initializer}}
    names = [info.name for info in branch.output]
    _graph(branch, inner, names, n.dtype, n.opset)
    return tuple(inner[name] for name in names)


@op("Scaler", domain="ai.onnx.ml")
def scaler(n: Node) -> T:
    offset, scale = (torch.tensor(n.attr(name), dtype=n.dtype) for name in ("offset", "scale"))
    return (n[0].to(n.dtype) - offset) * scale
