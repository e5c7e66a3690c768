"""What a lift may ask about its node: operands, dequantized or trained, and where its integers go.

A lift gets a `Call` and returns the outputs of its node. A form of an operator that it cannot write it refuses, and the
node, and the weights it takes, stay what they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from onnxcompress.autodiff.builder import Builder
from onnxcompress.autodiff.tensor import Tensor
from onnxcompress.encodings import recognize
from onnxcompress.encodings.affine import Affine
from onnxcompress.training.integers.places import Place

if TYPE_CHECKING:
    from onnxcompress.training.integers.lifting import Lifter

Lift = Callable[["Call"], Sequence[Tensor]]
Table = dict[tuple[str, str], Lift]
LIFTS: Table = {}
FLOAT, UINT8 = ir.DataType.FLOAT, ir.DataType.UINT8
INTEGERS = {ir.DataType.INT8, ir.DataType.UINT8}
_MOVES = {"Identity", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten"}  # one tensor in, the same one out


class Refused(Exception):
    """Why a node cannot be lifted."""


class Call:
    """One node to be lifted.

    `takes`: names of the integer constants it trains. `retyped`: values that become float with its outputs. `ends`:
    nodes that it takes along, each with what their output becomes.
    """

    def __init__(self, lifter: Lifter, b: Builder, node: ir.Node) -> None:
        self.b, self.node, self._lifter = b, node, lifter
        self.takes: set[str] = set()
        self.retyped: list[ir.Value] = []
        self.ends: list[tuple[ir.Node, Tensor]] = []

    def has(self, index: int) -> bool:
        """True when input `index` is given."""
        return index < len(self.node.inputs) and self.node.inputs[index] is not None

    def value(self, index: int) -> ir.Value:
        """Input `index`, which is given."""
        value = self.node.inputs[index]
        assert value is not None
        return value

    def given(self, index: int) -> ir.Value | None:
        """Input `index`; None where it is left out."""
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    def name(self, index: int) -> str:
        """The name of input `index`."""
        return str(self.value(index).name)

    def x(self, index: int) -> Tensor:
        """Input `index` as it is."""
        return self.b.wrap(self.value(index))

    def constant(self, index: int) -> np.ndarray | None:
        """The value of input `index`; None where it is left out or computed."""
        tensor = recognize.constant(self.value(index)) if self.has(index) else None
        return None if tensor is None else tensor.numpy()

    def attr(self, name: str, default: Any = None) -> Any:
        """An attribute's value."""
        attribute = self.node.attributes.get(name)
        return default if attribute is None else attribute.value

    def keep(self, *names: str) -> dict[str, Any]:
        """The attributes of these names, for another node."""
        return {name: self.node.attributes[name] for name in names if name in self.node.attributes}

    # Operands --------------------------------------------------------------------------------------------------------

    def scalar(self, index: int, what: str = "scale") -> Tensor:
        """A scale or zero point that holds for the whole tensor, of rank 0.

        Raises:
            Refused: it has several elements, or may have.
        """
        array, shape = self.constant(index), self.value(index).shape
        if array is not None:
            if array.size != 1:
                raise Refused(f"and an activation has several {what}s")
            return self.b.constant(array.reshape(()))
        if shape is not None and len(shape) and list(shape) != [1]:
            raise Refused(f"and an activation has several {what}s")
        x = self.x(index)
        return x.reshape([]) if shape is not None and len(shape) else x

    def real(self, index: int, axis: int | None = None) -> Tensor:
        """Inputs (integers, scale, zero point) from `index` on as numbers; a constant trains."""
        if self.constant(index) is not None:
            return self.weight(index, self.value(index + 1), self.given(index + 2), axis)
        return self.dequantized(self.x(index), index + 1, index + 2)

    def dequantized(self, x: Tensor, scale: int, zero_point: int) -> Tensor:
        """(x - zero point) scale."""
        zero = self.scalar(zero_point, "zero point") if self.has(zero_point) else None
        return self.b.op("DequantizeLinear", x, self.scalar(scale), zero, dtype=FLOAT, shape=x.shape)

    def centred(self, index: int, zero_point: int) -> Tensor:
        """Integers less their zero point, as floats."""
        x, zero = self.x(index), self.scalar(zero_point, "zero point") if self.has(zero_point) else None
        return self.b.op("DequantizeLinear", x, self.b.constant(np.float32(1)), zero, dtype=FLOAT, shape=x.shape)

    def quantized(self, y: Tensor, scale: int, zero_point: int) -> Tensor:
        """`y` in integers of the type of the zero point (uint8 without one)."""
        zero = self.scalar(zero_point, "zero point") if self.has(zero_point) else None
        kind = UINT8 if zero is None else zero.dtype
        return self.b.op("QuantizeLinear", y, self.scalar(scale), zero, dtype=kind, shape=y.shape)

    # Weights ---------------------------------------------------------------------------------------------------------

    def weight(self, index: int, scale: ir.Value, zero_point: ir.Value | None, axis: int | None) -> Tensor:
        """The constant `index` as numbers, to be trained.

        `axis`: along which the scales of channels lie; None: there is one scale.

        Raises:
            Refused: its scale and zero point are no constants that fit it.
        """
        q, held = self.constant(index), recognize.constant(scale)
        zeros = recognize.constant(zero_point)
        assert q is not None
        if held is None or (zero_point is not None and zeros is None):
            raise Refused("and its scale or zero point is no constant")
        scales, zero = held.numpy(), None if zeros is None else zeros.numpy()
        one = scales.size == 1
        if not one and (axis is None or q.shape[axis] != scales.size):
            raise Refused(f"and its {scales.size} scales do not lie along its output axis")
        if zero is not None and zero.size not in (1, scales.size):
            raise Refused("and its zero points do not fit its scales")
        if not np.all(scales > 0):
            raise Refused("and a scale of it is not above 0")
        shape = () if one else (scales.size,)
        if zero is not None:
            zero = np.broadcast_to(zero.reshape(() if zero.size == 1 else -1), shape)
        encoding = Affine(q, scales.reshape(shape), zero, None if one else axis)
        return self.train(Place(self.key(index), self.name(index), str(scale.name), encoding))

    def scaled(self, index: int, zero_point: ir.Value | None, axis: int) -> tuple[Tensor, Tensor]:
        """The constant `index`, to be trained, whose scale nodes behind multiply in; and that scale, in its own shape.

        What is computed is counted in steps of the scale that the file has, since nodes behind will have it in
        training. Where another is learned, they will have that one, too, once it is stored.
        """
        real = self.weight(index, self.scale_of(index), zero_point, axis)
        scale = self.b.constant(self._lifter.places[self.name(index)].encoding.scale)
        self._lifter.notes.fixed.add(str(scale.value.name))
        return real, scale

    def along(self, scale: Tensor, axes: int) -> Tensor:
        """A scale (of `scaled`) with so many axes of size 1 behind it; one for all as it is."""
        tensor = recognize.constant(scale.value)
        if scale.rank == 0 or tensor is None:
            return scale
        shaped = self.b.constant(tensor.numpy().reshape([-1] + [1] * axes))
        self._lifter.notes.fixed.add(str(shaped.value.name))
        return shaped

    def bias(self, index: int, weight: int, x_scale: int) -> Tensor:
        """int32 in steps of the scale of input `weight` times that of the activation, to be trained."""
        q, scale = self.constant(index), self.constant(x_scale)
        place = self._lifter.places.get(self.name(weight))
        if q is None or place is None or scale is None or scale.size != 1:
            raise Refused("and its bias or the scale of its input is no constant")
        factor = float(scale.reshape(()))
        scales = (place.encoding.scale * np.float32(factor)).astype(np.float32)
        encoding = Affine(q, scales, None, 0 if scales.ndim else None)
        return self.train(Place(self.key(index), self.name(index), "", encoding, factor=(place.q, factor)))

    def key(self, index: int) -> str:
        """What the weight of input `index` is called."""
        known = self._lifter.weights.get(self.name(index))
        return known.key if known is not None else recognize.stem_of(self.name(index))

    def train(self, place: Place) -> Tensor:
        """A weight by its place.

        Raises:
            Refused: another consumer sees it differently.
        """
        noted = recognize.is_noted(self._lifter.constants[place.q])
        place = dataclasses.replace(place, encoding=dataclasses.replace(place.encoding, masked=noted))
        known = self._lifter.places.setdefault(place.q, place)
        if known is not place and not known.encoding.same(place.encoding):
            raise Refused("and its consumers see it with different scales")
        self.takes.add(place.q)
        return self.b.wrap(self._lifter.standing(known))

    def scale_of(self, index: int) -> ir.Value:
        """The constant that scales what an integer product gives: beside the integers by name, or on the way."""
        value = self.value(index)
        stem = recognize.stem_of(str(value.name))
        for suffix in (".scale", "_scale"):
            found = self._lifter.constants.get(stem + suffix)
            if found is not None and stem != value.name:
                return found
        for cast in _users(self.node.outputs[0]):
            for product in _users(cast.outputs[0]) if cast.op_type == "Cast" else ():
                for other in product.inputs if product.op_type == "Mul" else ():
                    for factor in _factors(other):
                        tensor = recognize.constant(factor)
                        if tensor is not None and tensor.dtype == FLOAT and len(factor.uses()) == 1:
                            return factor
        raise Refused("and the file does not say its scale")

    # What comes after -------------------------------------------------------------------------------------------------

    def leaves(self, ends: str = "Cast") -> list[ir.Node]:
        """The nodes where the integers that come out become floats, through what only moves them.

        Raises:
            Refused: something else takes them.
        """
        found: list[ir.Node] = []
        waiting = [self.node.outputs[0]]
        while waiting:
            value = waiting.pop()
            self.retyped.append(value)
            if value.is_graph_output():
                raise Refused("and the model gives integers out")
            for node, index in value.uses():
                if node.graph is None:  # of a draft
                    continue
                if node.domain or index or node.op_type not in {"Cast", ends} | _MOVES:
                    raise Refused(f"and {node.op_type} the integers that come out")
                if node.op_type in _MOVES:
                    waiting.append(node.outputs[0])
                elif node.op_type == "Cast" and node.attributes.get_int("to") != int(FLOAT):
                    raise Refused("and what comes out is cast to no float32")
                else:
                    found.append(node)
        return found


def readers(value: ir.Value) -> list[ir.Node]:
    """The nodes of the model, not of drafts, that take `value`."""
    return [node for node, _ in value.uses() if node.graph is not None]


def _users(value: ir.Value) -> Iterator[ir.Node]:
    """The nodes that take `value`, through what only moves it."""
    for node in readers(value):
        if node.op_type in _MOVES:
            yield from _users(node.outputs[0])
        else:
            yield node


def _factors(value: ir.Value | None) -> Iterator[ir.Value]:
    """`value`, and the factors it is the product of."""
    if value is None:
        return
    yield value
    node = value.producer()
    if node is not None and node.op_type in _MOVES:
        yield from _factors(node.inputs[0])
    elif node is not None and node.op_type == "Mul":
        for factor in node.inputs:
            yield from _factors(factor)
