"""Static int8 quantization: activations in ranges learned from calibration data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal

import onnx_ir as ir

from onnxcompress.contract import Coverage, Needs, Pass, Reason, Run, parameter
from onnxcompress.errors import PassError
from onnxcompress.lift import lift
from onnxcompress.model.weights import Weight, weights
from onnxcompress.passes.quantization import batchnorm
from onnxcompress.passes.quantization.job import Job
from onnxcompress.passes.quantization.layers import layers
from onnxcompress.passes.quantization.rows import rows
from onnxcompress.passes.quantization.static_layers import StaticLayers
from onnxcompress.passes.quantization.weight_only import WeightOnly, refuse

LEAST_OPSET = 13  # QuantizeLinear and DequantizeLinear per channel


@dataclasses.dataclass(frozen=True, kw_only=True)
class StaticQuantization(Pass):
    """Store weights and activations of layers as int8, in the Q/DQ form the target fuses; needs calibration data.

    1. Conv, MatMul and Gemm with constant weights take quantized activations (for the CPU: uint8) and int8 weights per
       output channel. BatchNormalization behind a convolution is folded first.
    2. What lies between convolutions stays in integers where the target can: Relu, Clip, residual additions,
       concatenations, poolings, reshapes. Softmax, normalization, masks and products of two activations stay in float.
    3. Each layer is tried by itself on some of the data; one that loses too much keeps float activations.
    4. Embedding tables become int8 rows, looked up as integers. Recurrent weights, and any that 1 to 3 leave, are
       stored as int8 and expanded when the model is loaded.
    5. A model below opset 13 is lifted, if its outputs are shown to stay the same; else 4 applies to all its weights.
    """

    name: ClassVar[str] = "static-quantization"
    needs: ClassVar[Needs] = Needs(calibration=True)

    method: Literal["minmax"] = parameter("minmax", "how ranges are chosen", choices=("minmax",))
    per_channel: bool = parameter(True, "one scale an output channel, or one a tensor")
    min_elements: int = parameter(64, "smaller weights stay in float", ge=1)
    max_error: float = parameter(0.05, "relative root-mean-square error above which a weight stays in float", gt=0)
    min_sqnr: float = parameter(24.0, "dB of signal to noise below which a layer keeps float activations")
    overflow: Literal["auto", "full", "neighbours", "reduced"] = parameter(
        "auto",
        "range of integer weights: full, as far as neighbours cannot saturate, reduced to +-64, or the target's own",
        choices=("auto", "full", "neighbours", "reduced"),
    )

    def refuses(self, weight: Weight) -> tuple[Reason, str] | None:
        return refuse(weight, self.select, self.min_elements)

    def apply(self, model: ir.Model, run: Run) -> Coverage:
        if run.feeds is None:
            raise PassError(f"{self.name}: needs calibration data (--calibration DATA), or use dynamic-quantization")
        job = Job.of(model, run, self.overflow, self.per_channel, self.min_elements, self.max_error)
        found = weights(model, run.work)
        before = {weight.key: weight.nbytes for weight in found}
        obstacle = self._lift(model, run.feeds, found, job)
        if not obstacle:
            batchnorm.fold(weights(model, run.work), job)
        found = weights(model, run.work)
        expanded, tables, candidates = WeightOnly(job), [], []
        run.progress.start(self.name, len(found))
        for weight in found:
            run.progress.step()
            refused = self.refuses(weight)
            if refused is not None and refused[0] is Reason.ROLE and weight.role == "bias":
                continue  # accounted for when it is known whether its layer runs in integers
            if refused is not None:
                job.left(weight, *refused)
            elif weight.role == "embedding":
                tables.append(weight)
            elif weight.role == "recurrent" or obstacle:
                expanded.add(weight, obstacle)
            else:
                made = layers(weight, job)
                if isinstance(made, str):
                    expanded.add(weight, made)
                else:
                    candidates += made
        biases = {id(w.value): w for w in found if w.role == "bias"}
        done = StaticLayers(job, run, candidates, expanded).quantize(self.min_sqnr, biases)
        for weight in biases.values():
            if weight.key not in done and weight.key in before:
                refused = self.refuses(weight)
                assert refused is not None
                job.left(weight, *refused)
        for weight in tables:
            if not rows(weight, job):
                expanded.add(weight)
        expanded.commit()
        run.progress.done()
        known = job.coverage.keys()
        job.coverage.removed(before, [key for key in before if key not in known], "folded into a convolution")
        if job.target.note:
            job.coverage.warnings.append(job.target.note)
        return job.finish()

    def _lift(self, model: ir.Model, feeder: Iterable[Any], found: Sequence[Weight], job: Job) -> str:
        """Bring the model to an opset with per-channel Q/DQ; "" or the obstacle."""
        opset = model.opset_imports.get("", 1)
        if opset >= LEAST_OPSET or all(weight.role not in ("conv", "matmul", "gemm") for weight in found):
            return ""
        why = lift(model, LEAST_OPSET, feeder)
        if not why:
            job.count(f"opset lifted from {opset} to {LEAST_OPSET}")
            return ""
        obstacle = f"integer layers need opset {LEAST_OPSET}, the model has {opset}: {why}"
        job.coverage.warnings.append(obstacle)
        return obstacle
