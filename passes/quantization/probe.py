"""Tries each integer layer by itself: float activations in, integers through one layer, against the float result."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcompress.calibration.feeding import outputs, spread
from onnxcompress.calibration.sites import Sites
from onnxcompress.passes.quantization.layers import Layer
from onnxcompress.passes.quantization.placement import Point
from onnxcompress.passes.quantization.qdq import Scale

CALLS = 16
LOUDEST = 120.0  # dB


def losses(
    model: ir.Model,
    found: Sequence[Layer],
    points: Mapping[int, Point],
    scales: Mapping[int, Scale],
    names: Mapping[int, str],
    feeder: Iterable[Any],
    threads: int,
) -> list[float]:
    """Signal to quantization noise ratio of each layer's output over a few calls, in dB; NaN where it never ran.

    The lower of the ratio of sums and the mean over calls, in which quiet calls of a stream count as much as loud
    ones. All layers are tried in one run beside the float model; only sums of squares leave the graph.
    """
    sites = Sites(model)
    sums: list[tuple[str, str] | None] = []
    for layer in found:
        known = [names.get(id(value)) for value in (layer.x, layer.y)]
        usable = all(name is not None and name in sites for name in known)
        sums.append(_try(sites, layer, points, scales, names) if usable else None)
    tapped, where, computed = sites.seen([name for pair in sums if pair for name in pair])
    wanted = list(dict.fromkeys([*where.values(), *computed.values()]))
    step = spread(feeder, CALLS)
    heard: list[list[tuple[float, float]]] = [[] for _ in found]
    for results, _ in outputs(tapped, wanted, feeder, limit=CALLS, step=step, threads=threads):
        for index, pair in enumerate(sums):
            if pair is None or any(name not in where for name in pair):
                continue
            if pair[0] in computed and not np.any(results[computed[pair[0]]]):
                continue
            signal, noise = (float(np.sum(results[where[name]], dtype=np.float64)) for name in pair)
            if signal > 0 or noise > 0:
                heard[index].append((signal, noise))
    return [_ratio(calls) for calls in heard]


def _ratio(calls: Sequence[tuple[float, float]]) -> float:
    if not calls:
        return math.nan
    mean = sum(_decibel(*call) for call in calls) / len(calls)
    return min(mean, _decibel(sum(signal for signal, _ in calls), sum(noise for _, noise in calls)))


def _decibel(signal: float, noise: float) -> float:
    """Between -LOUDEST and LOUDEST, so that a mean stays finite."""
    if signal == 0 or noise == 0:
        return LOUDEST if noise == 0 else -LOUDEST
    return max(-LOUDEST, min(LOUDEST, 10 * math.log10(signal / noise)))


def _try(
    sites: Sites,
    layer: Layer,
    points: Mapping[int, Point],
    scales: Mapping[int, Scale],
    names: Mapping[int, str],
) -> tuple[str, str]:
    """Add the layer in integers beside the float one; the names of the sums of squares of signal and noise."""
    at = names[id(layer.y)]
    x = _through(sites, at, sites.value(names[id(layer.x)]), scales[id(layer.x)])
    q, scale = layer.encoding.q, layer.encoding.scale
    zero = sites.constant(at, np.zeros(scale.shape, np.int8))
    axis = {} if layer.encoding.axis is None else {"axis": layer.encoding.axis}
    w = sites.add(at, "DequantizeLinear", [sites.constant(at, q), sites.constant(at, scale), zero], axis)
    inputs: list[ir.Value | None] = [x, w]
    if layer.bias is not None:
        inputs.append(sites.value(names[id(layer.bias)]))
    y = sites.add(at, layer.node.op_type, inputs, _attributes(layer.node))
    reference = layer.y
    if reference is not layer.node.outputs[0]:
        node = reference.producer()
        assert node is not None
        bounds = [None if v is None else sites.value(names[id(v)]) for v in node.inputs[1:]]
        y = sites.add(at, node.op_type, [y, *bounds], _attributes(node))
    if id(reference) in points and id(reference) in scales:
        y = _through(sites, at, y, scales[id(reference)])
    noise = sites.add(at, "Sub", [sites.value(at), y])
    ends = [
        sites.add(at, "ReduceSumSquare", [value], {"keepdims": 0}, scalar=True) for value in (sites.value(at), noise)
    ]
    return sites.name(at, ends[0]), sites.name(at, ends[1])


def _through(sites: Sites, at: str, value: ir.Value, scale: Scale) -> ir.Value:
    constants = [sites.constant(at, scale.scale), sites.constant(at, scale.zero_point)]
    kind = ir.DataType.from_numpy(scale.zero_point.dtype)
    q = sites.add(at, "QuantizeLinear", [value, *constants], dtype=kind)
    return sites.add(at, "DequantizeLinear", [q, *constants])


def _attributes(node: ir.Node) -> dict[str, Any]:
    return {name: attribute.value for name, attribute in node.attributes.items()}
