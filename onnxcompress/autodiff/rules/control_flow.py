"""If, Loop and Scan: the sweep goes through their bodies.

A body is copied into the gradient's own If or Scan, where its values are computed again, and the sweep continues in the
copy. A loop is made to keep the states each step started from; its gradient is a Scan over them from the last step to
the first, which carries the gradients of the states and adds up those of everything the body captures from outside.
States must keep their shape from step to step.
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
        graph = _again(c.b, c.node.attributes[name].as_graph())
        inner = c.b.inside(graph)
        found = c.sweep(inner, list(graph), _seeds(inner, graph.outputs, c.gs), [c.x[i].value for i in wanted])
        _give(inner, [_or_zeros(inner, found, c.x[i].value) for i in wanted])
        branches[name] = graph
    result: list[Tensor | None] = [None] * len(c.x)
    for i, t in zip(wanted, c.b.ops("If", c.x[0], outputs=len(wanted), **branches), strict=True):
        t.value.dtype = c.x[i].dtype
        result[i] = t
    return result


@dataclasses.dataclass
class Stack:
    """Something a loop reads or writes one slice of at a step: the value in the body, the whole outside, and how."""

    inner: ir.Value
    whole: Tensor
    axis: int = 0
    backwards: int = 0


@rule("Scan")
def scan(c: Context) -> Grads:
    """A Scan the other way over the states each step started from."""
    body, node = c.node.attributes["body"].as_graph(), c.node
    sliced = int(c.attr("num_scan_inputs"))
    states = len(node.inputs) - sliced
    results = len(body.outputs) - states
    saved = _save(c, body, body.inputs[:states], ("scan_output_axes", "scan_output_directions"))
    graph = _again(c.b, body)
    inputs, outputs = list(graph.inputs), list(graph.outputs)
    ways = c.attr("scan_input_directions") or [0] * sliced
    axes = c.attr("scan_input_axes") or [0] * sliced
    out_ways = c.attr("scan_output_directions") or [0] * results
    out_axes = c.attr("scan_output_axes") or [0] * results
    read = [Stack(inputs[i], saved[i]) for i in range(states)]
    read += [Stack(inputs[states + i], c.x[states + i], int(axes[i]), int(ways[i])) for i in range(sliced)]
    written = [
        Stack(outputs[states + i], g, int(out_axes[i]), int(out_ways[i]))
        for i in range(results)
        if (g := c.gs[states + i]) is not None
    ]
    sources: list[int | None] = [None] * states + list(range(states, states + sliced))
    return _backwards(c, graph, inputs[:states], outputs[:states], 0, read, sources, written)


@rule("Loop")
def loop(c: Context) -> Grads:
    """A Scan from the last step to the first over the states each step started from."""
    body, node = c.node.attributes["body"].as_graph(), c.node
    states = len(node.inputs) - 2
    results = len(body.outputs) - 1 - states
    keep = [body.inputs[0], *body.inputs[2:]]
    saved = _save(c, body, keep)
    graph = _again(c.b, body)
    inputs, outputs = list(graph.inputs), list(graph.outputs)
    inputs[1].replace_all_uses_with(c.b.constant(True).value)  # a step that ran is one whose condition held
    read = [Stack(inner, whole) for inner, whole in zip([inputs[0], *inputs[2:]], saved, strict=True)]
    written = [Stack(outputs[1 + states + i], g) for i in range(results) if (g := c.gs[states + i]) is not None]
    return _backwards(c, graph, inputs[2:], outputs[1 : 1 + states], 2, read, [None] * len(read), written)


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


def _backwards(
    c: Context,
    graph: ir.Graph,
    states_in: Sequence[ir.Value],
    states_out: Sequence[ir.Value],
    first: int,
    read: Sequence[Stack],
    sources: Sequence[int | None],
    written: Sequence[Stack],
) -> Grads:
    """The Scan from the last step to the first.

    `graph`: a copy of the body. `states_in`, `states_out`: its states, whose initial values are the node's inputs from
    `first` on. `read`: what each step reads again; `sources`: which of the node's inputs that is, if any. `written`:
    what each step wrote, with the gradient of the whole.
    """
    b = c.b
    inner = b.inside(graph)
    captured = _captured(c)
    floats = [i for i, value in enumerate(states_in) if value.dtype is None or value.dtype.is_floating_point()]
    # Carried from step to step: gradients of the states, and sums of the gradients of what is captured.
    carried = [ir.Value(name=b.name("grad/state"), type=states_in[i].type, shape=states_in[i].shape) for i in floats]
    sums = [ir.Value(name=b.name("grad/sum"), type=c.x[i].value.type, shape=c.x[i].value.shape) for i in captured]
    gradients = [ir.Value(name=b.name("grad/slice"), type=s.inner.type, shape=s.inner.shape) for s in written]
    seeds = _seeds(
        inner,
        [*(states_out[i] for i in floats), *(s.inner for s in written)],
        [inner.wrap(v) for v in (*carried, *gradients)],
    )
    to_slices = [(s, i) for s, i in zip(read, sources, strict=True) if i is not None and c.needs[i]]
    wrt = [*(states_in[i] for i in floats), *(c.x[i].value for i in captured), *(s.inner for s, _ in to_slices)]
    found = c.sweep(inner, list(graph), seeds, wrt)
    results = [_or_zeros(inner, found, states_in[i]) for i in floats]
    for i, total in zip(captured, sums, strict=True):
        part = found.get(c.x[i].value)
        results.append(inner.wrap(total) if part is None else inner.wrap(total) + part)
    results += [_or_zeros(inner, found, s.inner) for s, _ in to_slices]
    graph.inputs[:] = [*carried, *sums, *(s.inner for s in read), *gradients]
    _give(inner, results)

    def initial(index: int) -> Tensor:
        g = c.gs[index]
        return g if g is not None else b.zeros(c.x[first + index].sizes(), c.x[first + index].dtype)

    start = [initial(i) for i in floats] + [b.zeros(c.x[i].sizes(), c.x[i].dtype) for i in captured]
    stacks = [*read, *written]
    given = b.ops(
        "Scan",
        *start,
        *(s.whole for s in stacks),
        outputs=len(results),
        body=graph,
        num_scan_inputs=len(stacks),
        scan_input_axes=[s.axis for s in stacks],
        scan_input_directions=[1 - s.backwards for s in stacks],
        scan_output_axes=[s.axis for s, _ in to_slices] or None,
        scan_output_directions=[1 - s.backwards for s, _ in to_slices] or None,
    )
    result: list[Tensor | None] = [None] * len(c.x)
    for index, t in zip([*(first + i for i in floats), *captured, *(i for _, i in to_slices)], given, strict=True):
        result[index] = t if result[index] is None else t + result[index]  # type: ignore[operator]
        t.value.dtype = c.x[index].dtype
    return result


def _captured(c: Context) -> list[int]:
    """Which of `c.x` are captured values whose gradient is wanted."""
    return [i for i in range(len(c.node.inputs), len(c.x)) if c.needs[i]]


def _again(b: Builder, body: ir.Graph) -> ir.Graph:
    """A copy of a body under new names, which computes its values again."""
    graph = body.clone(allow_outer_scope_values=True)
    for value in graph.inputs:
        value.name = b.name(f"{value.name}/again")
    for node in ir.traversal.RecursiveGraphIterator(graph):
        node.name = b.name(f"{node.name or node.op_type}/again")
        for output in node.outputs:
            if output.name:
                output.name = b.name(f"{output.name}/again")
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


def _give(inner: Builder, results: Sequence[Tensor]) -> None:
    """Make `results` the outputs of a body and remove what they do not need."""
    graph = inner.graph
    graph.outputs[:] = [inner.op("Identity", t, shape=t.shape).value for t in results]
    for node in reversed(list(graph)):
        if not any(y.uses() or y.is_graph_output() for y in node.outputs):
            graph.remove(node, safe=True)
