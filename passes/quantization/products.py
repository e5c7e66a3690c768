"""MatMul and Gemm with constant weights as integer products of activations quantized at run time."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxcompress.encodings.affine import Affine
from onnxcompress.model.roles import Use
from onnxcompress.model.weights import Weight
from onnxcompress.passes.quantization.integers import per_channel
from onnxcompress.passes.quantization.job import Job
from onnxcompress.passes.quantization.rewrite import after, as_seen, integer, plain_gemm, take_over
from onnxcompress.passes.quantization.weight_only import error_of

LEAST_OPSET = 11  # DynamicQuantizeLinear
NODE_BYTES = 420  # seven nodes and their constants, beside the names


class DynamicProducts:
    """Rewrites products; activations that several of them take are quantized once.

        x, x_scale, x_zero = DynamicQuantizeLinear(input)
        y = Cast(MatMulInteger(x, q, x_zero)) * (x_scale * scale)  [+ bias]

    ONNX Runtime 1.32 fuses this form to one DynamicQuantizeMatMul, or, where x is shared, to MatMulIntegerToFloat.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._activations: dict[tuple[int, int], tuple[ir.Value, ir.Value, ir.Value]] = {}

    def rewrite(self, weight: Weight) -> str:
        """Rewrite every consumer of `weight`; a reason, with nothing done, where one cannot be."""
        job = self._job
        matrix, why = self._matrix(weight)
        if matrix is None:
            return why
        quantized = per_channel(matrix, 1 if job.per_channel else None, job.weights, [matrix.T])
        axis = 1 if job.per_channel else None
        encoding = Affine(quantized.q, quantized.scale, None, axis, form="integer", masked=job.is_pruned(weight))
        name, before = weight.value.name or "", weight.nbytes
        names = sum(len(value.name or "") for use in weight.uses for value in use.node.outputs)
        if encoding.nbytes + len(weight.uses) * NODE_BYTES + 10 * len(name) + 8 * names >= before:
            return "too small to gain by integer products"
        error = error_of(matrix, encoding)
        if error > job.max_error:
            return f"relative error {error:.3f} > {job.max_error} in integers that cannot saturate"
        job.note_overridable(weight)
        assert isinstance(weight.owner, ir.Graph)
        tape = job.tape(weight.owner)
        q = job.constant(tape, quantized.q, f"{name}.q", encoding.notes())
        scale = job.constant(tape, quantized.scale, f"{name}.scale")
        tape.place()
        for use in weight.uses:
            self._rewrite(use, q, scale)
        job.touched(weight, before, encoding.nbytes, error, f"integer product, {job.weights} range")
        job.count("dynamic integer products", len(weight.uses))
        return ""

    def _matrix(self, weight: Weight) -> tuple[np.ndarray | None, str]:
        """The weight as float32 [K, N], or why it cannot be multiplied in integers."""
        job = self._job
        if not job.target.dynamic:
            return None, f"{job.target.name} does not quantize activations at run time"
        if weight.model.opset_imports.get("", 1) < LEAST_OPSET:
            return None, f"integer products of run-time activations need opset {LEAST_OPSET}"
        if not isinstance(weight.owner, ir.Graph):
            return None, "it is in a function"
        array, found = weight.array(), None
        for use in weight.uses:
            seen = as_seen(use, array) if use.index == 1 and use.role in ("matmul", "gemm") else None
            if seen is None or use.node.domain or use.node.op_type not in ("MatMul", "Gemm"):
                return None, "a consumer is no plain product, or sees it through a reshape"
            if seen.ndim != 2 or seen.dtype != np.float32 or use.node.graph is None:
                return None, "a consumer sees no float32 matrix"
            if use.node.op_type == "Gemm":
                if not plain_gemm(use.node):
                    return None, "a Gemm that scales or turns its operands"
                seen = seen.T if integer(use.node, "transB", 0) else seen
            rank = use.node.inputs[0].shape if use.node.inputs[0] is not None else None
            if rank is not None and len(rank) < 2:
                return None, "a vector times a matrix"
            if found is not None and found.shape + found.strides != seen.shape + seen.strides:
                return None, "its consumers see it in different orders"
            found = seen
        return (np.ascontiguousarray(found), "") if found is not None else (None, "nothing consumes it")

    def _rewrite(self, use: Use, q: ir.Value, scale: ir.Value) -> None:
        node = use.node
        owner, x, bias = node.graph, node.inputs[0], node.inputs[2] if len(node.inputs) > 2 else None
        assert isinstance(owner, ir.Graph)
        assert x is not None
        xq, x_scale, x_zero = self._activation(owner, x, node)
        name, tape = node.outputs[0].name, self._job.tape(owner)
        product = tape.op("MatMulInteger", [xq, q, x_zero], f"{name}.integer")
        product = tape.op("Cast", [product], f"{name}.float", {"to": ir.DataType.FLOAT})
        factor = tape.op("Mul", [x_scale, scale], f"{name}.rescale")
        y = tape.op("Mul", [product, factor], f"{name}.scaled")
        if bias is not None:
            y = tape.op("Add", [y, bias], f"{name}.biased")
        take_over(tape, node, y)

    def _activation(self, owner: ir.Graph, x: ir.Value, node: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value]:
        """`x` quantized in `owner`, once for all its products there."""
        key = (id(owner), id(x))
        if key not in self._activations:
            outputs = [ir.Value(name=f"{x.name}.dynamic{part}") for part in ("", "_scale", "_zero_point")]
            made = ir.Node("", "DynamicQuantizeLinear", [x], outputs=outputs, name=f"{x.name}/DynamicQuantizeLinear")
            anchor = after(x, owner)
            assert anchor is not None
            owner.insert_before(anchor, made)
            self._activations[key] = (outputs[0], outputs[1], outputs[2])
        return self._activations[key]
