"""If, Loop and Scan: the sweep goes through their bodies.

A body is copied into the gradient's own If or Scan, where its values are computed again, and the sweep continues in the
copy. A loop is made to keep the states each step started from; its gradient is a Scan over them from the last step to
the first, which carries the gradients of the states and adds up those of everything the body captures from outside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from onnxcompress.autodiff.builder import Builder
from onnxcompress.autodiff.rule import Context, Grads, rule
from onnxcompress.autodiff.tensor import Tensor


@rule("If")
def if_(c: Context) -> Grads:
    """The same choice between the gradients of the branches; zeros for what only the other one uses."""
    wanted = _captured(c)
    branches: dict[str, Any] = {}
    for name in ("then_branch", "else_branch"):
        graph = _copy(c.b, c.node.attributes[name].as_graph())
        inner = c.b.inside(graph)
        found = c.sweep(inner, list(graph), _seeds(inner, graph.outputs, c.grads), [c.x[i].value for i in wanted])
        _return(inner, [_or_zeros(inner, found, c.x[i].value) for i in wanted])
        branches[name] = graph
    result: list[Tensor | None] = [None] * len(c.x)
    for i, t in zip(wanted, c.b.ops("If", c.x[0], outputs=len(wanted), **branches), strict=True):
        t.value.dtype = c.x[i].dtype
        result[i] = t
    return result


@dataclasses.dataclass
class Stack:
    """Something a loop reads or writes one slice of at a step: the value in the body, the whole outside, and how.

    `source`: which of the loop's inputs it is, where the gradients of its slices are that input's gradient.
    """

    inner: ir.Value
    whole: Tensor
    axis: int = 0
    backwards: int = 0
    source: int | None = None


@dataclasses.dataclass
class Body:
    """A copy of a loop's body, to be turned into the body of its gradient.

    `before`, `after`: each state as a step gets it and as it leaves it; their initial values are the loop's inputs from
    `first` on. `read`: what each step reads. `written`: what each step writes, with the gradient of the whole.
    """

    graph: ir.Graph
    before: Sequence[ir.Value]
    after: Sequence[ir.Value]
    first: int
    read: Sequence[Stack]
    written: Sequence[Stack]

    @property
    def floats(self) -> list[int]:
        """The states that have gradients."""
        return [i for i, value in enumerate(self.before) if value.dtype is None or value.dtype.is_floating_point()]


@rule("Scan")
def scan(c: Context) -> Grads:
    """A Scan the other way over the states each step started from."""
    body, node = c.node.attributes["body"].as_graph(), c.node
    sliced = int(c.attr("num_scan_inputs"))
    states = len(node.inputs) - sliced
    results = len(body.outputs) - states
    saved = _save(c, body, body.inputs[:states], ("scan_output_axes", "scan_output_directions"))
    graph = _copy(c.b, body)
    inputs, outputs = list(graph.inputs), list(graph.outputs)
    ways = c.attr("scan_input_directions") or [0] * sliced
    axes = c.attr("scan_input_axes") or [0] * sliced
    out_ways = c.attr("scan_output_directions") or [0] * results
    out_axes = c.attr("scan_output_axes") or [0] * results
    read = [Stack(inputs[i], saved[i]) for i in range(states)]
    for i in range(sliced):
        at = states + i
        read.append(Stack(inputs[at], c.x[at], int(axes[i]), int(ways[i]), at if c.needs[at] else None))
    written = [
        Stack(outputs[states + i], g, int(out_axes[i]), int(out_ways[i]))
        for i in range(results)
        if (g := c.grads[states + i]) is not None
    ]
    backwards = Body(graph, inputs[:states], outputs[:states], 0, read, written)
    return _assigned(c, backwards, _scan_back(c, c.b, backwards, _start(c, backwards)))


@rule("Loop", refuses="a state that changes its shape from step to step, as where it grows by Concat")
def loop(c: Context) -> Grads:
    """A Scan from the last step to the first over the states each step started from; none where no step ran."""
    body, node = c.node.attributes["body"].as_graph(), c.node
    states = len(node.inputs) - 2
    results = len(body.outputs) - 1 - states
    for before, after in zip(body.inputs[2:], body.outputs[1 : 1 + states], strict=True):
        if _reshaped(before, after):
            raise c.refuse(f"its state {before.name!r} changes its shape from step to step")
    saved = _save(c, body, [body.inputs[0], *body.inputs[2:]])
    graph = _copy(c.b, body)
    inputs, outputs = list(graph.inputs), list(graph.outputs)
    inputs[1].replace_all_uses_with(c.b.constant(True).value)  # a step that ran is one whose condition held
    read = [Stack(inner, whole) for inner, whole in zip([inputs[0], *inputs[2:]], saved, strict=True)]
    written = [Stack(outputs[1 + states + i], g) for i in range(results) if (g := c.grads[states + i]) is not None]
    backwards = Body(graph, inputs[2:], outputs[1 : 1 + states], 2, read, written)
    start = _start(c, backwards)
    if _surely_runs(c):
        return _assigned(c, backwards, _scan_back(c, c.b, backwards, start))
    # ONNX Runtime 1.32 refuses a Scan over nothing: the branch without steps hands on what it starts with.
    none, some = (c.b.inside(ir.Graph([], [], nodes=[], name=c.b.name(f"grad/{name}"))) for name in ("none", "some"))
    _return(some, _scan_back(c, some, backwards, start))
    _return(none, start)
    idle = c.b.op("Size", saved[0], shape=()).equals(0)
    branches: dict[str, Any] = {"then_branch": none.graph, "else_branch": some.graph}
    return _assigned(c, backwards, c.b.ops("If", idle, outputs=len(start), **branches))


def _surely_runs(c: Context) -> bool:
    """True when constants say that there is a first step."""
    trips, condition = c.constant(0), c.constant(1)
    return (not c.has(0) or (trips is not None and int(trips.reshape(-1)[0]) > 0)) and (
        not c.has(1) or (condition is not None and bool(condition.reshape(-1)[0]))
    )


def _reshaped(before: ir.Value, after: ir.Value) -> bool:
    """True when a state is known to leave a step with another shape."""
    producer = after.producer()
    if producer is not None and producer.op_type == "Concat" and before in producer.inputs:
        return True
    if before.shape is None or after.shape is None:
        return False
    pairs = zip(before.shape, after.shape, strict=False)
    return len(before.shape) != len(after.shape) or any(
        isinstance(a, int) and isinstance(b, int) and a != b for a, b in pairs
    )


def _save(c: Context, body: ir.Graph, values: Sequence[ir.Value], per_result: Sequence[str] = ()) -> list[Tensor]:
    """Make the loop stack up what these values of its body were at each step."""
    node, first = c.node, len(c.node.outputs)
    node.resize_outputs(first + len(values))
    saved = []
    for value, whole in zip(values, node.outputs[first:], strict=True):
        copy = ir.Node("", "Identity", [value], num_outputs=1)
        copy.outputs[0].name = c.b.name(f"{value.name}/saved")
        copy.outputs[0].type, copy.outputs[0].shape = value.type, value.shape
        body.append(copy)
        body.outputs.append(copy.outputs[0])
        whole.name = c.b.name(f"{node.outputs[0].name}/{value.name}/saved")
        whole.type = value.type
        whole.shape = None if value.shape is None else ir.Shape([None, *value.shape])
        saved.append(c.b.wrap(whole))
    for name in per_result:
        given = c.attr(name)
        if given:
            node.attributes[name] = ir.AttrInt64s(name, [*given, *[0] * len(values)])
    return saved


def _start(c: Context, body: Body) -> list[Tensor]:
    """What the way back starts with: the gradients of the final states, and a sum for each value that is captured."""
    found = []
    for index in body.floats:
        g, x = c.grads[index], c.x[body.first + index]
        found.append(g if g is not None else c.b.zeros(x.sizes(), x.dtype))
    return found + [c.b.zeros(c.x[i].sizes(), c.x[i].dtype) for i in _captured(c)]


def _assigned(c: Context, body: Body, given: Sequence[Tensor]) -> Grads:
    """The results of the way back, each to the input whose gradient it is."""
    sources = [stack.source for stack in body.read if stack.source is not None]
    result: list[Tensor | None] = [None] * len(c.x)
    for index, t in zip([*(body.first + i for i in body.floats), *_captured(c), *sources], given, strict=True):
        result[index] = t if result[index] is None else t + result[index]  # type: ignore[operator]
        t.value.dtype = c.x[index].dtype
    return result


def _scan_back(c: Context, b: Builder, body: Body, start: Sequence[Tensor]) -> list[Tensor]:
    """The Scan from the last step to the first, appended to `b`."""
    results = _turn(c, body)
    sliced = [stack for stack in body.read if stack.source is not None]
    stacks = [*body.read, *body.written]
    return b.ops(
        "Scan",
        *start,
        *(stack.whole for stack in stacks),
        outputs=results,
        body=body.graph,
        num_scan_inputs=len(stacks),
        scan_input_axes=[stack.axis for stack in stacks],
        scan_input_directions=[1 - stack.backwards for stack in stacks],
        scan_output_axes=[stack.axis for stack in sliced] or None,
        scan_output_directions=[1 - stack.backwards for stack in sliced] or None,
    )


def _turn(c: Context, body: Body) -> int:
    """Turn a body into that of its gradient; how many results it has.

    From step to step it carries the gradients of the states, and sums of the gradients of what is captured.
    """
    inner, captured, floats = c.b.inside(body.graph), [c.x[i].value for i in _captured(c)], body.floats
    carried = [_slot(c.b, "grad/state", body.before[i]) for i in floats]
    sums = [_slot(c.b, "grad/sum", value) for value in captured]
    slices = [_slot(c.b, "grad/slice", stack.inner) for stack in body.written]
    given = [*(body.after[i] for i in floats), *(stack.inner for stack in body.written)]
    seeds = _seeds(inner, given, [inner.wrap(v) for v in (*carried, *slices)])
    states = [body.before[i] for i in floats]
    sliced = [stack.inner for stack in body.read if stack.source is not None]
    found = c.sweep(inner, list(body.graph), seeds, [*states, *captured, *sliced])
    results = [_or_zeros(inner, found, value) for value in states]
    for value, total in zip(captured, sums, strict=True):
        part = found.get(value)
        results.append(inner.wrap(total) if part is None else inner.wrap(total) + part)
    results += [_or_zeros(inner, found, value) for value in sliced]
    body.graph.inputs[:] = [*carried, *sums, *(stack.inner for stack in body.read), *slices]
    _return(inner, results)
    return len(results)


def _slot(b: Builder, name: str, like: ir.Value) -> ir.Value:
    return ir.Value(name=b.name(name), type=like.type, shape=like.shape)


def _captured(c: Context) -> list[int]:
    """Which of `c.x` are captured values whose gradient is wanted."""
    return [i for i in range(len(c.node.inputs), len(c.x)) if c.needs[i]]


def _copy(b: Builder, body: ir.Graph) -> ir.Graph:
    """A copy of a body under new names, which computes its values again."""
    graph = body.clone(allow_outer_scope_values=True)
    for value in graph.inputs:
        value.name = b.name(f"{value.name}/copy")
    for node in ir.traversal.RecursiveGraphIterator(graph):
        node.name = b.name(f"{node.name or node.op_type}/copy")
        for output in node.outputs:
            if output.name:
                output.name = b.name(f"{output.name}/copy")
    return graph


def _seeds(inner: Builder, values: Sequence[ir.Value], gs: Sequence[Tensor | None]) -> dict[ir.Value, Tensor]:
    """The gradients of a body's outputs; one that is returned twice has two."""
    parts: dict[ir.Value, list[Tensor]] = {}
    for value, g in zip(values, gs, strict=True):
        if g is not None:
            parts.setdefault(value, []).append(g)
    return {value: inner.sum(found) for value, found in parts.items()}


def _or_zeros(inner: Builder, found: dict[ir.Value, Tensor], value: ir.Value) -> Tensor:
    if value in found:
        return found[value]
    return inner.zeros(inner.wrap(value).sizes(), value.dtype or ir.DataType.FLOAT)


def _return(inner: Builder, results: Sequence[Tensor]) -> None:
    """Make `results` the outputs of a body and remove what they do not need."""
    graph = inner.graph
    graph.outputs[:] = [inner.op("Identity", t, shape=t.shape).value for t in results]
    for node in reversed(list(graph)):
        if not any(y.uses() or y.is_graph_output() for y in node.outputs):
            graph.remove(node, safe=True)
