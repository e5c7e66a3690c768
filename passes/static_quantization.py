"""Static int8 quantization: activations in ranges learned from calibration data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal

import onnx_ir as ir

from onnxcompress.calibration.ranges import ranges
from onnxcompress.contract import Coverage, Needs, Pass, Reason, Run, parameter
from onnxcompress.errors import PassError
from onnxcompress.model import bridge
from onnxcompress.model.shapes import values
from onnxcompress.model.weights import Weight, weights
from onnxcompress.passes.quantization import batchnorm, qdq
from onnxcompress.passes.quantization.job import Job
from onnxcompress.passes.quantization.layers import Layer, layers
from onnxcompress.passes.quantization.opset import lift
from onnxcompress.passes.quantization.placement import Point, place
from onnxcompress.passes.quantization.probe import losses
from onnxcompress.passes.quantization.rows import rows
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
    min_sqnr: float = parameter(20.0, "dB of signal to noise below which a layer keeps float activations")
    overflow: Literal["auto", "full", "neighbours", "reduced"] = parameter(
        "auto",
        "range of integer weights: full, as far as neighbours cannot saturate, reduced to +-64, or the target's own",
        choices=("auto", "full", "neighbours", "reduced"),
    )

    def apply(self, model: ir.Model, run: Run) -> Coverage:
        if run.feeds is None:
            raise PassError(f"{self.name}: needs calibration data (--calibration DATA), or use dynamic-quantization")
        job = Job.of(model, run, self.overflow, self.per_channel, self.min_elements, self.max_error)
        before = {weight.key: weight.nbytes for weight in weights(model, run.work)}
        obstacle = self._lift(model, run.feeds, before, job)
        if not obstacle:
            batchnorm.fold(weights(model, run.work), job)
        found = weights(model, run.work)
        expanded, tables, candidates = WeightOnly(job), [], []
        for weight in found:
            refused = refuse(weight, job)
            if refused is not None and refused.reason is Reason.ROLE and weight.role == "bias":
                continue  # accounted for when it is known whether its layer runs in integers
            if refused is not None:
                job.coverage.left.append(refused)
            elif not self.select.allows(weight):
                job.left(weight, Reason.EXCLUDED, "")
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
        done = self._quantize(model, run, job, candidates, expanded, biases)
        for weight in biases.values():
            if weight.key not in done and weight.key in before:
                refused = refuse(weight, job)
                assert refused is not None
                job.coverage.left.append(refused)
        for weight in tables:
            if not rows(weight, job):
                expanded.add(weight)
        expanded.commit()
        known = job.coverage.keys()
        job.coverage.removed(before, [key for key in before if key not in known], "folded into a convolution")
        if job.target.note:
            job.coverage.warnings.append(job.target.note)
        return job.coverage

    def _lift(self, model: ir.Model, feeder: Iterable[Any], before: dict[str, int], job: Job) -> str:
        """Bring the model to an opset with per-channel Q/DQ; "" or the obstacle."""
        opset = model.opset_imports.get("", 1)
        if opset >= LEAST_OPSET or not before:
            return ""
        why = lift(model, LEAST_OPSET, feeder)
        if not why:
            job.count(f"opset lifted from {opset} to {LEAST_OPSET}")
            return ""
        obstacle = f"integer layers need opset {LEAST_OPSET}, the model has {opset}: {why}"
        job.coverage.warnings.append(obstacle)
        return obstacle

    def _quantize(
        self,
        model: ir.Model,
        run: Run,
        job: Job,
        candidates: list[Layer],
        expanded: WeightOnly,
        biases: dict[int, Weight],
    ) -> set[str]:
        """Choose and write the integer layers; the keys of biases re-encoded."""
        if not candidates:
            return set()
        assert run.feeds is not None
        names = _names(model)
        points = place(candidates, job.target)
        run.progress.start(f"{self.name}: calibration", 2)
        seen = ranges(model, _named(points, names), run.feeds, threads=run.threads)
        run.progress.step()
        scales = {
            key: qdq.activation_scale(seen[names[key]], job.target)
            for key in points
            if key in names and names[key] in seen and seen[names[key]].known
        }

        def settle(kept: list[Layer]) -> dict[int, Point]:
            """Points of the layers kept; layers whose activations have no range are given up first."""
            while True:
                points = place(kept, job.target)
                resolved = qdq.resolve(points, scales)
                blind = {id(layer.weight) for layer in kept if _blind(layer, points, resolved)}
                if not blind:
                    return {key: point for key, point in points.items() if key in resolved}
                for layer in _firsts(kept):
                    if id(layer.weight) in blind:
                        expanded.add(layer.weight, "its activations have no range in the calibration data")
                kept[:] = [layer for layer in kept if id(layer.weight) not in blind]

        points = settle(candidates)
        worst: dict[int, float] = {}
        ratios = losses(model, candidates, points, qdq.resolve(points, scales), names, run.feeds, run.threads)
        for layer, ratio in zip(candidates, ratios, strict=True):
            ratio = math.inf if math.isnan(ratio) else ratio
            worst[id(layer.weight)] = min(worst.get(id(layer.weight), math.inf), ratio)
        for layer in _firsts(candidates):
            if worst[id(layer.weight)] < self.min_sqnr:
                expanded.add(layer.weight, f"in integers its layer has {worst[id(layer.weight)]:.1f} dB")
        candidates[:] = [layer for layer in candidates if worst[id(layer.weight)] >= self.min_sqnr]
        points = settle(candidates)
        resolved = qdq.resolve(points, scales)
        done = qdq.write_biases(candidates, points, resolved, biases, job)
        qdq.write_weights(candidates, job)
        qdq.write_points(points, resolved, job)
        run.progress.done()
        return done


def _blind(layer: Layer, points: dict[int, Point], resolved: dict[int, qdq.Scale]) -> bool:
    """True when what the layer takes, or what it is to give in integers, has no range."""
    return id(layer.x) not in resolved or (id(layer.y) in points and id(layer.y) not in resolved)


def _firsts(found: Sequence[Layer]) -> Iterable[Layer]:
    """One layer a weight."""
    return {id(layer.weight): layer for layer in found}.values()


def _names(model: ir.Model) -> dict[int, str]:
    """Every value's name with the path of its scope, by id."""
    return {id(v): f"{path}{v.name}" for path, owner in bridge.scopes(model) for v in values(owner) if v.name}


def _named(points: dict[int, Point], names: dict[int, str]) -> list[str]:
    return [names[key] for key, point in points.items() if key in names and point.like is None]
