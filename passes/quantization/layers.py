"""Convolutions and products that static quantization can compute in integers."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from onnxcompress.encodings import recognize
from onnxcompress.encodings.affine import Affine
from onnxcompress.model.weights import Weight
from onnxcompress.passes.quantization.integers import conv_orders, per_channel
from onnxcompress.passes.quantization.job import Job
from onnxcompress.passes.quantization.rewrite import as_seen, integer, plain_gemm
from onnxcompress.passes.quantization.weight_only import error_of

ACTIVATIONS = {"Relu", "Clip"}


@dataclasses.dataclass
class Layer:
    """One operator with a constant weight. `encoding`: its integers, as the operator takes them; `error`: theirs."""

    weight: Weight
    node: ir.Node
    owner: ir.Graph
    encoding: Affine
    error: float

    @property
    def x(self) -> ir.Value:
        """The activation it takes."""
        value = self.node.inputs[0]
        assert value is not None
        return value

    @property
    def y(self) -> ir.Value:
        """What comes out behind an activation function that integers can absorb."""
        return tail(self.node.outputs[0])

    @property
    def bias(self) -> ir.Value | None:
        """Its bias input, where the operator has one."""
        return self.node.inputs[2] if len(self.node.inputs) > 2 else None


def tail(value: ir.Value) -> ir.Value:
    """`value`, or the output of the Relu or Clip that alone consumes it."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return value
    node = uses[0].node
    if node.op_type not in ACTIVATIONS or node.domain or uses[0].idx != 0 or node.graph is not _graph(value):
        return value
    if any(bound is not None and recognize.constant(bound) is None for bound in node.inputs[1:]):
        return value
    return node.outputs[0]


def _graph(value: ir.Value) -> ir.Graph | ir.Function | None:
    node = value.producer()
    return node.graph if node is not None else value.graph


def layers(weight: Weight, job: Job) -> list[Layer] | str:
    """One layer for each consumer of `weight`, or why some consumer cannot take integers."""
    if not isinstance(weight.owner, ir.Graph):
        return "it is in a function"
    array = weight.array()
    found: np.ndarray | None = None
    for use in weight.uses:
        node = use.node
        seen = as_seen(use, array) if use.index == 1 else None
        if seen is None or node.domain or node.op_type not in job.target.layers:
            return f"{use.op_type} takes no int8 weight, or sees it through a reshape"
        if seen.dtype != np.float32 or not isinstance(node.graph, ir.Graph) or node.inputs[0] is None:
            return "a consumer sees no float32 weight"
        if recognize.constant(node.inputs[0]) is not None:
            return "a consumer takes no activation"
        if node.op_type == "MatMul" and (seen.ndim != 2 or _rank(node.inputs[0]) == 1):
            return "a product of vectors or stacks of matrices"
        if node.op_type == "Gemm" and not plain_gemm(node):
            return "a Gemm that scales or turns its operands"
        if found is not None and found.shape + found.strides != seen.shape + seen.strides:
            return "its consumers see it in different orders"
        found = seen
    kinds = {(use.node.op_type, integer(use.node, "transB", 0)) for use in weight.uses}
    if found is None or len(kinds) != 1:
        return "its consumers differ"
    operator, turned = kinds.pop()
    encoding = dataclasses.replace(encode(found, operator, bool(turned), job), masked=job.is_pruned(weight))
    if encoding.nbytes >= weight.nbytes:
        return "too small to gain by integers"
    error = error_of(found, encoding)
    if error > job.max_error:
        return f"relative error {error:.3f} > {job.max_error} in integers that cannot saturate"
    owners = [use.node.graph for use in weight.uses]
    return [
        Layer(weight, use.node, owner, encoding, error)
        for use, owner in zip(weight.uses, owners, strict=True)
        if isinstance(owner, ir.Graph)
    ]


def encode(array: np.ndarray, operator: str, turned: bool, job: Job) -> Affine:
    """`array` as Conv, MatMul or Gemm takes it, with a scale an output channel."""
    axis = 0 if operator == "Conv" or turned else 1
    orders = conv_orders(array) if operator == "Conv" else [array if turned else array.T]
    quantized = per_channel(array, axis if job.per_channel else None, job.weights, orders)
    # ONNX Runtime 1.32 makes a QGemm only of weights whose zero point is written out.
    zero = quantized.zero_point if operator == "Gemm" else None
    return Affine(quantized.q, quantized.scale, zero, axis if job.per_channel else None, out=np.dtype(np.float32))


def _rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)
