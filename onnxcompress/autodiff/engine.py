"""Reverse-mode automatic differentiation of an ONNX graph, as more ONNX graph.

One sweep over the nodes in reverse topological order: a node's output gradients (the sum over all uses of each output)
go through the rule of its operator and become gradients of its inputs. Only nodes on a path from what is wanted (`wrt`)
to what is given (the seeds) are visited. The result is standard operators, run by any ONNX Runtime.

A. Griewank, A. Walther: Evaluating Derivatives, 2nd ed., SIAM 2008, chapter 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import onnx_ir as ir

import onnxcompress.autodiff.rules as _rules  # noqa: F401  fills the table
from onnxcompress.autodiff.builder import Builder, graphs_of
from onnxcompress.autodiff.errors import NoGradient
from onnxcompress.autodiff.prepare import prepare
from onnxcompress.autodiff.rule import RULES, STRAIGHT_THROUGH, ZERO, Context
from onnxcompress.autodiff.tensor import Tensor

FLOATS = {ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}


def gradients(model: ir.Model, seeds: Mapping[str, str | None], wrt: Sequence[str]) -> dict[str, ir.Value]:
    """Append to `model` the gradients of a scalar with respect to the values named in `wrt`.

    `seeds`: value -> the value that holds its own gradient, of the same shape; None for ones (a loss). Values of the
    main graph are named: weights, inputs, intermediates. Names survive, but the model is prepared first (`prepare`):
    functions are inlined, constants leave the bodies of If, Loop and Scan.

    Returns the gradient of each value that any seed depends on, with that value's type and shape.

    Raises:
        NoGradient: an operator on the way has no rule, or not for this form of it.
        ModelError: the model's opset is below 13: convert it first.
    """
    prepare(model, list(seeds), wrt)
    values = named(model.graph)
    b = Builder(model.graph, model.opset_imports[""])
    given: dict[ir.Value, Tensor] = {}
    for name, seed in seeds.items():
        y = b.wrap(values[name])
        given[y.value] = b.wrap(values[seed]) if seed is not None else b.constant(1, y.dtype).expand_like(y)
    forward = list(model.graph)[: len(model.graph) - len(b.nodes)]
    found = backward(b, forward, given, [values[name] for name in wrt])
    b.prune(gradient.value for gradient in found.values())
    return {str(value.name): gradient.value for value, gradient in found.items()}


def backward(
    b: Builder,
    nodes: Sequence[ir.Node],
    seeds: Mapping[ir.Value, Tensor],
    wrt: Sequence[ir.Value],
    refused: list[NoGradient] | None = None,
) -> dict[ir.Value, Tensor]:
    """The sweep: from the gradients of some values, `seeds`, to the gradients of `wrt`, appended through `b`.

    `nodes`: the forward graph, or the body of a control-flow operator, in topological order. `refused`: collects what
    has no gradient, which is passed over, where the caller only wants to know.
    """
    needed = reach(nodes, wrt)
    parts: dict[ir.Value, list[Tensor]] = {value: [b.wrap(seed.value)] for value, seed in seeds.items()}
    for node in reversed(nodes):
        inputs = inputs_of(node)
        if not any(y in parts for y in node.outputs) or not any(x in needed for x in inputs):
            continue
        if not any(y in needed for y in node.outputs):
            continue
        b.scope = f"{node.name or node.outputs[0].name}/grad"
        incoming = [b.sum(parts[y]) if y in parts else None for y in node.outputs]
        parts.update({y: [g] for y, g in zip(node.outputs, incoming, strict=True) if g is not None})
        try:
            found = _apply(b, node, inputs, incoming, needed, wrt)
        except NoGradient as error:
            if refused is None:
                raise
            refused.append(error)
            continue
        for x, gradient in zip(inputs, found, strict=False):
            if gradient is not None and x is not None and x in needed:
                if gradient.shape is None and x.shape is not None:
                    gradient.value.shape = ir.Shape(x.shape)
                parts.setdefault(x, []).append(gradient)
    b.scope = "grad"
    return {value: b.sum(parts[value]) for value in dict.fromkeys(wrt) if value in parts}


def _apply(
    b: Builder,
    node: ir.Node,
    inputs: Sequence[ir.Value | None],
    grads: list[Tensor | None],
    needed: set[ir.Value],
    wrt: Sequence[ir.Value],
) -> Sequence[Tensor | None]:
    """The rule of one node, with the error of a missing one completed by what it cuts off."""
    try:
        rule = RULES.get((node.domain, node.op_type))
        x = [b.wrap(value) if value is not None else None for value in inputs]
        y = [b.wrap(value) for value in node.outputs]
        c = Context(b, node, x, y, grads, [value in needed for value in inputs], backward)  # type: ignore[arg-type]
        if rule is None:
            raise c.refuse("has no gradient rule")
        return rule(c)
    except NoGradient as error:
        graph = node.graph
        cut = [v for v in wrt if graph is not None and _reaches(graph, v, node)]
        raise NoGradient(error.node, error.op_type, error.reason, [str(v.name) for v in cut]) from None


def _reaches(graph: ir.Graph | ir.Function, value: ir.Value, node: ir.Node) -> bool:
    reached = reach(list(graph), [value])
    return any(x in reached for x in inputs_of(node))


def reach(nodes: Iterable[ir.Node], sources: Iterable[ir.Value]) -> set[ir.Value]:
    """The values that depend on `sources` in a way a gradient can follow."""
    reached = set(sources)
    for node in nodes:
        inputs = [x for x in inputs_of(node) if x in reached]
        if (node.domain, node.op_type) in ZERO or not inputs:
            continue
        # Integers are only ever reached straight through QuantizeLinear; then they may be moved about and cast.
        through = (node.domain, node.op_type) in STRAIGHT_THROUGH or not all(is_float(x) for x in inputs)
        reached.update(y for y in node.outputs if through or is_float(y))
    return reached


def is_float(value: ir.Value | None) -> bool:
    """True for float tensors, and where the type is unknown."""
    return value is None or value.dtype is None or value.dtype in FLOATS


def inputs_of(node: ir.Node) -> list[ir.Value | None]:
    """A node's inputs, then the outer values its bodies capture, each once."""
    found: list[ir.Value | None] = list(node.inputs)
    bodies = [body for attribute in node.attributes.values() for body in graphs_of(attribute)]
    captured: dict[ir.Value, None] = {}
    for body in bodies:
        captured.update(dict.fromkeys(captures(body)))
    return found + list(captured)


def captures(body: ir.Graph) -> list[ir.Value]:
    """The values a body uses that are defined outside it."""
    own = {*body.inputs, *body.initializers.values()}
    found: dict[ir.Value, None] = {}
    for node in body:
        found.update(dict.fromkeys(x for x in inputs_of(node) if x is not None and x not in own))
        own.update(node.outputs)
    found.update(dict.fromkeys(y for y in body.outputs if y not in own))
    return list(found)


def named(graph: ir.Graph) -> dict[str, ir.Value]:
    """The values of a graph by name."""
    found = [*graph.inputs, *graph.initializers.values()]
    for node in graph:
        found += node.outputs
    return {str(value.name): value for value in found if value.name}
