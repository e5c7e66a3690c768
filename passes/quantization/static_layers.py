"""Calibrates the layers that could run in integers, gives up those that lose too much, and writes the rest."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

import onnx_ir as ir

from onnxcompress.calibration.ranges import ranges
from onnxcompress.contract import Run
from onnxcompress.model import bridge
from onnxcompress.model.shapes import values
from onnxcompress.model.weights import Weight
from onnxcompress.passes.quantization import qdq
from onnxcompress.passes.quantization.job import Job
from onnxcompress.passes.quantization.layers import Layer
from onnxcompress.passes.quantization.placement import Point, place
from onnxcompress.passes.quantization.probe import losses
from onnxcompress.passes.quantization.weight_only import WeightOnly


class StaticLayers:
    """The candidates among a model's layers; those given up go to `expanded`, with the reason."""

    def __init__(self, job: Job, run: Run, candidates: Sequence[Layer], expanded: WeightOnly) -> None:
        self._job = job
        self._run = run
        self._kept = list(candidates)
        self._expanded = expanded
        self._names = _names(job.model)
        self._scales: dict[int, qdq.Scale] = {}

    def quantize(self, min_sqnr: float, biases: Mapping[int, Weight]) -> set[str]:
        """Do all of it; the keys of the biases (by id of their value) that were re-encoded."""
        if not self._kept:
            return set()
        self._calibrate()
        self._try(self._settle(), min_sqnr)
        points = self._settle()
        if not qdq.saves(self._kept, points):
            self._give_up({id(layer.weight): "too small to gain by integers" for layer in self._kept})
            return set()
        scales = qdq.resolve(points, self._scales)
        done = qdq.write_biases(self._kept, points, scales, biases, self._job)
        qdq.write_weights(self._kept, self._job)
        qdq.write_points(points, scales, self._job)
        return done

    def _calibrate(self) -> None:
        assert self._run.feeds is not None
        points = place(self._kept, self._job.target)
        roots = {key: self._names[key] for key, p in points.items() if p.like is None and key in self._names}
        seen = ranges(self._job.model, list(roots.values()), self._run.feeds, threads=self._run.threads)
        for key, name in roots.items():
            if name in seen and seen[name].known:
                self._scales[key] = qdq.activation_scale(seen[name], self._job.target)

    def _settle(self) -> dict[int, Point]:
        """The points of the layers kept, all with a scale; layers whose activations have none are given up."""
        while True:
            points = place(self._kept, self._job.target)
            scaled = qdq.resolve(points, self._scales)
            blind = [layer for layer in self._kept if _blind(layer, points, scaled)]
            if not blind:
                return {key: point for key, point in points.items() if key in scaled}
            self._give_up({id(layer.weight): "its activations were never seen in the data" for layer in blind})

    def _try(self, points: Mapping[int, Point], min_sqnr: float) -> None:
        """Give up weights of which some layer, by itself in integers, falls below `min_sqnr` dB."""
        assert self._run.feeds is not None
        if not self._kept:
            return
        scales = qdq.resolve(points, self._scales)
        found = losses(self._job.model, self._kept, points, scales, self._names, self._run.feeds, self._run.threads)
        poor: dict[int, str] = {}
        for layer, ratio in sorted(zip(self._kept, found, strict=True), key=lambda pair: -pair[1]):
            if not math.isnan(ratio) and ratio < min_sqnr:
                poor[id(layer.weight)] = f"in integers its layer has {ratio:.1f} dB, below {min_sqnr:g}"
        self._give_up(poor)

    def _give_up(self, why: Mapping[int, str]) -> None:
        for layer in _firsts(self._kept):
            if id(layer.weight) in why:
                self._expanded.add(layer.weight, why[id(layer.weight)])
        self._kept = [layer for layer in self._kept if id(layer.weight) not in why]


def _blind(layer: Layer, points: Mapping[int, Point], scaled: Collection[int]) -> bool:
    """True when what the layer takes, or what it is to give in integers, has no range."""
    return id(layer.x) not in scaled or (id(layer.y) in points and id(layer.y) not in scaled)


def _firsts(found: Sequence[Layer]) -> Iterable[Layer]:
    """One layer a weight."""
    return {id(layer.weight): layer for layer in found}.values()


def _names(model: ir.Model) -> dict[int, str]:
    """Every value's name with the path of its scope, by id."""
    return {id(v): f"{path}{v.name}" for path, owner in bridge.scopes(model) for v in values(owner) if v.name}
