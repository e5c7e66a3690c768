"""Tries each integer layer by itself: float activations in, integers through one layer, against the float result."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcompress.calibration.feeding import outputs
from onnxcompress.calibration.sites import Sites
from onnxcompress.passes.quantization.layers import Layer
from onnxcompress.passes.quantization.placement import Point
from onnxcompress.passes.quantization.qdq import Scale

CALLS = 8


def losses(
    model: ir.Model,
    found: Sequence[Layer],
    points: Mapping[int, Point],
    scales: Mapping[int, Scale],
    names: Mapping[int, str],
    feeder: Iterable[Any],
    threads: int,
) -> list[float]:
    """Signal to quantization noise ratio in dB of each layer's output over a few calls; NaN where it never ran.

    All layers are tried in one run beside the float model; only sums of squares leave the graph.
    """
    sites = Sites(model)
    sums: list[tuple[str, str] | None] = []
    for layer in found:
        known = [names.get(id(value)) for value in (layer.x, layer.y)]
        usable = all(name is not None and name in sites for name in known)
        sums.append(_try(sites, layer, points, scales, names) if usable else None)
    tapped, where, computed = sites.seen([name for pair in sums if pair for name in pair])
    wanted = list(dict.fromkeys([*where.values(), *computed.values()]))
    totals = np.zeros((len(found), 2))
    for results, _ in outputs(tapped, wanted, feeder, limit=CALLS, threads=threads):
        for index, pair in enumerate(sums):
            if pair is None or any(name not in where for name in pair):
                continue
            if pair[0] in computed and not np.any(results[computed[pair[0]]]):
                continue
            totals[index] += [float(np.sum(results[where[name]], dtype=np.float64)) for name in pair]
    return [_decibel(signal, noise) for signal, noise in totals]


def _decibel(signal: float, noise: float) -> float:
    if signal == 0 and noise == 0:
        return math.nan
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


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
