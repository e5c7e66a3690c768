"""Two graphs by the names of their values: whether each value is still made of the same things by the same operators.

Passes keep the names of what survives. So a value that both models have is compared by what it is made of: the named
values and weights one reaches going back from it, and the operators on the way.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxcompress.encodings import functions, recognize
from onnxcompress.model import bridge
from onnxcompress.model.weights import Weight
from onnxcompress.verification.result import Problem

GLUE = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "Cast", "Identity", "Constant"}
# What an operator was before it was rewritten for integers.
FLOAT_OF = {
    "MatMulInteger": "MatMul", "QLinearMatMul": "MatMul", "ConvInteger": "Conv", "QLinearConv": "Conv", "QGemm": "Gemm",
    "DynamicQuantizeMatMul": "MatMul", "MatMulIntegerToFloat": "MatMul", "MatMulNBits": "MatMul",
}  # fmt: skip
# What integer products and looked-up integer rows need around them: scales, biases, the scales of rows.
AROUND_INTEGERS = Counter({"Mul": 99, "Add": 99, "Gather": 99})
# What the version converter puts around operators that work on other axes in another opset.
AROUND_A_LIFT = Counter({"Reshape": 99, "Flatten": 99, "Shape": 99, "Squeeze": 99, "Unsqueeze": 99})


@dataclasses.dataclass
class Made:
    """What a value is made of. `weights`: keys. `operators`: without glue, as they were in float."""

    sources: set[str]
    weights: set[str]
    operators: Counter[str]
    integers: bool = False


class Anatomy:
    """The named values of one model that run, and what each is made of."""

    def __init__(self, model: ir.Model, held: Iterable[Weight]) -> None:
        self.model = model
        self.producers: dict[str, ir.Value] = {}
        self._paths: dict[int, str] = {}
        self._keys: dict[int, str] = {}
        self._static: set[int] = set()
        for weight in held:
            self._keys[id(weight.value)] = weight.key
            end = weight.value.producer()
            if end is not None and recognize.parts(end) is not None and end.inputs[0] is not None:
                self._keys[id(end.inputs[0])] = weight.key
        for path, owner in bridge.scopes(model):
            if isinstance(owner, ir.Function):
                continue
            for value in owner.inputs:
                self._paths[id(value)] = path
            for node in owner:
                static = self._computed_at_load(path, node)
                for value in node.outputs:
                    self._paths[id(value)] = path
                    if static:
                        self._static.add(id(value))
                    elif value.name and (node.op_type not in GLUE or node.op_type == "DequantizeLinear"):
                        self.producers.setdefault(f"{path}{value.name}", value)

    def _computed_at_load(self, path: str, node: ir.Node) -> bool:
        """True for a node that depends on constants alone: it makes no activation."""
        if next(bridge.subscopes(path, node), None) is not None or (not node.inputs and node.op_type != "Constant"):
            return False
        return all(v is None or id(v) in self._static or recognize.constant(v) is not None for v in node.inputs)

    def name(self, value: ir.Value) -> str:
        """The value's name with the path of its scope."""
        return f"{self._paths.get(id(value), '')}{value.name}"

    def key(self, value: ir.Value) -> str | None:
        """The key of the weight that `value` is, or is a part of."""
        return self._keys.get(id(value))

    def made_of(self, name: str, common: set[str]) -> Made:
        """What `name` is made of, going back to values of `common`, weights and the model's inputs."""
        made, seen = Made(set(), set(), Counter()), set()
        start = self.producers[name].producer()
        assert start is not None
        waiting = [start]
        while waiting:
            node = waiting.pop()
            if id(node) in seen:
                continue
            seen.add(id(node))
            if node.op_type not in GLUE and node.domain != functions.DOMAIN:
                made.operators[FLOAT_OF.get(node.op_type, node.op_type)] += 1
                made.integers |= node.op_type in FLOAT_OF
            for value in node.inputs:
                if value is None:
                    continue
                key = self.key(value)
                if key is not None:
                    made.weights.add(key)
                    stored = recognize.constant(value)
                    made.integers |= stored is not None and stored.dtype.bitwidth <= 8 and node.op_type == "Gather"
                    continue
                found, source = self.name(value), value.producer()
                if found in common or (source is None and recognize.constant(value) is None):
                    made.sources.add(found)
                elif source is not None:
                    waiting.append(source)
        return made

    def inside(self, name: str) -> set[str]:
        """Keys of the weights in the subgraphs of the node that makes `name`."""
        node = self.producers[name].producer()
        if node is None or not any(True for _ in bridge.subscopes("", node)):
            return set()
        path = f"{self._paths.get(id(self.producers[name]), '')}{node.outputs[0].name}/"
        return {key for key in self._keys.values() if key.startswith(path)}

    def through(self, value: ir.Value | None, common: set[str]) -> str | np.ndarray | None:
        """What an input is behind glue: a named value, a weight's key, or the array of another constant."""
        while value is not None:
            key = self.key(value)
            if key is not None:
                return f"weight {key}"
            tensor = recognize.constant(value)
            if tensor is not None:
                return tensor.numpy()
            node = value.producer()
            if self.name(value) in common or node is None or not (node.op_type in GLUE and node.inputs):
                return self.name(value)
            value = node.inputs[0]
        return None


def compare(parent: Anatomy, out: Anatomy, folded: Mapping[str, str], gone: Mapping[str, set[str]]) -> list[Problem]:
    """What of the parent's graph the other one does not have, or has otherwise.

    `folded`: output of a BatchNormalization -> convolution's weight. `gone`: the same outputs -> weights that are no
    more where it was folded, for which there is then a bias called `<output>.bias`.
    """
    problems = _ports(parent.model, out.model)
    common = set(parent.producers) & set(out.producers)
    same_opset = parent.model.opset_imports.get("", 1) == out.model.opset_imports.get("", 1)
    for name in parent.producers:
        if name not in common:
            continue
        before, after = parent.made_of(name, common), out.made_of(name, common)
        if name in folded and before.operators["BatchNormalization"] > after.operators["BatchNormalization"]:
            before.operators["BatchNormalization"] -= 1
            before.weights = before.weights - gone.get(name, set()) | {f"{name.rpartition('/')[2]}.bias"}
        problems += _differences(name, before, after, Counter() if same_opset else AROUND_A_LIFT)
        if same_opset and not problems_of(problems, name):
            problems += _inputs(name, parent, out, common)
    return problems


def problems_of(problems: Sequence[Problem], name: str) -> bool:
    """True when one of them is about `name`."""
    return any(problem.where == name for problem in problems)


def _ports(parent: ir.Model, out: ir.Model) -> list[Problem]:
    problems: list[Problem] = []
    for what, mine, theirs in (
        ("input", [v for v in parent.graph.inputs if not v.is_initializer()], list(out.graph.inputs)),
        ("output", list(parent.graph.outputs), list(out.graph.outputs)),
    ):
        names = [value.name for value in theirs]
        lost = [value.name or "" for value in mine if value.name not in names]
        problems += [Problem("structure", name, f"the model has lost its {what} {name!r}") for name in lost]
    return problems


def _differences(name: str, before: Made, after: Made, around: Counter[str]) -> list[Problem]:
    said = []
    lost, new = before.weights - after.weights, after.weights - before.weights
    if lost:
        said.append(f"no longer uses the weights {', '.join(sorted(lost))}")
    if new:
        said.append(f"uses the weights {', '.join(sorted(new))}, which it did not")
    if before.sources != after.sources:
        lost, new = before.sources - after.sources, after.sources - before.sources
        said.append(f"is made of other values: lost {sorted(lost) or 'none'}, new {sorted(new) or 'none'}")
    if before.operators["Gemm"] and after.integers and not after.operators["Gemm"]:
        after.operators["Gemm"], after.operators["MatMul"] = after.operators["MatMul"], 0
    lost_ops, new_ops = before.operators - after.operators, after.operators - before.operators
    new_ops -= around
    if after.integers:
        new_ops -= AROUND_INTEGERS
    if lost_ops or new_ops:
        said.append(f"is made by other operators: lost {_counted(lost_ops)}, new {_counted(new_ops)}")
    return [Problem("structure", name, "; ".join(said), (name,))] if said else []


def _counted(operators: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(operators.items())) or "none"


def _inputs(name: str, parent: Anatomy, out: Anatomy, common: set[str]) -> list[Problem]:
    """The inputs and attributes of the node that makes `name` in both, in their order."""
    mine, theirs = parent.producers[name].producer(), out.producers[name].producer()
    if mine is None or theirs is None or mine.op_type != theirs.op_type or mine.domain != theirs.domain:
        return []
    for key in {*mine.attributes, *theirs.attributes}:
        one, other = mine.attributes.get(key), theirs.attributes.get(key)
        kinds = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS, ir.AttributeType.TENSOR)
        if any(attribute is not None and attribute.type in kinds for attribute in (one, other)):
            continue
        if (one.value if one is not None else None) != (other.value if other is not None else None):
            return [Problem("structure", name, f"attribute {key} of its {mine.op_type} differs", (name,))]
    for index, (one_in, other_in) in enumerate(zip(mine.inputs, theirs.inputs, strict=False)):
        first, second = parent.through(one_in, common), out.through(other_in, common)
        if isinstance(first, np.ndarray) and isinstance(second, np.ndarray):
            same = first.shape == second.shape and bool(np.array_equal(first, second))
        elif isinstance(first, str) and isinstance(second, str):
            known = first.startswith("weight ") or first in common
            same = first == second or not known or second not in common
        else:
            same = True  # a constant on one side was computed by a pass
        if not same:
            return [Problem("structure", name, f"input {index} of its {mine.op_type} differs", (name,))]
    return []
