"""Where in a training step numbers end: the first tensor of its forward pass that is not finite."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import onnx_ir as ir

from onnxcompress.autodiff.engine import named
from onnxcompress.model.taps import tap
from onnxcompress.runtime.session import open_session
from onnxcompress.training.step import LOSS, TrainingGraph


def first_not_finite(graph: TrainingGraph, feeds: Mapping[str, np.ndarray]) -> str:
    """The tensor at which the loss was lost, in words; nothing where the loss is finite.

    Of all that made the loss nan or infinite it is the first that is so while what it is computed from is finite. Where
    every infinity comes from a constant, as in masks of attention, it is the first that is nan.
    `feeds`: all inputs of one call (`Runner.inputs`), which is computed once more with every tensor as an output.
    """
    for leaf in graph.leaves:
        if not np.isfinite(feeds[leaf.name]).all():
            return f"the weight {leaf.key!r}"
    found = _computed(graph.model, feeds)
    nodes = _lost(graph.model, found)
    sources = [node for node in nodes if not any(_is_bad(value, found) for value in node.inputs)]
    for node in sources or [node for node in nodes if not any(_has_nan(value, found) for value in node.inputs)]:
        value = next(value for value in node.outputs if _is_bad(value, found))
        return f"tensor {value.name!r} ({node.op_type} {node.name!r})"
    return ""


def _computed(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every tensor of the main graph on the way to the loss, and what it is fed with."""
    nodes = _upstream(model, lambda value: True)
    tapped = tap(model, [value.name for node in nodes for value in node.outputs if value.name])
    with open_session(tapped.model, threads=1) as session:
        known = {port.name for port in session.inputs}
        given = {name: array for name, array in feeds.items() if name in known}
        outputs = session.run(given, list(tapped.outputs.values()))
    return given | {name: outputs[output] for name, output in tapped.outputs.items()}


def _lost(model: ir.Model, found: Mapping[str, np.ndarray]) -> list[ir.Node]:
    """The nodes through which the loss came to be no number."""
    return _upstream(model, lambda value: _is_bad(value, found))


def _upstream(model: ir.Model, follow: Callable[[ir.Value], bool]) -> list[ir.Node]:
    """The nodes of the main graph that make the loss, in their order, along the values that `follow` takes."""
    seen: set[ir.Node] = set()
    waiting = [named(model.graph)[LOSS]]
    while waiting:
        value = waiting.pop()
        node = value.producer()
        if node is not None and node not in seen and follow(value):
            seen.add(node)
            waiting += _read(node)
    return [node for node in model.graph if node in seen]


def _read(node: ir.Node) -> Iterable[ir.Value]:
    """What a node reads, in its subgraphs too."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            for inner in attribute.as_graph():
                yield from _read(inner)


def _array(value: ir.Value | None, found: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """The values of a float tensor."""
    if value is None:
        return None
    array = found.get(value.name or "")
    if array is None and value.const_value is not None:
        array = value.const_value.numpy()
    return array if array is not None and array.dtype.kind == "f" else None


def _is_bad(value: ir.Value | None, found: Mapping[str, np.ndarray]) -> bool:
    array = _array(value, found)
    return array is not None and not np.isfinite(array).all()


def _has_nan(value: ir.Value | None, found: Mapping[str, np.ndarray]) -> bool:
    array = _array(value, found)
    return array is not None and bool(np.isnan(array).any())
