"""Rules about QuantizeLinear and DequantizeLinear: types, scales, zero points, axes, blocks, and where they stand."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from onnxcompress.linting.finding import Finding
from onnxcompress.linting.view import LAYERS, ONNX, Site, View, array, bits, dequantizer, element, integer

_TAIL = ("Relu", "Clip")


def scales(view: View) -> Iterator[Finding]:
    """A scale is a positive number on every target, and a constant where an engine is built ahead."""
    for site in view.quantizers():
        scale = array(site.node, 1)
        if scale is None:
            if view.target.strict and not view.static(site.node.inputs[1]):
                yield site.finding(
                    "dynamic-scale",
                    "error",
                    "its scale is computed at run time",
                    "quantize statically: onnxcompress quantize --mode static --calibration DATA",
                )
        elif not (np.isfinite(scale.astype(np.float64)).all() and (scale.astype(np.float64) > 0).all()):
            yield site.finding(
                "bad-scale", "error", "its scale is not a positive number", "quantize the original model again"
            )


def types(view: View) -> Iterator[Finding]:
    """Element types that the target's Q/DQ do not have."""
    taken = view.target.types
    for site in view.quantizers():
        name = element(site.node)
        if taken is None or not name or name in taken or (name == "int32" and _bias(site.node)):
            continue
        best = "symmetric int8" if view.target.activation == "int8" else view.target.activation
        yield site.finding(
            "quantized-type", "error", f"is quantized to {name}, which {view.target.name} does not take",
            f"quantize to {best}: onnxcompress quantize --target {view.target.name}",
        )  # fmt: skip


def zero_points(view: View) -> Iterator[Finding]:
    """Zero points other than 0."""
    if view.target.zero_points:
        return
    for site in view.quantizers():
        zero = site.node.inputs[2] if len(site.node.inputs) > 2 else None
        if zero is None:
            continue
        held = array(site.node, 2)
        if held is None and not view.static(zero):
            message = "its zero point is computed at run time"
        elif held is not None and np.any(held.astype(np.float32) != 0):
            message = "is asymmetric: its zero point is not 0"
        else:
            continue
        mend = f"quantize symmetrically: onnxcompress quantize --target {view.target.name}"
        yield site.finding("zero-point", view.level, message, mend)


def activation_channels(view: View) -> Iterator[Finding]:
    """Activations with a scale a channel."""
    if view.target.channels:
        return
    for site in view.quantizers():
        scale = array(site.node, 1)
        if scale is not None and scale.size > 1 and not view.static(site.node.inputs[0]):
            yield site.finding(
                "activation-channels", view.level, "is an activation with a scale a channel",
                "give activations one scale; only weights may have one a channel",
            )  # fmt: skip


def weight_axes(view: View) -> Iterator[Finding]:
    """Scales of a weight that do not run along its output channels, which no integer kernel can use."""
    axes = dict(view.target.weight_axis)
    for site in view.layers():
        made = dequantizer(site.node.inputs[1])
        scale = array(made, 1) if made is not None else None
        if made is None or scale is None or scale.size == 1 or integer(made, "block_size", 0):
            continue
        rank = _rank(made)
        operator = site.node.op_type
        if operator == "Conv":
            wanted = axes.get(operator, 0)
        elif operator == "ConvTranspose":
            wanted = axes.get(operator, 1)
        else:
            wanted = 0 if operator == "Gemm" and integer(site.node, "transB", 0) else rank - 1
        axis = integer(made, "axis", 1)
        if rank and axis % rank != wanted:
            yield site.finding(
                "weight-axis", view.level, f"its weight has scales along axis {axis % rank}, not {wanted}",
                f"quantize the weight of a {operator} per channel along axis {wanted}",
            )  # fmt: skip


def four_bits(view: View) -> Iterator[Finding]:
    """4-bit weights: their blocks, their axis, and what takes them."""
    blocks = view.target.blocks
    for site in view.quantizers():
        if bits(element(site.node)) != 4 or not blocks:
            continue
        if not view.static(site.node.inputs[0]):
            if element(site.node) == "int4":
                yield site.finding(
                    "int4-activation", view.level, "is an activation in 4 bits; they are for weights alone",
                    "keep this activation in float",
                )  # fmt: skip
            continue
        q = array(site.node, 0)
        block = integer(site.node, "block_size", 0)
        if block and block not in blocks and element(site.node) == "int4":
            sizes = " or ".join(map(str, blocks))
            yield site.finding(
                "int4-block", view.level, f"has blocks of {block}; taken are {sizes}", f"use blocks of {sizes}"
            )
        if q is not None and q.ndim and q.shape[-1] % 2:
            yield site.finding(
                "int4-odd", view.level, f"is 4-bit with an odd last dimension, {q.shape[-1]}",
                "keep this weight in 8 bits",
            )  # fmt: skip
        for node, index in ((use.node, use.idx) for use in site.node.outputs[0].uses()):
            if node.op_type not in ("MatMul", "Gemm") or index != 1:
                yield site.finding(
                    "int4-consumer", view.level, f"is a 4-bit weight of {node.op_type}; only products take those",
                    "keep this weight in 8 bits",
                )  # fmt: skip
            elif block:
                summed = 1 if node.op_type == "Gemm" and integer(node, "transB", 0) else _rank(site.node) - 2
                if integer(site.node, "axis", 1) % max(1, _rank(site.node)) != summed:
                    yield site.finding(
                        "int4-axis", view.level, "has blocks across the axis that is summed over",
                        f"run blocks along axis {summed}",
                    )  # fmt: skip


def biases(view: View) -> Iterator[Finding]:
    """Biases in integers where the target wants floats."""
    if view.target.bias != "float" or not view.target.strict:
        return
    for site in view.quantizers():
        if site.node.op_type == "DequantizeLinear" and _bias(site.node):
            yield site.finding(
                "integer-bias", "error", "is a bias stored as integers", "keep biases in float: dequantize this one"
            )


def integers_between(view: View) -> Iterator[Finding]:
    """Operators that work on the integers between a QuantizeLinear and a DequantizeLinear."""
    if view.target.between:
        return
    for site in view.nodes:
        if site.node.op_type == "DequantizeLinear" or site.node.op_type in view.target.refused:
            continue
        for value in site.node.inputs:
            made = value.producer() if value is not None else None
            if made is not None and made.op_type == "QuantizeLinear" and made.domain in ONNX:
                yield site.finding(
                    "integers-between", view.level, "takes the integers of a QuantizeLinear",
                    "dequantize in front of it and quantize behind",
                )  # fmt: skip
                break


def weight_only(view: View) -> Iterator[Finding]:
    """8-bit weights beside float activations, where integer products need both."""
    if view.target.weight_only:
        return
    for site in view.layers():
        made = dequantizer(site.node.inputs[1])
        if made is None or bits(element(made)) != 8 or not view.static(made.inputs[0]):
            continue
        if dequantizer(site.node.inputs[0]) is None:
            yield site.finding(
                "weight-only", view.level, "has 8-bit weights and a float activation; weights alone only go in 4 bits",
                "quantize its activation, too, or leave the weight in float",
            )  # fmt: skip


def residuals(view: View) -> Iterator[Finding]:
    """Additions of which one side alone is quantized: neither fuses into the layer in front."""
    for site in view.nodes:
        if site.node.op_type not in view.target.joined or site.node.op_type != "Add" or len(site.node.inputs) != 2:
            continue
        sides = [v for v in site.node.inputs if not view.static(v)]
        quantized = [dequantizer(value) is not None for value in sides]
        if len(sides) == 2 and any(quantized) and not all(quantized):
            yield site.finding(
                "residual", "warning", "adds a quantized and a float activation", "quantize the other side, too"
            )
        elif len(sides) == 2 and all(quantized) and view.target.output and not _quantized_behind(site):
            yield site.finding(
                "residual", "warning", "adds quantized activations and stays in float",
                "quantize what comes out of it, or neither side",
            )  # fmt: skip


def _quantized_behind(site: Site) -> bool:
    """True when the output, through a Relu or Clip, goes into a QuantizeLinear."""
    value = site.node.outputs[0]
    while True:
        nodes = [use.node for use in value.uses()]
        if any(node.op_type == "QuantizeLinear" for node in nodes):
            return True
        if len(nodes) != 1 or nodes[0].op_type not in _TAIL:
            return False
        value = nodes[0].outputs[0]


def unfused(view: View) -> Iterator[Finding]:
    """Convolutions between DequantizeLinear that the CPU does not take into integers."""
    target = view.target
    for site in view.layers():
        x, w = dequantizer(site.node.inputs[0]), dequantizer(site.node.inputs[1])
        if x is None or w is None or view.static(x.outputs[0]):
            continue
        if target.output and site.node.op_type == "Conv" and not _quantized_behind(site):
            yield site.finding(
                "unfused", "warning", "is a convolution of quantized inputs whose output stays float: runs in float",
                "quantize its output, too",
            )  # fmt: skip
        if target.activation == "uint8" and element(x) == "int8":
            yield site.finding(
                "signed-activation", "warning", "takes int8 activations, which the CPU runs slower than float",
                "quantize activations to uint8: onnxcompress quantize --target cpu",
            )  # fmt: skip


def _bias(node: ir.Node) -> bool:
    return any(use.node.op_type in LAYERS and use.idx == 2 for use in node.outputs[0].uses())


def _rank(node: ir.Node) -> int:
    q = array(node, 0)
    return 0 if q is None else q.ndim


RULES = (
    scales, types, zero_points, activation_channels, weight_axes, four_bits, biases, integers_between, weight_only,
    residuals, unfused,
)  # fmt: skip
