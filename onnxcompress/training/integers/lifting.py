"""Operators of integers written in float operators: how a model is walked. The operators are in the files beside it."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from onnxcompress.autodiff.builder import Builder
from onnxcompress.autodiff.engine import named as values_of
from onnxcompress.encodings import recognize
from onnxcompress.encodings.base import Tape
from onnxcompress.model import bridge
from onnxcompress.model.weights import Weight, weights
from onnxcompress.training.integers.blocks import least_opset
from onnxcompress.training.integers.call import FLOAT, INTEGERS, LIFTS, Call, Refused
from onnxcompress.training.integers.places import Place, Places, named

_SHARED = "and so does another consumer, of it or of what comes with it, that has no float form"
_META = "onnxcompress.training.integers"  # of the copy: what `refusal` and `is_fixed` tell


@dataclasses.dataclass
class _Notes:
    """`reasons`: by the name of integers that are not trained. `fixed`: names of constants that are no weights."""

    reasons: dict[str, str] = dataclasses.field(default_factory=dict)
    fixed: set[str] = dataclasses.field(default_factory=set)


def lift(model: ir.Model) -> Places:
    """Write the operators of `model`, in place, that take integers in float; where what trains there is stored."""
    return Lifter(model).run() if any(map(_is_lifted, model.graph)) else Places(model, {})


def places(model: ir.Model) -> Places:
    """Where in `model`, which stays as it is, the integers lie that are trained in a copy of it."""
    if not any(map(_is_lifted, model.graph)):
        return Places(model, {})
    copy = bridge.clone(model)
    copy.opset_imports[""] = max(copy.opset_imports.get("", 1), least_opset(copy))  # it is not run
    return lift(copy).of(model)


def refusal(weight: Weight) -> str:
    """Why a weight of a training copy that is still taken as integers is not trained; "" where it is not."""
    if getattr(weight.encoding, "form", None) != "integer":
        return ""
    notes = weight.model.meta.get(_META)
    why = notes.reasons.get(str(weight.value.name)) if isinstance(notes, _Notes) else None
    taker = weight.uses[0].op_type.split("::")[-1] if weight.uses else "its consumer"
    return f"{taker} takes it as integers, {why or 'which no gradient passes'}"


def is_fixed(weight: Weight) -> bool:
    """Whether it is a constant of lifted operators: a scale, and no weight of its own."""
    notes = weight.model.meta.get(_META)
    return isinstance(notes, _Notes) and weight.value.name in notes.fixed


@dataclasses.dataclass
class _Draft:
    """A call and the nodes and outputs that take the place of its node."""

    call: Call
    nodes: list[ir.Node]
    outputs: list[ir.Value]


class Lifter:
    """One model. Drafts are written apart, and placed where every consumer of their weights has one."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.root = Builder(model.graph, model.opset_imports[""])
        self.notes = _Notes()
        self.constants = named(model.graph)
        self.places: dict[str, Place] = {}  # by the name of their integers
        self._standing: dict[str, ir.Value] = {}
        self.weights = {
            str(weight.value.name): weight
            for weight in weights(model)
            if weight.owner is model.graph and recognize.integers(weight.value) is not None
        }

    def standing(self, place: Place) -> ir.Value:
        """A value that stands for a weight until all drafts are there."""
        if place.q not in self._standing:
            kind, shape = ir.TensorType(_kind(place)), ir.Shape(place.encoding.shape)
            self._standing[place.q] = ir.Value(name=f"{place.key}/standing", type=kind, shape=shape)
        return self._standing[place.q]

    def run(self) -> Places:
        """Lift what can be lifted."""
        drafts = [self._draft(node) for node in list(self.model.graph) if _is_lifted(node)]
        agreed = self._agreed([draft for draft in drafts if draft is not None])
        for draft in agreed:
            self._put(draft)
        used = {name for draft in agreed for name in draft.call.takes}
        taken = set(values_of(self.model.graph))
        self.places = {name: self._written(place, taken) for name, place in self.places.items() if name in used}
        self.notes.fixed |= {place.scale for place in self.places.values()}
        self.model.meta[_META] = self.notes
        return Places(self.model, {place.key: place for place in self.places.values()})

    def _draft(self, node: ir.Node) -> _Draft | None:
        b = self.root.inside(ir.Graph([], [], nodes=[]))
        b.scope = node.name or str(node.outputs[0].name)
        call = Call(self, b, node)
        try:
            outputs = [result.value for result in LIFTS[node.domain, node.op_type](call)]
        except Refused as refused:
            self._refuse(node, str(refused))
            b.graph.remove(list(b.graph), safe=True)
            return None
        nodes = list(b.graph)
        b.graph.remove(nodes)
        return _Draft(call, nodes, outputs)

    def _refuse(self, node: ir.Node, why: str) -> None:
        for value in node.inputs:
            if value is not None and value.name in self.weights:
                self.notes.reasons[value.name] = why

    def _agreed(self, drafts: list[_Draft]) -> list[_Draft]:
        """The drafts all of whose weights have no consumer without one."""
        while True:
            mine = {id(draft.call.node) for draft in drafts}
            shared = {name for draft in drafts for name in draft.call.takes if self._taken_by_others(name, mine)}
            lost = [draft for draft in drafts if draft.call.takes & shared]
            if not lost:
                return drafts
            for draft in lost:
                self._refuse(draft.call.node, _SHARED)
                ir.Graph([], [], nodes=draft.nodes).remove(draft.nodes, safe=True)  # leaves no uses behind
            drafts = [draft for draft in drafts if not draft.call.takes & shared]

    def _taken_by_others(self, name: str, mine: set[int]) -> bool:
        value = self.constants[name]
        users = [node for node, _ in value.uses() if node.graph is not None]
        return value.is_graph_output() or any(id(node) not in mine for node in users)

    def _put(self, draft: _Draft) -> None:
        """The draft's nodes in the place of its node and of those it takes along."""
        call = draft.call
        for value in call.retyped:
            value.type = ir.TensorType(FLOAT)
        nodes = [call.node, *(node for node, _ in call.ends)]
        before = [*call.node.outputs, *(node.outputs[0] for node, _ in call.ends)]
        after = [*draft.outputs, *(tensor.value for _, tensor in call.ends)]
        ir.convenience.replace_nodes_and_values(self.model.graph, call.node, nodes, draft.nodes, before, after)

    def _written(self, place: Place, taken: set[str]) -> Place:
        """The weight under its key, before all nodes, instead of its integers; the place, by the key it got."""
        value = self.constants[place.q]
        node = value.producer()
        if node is None:
            del self.model.graph.initializers[place.q]
        else:
            self.model.graph.remove(node, safe=True)
        taken.discard(place.q)
        tape = Tape(self.model, self.model.graph, taken=taken)
        value = place.encoding.emit(tape, place.key)
        value.type, value.shape = ir.TensorType(_kind(place)), ir.Shape(place.encoding.shape)
        tape.place()
        self.standing(place).replace_all_uses_with(value)
        return dataclasses.replace(place, key=str(value.name))


def _is_lifted(node: ir.Node) -> bool:
    if node.op_type == "Gather":  # of floats and of shapes it is no business of ours
        tensor = recognize.constant(node.inputs[0])
        return not node.domain and tensor is not None and tensor.dtype in INTEGERS
    return (node.domain, node.op_type) in LIFTS


def _kind(place: Place) -> ir.DataType:
    return ir.DataType.from_numpy(place.encoding.dtype)
