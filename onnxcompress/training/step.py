"""What one training step computes, as an ordinary ONNX graph: forward, loss, gradients.

    feeds, targets, parameters, buffers  ->  loss, gradients

Weights are graph inputs, and any ONNX Runtime runs it. What is made of the gradients is in `update`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxcompress.autodiff.builder import Builder
from onnxcompress.autodiff.engine import gradients, named, reach
from onnxcompress.autodiff.errors import NoGradient
from onnxcompress.autodiff.prepare import prepare
from onnxcompress.autodiff.tensor import Tensor
from onnxcompress.encodings.base import Encoding
from onnxcompress.errors import PassError
from onnxcompress.model.weights import Weight
from onnxcompress.training import batchnorm, fusing, losses, parameters
from onnxcompress.training.batchnorm import Running
from onnxcompress.training.forward import forward as forward
from onnxcompress.training.narrowing import narrow
from onnxcompress.training.optimizers import Optimizer
from onnxcompress.training.parameters import Exposed, Parameter

LOSS, SHARE, GRADIENT = "train/loss", "train/share", "gradient/"
NEXT = ".next"
_RESHAPING = {"Flatten", "Reshape", "Squeeze", "Unsqueeze"}

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

    `model`: gives the loss and the gradients, `gradient/...` shaped as in `shapes`; both are a share of those of the
    batch where a call holds a share of it. `leaves`: the parameters as graph inputs. `buffers`: inputs that stay.
    `left`: weights that are not trained and why. `running`: state that the forward pass itself moves (statistics of
    normalizations), with what it starts from; the next value of an input is the output `<input>.next`. The rest says
    what is made of the gradients.
    """

    model: ir.Model
    leaves: list[Parameter]
    shapes: dict[str, tuple[int, ...]]
    buffers: dict[str, np.ndarray]
    left: dict[str, str]
    optimizer: Optimizer
    clip: float | None
    relative: bool
    running: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def trained(self, values: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
        """Weight key -> part -> array, out of the values of the leaves and of the running statistics.

        Where the values hold a mask, too (gradual pruning), the weight is what it leaves.
        """
        found: dict[str, dict[str, np.ndarray]] = {}
        for leaf in self.leaves:
            array, mask = values[leaf.name], values.get(leaf.mask) if leaf.is_weight else None
            found.setdefault(leaf.key, {})[leaf.part] = leaf.stored(array) if mask is None else array * mask
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
    exposed = _expose(model, [*values, *running.outputs], parameters.expose(model, allows, restate, learn_scales))
    prepare(model)
    batchnorm.spelled_out(model)
    total = _write_loss(model, values, loss, l1, exposed.parameters)
    known = named(model.graph)
    model.graph.outputs.clear()
    model.graph.outputs.extend([total, *(known[name] for name in running.outputs)])
    found = _differentiate(model, exposed.parameters)
    leaves = [leaf for leaf in exposed.parameters if leaf.name in found]
    if not leaves:
        raise PassError("no weight has any effect on the loss")
    for value in [v for v in model.graph.inputs if (v.name or "").startswith("parameter/") and v.name not in found]:
        _freeze(model, value, exposed)
    _scale_gradients(model, leaves, found)
    shapes = _give(model, leaves, found)
    buffers = {value.name or "": array for value, array in exposed.buffers}
    model.graph.name = "training step"
    return TrainingGraph(model, leaves, shapes, buffers, exposed.left, optimizer, clip, relative, running.initial)


def _expose(model: ir.Model, values: Sequence[str], exposed: Exposed) -> Exposed:
    """Make inputs of what was exposed, and outputs of `values`, which keeps them through preparation.

    Raises:
        PassError: nothing was exposed.
    """
    if not exposed.parameters:
        raise PassError(f"nothing in it can be trained: {_why(exposed)}")
    model.graph.inputs.extend([leaf.value for leaf in exposed.parameters] + [value for value, _ in exposed.buffers])
    known = named(model.graph)
    model.graph.outputs.clear()
    model.graph.outputs.extend(known[name] for name in dict.fromkeys(values))
    return exposed


def _write_loss(
    model: ir.Model, values: Sequence[str], loss: WriteLoss, l1: float, leaves: Sequence[Parameter]
) -> ir.Value:
    """The loss of `values`, and `l1` times the sum of the absolute values of the weights that they depend on."""
    b = Builder(model.graph, model.opset_imports[""])
    b.scope = "loss"
    known = named(model.graph)
    total = loss(Inputs(b), {name: b.wrap(known[name]) for name in values})
    if l1:
        nodes, end = list(model.graph), total.value
        share = Inputs(b)(SHARE, total.dtype, []) * l1
        for value in [known[leaf.name] for leaf in leaves if leaf.is_weight]:
            if end in reach(nodes, [value]):
                total = total + losses.l1_penalty(b.wrap(value)).cast(total.dtype) * share
    total = b.op("Identity", total, shape=())
    total.value.name = LOSS
    return total.value


def _differentiate(model: ir.Model, leaves: Sequence[Parameter]) -> dict[str, ir.Value]:
    """Add the gradients of the loss to the graph; by the leaf's name, those that there are.

    Raises:
        NoGradient: an operator has none; the weights that it cuts off are called by their keys.
    """
    _drop_dead(model)
    fusing.part(model)
    narrow(model)
    fusing.fuse(model)
    try:
        found = gradients(model, {LOSS: None}, [leaf.name for leaf in leaves])
    except NoGradient as error:
        key_of = {leaf.name: leaf.key for leaf in leaves}
        cut = dict.fromkeys(key_of.get(name, name) for name in error.cut_off)
        raise NoGradient(error.node, error.op_type, error.reason, list(cut)) from None
    fusing.lower(model)
    return found


def _scale_gradients(model: ir.Model, leaves: Sequence[Parameter], found: dict[str, ir.Value]) -> None:
    """Multiply gradients by what their parameters ask for."""
    b = Builder(model.graph, model.opset_imports[""])
    b.scope = "gradient scale"
    for leaf in leaves:
        if leaf.gradient != 1:
            found[leaf.name] = (b.wrap(found[leaf.name]) * leaf.gradient).value


def _give(model: ir.Model, leaves: Sequence[Parameter], found: Mapping[str, ir.Value]) -> dict[str, tuple[int, ...]]:
    """Make the gradients outputs `gradient/<leaf>`; returns in which shapes.

    A last Reshape is left out: to an output it would be a copy, and where elements lie in memory is the same.
    """
    b = Builder(model.graph, model.opset_imports[""])
    b.scope = "gradient"
    shapes = {}
    for leaf in leaves:
        value, shape = _unshaped(found[leaf.name], leaf.initial.shape)
        if value.producer() is None or value.is_graph_output():
            value = b.op("Identity", b.wrap(value), shape=shape).value
        value.name = GRADIENT + leaf.name
        model.graph.outputs.append(value)
        shapes[leaf.name] = shape
    _drop_dead(model)
    return shapes


def _unshaped(value: ir.Value, shape: tuple[int, ...]) -> tuple[ir.Value, tuple[int, ...]]:
    node = value.producer()
    while node is not None and node.op_type in _RESHAPING and not node.domain and not value.uses():
        if node.meta:  # says how else the gradient may be had
            break
        (source, *_), sizes = node.inputs, node.inputs[0].shape if node.inputs[0] is not None else None
        if source is None or sizes is None or not all(isinstance(size, int) for size in sizes):
            break
        value, shape, node = source, tuple(int(str(size)) for size in sizes), source.producer()
    return value, shape


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
