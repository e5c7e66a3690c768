"""Output heads: the logits behind what a model hands out (probabilities, a class, a map of classes to scores)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx_ir as ir

from onnxcompress.data.sizes import STATE
from onnxcompress.errors import ModelError
from onnxcompress.model import bridge
from onnxcompress.model.shapes import shapes
from onnxcompress.training.behind import Kind, behind

_FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}


@dataclasses.dataclass(frozen=True)
class Head:
    """One output and what is learned in its place.

    `logits`: the value before Softmax, LogSoftmax, Sigmoid and ArgMax; the output itself where there is none of them.
    `kind`: what the operators behind it say it is; "feature" for a tensor within the model, whose values are learned.
    `axis`: the classes' axis in the output, None where nothing says. `is_state`: it goes back in with the next call (a
    cache of keys and values, a recurrent state), and is learned only where it is asked for by name.
    `scores`: the value with the output's numbers, which is not the output where that is a label or a map of classes.
    `moves`: values between logits and scores, the results of operators that only move elements. `is_linear`: the
    numbers come from a layer, and are no probabilities. `is_opaque`: they are probabilities, with no logits to read.
    """

    output: str
    logits: str
    kind: Kind = "values"
    axis: int | None = None
    is_state: bool = False
    scores: str = ""
    moves: tuple[str, ...] = ()
    is_linear: bool = False
    is_opaque: bool = False

    @property
    def laid(self) -> str:
        """The logits with their elements where the scores have theirs, in a model from `laid_out`."""
        return f"train/logits/{self.output}" if self.moves else self.logits


def heads(model: ir.Model) -> list[Head]:
    """The heads of all outputs, in their order; outputs that share their logits (label and scores) are one head."""
    found: dict[str, Head] = {}
    for value in model.graph.outputs:
        head = _of(value, model.opset_imports.get("", 1))
        if head is not None and (head.logits not in found or found[head.logits].kind == "values"):
            found[head.logits] = head
    return list(found.values())


def _of(output: ir.Value, opset: int) -> Head | None:
    seen = behind(output, opset)
    if seen.kind == "values" and not (isinstance(output.type, ir.TensorType) and output.dtype in _FLOATS):
        return None  # labels, counts: nothing says what they were made from
    return Head(
        output.name or "",
        seen.logits.name or "",
        seen.kind,
        seen.axis,
        is_state=seen.kind == "values" and _goes_back(output),
        scores=seen.scores.name or "",
        moves=tuple(node.outputs[0].name or "" for node in seen.moves),
        is_linear=seen.is_linear,
        is_opaque=seen.is_opaque,
    )


def laid_out(model: ir.Model, found: Sequence[Head]) -> ir.Model:
    """A copy in which the logits of `found` are outputs, too, with their elements moved as those of the scores are;
    `model` itself where none are moved."""
    if not any(head.moves for head in found):
        return model
    copy, known = bridge.clone(model), shapes(model)
    made = {value.name: value for node in copy.graph for value in node.outputs}
    made |= {value.name: value for value in copy.graph.inputs}
    for head in found:
        value, info = made.get(head.logits), known.get(head.logits)
        if value is None or not head.moves:
            continue
        if value.type is None and info is not None and info.dtype is not None:
            value.type = ir.TensorType(info.dtype)  # an output has to have one
        for name in head.moves:
            value = _moved(value, made[name])
        value.name = head.laid
        copy.graph.outputs.append(value)
    return copy


def _moved(value: ir.Value, like: ir.Value) -> ir.Value:
    """`value` through the operator that gives `like`."""
    before = like.producer()
    assert before is not None
    attributes = list(before.attributes.values())
    node = ir.Node(before.domain, before.op_type, [value, *before.inputs[1:]], attributes, num_outputs=1)
    graph = before.graph
    assert isinstance(graph, ir.Graph)
    graph.insert_after(before, node)
    if value.type is not None:
        node.outputs[0].type, node.outputs[0].shape = value.type, like.shape
    return node.outputs[0]


def _goes_back(output: ir.Value) -> bool:
    """Whether an input is this output of the call before: `past...` of `present...`, or `state` of `stateN`."""
    graph, name = output.graph, (output.name or "").lower()
    if graph is None or output.shape is None:
        return False
    for value in graph.inputs:
        before = (value.name or "").lower()
        named = ("past" in before and "present" in name) or (STATE.search(before) and name.startswith(before))
        if named and value.dtype == output.dtype and value.shape is not None and len(value.shape) == len(output.shape):
            return True
    return False


def chosen(found: Sequence[Head], wanted: Sequence[str], model: str) -> list[Head]:
    """The heads of the outputs that `wanted` names ("OUTPUT" or "OUTPUT=TEACHER'S"); where none is named, all but
    state that goes back in (or that, where there is nothing else).

    Raises:
        ModelError: there is no such output, or none that can be learned.
    """
    if not found:
        raise ModelError(f"{model}: has no output that can be learned (no float tensor, and no logits behind any)")
    if not wanted:
        return [head for head in found if not head.is_state] or list(found)
    return [_named(found, text.partition("=")[0], f"{model}: --output {text}") for text in wanted]


def _named(found: Sequence[Head], name: str, where: str) -> Head:
    head = next((head for head in found if name in (head.output, head.logits)), None)
    if head is None:
        raise ModelError(f"{where}: has no such output, only {', '.join(_outputs(found))}")
    return head


def _outputs(found: Sequence[Head]) -> list[str]:
    return [head.output for head in found]


def features(wanted: Sequence[str], student: ir.Model, teacher: ir.Model | None) -> list[tuple[Head, Head]]:
    """Tensors within the student, each with the teacher's. `wanted`: "STUDENT" for one of that name, "STUDENT=TEACHER".

    Raises:
        ModelError: there is no such tensor in a main graph, or no teacher to learn it from.
    """
    if wanted and teacher is None:
        raise ModelError(f"--feature {wanted[0]}: is learned from a teacher, and there is none")
    found = []
    for text in wanted:
        mine, _, theirs = text.partition("=")
        if teacher is not None:
            _require(text, mine, student, "the student")
            _require(text, theirs or mine, teacher, "the teacher")
        heads = [Head(f"feature {name}", name, "feature", scores=name) for name in (mine, theirs or mine)]
        found.append((heads[0], heads[1]))
    return found


def _require(text: str, name: str, model: ir.Model, what: str) -> None:
    made = (value for node in model.graph for value in node.outputs)
    if not any(value.name == name and name for value in made):
        raise ModelError(f"--feature {text}: {what} has no tensor {name!r} that an operator of its main graph computes")


def pairs(student: Sequence[Head], teacher: Sequence[Head], wanted: Sequence[str] = ()) -> list[tuple[Head, Head]]:
    """Each head of the student with the teacher's that `wanted` gives it ("STUDENT=TEACHER"), else with that of its own
    name, or, where no names agree, of the same place. Heads that have none are left out, unless `wanted` names them.

    Raises:
        ModelError: they do not pair.
    """
    told = {mine: theirs for mine, sign, theirs in (text.partition("=") for text in wanted) if sign}
    by_name = {head.output: head for head in teacher}
    found = []
    for head in student:
        theirs = told.get(head.output, told.get(head.logits))
        if theirs is not None:
            found.append((head, _named(teacher, theirs, f"the teacher: --output {head.output}={theirs}")))
        elif head.output in by_name:
            found.append((head, by_name[head.output]))
    if len(found) == len(student) or (found and not wanted):
        return found
    theirs_alone = [head for head in teacher if not head.is_state] or list(teacher)
    if not found and len(student) == len(theirs_alone):
        return list(zip(student, theirs_alone, strict=True))
    raise ModelError(
        f"the student's outputs ({', '.join(_outputs(student))}) and the teacher's ({', '.join(_outputs(teacher))}) do "
        "not pair; name them with --output STUDENT=TEACHER"
    )
