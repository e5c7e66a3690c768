"""Writes QuantizeLinear and DequantizeLinear pairs, and the weights between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxcompress.calibration.statistic import MinMax
from onnxcompress.encodings import recognize
from onnxcompress.encodings.affine import Affine
from onnxcompress.model.weights import Weight
from onnxcompress.numerics.affine import choose_scale, quantize
from onnxcompress.numerics.error import relative_rms
from onnxcompress.passes.quantization.job import Job
from onnxcompress.passes.quantization.layers import Layer
from onnxcompress.passes.quantization.placement import Point
from onnxcompress.passes.quantization.rewrite import after, drop
from onnxcompress.targets import Target

LAYER_BYTES = 100  # DequantizeLinear of a weight and the headers of its constants, beside the names
POINT_BYTES = 260  # a Q/DQ pair and its constants, beside the names


@dataclasses.dataclass(frozen=True)
class Scale:
    """Scale (float32) and zero point of one activation."""

    scale: np.ndarray
    zero_point: np.ndarray


def activation_scale(seen: MinMax, target: Target) -> Scale:
    """What covers the range seen and 0, in the type the target takes."""
    scale, zero = choose_scale(seen.least, seen.most, dtype=target.activation, symmetric=target.symmetric)
    return Scale(np.asarray(scale), np.asarray(zero))


def resolve(points: Mapping[int, Point], scales: Mapping[int, Scale]) -> dict[int, Scale]:
    """The scale of each point, those that share one included."""
    found = {}
    for key, point in points.items():
        root = point
        while root.like is not None and id(root.like) in points:
            root = points[id(root.like)]
        if id(root.value) in scales:
            found[key] = scales[id(root.value)]
    return found


def saves(found: Sequence[Layer], points: Mapping[int, Point]) -> bool:
    """True when integer layers with Q/DQ at `points` make the file smaller than what they replace."""
    gain = 0
    for layer in {id(layer.weight): layer for layer in found}.values():
        gain += layer.weight.nbytes - layer.encoding.nbytes - LAYER_BYTES - 4 * len(layer.weight.value.name or "")
    return gain > sum(POINT_BYTES + 10 * len(point.value.name or "") for point in points.values())


def write_points(points: Mapping[int, Point], scales: Mapping[int, Scale], job: Job) -> None:
    """Put Q/DQ behind each point and let its readers read the dequantized value."""
    for key, point in points.items():
        _write_point(point, scales[key], job)
    job.count("activations quantized", len(points))


def _write_point(point: Point, scale: Scale, job: Job) -> None:
    value, owner = point.value, point.owner
    tape, name = job.tape(owner), value.name or ""
    uses = [(use.node, use.idx) for use in value.uses()] if point.everyone else list(dict.fromkeys(point.readers))
    constants: list[ir.Value | None] = [
        tape.constant(scale.scale, f"{name}.activation_scale"),
        tape.constant(scale.zero_point, f"{name}.activation_zero_point"),
    ]
    q = tape.op("QuantizeLinear", [value, *constants], f"{name}.quantized")
    dq = tape.op("DequantizeLinear", [q, *constants], f"{name}.dequantized")
    anchor = after(value, owner)
    tape.place(anchor)
    if anchor is None:
        _move_to_end(owner, [q, dq])
    for node, index in uses:
        node.replace_input_with(index, dq)
    if point.everyone and value.is_graph_output():
        value.name = f"{name}.float"
        dq.name, dq.shape, dq.type = name, value.shape, value.type
        for index, output in enumerate(owner.outputs):
            if output is value:
                owner.outputs[index] = dq


def _move_to_end(owner: ir.Graph, made: Sequence[ir.Value]) -> None:
    for value in made:
        node = value.producer()
        assert node is not None
        owner.remove(node)
        owner.append(node)


def write_weights(found: Sequence[Layer], job: Job) -> None:
    """Store the layers' weights as integers with a DequantizeLinear of their own."""
    for layer in {id(layer.weight): layer for layer in found}.values():
        weight, before = layer.weight, layer.weight.nbytes
        job.note_overridable(weight)
        uses = weight.uses
        weight.replace(layer.encoding)
        for use in uses:
            old = use.node.inputs[1]
            if old is not weight.value:
                use.node.replace_input_with(1, weight.value)
                drop(old)
        job.touched(
            weight, before, layer.encoding.nbytes, layer.error, f"int8 {layer.node.op_type}, {job.weights} range"
        )
        job.count("static integer layers", len(uses))


def write_biases(
    found: Sequence[Layer],
    points: Mapping[int, Point],
    scales: Mapping[int, Scale],
    biases: Mapping[int, Weight],
    job: Job,
) -> set[str]:
    """Make biases what the target fuses; the keys of those re-encoded.

    ONNX Runtime 1.32 quantizes the float bias of a layer with a quantized output itself; a Gemm with a float output
    needs it as int32 with scale x_scale * w_scale. A bias that a caller could replace is fixed first.
    """
    done = set()
    for layer in found:
        bias = layer.bias
        if bias is None:
            continue
        if bias.is_graph_input() and bias.is_initializer() and isinstance(bias.graph, ir.Graph):
            bias.graph.inputs.remove(bias)
        weight = biases.get(id(bias))
        floats = job.target.bias == "float" or layer.node.op_type != "Gemm" or id(layer.y) in points
        if floats or weight is None or len(weight.uses) != 1 or weight.encoding.kind not in ("dense", "masked"):
            continue
        array = weight.array()
        if array.dtype != np.float32 or array.shape != (layer.encoding.scale.size,) or recognize.constant(bias) is None:
            continue
        scale = (scales[id(layer.x)].scale.astype(np.float64) * layer.encoding.scale).astype(np.float32)
        zero = np.zeros(scale.shape, np.int32)
        encoding = Affine(quantize(array, scale, zero, "int32", axis=0), scale, zero, 0)
        before = weight.nbytes
        weight.replace(encoding)
        error = relative_rms(array, encoding.decode())
        job.touched(weight, before, encoding.nbytes, error, "int32 bias of an integer Gemm")
        done.add(weight.key)
    return done
