"""Rules about integer weights: sums that saturate, forms that are slow or less exact than they look."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from onnxcompress.linting.finding import Finding, Level
from onnxcompress.linting.view import Site, View, array, bits, dequantizer, element, integer
from onnxcompress.numerics.affine import PairSums, pair_sum_bound


def saturation(view: View) -> Iterator[Finding]:
    """u8 x s8 products that x86 without VNNI adds in 16 bits, two at a time, silently cut off."""
    if view.target.weights == "full":
        return
    level: Level = "error" if view.target.weights == "reduced" else "warning"
    for site, q, orders in _products(view):
        if q.dtype != np.int8:
            continue
        neighbours = view.target.weights == "neighbours"
        worst = max((pair_sum_bound(order, axis=1, neighbours=neighbours) for order in orders), key=_reach)
        if worst.saturates:
            yield site.finding(
                "saturation", level,
                f"uint8 activations times these int8 weights reach {_reach(worst):,} in 16 bits, which hold 32,767: "
                + (
                    "a CPU without VNNI gives other results"
                    if neighbours or any(pair_sum_bound(order, axis=1).saturates for order in orders)
                    else "neighbours fit, which ONNX Runtime adds; a kernel that adds others gives other results"
                ),
                f"keep weights within 64: onnxcompress quantize --target {view.target.name}, or overflow: reduced",
            )  # fmt: skip


def _reach(bound: PairSums) -> int:
    return max(bound.highest, -bound.lowest)


def _products(view: View) -> Iterator[tuple[Site, np.ndarray, list[np.ndarray]]]:
    """Layers that multiply unsigned activations by constant integers: node, integers, and these as [outputs, K]."""
    for site in view.nodes:
        node, op = site.node, site.node.op_type
        q: np.ndarray | None = None
        if op in ("Conv", "MatMul", "Gemm"):
            x, w = dequantizer(node.inputs[0]), dequantizer(node.inputs[1])
            if x is not None and w is not None and element(x) == "uint8" and not view.static(x.outputs[0]):
                q = array(w, 0)
        elif op in ("MatMulInteger", "ConvInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"):
            q = array(node, 1)
        elif op in ("QLinearConv", "QLinearMatMul", "QGemm"):
            q = array(node, 3)
        if q is None or q.ndim < 2 or q.dtype not in (np.int8, np.uint8) or not q.size:
            continue
        if "Conv" in op:
            rows = q.reshape(q.shape[0], q.shape[1], -1)
            yield site, q, [rows.reshape(len(rows), -1), rows.transpose(0, 2, 1).reshape(len(rows), -1)]
        else:
            turned = "Gemm" in op and bool(integer(node, "transB", 0))
            matrix = q.reshape(-1, *q.shape[-2:])
            yield site, q, [part if turned else part.T for part in matrix]


def blocks(view: View) -> Iterator[Finding]:
    """Blocked weights on the CPU: those of 4 bits meet activations in 8 bits, those across K are never fused."""
    if view.target.activation != "uint8":
        return
    for site in view.quantizers():
        if site.node.op_type != "DequantizeLinear" or not integer(site.node, "block_size", 0):
            continue
        for use in site.node.outputs[0].uses():
            if use.node.op_type != "MatMul" or use.idx != 1:
                continue
            q = array(site.node, 0)
            if q is None or integer(site.node, "axis", 1) % max(1, q.ndim) != q.ndim - 2:
                yield site.finding(
                    "block-axis", "warning", "has blocks along another axis than K: never fused, 4 to 6 times slower "
                    "than float", f"run blocks along axis {0 if q is None else q.ndim - 2}",
                )  # fmt: skip
            elif bits(element(site.node)) == 4:
                yield site.finding(
                    "block-accuracy", "warning", "becomes a MatMulNBits with int8 activations (error 4e-3)",
                    "set session.qdq_matmulnbits_accuracy_level=0 where that is too much",
                )  # fmt: skip


def n_bits(view: View) -> Iterator[Finding]:
    """MatMulNBits of 2 or 8 bits at accuracy level 0, which has no fast kernel on the CPU."""
    if view.target.activation != "uint8":
        return
    for site in view.nodes:
        if site.node.op_type == "MatMulNBits" and site.node.domain == "com.microsoft":
            width = integer(site.node, "bits", 4)
            if width in (2, 8) and integer(site.node, "accuracy_level", 0) == 0:
                yield site.finding(
                    "accuracy-level", "warning", f"is {width}-bit at accuracy level 0: 30 times slower than float",
                    "set accuracy_level=4",
                )  # fmt: skip


def tables(view: View) -> Iterator[Finding]:
    """Embedding tables that are dequantized whole at every call."""
    if not view.target.integer_rows:
        return
    for site in view.quantizers():
        if site.node.op_type != "DequantizeLinear" or array(site.node, 0) is None:
            continue
        for use in site.node.outputs[0].uses():
            if use.node.op_type == "Gather" and use.idx == 0 and not view.static(use.node.inputs[1]):
                yield site.finding(
                    "table", "warning", "is a table dequantized whole at every call, for the few rows looked up",
                    "look up the int8 rows and dequantize those: onnxcompress quantize does",
                )  # fmt: skip


def stored(view: View) -> Iterator[Finding]:
    """Constants of types the target does not hold."""
    if "uint8 initializer" not in view.target.refused:
        return
    for site in view.folded:
        if site.node.op_type == "DequantizeLinear":
            continue
        if any((held := array(site.node, i)) is not None and held.dtype.kind in "iu" and held.dtype.itemsize == 1
               for i in range(len(site.node.inputs))):  # fmt: skip
            yield site.finding(
                "folded", "warning", "expands a weight from integers that TensorRT's own parser does not take",
                "run it through ONNX Runtime, which expands it at load, or leave this weight in float",
            )  # fmt: skip
    for site in view.nodes:
        for index, value in enumerate(site.node.inputs):
            held = array(site.node, index)
            if held is None or value is None or site.node.op_type in ("DequantizeLinear", "QuantizeLinear"):
                continue
            if held.dtype == np.uint8 or (held.dtype == np.int8 and site.node.op_type not in view.target.refused):
                yield site.finding(
                    "integer-constant", view.level, f"takes the {held.dtype} constant {value.name!r}",
                    "put a DequantizeLinear behind the constant",
                )  # fmt: skip
            elif held.dtype == np.int64 and held.size and np.abs(held.clip(-(2**62), 2**62)).max() > 2**31 - 1:
                if site.node.op_type in ("Slice", "Clip"):
                    continue  # there the ends stand for "all", and clamped they still do
                yield site.finding(
                    "int64", "warning", f"takes the int64 constant {value.name!r} beyond 32 bits, which TensorRT "
                    "before 10 cuts off", "store it within 32 bits",
                )  # fmt: skip
            elif held.dtype == np.float64:
                yield site.finding(
                    "double", "warning", f"takes the float64 constant {value.name!r}, which is cut to float32",
                    "export the model in float32",
                )  # fmt: skip


def half(view: View) -> Iterator[Finding]:
    """bfloat16, for which the CPU has no kernels."""
    if view.target.activation != "uint8":
        return
    for site in view.nodes:
        made = [value for value in site.node.outputs if value.dtype == ir.DataType.BFLOAT16]
        if made and site.node.op_type not in ("Cast", "DequantizeLinear", "Identity", "Constant"):
            yield site.finding(
                "bfloat16", "error", "computes in bfloat16, which does not run on the CPU", "use float32 or float16"
            )


RULES = (saturation, blocks, n_bits, tables, stored, half)
