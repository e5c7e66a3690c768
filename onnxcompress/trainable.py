"""What of a model a training would reach: found by differentiating it, without data and without a step."""

from __future__ import annotations

import dataclasses
from typing import Any

import onnx_ir as ir

from onnxcompress.autodiff.coverage import coverage
from onnxcompress.autodiff.engine import named
from onnxcompress.autodiff.prepare import LEAST_OPSET
from onnxcompress.data.sizes import candidate_sizes
from onnxcompress.data.synthetic import synthetic_feeds
from onnxcompress.errors import DataError, ModelError, OnnxCompressError
from onnxcompress.model.weights import weights
from onnxcompress.training import heads, integers, parameters, step

NO_EFFECT = "has no effect on an output that can be learned"
SCALE = "the scale of integers, which training keeps unless it is told to learn scales"


@dataclasses.dataclass(frozen=True)
class Blocked:
    """A node whose operator has no gradient, and the weights it cuts off."""

    node: str
    operator: str
    reason: str
    weights: list[str]


@dataclasses.dataclass(frozen=True)
class Trainable:
    """What `distill` and `train` would do with each weight.

    `trained`: keys of those they train, with their parts (`w`, `codebook`, ...) and how many numbers these hold.
    `left`: the others and why. `blocked`: operators without a gradient; as long as one cuts off a selected weight,
    training refuses the model. `outputs`: output -> the value that is learned in its place.
    """

    trained: dict[str, dict[str, int]]
    left: dict[str, str]
    blocked: list[Blocked]
    outputs: dict[str, str]

    @property
    def cut_off(self) -> list[str]:
        """The weights that must be left out (`--exclude`) for the rest to train."""
        return list(dict.fromkeys(key for entry in self.blocked for key in entry.weights))


def trainable(model: ir.Model) -> Trainable:
    """Look which weights of `model` a training of all its outputs would train. `model` stays as it is.

    Raises:
        ModelError: its graph cannot be followed.
    """
    keys = [weight.key for weight in weights(model)]
    found = heads.chosen(heads.heads(model), (), "the model") if heads.heads(model) else []
    outputs = {head.output: head.logits for head in found}
    if not found:
        why = "no output can be learned: none is a float tensor, or has logits behind it"
        return Trainable({}, dict.fromkeys(keys, why), [], {})
    try:
        copy = _forward(model)
    except OnnxCompressError as error:
        return Trainable({}, dict.fromkeys(keys, str(error)), [], outputs)
    scales = {weight.key for weight in weights(copy) if integers.is_fixed(weight)}
    exposed = parameters.expose(copy)
    graph = copy.graph
    graph.inputs.extend([*(p.value for p in exposed.parameters), *(value for value, _ in exposed.buffers)])
    graph.outputs.clear()
    known = named(graph)
    graph.outputs.extend(dict.fromkeys(known[logits] for logits in outputs.values()))
    key_of = {str(p.value.name): p.key for p in exposed.parameters}
    seen = coverage(copy, list(key_of))
    blocked = [
        Blocked(error.node, error.op_type, error.reason, list(dict.fromkeys(key_of[name] for name in error.cut_off)))
        for error in seen.blocked
    ]
    trained: dict[str, dict[str, int]] = {}
    for p in exposed.parameters:
        if p.value.name in seen.reached:
            trained.setdefault(p.key, {})[p.part] = int(p.initial.size)
    cut = {key for entry in blocked for key in entry.weights}
    others = exposed.left | dict.fromkeys(scales, SCALE)
    left = {key: others.get(key, NO_EFFECT) for key in keys if key not in trained and key not in cut}
    return Trainable(trained, left, blocked, outputs)


def _forward(model: ir.Model) -> ir.Model:
    """A copy as training has it; a lift to a newer opset is tried on made-up inputs of one size after another.

    Raises:
        OnnxCompressError: it cannot be lifted.
    """
    if model.opset_imports.get("", 1) >= LEAST_OPSET:
        return step.forward(model, [])
    refused: Exception | None = None
    for sizes in candidate_sizes(model):
        try:
            feeds: list[Any] = [batch.feeds for batch in synthetic_feeds(model, seed=0, samples=1, sizes=sizes)]
            return step.forward(model, feeds)
        except (DataError, ModelError) as error:
            refused = refused or error
    raise DataError(f"made-up inputs do not fit this model, so that it cannot be lifted: {refused}")
