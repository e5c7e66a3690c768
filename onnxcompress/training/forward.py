"""The forward pass of a training: a copy of the model in which every weight can be reached."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import onnx_ir as ir

from onnxcompress import lift as opsets
from onnxcompress.autodiff.prepare import LEAST_OPSET
from onnxcompress.errors import PassError
from onnxcompress.model import bridge
from onnxcompress.training import integers
from onnxcompress.training.hoist import hoist
from onnxcompress.training.ties import untie
from onnxcompress.training.wide import widen

LIFTED = 17


def forward(model: ir.Model, feeder: Iterable[Any]) -> ir.Model:
    """A copy of `model` that can be trained: opset 13 or later, BatchNormalization by its running statistics.

    Integer operators are float operators of dequantized operands (`integers.lift`).
    Vectors an exporter merged are weights of their own (`ties.untie`), weights of functions lie in the main graph
    (`hoist.hoist`), and half precision is computed in single (`wide.widen`).

    Raises:
        PassError: the opset is too old and cannot be lifted.
    """
    copy = bridge.clone(model)
    opset = copy.opset_imports.get("", 1)
    if opset < LEAST_OPSET:
        why = opsets.lift(copy, LIFTED, feeder)
        if why:
            raise PassError(f"training needs opset {LEAST_OPSET}, the model has {opset}, and {why}")
    for value in [v for v in copy.graph.inputs if v.is_initializer()]:
        copy.graph.inputs.remove(value)  # a default that a caller may replace is trained like any other weight
    if integers.least_opset(copy) > copy.opset_imports[""]:
        opsets.lift(copy, integers.least_opset(copy), feeder)  # where it fails, these weights are not trained
    integers.lift(copy)
    hoist(copy)
    untie(copy)
    widen(copy)
    for node in ir.traversal.RecursiveGraphIterator(copy.graph):
        if node.op_type == "BatchNormalization" and node.attributes.get_int("training_mode"):
            node.attributes.add(ir.AttrInt64("training_mode", 0))
            node.resize_outputs(1)
    return copy
