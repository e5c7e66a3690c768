"""The rewriting of a training graph: convolutions and what lies between them move to the blocked layout.

One walk over the nodes. A convolution's result exists blocked; elementwise nodes follow it there; whoever needs it
plain gets it reordered once. ONNX Runtime does the same by itself where weights are constants; in training none is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from onnxcompress.autodiff.builder import Builder
from onnxcompress.autodiff.engine import inputs_of, named
from onnxcompress.autodiff.rules.convolution import WeightGradient
from onnxcompress.autodiff.tensor import Tensor
from onnxcompress.training.blocked import convolutions
from onnxcompress.training.blocked.joining import join
from onnxcompress.training.blocked.layout import DOMAIN, Layout, sizes

FLOAT = ir.DataType.FLOAT
# Elementwise operators that stay finite whatever the channels that were added hold: what is no number there would reach
# the others through the next convolution, zero weights or not.
ELEMENTWISE = {
    *("Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Elu", "Selu", "Softplus", "Erf"),
    *("Add", "Sub", "Mul", "Sum", "Min", "Max", "Neg", "Abs", "Sign", "Identity", "Cast", "Where"),
    *("Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal", "And", "Or", "Not"),
}


def lower(model: ir.Model, shapes: Mapping[str, Sequence[int]], block: int) -> int:
    """Rewrite `model`, in place, for feeds of these shapes and blocks of `block` channels.

    Returns how many convolutions now run blocked; 0 and an unchanged model (but for declared shapes) where none does.
    """
    graph = model.graph
    if not block or not any(node.op_type == "Conv" for node in graph):
        return 0
    settle(model, shapes)
    return Lowering(model, block).run()


def settle(model: ir.Model, shapes: Mapping[str, Sequence[int]]) -> None:
    """Declare the inputs' shapes and infer all others from them."""
    for value in model.graph.inputs:
        if (value.name or "") in shapes:
            value.shape = ir.Shape(shapes[value.name or ""])
    for node in model.graph:
        for output in node.outputs:
            output.shape = None
    while True:
        ShapeInferencePass(data_prop=True)(model)
        if not _fold_shapes(model.graph):
            return


def _fold_shapes(graph: ir.Graph) -> bool:
    """Put numbers in the place of Shape nodes; True when there were any that could be."""
    found = [
        node for node in graph if node.op_type == "Shape" and not node.domain and _shape(node.inputs[0]) is not None
    ]
    for node in found:
        sizes_, output = _shape(node.inputs[0]) or [], node.outputs[0]
        part = sizes_[slice(node.attributes.get_int("start", 0), node.attributes.get_int("end", len(sizes_)))]
        name = f"{output.name}/folded"
        tensor = ir.tensor(np.array(part, np.int64), name=name)
        value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape([len(part)]))
        graph.register_initializer(value)
        output.replace_all_uses_with(value, replace_graph_outputs=True)
        graph.remove(node, safe=True)
    return bool(found)


class Lowering:
    """One graph on its way. `blocked`: value -> its blocked form; `gone`: values that exist blocked only."""

    def __init__(self, model: ir.Model, block: int) -> None:
        self.model = model
        self.graph = model.graph
        self.b = Builder(model.graph, model.opset_imports[""])
        self.layout = Layout(self.b, block)
        self.named = named(model.graph)
        self.blocked: dict[ir.Value, Tensor] = {}
        self.gone: set[ir.Value] = set()
        self.weights: dict[tuple[ir.Value, str], Tensor] = {}
        self.rows: dict[ir.Value, Tensor] = {}
        self.standing: dict[ir.Value, ir.Value] = {}  # what took the place of a value
        self.count = 0

    def run(self) -> int:
        """Do it; the number of convolutions that moved."""
        graph = self.graph
        nodes = list(graph)
        graph.remove(nodes)
        for node in nodes:
            self.b.scope = f"{node.name}/blocked"
            if self._move(node):
                for index in range(len(node.inputs)):
                    node.replace_input_with(index, None)  # what it used is not used by it any more
                continue
            for value in inputs_of(node):
                self.plain(value)
            graph.append(node)
        for value in list(graph.outputs):
            self.plain(value)
        self.model.opset_imports[DOMAIN] = 1
        drop_dead(graph)
        join(graph)
        return self.count

    def _move(self, node: ir.Node) -> bool:
        """Write `node` anew in the blocked layout, where it can be."""
        if WeightGradient.KEY in node.meta:
            found = convolutions.weight_gradient(self, node.meta[WeightGradient.KEY])
            if found is not None:
                self._stand_in(node.outputs[0], found)
                return True
        if node.op_type in ("Conv", "ConvTranspose") and node.domain == "":
            move = convolutions.conv if node.op_type == "Conv" else convolutions.conv_transpose
            moved = move(self, node)
            if moved is not None:
                self.count += 1
                self.keep(node.outputs[0], moved)
            return moved is not None
        if node.domain == "" and node.op_type in ELEMENTWISE:
            return self._elementwise(node)
        if node.domain == "" and node.op_type in ("ReduceSum", "ReduceMean", "ReduceSumSquare"):
            return self._reduction(node)
        if node.domain == "" and node.op_type == "BatchNormalization":
            return self._normalization(node)
        return False

    # Values ----------------------------------------------------------------------------------------------------------

    def keep(self, value: ir.Value, moved: Tensor) -> None:
        """`value` now exists as `moved` alone."""
        self.blocked[value] = moved
        self.gone.add(value)

    def plain(self, value: ir.Value | None) -> None:
        """See to it that `value` can be used as it was."""
        if value is None or value not in self.gone:
            return
        moved = self.blocked[value]
        kind, channels = value.dtype, sizes(Tensor(self.b, value))[1]
        b, scope = self.b, self.b.scope
        found = self.layout.leave(moved if kind == FLOAT else moved.cast(FLOAT), channels)
        if kind is not None and kind != FLOAT:
            found = found.cast(kind)
        b.scope = scope
        self._stand_in(value, found)
        self.blocked[found.value] = moved

    def _stand_in(self, value: ir.Value, found: Tensor) -> None:
        """`found` takes the place of `value` everywhere, its name included."""
        name = value.name
        self.gone.discard(value)
        value.replace_all_uses_with(found.value, replace_graph_outputs=True)
        value.name = f"{name}/before"
        self.standing[value] = found.value
        found.value.name = name

    def enter(self, value: ir.Value) -> Tensor:
        """The blocked form of `value`, reordered now if nobody did before."""
        if value not in self.blocked:
            self.blocked[value] = self.layout.enter(self.b.wrap(value))
        return self.blocked[value]

    def channels_first(self, value: ir.Value) -> Tensor:
        """`value` as [C, N, H, W]."""
        self.plain(value)
        return self.b.wrap(self.standing.get(value, value)).transpose([1, 0, 2, 3])

    def channels_last(self, value: ir.Value) -> Tensor:
        """`value` as [N, H, W, C]."""
        if value not in self.rows:
            if value in self.blocked:
                channels = sizes(Tensor(self.b, value))[1]
                self.rows[value] = self.layout.channels_last(self.blocked[value], channels)
            else:
                self.rows[value] = self.b.wrap(value).transpose([0, 2, 3, 1])
        return self.rows[value]

    # Between convolutions --------------------------------------------------------------------------------------------

    def _elementwise(self, node: ir.Node) -> bool:
        """The same node on blocks: on the kernels' shape where all operands are alike, or opened for one a channel."""
        output = node.outputs[0]
        if not any(x in self.blocked for x in node.inputs) or len(node.outputs) > 1:
            return False
        image = _shape(output)
        kinds = [self._kind(x, image) for x in node.inputs]
        if (
            image is None
            or "other" in kinds
            or not any(kind == "image" and x in self.blocked for kind, x in zip(kinds, node.inputs, strict=True))
        ):
            return False
        opened = any(kind in ("channel", "sample") for kind in kinds)
        operands: list[ir.Value | None] = []
        for x, kind in zip(node.inputs, kinds, strict=True):
            if x is None or kind == "scalar":
                operands.append(x)
            elif kind == "image":
                blocks = self.enter(x)
                operands.append((self.layout.open(blocks) if opened else blocks).value)
            else:
                operands.append(self._channelwise(x).value)
        made = ir.Node("", node.op_type, operands, list(node.attributes.values()), num_outputs=1)
        made.name = self.b.name(f"{self.b.scope}/{node.op_type}")
        result = made.outputs[0]
        result.name = self.b.name(made.name or "")
        result.type = output.type
        n, c, h, w = image
        size, whole = self.layout.size, self.layout.padded(c)
        result.shape = ir.Shape([n, whole // size, h, w, size] if opened else [n, whole, h, w])
        self.graph.append(made)
        found = self.b.wrap(result)
        self.keep(output, self.layout.close(found) if opened else found)
        return True

    def _normalization(self, node: ir.Node) -> bool:
        """BatchNormalization by given statistics: one factor and one summand a channel."""
        x, image = node.inputs[0], _shape(node.outputs[0])
        others = list(node.inputs[1:5])
        if x is None or x not in self.blocked or image is None or len(image) != 4:
            return False
        if any(v is None or v.dtype != FLOAT or _shape(v) != [image[1]] for v in others):
            return False
        if any(y.uses() or y.is_graph_output() for y in node.outputs[1:]):
            return False
        scale, bias, mean, variance = (self.b.wrap(v) for v in others if v is not None)
        factor = scale / (variance + node.attributes.get_float("epsilon", 1e-5)).map("Sqrt")
        summand = bias - mean * factor
        blocks = self.layout.open(self.blocked[x])
        found = blocks * self._of_channels(factor, 1) + self._of_channels(summand, 1)
        self.keep(node.outputs[0], self.layout.close(found))
        return True

    def _kind(self, x: ir.Value | None, image: list[int] | None) -> str:
        """What an operand is beside an image [N, C, H, W]."""
        if x is None:
            return "scalar"
        shape = _shape(x)
        if shape is None or image is None or len(image) != 4:
            return "other"
        if all(size == 1 for size in shape) and len(shape) <= 4:
            return "scalar"
        if shape == image:
            return "image" if x.dtype == FLOAT or x in self.blocked else "other"
        if x.dtype != FLOAT or x in self.gone:
            return "other"
        padded = [1] * (4 - len(shape)) + shape
        if padded[1] == image[1] and padded[2:] == [1, 1] and padded[0] in (1, image[0]):
            return "channel" if padded[0] == 1 else "sample"
        return "other"

    def _channelwise(self, x: ir.Value) -> Tensor:
        """[N or 1, C, 1, 1] as [N or 1, C/B, 1, 1, B]."""
        shape = [1] * (4 - len(_shape(x) or [])) + (_shape(x) or [])
        return self._of_channels(self.b.wrap(x), shape[0])

    def _of_channels(self, x: Tensor, samples: int) -> Tensor:
        """`x`, which holds N C values, as [N, C/B, 1, 1, B]."""
        layout, count = self.layout, math.prod(sizes(x)) // samples
        flat = layout.channels(x.reshape([samples, count]), 1)
        return flat.reshape([samples, layout.padded(count) // layout.size, 1, 1, layout.size])

    def _reduction(self, node: ir.Node) -> bool:
        """A sum or mean over all but the channels: first over the places of a block, then over the samples."""
        x, output = node.inputs[0], node.outputs[0]
        shape, result = _shape(x), _shape(output)
        if x is None or x not in self.blocked or x.dtype != FLOAT or shape is None or result is None or len(shape) != 4:
            return False
        if [size for size in result if size != 1] != [size for size in shape[1:2] if size != 1]:
            return False
        n, c, h, w = shape
        size, whole = self.layout.size, self.layout.padded(c)
        places = self.blocked[x].reshape([n * whole // size, h * w, size]).reduce(node.op_type, [1], keep=False)
        then = "ReduceSum" if node.op_type == "ReduceSumSquare" else node.op_type
        found = places.reshape([n, whole]).reduce(then, [0], keep=False)
        if whole > c:
            found = found.slice([0], [0], [c])
        found.value.shape = ir.Shape([c])
        self._stand_in(output, found.reshape(result))
        return True


def _shape(value: ir.Value | None) -> list[int] | None:
    """A value's shape, where every size is known."""
    if value is None or value.shape is None or not all(isinstance(size, int) for size in value.shape):
        return None
    return [size for size in value.shape if isinstance(size, int)]


def drop_dead(graph: ir.Graph) -> None:
    """Remove nodes and constants nobody uses."""
    for node in reversed(list(graph)):
        if not any(output.uses() or output.is_graph_output() for output in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
            del graph.initializers[name]
