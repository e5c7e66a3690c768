"""One training step as one ordinary ONNX graph: forward, loss, gradients, clipping, update.

    feeds, targets, parameters, state, buffers, lr, t  ->  loss, norm, new parameters, new state

Weights are graph inputs, so nothing but standard operators changes them, and any ONNX Runtime runs it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxcompress.autodiff.builder import Builder
from onnxcompress.autodiff.engine import gradients, named, reach
from onnxcompress.autodiff.prepare import prepare
from onnxcompress.autodiff.tensor import Tensor
from onnxcompress.encodings.base import Encoding
from onnxcompress.errors import PassError
from onnxcompress.model.weights import Weight
from onnxcompress.training import batchnorm, losses, optimizers, parameters
from onnxcompress.training.batchnorm import Running
from onnxcompress.training.forward import forward as forward
from onnxcompress.training.narrowing import narrow
from onnxcompress.training.optimizers import Optimizer
from onnxcompress.training.parameters import Exposed, Leaf

LOSS, NORM, LR, T, SHARE = "train/loss", "train/norm", "train/lr", "train/t", "train/share"
NEXT = ".next"

WriteLoss = Callable[["Inputs", Mapping[str, Tensor]], Tensor]
"""Writes the loss: from a way to declare inputs and the values asked for by name, to a scalar."""


class Inputs:
    """Declares graph inputs for targets: `inputs("train/labels", int64, shape)` is a tensor to compute with."""

    def __init__(self, b: Builder) -> None:
        self.b = b
        self.names: list[str] = []

    def __call__(self, name: str, dtype: ir.DataType, shape: Sequence[int | str | None]) -> Tensor:
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.b.graph.inputs.append(value)
        self.names.append(name)
        return self.b.wrap(value)


@dataclasses.dataclass(frozen=True)
class TrainingGraph:
    """A step, built.

    `model`: the whole step; or, with `update`, only what adds a share of the gradient to sums (`gradient/...`), and
    `update` is the optimizer's step from those sums. `leaves`: the parameters as graph inputs. `state`: the optimizer's
    inputs with what they start from. `buffers`: inputs that stay. `left`: weights that are not trained and why.
    `running`: state that the forward pass itself moves (statistics of normalizations), with what it starts from.
    """

    model: ir.Model
    update: ir.Model | None
    leaves: list[Leaf]
    state: dict[str, np.ndarray]
    buffers: dict[str, np.ndarray]
    left: dict[str, str]
    running: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def sums(self) -> dict[str, np.ndarray]:
        """Gradient sums before the first sample."""
        return {} if self.update is None else {_sum(leaf): np.zeros_like(leaf.initial) for leaf in self.leaves}

    def trained(self, values: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
        """Weight key -> part -> array, out of the values of the leaves and of the running statistics.

        Where the values hold a mask, too (gradual pruning), the weight is what it leaves.
        """
        found: dict[str, dict[str, np.ndarray]] = {}
        for leaf in self.leaves:
            for member, array in leaf.split(values[leaf.name]):
                mask = values.get(member.mask) if member.is_weight else None
                array = member.stored(array) if mask is None else array * mask
                found.setdefault(member.key, {})[member.part] = array
        for name in self.running:
            found[Running.key(name)] = {"w": values[name]}
        return found

    def values(self, state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What of a runner's state `trained` takes: without the optimizer's."""
        return {name: state[name] for name in (*(leaf.name for leaf in self.leaves), *self.running)}


def build(
    model: ir.Model,
    values: Sequence[str],
    loss: WriteLoss,
    optimizer: Optimizer,
    *,
    l1: float = 0.0,
    clip: float | None = 1.0,
    relative: bool = False,
    accumulate: bool = False,
    batch_statistics: bool = False,
    allows: Callable[[Weight], bool] = lambda weight: True,
    restate: Callable[[Weight], Encoding] = lambda weight: weight.encoding,
    learn_scales: bool = False,
) -> TrainingGraph:
    """The training graph of `model` (from `forward`), which is changed into it. `values`: what the loss is about.

    `l1`: how much of the sum of the absolute values of layers' weights is added to the loss.

    `relative`: scale the steps of each weight by its magnitude (`Parameter.relative`). `batch_statistics`: normalize
    by those of the batch and move the running ones (`batchnorm.track`), instead of by the running ones. `allows`,
    `restate`, `learn_scales`: which weights are trained, in which encoding, and with the scales of integers or without.

    Raises:
        PassError: nothing of it can be trained.
        NoGradient: an operator between weights and loss has no gradient.
    """
    running = batchnorm.track(model) if batch_statistics else Running()
    exposed = parameters.expose(model, allows, restate, learn_scales)
    leaves = parameters.pack(model, exposed.parameters)
    if not leaves:
        raise PassError(f"nothing in it can be trained: {_why(exposed)}")
    for value, _ in exposed.buffers:
        model.graph.inputs.append(value)
    model.graph.outputs.clear()
    known = named(model.graph)
    kept = dict.fromkeys((*values, *running.outputs))
    model.graph.outputs.extend(known[name] for name in kept)  # keeps them through preparation
    prepare(model)
    batchnorm.spelled_out(model)
    b = Builder(model.graph, model.opset_imports[""])
    b.scope = "loss"
    known = named(model.graph)
    total = loss(Inputs(b), {name: b.wrap(known[name]) for name in values})
    if l1:
        nodes, end = list(model.graph), total.value
        for value in [known[str(p.value.name)] for p in exposed.parameters if p.is_weight]:
            if end in reach(nodes, [value]):
                total = total + losses.l1_penalty(b.wrap(value)).cast(total.dtype) * l1
    total = b.op("Identity", total, shape=())
    total.value.name = LOSS
    model.graph.outputs.clear()
    model.graph.outputs.extend([total.value, *(known[name] for name in running.outputs)])
    _drop_dead(model)
    narrow(model)
    found = gradients(model, {LOSS: None}, [leaf.name for leaf in leaves])
    leaves = [leaf for leaf in leaves if leaf.name in found]
    if not leaves:
        raise PassError("no weight has any effect on the loss")
    for value in [v for v in model.graph.inputs if (v.name or "").startswith("parameter/") and v.name not in found]:
        _freeze(model, value, exposed)
    _scale_gradients(model, leaves, found)
    state = {f"state/{leaf.name}/{slot}": np.zeros_like(leaf.initial) for leaf in leaves for slot in optimizer.slots}
    update: ir.Model | None = None
    if accumulate:
        _accumulate(model, leaves, found)
        update = _update_model(model, leaves, optimizer, clip, relative)
    else:
        b = Builder(model.graph, model.opset_imports[""])
        _update(b, leaves, {leaf.name: b.wrap(found[leaf.name]) for leaf in leaves}, optimizer, clip, relative)
    buffers = {value.name or "": array for value, array in exposed.buffers}
    model.graph.name = "training step"
    return TrainingGraph(model, update, leaves, state, buffers, exposed.left, running.initial)


def _scale_gradients(model: ir.Model, leaves: Sequence[Leaf], found: dict[str, ir.Value]) -> None:
    """Multiply gradients by what their parameters ask for."""
    b = Builder(model.graph, model.opset_imports[""])
    b.scope = "gradient scale"
    for leaf in leaves:
        factor = leaf.gradient()
        if (factor != 1).any():
            found[leaf.name] = (b.wrap(found[leaf.name]) * b.constant(factor)).value


def _update(
    b: Builder,
    leaves: Sequence[Leaf],
    found: Mapping[str, Tensor],
    optimizer: Optimizer,
    clip: float | None,
    relative: bool,
) -> None:
    """Append clipping and the optimizer's step, with their outputs."""
    b.scope = "update"
    graph = b.graph
    known = {value.name: value for value in graph.inputs}

    def given(name: str, like: np.ndarray) -> Tensor:
        if name not in known:
            kind = ir.TensorType(ir.DataType.from_numpy(like.dtype))
            known[name] = ir.Value(name=name, type=kind, shape=ir.Shape(like.shape))
            graph.inputs.append(known[name])
        return b.wrap(known[name])

    def result(tensor: Tensor, name: str) -> None:
        tensor.value.name = name
        graph.outputs.append(tensor.value)

    scalar = np.zeros((), np.float32)
    shared = optimizer.prepare(given(LR, scalar), given(T, scalar))
    total = optimizers.norm(b, [found[leaf.name].cast(ir.DataType.FLOAT) for leaf in leaves])
    scale = optimizers.clip_scale(total, clip) if clip is not None else None
    result(b.op("Identity", total, shape=()), NORM)
    for leaf in leaves:
        w, g = given(leaf.name, leaf.initial), found[leaf.name]
        state = [given(f"state/{leaf.name}/{slot}", leaf.initial) for slot in optimizer.slots]
        size = shared.size.cast(w.dtype)
        if relative:
            size = size * b.constant(leaf.relative())
        mine = dataclasses.replace(shared, lr=shared.lr.cast(w.dtype), size=size, eps=shared.eps.cast(w.dtype))
        factor = None if scale is None else scale.cast(w.dtype)
        new, fresh = optimizer.update(w, g, state, mine, factor, leaf.decay)
        result(new, leaf.name + NEXT)
        for slot, tensor in zip(optimizer.slots, fresh, strict=True):
            result(tensor, f"state/{leaf.name}/{slot}{NEXT}")


def _accumulate(model: ir.Model, leaves: Sequence[Leaf], found: Mapping[str, ir.Value]) -> None:
    """Instead of a step: sum' = sum + share * gradient."""
    b = Builder(model.graph, model.opset_imports[""])
    b.scope = "accumulate"
    share = ir.Value(name=SHARE, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([]))
    model.graph.inputs.append(share)
    for leaf in leaves:
        kind = ir.TensorType(ir.DataType.from_numpy(leaf.initial.dtype))
        before = ir.Value(name=_sum(leaf), type=kind, shape=ir.Shape(leaf.initial.shape))
        model.graph.inputs.append(before)
        gradient = b.wrap(found[leaf.name])
        after = b.wrap(before) + gradient * b.wrap(share).cast(gradient.dtype)
        after.value.name = _sum(leaf) + NEXT
        model.graph.outputs.append(after.value)


def _update_model(
    model: ir.Model, leaves: Sequence[Leaf], optimizer: Optimizer, clip: float | None, relative: bool
) -> ir.Model:
    """The optimizer's step alone, from gradient sums."""
    inputs = []
    for leaf in leaves:
        kind = ir.TensorType(ir.DataType.from_numpy(leaf.initial.dtype))
        inputs.append(ir.Value(name=_sum(leaf), type=kind, shape=ir.Shape(leaf.initial.shape)))
    graph = ir.Graph(inputs, [], nodes=[], opset_imports=dict(model.opset_imports), name="update")
    b = Builder(graph, model.opset_imports[""])
    _update(
        b,
        leaves,
        {leaf.name: b.wrap(value) for leaf, value in zip(leaves, inputs, strict=True)},
        optimizer,
        clip,
        relative,
    )
    return ir.Model(graph, ir_version=model.ir_version)


def _sum(leaf: Leaf) -> str:
    return f"gradient/{leaf.name}"


def _freeze(model: ir.Model, value: ir.Value, exposed: Exposed) -> None:
    """A parameter without effect becomes a constant again, or goes."""
    model.graph.inputs.remove(value)
    for parameter in exposed.parameters:
        if parameter.value.name == value.name:
            exposed.left[parameter.key] = "has no effect on the loss"
            if value.uses():
                value.const_value = ir.tensor(parameter.initial, name=value.name)
                model.graph.register_initializer(value)


def _drop_dead(model: ir.Model) -> None:
    """Remove nodes the loss does not need: the operators behind the logits, other outputs."""
    for node in reversed(list(model.graph)):
        if not any(output.uses() or output.is_graph_output() for output in node.outputs):
            model.graph.remove(node, safe=True)


def _why(exposed: Exposed) -> str:
    counted: dict[str, int] = {}
    for reason in exposed.left.values():
        counted[reason] = counted.get(reason, 0) + 1
    told = "; ".join(f"{n} x {reason}" for reason, n in sorted(counted.items(), key=lambda item: -item[1])[:3])
    return told or "it holds no weights"
