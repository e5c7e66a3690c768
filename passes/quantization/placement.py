"""Which activations are quantized: the inputs of integer layers, and what lets neighbours stay in integers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx_ir as ir

from onnxcompress.encodings import recognize
from onnxcompress.passes.quantization.layers import ACTIVATIONS, Layer, tail
from onnxcompress.targets import Target


@dataclasses.dataclass
class Point:
    """One activation to quantize in one graph.

    `everyone`: all its consumers read the dequantized value (an operator that makes integers must have no other
    consumer); else only `readers`, (node, input). `like`: the value whose scale it shares.
    """

    value: ir.Value
    owner: ir.Graph
    readers: list[tuple[ir.Node, int]] = dataclasses.field(default_factory=list)
    everyone: bool = False
    like: ir.Value | None = None


def place(found: Sequence[Layer], target: Target) -> dict[int, Point]:
    """The points to quantize, by the id of their value, so that `found` run in integers on `target`.

    1. What a layer takes is quantized.
    2. Where the target wants it, so is what a convolution gives, behind its Relu or Clip.
    3. Additions, concatenations and poolings whose result is quantized, and whose inputs all come from convolutions or
       are quantized anyway, run in integers too; so do operators that only move elements, at one scale.
    4. Nothing else: softmax, normalization, products of two activations and masks stay in float.
    """
    points: dict[int, Point] = {}
    for owner in {id(layer.owner): layer.owner for layer in found}.values():
        points.update(_Placer(owner, [layer for layer in found if layer.owner is owner], target).points)
    return points


class _Placer:
    def __init__(self, owner: ir.Graph, found: Sequence[Layer], target: Target) -> None:
        self.owner = owner
        self.target = target
        self.points: dict[int, Point] = {}
        self._convolutions = {id(layer.node.outputs[0]) for layer in found if layer.node.op_type == "Conv"}
        self._taken = {id(layer.x) for layer in found}
        self._integer: dict[int, bool] = {}
        for layer in found:
            self._point(layer.x).readers.append((layer.node, 0))
            if target.output and layer.node.op_type == "Conv":
                self._point(layer.y).everyone = True
        for node in reversed(list(owner)):
            if node.domain or len(node.outputs) != 1:
                continue
            if node.op_type in target.joined:
                self._join(node)
            elif node.op_type in target.pass_through:
                self._pass(node)

    def _point(self, value: ir.Value) -> Point:
        return self.points.setdefault(id(value), Point(value, self.owner))

    def _join(self, node: ir.Node) -> None:
        inputs = [value for value in node.inputs if value is not None]
        out = tail(node.outputs[0])
        if any(recognize.constant(value) is not None or not self._comes_in_integers(value) for value in inputs):
            return
        if not self.target.output:  # the skip input of a residual; the other is the convolution it fuses with
            for index, value in enumerate(inputs):
                if id(value) not in self._convolutions:
                    self._point(value).readers.append((node, index))
            return
        if id(out) not in self.points:
            return
        for index, value in enumerate(inputs):
            self._point(value).readers.append((node, index))
        self._point(out).everyone = True

    def _pass(self, node: ir.Node) -> None:
        out, x = node.outputs[0], node.inputs[0]
        if id(out) not in self.points or x is None or not self._comes_in_integers(x) or recognize.constant(x):
            return
        self._point(x).readers.append((node, 0))
        self._point(out).everyone = True
        self._point(out).like = x

    def _comes_in_integers(self, value: ir.Value) -> bool:
        """True where integers arrive there, or can, without a float operator being forced into them."""
        key = id(value)
        if key not in self._integer:
            self._integer[key] = False  # a loop in a broken graph ends here
            self._integer[key] = self._look(value)
        return self._integer[key]

    def _look(self, value: ir.Value) -> bool:
        if id(value) in self._taken or id(value) in self._convolutions:
            return True
        node = value.producer()
        if node is None or node.graph is not self.owner or node.domain or len(node.outputs) != 1:
            return False
        inputs = [i for i in node.inputs if i is not None]
        if node.op_type in ACTIVATIONS:
            return tail(inputs[0]) is value and self._comes_in_integers(inputs[0])
        if node.op_type in self.target.joined:
            return all(recognize.constant(i) is None and self._comes_in_integers(i) for i in inputs)
        return node.op_type in self.target.pass_through and self._comes_in_integers(inputs[0])
