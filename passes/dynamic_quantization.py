"""Dynamic int8 quantization: integer weights, activations quantized at run time where that is fast."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import onnx_ir as ir

from onnxcompress.contract import Coverage, Pass, Reason, Run, parameter
from onnxcompress.model.weights import Weight, weights
from onnxcompress.passes.quantization.job import Job
from onnxcompress.passes.quantization.products import DynamicProducts
from onnxcompress.passes.quantization.rows import rows
from onnxcompress.passes.quantization.weight_only import WeightOnly, refuse


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicQuantization(Pass):
    """Store weights as int8, symmetric per output channel; needs no data.

    1. MatMul and Gemm with constant weights become integer products of activations quantized at run time (uint8), in
       every scope, in the form ONNX Runtime fuses. The integers keep to a range that cannot saturate on the target.
    2. Embedding tables become int8 rows with a scale each, looked up as integers.
    3. Weights of convolutions and recurrent cells, and any that 1 and 2 cannot treat, are stored as int8 and expanded
       when the model is loaded: dynamic integer convolutions run 2 to 10 times slower than float.
    4. Left in float: fixed transforms (Fourier, mel), weights with too large an error, too small ones, biases.
    """

    name: ClassVar[str] = "dynamic-quantization"

    per_channel: bool = parameter(True, "one scale an output channel, or one a tensor")
    min_elements: int = parameter(64, "smaller weights stay in float", ge=1)
    max_error: float = parameter(0.05, "relative root-mean-square error above which a weight stays in float", gt=0)
    overflow: Literal["auto", "full", "neighbours", "reduced"] = parameter(
        "auto",
        "range of integer weights: full, as far as neighbours cannot saturate, reduced to +-64, or the target's own",
        choices=("auto", "full", "neighbours", "reduced"),
    )

    def refuses(self, weight: Weight) -> tuple[Reason, str] | None:
        return refuse(weight, self.select, self.min_elements)

    def apply(self, model: ir.Model, run: Run) -> Coverage:
        job = Job.of(model, run, self.overflow, self.per_channel, self.min_elements, self.max_error)
        products, expanded = DynamicProducts(job), WeightOnly(job)
        found = weights(model, run.work)
        run.progress.start(self.name, len(found))
        for weight in found:
            refused = self.refuses(weight)
            if refused is not None:
                job.left(weight, *refused)
            elif weight.role == "embedding":
                if not rows(weight, job):
                    expanded.add(weight)
            elif weight.role in ("matmul", "gemm"):
                why = products.rewrite(weight)
                if why:
                    expanded.add(weight, why)
            else:
                expanded.add(weight)
            run.progress.step()
        expanded.commit()
        run.progress.done()
        return job.finish()
