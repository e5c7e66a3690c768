"""Scales and zero points of activations against the data they were chosen from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcompress.calibration.ranges import ranges
from onnxcompress.calibration.statistic import MinMax
from onnxcompress.encodings import recognize
from onnxcompress.encodings.affine import limits
from onnxcompress.model import bridge
from onnxcompress.numerics.affine import choose_scale
from onnxcompress.targets import TARGETS
from onnxcompress.verification.result import Problem
from onnxcompress.verification.structure import Anatomy

CLOSE = 2e-3  # relative difference of scales: folding a BatchNormalization moves a range by rounding alone
BORDER = 0.52  # of a step between the zero point and its place before it was rounded
_MOVE = frozenset[str]().union(*(target.pass_through for target in TARGETS.values()))


def check(out: ir.Model, parent: Anatomy, feeds: Any, threads: int = 1) -> Iterator[Problem]:
    """Every QuantizeLinear whose scale and zero point do not cover the range that its activation has in `feeds`.

    A value that an operator only moves may have the scale of what it was moved from.
    """
    points = []
    for path, owner in bridge.scopes(out):
        for node in owner:
            if node.op_type != "QuantizeLinear" or len(node.inputs) < 2:
                continue
            source, scale = node.inputs[0], recognize.constant(node.inputs[1])
            if scale is not None and scale.size == 1 and source is not None and recognize.constant(source) is None:
                points.append((node, float(scale.numpy().reshape(())), _names(path, source, parent)))
    wanted = list(dict.fromkeys(name for _, _, names in points for name in names))
    seen = ranges(parent.model, wanted, feeds, threads=threads) if wanted else {}
    for node, scale_, names in points:
        known = [seen[name] for name in names if name in seen and seen[name].known]
        if known and not any(_fits(node, scale_, range_) for range_ in known):
            fed = [use.node for use in node.outputs[0].uses()]
            readers = [use.node.outputs[0].name or "" for each in fed for use in each.outputs[0].uses()]
            message = (
                f"has the scale {scale_:.6g} and zero point {_zero(node)}, which its range in the calibration data, "
                f"{known[0].least:.6g} to {known[0].most:.6g}, does not give"
            )
            yield Problem("activation", names[0], message, (names[0], *readers))


def _names(path: str, source: ir.Value, parent: Anatomy) -> list[str]:
    """What an activation is called in the parent, and what it was moved from."""
    found: list[str] = []
    value: ir.Value | None = source
    while value is not None:
        node = value.producer()
        name = f"{path}{(value.name or '').removesuffix('.float')}"
        found.append(name)
        if node is None or not node.inputs or node.op_type not in (*_MOVE, "DequantizeLinear", "QuantizeLinear"):
            break
        value = node.inputs[0]
    return list(dict.fromkeys(found))


def _zero(node: ir.Node) -> int:
    zero = recognize.constant(node.inputs[2]) if len(node.inputs) > 2 else None
    return 0 if zero is None else int(zero.numpy().reshape(-1)[0])


def _fits(node: ir.Node, scale: float, seen: MinMax) -> bool:
    zero = recognize.constant(node.inputs[2]) if len(node.inputs) > 2 else None
    dtype = zero.dtype.numpy() if zero is not None else np.dtype(np.uint8)
    if dtype.name not in ("int8", "uint8", "int16", "uint16"):
        return True
    signed = dtype.kind == "i"
    wanted, _ = choose_scale(seen.least, seen.most, dtype=dtype.name, symmetric=signed)
    if abs(scale / float(wanted) - 1) > CLOSE:
        return False
    low, high = limits(dtype)
    place = 0.0 if signed else low - min(seen.least, 0.0) / float(wanted)
    return abs(_zero(node) - min(max(place, low), high)) <= BORDER
