"""Embedding tables as int8 rows with a scale each: rows are looked up before they are dequantized."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxcompress.encodings.affine import Affine
from onnxcompress.model.weights import Weight
from onnxcompress.numerics.affine import quantize_weight
from onnxcompress.numerics.error import relative_rms
from onnxcompress.passes.quantization.job import Job
from onnxcompress.passes.quantization.rewrite import as_seen, integer, take_over

NODE_BYTES = 260  # four nodes and two constants, beside their names


def rows(weight: Weight, job: Job) -> bool:
    """Rewrite every lookup in `weight`:

        Gather(table, ids)  ->  Cast(Gather(q, ids)) * Gather(scale[rows, 1], ids)

    False, with nothing done, where a consumer is no lookup of float32 rows or the file would not get smaller.
    """
    if not job.target.integer_rows or not isinstance(weight.owner, ir.Graph) or len(weight.shape) != 2:
        return False
    array = weight.array()
    for use in weight.uses:
        if use.node.op_type != "Gather" or use.node.domain or use.index != 0 or integer(use.node, "axis", 0) != 0:
            return False
        seen = as_seen(use, array[:1])
        if seen is None or seen.dtype != np.float32 or seen.shape != array[:1].shape:
            return False
        if any(node.op_type == "Transpose" for node in use.path):
            return False
    q, scale, _ = quantize_weight(array.astype(np.float32, copy=False), axis=0 if job.per_channel else None)
    axis = 0 if job.per_channel else None
    encoding = Affine(q, scale, None, axis, form="integer", masked=job.is_pruned(weight))
    name, before = weight.value.name or "", weight.nbytes
    if encoding.nbytes + len(weight.uses) * (NODE_BYTES + 12 * len(name)) >= before:
        return False
    error = relative_rms(array, encoding.decode())
    if error > job.max_error:
        return False
    job.note_overridable(weight)
    constants = job.tape(weight.owner)
    integers = job.constant(constants, q, f"{name}.q", encoding.notes())
    scales = constants.constant(scale.reshape(-1, 1) if job.per_channel else scale, f"{name}.scale")
    constants.place()
    for use in weight.uses:
        owner = use.node.graph
        assert owner is not None
        tape, y, ids = job.tape(owner), use.node.outputs[0].name, use.node.inputs[1]
        picked = tape.op("Gather", [integers, ids], f"{y}.rows")
        picked = tape.op("Cast", [picked], f"{y}.float_rows", {"to": ir.DataType.FLOAT})
        factor = tape.op("Gather", [scales, ids], f"{y}.row_scales") if job.per_channel else scales
        take_over(tape, use.node, tape.op("Mul", [picked, factor], f"{y}.embedded"))
    job.touched(weight, before, encoding.nbytes, error, "int8 rows, looked up as integers")
    job.count("embedding rows", len(weight.uses))
    return True
